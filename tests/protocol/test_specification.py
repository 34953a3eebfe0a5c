import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import FeatureNormError, FormatError
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee, NeighbouringRelation, noise_variance
from protocol.specification import (
    COUNT_STEP,
    FEATURE_SCALE,
    NORM_SQUARED,
    BoundedVectors,
    Specification,
    estimate,
    quantise,
    quantise_units,
)

EPSILON_ONE = Guarantee(1.0, 1e-6)


def unit_rows(count: int, dimension: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(st.integers(0, 2**32 - 1), st.integers(1, 128))
def test_no_vector_is_longer_than_its_bound(seed, dimension):
    vectors = quantise(unit_rows(8, dimension, seed))
    assert (vectors.rows**2).sum(axis=1).max() <= NORM_SQUARED
    assert (vectors.rows[:, 0] == COUNT_STEP).all()


def test_rounding_to_nearest_would_break_the_bound():
    """The control: on the same rows rounding does exceed what truncation keeps."""
    rows = unit_rows(2_000, 64)
    assert (np.rint(FEATURE_SCALE * rows) ** 2).sum(axis=1).max() > FEATURE_SCALE**2


def test_float_error_in_a_unit_vector_is_shrunk_away():
    assert quantise(np.array([[1.0 + 2**-52, 0.0], [0.0, -1.0]])).rows[0, 1] <= FEATURE_SCALE


def test_a_feature_longer_than_one_is_refused_before_anything_is_drawn():
    with pytest.raises(FeatureNormError):
        quantise(np.array([[1.1, 0.0]]))


@pytest.mark.parametrize("added", [[1.0, 0.0], [-0.6, 0.8], [0.0, 0.0]])
def test_one_record_changes_the_exact_sum_by_at_most_the_sensitivity(added):
    rows = unit_rows(50, 2)
    with_it, without = quantise(np.vstack([rows, added])), quantise(rows)
    change = with_it.rows.sum(axis=0) - without.rows.sum(axis=0)
    assert int((change**2).sum()) <= with_it.sensitivity(NeighbouringRelation.ADD_OR_REMOVE_ONE) ** 2 + 1e-6


def test_an_estimate_tells_count_and_mean_up_to_its_stated_noise():
    rows = unit_rows(5_000, 8)
    specification = estimate(quantise(rows), bytes(32), EPSILON_ONE, operating_system())
    assert abs(specification.count - 5_000) < 6 * math.sqrt(specification.noise_variance) / COUNT_STEP  # six deviations: 2e-9
    assert np.abs(specification.mean - rows.mean(axis=0)).max() < 6.5 * specification.noise_std + 2 / FEATURE_SCALE


def test_a_specification_with_less_noise_than_its_claim_cannot_exist():
    variance = noise_variance(EPSILON_ONE, NORM_SQUARED)
    Specification(bytes(32), np.zeros(65, np.int32), variance, EPSILON_ONE)
    with pytest.raises(FormatError, match="noise_variance"):
        Specification(bytes(32), np.zeros(65, np.int32), variance - 1, EPSILON_ONE)


def test_a_specification_cannot_be_changed_after_birth():
    sums = np.zeros(65, np.int32)
    specification = Specification(bytes(32), sums, noise_variance(EPSILON_ONE, NORM_SQUARED), EPSILON_ONE)
    sums[0] = 5
    assert specification.noisy_sums[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        specification.noisy_sums[0] = 1


@pytest.mark.parametrize("coordinate", [2**32, -(2**63), 2**31, FEATURE_SCALE + 1024])
def test_a_coordinate_whose_square_would_wrap_is_refused(coordinate):
    with pytest.raises(FeatureNormError):
        BoundedVectors(np.array([[COUNT_STEP, coordinate, 0]], np.int64))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**20])
def test_a_feature_that_is_no_unit_vector_is_refused(value):
    with pytest.raises(FeatureNormError):
        quantise(np.array([[value, 0.0]]))


