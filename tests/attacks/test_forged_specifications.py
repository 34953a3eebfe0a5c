"""The zoo of forged specifications against gate, score and verdict.

Synthetic markets of 100 tasks in 10 domains (between-task variance .26, within .65, as on real text), one honest node a task at n = 1000,
epsilon 1, queries of 50 texts, D = 64; 30 further tasks of the same domains that nobody owns.  Each forged specification joins a market
of honest ones.  What is asserted: the gate refuses what it can see; of what it admits, nothing takes a "match" from tasks that are not
its own.  Leaving out the noise, copying and averaging public specifications of a task are NOT protected against, and asserted as such.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from protocol.admission import AdmissionPolicy, admit
from protocol.catalogue import centred_means, columns_of
from protocol.errors import FormatError, NotAdmitted
from protocol.features import CENTRE_SCALE, EmbeddingKind, FeatureMap, ScoringConstants, View, default_map
from protocol.privacy import Guarantee, noise_variance
from protocol.scoring import Sketch, Verdict, score, verdict_of
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Specification

D, DOMAINS, TASKS, ABSENT, QUERY_SIZE, MARKETS = 64, 10, 100, 30, 50, 4
N = 1000  # records of an honest node: enough that the abstention test has power, so that a verdict "match" is there to be won
BETWEEN, WITHIN = 0.26 / D, 0.65 / D
ONE = Guarantee(1.0, 1e-6)
VARIANCE = noise_variance(ONE, NORM_SQUARED)
POLICY = AdmissionPolicy()


def map_with(centre: np.ndarray) -> FeatureMap:
    half = np.zeros(D // 2, np.float32)
    view = View(half, half + 1, half, np.eye(D // 2, dtype=np.float32))
    shipped = default_map().full
    norm = BETWEEN * D + float(centre @ centre)
    constants = ScoringConstants(BETWEEN, WITHIN, norm, 0.4 * norm, 1e-3, shipped.related, shipped.threshold)
    grid = np.rint(centre * CENTRE_SCALE).astype(np.int64)
    return FeatureMap("zoo", "ab" * 32, EmbeddingKind.HIDDEN_STATES, 6, (60, 40), (view, view), grid, constants, constants, ("public",))


@dataclass
class Market:
    """Honest specifications of all tasks, the tasks themselves, and queries."""

    rng: np.random.Generator
    feature_map: FeatureMap
    tasks: np.ndarray
    absent: np.ndarray
    honest: list[Specification]
    victim: int

    @classmethod
    def of(cls, seed: int) -> "Market":
        rng = np.random.default_rng(seed)
        centre = rng.standard_normal(D)
        centre *= math.sqrt(1 - D * (BETWEEN + WITHIN)) / np.linalg.norm(centre)
        domains = rng.standard_normal((DOMAINS, D)) * math.sqrt(BETWEEN / 2)

        def tasks(count: int) -> np.ndarray:
            return centre + domains[np.arange(count) % DOMAINS] + rng.standard_normal((count, D)) * math.sqrt(BETWEEN / 2)

        present, absent = tasks(TASKS), tasks(ABSENT)
        market = cls(rng, map_with(centre), present, absent, [], int(rng.integers(TASKS)))
        market.honest = [market.release(task) for task in present]
        return market

    def own_mean(self, task: np.ndarray, count: int = N) -> np.ndarray:
        return task + self.rng.standard_normal(D) * math.sqrt(WITHIN / count)

    def release(self, task: np.ndarray, count: int = N) -> Specification:
        return built(self.own_mean(task, count), count, noise=self.rng)

    def query(self, task: np.ndarray) -> Sketch:
        mean = task + self.rng.standard_normal(D) * math.sqrt(WITHIN / QUERY_SIZE)
        return Sketch(mean - self.feature_map.task_mean, WITHIN * np.eye(D), QUERY_SIZE, 2)


def built(mean, count=float(N), *, noise=None, variance=VARIANCE, guarantee=ONE) -> Specification:
    sums = np.concatenate([[COUNT_STEP * count], FEATURE_SCALE * count * np.asarray(mean)])
    if noise is not None:
        sums = sums + noise.standard_normal(D + 1) * math.sqrt(variance)
    return forged(sums, variance, guarantee)


def forged(sums, variance=VARIANCE, guarantee=ONE) -> Specification:
    return Specification(bytes(32), np.clip(np.rint(sums), -(2**31), 2**31 - 1).astype(np.int32), variance, guarantee)


def scaled(specification: Specification, factor: float, body_only: bool = False) -> Specification:
    sums = specification.noisy_sums.astype(np.float64)
    return forged(np.concatenate([sums[:1] * (1 if body_only else factor), factor * sums[1:]]))


def means(market: Market) -> np.ndarray:
    return np.stack([specification.mean for specification in market.honest])


def of_domain(market: Market) -> np.ndarray:
    return means(market)[np.arange(TASKS) % DOMAINS == market.victim % DOMAINS].mean(axis=0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x)


def centre_of(market: Market) -> np.ndarray:
    return market.feature_map.task_mean


# name -> (how it is forged, what the gate says)
ZOO = {
    "body x10, count kept": (lambda m: scaled(m.release(m.tasks[m.victim]), 10, body_only=True), "refused"),
    "mean of all x10": (lambda m: built(10 * means(m).mean(axis=0)), "refused"),
    "zero body": (lambda m: built(np.zeros(D)), "refused"),
    "vacuous: count 1, zero body": (lambda m: built(np.zeros(D), 1), "refused"),
    "vacuous: count 50, body g, no noise": (lambda m: built(centre_of(m), 50), "refused"),
    "count zero, honest body": (lambda m: forged(np.concatenate([[0], m.honest[m.victim].noisy_sums[1:]])), "refused"),
    "clean own mean, epsilon 8 declared": (
        lambda m: built(m.own_mean(m.tasks[m.victim]), variance=7_599_578, guarantee=Guarantee(8.0, 1e-6)), "refused",
    ),
    "unit magnet to the mean of all": (lambda m: built(unit(means(m).mean(axis=0))), "admitted"),
    "unit magnet to the victim": (lambda m: built(unit(m.honest[m.victim].mean)), "admitted"),
    "mean of all, honest count": (lambda m: built(means(m).mean(axis=0)), "admitted"),
    "mean of all, count 1e5": (lambda m: built(means(m).mean(axis=0), 1e5), "admitted"),
    "all coordinates equal, norm 1": (lambda m: built(np.full(D, D**-0.5)), "admitted"),
    "noisy vacuous: count 100, body g": (lambda m: built(centre_of(m), 100, noise=m.rng), "admitted"),
    "noisy hub: count 100, mean of a domain": (lambda m: built(of_domain(m), 100, noise=m.rng), "admitted"),
    "hub: honest count, mean of a domain": (lambda m: built(of_domain(m)), "admitted"),
    # Not protected: they win queries of the task that they really are about.  That a larger claimed count pays as well comes with the
    # query size of at most 16 in the score: the query's own uncertainty then hides the noise that the claim denies.
    "noisy own data, all x100": (lambda m: scaled(m.release(m.tasks[m.victim]), 100), "admitted"),
    "copy of the victim, all x100": (lambda m: scaled(m.honest[m.victim], 100), "admitted"),
    "clean own mean, honest s2": (lambda m: built(m.own_mean(m.tasks[m.victim])), "admitted"),
    "clean own mean, count 50 000": (lambda m: built(m.own_mean(m.tasks[m.victim]), 50_000), "admitted"),
    "average of four specifications of the task": (
        lambda m: built(np.mean([m.release(m.tasks[m.victim]).mean for _ in range(4)], axis=0)), "admitted",
    ),
    "plain copy of the victim": (lambda m: m.honest[m.victim], "admitted"),
}  # fmt: skip
NOT_PROTECTED = list(ZOO)[-6:]


@pytest.fixture(scope="module")
def markets() -> list[Market]:
    return [Market.of(seed) for seed in range(MARKETS)]


def passes(specification: Specification) -> bool:
    try:
        admit(specification, POLICY)
    except NotAdmitted:
        return False
    return True


@dataclass
class Won:
    """Shares of queries whose first place the forged specification takes; of these, those with a verdict."""

    first: float
    positive: float
    match: float
    by_mmd: float


def won(market: Market, specification: Specification, tasks: np.ndarray) -> Won:
    everybody = [*market.honest, specification]
    centred, columns = centred_means(everybody, market.feature_map), columns_of(everybody, market.feature_map, 2)
    hits = np.zeros(4)
    for task in tasks:
        sketch = market.query(task)
        products = centred @ sketch.centred_mean
        scores = score(products, columns, sketch, market.feature_map)
        best = int(np.argmax(scores.llr))
        debiased_mmd = sketch.norm_squared - 2 * products + columns.norms_squared - D * columns.noise_stds**2
        hits[3] += np.argmin(debiased_mmd) == len(everybody) - 1
        if best == len(everybody) - 1:
            verdict = verdict_of(scores, best, market.feature_map, 2)
            hits[:3] += (1, scores.llr[best] > 0, verdict is Verdict.MATCH)
    return Won(*(hits / len(tasks)))


def others(market: Market) -> np.ndarray:
    return market.tasks[np.arange(TASKS) != market.victim]


@pytest.mark.parametrize("name", ZOO)
def test_the_gate_says_what_the_table_says(markets, name):
    make, expected = ZOO[name]
    assert [passes(make(market)) for market in markets] == [expected == "admitted"] * MARKETS


def test_less_noise_than_the_claim_needs_is_no_specification_at_all(markets):
    with pytest.raises(FormatError, match="noise_variance"):
        built(markets[0].own_mean(markets[0].tasks[0]), variance=VARIANCE // 100)


ADMITTED = [name for name, (_, says) in ZOO.items() if says == "admitted"]


@pytest.mark.parametrize("name", ADMITTED)
def test_an_admitted_forgery_takes_no_match_from_other_tasks(markets, name):
    """At most 1 % of the queries of tasks that others own, at most 1 % of those of tasks that nobody owns."""
    make = ZOO[name][0]
    present, absent = [], []
    for market in markets:
        specification = make(market)
        present.append(won(market, specification, others(market)).match)
        absent.append(won(market, specification, market.absent).match)
    assert np.mean(present) <= 0.01
    assert np.mean(absent) <= 0.01


@pytest.mark.parametrize("name", [name for name in ADMITTED if name not in NOT_PROTECTED])
def test_an_admitted_forgery_takes_no_match_from_its_victim(markets, name):
    make = ZOO[name][0]
    shares = [won(market, make(market), np.repeat(market.tasks[[market.victim]], 20, axis=0)).match for market in markets]
    assert np.mean(shares) <= 0.05


@pytest.mark.parametrize("name", NOT_PROTECTED[:5])
def test_leaving_out_the_noise_scaling_and_averaging_are_not_protected_against(markets, name):
    """docs/sharp-edges.md says so; if this ever fails, a remedy was found and the page is to be changed."""
    make = ZOO[name][0]
    shares = [won(market, make(market), np.repeat(market.tasks[[market.victim]], 20, axis=0)).first for market in markets]
    assert np.mean(shares) > 0.5


def test_honest_specifications_do_win_their_own_queries(markets):
    """Without this, "no match" above would say nothing: more than nine in ten queries find the node of their task with "match"."""
    shares = []
    for market in markets:
        alone = Market(market.rng, market.feature_map, market.tasks, market.absent, market.honest[1:], 0)
        shares.append(won(alone, market.honest[0], np.repeat(market.tasks[:1], 20, axis=0)).match)
    assert np.mean(shares) > 0.9


# Controls: the same zoo wins where one of the defences is missing.


def test_without_the_gate_an_empty_specification_comes_first_with_a_positive_score(markets):
    empty = [won(market, built(np.zeros(D), 1), market.absent) for market in markets]
    assert np.mean([one.first for one in empty]) > 0.9
    assert np.mean([one.positive for one in empty]) > 0.2


def test_ranked_by_debiased_mmd_the_empty_specification_takes_everything(markets):
    assert np.mean([won(market, built(np.zeros(D), 1), market.tasks).by_mmd for market in markets]) > 0.95


def test_without_the_rule_that_evidence_is_positive_a_vacuous_one_comes_first(markets):
    vacuous = [won(market, built(centre_of(market), 100, noise=market.rng), market.absent) for market in markets]
    assert np.mean([one.first for one in vacuous]) > 0.5  # the ranking alone hands it most of the queries that nobody can serve
    assert np.mean([one.positive for one in vacuous]) <= 0.05
