"""Exact discrete Gaussian noise from the operating system's randomness: integers only, no floating point anywhere.

Danger: this is what stands between a release and the records behind it.  Noise that somebody can predict or repeat protects nothing,
so the only source that a release may use outside tests and simulations is `operating_system()`.

Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithms 1 to 3.
"""

from __future__ import annotations

import math
import os
import secrets
import struct
from collections.abc import Callable

WORDS_PER_READ = 512


class NoiseSource:
    """Uniform integers from a byte source; `simulated` says that the bytes are not secret, and is stamped on what they make."""

    def __init__(self, read: Callable[[int], bytes], *, simulated: bool) -> None:
        self._read = read
        self._words: list[int] = []
        self._process = os.getpid()
        self.simulated = simulated

    def below(self, bound: int) -> int:
        """Return a uniform integer in [0, bound), by rejection: a remainder would be biased."""
        bits = (bound - 1).bit_length()
        words = -(-bits // 64)
        if self._process != os.getpid() and not self.simulated:  # a forked child would draw its parent's words again
            self._process, self._words = os.getpid(), []
        while True:
            value = 0
            for _ in range(words):
                if not self._words:
                    self._words = list(struct.unpack(f"<{WORDS_PER_READ}Q", self._read(8 * WORDS_PER_READ)))
                value = value << 64 | self._words.pop()
            value >>= 64 * words - bits
            if value < bound:
                return value


def operating_system() -> NoiseSource:
    """Return the only source a real release may use."""
    return NoiseSource(secrets.token_bytes, simulated=False)


def _bernoulli_exp_fraction(numerator: int, denominator: int, source: NoiseSource) -> bool:
    """Return True with probability exp(-numerator/denominator), for 0 <= numerator <= denominator (algorithm 1, first case)."""
    k = 1
    while source.below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def bernoulli_exp(numerator: int, denominator: int, source: NoiseSource) -> bool:
    """Return True with probability exp(-numerator/denominator), numerator >= 0 (algorithm 1)."""
    while numerator > denominator:
        if not _bernoulli_exp_fraction(1, 1, source):
            return False
        numerator -= denominator
    return _bernoulli_exp_fraction(numerator, denominator, source)


def discrete_laplace(scale: int, source: NoiseSource) -> int:
    """Return an integer x with probability proportional to exp(-|x|/scale) (algorithm 2)."""
    while True:
        remainder = source.below(scale)
        if not _bernoulli_exp_fraction(remainder, scale, source):
            continue
        quotient = 0
        while _bernoulli_exp_fraction(1, 1, source):
            quotient += 1
        magnitude = remainder + scale * quotient
        negative = source.below(2) == 1
        if negative and magnitude == 0:  # zero would otherwise be drawn twice as often
            continue
        return -magnitude if negative else magnitude


def discrete_gaussian(variance: int, source: NoiseSource) -> int:
    """Return an integer x with probability proportional to exp(-x^2/(2 variance)) (algorithm 3)."""
    scale = math.isqrt(variance) + 1
    while True:
        candidate = discrete_laplace(scale, source)
        # Accept with probability exp(-(|x| - variance/scale)^2 / (2 variance)), as one exact fraction of integers.
        excess = abs(candidate) * scale - variance
        if bernoulli_exp(excess * excess, 2 * variance * scale * scale, source):
            return candidate
