"""Guarantees: what an epsilon means here, and how much noise it takes.

Everything is stated for add-or-remove-one neighbours; replacing one record is two such steps.
The discrete Gaussian is accounted as a continuous one whose variance is smaller by SMOOTHING^2 (docs/privacy.md, P2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from protocol.errors import UsageError

SMOOTHING_SQUARED = 4  # tau = 2: by Poisson summation the rounding error is below 1.1e-34 a coordinate
MAX_EPSILON = 20.0


class NeighbouringRelation(StrEnum):
    """Which data sets count as neighbours."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"


class PrivacyUnit(StrEnum):
    """What one epsilon protects."""

    RECORD = "record"


@dataclass(frozen=True, slots=True)
class Guarantee:
    """An epsilon with everything without which it means nothing."""

    epsilon: float
    delta: float
    relation: NeighbouringRelation = NeighbouringRelation.ADD_OR_REMOVE_ONE
    unit: PrivacyUnit = PrivacyUnit.RECORD

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= MAX_EPSILON:
            raise UsageError(f"epsilon: expected a number in (0, {MAX_EPSILON:g}], got {self.epsilon:g}")
        if not 1e-12 <= self.delta <= 1e-2:
            raise UsageError(f"delta: expected a number in [1e-12, 0.01], got {self.delta:g}", hint="1e-6 is the default")


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def delta_at(epsilon: float, multiplier: float) -> float:
    """Return the exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8).

    multiplier: noise standard deviation divided by sensitivity.
    """
    half, shift = 1 / (2 * multiplier), epsilon * multiplier
    # Far in the tail the second factor underflows to 0 long before exp(epsilon), epsilon <= 20, could overflow.
    return max(_normal_cdf(half - shift) - math.exp(epsilon) * _normal_cdf(-half - shift), 0.0)


def noise_multiplier(epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier for which delta_at(epsilon, multiplier) <= delta."""
    low, high = 1e-3, 1e5
    if delta_at(epsilon, high) > delta:
        raise UsageError(f"epsilon {epsilon:g} and delta {delta:g}: too small together for any useful noise")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if delta_at(epsilon, middle) > delta else (low, middle)
    return high


def epsilon_at(delta: float, multiplier: float) -> float:
    """Return the smallest epsilon that a noise multiplier gives at this delta; infinity beyond MAX_EPSILON."""
    if delta_at(MAX_EPSILON, multiplier) > delta:
        return math.inf
    low, high = 0.0, MAX_EPSILON
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle, multiplier) > delta else (low, middle)
    return high


def noise_variance(guarantee: Guarantee, norm_squared: int) -> int:
    """Return s^2 = ceil(multiplier^2 * norm_squared) + 4, the integer variance of the discrete Gaussian.

    norm_squared: squared L2 sensitivity of an integer sum under add-or-remove-one.
    """
    return math.ceil(noise_multiplier(guarantee.epsilon, guarantee.delta) ** 2 * norm_squared) + SMOOTHING_SQUARED


def effective_multiplier(variance: int, norm_squared: int) -> float:
    """Return the multiplier with which a discrete Gaussian of this variance is accounted: sqrt((s^2 - 4) / Delta^2)."""
    return math.sqrt((variance - SMOOTHING_SQUARED) / norm_squared)


def composed_epsilon(multipliers: list[float], delta: float) -> float:
    """Return the epsilon of several Gaussian releases together: exact, since mu_total^2 = sum of mu_i^2 with mu = 1/multiplier.

    Holds for adaptively chosen releases too (Dong, Roth, Su 2019, corollary 2; as a filter: Smith and Thakurta 2022).
    """
    precision = sum(multiplier**-2 for multiplier in multipliers)
    return epsilon_at(delta, precision**-0.5) if precision else 0.0
