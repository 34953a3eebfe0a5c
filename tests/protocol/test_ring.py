"""The compiled kernels against two slow witnesses: Python's big integers, and Microsoft SEAL itself."""

import numpy as np
import pytest

from protocol.encryption import PQ_STRICT, PRESETS, STD128
from protocol.hazmat import ring
from protocol.hazmat.seal import SealKey, ciphertext_words, container_body, galois_key_bodies, saved

DEGREE, DATA_PRIME, SPECIAL_PRIME = STD128.degree, STD128.data_prime, STD128.special_prime
RING = ring.switch_ring(DEGREE, DATA_PRIME, SPECIAL_PRIME)
NAMES = [parameters.name for parameters in PRESETS]


def words(seed: int, *shape: int, below: int = DATA_PRIME) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint64)


def reversed_bits(degree: int) -> list[int]:
    bits = degree.bit_length() - 1
    return [int(f"{i:0{bits}b}"[::-1], 2) for i in range(degree)]


def evaluated(coefficients: list[int], exponent: int, degree: int, prime: int) -> int:
    """Return the polynomial's value at a power of the smallest primitive root, by Horner's rule."""
    point, value = pow(ring._smallest_root(degree, prime), exponent, prime), 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % prime
    return value


# Degrees that take every path of the kernels: single stages, runs of words, runs of eight, slices.
@pytest.mark.parametrize(("degree", "prime"), [(16, 97), (32, 193), (64, 257), (128, 257), (256, 7681), (512, 12289), (1024, 12289)])
def test_the_transform_is_evaluation_at_the_odd_powers_of_the_smallest_root(degree, prime):
    root = next(r for r in range(2, prime) if pow(r, degree, prime) == prime - 1)
    assert ring._smallest_root(degree, prime) == root
    values = words(1, degree, below=prime)
    before = values.tolist()
    ring.ntt(values, ring.field(degree, prime))
    assert values.tolist() == [evaluated(before, 2 * i + 1, degree, prime) for i in reversed_bits(degree)]
    ring.inverse_ntt(values, ring.field(degree, prime))
    assert values.tolist() == before


