"""The guard: the one place that holds an owner's data, noise, ledger, key and model.

Others may only *ask* it, through four calls: request, collect, status, take_part.  `request` queues and returns at once; the work is done
by the owner's own loop (`work`); `collect` returns stored bytes or nothing; `take_part` answers one step of a cohort that the owner's
policy joins.  No reason, metric or number of records ever leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from nodes.activations import MEMORY_BYTES, cached_pass
from nodes.cohort import CohortRules, Rounds
from nodes.finetune import HeldOut, Recipe
from nodes.ledger import DEFAULT_POPULATION, Budget, Charge, Ledger, Origin, Price, not_compared, renewal_request, specification_charge
from nodes.machine import out_of_memory_is
from nodes.populations import claim, digests_of, require_unclaimed
from nodes.private_training import PrivateRecipe
from nodes.records import OwnedRecords, Record, digest_of, read_owned_records
from nodes.succession import keys_before
from protocol.codec import domain_tag, format_decimal
from protocol.errors import IncompatibleSpecification, RecordError, TrainingFailed, Unauthorised, UsageError, VeilmartError
from protocol.features import EmbeddingKind, FeatureMap
from protocol.hazmat.noise import NoiseSource
from protocol.keys import signing_key, write_durably
from protocol.privacy import NOT_PRIVATE, RECORD, AdapterGuarantee, Guarantee, PrivacyUnit, PrivateTraining, noise_variance
from protocol.release import SIGNATURE_BYTES, AdapterReference, Card, Release, open_envelope, sign_release
from protocol.specification import NORM_SQUARED, BoundedVectors, Specification, estimate, quantise, quantise_units
from protocol.window import ALWAYS, USUAL_DAYS, Window, day_of

if TYPE_CHECKING:
    from nodes.answerer import Answerer
    from nodes.base_model import Activations, BaseModel, Embedding
    from nodes.policy import RelayRules
    from protocol.cohort_round import Cohort

Progress = Callable[[str, int, int], None]  # stage, done, all
RECORDS_AT_ONCE = 32
MOST_DAYS = 3650  # a window that nobody sees the end of is none
WORKING_BYTES = 400 << 20  # of one step: graphs of a few dozen records, and a block of logits


class Embed(Protocol):
    """Records to embeddings (n, 2, width), each record alone in the forward pass."""

    def __call__(
        self, records: Sequence[Record], *, layer: int, kind: EmbeddingKind, on_progress: Callable[[int, int], None] | None = None
    ) -> Embedding: ...


def ignore_progress(stage: str, done: int, of: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The owner's limits, which no request can raise."""

    budget: Budget = field(default_factory=lambda: Budget(epsilon=4.0, delta=1e-6))
    minimum_records: int = 20  # privacy units
    largest_epsilon: float = 2.0  # of one release
    smallest_epsilon: float = 0.05  # of an order: its release is the only one that orders cause, and should be of use
    population: str = DEFAULT_POPULATION
    unit: PrivacyUnit = RECORD  # for life, as the population
    largest_adapter_epsilon: float | None = None  # None: an adapter may come without a guarantee
    valid_days: int = USUAL_DAYS  # how long a release holds

    def __post_init__(self) -> None:
        if not 1 <= self.valid_days <= MOST_DAYS:
            raise UsageError(f"policy: expected releases that hold for 1 to {MOST_DAYS} days, got {self.valid_days}")
        if self.largest_adapter_epsilon is not None and not self.largest_adapter_epsilon > 0:
            raise UsageError(f"policy: expected a largest epsilon of adapters above 0, got {self.largest_adapter_epsilon:g}")
        for name, value in (("largest epsilon", self.largest_epsilon), ("smallest epsilon", self.smallest_epsilon)):
            if not (math.isfinite(value) and value > 0):  # nothing is larger than nan: as a limit it would be none
                raise UsageError(f"policy: expected a {name} that is finite and above 0, got {value:g}", hint="2 is usual for a release")

    def require_adapter(self, promise: AdapterGuarantee) -> None:
        """Raise UsageError unless adapters under this promise may be made: asked before one is trained, whoever chose how."""
        largest = self.largest_adapter_epsilon
        if largest is not None and (isinstance(promise, str) or promise.guarantee.epsilon > largest):
            raise UsageError(
                f"adapter: the policy asks for a guarantee of epsilon {largest:g} or less, got {promise}",
                hint="the owner's policy sets it ([adapter] require_guarantee)",
            )


