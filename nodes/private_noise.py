"""Gaussian noise and Poisson batches for private training, from the operating system's randomness alone.

Danger: this is what stands between an adapter and the records behind it.  No seed of any library reaches it, and nothing is kept
between two calls: each one keys a ChaCha20 stream with 32 fresh bytes of the operating system, so neither a fork nor a restart can
repeat a draw.

The noise is floating point (docs/privacy.md, P5): uniforms of 53 bits, Box and Muller in double precision, four draws added up.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

DRAWS = 4  # added up and halved: one sum has far too many preimages to be searched (Holohan and Braghin 2021)

NormalSource = Callable[[int], NDArray[np.float64]]  # how many, to independent standard normals
Sampler = Callable[[int, float], NDArray[np.bool_]]  # how many units and the rate, to who is in the batch


def keystream(size: int) -> bytes:
    """Return bytes of a ChaCha20 stream under a fresh key."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    return Cipher(ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None).encryptor().update(bytes(size))


def normals(count: int) -> NDArray[np.float64]:
    """Return independent standard normals."""
    pairs = DRAWS * ((count + 1) // 2)
    words = np.frombuffer(keystream(16 * pairs), "<u8").reshape(2, pairs) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((words[0] + 1) * 2.0**-53))  # in (0, 1]: the logarithm of 0 would be infinite
    angle = words[1] * (2.0**-53 * 2 * np.pi)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    summed: NDArray[np.float64] = both.reshape(DRAWS, -1).sum(0) / DRAWS**0.5
    return summed[:count]


def poisson_batch(count: int, rate: float) -> NDArray[np.bool_]:
    """Return which of `count` units are in a batch, each with probability `rate` on its own, rounded up by at most 2^-53."""
    words = np.frombuffer(keystream(8 * count), "<u8") >> np.uint64(11)
    return words * 2.0**-53 < rate
