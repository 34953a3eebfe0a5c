"""Scores: the noise-aware log-likelihood ratio, its error bar, and the two-sample test that can say no (docs/protocol.md 5).

Everything here is a pure function of public scalars, the querier's own sketch and one inner product a release.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import Catalogue, Columns, centred_means, columns_of
from protocol.errors import FormatError
from protocol.features import FeatureMap, ScoringConstants
from protocol.specification import Specification

# Owner's and user's texts drift apart by more than sampling, and overstating the query size makes the model prefer noisy releases: with
# 16 instead of 10, picks among owners of mixed tasks fell on the noisiest fifth in 16 % instead of 10 % of the queries.
MAX_QUERY_SIZE = 10
FEW_TEXTS = 16  # below, the covariance of the query's own texts is mostly noise
TIE_STDS = 2.0
# A bare "match" promises that the test would have told a task this far away, as a share of the mean squared distance of unrelated tasks.
SEPARATION = 0.032


class Verdict(StrEnum):
    """What a search found."""

    MATCH = "match"
    SIBLING = "sibling"  # another task, but nearer than any two of the map's public tasks are to each other
    NONE = "none"
    CANNOT_TELL = "cannot tell"  # the noise leaves the test without power to keep related tasks apart


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """A task, reduced to what scoring needs.  Secret: it never leaves the querier in clear."""

    centred_mean: NDArray[np.float64]  # (D,), q - g; the response half is zero for a query of prompts alone
    covariance: NDArray[np.float64]  # (d, d) over the d coordinates in use
    size: int  # number of texts
    views: int  # 2 with responses, 1 without

    @property
    def norm_squared(self) -> float:
        """||q - g||^2."""
        return float(self.centred_mean @ self.centred_mean)


def sketch_of(features: NDArray[np.float64], feature_map: FeatureMap, views: int) -> Sketch:
    """Return the sketch of a task: features (n, D) of its texts, `views` = 2 if every text has a response, else 1."""
    if not len(features):
        raise FormatError("query: expected at least one text")
    used = views * feature_map.view_dimension
    centred = np.zeros(feature_map.dimension)
    centred[:used] = features[:, :used].mean(axis=0) - feature_map.task_mean[:used]
    constants = constants_for(feature_map, views)
    # With few texts their own covariance is mostly noise: shrink it toward the public one.
    weight = min(len(features) - 1, FEW_TEXTS) / FEW_TEXTS
    own = np.cov(features[:, :used].T) if weight else np.zeros((used, used))
    return Sketch(centred, weight * own + (1 - weight) * constants.within * np.eye(used), len(features), views)


def constants_for(feature_map: FeatureMap, views: int) -> ScoringConstants:
    """Return the scoring constants of a query with this many views."""
    return feature_map.full if views == len(feature_map.views) else feature_map.prompt_only


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One number a release, in catalogue order."""

    llr: NDArray[np.float64]  # log-likelihood ratio "same task" against "another task", nats
    std: NDArray[np.float64]  # its standard deviation under the release's known noise
    distance: NDArray[np.float64]  # d2/sd0: near 0 under "same task" whatever the domain
    separation: NDArray[np.float64]  # d2 as a share of the mean squared distance of unrelated tasks: 0 the same, 1 unrelated
    resolution: NDArray[np.float64]  # smallest separation that the test can see, in units of SEPARATION


def score(inner_products: NDArray[np.float64], columns: Columns, sketch: Sketch, feature_map: FeatureMap) -> Scores:
    """Return the scores of N releases from <q - g, mu_i - g>, (N,), and their public scalars.

    Source: isotropic PLDA with known noise a release (Ioffe 2006); the distance is the noise-corrected two-sample statistic.
    """
    constants = constants_for(feature_map, sketch.views)
    used = sketch.views * feature_map.view_dimension
    counts, noise, norms = columns.counts, columns.noise_stds**2, columns.norms_squared
    own = sketch.norm_squared
    size = min(sketch.size, MAX_QUERY_SIZE)

    shrink = constants.between / (constants.between + constants.within / counts + noise)
    spread = constants.between * (1 - shrink) + constants.within / size
    alone = constants.between + constants.within / size
    residual = np.maximum(own - 2 * shrink * inner_products + shrink**2 * norms, 0.0)
    llr = -residual / (2 * spread) - used / 2 * np.log(spread / alone) + own / (2 * alone)
    std = shrink * np.sqrt(noise * residual) / spread

    # Under "same task": sampling on both sides, drift between owner's and user's texts, noise, and an error in the number of units,
    # which stretches the whole mean.
    sampling = 1 / sketch.size + 1 / counts + constants.drift
    stretch = (columns.count_stds / counts) ** 2 * constants.norm
    trace, trace_of_square = float(np.trace(sketch.covariance)), float((sketch.covariance**2).sum())
    d2 = own - 2 * inner_products + norms - used * noise - trace * sampling - stretch
    variance = sampling**2 * trace_of_square + 2 * sampling * noise * trace + used * noise**2
    variance = variance + stretch**2 + 2 * stretch * (noise + sampling * trace / used)
    sd0 = np.sqrt(2 * variance)
    unrelated = 2 * used * constants.between
    seen = constants.threshold * sd0 + constants.drift * trace  # a true squared distance beyond this is told from zero
    return Scores(llr, std, d2 / sd0, d2 / unrelated, seen / (SEPARATION * unrelated))


