"""Policies of choice: from a query's sketch and public releases to a score a release, and what was fitted on the public tasks for it.

Nothing here reads a loss of an evaluated task: losses come in only where a policy is fitted (public tasks) or judged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nodes.mixes import Owner
from nodes.simulate import seeded_noise
from protocol.features import FeatureMap
from protocol.privacy import Guarantee
from protocol.scoring import Scores, Sketch, accepted_in, constants_for, sketch_of
from protocol.specification import FEATURE_SCALE, Specification, estimate, quantise
from tests.bench.learnware_run import noise_of
from tests.bench.learnware_world import Settings, domain_of, query_rows
from tests.bench.rules import Array, Market, market_of, mixture_weights, publish, similarities

LABEL_SHARE = 1 / 3  # of a record's squared length, in the map that knows labels
SCENARIOS = ("seen", "unseen", "domain left out")
NOT_ALONE = 3  # candidates that are mixed, or tried on a user's own texts
RIDGES = (0.01, 0.1, 1.0, 10.0)
MATCHES_FIRST = 1e9


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """Owners with features, tasks with queries, and the matrix of losses: the market, or the public tasks on which policies are fitted."""

    tasks: tuple[str, ...]
    owners: tuple[Owner, ...]
    features: Mapping[str, Sequence[Array]]  # by map: of each owner (n, D)
    labels: Sequence[Array]
    pools: Mapping[str, Mapping[str, Array]]  # by map and task: of the texts that queries are drawn from
    pool_labels: Mapping[str, Array]
    losses: Array  # (N, T) nats a response token
    base: Array  # (T,)
    public_gains: Array  # (N, P): what each adapter gains on each public task, as a share of the base model's loss
    public_means: Array  # (P, D): mean feature of each public task

    @property
    def gains(self) -> Array:
        """(N, T): what each specialist saves, as a share of the base model's loss."""
        return 1 - self.losses / self.base


