"""The market's side of a query: encode the catalogue once, then answer ciphertexts without reading them.

Everything here is public and deterministic: the same query and the same rows give the same bytes, so that anybody can check an
answer.  No control flow depends on a ciphertext.  This module never imports tenseal; `numba` is imported at the first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.encryption import EncryptedQuery, EncryptedScores, MatchPlan, OpenedQuery
from protocol.errors import FormatError, IncompatibleSpecification

if TYPE_CHECKING:
    from protocol.hazmat.ring import SwitchRing

# Speed only: no result depends on these.
_TILES_AT_ONCE = 8  # share one pass over a part of the baby steps, which then stays in the second-level cache
_PARTS_BYTES = 1 << 23
_PASSES = 8


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTile:
    """Up to 2 * capacity rows as plaintext polynomials; never changed once made, so that indices may share it."""

    digest: bytes  # SHA-256 of the layout and of the rows
    diagonals: NDArray[np.uint64]  # (degree / BLOCK, giant, baby, BLOCK), NTT order, read-only


@dataclass(frozen=True, slots=True, eq=False)
class EncodedIndex:
    """A catalogue ready for `evaluate`: 8 bytes for each coordinate of a full tile."""

    plan: MatchPlan
    tiles: tuple[EncodedTile, ...]

    @classmethod
    def build(cls, rows: NDArray[np.float64], plan: MatchPlan, reuse: EncodedIndex | None = None) -> EncodedIndex:
        """Return the index of `rows` (plan.rows, plan.dimension), of any finite norms: their directions are encoded.

        reuse: an index of mostly the same rows.  Tiles whose rows and layout are unchanged are shared and not encoded again: a row
        that is appended costs its own tile, as long as `plan` keeps its layout.
        Raises IncompatibleSpecification for another shape, FormatError for a coordinate that is not finite.
        """
        if rows.shape != (plan.rows, plan.dimension):
            raise IncompatibleSpecification(f"index: expected rows of shape {(plan.rows, plan.dimension)}, got {rows.shape}")
        if not np.isfinite(rows).all():
            raise FormatError("index: expected finite coordinates, got a row with one that is not")
        known = {tile.digest: tile for tile in reuse.tiles} if reuse is not None else {}
        encode = _tile_encoder(plan)
        tiles = []
        for start in range(0, plan.rows, plan.rows_per_tile):
            block = np.ascontiguousarray(rows[start : start + plan.rows_per_tile], np.float64)
            digest = _tile_digest(plan, block)
            tiles.append(known[digest] if digest in known else EncodedTile(digest, encode(block)))
        return cls(plan, tuple(tiles))


def evaluate(index: EncodedIndex, query: EncryptedQuery, threads: int = 1) -> EncryptedScores:
    """Return the encrypted cosines of the query with every row; see `evaluate_many`."""
    return evaluate_many(index, [query], threads)[0]


def evaluate_many(index: EncodedIndex, queries: Sequence[EncryptedQuery], threads: int = 1) -> list[EncryptedScores]:
    """Return the encrypted cosines of each query with every row.  Deterministic, thread-safe, free of the GIL in its kernels.

    All queries share one read of the tiles from memory, which is most of the time in a large catalogue.  Each takes 64 kB of memory for a
    baby step at degree 4096.
    Raises IncompatibleSpecification if a query was made for another plan: for a catalogue of another size, say.
    """
    plan = index.plan
    for query in queries:
        if query.plan != plan:
            raise IncompatibleSpecification(
                f"query: expected one for {plan.rows} rows of {plan.dimension} coordinates under {plan.parameters.name}, got one for "
                f"{query.plan.rows} of {query.plan.dimension} under {query.plan.parameters.name}: synchronise the catalogue and ask again"
            )
    opened = [query.opened() for query in queries]
    if not opened:
        return []
    steps, giant_keys = baby_steps(plan, opened, threads), [query.keys[1] for query in opened]
    answers = np.empty((len(opened), plan.tiles, plan.parameters.tile_bytes), np.uint8)
    shares = [range(int(share[0]), int(share[-1]) + 1) for share in np.array_split(np.arange(plan.tiles), min(threads, plan.tiles))]

    def answer(share: range) -> None:
        tiles = [tile.diagonals for tile in index.tiles[share.start : share.stop]]
        answer_tiles(plan, tiles, steps, giant_keys, answers[:, share.start : share.stop])

    if len(shares) == 1:
        answer(shares[0])
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(answer, shares))
    return [EncryptedScores(plan, answer.tobytes()) for answer in answers]


def steps_shape(plan: MatchPlan, queries: int) -> tuple[int, ...]:
    """Return the shape of the baby steps of so many queries."""
    from protocol.hazmat.ring import BLOCK

    return queries, plan.parameters.degree // BLOCK, plan.baby, 2, BLOCK


def baby_steps(
    plan: MatchPlan, queries: Sequence[OpenedQuery], threads: int = 1, out: NDArray[np.uint64] | None = None
) -> NDArray[np.uint64]:
    """Return all rotations of all queries, of `steps_shape`, written to `out` if it is given: whatever answers a tile needs them."""
    from protocol.hazmat import ring

    by_one, switch = ring.automorphism(plan.parameters.degree, plan.galois_elements[0]), _switch_ring(plan)
    steps = np.empty(steps_shape(plan, len(queries)), np.uint64) if out is None else out

    def rotate(q: int) -> None:
        ring.baby_steps(queries[q].ciphertext, by_one, queries[q].keys[0], switch, steps[q])

    if threads == 1 or len(queries) == 1:
        for q in range(len(queries)):
            rotate(q)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rotate, range(len(queries))))
    return steps


def answer_tiles(
    plan: MatchPlan,
    tiles: Sequence[NDArray[np.uint64]],
    steps: NDArray[np.uint64],
    giant_keys: Sequence[NDArray[np.float64]] | NDArray[np.float64],
    answers: NDArray[np.uint8],
) -> None:
    """Write the answers of any tiles of a plan to `answers`, (queries, tiles, plan.parameters.tile_bytes): as in `EncryptedScores`.

    tiles: their diagonals.  steps: from `baby_steps`.  giant_keys: the second key of each query, (2 polynomials, 2 limbs, degree).
    """
    from protocol.hazmat.packing import pack
    from protocol.hazmat.ring import automorphism, finish_tiles, multiply_accumulate

    parameters, ring = plan.parameters, _switch_ring(plan)
    by_baby = automorphism(parameters.degree, plan.galois_elements[1])
    queries, blocks = steps.shape[:2]
    at_once = max(1, min(_TILES_AT_ONCE, len(tiles), _PARTS_BYTES // (16 * parameters.degree * plan.giant * queries)))
    parts = np.empty((at_once, queries, plan.giant, 2, parameters.degree))
    coefficients = np.empty((1, 2, parameters.degree), np.uint64)
    bits = [parameters.data_bits - drop for drop in parameters.drops]
    for start in range(0, len(tiles), at_once):
        group = tiles[start : start + at_once]
        passes = _PASSES if len(group) > 1 else 1
        for i in range(passes):
            for part, diagonals in zip(parts, group, strict=False):
                multiply_accumulate(steps, diagonals, ring.data, blocks * i // passes, blocks * (i + 1) // passes, part)
        for q in range(queries):
            for at, part in enumerate(parts[: len(group)], start):
                finish_tiles(part[q : q + 1], by_baby, giant_keys[q], ring, parameters.drops, parameters.data_bits, coefficients)
                packed = b"".join(pack(polynomial, width) for polynomial, width in zip(coefficients[0], bits, strict=True))
                answers[q, at] = np.frombuffer(packed, np.uint8)


def _switch_ring(plan: MatchPlan) -> SwitchRing:
    from protocol.hazmat.ring import switch_ring

    return switch_ring(plan.parameters.degree, plan.parameters.data_prime, plan.parameters.special_prime)


# --- encoding --------------------------------------------------------------------------------------------------------


def _tile_digest(plan: MatchPlan, rows: NDArray[np.float64]) -> bytes:
    """Return what a tile's polynomials depend on, hashed: layout and rows, but not the number of other rows."""
    layout = f"{plan.parameters.name} {plan.layout.value} {plan.dimension} {plan.groups} {plan.baby} {len(rows)}\0"
    return hashlib.sha256(layout.encode() + rows.astype("<f8").tobytes()).digest()


def _tile_encoder(plan: MatchPlan) -> Callable[[NDArray[np.float64]], NDArray[np.uint64]]:
    """Return the function from at most plan.rows_per_tile rows to their diagonals."""
    from protocol.hazmat.embedding import embedding, encode_diagonals, unit_rows
    from protocol.hazmat.ring import BLOCK

    parameters = plan.parameters
    coordinates, position = plan.slot_coordinates(), np.arange(parameters.slots) % plan.period
    # Slots that hold no row read the pair after the last one, which is zero; so do coordinates beyond the dimension.
    pair = np.where(position < plan.capacity, position, plan.capacity)
    tables, field = embedding(parameters.degree), _switch_ring(plan).data

    def encode(rows: NDArray[np.float64]) -> NDArray[np.uint64]:
        first, second = np.zeros((2, plan.capacity + 1, plan.dimension + 1))
        unit_rows(rows[: plan.capacity], first)
        unit_rows(rows[plan.capacity :], second)
        diagonals = np.empty((parameters.degree // BLOCK, plan.giant, plan.baby, BLOCK), np.uint64)
        encode_diagonals(first, second, pair, coordinates, plan.width, parameters.row_scale, tables, field, diagonals)
        diagonals.setflags(write=False)
        return diagonals

    return encode
