"""The learnware benchmark's work: specialists, states of the scored texts, and the matrix of losses, each piece a file of the run's folder.

A piece is written whole or not at all and never made twice, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nodes.adapter import Adapter, attach
from nodes.base_model import Activations, BaseModel, Encoded, single_threaded_workers
from nodes.finetune import common_split, finetune, response_tokens
from nodes.guard import Guard, Order, Policy
from nodes.ledger import Budget, specification_charge
from nodes.market_client import MarketClient
from nodes.mixes import Owner, read_owners, records_of, write_owners
from nodes.packed import response_states
from nodes.private_training import PrivateRecipe, finetune_privately
from nodes.query import find_encrypted
from nodes.records import Pair, Record, read_records
from nodes.simulate import MarketProcess, new_run_folder, one_thread_each, seeded_noise
from protocol.errors import CampaignFailed, UsageError
from protocol.features import EmbeddingKind, FeatureMap
from protocol.keys import write_durably
from protocol.privacy import Guarantee, ledger_epsilon
from protocol.release import Card, open_envelope
from protocol.scoring import sketch_of
from tests.bench.learnware_world import Settings, deal, label_features, query_rows, read_pool

SCHEMA = "veilmart.bench.learnware.run/1"
Row = dict[str, Any]
BASE, POOLED, PUBLIC = "base", "pooled", "public"
PART = 8  # records in one forward pass, always: other shapes would change the last digits
PROBE = 4  # records, and training steps, that the plan is measured on


def block_of(epsilon: float | None) -> str:
    """Return the name of the block of specialists under this guarantee."""
    return "none" if epsilon is None else f"epsilon-{epsilon:g}"


# Texts and their states ----------------------------------------------------------------------------------------------------


def save_states(path: Path, states: Sequence[Activations]) -> None:
    """Write the states of some texts; private to the run, as the texts are."""
    import torch

    hidden = torch.cat([one.hidden for one in states])
    arrays = {
        "hidden": (hidden.view(torch.int16) if hidden.dtype == torch.bfloat16 else hidden).numpy(),
        "tokens": np.array([token for one in states for token in one.encoded.tokens]),
        "places": np.array([[len(one.encoded.tokens), one.encoded.prompt_end, one.encoded.response_start] for one in states]),
        "split": np.array(states[0].split),
    }
    write_arrays(path, **arrays)


def load_states(path: Path) -> list[Activations]:
    """Return the states that a file holds."""
    import torch

    with np.load(path, allow_pickle=False) as found:
        hidden, tokens, places, split = (found[name] for name in ("hidden", "tokens", "places", "split"))
    whole = torch.from_numpy(hidden)
    whole = whole.view(torch.bfloat16) if whole.dtype == torch.int16 else whole
    states, begin = [], 0
    for length, prompt_end, response_start in places.tolist():
        encoded = Encoded(tuple(tokens[begin : begin + length].tolist()), prompt_end, response_start)
        states.append(Activations(whole[begin : begin + length], encoded, int(split)))
        begin += length
    return states


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Write arrays, whole or not at all."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_durably(path, stream.getvalue())


# Losses ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One specialist on one task: nats and hit of every response token, texts one behind the other.

    hits: whether the token is the most probable one.  A greedy answer is the response, word for word, where all of a text's are.
    """

    nats: NDArray[np.float32]
    hits: NDArray[np.bool_]
    lengths: NDArray[np.int64]  # response tokens of each text

    @classmethod
    def read(cls, path: Path) -> Cell:
        """Return the cell in a file."""
        with np.load(path, allow_pickle=False) as found:
            return cls(found["nats"], found["hits"], found["lengths"])

    def write(self, path: Path) -> None:
        """Write the cell, whole or not at all."""
        write_arrays(path, nats=self.nats, hits=self.hits, lengths=self.lengths)

    def of(self, first: int, last: int) -> Cell:
        """Return the cell of some of the texts."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        return Cell(self.nats[ends[first] : ends[last]], self.hits[ends[first] : ends[last]], self.lengths[first:last])

    @property
    def loss(self) -> float:
        """Mean nats a response token."""
        return float(self.nats.astype(np.float64).mean())

    @property
    def exact(self) -> float:
        """Share of texts whose greedy answer is the response."""
        starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        return float(np.logical_and.reduceat(self.hits, starts).mean())


def token_losses(model: BaseModel, adapter: Adapter | None, states: Sequence[Activations], workers: int) -> Cell:
    """Return the losses of the base model, or of it with an adapter; their mean is `nodes.finetune.held_out_loss`."""
    import torch
    import torch.nn.functional as F

    split = common_split(states)
    top = model.upper_layers(split, torch.float32)
    adapted = top if adapter is None else attach(top, model.admit(adapter), split)
    order = sorted(range(len(states)), key=lambda i: len(states[i].encoded.tokens), reverse=True)  # little padding
    parts = [order[start : start + PART] for start in range(0, len(order), PART)]

    def run(part: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        chosen = [states[i] for i in part]
        with torch.inference_mode():
            logits = adapted.lm_head(response_states(adapted, chosen)).float()
            targets = response_tokens(chosen).to(logits.device)
            nats = F.cross_entropy(logits, targets, reduction="none")
            return nats.cpu().numpy(), (logits.argmax(-1) == targets).cpu().numpy()

    lengths = np.array([len(one.encoded.tokens) - one.encoded.response_start for one in states])
    nats: list[Any] = [None] * len(states)
    hits: list[Any] = [None] * len(states)
    with single_threaded_workers(workers) as pool:
        for part, (some_nats, some_hits) in zip(parts, pool.map(run, parts), strict=True):
            cuts = np.cumsum(lengths[part])[:-1]
            for i, own_nats, own_hits in zip(part, np.split(some_nats, cuts), np.split(some_hits, cuts), strict=True):
                nats[i], hits[i] = own_nats, own_hits
    return Cell(np.concatenate(nats), np.concatenate(hits), lengths)


# The run -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One piece of work: what, which, whether its file is there, how to make it, and its expected CPU seconds."""

    stage: str
    name: str
    there: Path
    make: Callable[[], None]
    cpu_s: float


