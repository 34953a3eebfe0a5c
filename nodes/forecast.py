"""How useful a specification would be at each epsilon, before anything is released: simulated from an owner's own records.

Some records play the querier and the others the owner, again and again; the noise of a release is imitated in floating point, which no
release is ever made of.  Nothing is charged and nothing leaves.  What comes out depends on the records without any guarantee: it is for
their owner's eyes alone.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nodes.guard import Progress, ignore_progress
from protocol.errors import RecordError
from protocol.features import FeatureMap
from protocol.privacy import NORM_SQUARED, Guarantee, noise_variance
from protocol.scoring import Verdict, score_releases, sketch_of, verdict_of
from protocol.specification import Specification, quantise_units

EPSILONS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
QUERY_SIZE = 50  # texts of a query; a fifth of the records where that is fewer
SMALLEST_QUERY = 4
REPEATS = 200


@dataclass(frozen=True, slots=True)
class Outlook:
    """What queries of the owner's own task would be told at one epsilon; shares of 1."""

    epsilon: float
    noise_std: float  # of each integer
    match: float
    cannot_tell: float
    other: float  # "sibling" or "none": the owner's own task is taken for another one
    error: float  # standard error of `match`


@dataclass(frozen=True, slots=True)
class Forecast:
    """The outlook at each epsilon, and what it was simulated with."""

    units: int  # privacy units of the owner in the simulation: all but those that played the querier
    query_size: int
    repeats: int
    outlooks: tuple[Outlook, ...]


def forecast(
    features: NDArray[np.float64],
    units: Sequence[str],
    feature_map: FeatureMap,
    delta: float,
    *,
    views: int = 2,
    epsilons: Sequence[float] = EPSILONS,
    repeats: int = REPEATS,
    on_progress: Progress = ignore_progress,
) -> Forecast:
    """Return how often queries of the owner's own task would find the release.

    features: (n, D) of the records; units: n names, equal where records belong to one privacy unit.  Raises RecordError where there are
    too few units for both sides.
    """
    names, unit_of = np.unique(np.asarray(units), return_inverse=True)
    rows = quantise_units(features, list(units)).rows  # in the order of first appearance
    first = {name: place for place, name in enumerate(dict.fromkeys(units))}
    order = np.array([first[name] for name in names])
    asking = min(QUERY_SIZE, len(names) // 5)
    if asking < SMALLEST_QUERY:
        raise RecordError(
            f"forecast: expected at least {5 * SMALLEST_QUERY} records or units, got {len(names)}",
            hint="a fifth of them plays the querier",
        )
    total = rows.sum(axis=0)
    guarantees = [Guarantee(epsilon, delta) for epsilon in epsilons]
    variances = [noise_variance(guarantee, NORM_SQUARED) for guarantee in guarantees]
    # From the operating system: nobody is protected by it, and no seed that somebody knows is in what an owner decides by.
    draw = np.random.default_rng(secrets.randbits(128))
    told: list[Counter[Verdict]] = [Counter() for _ in epsilons]
    for done in range(repeats):
        querier = draw.choice(len(names), asking, replace=False)
        texts = np.flatnonzero(np.isin(unit_of, querier))
        sketch = sketch_of(features[draw.choice(texts, min(len(texts), QUERY_SIZE), replace=False)], feature_map, views)
        exact = total - rows[order[querier]].sum(axis=0)
        imitations = [
            Specification(
                feature_map.map_id, np.rint(exact + draw.normal(0.0, variance**0.5, len(exact))).astype(np.int32), variance, guarantee
            )
            for guarantee, variance in zip(guarantees, variances, strict=True)
        ]
        scores = score_releases(imitations, sketch, feature_map)
        for place, counted in enumerate(told):
            counted[verdict_of(scores, place, feature_map, views)] += 1
        if done % 10 == 9:
            on_progress("simulate queries", done + 1, repeats)
    outlooks = []
    for guarantee, variance, counted in zip(guarantees, variances, told, strict=True):
        match, unsure = counted[Verdict.MATCH] / repeats, counted[Verdict.CANNOT_TELL] / repeats
        error = (match * (1 - match) / repeats) ** 0.5
        other = (counted[Verdict.SIBLING] + counted[Verdict.NONE]) / repeats
        outlooks.append(Outlook(guarantee.epsilon, variance**0.5, match, unsure, other, error))
    return Forecast(len(names) - asking, asking, repeats, tuple(outlooks))
