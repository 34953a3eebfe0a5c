"""Arithmetic of Z_p[x]/(x^n + 1) on raw uint64 arrays: all that a market does to ciphertexts it cannot read.

Polynomials are in SEAL's NTT order (bit-reversed powers of the smallest primitive 2n-th root of unity) and every word is below its
prime; results equal SEAL's bit for bit (tests/protocol/test_ring.py).  Nothing is checked here, see `protocol/hazmat/__init__.py`.
Importing this module imports numba (about a second); import it inside the function that needs it.
Kernels release the GIL, keep no state and compile at their first call (seconds); the result is cached next to this file, or in the
user's cache directory where the installation is read-only.  NUMBA_CACHE_DIR moves it.
Source: Microsoft SEAL 4.x (ntt.cpp, galois.cpp, evaluator.cpp switch_key_inplace); shared formulas in docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Kernel = TypeVar("Kernel", bound=Callable[..., object])

PRIME_LIMIT = 1 << 51  # the quotient estimate of `_product` is proven below this, and wrong above it
BLOCK = 512  # words: three accumulators and four operands of this length stay in the first-level cache
UNROLL = 4  # products that `multiply_accumulate` takes at once: the number of diagonals is a multiple of it
MAX_TERMS = 1 << 12  # sums of 2 * MAX_TERMS products of 25 by 25 bits stay below 2**64

_HALF_BITS = np.uint64(25)
_HALF_RADIX = np.uint64(1 << 25)
_HALF_MASK = np.uint64((1 << 25) - 1)
_VECTOR_RUN = 8  # shorter inner loops than this are turned inside out


class Field(NamedTuple):
    """One prime with its NTT tables; numba hands it to the kernels as it is."""

    prime: np.uint64
    reciprocal: float  # 1 / prime, rounded
    roots: Words  # (n,) powers of the root, index bit-reversed
    inverse_roots: Words  # (n,)
    degree_inverse: np.uint64  # 1 / n modulo the prime


class SwitchRing(NamedTuple):
    """The data prime of ciphertexts and the special prime of key switching."""

    data: Field
    special: Field
    special_inverse: np.uint64  # 1 / special modulo data


def _compiled(function: Kernel) -> Kernel:
    """Return `function` compiled at its first call."""
    try:
        return cast(Kernel, numba.njit(function, cache=True, nogil=True))
    except RuntimeError:  # no directory can be written: every process compiles for itself, results are the same
        return cast(Kernel, numba.njit(function, nogil=True))


def _inlined(function: Kernel) -> Kernel:
    return cast(Kernel, numba.njit(function, inline="always"))


# --- scalars ---------------------------------------------------------------------------------------------------------


@_inlined
def _product(a: Any, b: Any, prime: Any, reciprocal: Any) -> Any:
    # a and b are exact as doubles.  Three roundings of 2**-53 on a quotient below 2**51 are an error below 0.75, so the truncated
    # estimate is off by at most one either way and the remainder lies in [-prime, 2 prime): one correction on each side is exact.
    quotient = numba.int64(numba.float64(numba.int64(a)) * numba.float64(numba.int64(b)) * reciprocal)
    remainder = numba.int64(a) * numba.int64(b) - quotient * numba.int64(prime)  # wraps modulo 2**64 on purpose
    remainder = remainder + numba.int64(prime) if remainder < 0 else remainder
    reduced = remainder - numba.int64(prime)
    return numba.uint64(reduced if reduced >= 0 else remainder)


@_inlined
def _reduced(a: Any, prime: Any) -> Any:
    return min(a, a - prime)  # a < 2 prime; below the prime, a - prime wraps to a huge number: no branch


# --- number-theoretic transform --------------------------------------------------------------------------------------
# Butterflies take slices: indexing x[j + offset] instead keeps numba from vectorising and costs three times as much.


@_compiled
def _forward_run(low: Words, high: Words, root: np.uint64, prime: np.uint64, reciprocal: float) -> None:
    for j in range(low.shape[0]):
        u, v = low[j], _product(high[j], root, prime, reciprocal)
        low[j], high[j] = _reduced(u + v, prime), _reduced(u - v + prime, prime)


@_compiled
def _forward_across(low: Words, high: Words, roots: Words, prime: np.uint64, reciprocal: float) -> None:
    for j in range(low.shape[0]):
        u, v = low[j], _product(high[j], roots[j], prime, reciprocal)
        low[j], high[j] = _reduced(u + v, prime), _reduced(u - v + prime, prime)


@_compiled
def _inverse_run(low: Words, high: Words, root: np.uint64, prime: np.uint64, reciprocal: float) -> None:
    for j in range(low.shape[0]):
        u, v = low[j], high[j]
        low[j], high[j] = _reduced(u + v, prime), _product(_reduced(u - v + prime, prime), root, prime, reciprocal)


@_compiled
def _inverse_across(low: Words, high: Words, roots: Words, prime: np.uint64, reciprocal: float) -> None:
    for j in range(low.shape[0]):
        u, v = low[j], high[j]
        low[j], high[j] = _reduced(u + v, prime), _product(_reduced(u - v + prime, prime), roots[j], prime, reciprocal)


@_compiled
def ntt(values: Words, field: Field) -> None:
    """Replace the coefficients in `values` (n,) by the values at the roots, in bit-reversed order."""
    run, blocks = values.shape[0] >> 1, 1
    while run > 0:
        if run >= _VECTOR_RUN:
            for i in range(blocks):
                start = 2 * i * run
                low, high = values[start : start + run], values[start + run : start + 2 * run]
                _forward_run(low, high, field.roots[blocks + i], field.prime, field.reciprocal)
        else:
            pairs = values.reshape(blocks, 2, run)
            for k in range(run):
                _forward_across(pairs[:, 0, k], pairs[:, 1, k], field.roots[blocks : 2 * blocks], field.prime, field.reciprocal)
        run, blocks = run >> 1, blocks << 1


@_compiled
def inverse_ntt(values: Words, field: Field) -> None:
    """Undo `ntt` in place."""
    run, blocks = 1, values.shape[0] >> 1
    while blocks > 0:
        if run >= _VECTOR_RUN:
            for i in range(blocks):
                start = 2 * i * run
                low, high = values[start : start + run], values[start + run : start + 2 * run]
                _inverse_run(low, high, field.inverse_roots[blocks + i], field.prime, field.reciprocal)
        else:
            pairs = values.reshape(blocks, 2, run)
            for k in range(run):
                roots = field.inverse_roots[blocks : 2 * blocks]
                _inverse_across(pairs[:, 0, k], pairs[:, 1, k], roots, field.prime, field.reciprocal)
        run, blocks = run << 1, blocks >> 1
    for j in range(values.shape[0]):
        values[j] = _product(values[j], field.degree_inverse, field.prime, field.reciprocal)


@_compiled
def ntt_rows(rows: Words, field: Field) -> None:
    """Apply `ntt` to every row of `rows` (k, n) in place."""
    for i in range(rows.shape[0]):
        ntt(rows[i], field)


# --- rotation: Galois automorphism and key switch --------------------------------------------------------------------


@_compiled
def _gather(out: Words, source: Words, permutation: NDArray[np.int64]) -> None:
    for j in range(out.shape[0]):
        out[j] = source[permutation[j]]


@_compiled
def _multiply(out: Words, a: Words, b: Words, prime: np.uint64, reciprocal: float) -> None:
    for j in range(out.shape[0]):
        out[j] = _product(a[j], b[j], prime, reciprocal)


@_compiled
def _divide_rounded(values: Words, special: np.uint64, data: np.uint64) -> None:
    """Turn coefficients modulo `special` into what must be subtracted modulo `data` for a division that rounds to nearest."""
    half = special >> np.uint64(1)
    offset = data - half % data
    for j in range(values.shape[0]):
        shifted = _reduced(values[j] + half, special)
        shifted = _reduced(shifted, data)  # special < 2 data, checked when the ring is made
        values[j] = _reduced(shifted + offset, data)


@_compiled
def _finish_limb(out: Words, digits: Words, key: Words, rounding: Words, inverse: np.uint64, prime: np.uint64, reciprocal: float) -> None:
    for j in range(out.shape[0]):
        difference = _reduced(_product(digits[j], key[j], prime, reciprocal) + prime - rounding[j], prime)
        out[j] = _product(difference, inverse, prime, reciprocal)


@_compiled
def _add_gathered(out: Words, source: Words, permutation: NDArray[np.int64], prime: np.uint64) -> None:
    for j in range(out.shape[0]):
        out[j] = _reduced(out[j] + source[permutation[j]], prime)


@_compiled
def rotate(source: Words, permutation: NDArray[np.int64], key: Words, ring: SwitchRing, out: Words) -> None:
    """Write to `out` the ciphertext `source` under an automorphism, switched back to the secret it had before.

    source, out: (2, n) modulo the data prime, not the same memory.  permutation: from `automorphism`.
    key: (2 polynomials, 2 limbs, n), the limbs modulo the data and the special prime.
    """
    data, special = ring.data, ring.special
    degree = source.shape[1]
    turned, digits, carried = np.empty(degree, np.uint64), np.empty(degree, np.uint64), np.empty(degree, np.uint64)
    _gather(turned, source[1], permutation)
    digits[:] = turned
    inverse_ntt(digits, data)
    ntt(digits, special)  # data < special: the words need no reduction on the way from one prime to the other
    for k in range(2):
        _multiply(carried, digits, key[k, 1], special.prime, special.reciprocal)
        inverse_ntt(carried, special)
        _divide_rounded(carried, special.prime, data.prime)
        ntt(carried, data)
        _finish_limb(out[k], turned, key[k, 0], carried, ring.special_inverse, data.prime, data.reciprocal)
    _add_gathered(out[0], source[0], permutation, data.prime)


# The two loops over rotations stay in Python: 3 % of their time, and one compiled kernel more would add a second to the first call.


def baby_steps(ciphertext: Words, permutation: NDArray[np.int64], key: Words, ring: SwitchRing, steps: int) -> Words:
    """Return `ciphertext` (2, n) rotated by 0, 1, ... steps - 1 as (n / BLOCK, steps, 2, BLOCK), the order of `multiply_accumulate`."""
    blocks = ciphertext.shape[1] // BLOCK
    out = np.empty((blocks, steps, 2, BLOCK), np.uint64)
    # Two small buffers and one large result: keeping all rotations and reordering them at the end took 40 % more time, in page faults.
    current, following = ciphertext.copy(), np.empty_like(ciphertext)
    for b in range(steps):
        if b > 0:
            rotate(current, permutation, key, ring, following)
            current, following = following, current
        out[:, b] = current.reshape(2, blocks, BLOCK).transpose(1, 0, 2)
    return out


def giant_steps(parts: Words, permutation: NDArray[np.int64], key: Words, ring: SwitchRing) -> Words:
    """Return sum_g rotation^g(parts[g]) as (2, n); parts: (giant, 2, n).  Horner's rule: one key serves every step."""
    total: Words = parts[-1].copy()
    turned = np.empty(parts.shape[1:], np.uint64)
    for part in parts[-2::-1]:
        rotate(total, permutation, key, ring, turned)
        np.add(turned, part, out=total)
        np.minimum(total, total - ring.data.prime, out=total)
    return total


