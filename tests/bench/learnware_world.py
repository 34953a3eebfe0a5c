"""The market of the learnware benchmark: who owns which records, which texts score, and how a query is drawn.  All of it from the seed."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nodes.finetune import Recipe
from nodes.mixes import Owner
from protocol.errors import UsageError
from tests.bench.experiments import siblings_of
from tests.bench.rules import Array

LABELS_FOR_SUBSETS = 7  # a task with fewer has no subsets worth the name
BUCKETS, LENGTHS, SHORT_CHARACTERS = 64, 8, 60


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is; everything has a sensible default but the data."""

    data: Path
    out: Path
    tasks: tuple[str, ...] = ()  # that are evaluated; empty = every task that the map was not fitted on
    public_tasks: tuple[str, ...] = ()  # on which attempts are calibrated; empty = those that the map was fitted on
    specialists: int = 30
    smallest: int = 60  # records of an owner, drawn evenly in their logarithm
    largest: int = 400
    texts: int = 32  # test records a task on which losses are measured
    validation: int = 8  # a user's own texts, none of them among the former
    public_specialists: int = 10  # of public tasks, on which attempts are calibrated
    public_texts: int = 12  # test records of a public task on which losses are measured
    queries: int = 5  # a task
    query_size: int = 50
    query_pool: int = 150  # test records a task from which queries are drawn, none of them scored
    draws: int = 3  # of every specification's noise
    epsilon_spec: float = 1.0  # of the specifications that are released
    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 8.0)  # that are looked at beside it, and no noise at all
    delta: float = 1e-6
    adapters: tuple[float | None, ...] = (None,)  # epsilon of the adapters, a block each; None = no guarantee
    private_smallest: int = 250  # owners of one task with so many records train privately as well, and the blocks compare these
    maps: tuple[str, ...] = ("kme-lin-96", "kme-rff-256", "kme-grad-64")  # the first is that of the market
    gradient_records: int = 32  # an owner, and texts a query: gradients cost ten times what states do
    recipe: Recipe = field(default_factory=Recipe)
    pooled_steps: int = 512  # of the one adapter that is trained on everybody's records
    encrypted: int = 1  # queries a task that go through the market's process
    split: int = 24
    larger: str = ""  # directory of a larger frozen model
    larger_texts: int = 8
    seed: int = 1

    def as_json(self) -> dict[str, Any]:
        """Return what makes a run what it is: all but folders, and what is looked at beside it."""
        found = asdict(self)
        for name in ("data", "out", "larger", "larger_texts"):
            del found[name]
        return found

    @classmethod
    def of_run(cls, out: Path) -> Settings:
        """Return the settings of the run in a folder; raise UsageError if none began there."""
        try:
            said = json.loads((out / "run.json").read_text())["settings"]
        except OSError:
            raise UsageError(f"{out}: expected the folder of a run", hint="--out names it") from None
        lists = {name: tuple(value) for name, value in said.items() if isinstance(value, list)}
        return cls(Path(), out, **{**said, **lists, "recipe": Recipe(**said["recipe"])})


def domain_of(task: str) -> str:
    """Return the domain that a task's name begins with."""
    return task.split("-")[0]


def kind_of(owner: str) -> str:
    """Return how an owner's records were chosen: "shard", "labels" or "mixture"."""
    return owner.split("-")[0]


