import math

import numpy as np
import pytest

from protocol.errors import FormatError, UsageError
from protocol.privacy import (
    FILTER_ORDERS,
    RECORD,
    Gaussian,
    Guarantee,
    PoissonSampledGaussian,
    PrivacyUnit,
    composed_epsilon,
    delta_at,
    effective_multiplier,
    epsilon_at,
    event_from_plain,
    event_to_plain,
    filter_epsilon,
    ledger_epsilon,
    noise_multiplier,
    noise_variance,
    renyi_divergence,
    renyi_epsilon,
)
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


def quadrature(multiplier: float, rate: float, order: float) -> float:
    """The Renyi divergence of one sampled Gaussian by the trapezoid rule: a slow second implementation, for any real order."""
    x = np.arange(-14 * multiplier, order + 14 * multiplier, multiplier / 64)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * multiplier**2))
    density = -(x**2) / (2 * multiplier**2) - math.log(multiplier * math.sqrt(2 * math.pi))
    return float(np.logaddexp.reduce(density + order * ratio) + math.log(multiplier / 64)) / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 5, 7, 10, 16, 64])
@pytest.mark.parametrize(("multiplier", "rate"), [(1.0, 0.016), (0.6, 0.1), (4.0, 0.5)])
def test_the_divergence_of_a_sampled_gaussian_is_exact_at_integer_orders(multiplier, rate, order):
    assert renyi_divergence(PoissonSampledGaussian(multiplier, rate, 1), order) == pytest.approx(
        quadrature(multiplier, rate, order), rel=1e-8
    )


@pytest.mark.parametrize("order", [1.1, 1.5, 2.3, 4.7, 9.9])
@pytest.mark.parametrize(("multiplier", "rate"), [(1.0, 0.016), (0.6, 0.1), (4.0, 0.5)])
def test_between_integer_orders_the_bound_holds(multiplier, rate, order):
    assert renyi_divergence(PoissonSampledGaussian(multiplier, rate, 1), order) >= quadrature(multiplier, rate, order) * (1 - 1e-9)


def test_sampling_everything_is_no_sampling():
    assert renyi_divergence(PoissonSampledGaussian(2.0, 1.0, 3), 5) == pytest.approx(3 * renyi_divergence(Gaussian(2.0), 5))


def test_a_history_of_gaussians_is_exact_and_a_mixed_one_is_filtered():
    spec, training = Gaussian(4.2247), PoissonSampledGaussian(1.0, 0.016, 300)
    assert ledger_epsilon([spec, spec], 1e-6) == composed_epsilon([4.2247] * 2, 1e-6)
    assert ledger_epsilon([spec, training], 1e-6) == filter_epsilon([spec, training], 1e-6)
    assert ledger_epsilon([], 1e-6) == filter_epsilon([], 1e-6) == 0.0


def test_the_filters_orders_share_delta():
    """The union bound: at each order the filter is a filter of one order, fixed beforehand, at a share of delta."""
    events = [Gaussian(4.2247), PoissonSampledGaussian(1.0, 0.016, 300)]
    single = [renyi_epsilon(events, 1e-6 / len(FILTER_ORDERS), [order]) for order in FILTER_ORDERS]
    assert filter_epsilon(events, 1e-6) == min(single)
    assert filter_epsilon(events, 1e-6) > renyi_epsilon(events, 1e-6, FILTER_ORDERS), "the control: without shares it would be smaller"


def test_more_events_never_cost_less():
    training = PoissonSampledGaussian(1.0, 0.016, 300)
    costs = [filter_epsilon([training] * k, 1e-6) for k in range(5)]
    assert costs == sorted(costs)
    assert costs[1] < filter_epsilon([PoissonSampledGaussian(1.0, 0.016, 301)], 1e-6)


EVENTS = [Gaussian(4.2247), Gaussian(1 / 3), PoissonSampledGaussian(1.0, 0.016, 300)]


@pytest.mark.parametrize("event", EVENTS, ids=repr)
def test_an_event_reads_back(event):
    assert event_from_plain(event_to_plain(event)) == event


@pytest.mark.parametrize("plain", [
    None, {}, {"kind": "laplace", "multiplier": "1.0"}, {"kind": "gaussian"}, {"kind": "gaussian", "multiplier": "0"},
    {"kind": "gaussian", "multiplier": "nan"}, {"kind": "gaussian", "multiplier": "inf"},
    {"kind": "poisson-sampled-gaussian", "multiplier": "1.0", "sampling_rate": "1.5", "steps": 3},
    {"kind": "poisson-sampled-gaussian", "multiplier": "1.0", "sampling_rate": "0.5", "steps": 0},
])  # fmt: skip
def test_an_event_that_nobody_knows_is_refused(plain):
    with pytest.raises(FormatError):
        event_from_plain(plain)


def test_a_unit_is_a_record_or_a_named_field():
    assert str(RECORD) == "record"
    assert PrivacyUnit.parse("record") == RECORD
    assert PrivacyUnit.parse("field:person") == PrivacyUnit("person")
    assert str(PrivacyUnit("record")) == "field:record", "a field may have that name and is not taken for the record"


@pytest.mark.parametrize("text", ["", "person", "field:", "field:a b", "field:1st", "Record", "field:" + "x" * 64, "field:é", "field:text"])
def test_a_unit_that_nobody_defined_is_refused(text):
    with pytest.raises(UsageError):
        PrivacyUnit.parse(text)
