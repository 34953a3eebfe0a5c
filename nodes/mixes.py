"""Which records each owner of a simulation has: one task an owner, a few shards, or a mixture of tasks.

No record is given to two owners, so each owner is a population of its own.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nodes.records import Prompt, parse_record
from protocol.errors import UsageError
from protocol.keys import write_durably

SHARDS_AN_OWNER = 2


@dataclass(frozen=True, slots=True)
class Mix:
    """How records are dealt out: `pure`, `shards` or `dirichlet:ALPHA` (a small ALPHA gives owners of nearly one task each)."""

    kind: str = "pure"
    alpha: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Return the mix that a text names; raise UsageError for any other text."""
        kind, _, number = text.partition(":")
        if kind in ("pure", "shards") and not number:
            return cls(kind)
        if kind == "dirichlet":
            try:
                alpha = float(number)
            except ValueError:
                alpha = math.nan
            if math.isfinite(alpha) and alpha > 0:
                return cls(kind, alpha)
        raise UsageError(
            f"mix: expected pure, shards or dirichlet:ALPHA with ALPHA above 0, got {text[:40]!r}", hint="try --mix dirichlet:0.1"
        )


@dataclass(frozen=True, slots=True)
class Owner:
    """An owner of a simulation, and how many records of each task it has."""

    name: str
    records: Mapping[str, int]

    @property
    def task(self) -> str:
        """The task of most of its records."""
        return max(sorted(self.records), key=lambda task: self.records[task])

    @property
    def count(self) -> int:
        """Number of its records."""
        return sum(self.records.values())


Lines = Sequence[tuple[str, bytes]]  # (task, line) of each record


def deal(
    data: Path, tasks: Sequence[str], nodes: int | None, mix: Mix, records: int | None, minimum: int, choices: random.Random
) -> list[tuple[Owner, list[bytes]]]:
    """Return the owners with the lines of their records; nodes: their number, or None for one owner a task.

    records: at most so many an owner.  Raises RecordError for a line that is no record with a response, UsageError where an owner would
    have fewer than `minimum` records.
    """
    pools = {task: _lines(data / task / "train.jsonl") for task in tasks}
    nodes = nodes or len(tasks)
    match mix.kind:
        case "pure":
            dealt = _pure(pools, tasks, nodes, records)
        case "shards":
            dealt = _shards(pools, nodes, records, choices)
        case _:
            dealt = _dirichlet(pools, nodes, records, mix.alpha, choices)
    owners = [(Owner(name, dict(sorted(Counter(task for task, _ in lines).items()))), [line for _, line in lines]) for name, lines in dealt]
    poorest = min((owner for owner, _ in owners), key=lambda owner: owner.count)
    if poorest.count < minimum:
        raise UsageError(
            f"owners: {poorest.name} would have {poorest.count} records, and a guard wants at least {minimum}",
            hint="ask for fewer --nodes or more --records",
        )
    return owners


def write_owners(folder: Path, owners: Sequence[tuple[Owner, Sequence[bytes]]]) -> None:
    """Write every owner's records, and last the list of owners: where it is, all is."""
    for owner, lines in owners:
        write_durably(records_of(folder, owner), b"\n".join(lines) + b"\n")
    write_durably(folder / "owners.json", json.dumps([asdict(owner) for owner, _ in owners], indent=1).encode())


def read_owners(folder: Path) -> list[Owner] | None:
    """Return the owners that an earlier run wrote, or None if it did not get so far."""
    path = folder / "owners.json"
    return [Owner(**owner) for owner in json.loads(path.read_text())] if path.exists() else None


def records_of(folder: Path, owner: Owner) -> Path:
    """Return the file of an owner's records."""
    return folder / "data" / owner.name / "train.jsonl"


def _lines(path: Path) -> list[bytes]:
    lines = [line.strip() for line in path.read_bytes().splitlines()]
    for number, line in enumerate(lines, start=1):
        if line and isinstance(parse_record(line, f"{path.name}, line {number}"), Prompt):
            raise UsageError(f"{path.name}, line {number}: expected a response beside the prompt")
    return [line for line in lines if line]


def _pure(pools: Mapping[str, list[bytes]], tasks: Sequence[str], nodes: int, records: int | None) -> list[tuple[str, Lines]]:
    dealt: list[tuple[str, Lines]] = []
    for place in range(nodes):
        task = tasks[place % len(tasks)]
        first = place // len(tasks)  # this owner's place among those of its task
        among = len(range(tasks.index(task), nodes, len(tasks)))
        name = task if nodes <= len(tasks) else f"{task}.{first + 1}"
        dealt.append((name, [(task, line) for line in pools[task][first::among][:records]]))
    return dealt


def _shards(pools: Mapping[str, list[bytes]], nodes: int, records: int | None, choices: random.Random) -> list[tuple[str, Lines]]:
    """All records in the order of their tasks, cut into two shards an owner, dealt at random (McMahan et al. 2017, section 3)."""
    everything = [(task, line) for task, lines in pools.items() for line in lines]
    count = SHARDS_AN_OWNER * nodes
    shards = [everything[i * len(everything) // count : (i + 1) * len(everything) // count] for i in range(count)]
    choices.shuffle(shards)
    each = None if records is None else -(-records // SHARDS_AN_OWNER)
    dealt: list[tuple[str, Lines]] = []
    for place in range(nodes):
        own = shards[SHARDS_AN_OWNER * place : SHARDS_AN_OWNER * (place + 1)]
        dealt.append((_numbered(place), [one for shard in own for one in shard[:each]][:records]))
    return dealt


def _dirichlet(
    pools: Mapping[str, list[bytes]], nodes: int, records: int | None, alpha: float, choices: random.Random
) -> list[tuple[str, Lines]]:
    """Each owner draws its shares of the tasks from a symmetric Dirichlet distribution, and its records without replacement by them."""
    left = {task: choices.sample(lines, len(lines)) for task, lines in pools.items()}
    total = sum(map(len, left.values())) // nodes
    dealt: list[tuple[str, Lines]] = []
    for place in range(nodes):
        # The logarithm of a gamma variate of a small shape: at alpha = 0.001 the variate itself is below the smallest float.
        logs = {task: math.log(choices.gammavariate(alpha + 1, 1)) + math.log(1 - choices.random()) / alpha for task in left}
        highest = max(logs.values())
        weights = {task: math.exp(value - highest) for task, value in logs.items()}
        own: list[tuple[str, bytes]] = []
        for _ in range(total if records is None else min(records, total)):
            open_tasks = [task for task, lines in left.items() if lines]
            shares = [weights[task] for task in open_tasks]
            task = choices.choices(open_tasks, shares)[0] if sum(shares) > 0 else choices.choice(open_tasks)
            own.append((task, left[task].pop()))
        dealt.append((_numbered(place), own))
    return dealt


def _numbered(place: int) -> str:
    return f"owner-{place + 1:03d}"
