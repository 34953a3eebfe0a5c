"""A cohort's round: secure aggregation that gives the noisy sum and nothing else (docs/protocol.md 10; proof in docs/privacy.md, P6).

Bonawitz et al. 2017 in their variant for servers that do not follow the protocol.  Whoever carries the messages, a SuperLink, reads and
may exchange all of them; members trust the keys of the owners they joined with, and nothing else.

    advertise   ephemeral keys and a commitment to the self-mask, signed by the owner's key
    share       self-mask and mask key as Shamir shares, one box for each other member
    mask        records + noise + self-mask +- a mask for each pair, modulo 2^32          the charge is durable before this leaves
    agree       a signature under one list of whose masked numbers are in
    reveal      with `threshold` such signatures: for each in the list the share of its self-mask, for each other that of its mask key
    sign        everyone recomputes the sum from what was revealed and signs the specification that it makes

Every step's message is signed with the owner's key over the round's parameters.  `Member` is one side of a round: it answers a step once,
and after anything that does not fit it answers nothing more.  Its secrets live in memory alone, so a member that was started anew has
dropped out.  Nothing here reads a socket, a file or a clock.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.claims import Card
from protocol.codec import decode, domain_tag, encode, format_decimal, parse_decimal, take
from protocol.cohort import ID_BYTES, SIGNATURE_BYTES, CohortSeal, Resilience, statement_of, verify_signature
from protocol.errors import CohortAborted, FeatureNormError, FormatError, UsageError
from protocol.hazmat.masks import BOX_OVERHEAD, agreed_key, close_box, open_box, stream
from protocol.hazmat.noise import NoiseSource, discrete_gaussian
from protocol.hazmat.sharing import SECRET_BYTES, SHARE_BYTES, join, split
from protocol.privacy import FEATURE_SCALE, MAX_UNITS, NORM_SQUARED, RECORD, Guarantee
from protocol.release import Release
from protocol.specification import BoundedVectors, Specification
from protocol.window import Window

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

COHORT, ASK = domain_tag("cohort", 1), domain_tag("cohort-ask", 1)
SELF_MASK, ROSTER, DEALERS = domain_tag("cohort-self-mask", 1), domain_tag("cohort-roster", 1), domain_tag("cohort-dealers", 1)
PAIR, BOX = domain_tag("cohort-pair", 1), domain_tag("cohort-box", 1)
BOX_BYTES = 2 * SHARE_BYTES + BOX_OVERHEAD
LARGEST_DIMENSION = 4096
MAX_ASK_BYTES = 256 << 10  # a transcript of 32 members takes 100 kB
NOISE_STDS = 10  # room for noise beside the largest exact sum: the chance that a sum wraps is below 1e-22 a coordinate

Words = NDArray[np.uint32]  # (D+1,), modulo 2^32


class Step(StrEnum):
    """What a member is asked for."""

    ADVERTISE = "advertise"
    SHARE = "share"
    MASK = "mask"
    AGREE = "agree"
    REVEAL = "reveal"
    SIGN = "sign"
    SEAL = "seal"  # one survivor: its envelope, with the signatures of all


@dataclass(frozen=True)
class Cohort:
    """One round: who, for which market, under which guarantee.  Its hash stands in every message."""

    market_key: bytes
    round_id: bytes  # random; nobody takes part twice in one cohort
    map_id: bytes
    base_model: bytes  # of the map's encoder
    dimension: int  # D
    guarantee: Guarantee
    name: str  # of the learnware
    members: tuple[bytes, ...]  # owners' Ed25519 keys, in order
    dropouts: int
    colluders: int
    simulated: bool = False

    def __post_init__(self) -> None:
        if any(len(value) != ID_BYTES for value in (self.market_key, self.round_id, self.map_id, self.base_model, *self.members)):
            raise FormatError(f"cohort: expected ids and keys of {ID_BYTES} bytes")
        if tuple(sorted(set(self.members))) != self.members:
            raise FormatError("cohort: expected its members in order and once each")
        if not 1 <= self.dimension <= LARGEST_DIMENSION:
            raise FormatError(f"cohort: expected 1 to {LARGEST_DIMENSION} coordinates, got {self.dimension}")
        if self.guarantee.unit != RECORD:
            raise FormatError("cohort: expected the unit 'record': a person at several members would be protected at each alone")
        try:
            Card(self.name)
        except UsageError as error:
            raise FormatError(f"cohort: {error}") from None
        noise = len(self.members) * self.resilience.share_variance(self.guarantee)
        if noise * NOISE_STDS**2 >= ((1 << 31) - MAX_UNITS * FEATURE_SCALE) ** 2:
            raise FormatError("cohort: sums and noise would not fit in 32 bits; epsilon and delta are too small together")

    @cached_property
    def resilience(self) -> Resilience:
        """How many may go missing or collude."""
        return Resilience(len(self.members), self.dropouts, self.colluders)

    @cached_property
    def body(self) -> bytes:
        """The canonical bytes of the parameters."""
        metadata = {
            "colluders": self.colluders, "delta": format_decimal(self.guarantee.delta), "dimension": self.dimension,
            "dropouts": self.dropouts, "epsilon": format_decimal(self.guarantee.epsilon), "name": self.name,
            "simulated": int(self.simulated),
        }  # fmt: skip
        return encode(COHORT, metadata, b"".join((self.market_key, self.round_id, self.map_id, self.base_model, *self.members)))

    @cached_property
    def cohort_id(self) -> bytes:
        """SHA-256 of the parameters."""
        return hashlib.sha256(self.body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Cohort:
        """Return the cohort of its canonical bytes; raise FormatError for any others."""
        metadata, payload = decode(COHORT, data)
        fields = {"colluders": int, "delta": str, "dimension": int, "dropouts": int, "epsilon": str, "name": str, "simulated": int}
        colluders, delta, dimension, dropouts, epsilon, name, simulated = take(metadata, fields, "cohort")
        ids = _pieces(payload, ID_BYTES, "cohort: expected ids and keys")
        if len(ids) < 4 or simulated not in (0, 1):
            raise FormatError("cohort: expected four ids and the keys of its members")
        try:
            guarantee = Guarantee(parse_decimal(epsilon, "cohort.epsilon"), parse_decimal(delta, "cohort.delta"))
        except UsageError as error:
            raise FormatError(f"cohort: {error}") from None
        market_key, round_id, map_id, base_model, *members = ids
        return cls(
            market_key, round_id, map_id, base_model, dimension, guarantee, name, tuple(members), dropouts, colluders, bool(simulated)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ask:
    """What a member is sent: the step, the round's parameters, and the messages of others that it takes."""

    step: Step
    cohort: Cohort
    parts: tuple[bytes, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        pieces = (self.cohort.body, *self.parts)
        return encode(ASK, {"sizes": [len(piece) for piece in pieces], "step": str(self.step)}, b"".join(pieces))

    @classmethod
    def from_bytes(cls, data: bytes) -> Ask:
        """Return the ask of its canonical bytes; raise FormatError for any others."""
        if len(data) > MAX_ASK_BYTES:
            raise FormatError(f"cohort: expected at most {MAX_ASK_BYTES} bytes, got {len(data)}")
        metadata, payload = decode(ASK, data)
        sizes, step = take(metadata, {"sizes": list, "step": str}, "cohort-ask")
        if step not in set(Step) or not sizes or any(not isinstance(size, int) or size < 0 for size in sizes) or sum(sizes) != len(payload):
            raise FormatError("cohort: expected a step and the sizes of its parts")
        pieces = []
        for size in sizes:
            pieces.append(payload[:size])
            payload = payload[size:]
        return cls(Step(step), Cohort.from_bytes(pieces[0]), tuple(pieces[1:]))


# Messages -----------------------------------------------------------------------------------------------------------------


def _say(cohort: Cohort, step: Step, key: Ed25519PrivateKey, content: bytes) -> bytes:
    body = encode(domain_tag(f"cohort-{step}", 1), {}, cohort.cohort_id + key.public_key().public_bytes_raw() + content)
    return body + key.sign(body)


def heard(cohort: Cohort, step: Step, message: bytes) -> tuple[bytes, bytes]:
    """Return who said a step's message in this round, and its content; raise FormatError or InvalidSignature for any other bytes."""
    body, signature = message[:-SIGNATURE_BYTES], message[-SIGNATURE_BYTES:]
    metadata, payload = decode(domain_tag(f"cohort-{step}", 1), body)
    take(metadata, {}, f"cohort-{step}")
    cohort_id, sender, content = payload[:ID_BYTES], payload[ID_BYTES : 2 * ID_BYTES], payload[2 * ID_BYTES :]
    if cohort_id != cohort.cohort_id or sender not in cohort.members:
        raise FormatError(f"cohort-{step}: expected a message of this round, from a member")
    verify_signature(sender, signature, body, f"cohort-{step}: the member's signature does not verify")
    return sender, content


def _all_heard(cohort: Cohort, step: Step, messages: Sequence[bytes], least: int) -> dict[bytes, bytes]:
    """Return the contents of a step's messages by member, in order; raise FormatError unless so many members spoke, once each."""
    if len(messages) > len(cohort.members):
        raise FormatError(f"cohort-{step}: expected at most {len(cohort.members)} messages, got {len(messages)}")
    said = dict(heard(cohort, step, message) for message in messages)
    if len(said) != len(messages) or len(said) < least:
        raise FormatError(f"cohort-{step}: expected at least {least} members, once each, got {len(said)}")
    return dict(sorted(said.items()))


@dataclass(frozen=True, slots=True)
class Keys:
    """What a member advertised."""

    channel: bytes  # X25519, closes boxes
    mask: bytes  # X25519, agrees on the masks of pairs; becomes known where its member drops out
    commitment: bytes  # to the self-mask

    @classmethod
    def of(cls, content: bytes) -> Keys:
        """Return the keys in the content of a message."""
        return cls(*_exactly(content, (ID_BYTES, ID_BYTES, ID_BYTES), "advertise"))


def _commitment(cohort: Cohort, member: bytes, self_mask: bytes) -> bytes:
    return hashlib.sha256(SELF_MASK + cohort.cohort_id + member + self_mask).digest()


def _exactly(content: bytes, sizes: Sequence[int], step: str) -> list[bytes]:
    if len(content) != sum(sizes):
        raise FormatError(f"cohort-{step}: expected {sum(sizes)} bytes, got {len(content)}")
    parts = []
    for size in sizes:
        parts.append(content[:size])
        content = content[size:]
    return parts


def _pieces(data: bytes, size: int, otherwise: str) -> list[bytes]:
    if len(data) % size:
        raise FormatError(otherwise)
    return [data[start : start + size] for start in range(0, len(data), size)]


@dataclass(frozen=True, slots=True, eq=False)
class Roster:
    """Whose keys a round goes on with.  Everything later is bound to its digest, so that nobody can be shown another one unnoticed."""

    cohort: Cohort
    keys: Mapping[bytes, Keys]
    digest: bytes

    @classmethod
    def of(cls, cohort: Cohort, adverts: Sequence[bytes]) -> Roster:
        """Return the roster of signed advertisements."""
        said = _all_heard(cohort, Step.ADVERTISE, adverts, cohort.resilience.least_survivors)
        keys = {member: Keys.of(content) for member, content in said.items()}
        fresh = {value for one in keys.values() for value in (one.channel, one.mask)}
        if len(fresh) != 2 * len(keys):  # a key that two members show is one that a third may know
            raise FormatError("cohort-advertise: expected keys that nobody else advertised")
        digest = hashlib.sha256(ROSTER + cohort.cohort_id)
        for member, content in said.items():
            digest.update(member + content)
        return cls(cohort, keys, digest.digest())

    def place(self, member: bytes) -> int:
        """Return where a member's shares lie."""
        return self.cohort.members.index(member)

    def pair_mask(self, private: X25519PrivateKey, mine: bytes, other: bytes) -> Words:
        """Return what a member adds for a pair; the other one adds the negative."""
        low, high = sorted((mine, other))
        mask = stream(agreed_key(private, self.keys[other].mask, PAIR + self.digest + low + high), self.cohort.dimension + 1)
        return mask if mine == low else np.negative(mask)

    def box_key(self, private: X25519PrivateKey, other: bytes, sender: bytes, receiver: bytes) -> bytes:
        """Return the key of the one box from sender to receiver."""
        return agreed_key(private, self.keys[other].channel, BOX + self.digest + sender + receiver)


def boxes_in(roster: Roster, message: bytes) -> tuple[bytes, dict[bytes, bytes]]:
    """Return who dealt shares, and its box for each other member of the roster."""
    sender, content = heard(roster.cohort, Step.SHARE, message)
    others = [member for member in roster.keys if member != sender]
    if sender not in roster.keys or content[:ID_BYTES] != roster.digest or len(content) != ID_BYTES + len(others) * BOX_BYTES:
        raise FormatError("cohort-share: expected a box for each other member of this roster")
    return sender, dict(zip(others, _pieces(content[ID_BYTES:], BOX_BYTES, ""), strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class MaskedInputs:
    """The masked numbers of the survivors, all of one roster and of one list of dealers."""

    words: Mapping[bytes, Words]  # by member, in order
    dealers: bytes  # digest of those whose masks are in
    digest: bytes  # of all of it: what members agree on

    @classmethod
    def of(cls, roster: Roster, masked: Sequence[bytes]) -> MaskedInputs:
        """Return the inputs of signed messages; raise FormatError where two members masked for different rosters or dealers."""
        cohort = roster.cohort
        said = _all_heard(cohort, Step.MASK, masked, cohort.resilience.least_survivors)
        if not set(said) <= set(roster.keys):
            raise FormatError("cohort-mask: expected members of the roster")
        words, dealers, digest = {}, b"", hashlib.sha256(roster.digest)
        for member, content in said.items():
            of_roster, of_dealers, data = _exactly(content, (ID_BYTES, ID_BYTES, 4 * (cohort.dimension + 1)), Step.MASK)
            if of_roster != roster.digest or (dealers and of_dealers != dealers):
                raise FormatError("cohort-mask: expected masks of one roster and one list of dealers")
            dealers, words[member] = of_dealers, np.frombuffer(data, "<u4").astype(np.uint32)
            digest.update(member + hashlib.sha256(content).digest())
        return cls(words, dealers, digest.digest())


def _dealers_digest(roster: Roster, dealers: Iterable[bytes]) -> bytes:
    return hashlib.sha256(DEALERS + roster.digest + b"".join(sorted(dealers))).digest()


def _require_agreement(roster: Roster, inputs: MaskedInputs, agreed: Sequence[bytes]) -> None:
    """Raise FormatError unless `threshold` survivors signed that these are the inputs."""
    said = _all_heard(roster.cohort, Step.AGREE, agreed, roster.cohort.resilience.threshold)
    if not set(said) <= set(inputs.words) or any(content != inputs.digest for content in said.values()):
        raise FormatError("cohort-agree: expected survivors' signatures under one list, got another list")


# One member's side --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Secrets:
    """What opens a member's masked numbers; given up as soon as the round needs it no more."""

    channel: X25519PrivateKey
    mask: X25519PrivateKey
    self_mask: bytes
    held: dict[bytes, tuple[bytes, bytes]]  # by dealer: our share of its self-mask, of its mask key

    @classmethod
    def fresh(cls) -> _Secrets:
        """Return secrets that no other round has."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        return cls(X25519PrivateKey.generate(), X25519PrivateKey.generate(), secrets.token_bytes(SECRET_BYTES), {})


class Member:
    """A member's side of one round: a step is answered once, and after anything that does not fit nothing is answered any more.

    Whoever carries the messages may ask for a step again: the same question gets the same bytes, another one ends the round.
    """

    def __init__(self, cohort: Cohort, key: Ed25519PrivateKey) -> None:
        self.cohort, self._key = cohort, key
        self.public = key.public_key().public_bytes_raw()
        if self.public not in cohort.members:
            raise CohortAborted("cohort: this owner is not one of its members")
        self._secrets: _Secrets | None = _Secrets.fresh()
        self._answers: dict[Step, tuple[bytes, bytes]] = {}  # digest of the question, answer
        self._roster: Roster | None = None
        self._inputs: MaskedInputs | None = None

    def advertise(self) -> bytes:
        """Return our signed ephemeral keys."""
        return self._once(Step.ADVERTISE, (), self._advertise)

    def share(self, adverts: Sequence[bytes]) -> bytes:
        """Return a box with shares of our secrets for each other member who advertised."""
        return self._once(Step.SHARE, adverts, lambda: self._share(adverts))

    def mask(self, boxes: Sequence[bytes], contribute: Callable[[], Sequence[int]]) -> bytes:
        """Return our numbers under masks.

        boxes: dealer's key and its box for us, of each other member that dealt.  contribute: charges the ledger and returns our records'
        sum with our share of noise, (D+1,); called once, after everything else was found right.
        """
        return self._once(Step.MASK, boxes, lambda: self._masked(boxes, contribute))

    def agree(self, masked: Sequence[bytes]) -> bytes:
        """Return our signature under the list of those whose masked numbers these are; ours must be one of them."""
        return self._once(Step.AGREE, masked, lambda: self._agree(masked))

    def reveal(self, agreed: Sequence[bytes]) -> bytes:
        """Return our shares: of a survivor's self-mask, of another dealer's mask key, and never both of one."""
        return self._once(Step.REVEAL, agreed, lambda: self._reveal(agreed))

    def _once(self, step: Step, parts: Sequence[bytes], answer: Callable[[], bytes]) -> bytes:
        question = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()
        if step in self._answers and self._answers[step][0] == question:
            return self._answers[step][1]
        before = list(Step)[: list(Step).index(step)]
        if step in self._answers or any(earlier not in self._answers for earlier in before):
            self._give_up()
            raise CohortAborted(f"cohort: asked to {step} twice over different messages, or out of order")
        try:
            said = answer()
        except BaseException:
            self._give_up()  # whatever did not fit: this round gets nothing more from us
            raise
        self._answers[step] = (question, said)
        return said

    def _give_up(self) -> None:
        self._secrets, self._answers = None, {}

    @property
    def _mine(self) -> _Secrets:
        if self._secrets is None:
            raise CohortAborted("cohort: this member has given that round up")
        return self._secrets

    def _say(self, step: Step, content: bytes) -> bytes:
        return _say(self.cohort, step, self._key, content)

    def _advertise(self) -> bytes:
        public = [private.public_key().public_bytes_raw() for private in (self._mine.channel, self._mine.mask)]
        return self._say(Step.ADVERTISE, b"".join((*public, _commitment(self.cohort, self.public, self._mine.self_mask))))

    def _share(self, adverts: Sequence[bytes]) -> bytes:
        if self._answers[Step.ADVERTISE][1] not in adverts:
            raise CohortAborted("cohort: other keys are shown as ours, or none")
        roster = self._roster = Roster.of(self.cohort, adverts)
        threshold, count = self.cohort.resilience.threshold, len(self.cohort.members)
        of_self_mask = split(self._mine.self_mask, threshold, count)
        of_mask_key = split(self._mine.mask.private_bytes_raw(), threshold, count)
        boxes = []
        for other in roster.keys:
            place = roster.place(other)
            if other == self.public:
                self._mine.held[other] = of_self_mask[place], of_mask_key[place]
            else:
                key = roster.box_key(self._mine.channel, other, self.public, other)
                boxes.append(close_box(key, of_self_mask[place] + of_mask_key[place], roster.digest + self.public + other))
        return self._say(Step.SHARE, roster.digest + b"".join(boxes))

    def _masked(self, boxes: Sequence[bytes], contribute: Callable[[], Sequence[int]]) -> bytes:
        roster, held = self._known_roster(), self._mine.held
        for part in boxes:
            dealer, box = part[:ID_BYTES], part[ID_BYTES:]
            if dealer not in roster.keys or dealer in held:
                raise CohortAborted("cohort: expected one box of each other member who advertised")
            content = open_box(roster.box_key(self._mine.channel, dealer, dealer, self.public), box, roster.digest + dealer + self.public)
            if content is None or len(content) != 2 * SHARE_BYTES:
                raise CohortAborted("cohort: a box does not open: its dealer was shown other keys than we were")
            held[dealer] = content[:SHARE_BYTES], content[SHARE_BYTES:]
        if len(held) < self.cohort.resilience.least_survivors:
            raise CohortAborted(f"cohort: expected {self.cohort.resilience.least_survivors} dealers, got {len(held)}")
        total = stream(self._mine.self_mask, self.cohort.dimension + 1)
        for other in held:
            if other != self.public:
                total = total + roster.pair_mask(self._mine.mask, self.public, other)
        numbers = contribute()
        if len(numbers) != len(total):
            raise CohortAborted(f"cohort: expected {len(total)} numbers, got {len(numbers)}")
        total = total + np.array([number % (1 << 32) for number in numbers], np.uint32)
        return self._say(Step.MASK, roster.digest + _dealers_digest(roster, held) + total.astype("<u4").tobytes())

    def _agree(self, masked: Sequence[bytes]) -> bytes:
        roster = self._known_roster()
        if self._answers[Step.MASK][1] not in masked:
            raise CohortAborted("cohort: our numbers are not on the list of survivors, or others are shown as ours")
        self._inputs = MaskedInputs.of(roster, masked)
        if not set(self._inputs.words) <= set(self._mine.held):
            raise CohortAborted("cohort: a survivor of whose masks nobody gave us a share")
        return self._say(Step.AGREE, self._inputs.digest)

    def _reveal(self, agreed: Sequence[bytes]) -> bytes:
        assert self._inputs is not None
        _require_agreement(self._known_roster(), self._inputs, agreed)
        # Either share of one member is harmless; both together would open its masked numbers.
        held = self._mine.held
        shares = [held[dealer][0 if dealer in self._inputs.words else 1] for dealer in sorted(held)]
        self._secrets = None  # who takes this machine over later finds nothing that opens what was recorded
        return self._say(Step.REVEAL, self._inputs.digest + b"".join((*sorted(held), *shares)))

    def _known_roster(self) -> Roster:
        assert self._roster is not None
        return self._roster


def contribution(vectors: BoundedVectors, cohort: Cohort, noise: NoiseSource) -> list[int]:
    """Return the sum of a member's feature vectors with its share of the noise: (D+1,) integers, not for anybody else's eyes.

    vectors: (n, D+1), one row per record.  Raises FeatureNormError for more records than a member may bring; call it only where the
    charge was made.  Source: Kairouz, Liu, Steinke 2021 for sums of discrete Gaussians.
    """
    if len(vectors.rows) > cohort.resilience.most_units:
        raise FeatureNormError(f"cohort: expected at most {cohort.resilience.most_units} records of one member, got more")
    if vectors.rows.shape[1] != cohort.dimension + 1 or vectors.norm_squared != NORM_SQUARED:
        raise FeatureNormError("cohort: expected vectors of the cohort's map, under the bound of a specification")
    share = cohort.resilience.share_variance(cohort.guarantee)
    return [int(value) + discrete_gaussian(share, noise) for value in vectors.rows.sum(axis=0)]


# What everybody can recompute ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Transcript:
    """The messages of a round from which anyone recomputes the sum."""

    adverts: tuple[bytes, ...]
    masked: tuple[bytes, ...]
    agreed: tuple[bytes, ...]
    revealed: tuple[bytes, ...]

    def to_parts(self) -> tuple[bytes, ...]:
        """Return all messages in one list, for an `Ask`."""
        return (*self.adverts, *self.masked, *self.agreed, *self.revealed)

    @classmethod
    def from_parts(cls, parts: Sequence[bytes]) -> Transcript:
        """Return the messages of such a list by their kinds; raise FormatError for any other."""
        kinds: dict[Step, list[bytes]] = {step: [] for step in (Step.ADVERTISE, Step.MASK, Step.AGREE, Step.REVEAL)}
        for part in parts:
            for step, messages in kinds.items():
                if part.startswith(domain_tag(f"cohort-{step}", 1)):
                    messages.append(part)
                    break
            else:
                raise FormatError("cohort: expected the messages of a round")
        return cls(*(tuple(messages) for messages in kinds.values()))


@dataclass(frozen=True, slots=True, eq=False)
class Aggregate:
    """The sum of a round, and who is in it."""

    cohort: Cohort
    survivors: tuple[bytes, ...]
    sums: NDArray[np.int32]  # (D+1,)

    @property
    def statement(self) -> bytes:
        """What every survivor signs."""
        cohort = self.cohort
        return statement_of(
            cohort.cohort_id, cohort.resilience, self.survivors, cohort.name, cohort.base_model, cohort.map_id, cohort.guarantee,
            self.variance, cohort.simulated, self.sums.tolist(),
        )  # fmt: skip

    @property
    def variance(self) -> int:
        """The noise variance that is published: that of the survivors' shares."""
        return len(self.survivors) * self.cohort.resilience.share_variance(self.cohort.guarantee)


def aggregate(cohort: Cohort, transcript: Transcript) -> Aggregate:
    """Return the sum that a round's messages give; raise FormatError or InvalidSignature where they give none.

    Every member does this before it signs: nobody has to believe the sum of whoever carried the messages.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    roster = Roster.of(cohort, transcript.adverts)
    inputs = MaskedInputs.of(roster, transcript.masked)
    _require_agreement(roster, inputs, transcript.agreed)
    dealers, shares = _shares_in(roster, inputs, transcript.revealed)
    total = np.zeros(cohort.dimension + 1, np.uint32)
    for words in inputs.words.values():
        total = total + words
    for dealer in dealers:
        secret = join(shares[dealer])
        if dealer in inputs.words:
            if secret is None or _commitment(cohort, dealer, secret) != roster.keys[dealer].commitment:
                raise FormatError("cohort-reveal: the shares give another self-mask than its member committed to")
            total = total - stream(secret, len(total))
            continue
        private = X25519PrivateKey.from_private_bytes(secret) if secret is not None else None
        if private is None or private.public_key().public_bytes_raw() != roster.keys[dealer].mask:
            raise FormatError("cohort-reveal: the shares give another mask key than its member advertised")
        for survivor in inputs.words:  # what the survivors added for the pair is the negative of what the missing one would have
            total = total + roster.pair_mask(private, dealer, survivor)
    return Aggregate(cohort, tuple(inputs.words), total.view(np.int32))


def _shares_in(roster: Roster, inputs: MaskedInputs, revealed: Sequence[bytes]) -> tuple[list[bytes], dict[bytes, dict[int, bytes]]]:
    """Return the dealers, and `threshold` shares of each one's secret by their places."""
    cohort = roster.cohort
    said = _all_heard(cohort, Step.REVEAL, revealed, cohort.resilience.threshold)
    dealers: list[bytes] = []
    shares: dict[bytes, dict[int, bytes]] = {}
    for member, content in list(said.items())[: cohort.resilience.threshold]:
        count = (len(content) - ID_BYTES) // (ID_BYTES + SHARE_BYTES)
        digest, keys, values = _exactly(content, (ID_BYTES, count * ID_BYTES, count * SHARE_BYTES), Step.REVEAL)
        dealers = _pieces(keys, ID_BYTES, "")
        if digest != inputs.digest or _dealers_digest(roster, dealers) != inputs.dealers or len(set(dealers)) != count:
            raise FormatError("cohort-reveal: expected a share of each dealer, for the list that was agreed on")
        for dealer, share in zip(dealers, _pieces(values, SHARE_BYTES, ""), strict=True):
            shares.setdefault(dealer, {})[roster.place(member)] = share
    if not set(inputs.words) <= set(dealers) <= set(roster.keys):
        raise FormatError("cohort-reveal: expected every survivor among the dealers")
    return dealers, shares


def cosign(result: Aggregate, key: Ed25519PrivateKey) -> bytes:
    """Return our signature of the specification, as a message; raise CohortAborted unless our own numbers are in the sum.

    A survivor's masked numbers bear its signature, which it gave once in this round: so ours are those that we sent.
    """
    if key.public_key().public_bytes_raw() not in result.survivors:
        raise CohortAborted("cohort: our numbers are not in the sum that we are to sign")
    return _say(result.cohort, Step.SIGN, key, key.sign(result.statement))


def sealed(result: Aggregate, signed: Sequence[bytes]) -> CohortSeal:
    """Return the seal of a specification that all its survivors signed; raise FormatError or InvalidSignature where one did not."""
    cohort = result.cohort
    said = _all_heard(cohort, Step.SIGN, signed, len(result.survivors))
    if tuple(said) != result.survivors:
        raise FormatError("cohort-sign: expected the signatures of the survivors")
    seal = CohortSeal(cohort.cohort_id, cohort.resilience, result.survivors, tuple(said.values()))
    seal.verify(result.statement)
    return seal


def joint_release(result: Aggregate, seal: CohortSeal, owner: bytes, number: int, previous: bytes, window: Window) -> Release:
    """Return the release of a cohort's specification in the chain of the survivor who publishes it."""
    cohort = result.cohort
    specification = Specification(cohort.map_id, result.sums, result.variance, cohort.guarantee)
    return Release(owner, number, previous, cohort.base_model, specification, None, Card(cohort.name), cohort.simulated, window, seal)
