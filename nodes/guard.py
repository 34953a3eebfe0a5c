"""The guard: the one place that holds an owner's data, noise, ledger, key and model.

Others may only *ask* it, through three calls: request, collect, status.  `request` queues and returns at once; the work is done by the
owner's own loop (`work`); `collect` returns stored bytes or nothing.  No reason, metric or number of records ever leaves.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nodes.base_model import SPLIT_LAYER
from nodes.ledger import Budget, Ledger, Price
from nodes.records import Record, digest_of, read_training_records
from protocol.codec import domain_tag, format_decimal
from protocol.errors import UsageError, VeilmartError
from protocol.features import FeatureMap
from protocol.hazmat.noise import NoiseSource
from protocol.keys import signing_key, write_durably
from protocol.privacy import Guarantee, noise_variance
from protocol.release import AdapterReference, Card, Release, sign_release
from protocol.specification import NORM_SQUARED, estimate, quantise

if TYPE_CHECKING:
    from nodes.base_model import Activations, BaseModel, Embedding
    from nodes.finetune import Recipe

Progress = Callable[[str, int, int], None]  # stage, done, all


class Embed(Protocol):
    """Records to embeddings (n, 2, width), each record alone in the forward pass."""

    def __call__(self, records: Sequence[Record], *, layer: int, on_progress: Callable[[int, int], None] | None = None) -> Embedding: ...


def ignore_progress(stage: str, done: int, of: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The owner's limits, which no request can raise."""

    budget: Budget = field(default_factory=lambda: Budget(epsilon=4.0, delta=1e-6))
    minimum_records: int = 20
    largest_epsilon: float = 2.0  # of one release


@dataclass(frozen=True, slots=True)
class Order:
    """What a campaign may ask for."""

    guarantee: Guarantee