@dataclass(frozen=True, slots=True)
class Order:
    """What may be asked for.  The unit of the guarantee is the owner's to declare: the guard puts its policy's in its place."""

    guarantee: Guarantee
    map_id: bytes = b""  # empty: the guard's, whichever it is
    occasion: int = 0  # of the owner's schedule: each is a release of its own, whether or not the data changed; orders of others have 0
    epsilon_adapter: float | None = None  # the largest that the adapter may have; None: whatever the owner's policy makes


@dataclass(frozen=True, slots=True)
class Status:
    """What a guard tells about itself: how many requests wait and whether a release is there."""

    waiting: int
    available: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """What a release would be and cost: shown to the owner before anything is drawn."""

    records: int  # for the owner's eyes only
    units: int  # privacy units, for the owner's eyes only
    price: Price
    noise_std: float  # on the integer grid
    integers: int
    trains_adapter: bool
    adapter_guarantee: AdapterGuarantee  # of the adapter, where there is one
    stored: bool  # paid before: the stored bytes would be sent again, and nothing would be charged
    release: Release  # what would be sent, with zeros where noisy sums would stand and, for an adapter, a digest of zeros

    @property
    def release_bytes(self) -> int:
        """Size of the signed release, up to the digits of numbers that are not known yet."""
        return len(self.release.body) + SIGNATURE_BYTES


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a training needs and costs: shown to the owner before anything is computed."""

    records: int
    units: int
    tokens: int
    first_layer: int
    last_layer: int
    steps: int
    memory_bytes: int  # roughly, at its largest
    disk_bytes: int  # of states, while it runs
    guarantee: AdapterGuarantee
    price: Price


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter that was trained, and what the owner may know of it."""

    reference: AdapterReference
    file: Path
    losses: tuple[HeldOut, ...]  # empty with a guarantee: a loss on private records is not covered by it