def candidates(owners: Sequence[Owner], task: str, scenario: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which owners are in the market of a scenario: (N,).

    seen: all.  unseen: those with a record of the task are left out.  domain left out: those with a record of its domain.
    """
    match scenario:
        case "seen":
            return np.ones(len(owners), bool)
        case "unseen":
            return np.array([task not in owner.records for owner in owners])
        case "domain left out":
            return np.array([domain_of(task) not in {domain_of(own) for own in owner.records} for owner in owners])
    raise ValueError(scenario)


# Releases --------------------------------------------------------------------------------------------------------------------


def specifications(world: World, feature_map: FeatureMap, epsilon: float, draw: int, settings: Settings) -> list[Specification]:
    """Return every owner's specification under one draw of seeded noise; draw 0 at the run's epsilon is what the guards released."""
    guarantee = Guarantee(epsilon, settings.delta)
    return [
        estimate(quantise(own), feature_map.map_id, guarantee, seeded_noise(settings.seed, *noise_of(epsilon, draw, owner.name)))
        for owner, own in zip(world.owners, world.features[feature_map.name], strict=True)
    ]


def market_under(world: World, feature_map: FeatureMap, epsilon: float, draw: int, settings: Settings) -> Market:
    """Return the market under one draw of noise, or without any at an infinite epsilon."""
    if math.isinf(epsilon):
        return publish(world.features[feature_map.name], [epsilon] * len(world.owners), feature_map, seeded_noise(0))
    return market_of(specifications(world, feature_map, epsilon, draw, settings), feature_map)


@dataclass(frozen=True, slots=True, eq=False)
class LabelMarket:
    """Releases of the map that knows labels: one sum a release, under the same mechanism, over features and label features side by side."""

    means: Array  # (N, D)
    label_means: Array  # (N, 72)
    noise_squared: Array  # (N,), of a coordinate


def label_market(world: World, feature_map: FeatureMap, epsilon: float, draw: int, settings: Settings) -> LabelMarket:
    """Return these releases.  A record's vector is (sqrt(2/3) z, sqrt(1/3) l): its length, and so sensitivity and noise, is as before."""
    inner, outer = math.sqrt(1 - LABEL_SHARE), math.sqrt(LABEL_SHARE)
    means, noise = [], []
    for owner, own, labels in zip(world.owners, world.features[feature_map.name], world.labels, strict=True):
        vectors = quantise(np.concatenate([inner * own, outer * labels], axis=1))
        if math.isinf(epsilon):
            means.append(vectors.rows[:, 1:].sum(axis=0) / (FEATURE_SCALE * len(own)))
            noise.append(0.0)
            continue
        source = seeded_noise(settings.seed, "labels", *noise_of(epsilon, draw, owner.name))
        release = estimate(vectors, feature_map.map_id, Guarantee(epsilon, settings.delta), source)
        means.append(release.mean)
        noise.append(release.noise_std**2)
    whole, cut = np.array(means), feature_map.dimension
    return LabelMarket(whole[:, :cut] / inner, whole[:, cut:] / outer, np.array(noise))


# Scores ------------------------------------------------------------------------------------------------------------------------


def view_distances(market: Market, sketch: Sketch, feature_map: FeatureMap) -> Array:
    """Return the squared distance of each view, noise taken off, as a share of that of unrelated tasks: (N, 2).

    A querier has both from two encrypted products: that of its sketch, and that of its prompt view alone.
    """
    half = feature_map.view_dimension
    scale = 2 * half * constants_for(feature_map, 2).between
    noise = market.columns[2].noise_stds ** 2
    parts = [((market.means[:, cut] - sketch.centred_mean[cut]) ** 2).sum(axis=1) for cut in (slice(0, half), slice(half, 2 * half))]
    return np.stack([(part - half * noise) / scale for part in parts], axis=1)


def label_distances(market: LabelMarket, query: Array, query_labels: Array, feature_map: FeatureMap) -> Array:
    """Return the squared distances of prompt view, response view and labels, noise taken off: (N, 3)."""
    half = feature_map.view_dimension
    scale = 2 * half * constants_for(feature_map, 2).between
    mean, labels = query.mean(axis=0), query_labels.mean(axis=0)
    shares = (1 - LABEL_SHARE, 1 - LABEL_SHARE, LABEL_SHARE)
    differences = (market.means[:, :half] - mean[:half], market.means[:, half:] - mean[half:], market.label_means - labels)
    squared = [
        (part**2).sum(axis=1) - part.shape[1] * market.noise_squared / share for part, share in zip(differences, shares, strict=True)
    ]
    return np.stack([squared[0] / scale, squared[1] / scale, squared[2]], axis=1)


def evidence(market: Market, sketch: Sketch, feature_map: FeatureMap, scores: Scores) -> Array:
    """Return what a release's match is judged by where a score is fitted: (N, 6)."""
    half = feature_map.view_dimension
    columns = market.columns[2]
    lengths = np.sqrt(np.maximum(columns.norms_squared, 1e-9))
    cosine = market.means @ sketch.centred_mean / lengths / math.sqrt(max(sketch.norm_squared, 1e-9))
    return np.column_stack([
        view_distances(market, sketch, feature_map), cosine, scores.llr / (2 * half), np.log(np.maximum(columns.counts, 1.0)),
        np.minimum(scores.separation, 2.0),
    ])  # fmt: skip


def public_evidence(world: World, sketch: Sketch, feature_map: FeatureMap, left_out: int | None = None) -> Array:
    """Return an adapter's mean gain on the public tasks, and that weighed by how near each is to the query: (N, 2).

    Anybody can measure these gains on a published adapter.  left_out: a public task that is to be predicted, and must not be looked at.
    A gain that is not a number (an adapter's own public task) is left out as well.
    """
    gains = world.public_gains.copy()
    if left_out is not None:
        gains[:, left_out] = np.nan
    known = np.isfinite(gains)
    distances = ((world.public_means - feature_map.task_mean - sketch.centred_mean) ** 2).sum(axis=1)
    near = np.exp(-distances / max(float(np.median(distances)), 1e-9) * 4)
    filled = np.where(known, gains, 0.0)
    plain = filled.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    weighed = (filled * near).sum(axis=1) / np.maximum((known * near).sum(axis=1), 1e-9)
    return np.column_stack([plain, weighed])


# Fitting ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """A linear score of evidence; only differences between the releases of one query mean anything."""

    scale: Array
    weights: Array

    def __call__(self, rows: Array) -> Array:
        """Return the score of each row."""
        return np.asarray(rows / self.scale @ self.weights)


def fit_ridge(groups: Sequence[tuple[Array, Array]]) -> Ridge:
    """Return the ridge regression of gains on evidence, both taken relative to the mean of their group (a public task).

    The penalty is the one of RIDGES with the smallest squared error on a group that was left out.
    """
    centred = [(x - x.mean(axis=0), y - y.mean()) for x, y in groups]
    scale = np.concatenate([x for x, _ in centred]).std(axis=0) + 1e-9

    def weights(some: Sequence[tuple[Array, Array]], penalty: float) -> Array:
        x, y = np.concatenate([x for x, _ in some]) / scale, np.concatenate([y for _, y in some])
        return np.asarray(np.linalg.solve(x.T @ x / len(x) + penalty * np.eye(x.shape[1]), x.T @ y / len(x)))

    def error(penalty: float) -> float:
        total = 0.0
        for i, (x, y) in enumerate(centred):
            others = [*centred[:i], *centred[i + 1 :]]
            total += float(((x / scale @ weights(others, penalty) - y) ** 2).mean())
        return total

    best = min(RIDGES, key=error) if len(centred) > 1 else RIDGES[2]
    return Ridge(scale, weights(centred, best))


def fit_weights(groups: Sequence[tuple[Array, Array]]) -> Array:
    """Return the weights of distances, not negative and of sum 1 in tenths, whose nearest release gains most on average over the groups."""
    width = groups[0][0].shape[1]
    grid = [np.array(w) / 10 for w in itertools.product(range(11), repeat=width) if sum(w) == 10]

    def gain(weights: Array) -> float:
        found = []
        for distances, gains in groups:
            spread = float(gains.max() - gains.mean())
            found.append(float(gains[int(np.argmin(distances @ weights))] - gains.mean()) / max(spread, 1e-9))
        return sum(found) / len(found)

    # Of equally good weights the most even ones.
    return max(grid, key=lambda weights: (round(gain(weights), 6), -float((weights**2).sum())))


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What was fitted on the public tasks."""

    views: Array  # weights of the two views' distances
    labels: Array  # of prompt view, response view and labels
    gain: Ridge  # predicted gain from the match alone
    gain_and_public: Ridge  # from the match and the adapter's gains on public tasks


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """A query at the market under one draw of noise."""

    task: int
    query: int
    draw: int
    sketches: Mapping[int, Sketch]  # by number of views
    rows: Sequence[int]  # of the pool


def looks(world: World, feature_map: FeatureMap, settings: Settings, draws: int) -> Iterator[Look]:
    """Yield every query of every task under every draw."""
    for number, task in enumerate(world.tasks):
        pool = world.pools[feature_map.name][task]
        for query, rows in enumerate(query_rows(len(pool), settings.query_size, settings.queries, settings.seed, task)):
            sketches = {views: sketch_of(pool[rows], feature_map, views) for views in (1, 2)}
            for draw in range(draws):
                yield Look(number, query, draw, sketches, rows)


def fit(world: World, feature_map: FeatureMap, epsilon: float, settings: Settings) -> Fitted:
    """Return what the public world teaches: each of its tasks in turn is asked for with its own owners left out."""
    draws = 1 if math.isinf(epsilon) else settings.draws
    markets = [market_under(world, feature_map, epsilon, draw, settings) for draw in range(draws)]
    with_labels = [label_market(world, feature_map, epsilon, draw, settings) for draw in range(draws)]
    by_task: dict[int, list[tuple[Array, Array, Array]]] = {}
    by_query: list[tuple[Array, Array, Array]] = []
    for look in looks(world, feature_map, settings, draws):
        task = world.tasks[look.task]
        kept = candidates(world.owners, task, "unseen")
        if kept.sum() < 2:
            continue
        sketch, market, gains = look.sketches[2], markets[look.draw], world.gains[kept, look.task]
        match = evidence(market, sketch, feature_map, market.score(sketch, feature_map))[kept]
        known = public_evidence(world, sketch, feature_map, left_out=look.task)[kept]
        by_task.setdefault(look.task, []).append((match, np.concatenate([match, known], axis=1), gains))
        query, labels = world.pools[feature_map.name][task][look.rows], world.pool_labels[task][look.rows]
        by_label = label_distances(with_labels[look.draw], query, labels, feature_map)[kept]
        by_query.append((view_distances(market, sketch, feature_map)[kept], by_label, gains))
    groups = [[np.concatenate([part[k] for part in parts]) for k in range(3)] for parts in by_task.values()]
    return Fitted(
        fit_weights([(views, gains) for views, _, gains in by_query]),
        fit_weights([(by_label, gains) for _, by_label, gains in by_query]),
        fit_ridge([(match, gains) for match, _, gains in groups]),
        fit_ridge([(both, gains) for _, both, gains in groups]),
    )


def rankings(
    world: World,
    look: Look,
    views: int,
    market: Market,
    feature_map: FeatureMap,
    fitted: Fitted | None,
    with_labels: LabelMarket | None,
) -> dict[str, Array]:
    """Return the scores of all releases under each rule, largest first.

    Fitted rules keep what the product does first: releases that the two-sample test accepts come before all others.
    """
    sketch = look.sketches[views]
    found = {rule: values for rule, values in similarities(market, sketch, feature_map).items() if rule != "debiased MMD"}
    if fitted is None or views == 1:
        return found
    scores = market.score(sketch, feature_map)
    first = np.where(accepted_in(scores, feature_map, 2), MATCHES_FIRST, 0.0)
    views_apart = view_distances(market, sketch, feature_map)
    found["prompt view alone"], found["response view alone"] = -views_apart[:, 0], -views_apart[:, 1]
    found["weights of the views"] = first - views_apart @ fitted.views
    match = evidence(market, sketch, feature_map, scores)
    found["predicted gain"] = first + fitted.gain(match)
    both = np.concatenate([match, public_evidence(world, sketch, feature_map)], axis=1)
    found["predicted gain, public scores"] = first + fitted.gain_and_public(both)
    if with_labels is not None:
        task = world.tasks[look.task]
        query, labels = world.pools[feature_map.name][task][look.rows], world.pool_labels[task][look.rows]
        found["label-aware"] = first - label_distances(with_labels, query, labels, feature_map) @ fitted.labels
    return found


# Several together --------------------------------------------------------------------------------------------------------------


def best(values: Array, kept: Array, count: int = 1) -> list[int]:
    """Return the best releases among those that are kept, best first."""
    order = np.argsort(-np.where(kept, values, -np.inf), kind="stable")
    return [int(i) for i in order[: min(count, int(kept.sum()))]]


def weights_of(market: Market, picks: Sequence[int], sketch: Sketch, feature_map: FeatureMap) -> Array:
    """Return the product's mixture weights of some releases, from their specifications alone (docs/protocol.md 5.7)."""
    used, columns = sketch.views * feature_map.view_dimension, market.columns[sketch.views]
    at = list(picks)
    excess = used * (columns.noise_stds[at] ** 2 + constants_for(feature_map, sketch.views).within / columns.counts[at])
    return mixture_weights(market.means[at][:, :used], sketch.centred_mean[:used], excess)


def mixture_loss(nats: Array, weights: Array) -> float:
    """Return the mean loss a token of the weighed mean of next-token probabilities; nats: (K, tokens) of each part."""
    highest = -nats.min(axis=0)
    return float(-(np.log(weights @ np.exp(-nats - highest)) + highest).mean())


def fitted_mixture(nats: Array, rounds: int = 30) -> Array:
    """Return the weights under which a mixture loses least on some tokens, (K, tokens): expectation maximisation from even weights."""
    likelihoods = np.exp(-(nats - nats.min(axis=0)))
    weights = np.full(len(nats), 1 / len(nats))
    for _ in range(rounds):
        shares = weights[:, None] * likelihoods
        weights = (shares / shares.sum(axis=0)).mean(axis=1)
    return weights
