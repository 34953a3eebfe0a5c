"""Fit a feature map on public tasks: the statistics of each view, then the constants that scoring needs.

Nothing private may come near this file: its output is shipped to everybody.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nodes.records import read_records
from protocol.errors import UsageError
from protocol.features import CENTRE_SCALE, EmbeddingKind, FeatureMap, ScoringConstants, View, waves_of
from protocol.hazmat.noise import NoiseSource
from protocol.privacy import Guarantee
from protocol.scoring import Scores, Sketch, constants_for, score_releases, sketch_of
from protocol.specification import Specification, estimate, quantise

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

# The abstention threshold is calibrated where the test still has power, and must hold up to data sets of any size.
CALIBRATION = Guarantee(epsilon=1.0, delta=1e-6)
CALIBRATION_UNITS = (200, 500, 5000)
QUERY_SIZE = 50
REJECTED = 0.02  # share of true pairs that the threshold may reject
DRAWS = 40  # releases and queries drawn a public task and size
BANDWIDTH = 2.0  # of the characteristic maps, in units of the median distance of public texts

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class PublicTask:
    """Embeddings of one public task: (n, 2, width) of its training and of its test texts."""

    name: str
    train: NDArray[np.float32]
    test: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Design:
    """What kind of map to fit."""

    name: str
    axes: int = 48  # principal axes a view
    frequencies: int = 0  # of a characteristic map, a view; 0 for a linear one
    embedding: EmbeddingKind = EmbeddingKind.HIDDEN_STATES

    def __post_init__(self) -> None:
        if self.axes < 1 or self.frequencies < 0:
            raise UsageError("map: expected at least one axis and no negative number of frequencies")


DESIGNS = {
    design.name: design
    for design in (
        Design("kme-lin-96"),
        Design("kme-lin-192", axes=96),
        Design("kme-rff-256", axes=64, frequencies=64),
        Design("kme-grad-64", axes=32, embedding=EmbeddingKind.LORA_GRADIENTS),
    )
}


def embed_public(
    folders: Sequence[Path], model: BaseModel, limit: int, design: Design, on_progress: Progress = lambda s, d, n: None
) -> list[PublicTask]:
    """Return the embeddings of public task folders, each with train.jsonl and test.jsonl."""
    tasks = []
    for done, folder in enumerate(folders):
        on_progress("embed", done, len(folders))
        train, test = (
            model.embed_batched(read_records(folder / f"{split}.jsonl", limit), layer=layer_of(design, model), kind=design.embedding)
            for split in ("train", "test")
        )
        tasks.append(PublicTask(folder.name, train, test))
    on_progress("embed", len(folders), len(folders))
    return tasks


def layer_of(design: Design, model: BaseModel) -> int:
    """Return the layer whose states or gradients a design uses."""
    from nodes.base_model import FEATURE_LAYER

    return model.layers if design.embedding is EmbeddingKind.LORA_GRADIENTS else FEATURE_LAYER


def fit_view(embeddings: NDArray[np.float32], design: Design) -> View:
    """Return the statistics of one view: embeddings (n, width) of public texts."""
    x = embeddings.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    directions = (x - mean) / scale
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centre = directions.mean(axis=0)
    axes = np.linalg.eigh(np.cov((directions - centre).T))[1][:, ::-1][:, : design.axes]
    # An eigenvector's sign is arbitrary; fixing it makes a second fit give the same map.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    linear = View(*(a.astype(np.float32) for a in (mean, scale, centre, axes)))
    if not design.frequencies:
        return linear
    rng = np.random.default_rng(0)  # frequencies are public constants of the map
    projected = linear.project(embeddings)
    pairs = rng.permutation(len(projected))[: 2 * (len(projected) // 2)].reshape(2, -1)
    median = float(np.median(np.linalg.norm(projected[pairs[0]] - projected[pairs[1]], axis=1)))
    frequencies = (rng.standard_normal((design.axes, design.frequencies)) / (BANDWIDTH * median)).astype(np.float32)
    return replace(linear, frequencies=frequencies, waves=waves_of(projected, frequencies).mean(axis=0).astype(np.float32))


def fit_map(tasks: Sequence[PublicTask], model: BaseModel, design: Design) -> FeatureMap:
    """Return the feature map fitted on public tasks: statistics from the training texts, threshold from train-test pairs.

    Deterministic: the same embeddings give the same map.
    """
    if len(tasks) < 3:
        raise UsageError(f"public tasks: expected at least 3, got {len(tasks)}")
    from nodes.base_model import PROMPT_TOKENS, RESPONSE_TOKENS

    together = np.concatenate([task.train for task in tasks])
    views = (fit_view(together[:, 0], design), fit_view(together[:, 1], design))
    undecided = ScoringConstants(*[1.0] * 7)
    dimension = 2 * views[0].coordinates
    feature_map = FeatureMap(
        design.name, model.model_id, design.embedding, layer_of(design, model), (PROMPT_TOKENS, RESPONSE_TOKENS), views,
        np.zeros(dimension, np.int64), undecided, undecided, tuple(sorted(task.name for task in tasks)),
    )  # fmt: skip
    features = [(feature_map(task.train), feature_map(task.test)) for task in tasks]
    centre = np.rint(np.mean([train.mean(axis=0) for train, _ in features], axis=0) * CENTRE_SCALE).astype(np.int64)
    half = feature_map.view_dimension
    feature_map = replace(
        feature_map, centre=centre, full=_constants(features), prompt_only=_constants([(a[:, :half], b[:, :half]) for a, b in features])
    )
    return replace(feature_map, full=_calibrated(features, feature_map, 2), prompt_only=_calibrated(features, feature_map, 1))


Features = tuple[NDArray[np.float64], NDArray[np.float64]]  # of a task's training and of its test texts


def _constants(tasks: Sequence[Features]) -> ScoringConstants:
    """Return everything but the threshold."""
    trains = [train for train, _ in tasks]
    dimension = trains[0].shape[1]
    within = float(np.mean([train.var(axis=0, ddof=1).mean() for train in trains]))
    means = np.array([train.mean(axis=0) for train in trains])
    sampling = within * float(np.mean([1 / len(train) for train in trains]))
    spread = float(np.var(means, axis=0, ddof=1).mean())
    between = max(spread - sampling, 0.02 * spread)
    norms = (means**2).sum(axis=1)
    first, second = np.triu_indices(len(means), 1)
    mixed = (((means[first] + means[second]) / 2) ** 2).sum(axis=1)
    # Owners may hold a mixture of tasks, whose mean is shorter: pure tasks and even mixtures of two weigh the same.
    about = [float(np.mean((some - norms.mean()) ** 2)) for some in (norms, mixed)]
    nearest = min(float(((means[i] - means[j]) ** 2).sum()) for i, j in zip(first, second, strict=True))
    drifts = [_drift(train, test) for train, test in tasks]
    return ScoringConstants(
        between,
        within,
        norm=float(norms.mean()),
        norm_std=float(np.sqrt(np.mean(about))),
        drift=max(float(np.sqrt(np.mean(np.square(drifts)))), 1e-4),
        related=(nearest - 2 * dimension * sampling) / (2 * dimension * between),
        threshold=1.0,
    )


def _drift(train: NDArray[np.float64], test: NDArray[np.float64]) -> float:
    """Return the squared distance of two samples' means beyond sampling, as a share of the within-task variance."""
    squared = float(((train.mean(axis=0) - test.mean(axis=0)) ** 2).sum())
    traces = [float(x.var(axis=0, ddof=1).sum()) for x in (train, test)]
    return (squared - traces[0] / len(train) - traces[1] / len(test)) / traces[0]


