"""Mixture weights: which releases together look like a task (docs/protocol.md 5.7).

A pure function of public means and the querier's sketch.  It needs the products of releases with each other, hence the releases in
clear: a mirror, or the few that were fetched.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import centred_means, columns_of
from protocol.features import FeatureMap
from protocol.scoring import Sketch, constants_for
from protocol.specification import Specification

STEPS = 2000


def mixture_weights(specifications: Sequence[Specification], sketch: Sketch, feature_map: FeatureMap) -> NDArray[np.float64]:
    """Return weights (N,), not negative and of sum 1, with which the releases' means come nearest to the task's.

    Simplex least squares on the Gram matrix.  The diagonal of noisy means is too large by D sigma_i^2 and by their sampling: taken off,
    or noisy releases would be used less than they deserve (total-variation error 0.36 to 0.25 at n = 120, epsilon 1, in prototypes).
    """
    if not specifications:
        return np.zeros(0)
    used = sketch.views * feature_map.view_dimension
    means = centred_means(specifications, feature_map)[:, :used]
    columns = columns_of(specifications, feature_map, sketch.views)
    excess = used * (columns.noise_stds**2 + constants_for(feature_map, sketch.views).within / columns.counts)
    gram = means @ means.T - np.diag(excess)
    values, vectors = np.linalg.eigh(gram)  # what was taken off may leave it indefinite: the nearest matrix that is not
    gram = (vectors * np.maximum(values, 1e-9)) @ vectors.T
    return simplex_least_squares(gram, means @ sketch.centred_mean[:used])


def simplex_least_squares(gram: NDArray[np.float64], products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the w >= 0 of sum 1 that minimises w^T gram w - 2 w^T products, gram positive semi-definite.

    Accelerated projected gradients (Beck and Teboulle 2009) with the projection of Duchi et al. 2008.
    """
    count = len(products)
    step = 1 / max(float(np.linalg.eigvalsh(gram)[-1]), 1e-12)
    w = ahead = np.full(count, 1 / count)
    momentum = 1.0
    for _ in range(STEPS):
        following = _onto_simplex(ahead - step * (gram @ ahead - products))
        next_momentum = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / next_momentum * (following - w)
        if np.abs(following - w).max() < 1e-12:
            return following
        w, momentum = following, next_momentum
    return w


def _onto_simplex(v: NDArray[np.float64]) -> NDArray[np.float64]:
    descending = np.sort(v)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(v) + 1)
    last = int(np.flatnonzero(descending > excess)[-1])
    projected: NDArray[np.float64] = np.maximum(v - excess[last], 0.0)
    return projected