@dataclass(frozen=True, slots=True)
class Status:
    """What a guard tells about itself: how many requests wait and whether a release is there."""

    waiting: int
    available: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a release would be and cost: shown to the owner before anything is drawn."""

    records: int  # for the owner's eyes only
    price: Price
    noise_std: float  # on the integer grid
    integers: int
    trains_adapter: bool


class Guard:
    """An owner's guard over one data file.

    home: folder of keys, ledger and adapters.  noise: operating-system noise, or a seeded source in a simulation, which stamps
    its releases `simulated`.  recipe: how the adapter is trained, or None for a specification alone.  embed: how embeddings are made
    where no adapter is trained (default: the model's `embed_alone`); a simulation passes one that remembers.
    """

    def __init__(
        self,
        home: Path,
        data: Path,
        card: Card,
        model: BaseModel,
        feature_map: FeatureMap,
        noise: NoiseSource,
        *,
        policy: Policy | None = None,
        recipe: Recipe | None = None,
        limit: int | None = None,
        embed: Embed | None = None,
        split: int = SPLIT_LAYER,
        on_progress: Progress = ignore_progress,
    ) -> None:
        model.admit_map(feature_map)
        self._home, self._data, self._card, self._model, self._map = home, data, card, model, feature_map
        self._noise, self._recipe, self._limit, self._on_progress = noise, recipe, limit, on_progress
        self._embed, self._split = embed or model.embed_alone, split
        self.policy = policy or Policy()
        self._ledger = Ledger.open(home / "ledger.db", self.policy.budget)
        self._key = signing_key(home / "owner.key")
        self._queue: deque[Order] = deque()
        self._lock = threading.Lock()
        self.failures: list[VeilmartError] = []  # for the owner; never sent

    # What others may call ------------------------------------------------------------------------------------------

    def request(self, order: Order) -> None:
        """Queue an order; answers nothing, whatever becomes of it."""
        self._queue.append(order)

    def collect(self) -> bytes | None:
        """Return the newest stored envelope, or None: the one constant "not available"."""
        return self._ledger.latest()

    def status(self) -> Status:
        """Return how many requests wait and whether a release is there."""
        return Status(len(self._queue), self._ledger.latest() is not None)

    # What only the owner calls ---------------------------------------------------------------------------------------

    def work(self) -> None:
        """Serve every waiting order; a refusal is kept in `failures` and told to nobody else."""
        while self._queue:
            order = self._queue.popleft()
            try:
                self.release(order)
            except VeilmartError as error:
                self.failures.append(error)
            except Exception as error:  # noqa: BLE001 - the loop must go on, and the text may hold private records
                self.failures.append(VeilmartError(f"unexpected {type(error).__name__} in the guard"))

    def plan(self, order: Order) -> Plan:
        """Return what `release(order)` would do and cost; nothing is drawn, trained or charged."""
        records = self._admit(order)
        price = self._ledger.price(order.guarantee)
        std = noise_variance(order.guarantee, NORM_SQUARED) ** 0.5
        return Plan(len(records), price, std, self._map.dimension + 1, self._recipe is not None)

    def price(self, guarantee: Guarantee) -> Price:
        """Return what another release under this guarantee would cost now."""
        return self._ledger.price(guarantee)

    def _admit(self, order: Order) -> list[Record]:
        if order.guarantee.epsilon > self.policy.largest_epsilon:
            raise UsageError(
                f"epsilon: the policy allows {self.policy.largest_epsilon:g} a release, got {order.guarantee.epsilon:g}",
                hint="the owner's policy sets the limit (--largest-epsilon)",
            )
        if order.guarantee.delta > self.policy.budget.delta:
            raise UsageError(
                f"delta: the policy allows {self.policy.budget.delta:g}, got {order.guarantee.delta:g}",
                hint="an epsilon means less at a larger delta",
            )
        return read_training_records(self._data, self.policy.minimum_records, self._limit)

    def release(self, order: Order) -> bytes:
        """Return the envelope for an order: stored bytes if it was paid before, else new ones, charged and stored in one transaction.

        Raises RecordError, UsageError or BudgetSpent before anything is drawn.
        """
        with self._lock:
            records = self._admit(order)
            request = self._request_digest(records, order)
            stored = self._ledger.stored(request)
            if stored is not None:
                return stored
            self._ledger.price(order.guarantee).require()  # a refusal costs no work; `charge` decides again
            embedding, activations = self._one_pass(records)
            adapter = self._train(activations) if self._recipe is not None else None
            vectors = quantise(self._map(embedding))

            def make(number: int, previous: bytes) -> tuple[bytes, bytes]:
                # Noise is drawn here and nowhere else: inside the transaction that charges for it.
                specification = estimate(vectors, self._map.map_id, order.guarantee, self._noise)
                release = Release(
                    owner=self._key.public_key().public_bytes_raw(),
                    release_number=number,
                    previous=previous,
                    base_model=bytes.fromhex(self._model.model_id),
                    specification=specification,
                    adapter=adapter,
                    card=self._card,
                    simulated=self._noise.simulated,
                )
                return release.release_id, sign_release(release, self._key)

            return self._ledger.charge(request, order.guarantee, make)

    def adapter_file(self, release: Release) -> Path | None:
        """Return where the adapter of a release lies, if it has one."""
        return self._home / "adapters" / f"{release.adapter.digest.hex()}.safetensors" if release.adapter else None

    def _one_pass(self, records: Sequence[Record]) -> tuple[Embedding, list[Activations]]:
        def report(done: int, of: int) -> None:
            self._on_progress("embed", done, of)

        if self._recipe is None:
            return self._embed(records, layer=self._map.layer, on_progress=report), []
        return self._model.prefix_pass(records, self._split, layer=self._map.layer, on_progress=report)

    def _train(self, activations: list[Activations]) -> AdapterReference:
        from nodes.finetune import finetune

        assert self._recipe is not None
        adapter = finetune(self._model, activations, self._recipe, on_progress=lambda done, of: self._on_progress("train", done, of))
        data = adapter.to_bytes()
        digest = hashlib.sha256(data).digest()
        write_durably(self._home / "adapters" / f"{digest.hex()}.safetensors", data)
        return AdapterReference(digest, len(data))

    def _request_digest(self, records: Sequence[Record], order: Order) -> bytes:
        """What makes two requests the same: data, map, base model, mechanism, recipe and card."""
        parts = [
            digest_of(records), self._map.map_id, bytes.fromhex(self._model.model_id),
            format_decimal(order.guarantee.epsilon).encode(), format_decimal(order.guarantee.delta).encode(),
            repr(self._recipe).encode(), repr(self._card).encode(),
        ]  # fmt: skip
        digest = hashlib.sha256(domain_tag("request", 1))
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return digest.digest()


class Reachable(Protocol):
    """What a shim may ask of a guard."""

    def request(self, order: Order) -> None: ...

    def collect(self) -> bytes | None: ...


_LOCAL_GUARDS: dict[str, Reachable] = {}


def serve_in_process(name: str, guard: Reachable) -> str:
    """Make a guard reachable for shims of this process, and return its address."""
    _LOCAL_GUARDS[name] = guard
    return f"local:{name}"


def reach(address: str) -> Reachable:
    """Return the guard at an address; only guards of this process have one so far."""
    return _LOCAL_GUARDS[address.removeprefix("local:")]