def test_vectors_that_are_too_long_are_refused():
    with pytest.raises(FeatureNormError):
        BoundedVectors(np.array([[COUNT_STEP, FEATURE_SCALE + 1]]))


def exact_sum(features: np.ndarray, units: list[str]) -> np.ndarray:
    return quantise_units(features, units).rows.sum(axis=0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 24), st.integers(1, 40))
def test_a_whole_unit_changes_the_exact_sum_by_at_most_the_sensitivity(seed, others, own):
    """Added or removed, with all its records, wherever they stand between those of others."""
    rng = np.random.default_rng(seed)
    direction = unit_rows(1, 16, seed)
    features = unit_rows(others + own, 16, seed)
    features[others:] = np.where(rng.random((own, 1)) < 0.5, direction, features[others:])  # the worst unit repeats itself
    units = [f"person {k % 7}" for k in range(others)] + ["the one"] * own
    order = rng.permutation(len(units))
    with_it = exact_sum(features[order], [units[k] for k in order])
    rest = [k for k in order if units[k] != "the one"]
    change = with_it - exact_sum(features[rest], [units[k] for k in rest])
    assert int((change**2).sum()) <= NORM_SQUARED
    assert change[0] == COUNT_STEP


def test_a_unit_counted_record_by_record_would_break_the_bound():
    """The control: as records of their own, forty equal records of one person move the sum forty times as far."""
    features = np.repeat(unit_rows(1, 16), 40, axis=0)
    assert int((quantise(features).rows.sum(axis=0) ** 2).sum()) > NORM_SQUARED
    assert int((exact_sum(features, ["the one"] * 40) ** 2).sum()) <= NORM_SQUARED


def test_a_unit_is_counted_once_and_is_the_mean_of_its_records():
    features = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    rows = quantise_units(features, ["a", "b", "a"]).rows
    assert rows.tolist() == [[COUNT_STEP, FEATURE_SCALE // 2, -FEATURE_SCALE // 2], [COUNT_STEP, 0, FEATURE_SCALE]]


def test_units_that_do_not_fit_the_records_are_refused():
    with pytest.raises(FeatureNormError, match="units"):
        quantise_units(unit_rows(3, 4), ["a", "b"])


def attack(sigmas: float, releases: int = 400) -> tuple[float, float]:
    """Return (area under the curve, its standard error) of the best membership attack, with noise `sigmas` times what it should be.

    The attacker knows every other record: it projects the release minus their sum on the record's own vector, which is the
    likelihood-ratio test of two Gaussians.
    """
    rows = unit_rows(30, 8)
    vectors = quantise(rows).rows
    rest, own = vectors[1:].sum(axis=0), vectors[0].astype(np.float64)
    statistics = []
    for present in (True, False):
        data = quantise(rows if present else rows[1:])
        drawn = [estimate(data, bytes(32), Guarantee(4.0, 1e-6), operating_system()).noisy_sums for _ in range(releases)]
        exact = data.rows.sum(axis=0)
        statistics.append([float((exact + sigmas * (sums - exact) - rest) @ own) for sums in drawn])
    with_it, without = np.array(statistics[0]), np.array(statistics[1])
    return float((with_it[:, None] > without[None]).mean()), math.sqrt(1 / (6 * releases))


AREA_AT_FOUR = 0.7232  # Phi(mu / sqrt 2) at epsilon 4, mu = 1/1.1935


def test_no_attack_on_one_release_does_better_than_the_bound():
    area, error = attack(1.0)
    assert area <= AREA_AT_FOUR + 5 * error  # five standard errors: 3e-7
    assert area > AREA_AT_FOUR - 5 * error, "the best attack does reach the bound, or it says nothing"


def test_the_best_attack_on_less_noise_exceeds_the_bound():
    area, error = attack(0.5)
    assert area > AREA_AT_FOUR + 5 * error
