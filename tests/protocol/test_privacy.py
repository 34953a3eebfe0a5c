import math

import pytest

from protocol.errors import UsageError
from protocol.privacy import Guarantee, composed_epsilon, delta_at, effective_multiplier, epsilon_at, noise_multiplier, noise_variance
from protocol.specification import NORM_SQUARED

SMALLEST_NOISE = [(0.1, 36.305), (0.5, 8.0576), (1.0, 4.2247), (2.0, 2.2305), (4.0, 1.1935), (8.0, 0.6529)]


@pytest.mark.parametrize(("epsilon", "expected"), SMALLEST_NOISE)
def test_noise_multiplier_is_the_smallest_that_keeps_delta(epsilon, expected):
    multiplier = noise_multiplier(epsilon, delta=1e-6)
    assert multiplier == pytest.approx(expected, rel=1e-4)
    assert delta_at(epsilon, multiplier) <= 1e-6 < delta_at(epsilon, 0.999 * multiplier)


def exact_delta(epsilon: float, variance: int, step: int) -> float:
    """Delta of the integer mechanism by plain summation: a slow second implementation of what the proof bounds."""
    reach = 12 * math.isqrt(variance) + step
    normaliser = sum(math.exp(-(k**2) / (2 * variance)) for k in range(-reach, reach + 1))
    p = [math.exp(-(k**2) / (2 * variance)) / normaliser for k in range(-reach, reach + 1)]
    shifted = [0.0] * step + p[: len(p) - step]
    return sum(max(a - math.exp(epsilon) * b, 0.0) for a, b in zip(p, shifted, strict=True))


@pytest.mark.parametrize(("epsilon", "step"), [(1.0, 64), (0.5, 32), (4.0, 200)])
def test_the_integer_mechanism_keeps_its_delta(epsilon, step):
    variance = noise_variance(Guarantee(epsilon, 1e-6), step**2)
    assert exact_delta(epsilon, variance, step) <= 1e-6


def test_a_fifth_less_noise_breaks_it():
    variance = noise_variance(Guarantee(1.0, 1e-6), 64**2)
    assert exact_delta(1.0, int(0.64 * variance), 64) > 1e-6


def test_a_claim_that_no_noise_here_can_keep_is_refused():
    with pytest.raises(UsageError, match="too small together"):
        noise_multiplier(1e-5, 1e-9)


def test_epsilon_and_multiplier_are_inverse():
    assert epsilon_at(1e-6, noise_multiplier(1.3, 1e-6)) == pytest.approx(1.3, rel=1e-6)


def test_four_releases_compose_to_the_multiplier_divided_by_two():
    multiplier = noise_multiplier(1.0, 1e-6)
    together = composed_epsilon([multiplier] * 4, 1e-6)
    assert together == pytest.approx(epsilon_at(1e-6, multiplier / 2), rel=1e-9)
    assert 1.0 < together < 4.0


def test_nothing_spent_is_zero():
    assert composed_epsilon([], 1e-6) == 0.0


def test_the_noise_of_epsilon_one_is_the_documented_one():
    variance = noise_variance(Guarantee(1.0, 1e-6), NORM_SQUARED)
    assert math.isqrt(variance) == 17_836 or math.isqrt(variance) == 17_837
    assert effective_multiplier(variance, NORM_SQUARED) >= noise_multiplier(1.0, 1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-6), (-1, 1e-6), (21, 1e-6), (math.nan, 1e-6), (1, 0), (1, 0.5), (1, math.nan)])
def test_a_guarantee_without_meaning_is_refused(epsilon, delta):
    with pytest.raises(UsageError):
        Guarantee(epsilon, delta)
