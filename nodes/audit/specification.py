"""An attack on the mechanism that makes specifications: how much privacy can be shown to be lost, against what is claimed.

In each release every canary (a record whose feature is one unit axis) is in or out by a fair coin of the operating system.  The attacker
knows everything else, subtracts it, and looks at one coordinate.  Canaries share no coordinate: the count, which all records share, is
not looked at.  So all tests are independent, and a lower bound on mu is strict; it can reach 4096/4222.1 = 0.970 of the mechanism's mu.
The releases of an audit are drawn through the same two functions as the guard's (`quantise`, `estimate`) and leave this process never.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nodes.audit.bounds import CONFIDENCE, epsilon_of, expected_bound, mu_lower_bound, mu_of
from protocol.errors import FeatureNormError, UsageError
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.specification import FEATURE_SCALE, NORM_SQUARED, estimate, quantise

Mechanism = Callable[[NDArray[np.float64], Guarantee], NDArray[np.generic]]
"""Features (n, D) and a guarantee to the sums (D+1,) that would be published, count first."""
Progress = Callable[[str, int, int], None]
LENGTH_OF_A_LONG_CANARY = 2.0

# A mechanism's noise may depend on no seed: this program sets every seed there is, draws one release of nothing, and prints it.
DRAW = """
import random, sys
random.seed(0)
import numpy
numpy.random.seed(0)
{import_mechanism}
from protocol.privacy import Guarantee
sums = mechanism(numpy.zeros((0, int(sys.argv[1]))), Guarantee(1.0, 1e-6))
print(" ".join(str(value) for value in sums.tolist()))
"""
OURS = "from nodes.audit.specification import our_mechanism as mechanism"


def our_mechanism(features: NDArray[np.float64], guarantee: Guarantee) -> NDArray[np.generic]:
    """Return the sums of a release, made as the guard makes them."""
    return estimate(quantise(features), bytes(32), guarantee, operating_system()).noisy_sums


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    holds: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class SpecificationAudit:
    """What an audit found; refuted if one check fails."""

    guarantee: Guarantee
    releases: int
    tests: int  # of each kind: canary present, canary absent
    confidence: float
    epsilon_lower_bound: float
    expected_lower_bound: float  # for an honest mechanism, as said beforehand
    checks: tuple[Check, ...]

    @property
    def ratio(self) -> float:
        """Shown over claimed."""
        return self.epsilon_lower_bound / self.guarantee.epsilon

    @property
    def refuted(self) -> bool:
        """Whether the claim is shown to be false."""
        return not all(check.holds for check in self.checks)


def expected_epsilon(guarantee: Guarantee, dimension: int, releases: int, confidence: float = CONFIDENCE) -> float:
    """Return about what lower bound on epsilon so many releases will show for an honest mechanism."""
    visible = FEATURE_SCALE / NORM_SQUARED**0.5
    mu = expected_bound(visible * mu_of(guarantee.epsilon, guarantee.delta), releases * dimension // 2, confidence)
    return epsilon_of(mu, guarantee.delta)


def audit_specification(
    guarantee: Guarantee,
    dimension: int,
    releases: int,
    *,
    records: NDArray[np.float64] | None = None,
    mechanism: Mechanism = our_mechanism,
    import_mechanism: str = OURS,
    confidence: float = CONFIDENCE,
    on_progress: Progress = lambda stage, done, of: None,
) -> SpecificationAudit:
    """Return what so many releases through the mechanism show about its claim.

    records: features (n, D) of the owner's own records, in every release beside the canaries.  import_mechanism: a line that names the
    mechanism for another process.  Raises UsageError where there are too few tests for any bound.
    """
    if releases * dimension < 400:
        raise UsageError(f"audit: expected at least {400 // dimension + 1} releases, got {releases}")
    base = np.zeros((0, dimension)) if records is None else records
    whole = np.issubdtype(mechanism(base, guarantee).dtype, np.integer)
    checks = [
        Check(
            "integers",
            whole,
            "sums are whole numbers" if whole else "sums are floating-point numbers: their last digits leak (Mironov 2012)",
        )
    ]
    bounded, evidence = bounds(mechanism, base, guarantee)
    checks.append(Check("bounded", bounded, evidence))
    absent, present = _statistics(mechanism, base, guarantee, releases, on_progress)
    mu = mu_lower_bound(absent, present, confidence)
    epsilon, size = epsilon_of(mu, guarantee.delta), min(len(absent), len(present))
    shown = f"epsilon is at least {epsilon:.3f} with confidence {confidence:g}; claimed {guarantee.epsilon:g}"
    checks.append(Check("empirical epsilon", epsilon <= guarantee.epsilon, shown))
    checks.append(independent(dimension, import_mechanism))
    return SpecificationAudit(
        guarantee, releases, size, confidence, epsilon, expected_epsilon(guarantee, dimension, releases, confidence), tuple(checks)
    )


def _statistics(
    mechanism: Mechanism, base: NDArray[np.float64], guarantee: Guarantee, releases: int, on_progress: Progress
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the statistics of tests whose canary was out, and in, in units of a canary's own length."""
    dimension = base.shape[1]
    canaries = np.eye(dimension)
    known = quantise(base).rows.sum(axis=0)[1:].astype(np.float64)
    absent, present = [], []
    for number in range(releases):
        coins = np.frombuffer(secrets.token_bytes(dimension), np.uint8) & 1
        sums = np.asarray(mechanism(np.concatenate([base, canaries[coins == 1]]), guarantee), np.float64)
        statistics = (sums[1:] - known) / FEATURE_SCALE
        absent.append(statistics[coins == 0])
        present.append(statistics[coins == 1])
        if number % 100 == 99:
            on_progress("releases", number + 1, releases)
    return np.concatenate(absent), np.concatenate(present)


def bounds(mechanism: Mechanism, base: NDArray[np.float64], guarantee: Guarantee) -> tuple[bool, str]:
    """Return whether a record of twice the allowed length is refused or cut down, and how that was seen."""
    dimension = base.shape[1]
    long = LENGTH_OF_A_LONG_CANARY * np.eye(dimension)
    try:
        sums = np.asarray(mechanism(np.concatenate([base, long]), guarantee), np.float64)
    except FeatureNormError:
        return True, "a vector of twice the allowed length is refused"
    known = quantise(base).rows.sum(axis=0)[1:]
    # All axes at once: the mean over D coordinates has a deviation of sigma/(4096 sqrt D).
    length = float(((sums[1:] - known) / FEATURE_SCALE).mean())
    error = NORM_SQUARED**0.5 / FEATURE_SCALE / mu_of(guarantee.epsilon, guarantee.delta) / dimension**0.5
    if length - 4 * error > 1:
        return False, f"a vector of twice the allowed length adds {length:.2f} of it to the sums"
    return True, "a vector of twice the allowed length is not seen to add more than the allowed one"


def independent(dimension: int, import_mechanism: str) -> Check:
    """Check that two processes that seed every generator alike draw other noise."""
    program = DRAW.format(import_mechanism=import_mechanism)
    drawn = [
        subprocess.run([sys.executable, "-c", program, str(dimension)], capture_output=True, text=True, timeout=120, check=False).stdout
        for _ in range(2)
    ]
    if not all(drawn):
        return Check("independent", False, "the mechanism does not run in a process of its own")
    same = drawn[0] == drawn[1]
    return Check("independent", not same, "two processes with equal seeds draw " + ("the same noise" if same else "other noise"))