def _calibrated(features: Sequence[Features], feature_map: FeatureMap, views: int) -> ScoringConstants:
    """Return the constants with the threshold that REJECTED of the true pairs exceed, at the worst of the sizes.

    Real mechanism, real score, public data.  Much drift leaves room for tasks that drift more than most; little drift sees nearer
    siblings.  Of several multiples of the measured drift the one is taken with which the smallest size sees farthest.
    """
    rng = np.random.default_rng(0)
    noise = NoiseSource(random.Random(0).randbytes, simulated=True)  # texts are public: neither draws nor noise protect anybody
    pairs: dict[int, list[tuple[Specification, Sketch]]] = {units: [] for units in CALIBRATION_UNITS}
    for units, drawn in pairs.items():
        for train, test in features:
            for _ in range(DRAWS):
                own = train[rng.permutation(len(train))[:units] if len(train) >= units else rng.integers(0, len(train), units)]
                released = estimate(quantise(own), feature_map.map_id, CALIBRATION, noise)
                drawn.append((released, sketch_of(test[rng.permutation(len(test))[:QUERY_SIZE]], feature_map, views)))

    def try_drift(times: float) -> tuple[float, ScoringConstants]:
        before = constants_for(feature_map, views)
        candidate = replace(before, drift=before.drift * times)

        def scores_with(constants: ScoringConstants, units: int) -> list[Scores]:
            under = replace(feature_map, full=constants, prompt_only=constants)
            return [score_releases([released], sketch, under) for released, sketch in pairs[units]]

        quantiles = [float(np.quantile([scores.distance[0] for scores in scores_with(candidate, units)], 1 - REJECTED)) for units in pairs]
        chosen = replace(candidate, threshold=max(*quantiles, 0.1))
        return float(np.median([scores.resolution[0] for scores in scores_with(chosen, min(pairs))])), chosen

    return min((try_drift(times) for times in (1.0, 1.5, 2.0, 2.5, 3.0)), key=lambda tried: tried[0])[1]
