"""Secret keys, encryption and decryption by Microsoft SEAL: the only module that touches `tenseal`.  Runs at the querier alone.

Raw uint64 arrays go in and out: (polynomials, limbs, n) or (2, n), NTT order, every word below its prime.
Three dangers, each met here:

* SEAL 4.3, inside tenseal 0.3.18, lacks the hardening of 4.4.0 against hostile files.  No byte from the network is parsed by SEAL:
  `SealKey.decrypt` takes an array whose shape and range its caller has checked, and wraps it in a header that SEAL wrote itself.
* `sealapi` saves and loads by path only.  The files live in a directory that only this user can enter, in memory where the system
  has a memory file system, and are gone when the call returns or raises.  The secret key is never written.
* `create_galois_keys([...])` takes Galois *elements*, not rotation steps: [1] would silently make the identity key.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_MEMORY_DIRECTORY: Final = "/dev/shm"
_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version major and minor, compression, reserved, size with this header
_MAGIC: Final = 0xA15E
_STORED, _ZSTANDARD = 0, 2  # compression modes
_BLAKE2XB: Final = 1  # the generator that a seed is for
SEED_BYTES: Final = 64
_PARMS_ID_BYTES: Final = 32
_SHAPE = struct.Struct("<QQQ")  # of a ciphertext: polynomials, degree, limbs
_SHAPE_AT: Final = _PARMS_ID_BYTES + 1  # after the parameter id and the NTT flag
_SCALE_AT: Final = _SHAPE_AT + _SHAPE.size


def context(degree: int, primes: Sequence[int]) -> Any:
    """Return SEAL's context for CKKS over the given primes, the special prime last; SEAL itself enforces 128-bit security."""
    from tenseal import sealapi

    parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(degree)
    parameters.set_coeff_modulus([sealapi.Modulus(prime) for prime in primes])
    made = sealapi.SEALContext(parameters, True, sealapi.SEC_LEVEL_TYPE.TC128)
    if not made.parameters_set():
        raise RuntimeError(f"SEAL refuses degree {degree} with primes {list(primes)}: {made.parameters_error_message()}")
    return made


@contextmanager
def _private_file() -> Iterator[Path]:
    """Yield a path that only this user can reach; file and directory are removed on the way out, also after an error."""
    memory = _MEMORY_DIRECTORY if os.access(_MEMORY_DIRECTORY, os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="veilmart-", dir=memory) as directory:
        yield Path(directory, "object")


def saved(thing: Any) -> bytes:
    """Return the container that SEAL saves for `thing`: a ciphertext, plaintext or set of keys that SEAL made."""
    with _private_file() as path:
        thing.save(str(path))
        return path.read_bytes()


def container_body(container: bytes) -> bytes:
    """Return what a container written by SEAL holds, uncompressed."""
    magic, header_bytes, _, _, compression, _, size = _HEADER.unpack_from(container)
    if magic != _MAGIC or header_bytes != _HEADER.size or size != len(container) or compression not in (_STORED, _ZSTANDARD):
        raise RuntimeError("SEAL saved a container of unknown form: this tenseal release is not supported")
    if compression == _STORED:
        return container[_HEADER.size :]
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj().decompress(container[_HEADER.size :])


def _stored(body: bytes, like: bytes) -> bytes:
    """Return an uncompressed container of `body`, of the same SEAL version as the container `like`."""
    magic, header_bytes, major, minor, _, reserved, _ = _HEADER.unpack_from(like)
    return _HEADER.pack(magic, header_bytes, major, minor, _STORED, reserved, _HEADER.size + len(body)) + body


def ciphertext_words(body: bytes) -> NDArray[np.uint64]:
    """Return the words of a ciphertext's body as (polynomials, limbs, n); it must not be seeded."""
    polynomials, degree, limbs = _SHAPE.unpack_from(body, _SHAPE_AT)
    count = polynomials * degree * limbs
    words = np.frombuffer(body, "<u8", count, len(body) - 8 * count)
    return words.astype(np.uint64).reshape(polynomials, limbs, degree)