def edges(degree: int, prime: int) -> list[np.ndarray]:
    alternating = np.zeros(degree, np.uint64)
    alternating[::2] = prime - 1
    return [np.full(degree, value, np.uint64) for value in (0, 1, prime - 1, prime // 2, prime // 2 + 1)] + [alternating]


@pytest.mark.parametrize("prime", [DATA_PRIME, SPECIAL_PRIME])
@pytest.mark.parametrize("degree", [STD128.degree, PQ_STRICT.degree])
def test_the_transform_is_exact_at_the_primes_of_the_presets_also_for_the_largest_words(degree, prime):
    field, order = ring.field(degree, prime), reversed_bits(degree)
    for before in [words(2, degree, below=prime), *edges(degree, prime)]:
        values = before.copy()
        ring.ntt(values, field)
        for position in (0, 1, 7, 8, degree // 2 + 5, degree - 1):
            assert int(values[position]) == evaluated(before.tolist(), 2 * order[position] + 1, degree, prime)
        ring.inverse_ntt(values, field)
        assert (values == before).all()


def test_products_of_transforms_are_negacyclic_products():
    """x^(n-1) * x = -1 in the ring: the sign is where cyclic and negacyclic differ."""
    a, b = np.zeros(DEGREE, np.uint64), np.zeros(DEGREE, np.uint64)
    a[-1], b[1] = 1, 1
    ring.ntt(a, RING.data)
    ring.ntt(b, RING.data)
    product = np.array([int(x) * int(y) % DATA_PRIME for x, y in zip(a, b, strict=True)], np.uint64)
    ring.inverse_ntt(product, RING.data)
    assert int(product[0]) == DATA_PRIME - 1
    assert not product[1:].any()


KERNELS = {"as compiled here": ring.multiply_accumulate, "without 52-bit products": ring.multiply_accumulate_25}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(("queries", "baby", "giant"), [(1, 4, 1), (3, 8, 3), (1, 1, 2), (1, 4096, 1)])
def test_multiply_accumulate_equals_big_integer_arithmetic(kernel, queries, baby, giant):
    blocks = 4
    steps, diagonals = words(3, queries, blocks, baby, 2, ring.BLOCK), words(4, blocks, giant, baby, ring.BLOCK)
    steps[0, 0, :, :, 0] = diagonals[0, :, :, 0] = DATA_PRIME - 1  # the largest words there are, all in one sum
    out = np.full((queries, giant, 2, blocks * ring.BLOCK), np.nan)
    kernel(steps, diagonals, RING.data, 0, 3, out)
    assert np.isnan(out[..., 3 * ring.BLOCK :]).all()
    kernel(steps, diagonals, RING.data, 3, 4, out)
    for position in (0, 1, ring.BLOCK - 1, ring.BLOCK, blocks * ring.BLOCK - 1):
        s, j = divmod(position, ring.BLOCK)
        for q, g, k in np.ndindex(queries, giant, 2):
            expected = sum(int(steps[q, s, b, k, j]) * int(diagonals[s, g, b, j]) for b in range(baby)) % DATA_PRIME
            assert int(out[q, g, k, position]) == expected


# --- key switching ---------------------------------------------------------------------------------------------------


def exact_rotation(source: np.ndarray, element: int, key: np.ndarray, parameters, centred: bool) -> np.ndarray:
    """Rotate in Python's integers.  Digits of the second polynomial in [0, q) as SEAL takes them, or around zero as the kernel does."""
    degree, q, p = parameters.degree, parameters.data_prime, parameters.special_prime
    data, special = ring.field(degree, q), ring.field(degree, p)
    turned = source[:, ring.automorphism(degree, element)]
    coefficients = turned[1].copy()
    ring.inverse_ntt(coefficients, data)
    digits = [c - q if centred and c > q // 2 else c for c in coefficients.tolist()]
    raised = np.array([d % p for d in digits], np.uint64)
    ring.ntt(raised, special)
    out = []
    for k in range(2):
        high = np.array([d * w % p for d, w in zip(raised.tolist(), key[k, 1].tolist(), strict=True)], np.uint64)
        ring.inverse_ntt(high, special)
        rounding = np.array([((c + p // 2) % p - p // 2) % q for c in high.tolist()], np.uint64)
        ring.ntt(rounding, data)
        inverse = pow(p, -1, q)
        low = zip(turned[1].tolist(), key[k, 0].tolist(), rounding.tolist(), strict=True)
        out.append([(d * w - r) * inverse % q for d, w, r in low])
    return (np.array(out, np.uint64) + np.stack([turned[0], np.zeros_like(turned[0])])) % np.uint64(q)


def seal_rotation(parameters, steps: int):
    """Return a ciphertext, a switching key and SEAL's rotation of the one with the other."""
    from tenseal import sealapi

    key = SealKey(parameters.degree, (parameters.data_prime, parameters.special_prime))
    plaintext, ciphertext, rotated = sealapi.Plaintext(), sealapi.Ciphertext(), sealapi.Ciphertext()
    key._encoder.encode(np.random.default_rng(5).standard_normal(parameters.slots).tolist(), 2.0**29, plaintext)
    key._encryptor.encrypt_symmetric(plaintext, ciphertext)
    element = pow(3, steps, 2 * parameters.degree)
    keys = sealapi.GaloisKeys()
    key._generator.create_galois_keys([element], keys)
    sealapi.Evaluator(key._context).rotate_vector(ciphertext, steps, keys, rotated)
    switch = ciphertext_words(galois_key_bodies(saved(keys))[element])
    return element, plain_words(ciphertext), switch, plain_words(rotated)


def plain_words(ciphertext) -> np.ndarray:
    return np.ascontiguousarray(ciphertext_words(container_body(saved(ciphertext)))[:, 0])


@pytest.mark.parametrize("steps", [1, 4, 16])
@pytest.mark.parametrize("parameters", PRESETS, ids=NAMES)
def test_a_rotation_is_seals_but_for_digits_around_zero(parameters, steps):
    """The reference equals SEAL's rotation bit for bit with SEAL's digits, and the kernel bit for bit with its own."""
    element, source, key, from_seal = seal_rotation(parameters, steps)
    assert (exact_rotation(source, element, key, parameters, centred=False) == from_seal).all()
    degree, primes = parameters.degree, (parameters.data_prime, parameters.special_prime)
    out, permutation = np.empty((2, degree)), ring.automorphism(degree, element)
    switch = ring.switch_ring(degree, *primes)
    ring.rotate(source.astype(np.float64), permutation, key.astype(np.float64), switch, out, np.empty((3, degree)))
    assert (out == exact_rotation(source, element, key, parameters, centred=True)).all()
    assert (out != from_seal).any()


def test_a_rotation_of_the_largest_words_is_exact():
    source, key = np.full((2, DEGREE), DATA_PRIME - 1, np.uint64), np.empty((2, 2, DEGREE), np.uint64)
    key[:, 0], key[:, 1] = DATA_PRIME - 1, SPECIAL_PRIME - 1
    out = np.empty((2, DEGREE))
    ring.rotate(source.astype(np.float64), ring.automorphism(DEGREE, 3), key.astype(np.float64), RING, out, np.empty((3, DEGREE)))
    assert (out == exact_rotation(source, 3, key, STD128, centred=True)).all()


def test_baby_and_giant_steps_are_rotations_and_sums():
    source, keys = words(6, 2, DEGREE), words(7, 2, 2, 2, DEGREE).astype(np.float64)
    by_one, by_four = ring.automorphism(DEGREE, 3), ring.automorphism(DEGREE, pow(3, 4, 2 * DEGREE))
    steps = np.empty((DEGREE // ring.BLOCK, 4, 2, ring.BLOCK), np.uint64)
    ring.baby_steps(source.astype(np.float64), by_one, keys[0], RING, steps)
    turned = source
    for b in range(4):
        assert (steps[:, b].transpose(1, 0, 2).reshape(2, DEGREE) == turned).all()
        turned = exact_rotation(turned, 3, keys[0].astype(np.uint64), STD128, centred=True)
    parts, total = words(8, 3, 2, DEGREE), np.empty((2, DEGREE))
    ring.giant_steps(parts.astype(np.float64), by_four, keys[1], RING, total)
    expected = parts[2]
    for part in (parts[1], parts[0]):
        expected = exact_rotation(expected, pow(3, 4, 2 * DEGREE), keys[1].astype(np.uint64), STD128, centred=True)
        expected = (expected + part) % np.uint64(DATA_PRIME)
    assert (total == expected).all()


def test_multiply_accumulate_equals_seals_bit_for_bit():
    from tenseal import sealapi

    key = SealKey(DEGREE, (DATA_PRIME, SPECIAL_PRIME))
    rng, evaluator, total, plains = np.random.default_rng(6), sealapi.Evaluator(key._context), None, []
    ciphertext = sealapi.Ciphertext()
    key._encryptor.encrypt_symmetric(key._encoded(rng.standard_normal(DEGREE // 2), 2.0**29), ciphertext)
    for _ in range(4):
        plaintext, product = key._encoded(rng.standard_normal(DEGREE // 2), 2.0**19), sealapi.Ciphertext()
        evaluator.multiply_plain(ciphertext, plaintext, product)
        if total is None:
            total = product
        else:
            evaluator.add_inplace(total, product)
        plains.append(np.array([plaintext[i] for i in range(DEGREE)], np.uint64))
    blocks = DEGREE // ring.BLOCK
    steps = np.stack([plain_words(ciphertext)] * 4).reshape(4, 2, blocks, ring.BLOCK).transpose(2, 0, 1, 3)
    diagonals = np.stack(plains).reshape(1, 4, blocks, ring.BLOCK).transpose(2, 0, 1, 3)
    out = np.empty((1, 1, 2, DEGREE))
    ring.multiply_accumulate(np.ascontiguousarray(steps)[None], np.ascontiguousarray(diagonals), RING.data, 0, blocks, out)
    assert (out[0, 0] == plain_words(total)).all()


def test_truncation_rounds_to_nearest_and_wraps_at_the_power_of_two():
    coefficients = words(9, 2, DEGREE)
    coefficients[:, :4] = [0, DATA_PRIME - 1, (1 << 27) - 1, 1 << 27]
    values = coefficients.copy()
    ring.ntt_rows(values, RING.data)
    out = np.empty((2, DEGREE), np.uint64)
    ring.truncate(values.astype(np.float64), RING.data, (28, 22), 50, out)
    for k, drop in enumerate((28, 22)):
        expected = [((c + (1 << drop >> 1)) >> drop) % (1 << (50 - drop)) for c in coefficients[k].tolist()]
        assert out[k].tolist() == expected
    assert out[0, :4].tolist() == [0, 0, 0, 1]


def test_primes_for_which_the_arithmetic_is_wrong_are_refused():
    with pytest.raises(ValueError, match="prime"):
        ring.field(DEGREE, (1 << 52) + 1)
    with pytest.raises(ValueError, match="primes"):
        ring.switch_ring(DEGREE, SPECIAL_PRIME, DATA_PRIME)
