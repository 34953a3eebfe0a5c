"""Masks of secure aggregation: streams of words from a key that two members agree on, and boxes for the shares between them.

Danger: a stream hides one vector, once.  A second vector under the same stream gives the difference of the two away, so every key here
is of one round, one pair and one purpose: `info` says which, and ephemeral keys are never used in a second round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.errors import FormatError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

KEY_BYTES, BOX_OVERHEAD = 32, 16
ONE_USE = bytes(16)  # nonce and counter of ChaCha20: the key is fresh, so nothing has to tell two uses of it apart


def agreed_key(private: X25519PrivateKey, public: bytes, info: bytes) -> bytes:
    """Return the key of 32 bytes that the holders of two X25519 keys have for a purpose; raise FormatError for what is no public key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of small order: whoever sent it would know the key that everybody gets
        raise FormatError("cohort: expected an X25519 public key") from None
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(shared)


def stream(key: bytes, count: int) -> NDArray[np.uint32]:
    """Return `count` words of the ChaCha20 stream of a key that is used for this alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    data = Cipher(ChaCha20(key, ONE_USE), mode=None).encryptor().update(bytes(4 * count))
    return np.frombuffer(data, "<u4").astype(np.uint32)


def close_box(key: bytes, content: bytes, context: bytes) -> bytes:
    """Return content under ChaCha20-Poly1305 with a key that closes this box alone, bound to a context."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(ONE_USE[:12], content, context)


def open_box(key: bytes, box: bytes, context: bytes) -> bytes | None:
    """Return what a box holds, or None for one of another key or context, or that was changed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(ONE_USE[:12], box, context)
    except InvalidTag:
        return None
