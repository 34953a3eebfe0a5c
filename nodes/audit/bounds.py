"""From counts of a distinguishing test to a lower bound on epsilon that holds with a stated confidence.

A mechanism that is mu-Gaussian differentially private lets no test have TPR > Phi(Phi^-1(FPR) + mu) (Dong, Roth, Su 2019, section 2.2).
So whoever shows that a test has at least this TPR at at most that FPR has shown a lower bound on mu, and with it on epsilon at any delta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import UsageError
from protocol.privacy import epsilon_at, noise_multiplier

CONFIDENCE = 0.999
LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # of false positives among which a threshold is chosen
CHOOSING = 0.1  # share of the tests that chooses it, and is not counted afterwards


def clopper_pearson(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Return an interval that holds a probability with at least this confidence (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, trials - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, trials - successes)) if successes < trials else 1.0
    return low, high


def mu_lower_bound(absent: NDArray[np.float64], present: NDArray[np.float64], confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on mu from the statistics of independent tests, each larger where the canary is present.

    Never below 0; holds with at least `confidence`.
    """
    from scipy.stats import norm

    false_high, true_low = bounded_rates(absent, present, confidence)
    if true_low <= 0 or false_high >= 1:
        return 0.0
    return max(float(norm.ppf(true_low) - norm.ppf(false_high)), 0.0)


def bounded_rates(absent: NDArray[np.float64], present: NDArray[np.float64], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return a rate of false positives, and one of true positives that some test reaches at it, from independent tests of each kind.

    The threshold is chosen on the first tenth of the tests; rates are bounded on the others, each side with half the doubt, so both
    bounds hold together with at least `confidence`.
    """
    from scipy.stats import norm

    size = min(len(absent), len(present))
    if size < 100:
        raise UsageError(f"audit: expected at least 100 tests of each kind, got {size}", hint="more releases, canaries or records")
    first = max(int(CHOOSING * size), 50)
    best: tuple[float, float] | None = None
    for level in LEVELS:
        threshold = float(np.quantile(absent[:first], 1 - level))
        false, true = (float(np.clip((part[:first] >= threshold).mean(), 1 / first, 1 - 1 / first)) for part in (absent, present))
        errors = sum(math.sqrt(rate * (1 - rate) / size) / float(norm.pdf(norm.ppf(rate))) for rate in (false, true))
        value = float(norm.ppf(true) - norm.ppf(false)) - 3 * errors
        if best is None or value > best[0]:
            best = value, threshold
    assert best is not None
    rest_absent, rest_present = absent[first:], present[first:]
    # Each of the two one-sided bounds errs with (1 - confidence)/2, both together with at most 1 - confidence.
    true_low, _ = clopper_pearson(int((rest_present >= best[1]).sum()), len(rest_present), confidence)
    _, false_high = clopper_pearson(int((rest_absent >= best[1]).sum()), len(rest_absent), confidence)
    return false_high, true_low


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon from guesses about canaries that one run drew by fair coins, so many of them right.

    Steinke, Nasr, Jagielski 2023, theorem 5.2: the number of right guesses is at most binomial with e^epsilon/(1 + e^epsilon), up to
    2 * canaries * delta * alpha.  Nothing is assumed about how canaries influence one another.
    """
    low, high = 0.0, 20.0
    if _one_run_doubt(canaries, guesses, right, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if _one_run_doubt(canaries, guesses, right, middle, delta) > 1 - confidence else (middle, high)
    return low


def _one_run_doubt(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of so many right guesses where the run keeps this epsilon."""
    from scipy.stats import binom

    if not right:
        return 1.0
    chance = 1 / (1 + math.exp(-epsilon))
    fewer = binom.pmf(np.arange(right - 1, -1, -1), guesses, chance).cumsum()  # P[right - i <= W < right] for i from 1
    alpha = float((fewer / np.arange(1, right + 1)).max())
    return min(float(binom.sf(right - 1, guesses, chance)) + 2 * canaries * delta * alpha, 1.0)


def epsilon_of(mu: float, delta: float) -> float:
    """Return the epsilon that a Gaussian mechanism of this mu has at delta; 0 for mu 0, infinity beyond the largest epsilon."""
    return epsilon_at(delta, 1 / mu) if mu > 1e-3 else 0.0


def mu_of(epsilon: float, delta: float) -> float:
    """Return the mu of a Gaussian mechanism that is exactly (epsilon, delta)-private."""
    return 1 / noise_multiplier(epsilon, delta)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What no membership attack on a mu-private output can pass, for an attacker who knows all other records."""

    mu: float

    @property
    def auc(self) -> float:
        """Largest area under the ROC curve."""
        return 0.5 * math.erfc(-self.mu / 2)

    def true_positives(self, false_positives: float) -> float:
        """Largest share of members that are found where this share of strangers is taken for members."""
        from scipy.stats import norm

        return float(norm.cdf(norm.ppf(false_positives) + self.mu))


def expected_bound(mu: float, tests: int, confidence: float = CONFIDENCE) -> float:
    """Return about what `mu_lower_bound` gives for a mechanism of this mu and so many tests of each kind: said before the work starts."""
    from scipy.stats import norm

    counted, quantile = tests * (1 - CHOOSING), float(norm.ppf(1 - (1 - confidence) / 2))
    best = 0.0
    for level in LEVELS:
        true = float(norm.cdf(norm.ppf(level) + mu))
        errors = sum(math.sqrt(rate * (1 - rate) / counted) / float(norm.pdf(norm.ppf(rate))) for rate in (level, min(true, 1 - 1e-9)))
        best = max(best, mu - quantile * errors)
    return best
