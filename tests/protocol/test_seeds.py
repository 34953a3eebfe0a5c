"""Seeds expanded without SEAL give the polynomials that SEAL makes of them, also where words are rejected."""

import numpy as np
import pytest

from protocol.encryption import PRESETS
from protocol.errors import FormatError
from protocol.hazmat import seeds
from protocol.hazmat.seal import SealKey, _private_file, ciphertext_words, container_body, galois_key_bodies, saved, seeded_words

NAMES = [parameters.name for parameters in PRESETS]
# Primes of 60 bits of which 2**64 is far from a multiple: one word in 17 is rejected, some 480 for each prime at degree 8192, more than
# one buffer of 512 words holds.  At the primes of the presets one in 10**10 is.
REJECTING = (1_085_129_720_135_958_529, 1_085_129_720_135_909_377, 1_085_129_720_135_811_073)


def seeded_and_whole(key: SealKey, made, empty) -> tuple[bytes, bytes]:
    """Return what SEAL saves for something it has just made, seeded, and for the same thing after it has read it back."""
    with _private_file() as path:
        made.save(str(path))
        seeded = path.read_bytes()
        empty.load(key._context, str(path))
    return seeded, saved(empty)


def a_seeded_ciphertext(key: SealKey) -> tuple[np.ndarray, bytes, np.ndarray]:
    from tenseal import sealapi

    made = key._encryptor.encrypt_symmetric(key._encoded(np.full(key._degree // 2, 0.5), 2.0**20))
    seeded, whole = seeded_and_whole(key, made, sealapi.Ciphertext())
    return *seeded_words(container_body(seeded)), ciphertext_words(container_body(whole))


@pytest.mark.parametrize("parameters", PRESETS, ids=NAMES)
def test_seeded_ciphertexts_and_keys_are_seals_bit_for_bit(parameters):
    from tenseal import sealapi

    primes = (parameters.data_prime, parameters.special_prime)
    for _ in range(5):
        key = SealKey(parameters.degree, primes)
        first, seed, whole = a_seeded_ciphertext(key)
        assert (first == whole[0]).all()
        assert (seeds.expand(seed, primes[:1], parameters.degree) == whole[1]).all()
        elements = (3, pow(3, 16, 2 * parameters.degree))
        made = key._generator.create_galois_keys(list(elements))
        seeded, whole_keys = (galois_key_bodies(c) for c in seeded_and_whole(key, made, sealapi.GaloisKeys()))
        for element in elements:
            first, seed = seeded_words(seeded[element])
            whole = ciphertext_words(whole_keys[element])
            assert (first == whole[0]).all()
            assert (seeds.expand(seed, primes, parameters.degree) == whole[1]).all()


def test_a_seed_with_a_thousand_rejected_words_expands_as_in_seal():
    key = SealKey(8192, REJECTING)
    for _ in range(3):
        _, seed, whole = a_seeded_ciphertext(key)
        drawn = seeds._stream(seed, 0, 32).reshape(2, 8192)
        rejected = [
            seeds._rejected(row, np.uint64((1 << 64) - 1 - ((1 << 64) - 1) % p - 1)) for row, p in zip(drawn, REJECTING, strict=False)
        ]
        assert sum(rejected) > 512, "the replacements cross the end of a buffer"
        assert (seeds.expand(seed, REJECTING[:2], 8192) == whole[1]).all()


def test_the_limit_is_seals_word_for_word():
    """SEAL refuses one word more than it must, the last multiple of the prime less one: the sampler follows it."""
    prime = 1_125_899_906_826_241
    limit = (1 << 64) - 1 - ((1 << 64) - 1) % prime - 1
    spare = seeds._Spare(bytes(64), 0, np.array([limit, limit + 1, limit - 1], np.uint64))
    assert spare.below(limit) == limit - 1


def test_every_word_reduces_exactly():
    prime = 1_125_899_906_826_241
    words = np.concatenate([
        np.random.default_rng(1).integers(0, 1 << 64, 5_000, dtype=np.uint64),
        np.array([0, 1, prime - 1, prime, prime + 1, 2 * prime - 1, (1 << 64) - 1, (1 << 64) // prime * prime - 1], np.uint64),
    ])  # fmt: skip
    expected = [int(w) % prime for w in words]
    seeds._reduce(words, np.uint64(prime), 1.0 / prime)
    assert words.tolist() == expected


@pytest.mark.parametrize("size", [0, 63, 65])
def test_a_seed_of_another_length_is_refused(size):
    with pytest.raises(FormatError, match="seed"):
        seeds.expand(bytes(size), (97,), 16)
