"""The compiled kernels against two slow witnesses: Python's big integers, and Microsoft SEAL itself."""

import numpy as np
import pytest

from protocol.encryption import DATA_PRIME, DEGREE, SPECIAL_PRIME
from protocol.hazmat import ring
from protocol.hazmat.seal import SealKey, ciphertext_words, saved

RING = ring.switch_ring(DEGREE, DATA_PRIME, SPECIAL_PRIME)
SMALL = 16
SMALL_PRIME = 97  # 1 modulo 32


def words(seed: int, *shape: int, below: int = DATA_PRIME) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, below, shape, dtype=np.uint64)


def slow_ntt(coefficients: list[int], degree: int, prime: int) -> list[int]:
    """Evaluate the polynomial at every odd power of the smallest primitive root, in bit-reversed order, by the definition."""
    root = next(r for r in range(2, prime) if pow(r, degree, prime) == prime - 1)
    values = [sum(c * pow(root, (2 * i + 1) * t, prime) for t, c in enumerate(coefficients)) % prime for i in range(degree)]
    bits = degree.bit_length() - 1
    return [values[int(f"{i:0{bits}b}"[::-1], 2)] for i in range(degree)]


def test_the_transform_is_evaluation_at_the_roots():
    field = ring.field(SMALL, SMALL_PRIME)
    values = words(1, SMALL, below=SMALL_PRIME)
    expected = slow_ntt([int(v) for v in values], SMALL, SMALL_PRIME)
    ring.ntt(values, field)
    assert values.tolist() == expected


@pytest.mark.parametrize("field", [RING.data, RING.special], ids=["data prime", "special prime"])
def test_the_inverse_transform_gives_back_what_went_in(field):
    values = words(2, DEGREE, below=int(field.prime))
    edge = np.array([0, 1, int(field.prime) - 1], np.uint64)
    values[:3] = edge
    before = values.copy()
    ring.ntt(values, field)
    assert (values != before).any()
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


@pytest.mark.parametrize(("baby", "giant"), [(4, 1), (8, 3), (128, 1)])
def test_multiply_accumulate_equals_big_integer_arithmetic(baby, giant):
    blocks = DEGREE // ring.BLOCK
    steps, diagonals = words(3, blocks, baby, 2, ring.BLOCK), words(4, blocks, giant, baby, ring.BLOCK)
    steps[0, :, :, 0] = diagonals[0, :, :, 0] = DATA_PRIME - 1  # the largest words there are, all in one sum
    out = ring.multiply_accumulate(steps, diagonals, RING.data)
    for position in (0, 1, ring.BLOCK - 1, ring.BLOCK, DEGREE - 1):
        s, j = divmod(position, ring.BLOCK)
        for g in range(giant):
            for k in range(2):
                expected = sum(int(steps[s, b, k, j]) * int(diagonals[s, g, b, j]) for b in range(baby)) % DATA_PRIME
                assert int(out[g, k, position]) == expected


def seal_parts():
    from tenseal import sealapi

    key = SealKey(DEGREE, (DATA_PRIME, SPECIAL_PRIME))
    plaintext, ciphertext = sealapi.Plaintext(), sealapi.Ciphertext()
    key._encoder.encode(np.random.default_rng(5).standard_normal(DEGREE // 2).tolist(), 2.0**29, plaintext)
    key._encryptor.encrypt_symmetric(plaintext, ciphertext)
    return key, ciphertext, sealapi.Evaluator(key._context)


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_a_rotation_equals_seals_bit_for_bit(steps):
    from tenseal import sealapi

    from protocol.hazmat.seal import galois_key_words

    key, ciphertext, evaluator = seal_parts()
    element = pow(3, steps, 2 * DEGREE)
    seal_keys = sealapi.GaloisKeys()
    key._generator.create_galois_keys([element], seal_keys)
    switch = galois_key_words(saved(seal_keys), [element])[0]
    expected = sealapi.Ciphertext()
    evaluator.rotate_vector(ciphertext, steps, seal_keys, expected)
    source, out = np.ascontiguousarray(ciphertext_words(saved(ciphertext))[:, 0]), np.empty((2, DEGREE), np.uint64)
    ring.rotate(source, ring.automorphism(DEGREE, element), switch, RING, out)
    assert (out == ciphertext_words(saved(expected))[:, 0]).all()


def test_multiply_accumulate_equals_seals_bit_for_bit():
    from tenseal import sealapi

    key, ciphertext, evaluator = seal_parts()
    rng, total, plains = np.random.default_rng(6), None, []
    for _ in range(4):
        plaintext, product = sealapi.Plaintext(), sealapi.Ciphertext()
        key._encoder.encode(rng.standard_normal(DEGREE // 2).tolist(), 2.0**19, plaintext)
        evaluator.multiply_plain(ciphertext, plaintext, product)
        if total is None:
            total = product
        else:
            evaluator.add_inplace(total, product)
        plains.append(np.array([plaintext[i] for i in range(DEGREE)], np.uint64))
    source = np.ascontiguousarray(ciphertext_words(saved(ciphertext))[:, 0])
    blocks = DEGREE // ring.BLOCK
    steps = np.ascontiguousarray(np.stack([source] * 4).reshape(4, 2, blocks, ring.BLOCK).transpose(2, 0, 1, 3))
    diagonals = np.ascontiguousarray(np.stack(plains).reshape(1, 4, blocks, ring.BLOCK).transpose(2, 0, 1, 3))
    out = ring.multiply_accumulate(steps, diagonals, RING.data)[0]
    assert (out == ciphertext_words(saved(total))[:, 0]).all()


def test_primes_for_which_the_arithmetic_is_wrong_are_refused():
    with pytest.raises(ValueError, match="prime"):
        ring.field(DEGREE, (1 << 52) + 1)
    with pytest.raises(ValueError, match="primes"):
        ring.switch_ring(DEGREE, SPECIAL_PRIME, DATA_PRIME)