def map_alone(feature_map: FeatureMap, embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the features of embeddings (n, 2, width) as (n, D), each a function of its own embedding, bit for bit.

    A product of matrices is computed by other kernels for other shapes: with 7 rows every row came out with other last bits than among
    1 000 (measured), so one record more could change the integers of all.  Here every product has the same shape, the last one filled
    up with zeros.  Also 3.5 times less CPU than one large product.  See test_the_features_of_a_record_do_not_depend_on_the_others.
    """
    parts = []
    for start in range(0, len(embeddings), RECORDS_AT_ONCE):
        block = np.zeros((RECORDS_AT_ONCE, *embeddings.shape[1:]), embeddings.dtype)
        part = embeddings[start : start + RECORDS_AT_ONCE]
        block[: len(part)] = part
        parts.append(feature_map(block)[: len(part)])
    return np.concatenate(parts) if parts else feature_map(embeddings)


class Guard:
    """An owner's guard over one data file.

    home: folder of keys, ledger and adapters.  noise: operating-system noise, or a seeded source in a simulation, which stamps
    its releases `simulated`.  recipe: how the adapter is trained, or None for a specification alone.  embed: how embeddings are made
    where no adapter is trained (default: the model's `embed_alone`); a simulation passes one that remembers.  claims: the list of what
    the populations of one home were charged for (default: one of this guard alone).  encoder: the model that the map was fitted with,
    where the adapter's base model is another one.  cohort: with whom it releases a specification together, if with anybody.
    workers: threads that compute; changes nothing but time.
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
        recipe: Recipe | PrivateRecipe | None = None,
        limit: int | None = None,
        embed: Embed | None = None,
        split: int | None = None,
        claims: Path | None = None,
        encoder: BaseModel | None = None,
        cohort: CohortRules | None = None,
        workers: int = 2,
        now: Callable[[], float] = time.time,
        on_progress: Progress = ignore_progress,
    ) -> None:
        encoder = encoder or model
        encoder.admit_map(feature_map)
        self._home, self._data, self._card, self._model, self._map = home, data, card, model, feature_map
        self._noise, self._recipe, self._limit, self._on_progress = noise, recipe, limit, on_progress
        self._encoder, self._embed = encoder, embed or partial(encoder.embed_alone, workers=workers)
        self._split, self._workers, self._now = split or model.split, workers, now
        self.policy = policy or Policy()
        if (private := self._private) is not None:  # its adapter is smaller, so the same pass runs on to a higher layer
            self._recipe = replace(private, guarantee=replace(private.guarantee, unit=self.policy.unit))
            self._split = model.layers - private.layers
        if self._recipe is not None:
            self.policy.require_adapter(self._promise)
        self._claims = claims or home / "claims.db"
        self._ledger = Ledger.open(home / "ledger.db", self.policy.budget, self.policy.population, self.policy.unit)
        key = home / "owner.key"
        if not key.exists():  # a new key would own no release at any market, so comparing would find nothing missing
            self._ledger.require_owner(None)
        self._key = signing_key(key)
        self._ledger.require_owner(self.owner)
        self._queue: deque[Order] = deque()
        self._lock = threading.Lock()
        self._rounds = self._rounds_of(cohort) if cohort is not None else None
        self.losses: list[HeldOut] = []  # of training without a guarantee; for the owner; never sent
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

    def take_part(self, ask: bytes) -> bytes:
        """Return this owner's message for one step of a cohort's round (protocol/cohort_round.py); nothing is charged but by its policy.

        Raises a VeilmartError where it takes no part; whoever passes answers on tells nobody why.
        """
        if self._rounds is None:
            raise Unauthorised("cohort: the owner's policy joins none", hint="a table [cohort] names with whom")
        return self._rounds.answer(ask)

    # What only the owner calls ---------------------------------------------------------------------------------------

    def work(self) -> None:
        """Serve every waiting order; a refusal is kept in `failures` and told to nobody else.

        Orders come from others, so they can cause the first release and nothing after it: a data file that changed does not make them
        draw again (that would tell that it changed), and whoever asks with ever new numbers cannot spend the budget.
        An order with an occasion is the owner's own, from the schedule.
        """
        while self._queue:
            order = self._queue.popleft()
            try:
                if order.occasion:
                    self.release(order)
                elif self._ledger.latest() is None:
                    self._require_orderly(order)
                    self.release(order, first_only=True)
            except VeilmartError as error:
                self.failures.append(error)
            except Exception as error:  # noqa: BLE001 - the loop must go on, and the text may hold private records
                self.failures.append(VeilmartError(f"unexpected {type(error).__name__} in the guard"))

    def plan(self, order: Order) -> Plan:
        """Return what `release(order)` would do and cost; nothing is drawn, trained or charged."""
        guarantee = self._stated(order)
        owned = self._admit(guarantee)
        require_unclaimed(self._claims, self.policy.population, digests_of(owned))
        variance = noise_variance(guarantee, NORM_SQUARED)
        nothing = Specification(self._map.map_id, np.zeros(self._map.dimension + 1, np.int32), variance, guarantee)
        adapter = AdapterReference(bytes(32), 1, self._promise) if self._recipe is not None else None
        number, previous = self._ledger.next_release()
        stored = self._ledger.stored(self._request_digest(owned, guarantee, order.occasion)) is not None
        return Plan(
            len(owned.records), owned.unit_count, self._ledger.price(self._charge(guarantee, owned)), variance**0.5,
            self._map.dimension + 1, self._recipe is not None, self._promise, stored, self._release(number, previous, nothing, adapter),
        )  # fmt: skip

    def price(self, guarantee: Guarantee) -> Price:
        """Return what another release under this guarantee would cost now."""
        return self._ledger.price(specification_charge(guarantee))

    def require_current(self, envelopes: Sequence[bytes]) -> None:
        """Raise LedgerBehind if the market holds a release of this owner, among these envelopes, that the ledger does not know."""
        self._ledger.require_current([release for release in map(open_envelope, envelopes) if set(release.signers) & set(self.owners)])

    @property
    def owner(self) -> bytes:
        """The owner's public key."""
        return self._key.public_key().public_bytes_raw()

    @property
    def owners(self) -> tuple[bytes, ...]:
        """The owner's public key, and those that it had before."""
        return (self.owner, *keys_before(self._home, self.owner))

    @property
    def serves(self) -> tuple[str, bytes]:
        """Ids of the base model and of the map."""
        return self._model.model_id, self._map.map_id

    def answerer(self, rules: RelayRules) -> Answerer:
        """Return what answers relayed questions with this owner's adapters, under its key."""
        from nodes.answerer import Answerer

        return Answerer(self._key, self._model, rules, self.adapter_file)

    def _stated(self, order: Order) -> Guarantee:
        return replace(order.guarantee, unit=self.policy.unit)

    def _require_orderly(self, order: Order) -> None:
        if order.map_id not in (b"", self._map.map_id):
            raise IncompatibleSpecification(f"map: expected {self._map.map_id.hex()[:16]}, got {order.map_id.hex()[:16]}")
        if order.guarantee.epsilon < self.policy.smallest_epsilon:
            raise UsageError(
                f"epsilon: expected an order of at least {self.policy.smallest_epsilon:g}, got {order.guarantee.epsilon:g}",
                hint="it would take the place of the one release that orders can cause, and say nothing",
            )
        # An order with a delta of its choice would be refused exactly where delta is not below 1/n: a way to measure the exact n.
        if order.guarantee.delta != self.policy.budget.delta:
            raise UsageError(f"delta: an order may ask for the policy's {self.policy.budget.delta:g} only, got {order.guarantee.delta:g}")
        if order.epsilon_adapter is not None and self._recipe is not None:
            # The owner's policy says how an adapter is made.  An order may decline what that gives, and never ask for more.
            private = self._private
            if private is None or private.guarantee.epsilon > order.epsilon_adapter:
                made = "one without a guarantee" if private is None else f"epsilon {private.guarantee.epsilon:g}"
                raise UsageError(
                    f"epsilon of the adapter: an order asks for at most {order.epsilon_adapter:g}, the policy makes {made}",
                    hint="the owner's policy sets it (`veilmart node up --epsilon-adapter`)",
                )

    def _require_epsilon(self, guarantee: Guarantee) -> None:
        if guarantee.epsilon > self.policy.largest_epsilon:
            raise UsageError(
                f"epsilon: the policy allows {self.policy.largest_epsilon:g} a release, got {guarantee.epsilon:g}",
                hint="the owner's policy sets the limit (--largest-epsilon)",
            )

    def _admit(self, guarantee: Guarantee) -> OwnedRecords:
        self._require_epsilon(guarantee)
        if guarantee.delta > self.policy.budget.delta:
            raise UsageError(
                f"delta: the policy allows {self.policy.budget.delta:g}, got {guarantee.delta:g}",
                hint="an epsilon means less at a larger delta",
            )
        owned = read_owned_records(self._data, self.policy.minimum_records, self._limit, guarantee.unit)
        if guarantee.delta * owned.unit_count >= 1:  # said to the owner alone; `work` keeps it from those who could vary delta
            raise UsageError(
                f"delta: expected less than one by the number of privacy units ({owned.unit_count}), got {guarantee.delta:g}",
                hint="a larger delta would allow to publish some unit outright; 1e-6 is the default",
            )
        return owned

    def release(self, order: Order, *, first_only: bool = False) -> bytes:
        """Return the envelope for an order: stored bytes if it was paid before, else new ones, charged and stored in one transaction.

        first_only: draw only if nothing was released before, and else return the newest stored bytes.
        Raises RecordError, UsageError, PopulationConflict, LedgerBehind or BudgetSpent before anything is drawn.
        """
        with self._lock:
            guarantee = self._stated(order)
            owned = self._admit(guarantee)
            digests = digests_of(owned)
            require_unclaimed(self._claims, self.policy.population, digests)
            request = self._request_digest(owned, guarantee, order.occasion)
            stored = self._ledger.stored(request)
            if stored is not None:
                return self._renewed(stored)
            if not self._ledger.compared:
                raise not_compared()
            self._ledger.price(self._charge(guarantee, owned)).require()  # a refusal costs no work; `charge` decides again
            claim(self._claims, self.policy.population, digests)  # before anything is charged
            with out_of_memory_is(_no_memory):
                embedding, activations = self._one_pass(owned.records)
            vectors = self._vectors(owned, embedding)
            with out_of_memory_is(_no_memory):
                adapter = self._train(owned, activations) if self._recipe is not None else None

            def make(number: int, previous: bytes) -> tuple[bytes, bytes]:
                # Noise is drawn here and nowhere else: inside the transaction that charges for it.
                specification = estimate(vectors, self._map.map_id, guarantee, self._noise)
                release = self._release(number, previous, specification, adapter)
                return release.release_id, sign_release(release, self._key)

            return self._ledger.charge(request, specification_charge(guarantee), make, first_only=first_only)

    def _vectors(self, owned: OwnedRecords, embedding: Embedding) -> BoundedVectors:
        usable = np.isfinite(embedding).all(axis=(1, 2))
        if not usable.all():
            raise RecordError(
                f"{self._data.name}, record {int(np.argmin(usable)) + 1}: the base model gives it an embedding that is not finite",
                hint="the model's files may be damaged, or the record's text is none",
            )
        features = map_alone(self._map, embedding)
        return quantise(features) if owned.units is None else quantise_units(features, owned.units)

    def _rounds_of(self, rules: CohortRules) -> Rounds:
        if self.policy.unit != RECORD:
            raise UsageError(
                f"cohort: expected a population whose unit is the record, got {str(self.policy.unit)!r}",
                hint="somebody with records at several members would be protected at each of them alone",
            )
        serves = self._map.map_id, bytes.fromhex(self._map.base_model), self._map.dimension
        return Rounds(rules, self._key, self._ledger, self._noise, serves, self._require_cohort, self._cohort_vectors, self._window)

    def _require_cohort(self, cohort: Cohort) -> None:
        self._require_orderly(Order(cohort.guarantee, cohort.map_id))
        self._require_epsilon(cohort.guarantee)

    def _cohort_vectors(self, minimum: int) -> BoundedVectors:
        """Return the vectors of the owner's records, which are claimed for this population from now on."""
        owned = read_owned_records(self._data, minimum, self._limit)
        digests = digests_of(owned)
        require_unclaimed(self._claims, self.policy.population, digests)
        claim(self._claims, self.policy.population, digests)  # before anything is charged
        with out_of_memory_is(_no_memory):
            embedding = self._embed(owned.records, layer=self._map.layer, kind=self._map.embedding, on_progress=None)
        return self._vectors(owned, embedding)

    def _renewed(self, envelope: bytes) -> bytes:
        """Return stored bytes; where they need a new window, the same specification and adapter under the owner's next number.

        Nothing is drawn: who has the old release has every integer of the new one, so that costs nothing.
        """
        while (release := open_envelope(envelope)).window.needs_renewal(day_of(self._now())):

            def sign(number: int, previous: bytes, release: Release = release) -> tuple[bytes, bytes]:
                again = replace(release, owner=self.owner, release_number=number, previous=previous, window=self._window())
                return again.release_id, sign_release(again, self._key)

            request = renewal_request(release.release_id)
            envelope = self._ledger.charge(request, Charge((), release.specification.guarantee.delta), sign, origin=Origin.RENEWED)
        return envelope

    def training_plan(self) -> TrainingPlan:
        """Return what `train` would need and cost; nothing is computed or charged."""
        if self._recipe is None:
            raise UsageError("train: expected a recipe")
        owned = read_owned_records(self._data, self.policy.minimum_records, self._limit, self.policy.unit)
        require_unclaimed(self._claims, self.policy.population, digests_of(owned))
        tokens = sum(len(self._model.encode(record).tokens) for record in owned.records)
        states = tokens * self._model.width * self._model.dtype.itemsize
        steps = self._recipe.steps if isinstance(self._recipe, PrivateRecipe) else self._recipe.steps_for(len(owned.records))
        memory = self._model.size_bytes + self._model.upper_bytes(self._split) + min(states, MEMORY_BYTES) + WORKING_BYTES
        return TrainingPlan(
            len(owned.records), owned.unit_count, tokens, self._split, self._model.layers - 1, steps, memory,
            states if states > MEMORY_BYTES else 0, self._promise, self._ledger.price(self._training_charge(owned)),
        )  # fmt: skip

    def train(self) -> Trained:
        """Return the adapter of the owner's records: trained before under this recipe, or now; nothing is released.

        A private training is charged here, once; a release of the same records under the same recipe uses its adapter.
        Raises what `release` raises, and UsageError where the guard has no recipe.
        """
        with self._lock:
            if self._recipe is None:
                raise UsageError("train: expected a recipe")
            owned = read_owned_records(self._data, self.policy.minimum_records, self._limit, self.policy.unit)
            digests = digests_of(owned)
            require_unclaimed(self._claims, self.policy.population, digests)
            if self._private is not None:
                self._ledger.price(self._training_charge(owned)).require()
                claim(self._claims, self.policy.population, digests)
            activations: list[Activations] = []
            with out_of_memory_is(_no_memory):
                if self._ledger.trained(self._training_digest(owned)) is None:
                    activations = self._prefix(owned.records)
                reference = self._train(owned, activations)
            return Trained(reference, self._home / "adapters" / f"{reference.digest.hex()}.safetensors", tuple(self.losses))

    @property
    def _private(self) -> PrivateRecipe | None:
        """The recipe, where it is one with a guarantee."""
        return self._recipe if isinstance(self._recipe, PrivateRecipe) else None

    @property
    def _promise(self) -> AdapterGuarantee:
        private = self._private
        return NOT_PRIVATE if private is None else PrivateTraining(private.guarantee, private.event)

    def _training_charge(self, owned: OwnedRecords) -> Charge:
        """Return what training would be charged as: nothing without a guarantee, or where it was charged before."""
        private = self._private
        if private is None or self._ledger.charged(self._training_digest(owned)):
            return Charge((), self.policy.budget.delta)
        return Charge((private.event,), private.guarantee.delta)

    def _charge(self, guarantee: Guarantee, owned: OwnedRecords) -> Charge:
        training = self._training_charge(owned)
        return Charge((*specification_charge(guarantee).events, *training.events), min(guarantee.delta, training.delta))

    def _release(self, number: int, previous: bytes, specification: Specification, adapter: AdapterReference | None) -> Release:
        base_model = bytes.fromhex(self._model.model_id)
        simulated = self._noise.simulated
        return Release(self.owner, number, previous, base_model, specification, adapter, self._card, simulated, self._window())

    def _window(self) -> Window:
        return ALWAYS if self._noise.simulated else Window.beginning(day_of(self._now()), self.policy.valid_days)

    def adapter_file(self, release: Release) -> Path | None:
        """Return where the adapter of a release lies, if it has one."""
        return self._home / "adapters" / f"{release.adapter.digest.hex()}.safetensors" if release.adapter else None

    def _one_pass(self, records: Sequence[Record]) -> tuple[Embedding, list[Activations]]:
        def report(done: int, of: int) -> None:
            self._on_progress("embed", done, of)

        if self._recipe is not None and self._encoder is self._model and self._map.embedding is EmbeddingKind.HIDDEN_STATES:
            return cached_pass(self._model, records, self._split, self._map.layer, self._home / "training", report, workers=self._workers)
        embedding = self._embed(records, layer=self._map.layer, kind=self._map.embedding, on_progress=report)
        return embedding, [] if self._recipe is None else self._prefix(records)

    def _prefix(self, records: Sequence[Record]) -> list[Activations]:
        def report(done: int, of: int) -> None:
            self._on_progress("prefix", done, of)

        return cached_pass(self._model, records, self._split, self._split, self._home / "training", report, workers=self._workers)[1]

    def _train(self, owned: OwnedRecords, activations: list[Activations]) -> AdapterReference:
        """Return the adapter of a training, the one that was made before or a new one.

        Charge, draws, note, file: a private training is charged before its first draw, and only one adapter is ever made for a charge.
        An interrupted one goes on from its checkpoint; what it drew after that was seen by nobody, so it may be drawn again.
        """
        request, folder = self._training_digest(owned), self._home / "training"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with alone(folder / f"{request.hex()}.lock"):
            digest = self._ledger.trained(request)
            if digest is None:
                digest = self._train_anew(owned, activations, request, folder / f"{request.hex()}.state")
            file = self._home / "adapters" / f"{digest.hex()}.safetensors"
            if not file.is_file():
                raise UsageError(
                    f"{file}: the adapter of these records is not there any more",
                    hint="its charge paid for one adapter: bring the file back, or change the recipe and pay again",
                )
            return AdapterReference(digest, file.stat().st_size, self._promise)

    def _train_anew(self, owned: OwnedRecords, activations: list[Activations], request: bytes, checkpoint: Path) -> bytes:
        from nodes.finetune import finetune

        def report(done: int, of: int) -> None:
            self._on_progress("train", done, of)

        private = self._private
        if private is not None:
            from nodes.private_training import finetune_privately

            self._ledger.charge_training(request, Charge((private.event,), private.guarantee.delta))
            adapter = finetune_privately(
                self._model, activations, private, report, units=owned.units, checkpoint=checkpoint, workers=self._workers
            )
        else:
            assert isinstance(self._recipe, Recipe)
            adapter = finetune(
                self._model, activations, self._recipe, report, workers=self._workers, checkpoint=checkpoint, on_loss=self.losses.append
            )
        data = adapter.to_bytes()
        digest = hashlib.sha256(data).digest()
        write_durably(self._home / "adapters" / f"{digest.hex()}.safetensors", data)
        self._ledger.note_trained(request, digest)
        checkpoint.unlink(missing_ok=True)
        return digest

    def _training_digest(self, owned: OwnedRecords) -> bytes:
        """What makes two trainings the same: records, units, base model, split and recipe."""
        parts = [digest_of(owned.records), bytes.fromhex(self._model.model_id), str(self._split).encode(), repr(self._recipe).encode()]
        return _digest_of("training", [*parts, *_unit_parts(self.policy.unit, owned)])

    def _request_digest(self, owned: OwnedRecords, guarantee: Guarantee, occasion: int) -> bytes:
        """What makes two requests the same: data, units, map, base model, mechanism, recipe and card; of a schedule, the occasion alone.

        An occasion is one release.  The order for it may come a second time, after a crash, when the data are others.
        """
        mechanism = [format_decimal(guarantee.epsilon).encode(), format_decimal(guarantee.delta).encode()]
        if occasion:
            return _digest_of("request", [*mechanism, f"occasion {occasion}".encode()])
        parts = [
            digest_of(owned.records), self._map.map_id, bytes.fromhex(self._model.model_id), *mechanism,
            repr(self._recipe).encode(), repr(self._card).encode(),
        ]  # fmt: skip
        return _digest_of("request", [*parts, *_unit_parts(guarantee.unit, owned)])


def _no_memory() -> TrainingFailed:
    return TrainingFailed(
        "guard: out of memory",
        hint="what is done is kept and paid once: free some and run it again (`veilmart node train --dry-run` says how much it needs)",
    )


def _unit_parts(unit: PrivacyUnit, owned: OwnedRecords) -> list[bytes]:
    return [] if owned.units is None else [str(unit).encode(), *(value.encode() for value in owned.units)]


def _digest_of(kind: str, parts: list[bytes]) -> bytes:
    digest = hashlib.sha256(domain_tag(kind, 1))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a file's lock: two processes of one home never train for one charge at once."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class Reachable(Protocol):
    """What a shim may ask of a guard."""

    def request(self, order: Order) -> None:
        """Queue an order."""

    def collect(self) -> bytes | None:
        """Return the newest visible envelope, or None."""
        ...

    def take_part(self, ask: bytes) -> bytes:
        """Return this owner's message for a step of a cohort's round."""
        ...


_LOCAL_GUARDS: dict[str, Reachable] = {}


def serve_in_process(name: str, guard: Reachable) -> str:
    """Make a guard reachable for shims of this process, and return its address."""
    _LOCAL_GUARDS[name] = guard
    return f"local:{name}"


def reach(address: str) -> Reachable:
    """Return the guard at an address: unix:PATH, or local:NAME in this process."""
    if address.startswith("unix:"):
        from nodes.guard_service import SocketGuard

        return SocketGuard(address)
    return _LOCAL_GUARDS[address.removeprefix("local:")]