class Run:
    """A run in its folder.  Models are opened when a piece of work needs one, so that a finished run needs none."""

    def __init__(self, settings: Settings, base: Path, maps: Sequence[FeatureMap], device: str = "cpu", workers: int = 2) -> None:
        self.settings, self.out, self.maps, self.workers = settings, settings.out, list(maps), workers
        self._base, self._device = base, device
        self._seconds: dict[str, float] = {}
        self._states: dict[str, list[Activations]] = {}

    @cached_property
    def encoder(self) -> BaseModel:
        """The base model on the processor: what a release is made from is computed there alone."""
        return BaseModel.open(self._base)

    @cached_property
    def model(self) -> BaseModel:
        """The base model that trains and scores: on a GPU if that was asked for and there is one."""
        on_gpu = BaseModel.open(self._base, device=self._device) if self._device != "cpu" else self.encoder
        return on_gpu if on_gpu.device != "cpu" else self.encoder

    @property
    def map(self) -> FeatureMap:
        """The map of the market."""
        return self.maps[0]

    # Who and what

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks that are evaluated."""
        return list(self.settings.tasks) or [task for task in self._present() if task not in self.map.fitted_on]

    @cached_property
    def public_tasks(self) -> list[str]:
        """The public tasks on which attempts are calibrated; none of them is evaluated."""
        found = list(self.settings.public_tasks) or [task for task in self._present() if task in self.map.fitted_on]
        if set(found) & set(self.tasks):
            raise UsageError(f"tasks: {', '.join(sorted(set(found) & set(self.tasks)))} are public and cannot be evaluated")
        return found

    def _present(self) -> list[str]:
        return sorted(path.parent.name for path in self.settings.data.glob("*/train.jsonl") if (path.parent / "test.jsonl").is_file())

    def begin(self, resume: bool) -> None:
        """Note what the run is, and deal out the records; raise UsageError in a folder that another run, or something else, has."""
        if not self.settings.data.is_dir():
            raise UsageError(
                f"{self.settings.data}: no such folder", hint="--data expects a folder of TASK/train.jsonl and TASK/test.jsonl"
            )
        new_run_folder(self.out, self.out)
        settings = replace(self.settings, tasks=tuple(self.tasks), public_tasks=tuple(self.public_tasks))
        said = {"schema": SCHEMA, "settings": settings.as_json(), "map_ids": [one.map_id.hex() for one in self.maps]}
        text, path = json.dumps(said, indent=1), self.out / "run.json"
        if path.exists() and not resume:
            raise UsageError(f"{self.out}: a run began here", hint="--resume goes on with it, or choose another --out")
        if path.exists() and path.read_text() != text:
            raise UsageError(f"{self.out}: a run with other settings began here", hint="choose another --out, or give the same options")
        write_durably(path, text.encode())
        for folder, tasks, count in (
            (self.out, self.tasks, self.settings.specialists),
            (self.out / PUBLIC, self.public_tasks, self.settings.public_specialists),
        ):
            if read_owners(folder) is None:
                pools = {task: read_pool(self.settings.data / task) for task in tasks}
                write_owners(folder, deal(pools, count, self.settings.smallest, self.settings.largest, self.settings.seed))

    @cached_property
    def owners(self) -> list[Owner]:
        """The owners of the market."""
        return read_owners(self.out) or []

    def owners_of(self, epsilon: float | None) -> list[Owner]:
        """Return who has a specialist under this guarantee: a few records are not worth training on privately."""
        if epsilon is None:
            return self.owners
        return [owner for owner in self.owners if len(owner.records) == 1 and owner.count >= self.settings.private_smallest]

    def tasks_of(self, epsilon: float | None) -> list[str]:
        """Return the tasks on which specialists under this guarantee are scored: all, or those that somebody owns who has one."""
        if epsilon is None:
            return self.tasks
        return [task for task in self.tasks if any(task in owner.records for owner in self.owners_of(epsilon))]

    @cached_property
    def public_owners(self) -> list[Owner]:
        """Those whose specialists calibrate."""
        return read_owners(self.out / PUBLIC) or []

    def records(self, owner: Owner, folder: Path | None = None) -> list[Record]:
        """Return an owner's records."""
        return read_records(records_of(folder or self.out, owner))

    def test_records(self, task: str) -> tuple[list[Record], list[Record]]:
        """Return the records that are scored, a user's own behind them, and those from which queries are drawn."""
        settings = self.settings
        scored = settings.public_texts if task in self.public_tasks else settings.texts + settings.validation
        found = read_records(settings.data / task / "test.jsonl", scored + settings.query_pool)
        return found[:scored], found[scored:]

    # Files

    def cell_path(self, block: str, specialist: str, task: str) -> Path:
        """Return where a cell lies."""
        return self.out / "cells" / block / specialist / f"{task}.npz"

    def adapter_path(self, block: str, specialist: str) -> Path:
        """Return where an adapter lies."""
        return self.out / "adapters" / block / f"{specialist}.safetensors"

    def envelope_path(self, owner: str) -> Path:
        """Return where the signed release of an owner lies."""
        return self.out / "releases" / owner

    def features_path(self, feature_map: FeatureMap | None, what: str, name: str) -> Path:
        """Return where embeddings lie, of the kind that the map wants; None: labels.  what: "owners", "public" or "queries"."""
        kind = "labels" if feature_map is None else f"{feature_map.embedding}-{feature_map.layer}"
        return self.out / "features" / kind / what / f"{name}.npy"

    def embedding_maps(self, public: bool = False) -> list[FeatureMap]:
        """Return one map of each kind of embedding; of public tasks the market's alone is needed."""
        if public:
            return [self.map]
        return list({(one.embedding, one.layer): one for one in reversed(self.maps)}.values())[::-1]

    # Pieces of work

    def plan(self) -> Row:
        """Return the CPU seconds of a record in each kind of work, measured once and kept."""
        path = self.out / "plan.json"
        if path.exists():
            kept: Row = json.loads(path.read_text())
            return kept
        records = [record for task in self.tasks[:PROBE] for record in self.test_records(task)[0][:1]]
        model, recipe, split = self.model, self.settings.recipe, self.settings.split
        model.prefix_pass(records[:1], split, 1, layer=self.map.layer)  # loading is no part of it
        seconds: dict[str, float] = {}
        with self._timed(seconds, "embed", len(records)):
            self.encoder.embed_alone(records, 1, layer=self.map.layer)
        with self._timed(seconds, "prefix", len(records)):
            states = model.prefix_pass(records, split, 1, layer=self.map.layer)[1]
        token_losses(model, None, states[:1], 1)
        batch, took = min(recipe.batch, len(states)), []
        for steps in (1, 1, 1 + PROBE):  # the first loads, the second is what a training takes beside its steps
            began = time.process_time()
            finetune(model, states, replace(recipe, batch=batch, epochs=steps * batch, max_steps=steps), workers=1)
            took.append(time.process_time() - began)
        seconds["train"] = max(took[2] - took[1], 1e-6) / (batch * PROBE)
        with self._timed(seconds, "score", len(records)):
            token_losses(model, None, states, 1)
        if any(one.embedding is EmbeddingKind.LORA_GRADIENTS for one in self.maps):
            gradients = next(one for one in self.maps if one.embedding is EmbeddingKind.LORA_GRADIENTS)
            with self._timed(seconds, "gradient", 2):
                self.encoder.embed_alone(records[:2], 1, layer=gradients.layer, kind=gradients.embedding)
        write_durably(path, json.dumps({name: round(value, 5) for name, value in seconds.items()}).encode())
        return seconds

    @contextmanager
    def _timed(self, seconds: dict[str, float], name: str, count: int) -> Iterator[None]:
        began = time.process_time()
        yield
        seconds[name] = max(time.process_time() - began, 1e-6) / count

    def items(self) -> list[Item]:
        """Return all pieces of work in their order: blocks under a guarantee last, so that the others can be looked at before."""
        cost, settings = self.plan(), self.settings
        found: list[Item] = []
        private: list[Item] = []
        scored = settings.texts + settings.validation
        for task in [*self.tasks, *self.public_tasks]:
            count = settings.public_texts if task in self.public_tasks else scored
            found.append(self._item("texts", task, self.out / "texts" / f"{task}.npz", self._texts, (task,), count * cost["prefix"]))
            for one in self.embedding_maps(task in self.public_tasks):
                each, most = self._embedding_cost(one, cost)
                count = min(settings.query_pool, most)
                path = self.features_path(one, "queries", task)
                found.append(self._item("queries", f"{task}, {one.name}", path, self._queries, (task, one), count * each))
            path = self.features_path(None, "queries", task)
            found.append(self._item("queries", f"{task}, labels", path, self._queries, (task, None), 0.0))
        for what, owners in (("owners", self.owners), (PUBLIC, self.public_owners)):
            for owner in owners:
                for feature_map in (*self.embedding_maps(what == PUBLIC), None):
                    each, most = (0.0, owner.count) if feature_map is None else self._embedding_cost(feature_map, cost)
                    path = self.features_path(feature_map, what, owner.name)
                    named = f"{what} {owner.name}, {feature_map.name if feature_map else 'labels'}"
                    found.append(
                        self._item("features", named, path, self._features, (owner, what, feature_map), min(owner.count, most) * each)
                    )
        for epsilon in settings.adapters:
            for owner in self.owners_of(epsilon):
                path = self.adapter_path(block_of(epsilon), owner.name)
                passes = settings.recipe.seen(owner.count) if epsilon is None else self._private(epsilon).seen(owner.count)
                cpu = owner.count * cost["prefix"] + passes * cost["train"]
                block = found if epsilon is None else private
                block.append(self._item("specialists", f"{owner.name}, {block_of(epsilon)}", path, self._specialist, (owner, epsilon), cpu))
        for owner in self.public_owners:
            count = min(owner.count, self._public_records)
            cpu = count * cost["prefix"] + settings.recipe.seen(count) * cost["train"]
            found.append(
                self._item("public specialists", owner.name, self.adapter_path(PUBLIC, owner.name), self._public_specialist, (owner,), cpu)
            )
        steps = min(settings.pooled_steps * settings.recipe.batch, settings.recipe.epochs * sum(owner.count for owner in self.owners))
        pooled = steps * (cost["train"] + cost["prefix"] / settings.recipe.epochs)
        found.append(self._item("pooled adapter", POOLED, self.adapter_path("none", POOLED), self._pooled, (), pooled))
        for block, name, tasks in self._scored():
            for task in tasks:
                count = settings.public_texts if task in self.public_tasks else scored
                path = self.cell_path(block, name, task)
                item = self._item("losses", f"{block} {name} on {task}", path, self._cell, (block, name, task), count * cost["score"])
                (found if block in ("none", PUBLIC) else private).append(item)
        if settings.encrypted:
            cpu = 2.0 + 0.3 * settings.encrypted * len(self.tasks)
            found.append(self._item("encrypted queries", "market", self.out / "encrypted.json", self._encrypted, (), cpu))
        return found + private

    def _item(self, stage: str, name: str, there: Path, work: Callable[..., None], arguments: tuple[Any, ...], cpu_s: float) -> Item:
        return Item(stage, name, there, lambda: work(*arguments), cpu_s)

    def _embedding_cost(self, feature_map: FeatureMap, cost: Mapping[str, float]) -> tuple[float, int]:
        """Return the CPU seconds of one record's embedding, and how many records of an owner, or texts of a task, get one."""
        if feature_map.embedding is EmbeddingKind.LORA_GRADIENTS:
            return cost["gradient"], self.settings.gradient_records
        return cost["embed"], 1 << 30

    def _scored(self) -> list[tuple[str, str, list[str]]]:
        """Return block, name and tasks of all that is scored."""
        found = [("none", BASE, [*self.tasks, *self.public_tasks])]
        for epsilon in self.settings.adapters:
            tasks = self.tasks_of(epsilon) + (self.public_tasks if epsilon is None else [])
            found += [(block_of(epsilon), owner.name, tasks) for owner in self.owners_of(epsilon)]
        return [*found, ("none", POOLED, self.tasks), *((PUBLIC, owner.name, self.public_tasks) for owner in self.public_owners)]

    def _private(self, epsilon: float) -> PrivateRecipe:
        return PrivateRecipe(Guarantee(epsilon, self.settings.delta))

    def _texts(self, task: str) -> None:
        # Test texts are not released: padded batches are allowed.
        records = self.test_records(task)[0]
        states = self.model.prefix_pass_batched(records, self.settings.split, workers=self.workers, layer=self.map.layer)[1]
        save_states(self.out / "texts" / f"{task}.npz", states)

    def states_of(self, task: str) -> list[Activations]:
        """Return the states of a task's scored texts, a user's own behind them."""
        if task not in self._states:
            self._states[task] = load_states(self.out / "texts" / f"{task}.npz")
        return self._states[task]

    def _queries(self, task: str, feature_map: FeatureMap | None) -> None:
        pool = self.test_records(task)[1]
        if feature_map is None:
            found = label_features([record.response for record in pool if isinstance(record, Pair)])
        else:
            most = self._embedding_cost(feature_map, {"gradient": 0.0, "embed": 0.0})[1]
            found = self.encoder.embed_batched(pool[:most], workers=self.workers, layer=feature_map.layer, kind=feature_map.embedding)
        write_array(self.features_path(feature_map, "queries", task), found)

    def _features(self, owner: Owner, what: str, feature_map: FeatureMap | None) -> None:
        records = self.records(owner, self.out / PUBLIC if what == PUBLIC else self.out)
        if feature_map is None:
            found = label_features([record.response for record in records if isinstance(record, Pair)])
        else:
            most = self._embedding_cost(feature_map, {"gradient": 0.0, "embed": 0.0})[1]
            found = self.encoder.embed_alone(records[:most], self.workers, layer=feature_map.layer, kind=feature_map.embedding)
        write_array(self.features_path(feature_map, what, owner.name), found)

    def _specialist(self, owner: Owner, epsilon: float | None) -> None:
        if epsilon is None:
            return self._guarded(owner)
        # As the guard's own training, but with seeded draws in place of the operating system's: the same seed gives the same table.
        recipe, model = self._private(epsilon), self.encoder
        states = model.prefix_pass(self.records(owner), model.layers - recipe.layers, 1)[1]
        rng = np.random.default_rng([self.settings.seed, self.owners.index(owner), round(1000 * epsilon)])
        adapter = finetune_privately(
            model,
            states,
            recipe,
            workers=1,
            draw=lambda count: rng.standard_normal(count),
            sample=lambda count, rate: rng.random(count) < rate,
        )
        write_durably(self.adapter_path(block_of(epsilon), owner.name), adapter.to_bytes())
        return None

    def _guarded(self, owner: Owner) -> None:
        """Let the owner's guard train and release; one that was killed goes on from its checkpoint."""
        settings = self.settings
        needed = 1.001 * ledger_epsilon(specification_charge(Guarantee(settings.epsilon_spec, settings.delta)).events, settings.delta)

        def made_before(records: Sequence[Record], *, layer: int, kind: EmbeddingKind, on_progress: object = None) -> NDArray[np.float32]:
            # Asked for where the adapter is trained on a GPU, while features are made on the processor.
            return np.load(self.features_path(self.map, "owners", owner.name), allow_pickle=False)

        guard = Guard(
            self.out / "guards" / owner.name, records_of(self.out, owner), Card(owner.name), self.model, self.map,
            seeded_noise(settings.seed, *noise_of(settings.epsilon_spec, 0, owner.name)),
            policy=Policy(
                budget=Budget(needed, settings.delta), largest_epsilon=settings.epsilon_spec, smallest_epsilon=settings.epsilon_spec / 2
            ),
            recipe=settings.recipe, split=settings.split, encoder=self.encoder, embed=made_before, workers=1,
        )  # fmt: skip
        guard.request(Order(Guarantee(settings.epsilon_spec, settings.delta)))
        guard.work()
        envelope = guard.collect()
        if guard.failures or envelope is None:
            error = guard.failures[0] if guard.failures else "nothing was released"
            raise CampaignFailed(f"{owner.name}: {error}")
        file = guard.adapter_file(open_envelope(envelope))
        assert file is not None
        write_durably(self.envelope_path(owner.name), envelope)
        write_durably(self.adapter_path("none", owner.name), file.read_bytes())  # last: where it is, all of the specialist is

    @property
    def _public_records(self) -> int:
        return 2 * self.settings.smallest

    def _public_specialist(self, owner: Owner) -> None:
        # Trained on few records, as it is not compared; its specification is of all, as noisy as the market's.
        records = self.records(owner, self.out / PUBLIC)[: self._public_records]
        states = self.model.prefix_pass_batched(records, self.settings.split, workers=1, layer=self.map.layer)[1]
        adapter = finetune(self.model, states, self.settings.recipe, workers=1)
        write_durably(self.adapter_path(PUBLIC, owner.name), adapter.to_bytes())

    def _pooled(self) -> None:
        """One adapter of the same shape on as many of everybody's records as its steps can see: the ceiling without any privacy."""
        recipe = replace(self.settings.recipe, max_steps=self.settings.pooled_steps)
        everything = [record for owner in self.owners for record in self.records(owner)]
        most = recipe.max_steps * recipe.batch // recipe.epochs
        rng = np.random.default_rng([self.settings.seed, 1])
        chosen = [everything[i] for i in rng.permutation(len(everything))[:most]]
        states = self.model.prefix_pass_batched(chosen, self.settings.split, workers=self.workers, layer=self.map.layer)[1]
        adapter = finetune(self.model, states, recipe, workers=self.workers, checkpoint=self.out / "pooled.state")
        write_durably(self.adapter_path("none", POOLED), adapter.to_bytes())
        (self.out / "pooled.state").unlink(missing_ok=True)

    def _cell(self, block: str, name: str, task: str) -> None:
        token_losses(self.model, self.adapter_of(block, name), self.states_of(task), self.workers).write(self.cell_path(block, name, task))

    def adapter_of(self, block: str, name: str) -> Adapter | None:
        """Return an adapter, or None for the base model."""
        if name == BASE:
            return None
        return Adapter.from_bytes(self.adapter_path(block, name).read_bytes(), base_model=self.model.model_id)

    def _encrypted(self) -> None:
        """Publish all releases at a real market and ask it by encrypted query; keep choices, scores and what the wires carried."""
        settings, asked = self.settings, []
        home = self.out / "market"
        with MarketProcess(home, self.map) as market, MarketClient(market.address, market.ca, home / "querier") as client:
            names = {}
            for owner in self.owners:
                envelope = self.envelope_path(owner.name).read_bytes()
                release = open_envelope(envelope)
                client.publish(envelope)
                assert release.adapter is not None
                client.upload_adapter(release.adapter, self.adapter_path("none", owner.name).read_bytes())
                names[release.release_id] = owner.name, release
            for task in self.tasks:
                features = self.map(np.load(self.features_path(self.map, "queries", task), allow_pickle=False))
                rows = query_rows(len(features), settings.query_size, settings.queries, settings.seed, task)[: settings.encrypted]
                for query, own in enumerate(rows):
                    sketch = sketch_of(features[own], self.map, 2)
                    found = find_encrypted(sketch, client, self.map)
                    ranking = [(names[match.release_id][0], match.llr) for match in found.ranking.matches]
                    reference = names[found.ranking.matches[0].release_id][1].adapter
                    assert reference is not None
                    client.download_adapter(reference)  # checks its digest
                    said = str(found.ranking.verdict)
                    asked.append({"task": task, "query": query, "ranking": ranking, "verdict": said, "server_cpu_ms": found.server_cpu_ms})
            result = {"queries": asked, "sent": client.traffic.sent, "received": client.traffic.received}
        write_durably(self.out / "encrypted.json", json.dumps(result).encode())

    # Working through them

    def work(self) -> None:
        """Make what is missing, and tell how far it is and how long it will take."""
        items = self.items()
        missing = [item for item in items if not item.there.exists()]
        self.say_plan(items, missing)
        left, planned, began = sum(item.cpu_s for item in missing), 0.0, time.monotonic()
        cpu = first = time.process_time()
        wall = began
        with one_thread_each():
            for group in _grouped(missing):
                # Owners train side by side, a thread each; all else has its threads inside.
                side_by_side = self.workers if group[0].stage in ("specialists", "public specialists") else 1
                with ThreadPoolExecutor(side_by_side) as pool:
                    for item, _ in zip(group, pool.map(make, group), strict=True):
                        # What several threads took is counted to the one that is done: of a stage the sum is right.
                        self._spent(item, time.process_time() - cpu, time.monotonic() - wall)
                        cpu, wall = time.process_time(), time.monotonic()
                        planned, left = planned + item.cpu_s, left - item.cpu_s
                        minutes = max(left, 0.0) * (wall - began) / max(planned, 1e-9) / 60
                        say(f"{item.stage}: {item.name}; {cpu - first:.0f} CPU s so far, about {minutes:.0f} min left")

    def _spent(self, item: Item, cpu_s: float, wall_s: float) -> None:
        line = {"stage": item.stage, "item": item.name, "cpu_s": round(cpu_s, 3), "wall_s": round(wall_s, 3)}
        with (self.out / "costs.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def say_plan(self, items: Sequence[Item], missing: Sequence[Item]) -> None:
        """Tell a person what the run takes, stage by stage, before it starts."""
        say(f"plan: {len(self.owners)} specialists of {len(self.tasks)} tasks; {len(missing)} of {len(items)} pieces are to be made")
        for stage in dict.fromkeys(item.stage for item in items):
            of = [item for item in items if item.stage == stage]
            to_do = [item for item in missing if item.stage == stage]
            seconds, whole = (sum(item.cpu_s for item in some) for some in (to_do, of))
            say(f"  {stage}: {len(to_do)} of {len(of)}, about {seconds:.0f} of {whole:.0f} CPU s")
        total = sum(item.cpu_s for item in missing)
        say(f"  together about {total:.0f} CPU s, {total / self.workers / 60:.0f} min on {self.workers} cores of its own")

    def costs(self) -> list[Row]:
        """Return what was spent, by stage: pieces, CPU and wall seconds."""
        spent: dict[str, Row] = {}
        path = self.out / "costs.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the run was killed while it wrote this line
            of = spent.setdefault(row["stage"], {"stage": row["stage"], "pieces": 0, "cpu_s": 0.0, "wall_s": 0.0})
            of["pieces"] += 1
            of["cpu_s"] += row["cpu_s"]
            of["wall_s"] += row["wall_s"]
        return [{**row, "cpu_s": round(row["cpu_s"], 1), "wall_s": round(row["wall_s"], 1)} for row in spent.values()]


def make(item: Item) -> None:
    """Do one piece of work."""
    item.make()


def noise_of(epsilon: float, draw: int, owner: str) -> tuple[str, str, str]:
    """Return the purpose of a seeded noise source: each epsilon, draw and owner has its own."""
    return f"{epsilon:g}", str(draw), owner


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write one array, whole or not at all."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    write_durably(path, stream.getvalue())


def _grouped(items: Iterable[Item]) -> list[list[Item]]:
    groups: list[list[Item]] = []
    for item in items:
        if groups and groups[-1][0].stage == item.stage:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def say(what: str) -> None:
    """Tell a person how far the run is."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')}  {what}\n")
    sys.stderr.flush()
