"""The market's side of a query: encode the catalogue once, then answer ciphertexts without reading them.

Everything here is public and deterministic: the same query and the same rows give the same bytes, so that anybody can check an
answer.  No control flow depends on a ciphertext.  This module never imports tenseal; `numba` is imported at the first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.encryption import DATA_PRIME, DEGREE, PROFILE, ROW_SCALE, SLOTS, SPECIAL_PRIME, EncryptedQuery, EncryptedScores, MatchPlan
from protocol.errors import FormatError, IncompatibleSpecification

if TYPE_CHECKING:
    from protocol.hazmat.ring import SwitchRing


@dataclass(frozen=True, slots=True, eq=False)
class EncodedTile:
    """Up to 2 * capacity rows as plaintext polynomials; never changed once made, so that indices may share it."""

    digest: bytes  # SHA-256 of the layout and of the rows
    diagonals: NDArray[np.uint64]  # (DEGREE / BLOCK, giant, baby, BLOCK), NTT order, read-only


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


def evaluate(index: EncodedIndex, query: EncryptedQuery) -> EncryptedScores:
    """Return the encrypted cosines of the query with every row.  Deterministic, thread-safe, free of the GIL in its kernels.

    Raises IncompatibleSpecification if the query was made for another plan: for a catalogue of another size, say.
    """
    from protocol.hazmat.ring import automorphism, baby_steps, giant_steps, multiply_accumulate

    plan = index.plan
    if query.plan != plan:
        raise IncompatibleSpecification(
            f"query: expected one for {plan.rows} rows of {plan.dimension} coordinates, "
            f"got one for {query.plan.rows} of {query.plan.dimension}: synchronise the catalogue and ask again"
        )
    ring = _switch_ring()
    by_one, by_baby = (automorphism(DEGREE, element) for element in plan.galois_elements)
    steps = baby_steps(query.ciphertext, by_one, query.keys[0], ring, plan.baby)
    answer = np.empty((plan.tiles, 2, DEGREE), np.uint64)
    for out, tile in zip(answer, index.tiles, strict=True):
        parts = multiply_accumulate(steps, tile.diagonals, ring.data)
        out[:] = giant_steps(parts, by_baby, query.keys[1], ring)
    return EncryptedScores(plan, answer)


def _switch_ring() -> SwitchRing:
    from protocol.hazmat.ring import switch_ring

    return switch_ring(DEGREE, DATA_PRIME, SPECIAL_PRIME)


# --- encoding --------------------------------------------------------------------------------------------------------


def _tile_digest(plan: MatchPlan, rows: NDArray[np.float64]) -> bytes:
    """Return what a tile's polynomials depend on, hashed: layout and rows, but not the number of other rows."""
    layout = f"{PROFILE} {plan.layout.value} {plan.dimension} {plan.groups} {plan.baby} {len(rows)}\0"
    return hashlib.sha256(layout.encode() + rows.astype("<f8").tobytes()).digest()


def _tile_encoder(plan: MatchPlan) -> Callable[[NDArray[np.float64]], NDArray[np.uint64]]:
    """Return the function from at most plan.rows_per_tile rows to their diagonals."""
    from protocol.hazmat.ring import BLOCK

    coordinates, slot = plan.slot_coordinates(), np.arange(SLOTS)
    position = slot % plan.period
    # Slots that hold no row read the pair after the last one, which is zero; so do coordinates beyond the dimension.
    pair = np.where(position < plan.capacity, position, plan.capacity)

    def encode(rows: NDArray[np.float64]) -> NDArray[np.uint64]:
        pairs = _unit_pairs(rows, plan)
        diagonals = np.zeros((DEGREE // BLOCK, plan.giant, plan.baby, BLOCK), np.uint64)
        for g in range(plan.giant):
            # The giant step rotates by g * baby after the product: the plaintext is turned the other way beforehand.
            shifts = range(g * plan.baby, min((g + 1) * plan.baby, plan.width))
            slots = [np.roll(pairs[pair, np.roll(coordinates, -k)], g * plan.baby) for k in shifts]
            words = _encode_slots(np.stack(slots)).reshape(len(slots), DEGREE // BLOCK, BLOCK)
            diagonals[:, g, : len(slots)] = words.transpose(1, 0, 2)
        diagonals.setflags(write=False)
        return diagonals

    return encode


def _unit_pairs(rows: NDArray[np.float64], plan: MatchPlan) -> NDArray[np.complex128]:
    """Return the directions of two rows as one complex row, (capacity + 1, dimension + 1); what is beyond the rows is zero."""
    # Dividing by the largest coordinate first keeps the squares of huge and of tiny rows in range.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    units = np.divide(scaled, norms, out=np.zeros_like(rows), where=norms > 0)
    padded = np.zeros((2 * plan.capacity, plan.dimension))
    padded[: len(rows)] = units
    pairs = np.zeros((plan.capacity + 1, plan.dimension + 1), np.complex128)
    pairs[:-1, :-1] = padded[: plan.capacity] + 1j * padded[plan.capacity :]
    return pairs


def _encode_slots(slots: NDArray[np.complex128]) -> NDArray[np.uint64]:
    """Return the plaintext polynomials, (k, DEGREE) in NTT order, whose slots are `slots` (k, SLOTS) at ROW_SCALE.

    Slot j is the value at zeta^(3^j), zeta = exp(i pi / DEGREE); its conjugate is the value at the conjugate root, so that the
    coefficients are real.  One Fourier transform interpolates: coefficient t is the mean of value(zeta^e) zeta^(-e t) over odd e.
    """
    from protocol.hazmat.ring import ntt_rows

    root = np.array([(pow(3, j, 2 * DEGREE) - 1) // 2 for j in range(SLOTS)])
    values = np.empty((len(slots), DEGREE), np.complex128)
    values[:, root], values[:, DEGREE - 1 - root] = slots, slots.conj()
    untwist = np.exp(-1j * np.pi * np.arange(DEGREE) / DEGREE) * (ROW_SCALE / DEGREE)
    coefficients = np.rint((np.fft.fft(values, axis=1) * untwist).real).astype(np.int64)
    words: NDArray[np.uint64] = np.where(coefficients < 0, coefficients + DATA_PRIME, coefficients).astype(np.uint64)
    ntt_rows(words, _switch_ring().data)
    return words
