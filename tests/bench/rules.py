"""The pure functions of the specification benchmark: markets, rules of ranking, compositions and their loss, mixture weights, intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import Columns, centred_means, columns_of
from protocol.features import FeatureMap
from protocol.hazmat.noise import NoiseSource
from protocol.mixture import simplex_least_squares
from protocol.privacy import Guarantee
from protocol.scoring import Scores, Sketch, accepted_in, constants_for, score
from protocol.specification import FEATURE_SCALE, Specification, estimate, quantise
from tests.bench.embeddings import Task

DELTA = 1e-6
RULES = ("LLR", "cosine", "MMD", "debiased MMD")

Array = NDArray[np.float64]


def choose(rng: np.random.Generator, available: int, n: int) -> NDArray[np.int64]:
    """Return n row numbers, each at most once where there are enough, otherwise a bootstrap sample."""
    return rng.permutation(available)[:n] if available >= n else rng.integers(0, available, n)


@dataclass(frozen=True, slots=True, eq=False)
class Market:
    """N releases as a querier sees them: their centred means, and the public scalars for one view and for two."""

    means: Array  # (N, D)
    columns: dict[int, Columns]

    def score(self, sketch: Sketch, feature_map: FeatureMap) -> Scores:
        """Return the product's scores."""
        return score(self.means @ sketch.centred_mean, self.columns[sketch.views], sketch, feature_map)


def publish(owners: Sequence[Array], epsilons: Sequence[float], feature_map: FeatureMap, noise: NoiseSource) -> Market:
    """Return the market of owners with these features (n, D): the product's quantiser, noise and estimated count.

    An infinite epsilon stands for no release at all: the exact mean and number of records, the limit that no noise can beat.
    """
    if all(math.isinf(epsilon) for epsilon in epsilons):
        counts = np.array([float(len(own)) for own in owners])
        sums = np.stack([quantise(own).rows[:, 1:].sum(axis=0) for own in owners])
        means, zero = sums / (FEATURE_SCALE * counts[:, None]) - feature_map.task_mean, np.zeros(len(owners))
        used = {views: means[:, : views * feature_map.view_dimension] for views in (1, 2)}
        return Market(means, {views: Columns(counts, zero, zero, (part**2).sum(axis=1)) for views, part in used.items()})
    specifications = [
        estimate(quantise(own), feature_map.map_id, Guarantee(epsilon, DELTA), noise) for own, epsilon in zip(owners, epsilons, strict=True)
    ]
    return market_of(specifications, feature_map)


def market_of(specifications: Sequence[Specification], feature_map: FeatureMap) -> Market:
    """Return the market of these releases."""
    columns = {views: columns_of(specifications, feature_map, views) for views in (1, 2)}
    return Market(centred_means(specifications, feature_map), columns)


def similarities(market: Market, sketch: Sketch, feature_map: FeatureMap) -> dict[str, Array]:
    """Return what each rule would rank by, largest first.

    The debiased MMD takes off the expected length of an owner's noise, and of its sampling; the plain one nothing.
    """
    columns, used = market.columns[sketch.views], sketch.views * feature_map.view_dimension
    products = market.means @ sketch.centred_mean
    squared = sketch.norm_squared - 2 * products + columns.norms_squared
    bias = used * (columns.noise_stds**2 + constants_for(feature_map, sketch.views).within / columns.counts)
    scores = market.score(sketch, feature_map)
    values = (
        scores.llr + np.where(accepted_in(scores, feature_map, sketch.views), 1e9, 0.0),  # as `rank` does: what would be a match first
        products / np.sqrt(np.maximum(columns.norms_squared, 1e-12)),
        -squared,
        -(squared - bias),
    )
    return dict(zip(RULES, values, strict=True))


def area_under_curve(present: Array, absent: Array) -> float:
    """Return the probability that a score of `present` is above one of `absent`, ties counted half."""
    ordered = np.sort(absent)
    below, not_above = np.searchsorted(ordered, present, "left"), np.searchsorted(ordered, present, "right")
    return float((below + not_above).mean() / (2 * len(absent)))


# Compositions.  A cell is one label of one task; a task without labels is one cell.


@dataclass(frozen=True, slots=True, eq=False)
class Pools:
    """Records by cell."""

    tasks: NDArray[np.int64]  # (C,), number of the cell's task
    train: tuple[Array, ...]
    test: tuple[Array, ...]
    shares: Array  # (C,), share of the cell among the training records of its task
    means: Array  # (C, D), mean feature of all records of a cell

    @property
    def labelled(self) -> NDArray[np.int64]:
        """Tasks of more than one cell."""
        numbers, cells = np.unique(self.tasks, return_counts=True)
        return numbers[cells > 1]