def seeded_words(body: bytes) -> tuple[NDArray[np.uint64], bytes]:
    """Return the first polynomial of a seeded ciphertext's body, (limbs, n), and the seed of the second."""
    polynomials, degree, limbs = _SHAPE.unpack_from(body, _SHAPE_AT)
    seed_at = len(body) - SEED_BYTES
    if polynomials != 2 or body[seed_at - 1] != _BLAKE2XB:
        raise RuntimeError("SEAL saved a seed of unknown form: this tenseal release is not supported")
    end = seed_at - 1 - _HEADER.size
    words = np.frombuffer(body, "<u8", degree * limbs, end - 8 * degree * limbs)
    return words.astype(np.uint64).reshape(limbs, degree), body[seed_at:]


def galois_key_bodies(container: bytes) -> dict[int, bytes]:
    """Return the bodies of saved Galois keys by element: ciphertexts, seeded if the keys were saved as SEAL made them."""
    body = container_body(container)
    found: dict[int, bytes] = {}
    (lists,) = struct.unpack_from("<Q", body, _PARMS_ID_BYTES)
    at = _PARMS_ID_BYTES + 8
    for index in range(lists):
        (keys,) = struct.unpack_from("<Q", body, at)
        at += 8
        for _ in range(keys):  # one for each data prime; these presets have one
            size = _HEADER.unpack_from(body, at)[-1]
            found[2 * index + 1] = container_body(body[at : at + size])  # SEAL's list index i holds element 2 i + 1
            at += size
    return found


class SealKey:
    """One fresh secret key.  It stays inside SEAL's memory: it is not written, printed, copied or pickled."""

    def __init__(self, degree: int, primes: Sequence[int]) -> None:
        """Draw a ternary secret from the operating system's randomness."""
        from tenseal import sealapi

        self._context = context(degree, primes)
        self._generator = sealapi.KeyGenerator(self._context)
        self._encoder = sealapi.CKKSEncoder(self._context)
        secret = self._generator.secret_key()
        self._encryptor = sealapi.Encryptor(self._context, secret)
        self._decryptor = sealapi.Decryptor(self._context, secret)
        self._degree = degree

    def __repr__(self) -> str:
        return "<SealKey: secret>"

    def __reduce__(self) -> Any:
        raise TypeError("a secret key is neither copied nor pickled")

    def galois_keys(self, elements: Sequence[int]) -> list[tuple[NDArray[np.uint64], bytes]]:
        """Return a fresh public switching key for each Galois element: its first polynomial, (2 limbs, n), and the seed of the second."""
        bodies = galois_key_bodies(saved(self._generator.create_galois_keys(list(elements))))
        return [seeded_words(bodies[element]) for element in elements]

    def encrypt(self, slots: NDArray[np.float64], scale: float) -> tuple[NDArray[np.uint64], bytes]:
        """Return a fresh symmetric encryption of n / 2 real slots: its first polynomial, (n,), and the seed of the second."""
        words, seed = seeded_words(container_body(saved(self._encryptor.encrypt_symmetric(self._encoded(slots, scale)))))
        return words[0], seed

    def _encoded(self, slots: NDArray[np.float64], scale: float) -> Any:
        from tenseal import sealapi

        plaintext = sealapi.Plaintext()
        self._encoder.encode(slots.tolist(), scale, plaintext)  # lists: 1.7 times faster than arrays
        return plaintext

    def decrypt(self, ciphertexts: NDArray[np.uint64], scale: float) -> NDArray[np.complex128]:
        """Return the complex slots, (k, n / 2), of checked ciphertexts (k, 2, n) at the given scale."""
        from tenseal import sealapi

        # SEAL's own header for a ciphertext of this key, parameter id included; only the scale is another.
        blank = sealapi.Ciphertext()
        self._encryptor.encrypt_symmetric(self._encoded(np.zeros(self._degree // 2), 1.0), blank)
        template = saved(blank)
        head = bytearray(container_body(template)[: -8 * 2 * self._degree])
        struct.pack_into("<d", head, _SCALE_AT, scale)
        slots = np.empty((len(ciphertexts), self._degree // 2), np.complex128)
        with _private_file() as path:
            for i, words in enumerate(ciphertexts):
                path.write_bytes(_stored(bytes(head) + words.astype("<u8").tobytes(), like=template))
                ciphertext, plaintext = sealapi.Ciphertext(), sealapi.Plaintext()
                ciphertext.load(self._context, str(path))
                self._decryptor.decrypt(ciphertext, plaintext)
                slots[i] = self._encoder.decode_complex(plaintext)
        return slots
