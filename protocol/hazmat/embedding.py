"""Rows of numbers as plaintext polynomials: the same bits on every machine, since an answer is checked by computing it again.

Only additions, multiplications, divisions and square roots of doubles are used, each rounded by IEEE 754, in one fixed order; numba
reorders and contracts nothing without being told to.  Roots of unity come from integers, not from a library's sine.
tests/vectors/encoded_tile.json pins the result.  Importing this module imports numba (about a second).
Source: Cheon, Kim, Kim, Song 2017 for the embedding; docs/decisions/0005-reproducible-tiles.md.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.hazmat.lanes import compiled, wide
from protocol.hazmat.ring import BLOCK, Field, bit_reversal, ntt

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]

_FRACTION_BITS = 200
_GUARD_BITS = 40  # the powers of a root lose 13; without the guard cos(pi / 2) would be 1e-55


class Embedding(NamedTuple):
    """Where slots sit among the roots of unity.

    Half of the roots suffice, those with zeta**(n / 2) = i: there a real polynomial low + high x**(n / 2) is low + i high, and the
    other roots are their conjugates.
    """

    inverse_roots: Doubles  # (2, n): real and imaginary part of zeta**-bit_reversed(i)
    position: Indices  # (n / 2,): of slot j among the n / 2 roots, in bit-reversed order
    sign: Doubles  # (n / 2,): -1 where the root of the slot is the conjugate of the one at its position


@compiled
def unit_rows(rows: Doubles, out: Doubles) -> None:
    """Write the directions of rows (k, d) to the beginning of out (at least k, at least d); a row of zeros stays one."""
    for i in range(rows.shape[0]):
        largest = 0.0
        for j in range(rows.shape[1]):
            largest = max(largest, abs(rows[i, j]))
        if largest == 0.0:
            continue
        square = 0.0
        for j in range(rows.shape[1]):
            out[i, j] = rows[i, j] / largest  # first, so that the squares of huge and of tiny rows stay in range
            square += out[i, j] * out[i, j]
        norm = np.sqrt(square)
        for j in range(rows.shape[1]):
            out[i, j] /= norm


@compiled
def _butterflies(low_real: Doubles, low_imag: Doubles, high_real: Doubles, high_imag: Doubles, root_real: float, root_imag: float) -> None:
    wide()
    for j in range(low_real.shape[0]):
        real, imag = low_real[j] - high_real[j], low_imag[j] - high_imag[j]
        low_real[j], low_imag[j] = low_real[j] + high_real[j], low_imag[j] + high_imag[j]
        high_real[j], high_imag[j] = real * root_real - imag * root_imag, real * root_imag + imag * root_real


@compiled
def _interpolate(real: Doubles, imag: Doubles, inverse_roots: Doubles) -> None:
    """Replace n / 2 values at the roots by n / 2 times the coefficients, low in `real` and high in `imag`."""
    half = real.shape[0]
    run = 1
    while run < half:
        blocks = half // (2 * run)
        for i in range(blocks):
            root, a, b, c = 2 * blocks + i, 2 * i * run, (2 * i + 1) * run, (2 * i + 2) * run
            _butterflies(real[a:b], imag[a:b], real[b:c], imag[b:c], inverse_roots[0, root], inverse_roots[1, root])
        run *= 2


@compiled
def _round(coefficients: Doubles, scale: float, prime: np.int64, out: NDArray[np.uint64]) -> None:
    wide()
    for j in range(out.shape[0]):
        nearest = np.int64(np.rint(coefficients[j] * scale))
        out[j] = np.uint64(nearest + prime if nearest < 0 else nearest)


@compiled
def encode_diagonals(
    first: Doubles, second: Doubles, pair: Indices, coordinate: Indices, width: int, scale: float, embedding: Embedding, field: Field,
    out: NDArray[np.uint64],
) -> None:  # fmt: skip
    """Write the plaintext polynomials of a tile to out (n / BLOCK, giant, baby, BLOCK), zero from diagonal `width` on.

    first, second: rows that share slots as real and imaginary part, (pairs, dimension + 1); the last pair and coordinate are zero.
    pair, coordinate: (slots,), what slot s of the query belongs to; scale: of a plaintext, a power of two.
    Diagonal k = g baby + b has in slot s + g baby the coordinate of slot s + k, since its product is rotated by g baby afterwards.
    """
    slots, giant, baby = pair.shape[0], out.shape[1], out.shape[2]
    real, imag, words = np.empty(slots), np.empty(slots), np.empty(2 * slots, np.uint64)
    for k in range(giant * baby):
        g, b = k // baby, k % baby
        if k >= width:
            for j in range(2 * slots):
                out[j // BLOCK, g, b, j % BLOCK] = np.uint64(0)
            continue
        for slot in range(slots):
            s = (slot - g * baby) % slots
            row, column, at = pair[s], coordinate[(s + k) % slots], embedding.position[slot]
            real[at], imag[at] = first[row, column], second[row, column] * embedding.sign[slot]
        _interpolate(real, imag, embedding.inverse_roots)
        _round(real, scale / slots, np.int64(field.prime), words[:slots])
        _round(imag, scale / slots, np.int64(field.prime), words[slots:])
        ntt(words, field)
        for j in range(2 * slots):
            out[j // BLOCK, g, b, j % BLOCK] = words[j]


def _inverse_roots(degree: int) -> Doubles:
    """Return exp(-i pi k / degree) for k below `degree`, each part rounded once: (2, degree)."""
    one = 1 << _FRACTION_BITS
    cosine, sine = -one, 0
    for _ in range(degree.bit_length() - 1):  # halve the angle, from pi on
        cosine, sine = math.isqrt((one + cosine) * one // 2), math.isqrt((one - cosine) * one // 2)
    powers = [(one, 0)]
    for _ in range(degree - 1):
        real, imag = powers[-1]
        powers.append(((real * cosine - imag * sine) >> _FRACTION_BITS, (real * sine + imag * cosine) >> _FRACTION_BITS))
    half, shorter = 1 << (_GUARD_BITS - 1), 1 << (_FRACTION_BITS - _GUARD_BITS)
    exact = [((real + half) >> _GUARD_BITS, -((imag + half) >> _GUARD_BITS)) for real, imag in powers]
    return np.array([[real / shorter for real, _ in exact], [imag / shorter for _, imag in exact]])


@cache
def embedding(degree: int) -> Embedding:
    """Return the tables of a ring; slot j is the value at zeta**(3**j), zeta = exp(i pi / degree), as in SEAL's Galois elements."""
    slots = degree // 2
    order = bit_reversal(degree)  # an involution; its first half are the even exponents below degree
    exponent = np.array([pow(3, j, 2 * degree) for j in range(slots)])
    conjugate = exponent % 4 == 3
    near = np.where(conjugate, 2 * degree - exponent, exponent)
    tables = Embedding(_inverse_roots(degree)[:, order].copy(), order[(near - 1) // 2], np.where(conjugate, -1.0, 1.0))
    for table in tables:
        table.setflags(write=False)
    return tables
