"""Arithmetic of Z_p[x]/(x^n + 1): all that a market does to ciphertexts it cannot read.

Integers below 2**53 are exact as doubles, and a fused multiply-add gives the exact rest of a product: the transform and the key switch
compute on signed doubles that are only sometimes reduced, the plaintext products on 64-bit words.  Every result is exact, so that it is
the same on every processor; what leaves a public function is below its prime unless the docstring says otherwise.
Polynomials are in SEAL's NTT order: bit-reversed powers of the smallest primitive 2n-th root of unity.
Nothing is checked here, see `protocol/hazmat/__init__.py`.  Importing this module imports numba (about a second).
Kernels release the GIL, keep no state and compile at their first call (seconds); the result is cached next to this file, or in the
user's cache directory where the installation is read-only.  NUMBA_CACHE_DIR moves it.
Source: Harvey 2014 for lazy butterflies; Microsoft SEAL 4.x (ntt.cpp, galois.cpp, evaluator.cpp switch_key_inplace) for the conventions.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.hazmat.lanes import (
    FIFTY_TWO,
    LANES,
    add,
    add_high_52,
    add_low_52,
    compiled,
    fused,
    inlined,
    load,
    product_high,
    product_low,
    product_middle,
    store,
    wide,
    zeros,
)

Words = NDArray[np.uint64]
Doubles = NDArray[np.float64]  # integers, exact
Permutation = NDArray[np.int64]

PRIME_LIMIT = 1 << 51  # four times a prime below this is exact in a double: what lazy butterflies need
BLOCK = 2 * LANES  # words of a polynomial that `multiply_accumulate` finishes before it goes on: the tile is read front to back
MAX_TERMS = 1 << 12  # sums of as many 52-bit words, or of twice as many 50-bit ones, stay below 2**64
SMALLEST_DEGREE = 16


class Field(NamedTuple):
    """One prime with its NTT tables; numba hands it to the kernels as it is.

    A factor w is stored with w / prime, rounded: the quotient of a product by the prime is then one multiplication away.
    """

    prime: float
    reciprocal: float  # 1 / prime
    roots: Doubles  # (2, n): powers of the root, index bit-reversed, nearest to zero; the same over the prime
    inverse_roots: Doubles  # (2, n)
    fine: Doubles  # (2, 7, n / 8): the seven factors of the last three stages, for each run of eight words
    inverse_fine: Doubles  # (2, 7, n / 8)
    degree_inverse: Doubles  # (2,): 1 / n
    radices: Doubles  # (2, 3): 2**52, 2**50, 2**25


class SwitchRing(NamedTuple):
    """The data prime of ciphertexts and the special prime of key switching."""

    data: Field
    special: Field
    special_inverse: Doubles  # (2,): 1 / special modulo data


# --- scalars ---------------------------------------------------------------------------------------------------------
# Bounds are in units of the prime p < 2**51, so that 4 is below 2**53.


@inlined
def _times(x: Any, factor: Any, quotient: Any, prime: Any) -> Any:
    # |x| <= c <= 4 and |factor| <= 1/2.  The product is high + low, exactly.  The quotient has an error of at most 1/2 by rounding to an
    # integer and c p / 2 * 2**-52 <= c / 4 by its factors: the result is at most 1/2 + c/4, an integer below 2**53, and exact.
    high = x * factor
    low = fused(x, factor, -high)
    return fused(-np.rint(x * quotient), prime, high) + low


@inlined
def _product(x: Any, y: Any, prime: Any, reciprocal: Any) -> Any:
    # As above for two variables with |x| <= 1/2 and |y| <= 1: the result is at most 1/2 + 3/8.
    high = x * y
    low = fused(x, y, -high)
    return fused(-np.rint(high * reciprocal), prime, high) + low


@inlined
def _near(x: Any, prime: Any, reciprocal: Any) -> Any:
    return fused(-np.rint(x * reciprocal), prime, x)  # |x| <= 4: the result is at most 1/2, or 2 units more at a tie


@inlined
def _canonical(x: Any, prime: Any, reciprocal: Any) -> Any:
    near = _near(x, prime, reciprocal)
    return near + prime if near < 0 else near  # in [0, p)


@inlined
def _remainder(word: Any, prime: Any, reciprocal: Any) -> Any:
    # Any 64-bit word.  The quotient is off by at most one for primes above 2**40, so that the result is below 2 in absolute value.
    quotient = np.uint64(np.float64(word) * reciprocal)
    return np.float64(np.int64(word - quotient * np.uint64(prime)))  # wraps modulo 2**64 on purpose


# --- number-theoretic transform --------------------------------------------------------------------------------------
# Three stages at once, on eight words that are `run` apart.  Kernels take slices: with x[j + run] numba finds no vectors and needs five
# times as long; the run of eight words is written out for the same reason.


@inlined
def _forward_eight(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, field: Any) -> Any:
    # Bounds: 1/2 at the start, then 1.125, 1.91 and 2.89.
    p, r = field.prime, field.reciprocal
    x0, x1, x2, x3 = _near(x[0], p, r), _near(x[1], p, r), _near(x[2], p, r), _near(x[3], p, r)
    x4, x5, x6, x7 = _near(x[4], p, r), _near(x[5], p, r), _near(x[6], p, r), _near(x[7], p, r)
    t4, t5, t6, t7 = _times(x4, a[0], a[1], p), _times(x5, a[0], a[1], p), _times(x6, a[0], a[1], p), _times(x7, a[0], a[1], p)
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + t4, x1 + t5, x2 + t6, x3 + t7, x0 - t4, x1 - t5, x2 - t6, x3 - t7
    t2, t3, t6, t7 = _times(x2, b[0], b[1], p), _times(x3, b[0], b[1], p), _times(x6, c[0], c[1], p), _times(x7, c[0], c[1], p)
    x0, x1, x2, x3, x4, x5, x6, x7 = x0 + t2, x1 + t3, x0 - t2, x1 - t3, x4 + t6, x5 + t7, x4 - t6, x5 - t7
    t1, t3, t5, t7 = _times(x1, d[0], d[1], p), _times(x3, e[0], e[1], p), _times(x5, f[0], f[1], p), _times(x7, g[0], g[1], p)
    return x0 + t1, x0 - t1, x2 + t3, x2 - t3, x4 + t5, x4 - t5, x6 + t7, x6 - t7


@inlined
def _inverse_eight(x: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, field: Any) -> Any:
    # Bounds: 1/2 at the start; sums reach 1, 2 and 4, products at most 1/2 + 4/4.
    p, r = field.prime, field.reciprocal
    x0, x1, x2, x3 = _near(x[0], p, r), _near(x[1], p, r), _near(x[2], p, r), _near(x[3], p, r)
    x4, x5, x6, x7 = _near(x[4], p, r), _near(x[5], p, r), _near(x[6], p, r), _near(x[7], p, r)
    t1, t3, t5, t7 = (
        _times(x0 - x1, d[0], d[1], p),
        _times(x2 - x3, e[0], e[1], p),
        _times(x4 - x5, f[0], f[1], p),
        _times(x6 - x7, g[0], g[1], p),
    )
    x0, x2, x4, x6 = x0 + x1, x2 + x3, x4 + x5, x6 + x7
    x1, x3, x5, x7 = t1, t3, t5, t7
    t2, t3 = _times(x0 - x2, b[0], b[1], p), _times(x1 - x3, b[0], b[1], p)
    t6, t7 = _times(x4 - x6, c[0], c[1], p), _times(x5 - x7, c[0], c[1], p)
    x0, x1, x4, x5 = x0 + x2, x1 + x3, x4 + x6, x5 + x7
    x2, x3, x6, x7 = t2, t3, t6, t7
    t4, t5, t6, t7 = (
        _times(x0 - x4, a[0], a[1], p),
        _times(x1 - x5, a[0], a[1], p),
        _times(x2 - x6, a[0], a[1], p),
        _times(x3 - x7, a[0], a[1], p),
    )
    return x0 + x4, x1 + x5, x2 + x6, x3 + x7, t4, t5, t6, t7


@inlined
def _factor(table: Any, i: Any) -> Any:
    return table[0, i], table[1, i]


@inlined
def _fine_factor(table: Any, k: Any, i: Any) -> Any:
    return table[0, k, i], table[1, k, i]


def _three_stages(eight: Any) -> tuple[Any, Any, Any]:
    """Return the kernels of three stages on runs of at least eight words, on runs of eight, and on single words."""

    @compiled
    def on_slices(x0, x1, x2, x3, x4, x5, x6, x7, roots, i, field):  # type: ignore[no-untyped-def]
        wide()
        a, b, c = _factor(roots, i), _factor(roots, 2 * i), _factor(roots, 2 * i + 1)
        d, e, f, g = _factor(roots, 4 * i), _factor(roots, 4 * i + 1), _factor(roots, 4 * i + 2), _factor(roots, 4 * i + 3)
        for j in range(x0.shape[0]):
            x = (x0[j], x1[j], x2[j], x3[j], x4[j], x5[j], x6[j], x7[j])
            x0[j], x1[j], x2[j], x3[j], x4[j], x5[j], x6[j], x7[j] = eight(x, a, b, c, d, e, f, g, field)

    @compiled
    def on_eights(v, roots, field):  # type: ignore[no-untyped-def]
        wide()
        for block in range(v.shape[0] // 64):
            i = v.shape[0] // 64 + block
            a, b, c = _factor(roots, i), _factor(roots, 2 * i), _factor(roots, 2 * i + 1)
            d, e, f, g = _factor(roots, 4 * i), _factor(roots, 4 * i + 1), _factor(roots, 4 * i + 2), _factor(roots, 4 * i + 3)
            for j in range(64 * block, 64 * block + 8):
                x = (v[j], v[j + 8], v[j + 16], v[j + 24], v[j + 32], v[j + 40], v[j + 48], v[j + 56])
                v[j], v[j + 8], v[j + 16], v[j + 24], v[j + 32], v[j + 40], v[j + 48], v[j + 56] = eight(x, a, b, c, d, e, f, g, field)

    @compiled
    def on_words(v, fine, field):  # type: ignore[no-untyped-def]
        wide()
        for i in range(v.shape[0] // 8):
            j = 8 * i
            a, b, c = _fine_factor(fine, 0, i), _fine_factor(fine, 1, i), _fine_factor(fine, 2, i)
            d, e, f, g = _fine_factor(fine, 3, i), _fine_factor(fine, 4, i), _fine_factor(fine, 5, i), _fine_factor(fine, 6, i)
            x = (v[j], v[j + 1], v[j + 2], v[j + 3], v[j + 4], v[j + 5], v[j + 6], v[j + 7])
            v[j], v[j + 1], v[j + 2], v[j + 3], v[j + 4], v[j + 5], v[j + 6], v[j + 7] = eight(x, a, b, c, d, e, f, g, field)

    return on_slices, on_eights, on_words


_forward_slices, _forward_eights, _forward_words = _three_stages(_forward_eight)
_inverse_slices, _inverse_eights, _inverse_words = _three_stages(_inverse_eight)


@compiled
def _forward_pair(low: Doubles, high: Doubles, roots: Doubles, i: int, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(low.shape[0]):
        u, t = _near(low[j], prime, reciprocal), _times(_near(high[j], prime, reciprocal), roots[0, i], roots[1, i], prime)
        low[j], high[j] = u + t, u - t


@compiled
def _inverse_pair(low: Doubles, high: Doubles, roots: Doubles, i: int, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(low.shape[0]):
        u, t = _near(low[j], prime, reciprocal), _near(high[j], prime, reciprocal)
        low[j], high[j] = u + t, _times(u - t, roots[0, i], roots[1, i], prime)


@compiled
def _forward(values: Doubles, field: Field) -> None:
    """Replace coefficients by values at the roots; absolute values at most 4 primes before, 2.89 after."""
    run, blocks = values.shape[0], 1
    while run & 0o1111111 == 0:  # no power of eight: single stages until it is one
        run >>= 1
        for i in range(blocks):
            start = 2 * i * run
            low, high = values[start : start + run], values[start + run : start + 2 * run]
            _forward_pair(low, high, field.roots, blocks + i, field.prime, field.reciprocal)
        blocks <<= 1
    while run > 64:
        run >>= 3
        for i in range(blocks):
            v = values[8 * i * run : 8 * (i + 1) * run].reshape(8, run)
            _forward_slices(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], field.roots, blocks + i, field)
        blocks <<= 3
    if run == 64:
        _forward_eights(values, field.roots, field)
    _forward_words(values, field.fine, field)


@compiled
def _inverse(values: Doubles, field: Field) -> None:
    """Undo `_forward` but for a factor n; absolute values at most 4 primes before and after."""
    degree = values.shape[0]
    _inverse_words(values, field.inverse_fine, field)
    run = 8
    if degree >= 64:
        _inverse_eights(values, field.inverse_roots, field)
        run = 64
    while 8 * run <= degree:
        blocks = degree // (8 * run)
        for i in range(blocks):
            v = values[8 * i * run : 8 * (i + 1) * run].reshape(8, run)
            _inverse_slices(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], field.inverse_roots, blocks + i, field)
        run *= 8
    while 2 * run <= degree:
        blocks = degree // (2 * run)
        for i in range(blocks):
            start = 2 * i * run
            low, high = values[start : start + run], values[start + run : start + 2 * run]
            _inverse_pair(low, high, field.inverse_roots, blocks + i, field.prime, field.reciprocal)
        run *= 2


@compiled
def _scaled(values: Doubles, factor: Doubles, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(values.shape[0]):
        values[j] = _canonical(_times(values[j], factor[0], factor[1], prime), prime, reciprocal)


@compiled
def _copy(source: Doubles, out: Doubles) -> None:
    # Written out: numba compiles an assignment of slices for seconds, with the error message for other shapes.
    wide()
    for j in range(out.shape[0]):
        out[j] = source[j]


@compiled
def _centre(values: Doubles, prime: float) -> None:
    wide()
    half = (prime - 1) / 2
    for j in range(values.shape[0]):
        values[j] = values[j] - prime if values[j] > half else values[j]


@compiled
def _to_doubles(words: Words, out: Doubles) -> None:
    wide()
    for j in range(out.shape[0]):
        out[j] = np.float64(words[j])


@compiled
def _to_words(values: Doubles, out: Words, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(out.shape[0]):
        out[j] = np.uint64(np.int64(_canonical(values[j], prime, reciprocal)))


@compiled
def ntt(words: Words, field: Field) -> None:
    """Replace the coefficients in `words` (n,) by the values at the roots, in bit-reversed order."""
    values = np.empty(words.shape[0])
    _to_doubles(words, values)
    _forward(values, field)
    _to_words(values, words, field.prime, field.reciprocal)


@compiled
def inverse_ntt(words: Words, field: Field) -> None:
    """Undo `ntt` in place."""
    values = np.empty(words.shape[0])
    _to_doubles(words, values)
    _inverse(values, field)
    _scaled(values, field.degree_inverse, field.prime, field.reciprocal)
    _to_words(values, words, field.prime, field.reciprocal)


@compiled
def ntt_rows(rows: Words, field: Field) -> None:
    """Apply `ntt` to every row of `rows` (k, n) in place."""
    for i in range(rows.shape[0]):
        ntt(rows[i], field)


# --- rotation: Galois automorphism and key switch --------------------------------------------------------------------


@compiled
def _gather(out: Doubles, source: Doubles, permutation: Permutation) -> None:
    wide()
    for j in range(out.shape[0]):
        out[j] = source[permutation[j]]


@compiled
def _near_all(values: Doubles, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(values.shape[0]):
        values[j] = _near(values[j], prime, reciprocal)


@compiled
def _multiply(out: Doubles, a: Doubles, b: Doubles, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(out.shape[0]):
        out[j] = _product(a[j], b[j], prime, reciprocal)


@compiled
def _finish_limb(out: Doubles, digits: Doubles, key: Doubles, rounding: Doubles, inverse: Doubles, prime: float, reciprocal: float) -> None:
    wide()
    for j in range(out.shape[0]):
        digit = _near(digits[j], prime, reciprocal)
        difference = _product(digit, key[j], prime, reciprocal) - rounding[j]  # at most 0.875 + 2.89
        out[j] = _canonical(_times(difference, inverse[0], inverse[1], prime), prime, reciprocal)


@compiled
def _add_gathered(out: Doubles, source: Doubles, permutation: Permutation, prime: float) -> None:
    wide()
    for j in range(out.shape[0]):
        total = out[j] + source[permutation[j]]
        out[j] = total - prime if total >= prime else total


@compiled
def rotate(source: Doubles, permutation: Permutation, key: Doubles, ring: SwitchRing, out: Doubles, work: Doubles) -> None:
    """Write to `out` the ciphertext `source` under an automorphism, switched back to the secret it had before.

    source, out: (2, n) modulo the data prime, not the same memory.  permutation: from `automorphism`.  work: (3, n), overwritten.
    key: (2 polynomials, 2 limbs, n), the limbs modulo the data and the special prime.
    """
    data, special = ring.data, ring.special
    turned, digits, carried = work[0], work[1], work[2]
    _gather(turned, source[1], permutation)
    _copy(turned, digits)
    _inverse(digits, data)
    _scaled(digits, data.degree_inverse, data.prime, data.reciprocal)
    # SEAL takes digits in [0, q).  Their mean of q / 2 is a polynomial whose value at the slots next to 1 is 2600, where the rest of the
    # digits comes to 37: there the noise of the key is 70 times larger.  Digits around zero are as valid and have no such slots: largest
    # error of 60 keys and 64 rotations 1.6e-4 instead of 1.5e-3 (docs/decisions/0006-digits-around-zero.md).
    _centre(digits, data.prime)
    _forward(digits, special)
    _near_all(digits, special.prime, special.reciprocal)
    for k in range(2):
        _multiply(carried, digits, key[k, 1], special.prime, special.reciprocal)
        _inverse(carried, special)
        _scaled(carried, special.degree_inverse, special.prime, special.reciprocal)
        _centre(carried, special.prime)  # what must be subtracted for a division by the special prime that rounds to nearest
        _forward(carried, data)
        _finish_limb(out[k], turned, key[k, 0], carried, ring.special_inverse, data.prime, data.reciprocal)
    _add_gathered(out[0], source[0], permutation, data.prime)


@compiled
def _deal(out: Words, b: int, ciphertext: Doubles) -> None:
    wide()
    for s in range(out.shape[0]):
        for k in range(2):
            for j in range(BLOCK):
                out[s, b, k, j] = np.uint64(np.int64(ciphertext[k, s * BLOCK + j]))


@compiled
def baby_steps(ciphertext: Doubles, permutation: Permutation, key: Doubles, ring: SwitchRing, out: Words) -> None:
    """Write `ciphertext` (2, n) rotated by 0, 1, ... to `out` (n / BLOCK, steps, 2, BLOCK), the order of `multiply_accumulate`."""
    current, following, work = ciphertext.copy(), np.empty_like(ciphertext), np.empty((3, ciphertext.shape[1]))
    _deal(out, 0, current)
    for b in range(1, out.shape[1]):
        rotate(current, permutation, key, ring, following, work)
        _deal(out, b, following)
        current, following = following, current


@compiled
def _add_in_place(total: Doubles, part: Doubles, prime: float) -> None:
    wide()
    for j in range(total.shape[0]):
        value = total[j] + part[j]
        total[j] = value - prime if value >= prime else value


@compiled
def giant_steps(parts: Doubles, permutation: Permutation, key: Doubles, ring: SwitchRing, total: Doubles) -> None:
    """Write sum_g rotation^g(parts[g]) to `total` (2, n); parts: (giant, 2, n).  Horner's rule: one key serves every step."""
    turned, work = np.empty(total.shape), np.empty((3, total.shape[1]))
    for k in range(2):
        _copy(parts[-1, k], total[k])
    for g in range(parts.shape[0] - 2, -1, -1):
        rotate(total, permutation, key, ring, turned, work)
        for k in range(2):
            _copy(turned[k], total[k])
            _add_in_place(total[k], parts[g, k], ring.data.prime)