# --- plaintext products ----------------------------------------------------------------------------------------------


@_inlined
def _split(word: Any) -> Any:
    return word & _HALF_MASK, (word >> _HALF_BITS) & _HALF_MASK  # the mask tells the compiler that 32-bit products are enough


@_compiled
def _accumulate(
    low: Words, middle: Words, high: Words, a: Words, b: Words, c: Words, d: Words, w: Words, x: Words, y: Words, z: Words
) -> None:
    for j in range(low.shape[0]):
        (a0, a1), (b0, b1), (c0, c1), (d0, d1) = _split(a[j]), _split(b[j]), _split(c[j]), _split(d[j])
        (w0, w1), (x0, x1), (y0, y1), (z0, z1) = _split(w[j]), _split(x[j]), _split(y[j]), _split(z[j])
        low[j] += a0 * w0 + b0 * x0 + c0 * y0 + d0 * z0
        middle[j] += a0 * w1 + a1 * w0 + b0 * x1 + b1 * x0 + c0 * y1 + c1 * y0 + d0 * z1 + d1 * z0
        high[j] += a1 * w1 + b1 * x1 + c1 * y1 + d1 * z1


@_compiled
def _recombine(out: Words, low: Words, middle: Words, high: Words, prime: np.uint64, reciprocal: float) -> None:
    for j in range(out.shape[0]):
        value = _reduced(_product(high[j] % prime, _HALF_RADIX, prime, reciprocal) + middle[j] % prime, prime)
        out[j] = _reduced(_product(value, _HALF_RADIX, prime, reciprocal) + low[j] % prime, prime)


