"""Shamir's secret sharing over the prime field of 2^521 - 1 (Shamir 1979): `threshold` shares give the secret, fewer say nothing of it.

Danger: a share is as secret as the secret.  Coefficients come from the operating system; one that could be guessed gives the secret to
fewer shares than the threshold.  Python's integers take a time that depends on their values: split and join where nobody can measure it.
A share that was changed gives another secret and no error, so whoever joins compares the result with something that it knows.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = (1 << 521) - 1  # the field of NIST's P-521: a Mersenne prime above every secret of 32 bytes
SECRET_BYTES, SHARE_BYTES = 32, 66


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Return `count` shares of a secret of 32 bytes, that of place x being a random polynomial of degree threshold - 1 at x + 1."""
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= count:
        raise ValueError(f"expected a secret of {SECRET_BYTES} bytes and a threshold from 1 to {count}, got {len(secret)} and {threshold}")
    polynomial = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):  # the secret lies at 0, which is nobody's
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "little"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes | None:
    """Return the secret of shares by their places, by Lagrange's formula at 0; None where they are those of no secret.

    With fewer shares than the threshold, or a changed one, the result is another secret or None: compare it.
    """
    secret = 0
    for place, share in shares.items():
        above = below = 1
        for other in shares:
            if other != place:
                above = above * (other + 1) % PRIME
                below = below * (other - place) % PRIME
        secret += int.from_bytes(share, "little") * above * pow(below, -1, PRIME)
    secret %= PRIME
    return None if secret >> 8 * SECRET_BYTES else secret.to_bytes(SECRET_BYTES, "little")
