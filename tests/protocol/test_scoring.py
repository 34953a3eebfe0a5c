import math

import numpy as np
import pytest
from scipy import stats

from protocol.catalogue import EMPTY_CATALOGUE, ROW, CardEntry, Catalogue, Columns, estimate_counts
from protocol.features import ScoringConstants
from protocol.scoring import MAX_QUERY_SIZE, Scores, Sketch, Verdict, accepted_in, rank, score, sketch_of, verdict_of
from protocol.specification import COUNT_STEP, FEATURE_SCALE
from tests.protocol.worlds import features, small_map

MAP = small_map()


def columns_of(means: np.ndarray, counts: np.ndarray, noise: np.ndarray) -> Columns:
    return Columns(counts, np.full(len(counts), 0.1), noise, (means**2).sum(axis=1))


def slow_llr(q: np.ndarray, mean: np.ndarray, count: float, noise: float, size: int, constants: ScoringConstants) -> float:
    """The log-likelihood ratio from its definition: q given the owner's mean, against q alone, as Gaussian densities."""
    between, within = constants.between, constants.within
    shrink = between / (between + within / count + noise**2)
    posterior = between * (1 - shrink) + within / size
    same = stats.norm.logpdf(q, shrink * mean, math.sqrt(posterior)).sum()
    other = stats.norm.logpdf(q, 0, math.sqrt(between + within / size)).sum()
    return float(same - other)


@pytest.mark.parametrize("size", [4, 16, 50])
def test_the_score_is_the_log_likelihood_ratio(size):
    rng = np.random.default_rng(size)
    means, q = rng.standard_normal((5, 4)) * 0.2, rng.standard_normal(4) * 0.2
    counts, noise = rng.uniform(50, 500, 5), rng.uniform(0.01, 0.1, 5)
    sketch = Sketch(q, np.eye(4) * 0.2, size, 2)
    got = score(means @ q, columns_of(means, counts, noise), sketch, MAP).llr
    expected = [slow_llr(q, m, n, s, min(size, MAX_QUERY_SIZE), MAP.full) for m, n, s in zip(means, counts, noise, strict=True)]
    assert got == pytest.approx(expected, rel=1e-9)


def test_the_error_bar_is_the_spread_of_the_score_over_fresh_noise():
    rng = np.random.default_rng(3)
    mean, q, noise = rng.standard_normal(4) * 0.2, rng.standard_normal(4) * 0.2, 0.02
    sketch = Sketch(q, np.eye(4) * 0.2, 50, 2)
    noisy = mean + noise * rng.standard_normal((20_000, 4))
    columns = columns_of(noisy, np.full(len(noisy), 200.0), np.full(len(noisy), noise))
    scores = score(noisy @ q, columns, sketch, MAP)
    assert scores.llr.std() == pytest.approx(scores.std.mean(), rel=0.1)


def test_the_distance_is_about_zero_for_the_same_task_and_large_for_another():
    rng = np.random.default_rng(5)
    noise, dimension, sizes = 0.02, MAP.dimension, (300, 50)

    def distance(own_seed: int, asked_seed: int) -> float:
        own = features(sizes[0] + sizes[1], own_seed)
        asked = own[sizes[0] :] if own_seed == asked_seed else features(sizes[1], asked_seed)
        mean = own[: sizes[0]].mean(axis=0) - MAP.task_mean + noise * rng.standard_normal(dimension)
        sketch = sketch_of(asked, MAP, 2)
        columns = columns_of(mean[None], np.array([float(sizes[0])]), np.array([noise]))
        return float(score(np.array([mean @ sketch.centred_mean]), columns, sketch, MAP).distance[0])

    same = [distance(seed, seed) for seed in range(60)]
    other = [distance(seed, seed + 1000) for seed in range(60)]
    assert abs(np.mean(same)) < 0.6
    assert np.std(same) < 2
    assert np.median(other) > 10


def test_a_release_that_is_all_noise_never_wins():
    """The vacuous release: close to everything, evidence for nothing."""
    q = np.full(4, 0.3)
    means = np.stack([np.full(4, 0.28), np.zeros(4)])
    scores = score(means @ q, columns_of(means, np.array([300.0, 1.0]), np.array([0.01, 4.0])), Sketch(q, np.eye(4) * 0.2, 50, 2), MAP)
    assert scores.llr[0] > scores.llr[1]
    assert abs(scores.llr[1]) < 0.1


@pytest.mark.parametrize(("noise", "verdict"), [(0.005, Verdict.MATCH), (0.1, Verdict.CANNOT_TELL)])
def test_noise_that_hides_related_tasks_gives_no_match(noise, verdict):
    """The same true pair: a match where the test has power, and an honest "cannot tell" where it has none."""
    q = np.full(4, 0.15)
    sketch, columns = Sketch(q, np.eye(4) * 1e-3, 50, 2), columns_of(q[None], np.array([500.0]), np.array([noise]))
    scores = score(np.array([q @ q]), columns, sketch, MAP)
    assert rank(scores, Catalogue(MAP, np.zeros(1, ROW), (), EMPTY_CATALOGUE), sketch).verdict is verdict


