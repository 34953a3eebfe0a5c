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
    return [EncryptedScores.pack(plan, coefficients) for coefficients in inner_products(index, opened, threads)]


def inner_products(index: EncodedIndex, queries: Sequence[OpenedQuery], threads: int = 1) -> NDArray[np.uint64]:
    """Return the truncated coefficients of all answers, (queries, tiles, 2, degree); the queries were made for this index."""
    plan, steps = index.plan, _baby_steps(index.plan, queries, threads)
    answers = np.empty((len(queries), plan.tiles, 2, plan.parameters.degree), np.uint64)
    shares = np.array_split(np.arange(plan.tiles), min(threads, plan.tiles))
    if len(shares) == 1:
        _answer_tiles(index, queries, steps, shares[0], answers)
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(lambda share: _answer_tiles(index, queries, steps, share, answers), shares))
    return answers


def _baby_steps(plan: MatchPlan, queries: Sequence[OpenedQuery], threads: int) -> NDArray[np.uint64]:
    """Return all rotations of all queries, (queries, degree / BLOCK, baby, 2, BLOCK)."""
    from protocol.hazmat.ring import BLOCK, automorphism, baby_steps

    degree, ring = plan.parameters.degree, _switch_ring(plan)
    by_one = automorphism(degree, plan.galois_elements[0])
    steps = np.empty((len(queries), degree // BLOCK, plan.baby, 2, BLOCK), np.uint64)

    def rotate(q: int) -> None:
        baby_steps(queries[q].ciphertext, by_one, queries[q].keys[0], ring, steps[q])

    if threads == 1 or len(queries) == 1:
        for q in range(len(queries)):
            rotate(q)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(rotate, range(len(queries))))
    return steps


def _answer_tiles(
    index: EncodedIndex, queries: Sequence[OpenedQuery], steps: NDArray[np.uint64], tiles: NDArray[np.int64], answers: NDArray[np.uint64]
) -> None:
    """Write the answers for the given tiles, which follow one another."""
    from protocol.hazmat.ring import automorphism, finish_tiles, multiply_accumulate

    plan, ring = index.plan, _switch_ring(index.plan)
    parameters = plan.parameters
    by_baby = automorphism(parameters.degree, plan.galois_elements[1])
    at_once = max(1, min(_TILES_AT_ONCE, len(tiles), _PARTS_BYTES // (16 * parameters.degree * plan.giant * len(queries))))
    parts = np.empty((at_once, len(queries), plan.giant, 2, parameters.degree))
    blocks = steps.shape[1]
    for start in range(0, len(tiles), at_once):
        group = tiles[start : start + at_once]
        passes = _PASSES if len(group) > 1 else 1
        for i in range(passes):
            for part, tile in zip(parts, group, strict=False):
                first, last = blocks * i // passes, blocks * (i + 1) // passes
                multiply_accumulate(steps, index.tiles[tile].diagonals, ring.data, first, last, part)
        for q, query in enumerate(queries):
            for part, tile in zip(parts, group, strict=False):
                out = answers[q, tile : tile + 1]
                finish_tiles(part[q : q + 1], by_baby, query.keys[1], ring, parameters.drops, parameters.data_bits, out)


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