@_compiled
def multiply_accumulate(steps: Words, diagonals: Words, field: Field) -> Words:
    """Return out[g] = sum_b steps[b] * diagonals[g, b] modulo the prime, as (giant, 2, n).

    steps: (n / BLOCK, baby, 2, BLOCK) from `baby_steps`.  diagonals: (n / BLOCK, giant, baby, BLOCK).
    baby is a multiple of UNROLL and at most MAX_TERMS; the prime is below 2**50.
    """
    blocks, giant, baby, _ = diagonals.shape
    out = np.empty((giant, 2, blocks * BLOCK), np.uint64)
    sums = np.empty((2, 3, BLOCK), np.uint64)
    for s in range(blocks):
        for g in range(giant):
            sums[:] = np.uint64(0)
            rows = diagonals[s, g]
            for b in range(0, baby, UNROLL):
                for k in range(2):
                    _accumulate(
                        *(sums[k, 0], sums[k, 1], sums[k, 2], rows[b], rows[b + 1], rows[b + 2], rows[b + 3]),
                        *(steps[s, b, k], steps[s, b + 1, k], steps[s, b + 2, k], steps[s, b + 3, k]),
                    )
            for k in range(2):
                part = out[g, k, s * BLOCK : (s + 1) * BLOCK]
                _recombine(part, sums[k, 0], sums[k, 1], sums[k, 2], field.prime, field.reciprocal)
    return out


