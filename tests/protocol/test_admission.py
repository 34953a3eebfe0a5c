"""The admission gate: known answers of the noise variance, each rule refuses what it is for, honest owners pass."""

import math
from dataclasses import replace

import numpy as np
import pytest

from protocol.admission import LENIENT, AdmissionPolicy, admit, require_adapter, require_claim
from protocol.errors import NotAdmitted, UsageError
from protocol.privacy import NOT_PRIVATE, Guarantee, PoissonSampledGaussian, PrivateTraining, noise_variance, sampled_multiplier
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Specification

POLICY = AdmissionPolicy()
ONE = Guarantee(1.0, 1e-6)
D = 64
# Equal to the 60-digit values of the analytic Gaussian at delta 1e-6.
KNOWN_VARIANCES = {0.1: 23_494_938_384, 0.5: 1_157_343_393, 1.0: 318_153_166, 2.0: 88_683_755, 4.0: 25_392_607, 8.0: 7_599_578}


@pytest.mark.parametrize(("epsilon", "variance"), KNOWN_VARIANCES.items())
def test_the_noise_variance_is_the_known_one(epsilon, variance):
    assert noise_variance(Guarantee(epsilon, 1e-6), NORM_SQUARED) == variance


def honest(rng: np.random.Generator, count: int, guarantee: Guarantee = ONE, length: float = 0.7) -> Specification:
    """A specification as the mechanism makes it: units of mean length `length` in a random direction, noise of the right size, rounded."""
    direction = rng.standard_normal(D)
    direction *= length / np.linalg.norm(direction)
    variance = noise_variance(guarantee, NORM_SQUARED)
    exact = np.concatenate([[COUNT_STEP * count], FEATURE_SCALE * count * direction])
    sums = np.rint(exact + rng.standard_normal(D + 1) * math.sqrt(variance))
    return Specification(bytes(32), sums.astype(np.int32), variance, guarantee)


def refused(count: int, draws: int, guarantee: Guarantee, length: float, seed: int) -> int:
    rng, refusals = np.random.default_rng(seed), 0
    for _ in range(draws):
        try:
            admit(honest(rng, count, guarantee, length), POLICY)
        except NotAdmitted:
            refusals += 1
    return refusals


@pytest.mark.parametrize(
    ("count", "epsilon", "length"),
    [(105, 1.0, 0.7), (105, 1.0, 0.0), (105, 1.0, 1.0), (500, 1.0, 0.7), (500, 0.5, 0.0), (5_000, 2.0, 1.0)],
)
def test_honest_specifications_are_admitted(count, epsilon, length):
    """At least 99.9 % from 3.1 standard deviations of the noisy count above the smallest: 105 = 50 + 3.1 * 17.4 at epsilon 1.

    The true rate at 105 is 0.08 % (the count falls below 50) plus below 0.01 %; 20 of 20 000 is the stated bound, the seed is fixed.
    """
    assert refused(count, 20_000, Guarantee(epsilon, 1e-6), length, seed=3) <= 20


def test_half_of_those_at_the_smallest_count_are_not():
    """Said plainly: the decision is on the noisy count, so an owner of exactly 50 records is refused half of the time."""
    assert 0.4 < refused(50, 1_000, ONE, 0.7, seed=4) / 1_000 < 0.6


def with_sums(change) -> Specification:
    specification = honest(np.random.default_rng(1), 500)
    sums = specification.noisy_sums.astype(np.int64)
    return replace(specification, noisy_sums=change(sums).astype(np.int32))


def body(factor: float):
    return lambda sums: np.concatenate([sums[:1], factor * sums[1:]])


def count_of(units: int):
    return lambda sums: np.concatenate([[COUNT_STEP * units], sums[1:]])


def other_variance(change) -> Specification:
    specification = honest(np.random.default_rng(1), 500)
    return replace(specification, noise_variance=change(specification.noise_variance))


REFUSED = {
    "a body ten times as long": (lambda: with_sums(body(10)), "longer"),
    "a body of zeros": (lambda: with_sums(body(0)), "shorter"),
    "count 0": (lambda: with_sums(count_of(0)), "count"),
    "a negative count": (lambda: with_sums(count_of(-500)), "count"),
    "count 49": (lambda: with_sums(count_of(49)), "count"),
    "twice the noise it needs": (lambda: other_variance(lambda s2: 2 * s2), "noise_variance"),
    "a little more noise than the allowance": (lambda: other_variance(lambda s2: s2 + (s2 >> 20) + 2), "noise_variance"),
    "epsilon 8, to buy a small sigma": (lambda: honest(np.random.default_rng(1), 500, Guarantee(8.0, 1e-6)), "epsilon"),
    "another delta": (lambda: honest(np.random.default_rng(1), 500, Guarantee(1.0, 1e-5)), "delta"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_what_no_honest_owner_releases_is_refused_and_named(make, why):
    with pytest.raises(NotAdmitted, match=why):
        admit(make(), POLICY)


def test_the_allowance_for_another_implementations_last_digits_is_kept():
    admit(other_variance(lambda s2: s2 + (s2 >> 20) + 1), POLICY)


def test_a_delta_that_allows_to_publish_a_unit_is_refused_on_the_noisy_count():
    specification = honest(np.random.default_rng(1), 5_000, Guarantee(1.0, 1e-3))
    with pytest.raises(NotAdmitted, match="one by"):
        admit(specification, AdmissionPolicy(delta=1e-3))


@pytest.mark.parametrize("name", ["a body ten times as long", "a body of zeros", "twice the noise it needs"])
def test_a_simulation_is_lenient_about_choices_and_never_about_the_protocol(name):
    admit(honest(np.random.default_rng(1), 20, Guarantee(8.0, 1e-5)), LENIENT)
    with pytest.raises(NotAdmitted):
        admit(REFUSED[name][0](), LENIENT)


def test_an_owner_can_ask_before_paying():
    require_claim(ONE, POLICY)
    for guarantee in (Guarantee(2.5, 1e-6), Guarantee(1.0, 1e-5)):
        with pytest.raises(NotAdmitted):
            require_claim(guarantee, POLICY)


def promise(epsilon: float, delta: float = 1e-6) -> PrivateTraining:
    guarantee = Guarantee(epsilon, delta)
    return PrivateTraining(guarantee, PoissonSampledGaussian(sampled_multiplier(guarantee, 0.125, 40), 0.125, 40))


def test_adapters_are_taken_by_what_the_policy_asks_of_them():
    strict = AdmissionPolicy(largest_adapter_epsilon=8.0)
    for taken in (NOT_PRIVATE, promise(9.0), promise(8.0, 1e-5)):
        require_adapter(taken, POLICY)  # a policy that asks for nothing
        with pytest.raises(NotAdmitted, match=r"adapter.*8 or less"):
            require_adapter(taken, strict)
    require_adapter(promise(8.0), strict)
    require_adapter(promise(8.0, 1e-7), strict)
    require_adapter(promise(8.0, 1e-5), AdmissionPolicy(delta=None, largest_adapter_epsilon=8.0))


NO_POLICY = (
    {"largest_epsilon": 0.0}, {"largest_epsilon": math.nan}, {"delta": 0.5}, {"smallest_count": 0},
    {"largest_adapter_epsilon": 0.0}, {"largest_adapter_epsilon": math.inf},
)  # fmt: skip


@pytest.mark.parametrize("wrong", NO_POLICY)
def test_a_policy_without_meaning_is_refused(wrong):
    with pytest.raises(UsageError):
        AdmissionPolicy(**wrong)
