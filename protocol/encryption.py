"""The encrypted query: plan, key, query and answer.  Short is safe here: parameters, fresh keys and packing are chosen for you.

    plan = MatchPlan.build(rows=len(catalogue), dimension=64)       # both sides compute the same plan
    key = QueryKey.fresh(plan)                                      # secret; one query, then forget it
    query = key.encrypt(mean_feature)                               # to the market: query.to_bytes()
    scores = key.decrypt(EncryptedScores.from_bytes(answer, plan), row_norms)   # inner products, one per row

Profile std128: CKKS at degree 4096 with one 50-bit data prime and one 51-bit special prime; log2 of both is 101, at most 109 is
allowed for 128-bit security (Homomorphic Encryption Standard 2018; SEAL enforces it).
What is encrypted is the unit vector of the query, and the market encodes unit rows: a ciphertext carries cosines, whatever the norms
are, and no row, however noisy, can wrap around the modulus or cost another row precision.  Norms return after decryption: the
querier's own is in its key, those of the rows are public.
Source: docs/protocol.md; Halevi and Shoup 2014 for diagonals and baby steps; measurements in shared notes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from protocol.errors import FeatureNormError, FormatError, IncompatibleSpecification

# --- profile std128 --------------------------------------------------------------------------------------------------

PROFILE: Final = "std128"
DEGREE: Final = 4096
SLOTS: Final = DEGREE // 2  # complex numbers in one ciphertext
DATA_PRIME: Final = 1_125_899_906_826_241  # 50 bits
SPECIAL_PRIME: Final = 2_251_799_813_554_177  # 51 bits
QUERY_SCALE: Final = 2.0**29
ROW_SCALE: Final = 2.0**19
TOLERANCE: Final = 2.0**-7
"""How far a decrypted cosine may lie outside what is possible.

