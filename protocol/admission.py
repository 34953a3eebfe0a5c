"""Admission: which specifications a market takes and a querier believes (docs/protocol.md 6.5).

Everything that ranking uses is derived from the released integers, so a forger chooses integers.  `admit` refuses the choices that no
honest owner would make, up to a probability below 1e-4 a release; what it cannot see is listed in docs/sharp-edges.md.  It decides on
the *noisy* count alone: a refusal on the exact count would be a release of its own, without noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import NotAdmitted, UsageError
from protocol.privacy import MAX_EPSILON, AdapterGuarantee, Guarantee, noise_variance
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Specification

if TYPE_CHECKING:
    from protocol.cohort import CohortSeal
    from protocol.release import Release

STDS = 4.0  # how far from its expectation an honest norm may be


@dataclass(frozen=True, slots=True)
class AdmissionPolicy:
    """A market's choices; None asks for nothing.  The noise variance and the norms are the protocol's and never a choice."""

    largest_epsilon: float = 2.0
    delta: float | None = 1e-6  # exactly: figures at different deltas cannot be compared
    smallest_count: int | None = 50  # noisy number of privacy units
    largest_adapter_epsilon: float | None = None  # None: an adapter may come without a guarantee

    def __post_init__(self) -> None:
        if not 0 < self.largest_epsilon <= MAX_EPSILON:
            raise UsageError(f"largest epsilon: expected a number in (0, {MAX_EPSILON:g}], got {self.largest_epsilon:g}")
        adapters = self.largest_adapter_epsilon
        if adapters is not None and not 0 < adapters <= MAX_EPSILON:
            raise UsageError(f"largest adapter epsilon: expected a number in (0, {MAX_EPSILON:g}], got {adapters:g}")
        if self.delta is not None and not 1e-12 <= self.delta <= 1e-2:
            raise UsageError(f"delta: expected a number in [1e-12, 0.01], got {self.delta:g}")
        if self.smallest_count is not None and not 1 <= self.smallest_count < 1 << 20:
            raise UsageError(f"smallest count: expected a whole number from 1 to {(1 << 20) - 1}, got {self.smallest_count}")


# What a simulation takes: every epsilon, every count.  Variance and norms are checked as everywhere.
LENIENT = AdmissionPolicy(MAX_EPSILON, None, None)


def admit_release(release: Release, policy: AdmissionPolicy) -> None:
    """Return nothing if a release may stand in a ranking: its specification by its integers, its adapter by the guarantee stated."""
    admit(release.specification, policy, release.cohort)
    if release.adapter is not None:
        require_adapter(release.adapter.guarantee, policy)


def admit(specification: Specification, policy: AdmissionPolicy, cohort: CohortSeal | None = None) -> None:
    """Return nothing if the specification may stand in a ranking; raise NotAdmitted naming the first rule that it breaks.

    cohort: where several owners released it together, whose shares of noise are then all there.
    An honest specification of n units is admitted with probability at least 99.9 % if n is 3.1 standard deviations of the noisy count
    (17.4 units at epsilon 1, delta 1e-6) above the smallest count; see test_honest_specifications_are_admitted.
    """
    guarantee, variance = specification.guarantee, specification.noise_variance
    require_claim(guarantee, policy)
    least = noise_variance(guarantee, NORM_SQUARED) if cohort is None else cohort.noise_variance(guarantee)
    # The allowance covers another implementation's last digits of sigma, and nothing that could be of use.
    if not least <= variance <= least + (least >> 20) + 1:
        raise NotAdmitted(f"noise_variance: epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g} means {least}, got {variance}")
    sums = [int(value) for value in specification.noisy_sums]
    count = sums[0] / COUNT_STEP
    if policy.smallest_count is not None and count < policy.smallest_count:
        raise NotAdmitted(
            f"count: expected at least {policy.smallest_count} units after noise, got {count:.0f}",
            hint="a specification of few units says little and is close to everything",
        )
    if guarantee.delta * max(count, 1.0) >= 1:
        raise NotAdmitted(f"delta: expected less than one by the {count:.0f} units it is said to cover, got {guarantee.delta:g}")
    dimension, std = specification.dimension, math.sqrt(variance)
    norm_squared = sum(value * value for value in sums[1:])
    longest = FEATURE_SCALE * (max(count, 0.0) + STDS * std / COUNT_STEP) + std * (math.sqrt(dimension) + STDS)
    if norm_squared > longest**2:
        raise NotAdmitted("sums: longer than unit features of so many units and their noise can be")
    if norm_squared < variance * (dimension - STDS * math.sqrt(2 * dimension)):
        raise NotAdmitted("sums: shorter than the noise alone would be; noise was left out")


def require_claim(guarantee: Guarantee, policy: AdmissionPolicy) -> None:
    """Raise NotAdmitted unless the policy takes releases under this guarantee: what an owner can know before anything is charged."""
    if guarantee.epsilon > policy.largest_epsilon:
        raise NotAdmitted(
            f"epsilon: expected at most {policy.largest_epsilon:g}, got {guarantee.epsilon:g}",
            hint="a large epsilon buys confidence that others paid for; the market's policy sets the limit",
        )
    if policy.delta is not None and guarantee.delta != policy.delta:
        raise NotAdmitted(f"delta: expected {policy.delta:g}, got {guarantee.delta:g}", hint="the market's policy sets the delta of all")


def require_adapter(promise: AdapterGuarantee, policy: AdmissionPolicy) -> None:
    """Raise NotAdmitted unless the policy takes adapters under this promise: what an owner can know before anything is trained."""
    if policy.largest_adapter_epsilon is None:
        return
    if isinstance(promise, str):
        raise NotAdmitted(
            f"adapter: expected a guarantee of epsilon {policy.largest_adapter_epsilon:g} or less, got {promise}",
            hint="`veilmart node publish --epsilon-adapter E` trains with one, --no-train publishes a specification alone",
        )
    guarantee = promise.guarantee
    if guarantee.epsilon > policy.largest_adapter_epsilon or (policy.delta is not None and guarantee.delta > policy.delta):
        delta = "" if policy.delta is None else f" at delta {policy.delta:g} or less"
        raise NotAdmitted(
            f"adapter: expected epsilon {policy.largest_adapter_epsilon:g} or less{delta}, got {guarantee.epsilon:g} at {guarantee.delta:g}"
        )