def pools_of(tasks: Sequence[Task]) -> Pools:
    """Return the records of tasks by cell; labels that occur in one of the two files only are left out."""
    numbers, train, test, shares = [], [], [], []
    for number, task in enumerate(tasks):
        labels = sorted(set(task.train_labels) & set(task.test_labels))
        of = [(np.array(task.train_labels) == label, np.array(task.test_labels) == label) for label in labels]
        total = sum(int(in_train.sum()) for in_train, _ in of)
        for in_train, in_test in of:
            numbers.append(number)
            train.append(task.train[in_train])
            test.append(task.test[in_test])
            shares.append(in_train.sum() / total)
    means = np.stack([np.concatenate([a, b]).mean(axis=0) for a, b in zip(train, test, strict=True)])
    return Pools(np.array(numbers), tuple(train), tuple(test), np.array(shares), means)


def of_task(pools: Pools, rng: np.random.Generator) -> Array:
    """Return the composition of one random task: a shard of it has the same."""
    return np.where(pools.tasks == rng.integers(pools.tasks.max() + 1), pools.shares, 0.0)


def of_labels(pools: Pools, rng: np.random.Generator) -> Array:
    """Return the composition of a random part, at most half, of the labels of a random labelled task."""
    cells = np.flatnonzero(pools.tasks == rng.choice(pools.labelled))
    kept = rng.permutation(cells)[: rng.integers(1, max(len(cells) // 2, 1) + 1)]
    weights = np.zeros(len(pools.tasks))
    weights[kept] = pools.shares[kept] / pools.shares[kept].sum()
    return weights


def of_mixture(concentration: float) -> Callable[[Pools, np.random.Generator], Array]:
    """Return what draws a Dirichlet mixture over the tasks, each in its natural composition."""

    def draw(pools: Pools, rng: np.random.Generator) -> Array:
        weights: Array = rng.dirichlet(np.full(pools.tasks.max() + 1, concentration))[pools.tasks] * pools.shares
        return weights

    return draw


KINDS: dict[str, Callable[[Pools, np.random.Generator], Array]] = {
    "shard of a task": of_task,
    "labels of a task": of_labels,
    "Dirichlet 0.1": of_mixture(0.1),
    "Dirichlet 0.5": of_mixture(0.5),
}


def sample(cells: Sequence[Array], composition: Array, n: int, rng: np.random.Generator) -> Array:
    """Return n features drawn from the cells in this composition."""
    counts = rng.multinomial(n, composition / composition.sum())
    return np.concatenate([cells[c][choose(rng, len(cells[c]), k)] for c, k in enumerate(counts) if k])


def total_variation(one: Array, other: Array) -> Array:
    """Return half the sum of absolute differences over the last axis: 0 the same composition, 1 nothing in common."""
    distance: Array = np.abs(one - other).sum(axis=-1) / 2
    return distance


def excess(values: Array, pick: int) -> float:
    """Return what a pick costs beyond the best possible one."""
    return float(values[pick] - values.min())


# Mixture weights.


def mixture_weights(means: Array, query: Array, noise_squared: Array | float = 0.0) -> Array:
    """Return the convex weights w with the smallest ||query - sum_i w_i mu_i||^2.

    means: (N, D) released means; query: (D,).  noise_squared: the expected squared length D sigma_i^2 of each mean's noise.  Independent
    noise lengthens the diagonal of the Gram matrix and nothing else, which makes even mixtures look too good: it is taken off there.
    What then is no Gram matrix any more loses its negative eigenvalues.
    """
    values, vectors = np.linalg.eigh(means @ means.T - np.diag(np.broadcast_to(noise_squared, len(means))))
    gram = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return simplex_least_squares(gram, means @ query)


# Intervals.


def interval(groups: Array, statistic: Callable[[Array], float] = lambda rows: float(rows.mean()), draws: int = 2000) -> list[float]:
    """Return the 95 % interval of a statistic by bootstrap over groups (tasks, or markets): the first axis of `groups`."""
    rng = np.random.default_rng(0)
    values = [statistic(groups[rng.integers(0, len(groups), len(groups))]) for _ in range(draws)]
    low, high = np.quantile(values, [0.025, 0.975])
    return [round(float(low), 4), round(float(high), 4)]