# --- tables ----------------------------------------------------------------------------------------------------------


def bit_reversal(degree: int) -> NDArray[np.int64]:
    """Return for each index below `degree`, a power of two, the index with its bits in reverse."""
    order = np.zeros(1, np.int64)
    while len(order) < degree:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


@cache
def automorphism(degree: int, element: int) -> NDArray[np.int64]:
    """Return the permutation of NTT-ordered values that is x -> x**element, element odd; read-only, (n,)."""
    order = bit_reversal(degree)
    exponents = (2 * order + 1) * element % (2 * degree)
    permutation = order[(exponents - 1) // 2]
    permutation.setflags(write=False)
    return permutation


def _smallest_root(degree: int, prime: int) -> int:
    """Return the smallest primitive 2n-th root of unity: SEAL's choice, and with it the order of all NTT words."""
    candidates = (pow(base, (prime - 1) // (2 * degree), prime) for base in range(2, prime))
    root = current = next(c for c in candidates if pow(c, degree, prime) == prime - 1)
    square, smallest = root * root % prime, root
    for _ in range(degree):
        current = current * square % prime
        smallest = min(smallest, current)
    return smallest


def _powers(base: int, degree: int, prime: int) -> Words:
    """Return base**bit_reversed(i) for i below `degree`, read-only."""
    powers = [1]
    while len(powers) < degree:
        powers.append(powers[-1] * base % prime)
    table = np.array(powers, np.uint64)[bit_reversal(degree)]
    table.setflags(write=False)
    return table


@cache
def field(degree: int, prime: int) -> Field:
    """Return the tables of a prime below 2**51 with prime = 1 modulo 2 * degree."""
    if prime >= PRIME_LIMIT or prime % (2 * degree) != 1:
        raise ValueError(f"prime: expected below 2**51 and 1 modulo {2 * degree}, got {prime}")
    root = _smallest_root(degree, prime)
    return Field(
        prime=np.uint64(prime),
        reciprocal=1.0 / prime,
        roots=_powers(root, degree, prime),
        inverse_roots=_powers(pow(root, -1, prime), degree, prime),
        degree_inverse=np.uint64(pow(degree, -1, prime)),
    )


@cache
def switch_ring(degree: int, data_prime: int, special_prime: int) -> SwitchRing:
    """Return the tables of a ciphertext prime below 2**50 and a special prime between it and its double."""
    if not (data_prime < 1 << 50 and data_prime < special_prime < 2 * data_prime):
        raise ValueError(f"primes: expected data < 2**50 and data < special < 2 data, got {data_prime} and {special_prime}")
    data, special = field(degree, data_prime), field(degree, special_prime)
    return SwitchRing(data, special, np.uint64(pow(special_prime, -1, data_prime)))