def pairs_of(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of tasks that are declared siblings or of one domain."""
    return [
        (one, other)
        for place, one in enumerate(tasks)
        for other in tasks[place + 1 :]
        if other in siblings_of(one) or domain_of(one) == domain_of(other)
    ]


@dataclass(frozen=True, slots=True)
class Part:
    """What an owner wants of one task."""

    owner: int
    task: str
    wanted: int
    least: int
    subset: bool  # of some labels alone


def read_pool(folder: Path) -> tuple[list[bytes], list[str]]:
    """Return the training lines of a task and the label of each, "" where the task has none."""
    lines = [line.strip() for line in (folder / "train.jsonl").read_bytes().splitlines() if line.strip()]
    meta = folder / "meta.json"
    if not meta.exists() or json.loads(meta.read_text())["kind"] != "classification":
        return lines, [""] * len(lines)
    return lines, [str(json.loads(line)["response"]) for line in lines]


def deal(
    pools: Mapping[str, tuple[list[bytes], list[str]]], count: int, smallest: int, largest: int, seed: int
) -> list[tuple[Owner, list[bytes]]]:
    """Return `count` owners with the lines of their records; no line is given twice.

    First a shard of every task, so that each is owned by somebody; a third of all owners mix two related tasks; the rest are more shards,
    or subsets of at most half of the labels where a task has enough of them.  Sizes are drawn evenly in their logarithm and shrink
    where a task has too few records for all.  Raises UsageError if even `smallest` is too much.
    """
    tasks = sorted(pools)
    if count < len(tasks):
        raise UsageError(f"specialists: expected at least one a task, {len(tasks)}, got {count}")
    rng = random.Random(f"{seed} owners")
    parts: list[Part] = []
    names = []
    pairs = pairs_of(tasks)
    rng.shuffle(pairs)
    mixtures = min(count // 3, count - len(tasks)) if pairs else 0
    order = rng.sample(tasks, len(tasks))
    for place in range(count):
        size = round(math.exp(rng.uniform(math.log(smallest), math.log(largest))))
        if place < count - mixtures:
            task = order[place % len(order)]
            labelled = len(set(pools[task][1])) >= LABELS_FOR_SUBSETS
            subset = place >= len(order) and labelled
            parts.append(Part(place, task, size, smallest, subset))
            names.append(f"{'labels' if subset else 'shard'}-{place + 1:03d}")
        else:
            share = rng.uniform(0.35, 0.65)
            half = -(-smallest // 2)
            for task, own in zip(pairs[place % len(pairs)], (share, 1 - share), strict=True):
                parts.append(Part(place, task, max(half, round(size * own)), half, False))
            names.append(f"mixture-{place + 1:03d}")
    lines: list[list[tuple[str, bytes]]] = [[] for _ in range(count)]
    for task in tasks:
        for part, given in _of_one_task(task, pools[task], [part for part in parts if part.task == task], rng):
            lines[part.owner] += [(task, line) for line in given]
    dealt = []
    for name, own in zip(names, lines, strict=True):
        rng.shuffle(own)
        dealt.append((Owner(name, dict(sorted(Counter(task for task, _ in own).items()))), [line for _, line in own]))
    return dealt


def _of_one_task(
    task: str, pool: tuple[list[bytes], list[str]], parts: Sequence[Part], rng: random.Random
) -> list[tuple[Part, list[bytes]]]:
    """Return who gets which lines of a task; subsets of labels choose first."""
    least, wanted = sum(part.least for part in parts), sum(part.wanted for part in parts)
    if least > len(pool[0]):
        raise UsageError(
            f"{task}: {len(parts)} owners want at least {least} records, it has {len(pool[0])}",
            hint="fewer --specialists, or a smaller --smallest",
        )
    room = min(1.0, (len(pool[0]) - least) / max(wanted - least, 1))
    left = [(line, label) for line, label in zip(*pool, strict=True)]
    rng.shuffle(left)
    given = []
    for part in sorted(parts, key=lambda part: (not part.subset, part.owner)):
        size = part.least + int(room * (part.wanted - part.least))
        if part.subset:
            labels = sorted({label for _, label in left})
            rng.shuffle(labels)
            kept = set(labels[: rng.randint(2, max(2, len(labels) // 2))])
            for label in labels:  # too few records of these: more labels
                if sum(of in kept for _, of in left) >= part.least:
                    break
                kept.add(label)
            own = [pair for pair in left if pair[1] in kept][:size]
        else:
            own = left[:size]
        taken = {id(pair) for pair in own}
        left = [pair for pair in left if id(pair) not in taken]
        given.append((part, [line for line, _ in own]))
    return given


def query_rows(pool: int, size: int, queries: int, seed: int, task: str) -> list[list[int]]:
    """Return the rows of the pool that each query of a task consists of."""
    rng = random.Random(f"{seed} queries {task}")
    return [rng.sample(range(pool), min(size, pool)) for _ in range(queries)]


def label_features(responses: Sequence[str]) -> Array:
    """Return what is visible of labels and form: (n, 72), each row of length 1 and a function of its own response.

    A short response is a label: its hash is one of 64 buckets; of a long one its first word counts.  Beside it the length in doublings.
    """
    rows = np.zeros((len(responses), BUCKETS + LENGTHS))
    for row, response in zip(rows, responses, strict=True):
        words = response.casefold().split()
        text = " ".join(words) if len(response) <= SHORT_CHARACTERS else " ".join(words[:1])
        row[hashlib.sha256(text.encode()).digest()[0] % BUCKETS] = math.sqrt(0.5)
        row[BUCKETS + min(LENGTHS - 1, len(words).bit_length())] = math.sqrt(0.5)
    return rows
