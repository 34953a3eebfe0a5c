"""Synthetic catalogues drawn like the real ones, in clusters: what a search of a few clusters finds, and what it shows.

A task's mean is drawn between tasks (tau^2 a coordinate), an owner's around it (sampling and drift within a task, w^2), and its release
has the noise of its epsilon and size: the constants are those of the shipped map, the noise that of `protocol.privacy`, the score and
the test those of `protocol.scoring`.  How near tasks of one domain are, and over how many dimensions task means spread, is measured on
the real tasks that the map was not fitted on.  Catalogues of this size do not exist, and that shape decides what clusters are worth: so
another one is drawn beside it, without any structure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.optimize import brentq

from protocol.catalogue import Columns
from protocol.features import VIEWS, FeatureMap
from protocol.privacy import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Guarantee, noise_variance
from protocol.scoring import Sketch, accepted_in, score

Floats = NDArray[np.float32]
Numbers = NDArray[np.intp]

OWNERS_A_TASK = 10
SIBLINGS = 0.3  # of the squared distance of unrelated tasks: nearer ones are of one domain
POPULARITY = 0.8  # of a task among owners and queriers: 1 / rank to this power
COUNTS, EPSILONS = (100, 5_000), (0.5, 1.0, 2.0)  # records of an owner, log-uniform; what a market admits by default
TEXTS = 50
LEARNT, GUESSED = 40, 2_000  # queries of each task that a market has seen, and queries that it guesses the task of
SAMPLE, SAMPLE_A_CLUSTER, ROUNDS = 20_000, 64, 12  # rows that k-means sees, at least, and for each centre; its rounds


class Kind(NamedTuple):
    """A shape of catalogue."""

    name: str
    related: float  # squared distance of two tasks of one domain, as a share of that of unrelated ones; 1: no domains
    dimensions: float  # that task means spread over, effectively: (tr C)^2 / tr C^2 of their covariance C


def shape_of(means: NDArray[np.float64]) -> tuple[float, float]:
    """Return how near siblings are, as a share of the mean distance, and over how many dimensions task means spread.

    means: (T, D) of tasks, relative to the map's task mean.  Of pairs that are no siblings, (mean ||x||^2)^2 / mean <x, y>^2 has the
    effective dimension for its expectation, however few tasks there are; the spectrum of so few would make it too small.
    """
    products = means @ means.T
    lengths = np.diag(products)
    distances = lengths[:, None] + lengths - 2 * products
    apart = ~np.eye(len(means), dtype=bool)
    shares = distances / distances[apart].mean()
    siblings = shares[apart & (shares < SIBLINGS)]
    related = float(np.median(siblings)) if len(siblings) else 1.0
    return related, float(lengths.mean() ** 2 / (products[apart & (shares >= SIBLINGS)] ** 2).mean())


@dataclass(frozen=True, eq=False)
class World:
    """A catalogue: releases of owners of tasks of domains; positions are relative to the map's task mean."""

    feature_map: FeatureMap
    tasks: Floats  # (T, D)
    domains: Numbers  # (T,)
    weights: NDArray[np.float64]  # (T,), probability that an owner, or a querier, has a task
    task_of: Numbers  # (N,)
    means: Floats  # (N, D), as released: noise in them
    columns: Columns

    @classmethod
    def draw(cls, feature_map: FeatureMap, releases: int, kind: Kind, rng: np.random.Generator) -> World:
        """Return a catalogue of so many releases."""
        constants, dimension = feature_map.full, feature_map.dimension
        count = max(releases // OWNERS_A_TASK, 4)
        groups = max(math.isqrt(count), 2)
        domains = rng.integers(0, groups, count)
        spectrum = _spectrum(kind.dimensions, dimension)
        shared, own = (spectrum * rng.standard_normal((n, dimension), np.float32) for n in (groups, count))
        tasks = math.sqrt(constants.between * (1 - kind.related)) * shared[domains] + math.sqrt(constants.between * kind.related) * own
        weights = 1.0 / (1 + rng.permutation(count)) ** POPULARITY
        weights /= weights.sum()
        task_of = rng.choice(count, releases, p=weights)

        low, high = np.log(COUNTS)
        counts = np.exp(rng.uniform(low, high, releases))
        of_epsilon = np.sqrt([noise_variance(Guarantee(epsilon, 1e-6), NORM_SQUARED) for epsilon in EPSILONS])
        deviations = of_epsilon[rng.integers(0, len(EPSILONS), releases)]
        noise = deviations / (FEATURE_SCALE * counts)
        spread = np.sqrt(constants.within * (1 / counts + constants.drift / 2) + noise**2).astype(np.float32)
        means = tasks[task_of]
        for rows in _slices(releases):
            means[rows] += spread[rows, None] * rng.standard_normal((len(means[rows]), dimension), np.float32)
        columns = Columns(counts, deviations / COUNT_STEP, noise, np.einsum("ij,ij->i", means, means).astype(np.float64))
        return cls(feature_map, tasks, domains, weights, task_of, means, columns)

    def queries(self, tasks: Numbers, rng: np.random.Generator) -> Floats:
        """Return a query's mean for each of these tasks, (Q, D)."""
        constants = self.feature_map.full
        spread = math.sqrt(constants.within * (1 / TEXTS + constants.drift / 2))
        drawn: Floats = self.tasks[tasks] + np.float32(spread) * rng.standard_normal((len(tasks), self.tasks.shape[1]), np.float32)
        return drawn

    def ranked(self, query: Floats) -> NDArray[np.float64]:
        """Return by what the product ranks, for every release: those that the test accepts first, then by LLR."""
        within = self.feature_map.full.within * np.eye(self.feature_map.dimension)
        sketch = Sketch(query.astype(np.float64), within, TEXTS, len(VIEWS))
        scores = score((self.means @ query).astype(np.float64), self.columns, sketch, self.feature_map)
        return scores.llr + 1e9 * accepted_in(scores, self.feature_map, len(VIEWS))

    @property
    def shrunk(self) -> NDArray[np.float64]:
        """By how much each mean is to be shrunk toward the task mean: a noisy one says little about where it belongs.  (N,)."""
        constants = self.feature_map.full
        counts, noise = self.columns.counts, self.columns.noise_stds**2
        return constants.between / (constants.between + constants.within * (1 / counts + constants.drift / 2) + noise)


def _spectrum(dimensions: float, dimension: int) -> Floats:
    """Return standard deviations of coordinates, (D,), of mean square 1, that fall off geometrically to so many effective dimensions."""

    def effective(ratio: float) -> float:
        values = ratio ** np.arange(dimension)
        return float(values.sum() ** 2 / (values**2).sum())

    ratio = brentq(lambda ratio: effective(ratio) - dimensions, 1e-6, 1.0) if dimensions < dimension else 1.0
    variances = ratio ** np.arange(dimension)
    return np.sqrt(dimension * variances / variances.sum()).astype(np.float32)


def _slices(count: int, step: int = 1 << 14) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def nearest(points: Floats, centres: Floats, most: int) -> Numbers:
    """Return for each point its nearest centres, the nearest first: (n, most)."""
    lengths, found = np.einsum("ij,ij->i", centres, centres), np.empty((len(points), most), np.intp)
    for rows in _slices(len(points)):
        distances = lengths - 2 * points[rows] @ centres.T
        if most < len(centres):
            few = np.argpartition(distances, most - 1, axis=1)[:, :most]
            distances = np.take_along_axis(distances, few, axis=1)
            found[rows] = np.take_along_axis(few, np.argsort(distances, axis=1), axis=1)
        else:
            found[rows] = np.argsort(distances, axis=1)
    return found


@dataclass(frozen=True, eq=False)
class Clusters:
    """A catalogue in clusters of bounded size; everything here is public."""

    centres: Floats  # (K, D)
    of_release: Numbers  # (N,)

    @classmethod
    def of(cls, world: World, count: int, fill: float, rng: np.random.Generator) -> Clusters:
        """Return `count` clusters, none larger than the mean size over `fill`: what does not fit goes to the next nearest.

        k-means on a sample of the shrunk means (scipy).
        """
        releases = len(world.means)
        sample = rng.choice(releases, min(releases, max(SAMPLE_A_CLUSTER * count, SAMPLE)), replace=False)
        points = world.means[sample] * world.shrunk[sample, None].astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a cluster that lost all its points: it keeps its centre
            centres, _ = kmeans2(points, count, iter=ROUNDS, minit="points", rng=rng)
        centres = centres.astype(np.float32)
        room = np.full(count, math.ceil(releases / count / fill))
        wanted = nearest(world.means, centres, min(8, count))
        of_release = np.full(releases, -1, np.intp)
        for turn in range(wanted.shape[1]):
            left = np.flatnonzero(of_release < 0)
            left = left[np.argsort(-world.shrunk[left], kind="stable")]  # those first that are sure where they belong
            wish = wanted[left, turn]
            order = np.argsort(wish, kind="stable")
            starts = np.searchsorted(wish[order], np.arange(count))
            place = np.empty(len(left), np.intp)
            place[order] = np.arange(len(left)) - starts[wish[order]]
            taken = place < room[wish]
            of_release[left[taken]] = wish[taken]
            room -= np.bincount(wish[taken], minlength=count)
        left = np.flatnonzero(of_release < 0)
        of_release[left] = np.repeat(np.arange(count), room)[: len(left)]
        return cls(centres, of_release)


def recall(
    world: World, clusters: Sequence[Clusters], probes: Sequence[int], queries: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return for each clustering what a search of the nearest clusters finds of what a search of everything finds."""
    tasks = rng.choice(len(world.tasks), queries, p=world.weights)
    asked = world.queries(tasks, rng)
    # `first`: the probe that meets the best release; `tenth`: the share of the ten best that each number of probes meets.
    first = np.empty((len(clusters), queries), np.intp)
    tenth, right = (np.zeros((len(clusters), len(probes))) for _ in range(2))
    exact_right = 0.0
    orders = [np.argsort(nearest(asked, one.centres, len(one.centres)), axis=1) for one in clusters]
    for number, query in enumerate(asked):
        values = world.ranked(query)
        ten = np.argpartition(-values, 10)[:10]
        best = ten[values[ten].argmax()]
        exact_right += world.task_of[best] == tasks[number]
        for which, one in enumerate(clusters):
            turn = orders[which][number][one.of_release]  # when each release's cluster is probed
            first[which, number] = turn[best]
            for place, probed in enumerate(probes):
                tenth[which, place] += (turn[ten] < probed).mean()
                seen = np.flatnonzero(turn < probed)
                found = seen[values[seen].argmax()]
                right[which, place] += world.task_of[found] == tasks[number]
    return [
        {
            "clusters": len(one.centres), "probes": probed, "recall_at_1": round(float((first[which] < probed).mean()), 4),
            "recall_at_10": round(float(tenth[which, place] / queries), 4), "right_task": round(float(right[which, place] / queries), 4),
            "right_task_exact": round(float(exact_right / queries), 4), "queries": queries,
            "largest_over_mean": round(float(np.bincount(one.of_release).max() * len(one.centres) / len(one.of_release)), 2),
        }
        for which, one in enumerate(clusters)
        for place, probed in enumerate(probes)
        if probed <= len(one.centres)
    ]  # fmt: skip


# What probes show -------------------------------------------------------------------------------------------------------------


def sticky_groups(clusters: Clusters, size: int) -> Numbers:
    """Return a group for each cluster, (K,): fixed for everybody, of clusters that have nothing to do with each other.

    Whoever wants one of a group probes all of it, so that however often somebody comes, the group is all that shows.
    """
    count = len(clusters.centres)
    groups = -(-count // size)
    # Neighbours follow each other along the first axes of the centres; every `groups`-th of them makes a group.
    axis = np.linalg.svd(clusters.centres - clusters.centres.mean(axis=0), full_matrices=False)[2][0]
    order = np.argsort(clusters.centres @ axis)
    found = np.empty(count, np.intp)
    found[order] = np.arange(count) % groups
    return found


def leak(world: World, clusters: Clusters, size: int, times: int, rng: np.random.Generator, guesses: int = GUESSED) -> list[dict[str, Any]]:
    """Return what a market learns of the task from the clusters that are probed: from one query, and from `times` queries of one task.

    The market knows the tasks, how popular each is, and for each task how often its queries go to which cluster: it is given
    `LEARNT` queries of every task for that.  It guesses the likeliest task and the likeliest domain.
    """
    count, tasks = len(clusters.centres), len(world.tasks)
    table = np.full((tasks, count), 1e-3 / count)
    for _ in range(LEARNT):
        home = nearest(world.queries(np.arange(tasks), rng), clusters.centres, 1)[:, 0]
        table[np.arange(tasks), home] += 1 / LEARNT
    table /= table.sum(axis=1, keepdims=True)
    asked = rng.choice(tasks, guesses, p=world.weights)
    homes = np.stack([nearest(world.queries(asked, rng), clusters.centres, 1)[:, 0] for _ in range(times)], axis=1)
    groups = sticky_groups(clusters, size)
    members = np.zeros((count, groups.max() + 1))
    members[np.arange(count), groups] = 1.0
    grouped = table @ members
    rows = [
        {"way": "the clusters in the clear", **_guesses(world, np.log(table), homes, asked)},
        {"way": f"{size - 1} random ones beside it", **_covered(world, table, homes, asked, size, rng)},
        {"way": f"a fixed group of {size}", **_guesses(world, np.log(grouped), groups[homes], asked)},
        {"way": "number hidden", **_guesses(world, np.zeros((tasks, 1)), np.zeros_like(homes), asked)},
    ]
    return [{"clusters": count, "times": times, **row} for row in rows]


def _guesses(world: World, log_table: NDArray[np.float64], seen: Numbers, asked: Numbers) -> dict[str, Any]:
    """Return how well tasks and domains are guessed from what is seen, once and every time, and the bits that one look tells."""
    prior = np.log(world.weights)
    shares = np.exp(log_table)
    overall = world.weights @ shares
    bits = float(world.weights @ (shares * np.log2(shares / overall)).sum(axis=1))
    result: dict[str, Any] = {"bits": round(max(bits, 0.0), 3), "of_bits": round(float(-(world.weights * np.log2(world.weights)).sum()), 3)}
    for name, looks in (("once", seen[:, :1]), ("every_time", seen)):
        posterior = [prior + log_table[:, look].sum(axis=1) for look in looks]
        result[name] = _right(world, posterior, asked)
    return result


def _covered(
    world: World, table: NDArray[np.float64], homes: Numbers, asked: Numbers, size: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the same for a probe that goes with others at random, drawn anew each time."""
    prior, count = np.log(world.weights), table.shape[1]
    posteriors: dict[str, list[NDArray[np.float64]]] = {"once": [], "every_time": []}
    bits = 0.0
    entropy = float(-(world.weights * np.log2(world.weights)).sum())
    for looks in homes:
        posterior = prior.copy()
        for number, home in enumerate(looks):
            others = rng.choice(count - 1, min(size - 1, count - 1), replace=False)
            probed = np.append(others + (others >= home), home)
            # Each of those that are probed is as likely to be the real one: the chance of the others is the same for every task.
            posterior = posterior + np.log(table[:, probed].sum(axis=1))
            if number == 0:
                posteriors["once"].append(posterior)
        posteriors["every_time"].append(posterior)
    for posterior in posteriors["once"]:
        share = np.exp(posterior - posterior.max())
        share /= share.sum()
        bits += entropy + float((share * np.log2(np.maximum(share, 1e-300))).sum())
    result: dict[str, Any] = {"bits": round(max(bits / len(asked), 0.0), 3), "of_bits": round(entropy, 3)}
    return result | {name: _right(world, posterior, asked) for name, posterior in posteriors.items()}


def _right(world: World, posteriors: Sequence[NDArray[np.float64]], asked: Numbers) -> dict[str, float]:
    """Return the shares of right guesses of the task and of the domain, and how many tasks are left in doubt."""
    tasks = domains = 0
    left = 0.0
    for posterior, task in zip(posteriors, asked, strict=True):
        share = np.exp(posterior - posterior.max())
        share /= share.sum()
        tasks += int(share.argmax() == task)
        domains += int(np.bincount(world.domains, share).argmax() == world.domains[task])
        left += float(-(share * np.log2(np.maximum(share, 1e-300))).sum())
    count = len(asked)
    return {"task": round(tasks / count, 4), "domain": round(domains / count, 4), "tasks_left": round(2 ** (left / count), 1)}
