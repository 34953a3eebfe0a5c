"""The forecast: what it says of an epsilon is what real releases at that epsilon are found to be."""

import itertools

import numpy as np
import pytest

from nodes.forecast import EPSILONS, REPEATS, forecast
from protocol.errors import RecordError
from protocol.features import default_map
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.scoring import Verdict, score_releases, sketch_of, verdict_of
from protocol.specification import estimate, quantise

MAP = default_map()


def task(count: int, seed: int = 3) -> np.ndarray:
    """Return features of one made-up task, as far from others and as wide as the map says that tasks are."""
    rng, half, views = np.random.default_rng(seed), MAP.view_dimension, []
    for view in range(2):
        centre = MAP.task_mean[view * half : (view + 1) * half] + rng.normal(0, MAP.full.between**0.5, half)
        rows = centre + rng.normal(0, MAP.full.within**0.5, (count, half))
        views.append(rows / np.linalg.norm(rows, axis=1, keepdims=True) / 2**0.5)
    return np.concatenate(views, axis=1)


def names(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def test_more_epsilon_and_more_records_are_found_more_often():
    few, many = (forecast(task(count), names(count), MAP, 1e-6) for count in (60, 300))
    assert [outlook.epsilon for outlook in many.outlooks] == list(EPSILONS)
    shares = [outlook.match for outlook in many.outlooks]
    assert all(later >= earlier - 0.1 for earlier, later in itertools.pairwise(shares))
    assert shares[0] < 0.2 < 0.95 < shares[EPSILONS.index(1.0)]
    assert few.outlooks[EPSILONS.index(1.0)].match < 0.2  # "cannot tell", as docs/sharp-edges.md says of fewer than 160 records
    assert few.outlooks[EPSILONS.index(1.0)].cannot_tell > 0.8
    assert all(one.match + one.cannot_tell + one.other == pytest.approx(1) for one in (*few.outlooks, *many.outlooks))
    assert (many.units, many.query_size, few.units, few.query_size) == (250, 50, 48, 12)


def test_real_releases_are_found_as_often_as_forecast():
    """Two shares of 200 each differ by more than 0.25, five standard deviations, about once in a million runs."""
    epsilon = 0.5  # where about two in three are
    features, rng, found = task(300), np.random.default_rng(5), 0
    for _ in range(REPEATS):
        querier = rng.permutation(300)[:50]
        rest = np.delete(features, querier, axis=0)
        release = estimate(quantise(rest), MAP.map_id, Guarantee(epsilon, 1e-6), operating_system())
        scores = score_releases([release], sketch_of(features[querier], MAP, 2), MAP)
        found += verdict_of(scores, 0, MAP, 2) is Verdict.MATCH
    (outlook,) = forecast(features, names(300), MAP, 1e-6, epsilons=(epsilon,)).outlooks
    assert outlook.match == pytest.approx(found / REPEATS, abs=0.25)


def test_a_person_with_many_records_counts_once():
    features = task(300)
    people = [str(number % 100) for number in range(300)]
    by_person = forecast(features, people, MAP, 1e-6, epsilons=(1.0,))
    assert by_person.units == 80
    assert by_person.outlooks[0].match < forecast(features, names(300), MAP, 1e-6, epsilons=(1.0,)).outlooks[0].match - 0.3


def test_too_few_records_are_refused():
    with pytest.raises(RecordError, match="at least 20"):
        forecast(task(19), names(19), MAP, 1e-6)
