"""The encrypted query: plan, key, query and answer.  Short is safe here: parameters, fresh keys and packing are chosen for you.

    plan = MatchPlan.build(rows=len(catalogue), dimension=64)       # both sides compute the same plan
    key = QueryKey.fresh(plan)                                      # secret; one query, then forget it
    query = key.encrypt(mean_feature)                               # to the market: query.to_bytes()
    scores = key.decrypt(answer, row_norms)                         # inner products, one per row; the key is burned

CKKS with one data prime of 50 bits and one special prime of 51 bits: log2 of both is 101.  At most 109 is allowed at degree 4096 for
128-bit security (Homomorphic Encryption Standard 2018; SEAL enforces it); `PQ_STRICT` keeps the primes and doubles the degree.
What is encrypted is the unit vector of the query, and the market encodes unit rows: a ciphertext carries cosines, whatever the norms
are, and no row, however noisy, can wrap around the modulus or cost another row precision.  Norms return after decryption: the
querier's own is in its key, those of the rows are public.
Source: docs/protocol.md 7; Halevi and Shoup 2014 for diagonals and baby steps; `tests/bench/matching.py` for what is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.errors import FeatureNormError, FormatError, IncompatibleSpecification

if TYPE_CHECKING:
    from protocol.hazmat.seal import SealKey

SEED_BYTES: Final = 64
MAX_QUERY_NORM: Final = 2.0
MAX_ROWS: Final = 1 << 24
MAX_DIMENSION: Final = 1024
TOLERANCE: Final = 2.0**-9
"""How far a decrypted cosine may lie outside what is possible: ten times the largest error of 200 keys and 128 baby steps."""


# --- presets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """A homomorphic parameter set.  Two parties use the same or do not understand each other; `name` stands for it on the wire."""

    name: str
    degree: int
    data_prime: int
    special_prime: int
    query_scale: float
    row_scale: float
    drops: tuple[int, int]  # lowest bits of the two polynomials that an answer leaves out

    def __post_init__(self) -> None:
        # Cosines are at most 1, and two of them share a slot as real and imaginary part: no coefficient may pass half the modulus.
        if not self.query_scale * self.row_scale * math.sqrt(2) * (1 + TOLERANCE) < self.data_prime / 2:
            raise FormatError(f"parameters {self.name}: expected scales that leave room for a cosine of 1 below half the data prime")

    @property
    def slots(self) -> int:
        """Complex numbers in one ciphertext."""
        return self.degree // 2

    @property
    def data_bits(self) -> int:
        """Bits of the prime that carries data."""
        return self.data_prime.bit_length()

    @property
    def special_bits(self) -> int:
        """Bits of the prime that only key switching uses."""
        return self.special_prime.bit_length()

    @cached_property
    def query_bytes(self) -> int:
        """Length of every `EncryptedQuery.to_bytes()`: one polynomial and a seed for the ciphertext and for each of two keys."""
        ciphertext, key = self.degree // 8 * self.data_bits, self.degree // 8 * (self.data_bits + self.special_bits)
        return ciphertext + SEED_BYTES + 2 * (key + SEED_BYTES)

    @cached_property
    def tile_bytes(self) -> int:
        """Length of a tile's scores in an answer."""
        return sum(self.degree // 8 * (self.data_bits - drop) for drop in self.drops)


STD128: Final = Parameters(
    name="std128",
    degree=4096,
    data_prime=1_125_899_906_826_241,
    special_prime=2_251_799_813_554_177,
    query_scale=2.0**29,
    row_scale=2.0**19,
    drops=(28, 22),
)
PQ_STRICT: Final = Parameters(
    name="pq-strict",  # 101 of the 165 bits that the strictest table with quantum attacks allows at this degree
    degree=8192,
    data_prime=STD128.data_prime,
    special_prime=STD128.special_prime,
    query_scale=STD128.query_scale,
    row_scale=STD128.row_scale,
    drops=(27, 21),  # the secret is longer, so that what is dropped of the second polynomial weighs more
)
PRESETS: Final = (STD128, PQ_STRICT)


def preset(name: str) -> Parameters:
    """Return the parameter set of a name; raises IncompatibleSpecification for one that this build does not have."""
    for parameters in PRESETS:
        if parameters.name == name:
            return parameters
    known = ", ".join(parameters.name for parameters in PRESETS)
    raise IncompatibleSpecification(f"parameters: expected one of {known}, got another name", hint="ask with a preset that both sides have")


# --- plan ------------------------------------------------------------------------------------------------------------

# Cost model, in nanoseconds of one AVX-512 core at degree 4096.  Both sides choose the plan from these numbers: changing one changes the
# protocol.
_ROTATION_NS: Final = 90_000
_PRODUCT_NS: Final = 2_800
_MAX_BABY: Final = 128  # noise grows with the root of the number of rotations in a row: rms 4e-5 at 128
_MAX_GROUPS: Final = 8  # the querier adds the groups, and with them what truncation left out: rms 5e-5 at 8, 9e-5 at 32
_STEP: Final = 4  # baby steps come in multiples of this


class Layout(Enum):
    """How the coordinates of a row meet those of the query."""

    CYCLIC = "cyclic"  # every slot is used; the dimension is a power of two, at least 4
    WINDOW = "window"  # any dimension; the last width - 1 positions of each group stay empty


@dataclass(frozen=True, slots=True)
class MatchPlan:
    """Where every coordinate of a catalogue sits, and in which steps it is multiplied.

    The slots are cut into `groups` of `period` slots.  Group g holds `width` coordinates of every row, two rows to a slot as real and
    imaginary part: the query is real, so that they do not mix.  Diagonal k multiplies the query rotated by k.  After `width` diagonals
    each slot holds the part of a score that its group knows; the querier adds the groups after decryption.
    """

    rows: int
    dimension: int
    layout: Layout
    groups: int
    baby: int  # rotations of the query, made once; the other rotations are giant steps of this length, made per tile
    parameters: Parameters = STD128

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS or not 1 <= self.dimension <= MAX_DIMENSION:
            raise FormatError(
                f"match plan: expected 1 to {MAX_ROWS} rows of 1 to {MAX_DIMENSION} coordinates, got {self.rows} of {self.dimension}"
            )
        if not _fits(self.dimension, self.layout, self.groups, self.baby, self.parameters.slots):
            raise FormatError(
                f"match plan: {self.dimension} coordinates do not fit a {self.layout.value} layout "
                f"with {self.groups} groups and {self.baby} baby steps"
            )

    @classmethod
    def build(cls, rows: int, dimension: int, parameters: Parameters = STD128) -> MatchPlan:
        """Return the plan with the fewest tiles, and among those the cheapest for the market.  Deterministic.

        Raises FormatError if there is no plan for so many rows or coordinates.
        """
        layout = Layout.CYCLIC if _is_power_of_two(dimension) and dimension >= _STEP else Layout.WINDOW
        plans = [
            cls(rows, dimension, layout, groups, baby, parameters)
            for groups in _POSSIBLE_GROUPS
            for baby in range(_STEP, _MAX_BABY + 1, _STEP)
            if _fits(dimension, layout, groups, baby, parameters.slots)
        ]
        if not plans:
            return cls(rows, dimension, layout, 1, _STEP, parameters)  # raises and says what is wrong
        return min(plans, key=lambda plan: (plan.tiles, plan.cost_ns, plan.groups, plan.baby))

    @property
    def period(self) -> int:
        """Slots in one group."""
        return self.parameters.slots // self.groups

    @property
    def width(self) -> int:
        """Coordinates of a row that one group holds."""
        return -(-self.dimension // self.groups)

    @property
    def capacity(self) -> int:
        """Pairs of rows in one tile."""
        return _capacity(self.dimension, self.layout, self.groups, self.parameters.slots)

    @property
    def rows_per_tile(self) -> int:
        """Specifications that share one ciphertext."""
        return 2 * self.capacity

    @property
    def tiles(self) -> int:
        """Ciphertexts in an answer."""
        return -(-self.rows // self.rows_per_tile)

    @property
    def giant(self) -> int:
        """Giant steps of one tile, the first of which is free."""
        return -(-self.width // self.baby)

    @property
    def diagonals(self) -> int:
        """Plaintext polynomials in one tile; those from `width` on are zero."""
        return self.baby * self.giant

    @property
    def rotations(self) -> int:
        """Key switches in one evaluation."""
        return self.baby - 1 + self.tiles * (self.giant - 1)

    @property
    def products(self) -> int:
        """Plaintext products in one evaluation."""
        return self.tiles * self.diagonals

    @property
    def cost_ns(self) -> int:
        """Modelled CPU time of one evaluation."""
        return (_ROTATION_NS * self.rotations + _PRODUCT_NS * self.products) * (self.parameters.degree // STD128.degree)

    @property
    def galois_elements(self) -> tuple[int, int]:
        """Automorphisms of a baby and of a giant step; always two, so that queries have one size."""
        return 3, pow(3, self.baby, 2 * self.parameters.degree)

    @property
    def answer_bytes(self) -> int:
        """Length of `EncryptedScores.to_bytes()`."""
        return self.tiles * self.parameters.tile_bytes

    def slot_coordinates(self) -> NDArray[np.int64]:
        """Return for each slot of the query which coordinate it carries, (slots,); `dimension` means none."""
        slot = np.arange(self.parameters.slots)
        group, position = slot // self.period, slot % self.period
        if self.layout is Layout.CYCLIC:
            return (position + group * self.width) % self.dimension
        coordinates: NDArray[np.int64] = np.minimum(group * self.width + position % self.width, self.dimension)
        return coordinates

    def spread(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the slots of a query (dimension,) as (slots,)."""
        return np.append(vector, 0.0)[self.slot_coordinates()]

    def fold(self, slots: NDArray[np.complex128]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the scores (rows,) in the decrypted slots (tiles, slots), and everything beside them, which should be zero."""
        groups = slots.reshape(self.tiles, self.groups, self.period)
        pairs = groups[:, :, : self.capacity].sum(axis=1)
        scores = np.concatenate([pairs.real, pairs.imag], axis=1).reshape(-1)
        gaps = groups[:, :, self.capacity :].reshape(-1)
        return scores[: self.rows], np.concatenate([scores[self.rows :], gaps.real, gaps.imag])


_POSSIBLE_GROUPS: Final = tuple(1 << k for k in range(_MAX_GROUPS.bit_length()))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _capacity(dimension: int, layout: Layout, groups: int, slots: int) -> int:
    """Return the pairs of rows in one tile; below 1 if a group is too short for its coordinates."""
    period, width = slots // groups, -(-dimension // groups)
    return period if layout is Layout.CYCLIC else period - width + 1


def _fits(dimension: int, layout: Layout, groups: int, baby: int, slots: int) -> bool:
    """Return whether every coordinate is met exactly once."""
    if groups not in _POSSIBLE_GROUPS or not 0 < baby <= _MAX_BABY or baby % _STEP:
        return False
    width = -(-dimension // groups)
    if layout is Layout.WINDOW:  # diagonals beyond the width are zero: any baby step will do, but none longer than needed
        return _capacity(dimension, layout, groups, slots) >= 1 and baby < width + _STEP
    return _is_power_of_two(dimension) and dimension % groups == 0 and width % baby == 0


# --- messages --------------------------------------------------------------------------------------------------------


def _checked_words(name: str, words: NDArray[np.uint64], shape: tuple[int, ...], below: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a read-only copy of `words`; raise FormatError unless it has the shape and every word is below its prime."""
    if words.dtype != np.uint64 or words.shape != shape:
        raise FormatError(f"{name}: expected uint64 {shape}, got {words.dtype} {words.shape}")
    if not (words < below).all():
        raise FormatError(f"{name}: expected every word below its prime, got a larger one")
    words = words.copy()
    words.setflags(write=False)
    return words


class OpenedQuery(NamedTuple):
    """An encrypted query with its seeds expanded: what the evaluation works on.  Integers, exact as doubles."""

    ciphertext: NDArray[np.float64]  # (2, degree)
    keys: NDArray[np.float64]  # (2 elements, 2 polynomials, 2 limbs, degree)


@dataclass(frozen=True, slots=True, eq=False)
class EncryptedQuery:
    """What the market receives: a ciphertext and two public switching keys, half of each as a seed.  Valid words, whatever they mean."""

    plan: MatchPlan
    ciphertext: NDArray[np.uint64]  # (degree,), the first polynomial, in NTT order
    keys: NDArray[np.uint64]  # (2 elements, 2 limbs, degree), the first polynomial of each, the elements of plan.galois_elements
    seeds: tuple[bytes, bytes, bytes]  # of the second polynomials: ciphertext, first key, second key

    def __post_init__(self) -> None:
        parameters = self.plan.parameters
        below = np.array([[parameters.data_prime], [parameters.special_prime]], np.uint64)
        object.__setattr__(self, "ciphertext", _checked_words("query", self.ciphertext, (parameters.degree,), below[0]))
        object.__setattr__(self, "keys", _checked_words("query keys", self.keys, (2, 2, parameters.degree), below))
        if [len(seed) for seed in self.seeds] != [SEED_BYTES] * 3:
            raise FormatError(f"query: expected three seeds of {SEED_BYTES} bytes")

    def to_bytes(self) -> bytes:
        """Return parameters.query_bytes bytes, whatever the task and the catalogue.

        Ciphertext, then first and second key: the packed words of a polynomial limb by limb, then its seed.
        """
        from protocol.hazmat.packing import pack

        parts = [pack(self.ciphertext, self.plan.parameters.data_bits), self.seeds[0]]
        for key, seed in zip(self.keys, self.seeds[1:], strict=True):
            parts += [pack(key[0], self.plan.parameters.data_bits), pack(key[1], self.plan.parameters.special_bits), seed]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, plan: MatchPlan) -> EncryptedQuery:
        """Return the query in `data`; raises FormatError for a wrong length or a word that is not below its prime."""
        from protocol.hazmat.packing import packed_bytes, unpack

        parameters = plan.parameters
        if len(data) != parameters.query_bytes:
            raise FormatError(f"query: expected {parameters.query_bytes} bytes, got {len(data)}")
        degree, rest = parameters.degree, memoryview(data)

        def taken(size: int) -> memoryview:
            nonlocal rest
            part, rest = rest[:size], rest[size:]
            return part

        def words(bits: int) -> NDArray[np.uint64]:
            return unpack(taken(packed_bytes(degree, bits)), degree, bits)

        ciphertext, seeds, keys = words(parameters.data_bits), [bytes(taken(SEED_BYTES))], []
        for _ in range(2):
            keys.append([words(parameters.data_bits), words(parameters.special_bits)])
            seeds.append(bytes(taken(SEED_BYTES)))
        return cls(plan, ciphertext, np.array(keys), (seeds[0], seeds[1], seeds[2]))

    def opened(self) -> OpenedQuery:
        """Return the whole query, its second polynomials expanded as SEAL would."""
        from protocol.hazmat.seeds import expand

        parameters = self.plan.parameters
        primes = (parameters.data_prime, parameters.special_prime)
        ciphertext, keys = np.empty((2, parameters.degree)), np.empty((2, 2, 2, parameters.degree))
        ciphertext[0], ciphertext[1] = self.ciphertext, expand(self.seeds[0], primes[:1], parameters.degree)[0]
        for whole, half, seed in zip(keys, self.keys, self.seeds[1:], strict=True):
            whole[0], whole[1] = half, expand(seed, primes, parameters.degree)
        return OpenedQuery(ciphertext, keys)


@dataclass(frozen=True, slots=True, eq=False)
class EncryptedScores:
    """What the market answers: one truncated ciphertext for each tile of its catalogue.  Any bytes of the right length are one."""

    plan: MatchPlan
    data: bytes  # per tile the coefficients of the first and of the second polynomial, without their lowest bits, packed

    def __post_init__(self) -> None:
        if len(self.data) != self.plan.answer_bytes:
            raise FormatError(f"answer: expected {self.plan.answer_bytes} bytes, got {len(self.data)}")

    @classmethod
    def pack(cls, plan: MatchPlan, coefficients: NDArray[np.uint64]) -> EncryptedScores:
        """Return the answer of truncated coefficients (tiles, 2, degree)."""
        from protocol.hazmat.packing import pack

        bits = [plan.parameters.data_bits - drop for drop in plan.parameters.drops]
        return cls(plan, b"".join(pack(tile[k], bits[k]) for tile in coefficients for k in range(2)))

    def to_bytes(self) -> bytes:
        """Return plan.answer_bytes bytes."""
        return self.data

    @classmethod
    def from_bytes(cls, data: bytes, plan: MatchPlan) -> EncryptedScores:
        """Return the answer in `data`; raises FormatError for a wrong length."""
        return cls(plan, bytes(data))

    def coefficients(self) -> NDArray[np.uint64]:
        """Return the ciphertexts' coefficients, (tiles, 2, degree), all below the data prime; their lowest bits are zero."""
        from protocol.hazmat.packing import packed_bytes, unpack

        parameters = self.plan.parameters
        out, at = np.empty((self.plan.tiles, 2, parameters.degree), np.uint64), 0
        for tile in out:
            for k, drop in enumerate(parameters.drops):
                size = packed_bytes(parameters.degree, parameters.data_bits - drop)
                tile[k] = unpack(self.data[at : at + size], parameters.degree, parameters.data_bits - drop) << np.uint64(drop)
                at += size
        return out


# --- the querier's key -----------------------------------------------------------------------------------------------


class QueryKey:
    """The secret of one query.  Make one for every query; it cannot be printed, copied or stored, and opens one answer.

    One key, one query, one answer: a market that saw two queries under one key could link them, and one that watches what a querier does
    with many crafted answers under one key learns the key.
    """

    def __init__(self, plan: MatchPlan) -> None:
        from protocol.hazmat.seal import SealKey

        parameters = plan.parameters
        self._plan = plan
        self._secret: SealKey | None = SealKey(parameters.degree, (parameters.data_prime, parameters.special_prime))
        self._asked: NDArray[np.float64] | None = None

    @classmethod
    def fresh(cls, plan: MatchPlan) -> QueryKey:
        """Return a key drawn from the operating system's randomness."""
        return cls(plan)

    def __repr__(self) -> str:
        return "<QueryKey: secret>"

    def __reduce__(self) -> Any:
        raise TypeError("a query key is neither copied nor pickled")

    def encrypt(self, vector: NDArray[np.float64]) -> EncryptedQuery:
        """Return the encryption of a query (dimension,) of norm at most MAX_QUERY_NORM; the zero vector is one.

        Raises IncompatibleSpecification for another dimension, FeatureNormError for a longer vector or one that is not finite, and
        RuntimeError at the second call.
        """
        if self._asked is not None or self._secret is None:
            raise RuntimeError("this key has encrypted its one query: make a fresh key")
        if vector.shape != (self._plan.dimension,):
            raise IncompatibleSpecification(f"query: expected {self._plan.dimension} coordinates, got shape {vector.shape}")
        norm = float(np.linalg.norm(vector))
        if not norm <= MAX_QUERY_NORM:  # so written, NaN is refused as well
            raise FeatureNormError(f"query: expected a finite vector of norm at most {MAX_QUERY_NORM}")
        self._asked = np.array(vector, np.float64)
        unit = self._asked / norm if norm > 0 else np.zeros_like(self._asked)
        ciphertext, seed = self._secret.encrypt(self._plan.spread(unit), self._plan.parameters.query_scale)
        keys = self._secret.galois_keys(self._plan.galois_elements)
        words = np.stack([words for words, _ in keys])
        return EncryptedQuery(self._plan, ciphertext, words, (seed, keys[0][1], keys[1][1]))

    def decrypt(
        self,
        answer: bytes,
        row_norms: NDArray[np.float64],
        known: Mapping[int, NDArray[np.float64]] | None = None,
    ) -> NDArray[np.float64]:
        """Return the inner products of the query with the catalogue's rows, (rows,), each with an error of about 5e-5 of both norms.

        answer: the market's bytes, complete.  row_norms: (rows,), the public norms of the rows as they were encoded.
        known: rows (dimension,) that the querier holds itself, by number, whose scores must be right.
        Raises FormatError if the answer cannot be honest: a wrong length, a cosine beyond 1, something where no row is, a wrong score of a
        known row.  An answer that passes is not proved honest.
        Whatever happens, the key is burned, and nothing of it may be seen by the market: call this when the exchange is over, and ask no
        differently afterwards.  A market that learns which crafted answer was refused learns about the key; what was decrypted stays with
        the querier for the same reason.
        """
        secret, self._secret = self._secret, None
        plan, asked = self._plan, self._asked
        if secret is None or asked is None:
            raise RuntimeError("this key has opened its one answer, or has encrypted nothing: make a fresh key for a new query")
        if row_norms.shape != (plan.rows,):
            raise IncompatibleSpecification(f"answer: expected {plan.rows} row norms, got shape {row_norms.shape}")
        slots = _decrypted(secret, EncryptedScores.from_bytes(answer, plan))
        cosines, padding = plan.fold(slots)
        query_norm = float(np.linalg.norm(asked))
        possible = np.where(row_norms > 0, 1.0 if query_norm > 0 else 0.0, 0.0) + TOLERANCE
        scores: NDArray[np.float64] = cosines * query_norm * row_norms
        # All checks are made, and say the same: the message does not tell which one an answer failed.
        honest = [
            bool((np.abs(cosines) <= possible).all()),
            bool((np.abs(padding) <= TOLERANCE).all()),
            all(abs(scores[i] - row @ asked) <= TOLERANCE * query_norm * row_norms[i] for i, row in (known or {}).items()),
        ]
        if not all(honest):
            raise FormatError(
                "the market's answer is implausible: a score or an empty slot holds what no honest catalogue can give",
                hint="do not ask this market again; keep its answer as evidence",
            )
        return scores


def _decrypted(secret: Any, scores: EncryptedScores) -> NDArray[np.complex128]:
    """Return the slots of an answer, (tiles, slots)."""
    from protocol.hazmat.ring import field, ntt_rows

    parameters = scores.plan.parameters
    words = scores.coefficients()
    ntt_rows(words.reshape(-1, parameters.degree), field(parameters.degree, parameters.data_prime))
    slots: NDArray[np.complex128] = secret.decrypt(words, parameters.query_scale * parameters.row_scale)
    return slots