def test_another_task_is_a_sibling_if_it_is_near_and_none_if_it_is_far():
    q, d = np.full(4, 0.15), MAP.dimension
    unrelated = 2 * d * MAP.full.between
    for share, verdict in ((0.25, Verdict.SIBLING), (0.9, Verdict.NONE)):
        mean = q + np.array([1.0, 0, 0, 0]) * np.sqrt(share * unrelated)
        columns = columns_of(mean[None], np.array([5000.0]), np.array([0.001]))
        sketch = Sketch(q, np.eye(4) * 1e-4, 50, 2)
        scores = score(np.array([mean @ q]), columns, sketch, MAP)
        assert scores.separation[0] == pytest.approx(share, abs=0.02)
        assert verdict_of(scores, 0, MAP, 2) is verdict


def test_what_would_be_a_match_comes_before_a_noisy_release_of_higher_score():
    llr, ones = np.array([30.0, 10.0, -5.0]), np.ones(3)
    scores = Scores(llr, ones, np.array([0.0, 0.0, 99.0]), np.array([0.0, 0.0, 1.0]), np.array([4.0, 0.5, 0.5]))
    catalogue = Catalogue(MAP, np.zeros(3, ROW), (), EMPTY_CATALOGUE, {i: CardEntry(bytes([i]) * 32, "x") for i in range(3)})
    ranking = rank(scores, catalogue, Sketch(np.full(4, 0.1), np.eye(4), 50, 2))
    assert [match.release_id[0] for match in ranking.matches] == [1, 0, 2]
    assert ranking.verdict is Verdict.MATCH
    assert not ranking.matches[0].tie


def test_gaps_and_ties_of_a_ranking_are_those_of_each_pair():
    rng, n = np.random.default_rng(3), 200
    scores = Scores(rng.normal(0, 9, n), rng.uniform(0.1, 5, n), rng.normal(0, 3, n), rng.uniform(0, 1, n), rng.uniform(0, 2, n))
    catalogue = Catalogue(MAP, np.zeros(n, ROW), (), EMPTY_CATALOGUE, {i: CardEntry(bytes([i]) * 32, "x") for i in range(n)})
    matches = rank(scores, catalogue, Sketch(np.full(4, 0.1), np.eye(4), 50, 2)).matches
    accepted = accepted_in(scores, MAP, 2)
    at = [match.release_id[0] for match in matches]
    assert at == sorted(range(n), key=lambda i: (not accepted[i], -scores.llr[i]))
    assert [match.rank for match in matches] == list(range(1, n + 1))
    for match, i, j in zip(matches, at, at[1:], strict=False):
        assert (match.llr, match.std, match.separation) == (scores.llr[i], scores.std[i], scores.separation[i])
        assert match.gap_to_next == scores.llr[i] - scores.llr[j]
        assert match.tie == (accepted[i] == accepted[j] and match.gap_to_next < 2 * (scores.std[i] ** 2 + scores.std[j] ** 2) ** 0.5)
    assert (matches[-1].gap_to_next, matches[-1].tie) == (np.inf, False)
    assert any(match.tie for match in matches)
    assert not all(match.tie for match in matches)


def test_without_power_there_is_no_none_either():
    """A true pair under so much noise that its evidence is negative: the honest answer is "cannot tell"."""
    q, noise = np.full(4, 0.02), 0.4
    mean = q + noise * np.array([0.5, -0.5, 0.5, -0.5])
    columns = columns_of(mean[None], np.array([60.0]), np.array([noise]))
    sketch = Sketch(q, np.eye(4) * 1e-3, 50, 2)
    scores = score(np.array([mean @ q]), columns, sketch, MAP)
    scores.llr[0] = -0.1
    assert scores.resolution[0] > 1
    assert verdict_of(scores, 0, MAP, 2) is Verdict.CANNOT_TELL


@pytest.mark.parametrize("units", [40, 100, 400, 5000])
def test_the_estimated_count_is_better_than_the_noisy_count_and_knows_its_error(units):
    rng, variance, norm = np.random.default_rng(units), 318_153_166.0, MAP.full.norm
    mean = rng.standard_normal((4000, MAP.dimension))
    mean *= np.sqrt(rng.normal(norm, 0.1, (4000, 1)).clip(0.2) / (mean**2).sum(axis=1, keepdims=True))
    sums = FEATURE_SCALE * units * mean + np.sqrt(variance) * rng.standard_normal(mean.shape)
    noisy = COUNT_STEP * units + np.sqrt(variance) * rng.standard_normal(4000)
    counts, stds = estimate_counts(noisy, (sums**2).sum(axis=1), np.full(4000, variance), MAP)
    error, plain = counts - units, noisy / COUNT_STEP - units
    assert np.sqrt((error**2).mean()) < 1.02 * np.sqrt((plain**2).mean())
    if units == 40:
        assert np.sqrt((error**2).mean()) < 0.8 * np.sqrt((plain**2).mean())
    assert 0.6 < np.sqrt((error**2).mean()) / stds.mean() < 1.1
    assert abs(error.mean()) < 0.12 * units


def test_a_query_of_prompts_says_nothing_about_the_second_view():
    z = features(20, 1)
    sketch = sketch_of(z, MAP, 1)
    assert (sketch.centred_mean[MAP.view_dimension :] == 0).all()
    assert sketch.covariance.shape == (MAP.view_dimension, MAP.view_dimension)


def test_one_text_uses_the_public_covariance():
    assert sketch_of(features(1, 1), MAP, 2).covariance == pytest.approx(MAP.full.within * np.eye(4))


def test_the_verdicts_are_the_documented_words():
    assert {str(verdict) for verdict in Verdict} == {"match", "sibling", "none", "cannot tell"}