The noise has heavy tails, since a slot in which the secret key is large is noisy for every row.  Over 200 keys and 128 baby steps no
key had an rms above 1.5e-4 and no score an error above 2.7e-3; over 400 keys and 4 baby steps, 5.1e-5 and 1.9e-4.
"""

MAX_QUERY_NORM: Final = 2.0
MAX_ROWS: Final = 1 << 24
MAX_DIMENSION: Final = 1024
QUERY_BYTES: Final = 8 * (2 + 2 * 2 * 2) * DEGREE  # ciphertext, then two keys of two polynomials of two limbs
TILE_BYTES: Final = 8 * 2 * DEGREE

# Cost model, in nanoseconds of one AVX-512 core.  Both sides choose the plan from these numbers: changing one changes the protocol.
_ROTATION_NS: Final = 180_000
_PRODUCT_NS: Final = 7_000
_MAX_BABY: Final = 128  # noise grows with the number of rotations in a row: rms 6e-5 in the median key at 128
_MAX_GROUPS: Final = 512
_UNROLL: Final = 4

# Cosines are at most 1, and two of them share a slot as real and imaginary part: no coefficient passes half the modulus.
assert QUERY_SCALE * ROW_SCALE * math.sqrt(2) * (1 + TOLERANCE) < DATA_PRIME / 2


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

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= MAX_ROWS or not 1 <= self.dimension <= MAX_DIMENSION:
            raise FormatError(
                f"match plan: expected 1 to {MAX_ROWS} rows of 1 to {MAX_DIMENSION} coordinates, got {self.rows} of {self.dimension}"
            )
        if not _fits(self.dimension, self.layout, self.groups, self.baby):
            raise FormatError(
                f"match plan: {self.dimension} coordinates do not fit a {self.layout.value} layout "
                f"with {self.groups} groups and {self.baby} baby steps"
            )

    @classmethod
    def build(cls, rows: int, dimension: int) -> MatchPlan:
        """Return the plan with the fewest tiles, and among those the cheapest for the market.  Deterministic.

        Raises FormatError if there is no plan for so many rows or coordinates.
        """
        layout = Layout.CYCLIC if _is_power_of_two(dimension) and dimension >= _UNROLL else Layout.WINDOW
        plans = [
            cls(rows, dimension, layout, groups, baby)
            for groups in _POSSIBLE_GROUPS
            for baby in range(_UNROLL, _MAX_BABY + 1, _UNROLL)
            if _fits(dimension, layout, groups, baby)
        ]
        if not plans:
            return cls(rows, dimension, layout, groups=1, baby=_UNROLL)  # raises and says what is wrong
        return min(plans, key=lambda plan: (plan.tiles, plan.cost_ns, plan.groups, plan.baby))

    @property
    def period(self) -> int:
        """Slots in one group."""
        return SLOTS // self.groups

    @property
    def width(self) -> int:
        """Coordinates of a row that one group holds."""
        return -(-self.dimension // self.groups)

    @property
    def capacity(self) -> int:
        """Pairs of rows in one tile."""
        return _capacity(self.dimension, self.layout, self.groups)

    @property
    def rows_per_tile(self) -> int:
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
        return _ROTATION_NS * self.rotations + _PRODUCT_NS * self.products

    @property
    def galois_elements(self) -> tuple[int, int]:
        """Automorphisms of a baby and of a giant step; always two, so that queries have one size."""
        return 3, pow(3, self.baby, 2 * DEGREE)

    @property
    def answer_bytes(self) -> int:
        """Length of `EncryptedScores.to_bytes()`."""
        return self.tiles * TILE_BYTES

    def slot_coordinates(self) -> NDArray[np.int64]:
        """Return for each slot of the query which coordinate it carries, (SLOTS,); `dimension` means none."""
        slot = np.arange(SLOTS)
        group, position = slot // self.period, slot % self.period
        if self.layout is Layout.CYCLIC:
            return (position + group * self.width) % self.dimension
        coordinates: NDArray[np.int64] = np.minimum(group * self.width + position % self.width, self.dimension)
        return coordinates

    def spread(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the slots of a query (dimension,) as (SLOTS,)."""
        return np.append(vector, 0.0)[self.slot_coordinates()]

    def fold(self, slots: NDArray[np.complex128]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the scores (rows,) in the decrypted slots (tiles, SLOTS), and everything beside them, which should be zero."""
        groups = slots.reshape(self.tiles, self.groups, self.period)
        pairs = groups[:, :, : self.capacity].sum(axis=1)
        scores = np.concatenate([pairs.real, pairs.imag], axis=1).reshape(-1)
        gaps = groups[:, :, self.capacity :].reshape(-1)
        return scores[: self.rows], np.concatenate([scores[self.rows :], gaps.real, gaps.imag])


_POSSIBLE_GROUPS: Final = tuple(1 << k for k in range(10))


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _capacity(dimension: int, layout: Layout, groups: int) -> int:
    """Return the pairs of rows in one tile; below 1 if a group is too short for its coordinates."""
    period, width = SLOTS // groups, -(-dimension // groups)
    return period if layout is Layout.CYCLIC else period - width + 1


def _fits(dimension: int, layout: Layout, groups: int, baby: int) -> bool:
    """Return whether every coordinate is met exactly once, in steps that the kernels can take."""
    if groups not in _POSSIBLE_GROUPS or not 0 < baby <= _MAX_BABY or baby % _UNROLL:
        return False
    width = -(-dimension // groups)
    if layout is Layout.WINDOW:  # diagonals beyond the width are zero: any baby step will do, but none longer than needed
        return _capacity(dimension, layout, groups) >= 1 and baby < width + _UNROLL
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


def _parsed_words(name: str, data: bytes, size_bytes: int) -> NDArray[np.uint64]:
    if len(data) != size_bytes:
        raise FormatError(f"{name}: expected {size_bytes} bytes, got {len(data)}")
    return np.frombuffer(data, "<u8").astype(np.uint64)


_BELOW_DATA: Final = np.array(DATA_PRIME, np.uint64)
_BELOW_LIMBS: Final = np.array([[DATA_PRIME], [SPECIAL_PRIME]], np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class EncryptedQuery:
    """What the market receives: a ciphertext and two public switching keys.  Valid words, whatever they mean."""

    plan: MatchPlan
    ciphertext: NDArray[np.uint64]  # (2, DEGREE)
    keys: NDArray[np.uint64]  # (2 elements, 2 polynomials, 2 limbs, DEGREE), the elements of plan.galois_elements

    def __post_init__(self) -> None:
        ciphertext = _checked_words("query", self.ciphertext, (2, DEGREE), _BELOW_DATA)
        object.__setattr__(self, "ciphertext", ciphertext)
        object.__setattr__(self, "keys", _checked_words("query keys", self.keys, (2, 2, 2, DEGREE), _BELOW_LIMBS))

    def to_bytes(self) -> bytes:
        """Return QUERY_BYTES bytes, whatever the task, the plan and the catalogue: little-endian words, ciphertext before keys."""
        return self.ciphertext.astype("<u8").tobytes() + self.keys.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, plan: MatchPlan) -> EncryptedQuery:
        """Return the query in `data`; raises FormatError for a wrong length or a word that is not below its prime."""
        words = _parsed_words("query", data, QUERY_BYTES)
        return cls(plan, words[: 2 * DEGREE].reshape(2, DEGREE), words[2 * DEGREE :].reshape(2, 2, 2, DEGREE))


@dataclass(frozen=True, slots=True, eq=False)
class EncryptedScores:
    """What the market answers: one ciphertext for each tile of its catalogue."""

    plan: MatchPlan
    tiles: NDArray[np.uint64]  # (plan.tiles, 2, DEGREE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tiles", _checked_words("answer", self.tiles, (self.plan.tiles, 2, DEGREE), _BELOW_DATA))

    def to_bytes(self) -> bytes:
        """Return plan.answer_bytes bytes: little-endian words."""
        return self.tiles.astype("<u8").tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, plan: MatchPlan) -> EncryptedScores:
        """Return the answer in `data`; raises FormatError for a wrong length or a word that is not below its prime."""
        return cls(plan, _parsed_words("answer", data, plan.answer_bytes).reshape(plan.tiles, 2, DEGREE))


# --- the querier's key -----------------------------------------------------------------------------------------------


class QueryKey:
    """The secret of one query.  Make one for every query and forget it with the answer; it cannot be printed, copied or stored.

    One key, one query: a market that saw two under one key could link them, and one that watches what a querier does with many
    crafted answers under one key learns the key.
    """

    def __init__(self, plan: MatchPlan) -> None:
        from protocol.hazmat.seal import SealKey

        self._plan = plan
        self._secret = SealKey(DEGREE, (DATA_PRIME, SPECIAL_PRIME))
        self._query_norm: float | None = None

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
        if self._query_norm is not None:
            raise RuntimeError("this key has encrypted its one query: make a fresh key")
        if vector.shape != (self._plan.dimension,):
            raise IncompatibleSpecification(f"query: expected {self._plan.dimension} coordinates, got shape {vector.shape}")
        norm = float(np.linalg.norm(vector))
        if not norm <= MAX_QUERY_NORM:  # so written, NaN is refused as well
            raise FeatureNormError(f"query: expected a finite vector of norm at most {MAX_QUERY_NORM}")
        self._query_norm = norm
        unit = vector / norm if norm > 0 else np.zeros_like(vector)
        return EncryptedQuery(
            plan=self._plan,
            ciphertext=self._secret.encrypt(self._plan.spread(unit), QUERY_SCALE),
            keys=self._secret.galois_keys(self._plan.galois_elements),
        )

    def decrypt(self, scores: EncryptedScores, row_norms: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the inner products of the query with the catalogue's rows, (rows,), each with an error of about 5e-5 of both norms.

        row_norms: (rows,), the public norms of the rows as they were encoded.
        Raises FormatError if the answer cannot be honest: a cosine beyond 1, or something where no row is.  This is no proof of
        honesty.  What is decrypted stays with the querier: sent back to the market, its noise would tell about the key.
        """
        plan, query_norm = self._plan, self._query_norm
        if query_norm is None:
            raise RuntimeError("this key has encrypted nothing yet")
        if scores.plan != plan or row_norms.shape != (plan.rows,):
            raise IncompatibleSpecification(
                f"answer: expected {plan.rows} rows of {plan.dimension} coordinates, as asked, "
                f"got {scores.plan.rows} of {scores.plan.dimension} and {row_norms.size} norms"
            )
        cosines, padding = plan.fold(self._secret.decrypt(scores.tiles, QUERY_SCALE * ROW_SCALE))
        possible = np.where(row_norms > 0, 1.0 if query_norm > 0 else 0.0, 0.0) + TOLERANCE
        if not (np.abs(cosines) <= possible).all() or not (np.abs(padding) <= TOLERANCE).all():
            raise FormatError("the market's answer is implausible: a score or an empty slot holds what no catalogue can give")
        return cosines * query_norm * row_norms
