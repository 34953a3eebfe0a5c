"""Was this record in? One attack on our specification, and one on the kind of specification that other learnware systems publish.

Ours: the attacker knows all other records and the noise's size, subtracts them and projects on the record in question: the likelihood
ratio test, the best there is.  What it can reach is bounded by the guarantee (nodes/audit/bounds.py, Ceiling).
Reduced set: a data set summarised by few weighted points whose kernel mean is close to that of the data (reduced kernel mean embedding;
Wu, Xu, Zhou 2021).  No noise is in it.  The attacker asks how near the nearest published point is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nodes.audit.bounds import Ceiling, mu_of
from nodes.audit.specification import Mechanism, our_mechanism
from protocol.errors import UsageError
from protocol.privacy import Guarantee
from protocol.specification import FEATURE_SCALE, quantise

POINTS = 100  # of a reduced set, at most; two thirds of the records where there are fewer
BANDWIDTH = 0.1  # gamma of the kernel exp(-gamma ||x - y||^2) on vectors of unit length
ROUNDS = 50
NEAR = 0.01  # distance at which a published point is as good as the record


@dataclass(frozen=True, slots=True)
class Attack:
    """How well members are told from strangers."""

    auc: float
    error: float  # standard error of auc over releases; 0 where nothing was drawn
    true_positives: float  # at 1 % false positives


def attack_ours(
    members: NDArray[np.float64], strangers: NDArray[np.float64], guarantee: Guarantee, releases: int, mechanism: Mechanism = our_mechanism
) -> Attack:
    """Return how the best attack does against the mechanism, over so many releases of the members (n, D), fresh noise in each.

    strangers (m, D): records of the same task that are not in.  The releases are drawn here and leave this process never.
    """
    known = quantise(members).rows.sum(axis=0)[1:].astype(np.float64)
    inside, outside, areas = [], [], []
    for _ in range(releases):
        # Scores within one release share its noise, so members of one are held against strangers of another.
        noise = [(np.asarray(mechanism(members, guarantee), np.float64)[1:] - known) / FEATURE_SCALE for _ in range(2)]
        # What is left of the sums when all other records are subtracted: the noise, and a member's own feature.
        inside.append(members @ noise[0] + (members**2).sum(axis=1))
        outside.append(strangers @ noise[1])
        areas.append(rates(inside[-1], outside[-1]).auc)
    whole = rates(np.concatenate(inside), np.concatenate(outside))
    return Attack(float(np.mean(areas)), float(np.std(areas) / releases**0.5), whole.true_positives)


def ceiling(guarantee: Guarantee) -> Ceiling:
    """Return what no attack on one release can pass."""
    return Ceiling(mu_of(guarantee.epsilon, guarantee.delta))


def attack_reduced_set(members: NDArray[np.float64], strangers: NDArray[np.float64], seed: int = 0) -> tuple[Attack, int]:
    """Return how the nearest published point tells members from strangers, and how many published points are a record."""
    points, _ = reduced_set(members, seed=seed)
    inside, outside = _distances(members, points).min(axis=1), _distances(strangers, points).min(axis=1)
    copies = int((_distances(points, members).min(axis=1) < NEAR).sum())
    return rates(-inside, -outside), copies


def reduced_set(
    data: NDArray[np.float64], count: int | None = None, gamma: float = BANDWIDTH, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the points (K, d) and weights (K,) of a reduced set of data (n, d): centroids, then alternately weights and points.

    Weights minimise || mean_i k(x_i, .) - sum_j w_j k(z_j, .) ||^2 given the points (a linear system); points follow its gradient.
    """
    if len(data) < 3:
        raise UsageError(f"reduced set: expected at least 3 records, got {len(data)}")
    count = min(count or POINTS, len(data) * 2 // 3)
    points = _centroids(data, count, np.random.default_rng(seed))  # chooses nothing that protects anybody
    weights = _weights(data, points, gamma)
    for _ in range(ROUNDS):
        to_data, among = _kernel(points, data, gamma), _kernel(points, points, gamma)
        pull = (to_data[:, :, None] * (data[None] - points[:, None])).mean(axis=1)
        push = ((among * weights[None])[:, :, None] * (points[None] - points[:, None])).sum(axis=1)
        points = points + 0.5 * np.sign(weights)[:, None] * (pull - push)
        weights = _weights(data, points, gamma)
    return points, weights


def rates(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> Attack:
    """Return AUC and true positives at 1 % false positives of scores that are larger for members."""
    order = np.sort(outside)
    below = np.searchsorted(order, inside, side="left") + np.searchsorted(order, inside, side="right")
    auc = float(below.mean() / (2 * len(outside)))
    threshold = order[min(math.ceil(0.99 * len(order)), len(order) - 1)]
    return Attack(auc, 0.0, float((inside > threshold).mean()))


def _centroids(data: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    points = data[rng.choice(len(data), count, replace=False)]
    for _ in range(ROUNDS):
        nearest = _distances(data, points).argmin(axis=1)
        points = np.array([data[nearest == j].mean(axis=0) if (nearest == j).any() else points[j] for j in range(count)])
    return points


def _weights(data: NDArray[np.float64], points: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    gram = _kernel(points, points, gamma) + 1e-6 * np.eye(len(points))
    weights: NDArray[np.float64] = np.linalg.solve(gram, _kernel(points, data, gamma).mean(axis=1))
    return weights


def _kernel(left: NDArray[np.float64], right: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.exp(-gamma * _distances(left, right) ** 2)
    return values


def _distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * left @ right.T
    distances: NDArray[np.float64] = np.sqrt(np.maximum(squares, 0.0))
    return distances