# --- plaintext products ----------------------------------------------------------------------------------------------


@compiled
def _accumulate_52(rows: Words, row: int, steps: Words, step: int, terms: int, sums: Words) -> None:
    """Set sums[:4] (low halves of both polynomials, high halves of both), a BLOCK each, to the sum over b of rows[b] * steps[b]."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = zeros()
    for _ in range(terms):
        r, s = load(rows, row), load(rows, row + 8)
        w, x, y, z = load(steps, step), load(steps, step + 8), load(steps, step + 16), load(steps, step + 24)
        a0, a1, a2, a3 = add_low_52(a0, r, w), add_low_52(a1, s, x), add_low_52(a2, r, y), add_low_52(a3, s, z)
        b0, b1, b2, b3 = add_high_52(b0, r, w), add_high_52(b1, s, x), add_high_52(b2, r, y), add_high_52(b3, s, z)
        row, step = row + 16, step + 32
    store(sums, 0, a0), store(sums, 8, a1), store(sums, 16, a2), store(sums, 24, a3)
    store(sums, 32, b0), store(sums, 40, b1), store(sums, 48, b2), store(sums, 56, b3)


@compiled
def _accumulate_25(rows: Words, row: int, steps: Words, step: int, terms: int, sums: Words) -> None:
    """The same in halves of 25 bits, for processors without 52-bit products: sums[0], [1] low, [2], [3] high, [4], [5] middle."""
    for k in range(4):  # four registers' worth at once, so that half as wide registers suffice
        low = middle = high = zeros()
        r, s = row + 8 * (k & 1), step + 8 * k
        for _ in range(terms):
            x, y = load(rows, r), load(steps, s)
            low, middle, high = add(low, product_low(x, y)), add(middle, product_middle(x, y)), add(high, product_high(x, y))
            r, s = r + 16, s + 32
        store(sums, 8 * k, low), store(sums, 32 + 8 * k, high), store(sums, 64 + 8 * k, middle)


def _multiplier(accumulate: Any, radix: int) -> Any:
    @compiled
    def multiply_accumulate(steps, diagonals, field, first, last, out):  # type: ignore[no-untyped-def]
        """Set out[q, g] = sum_b steps[q, b] * diagonals[g, b] modulo the prime, for the blocks from `first` up to `last`.

        steps: (queries, n / BLOCK, baby, 2, BLOCK), each from `baby_steps`.  diagonals: (n / BLOCK, giant, baby, BLOCK).
        out: (queries, giant, 2, n).  baby is at most MAX_TERMS; words are below 2**50.
        """
        wide()
        giant, baby = diagonals.shape[1], diagonals.shape[2]
        rows, flat, sums = diagonals.reshape(-1), steps.reshape(-1), np.zeros(6 * BLOCK, np.uint64)
        p, r, radices = field.prime, field.reciprocal, field.radices
        for s in range(first, last):
            for g in range(giant):
                for q in range(steps.shape[0]):  # inside, so that all queries share one read of the tile from memory
                    step = 2 * (q * steps.shape[1] + s) * baby * BLOCK
                    accumulate(rows, (s * giant + g) * baby * BLOCK, flat, step, baby, sums)
                    for k in range(2):
                        for j in range(BLOCK):
                            low, high = _remainder(sums[BLOCK * k + j], p, r), _remainder(sums[BLOCK * (2 + k) + j], p, r)
                            middle = _remainder(sums[BLOCK * (4 + k) + j], p, r)
                            # At most 2 + 1, then 1/2 + 1; `middle` is zero where products have 52 bits.
                            value = _near(low + _times(high, radices[0, radix], radices[1, radix], p), p, r)
                            value += _times(middle, radices[0, 2], radices[1, 2], p)
                            out[q, g, k, s * BLOCK + j] = _canonical(value, p, r)

    return multiply_accumulate


multiply_accumulate_25 = _multiplier(_accumulate_25, radix=1)
multiply_accumulate = _multiplier(_accumulate_52, radix=0) if FIFTY_TWO else multiply_accumulate_25


# --- answers ---------------------------------------------------------------------------------------------------------


@compiled
def _drop(values: Doubles, drop: int, mask: int, out: Words) -> None:
    wide()
    half = np.uint64((1 << drop) >> 1)
    for j in range(out.shape[0]):
        out[j] = ((np.uint64(np.int64(values[j])) + half) >> np.uint64(drop)) & np.uint64(mask)


@compiled
def truncate(ciphertext: Doubles, field: Field, drops: tuple[int, int], bits: int, out: Words) -> None:
    """Write to `out` (2, n) the coefficients of `ciphertext` (2, n) without their lowest bits, rounded, as many as `drops` says.

    The prime has `bits` bits.  What rounds up to 2**bits becomes zero, which is as near: the prime lies just below.
    """
    work = np.empty(ciphertext.shape[1])
    for k in range(2):
        _copy(ciphertext[k], work)
        _inverse(work, field)
        _scaled(work, field.degree_inverse, field.prime, field.reciprocal)
        _drop(work, drops[k], (1 << (bits - drops[k])) - 1, out[k])


@compiled
def finish_tiles(
    parts: Doubles, permutation: Permutation, key: Doubles, ring: SwitchRing, drops: tuple[int, int], bits: int, out: Words
) -> None:
    """Write to `out` (tiles, 2, n) the truncated sums over giant steps of `parts` (tiles, giant, 2, n)."""
    total = np.empty((2, parts.shape[3]))
    for t in range(parts.shape[0]):
        giant_steps(parts[t], permutation, key, ring, total)
        truncate(total, ring.data, drops, bits, out[t])


# --- tables ----------------------------------------------------------------------------------------------------------


def bit_reversal(degree: int) -> Permutation:
    """Return for each index below `degree`, a power of two, the index with its bits in reverse."""
    order = np.zeros(1, np.int64)
    while len(order) < degree:
        order = np.concatenate([2 * order, 2 * order + 1])
    return order


@cache
def automorphism(degree: int, element: int) -> Permutation:
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


def _factors(numbers: list[int], prime: int) -> Doubles:
    """Return numbers modulo the prime, nearest to zero, and each over the prime; read-only, (2, k)."""
    near = [(number + prime // 2) % prime - prime // 2 for number in numbers]
    factors = np.array([[float(x) for x in near], [x / prime for x in near]])
    factors.setflags(write=False)
    return factors


def _powers(base: int, degree: int, prime: int) -> Doubles:
    """Return the factors base**bit_reversed(i) for i below `degree`, (2, n)."""
    powers = [1]
    while len(powers) < degree:
        powers.append(powers[-1] * base % prime)
    return _factors([powers[i] for i in bit_reversal(degree)], prime)


def _fine(roots: Doubles) -> Doubles:
    """Return the factors of the last three stages side by side, (2, 7, n / 8)."""
    eighth = roots.shape[1] // 8
    i = np.arange(eighth, 2 * eighth)
    fine = np.ascontiguousarray(roots[:, [i, 2 * i, 2 * i + 1, 4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3]])
    fine.setflags(write=False)
    return fine


@cache
def field(degree: int, prime: int) -> Field:
    """Return the tables of a prime below 2**51 with prime = 1 modulo 2 * degree."""
    if prime >= PRIME_LIMIT or prime % (2 * degree) != 1 or degree < SMALLEST_DEGREE:
        raise ValueError(f"prime: expected below 2**51 and 1 modulo {2 * degree}, degree at least {SMALLEST_DEGREE}, got {prime}")
    root = _smallest_root(degree, prime)
    roots, inverse_roots = _powers(root, degree, prime), _powers(pow(root, -1, prime), degree, prime)
    return Field(
        prime=float(prime),
        reciprocal=1.0 / prime,
        roots=roots,
        inverse_roots=inverse_roots,
        fine=_fine(roots),
        inverse_fine=_fine(inverse_roots),
        degree_inverse=_factors([pow(degree, -1, prime)], prime)[:, 0],
        radices=_factors([1 << 52, 1 << 50, 1 << 25], prime),
    )


@cache
def switch_ring(degree: int, data_prime: int, special_prime: int) -> SwitchRing:
    """Return the tables of a ciphertext prime below 2**50 and a special prime between it and its double."""
    if not (data_prime < 1 << 50 and data_prime < special_prime < 2 * data_prime):
        raise ValueError(f"primes: expected data < 2**50 and data < special < 2 data, got {data_prime} and {special_prime}")
    data, special = field(degree, data_prime), field(degree, special_prime)
    return SwitchRing(data, special, _factors([pow(special_prime, -1, data_prime)], data_prime)[:, 0])