def score_releases(specifications: Sequence[Specification], sketch: Sketch, feature_map: FeatureMap) -> Scores:
    """Return the scores of specifications that lie here in clear: no catalogue, no encryption."""
    products = centred_means(specifications, feature_map) @ sketch.centred_mean
    return score(products, columns_of(specifications, feature_map, sketch.views), sketch, feature_map)


class Match(NamedTuple):  # a market has tens of thousands, and a tuple is made in a tenth of the time
    """One release in a ranking."""

    release_id: bytes
    rank: int  # from 1
    llr: float
    std: float
    gap_to_next: float  # infinity for the last
    tie: bool  # the gap is below two standard deviations of the difference
    distance: float
    separation: float
    resolution: float  # above 1 the test has no power


@dataclass(frozen=True, slots=True)
class Ranking:
    """All releases, best first, and whether the best one is a match."""

    matches: tuple[Match, ...]
    verdict: Verdict
    threshold: float


def rank(scores: Scores, catalogue: Catalogue, sketch: Sketch) -> Ranking:
    """Return the ranking with error bars and ties, and the verdict on the best release.

    By LLR, those first that would be a match: where owners hold mixtures, a noisy release may have a higher LLR than a precise one that
    the test accepts, and is the worse pick.

    The verdict is "match" only where the two-sample test does not reject "same task", the evidence is positive, and the test could have
    told a related task: a release that is all noise is close to everything, but its LLR is about zero and its resolution far above 1.
    """
    threshold = constants_for(catalogue.feature_map, sketch.views).threshold
    accepted = accepted_in(scores, catalogue.feature_map, sketch.views)
    order = np.lexsort((-scores.llr, ~accepted))
    columns = (scores.llr, scores.std, scores.distance, scores.separation, scores.resolution)
    llr, std, distance, separation, resolution = (column[order] for column in columns)
    gaps = np.append(llr[:-1] - llr[1:], np.inf)[: len(order)]
    alike = accepted[order][:-1] == accepted[order][1:]
    ties = np.append(alike & (gaps[:-1] < TIE_STDS * np.hypot(std[:-1], std[1:])), False)[: len(order)]
    ids = catalogue.release_ids
    numbers = (column.tolist() for column in (llr, std, gaps, ties, distance, separation, resolution))
    matches = tuple(map(Match, [ids[i] for i in order.tolist()], range(1, len(order) + 1), *numbers))
    verdict = verdict_of(scores, int(order[0]), catalogue.feature_map, sketch.views) if matches else Verdict.NONE
    return Ranking(matches, verdict, threshold)


def accepted_in(scores: Scores, feature_map: FeatureMap, views: int) -> NDArray[np.bool_]:
    """Return which releases would be a match: (N,)."""
    accepted: NDArray[np.bool_] = scores.distance <= constants_for(feature_map, views).threshold
    return accepted & (scores.resolution <= 1) & (scores.llr > 0)


def verdict_of(scores: Scores, i: int, feature_map: FeatureMap, views: int) -> Verdict:
    """Return the verdict on release i from its scores (docs/protocol.md 5.3 to 5.5)."""
    constants = constants_for(feature_map, views)
    if scores.distance[i] > constants.threshold:
        return Verdict.SIBLING if scores.separation[i] < constants.related else Verdict.NONE
    if scores.resolution[i] > 1:
        return Verdict.CANNOT_TELL
    # A match needs positive evidence too: what is close to everything is no match for anything.
    return Verdict.MATCH if scores.llr[i] > 0 else Verdict.NONE
