"""Fit a feature map on public tasks: the statistics of each view, then the constants that scoring needs.

Nothing private may come near this file: its output is shipped to everybody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nodes.records import read_records
from protocol.catalogue import Columns, centred_mean
from protocol.errors import UsageError
from protocol.features import CENTRE_SCALE, FeatureMap, ScoringConstants, View
from protocol.hazmat.noise import NoiseSource, operating_system
from protocol.privacy import Guarantee
from protocol.scoring import Sketch, score, sketch_of
from protocol.specification import Specification, estimate, quantise

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

# The setting in which the abstention threshold is calibrated: the weakest noise at which the test still has power.
CALIBRATION = Guarantee(epsilon=1.0, delta=1e-6)
CALIBRATION_UNITS = 250
QUERY_SIZE = 50
REJECTED = 0.02  # share of true pairs that the threshold may reject
DRAWS = 40  # releases and queries drawn a public task

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class PublicTask:
    """Embeddings of one public task: (n, 2, width) of its training and of its test texts."""

    name: str
    train: NDArray[np.float32]
    test: NDArray[np.float32]


def embed_public(folders: Sequence[Path], model: BaseModel, limit: int, on_progress: Progress = lambda s, d, n: None) -> list[PublicTask]:
    """Return the embeddings of public task folders, each with train.jsonl and test.jsonl."""
    tasks = []
    for done, folder in enumerate(folders):
        on_progress("embed", done, len(folders))
        train, test = (model.embed_batched(read_records(folder / f"{split}.jsonl", limit)) for split in ("train", "test"))
        tasks.append(PublicTask(folder.name, train, test))
    on_progress("embed", len(folders), len(folders))
    return tasks


def fit_view(embeddings: NDArray[np.float32], coordinates: int) -> View:
    """Return the statistics of one view: embeddings (n, width) of public texts."""
    x = embeddings.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    directions = (x - mean) / scale
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    centre = directions.mean(axis=0)
    axes = np.linalg.eigh(np.cov((directions - centre).T))[1][:, ::-1][:, :coordinates]
    # An eigenvector's sign is arbitrary; fixing it makes a second fit give the same map.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    mean32, scale32, centre32, axes32 = (a.astype(np.float32) for a in (mean, scale, centre, axes))
    return View(mean32, scale32, centre32, axes32)


def fit_map(tasks: Sequence[PublicTask], model: BaseModel, *, name: str, dimension: int, noise: NoiseSource | None = None) -> FeatureMap:
    """Return the feature map fitted on public tasks: statistics from the training texts, threshold from train-test pairs."""
    if len(tasks) < 3:
        raise UsageError(f"public tasks: expected at least 3, got {len(tasks)}")
    together = np.concatenate([task.train for task in tasks])
    views = (fit_view(together[:, 0], dimension // 2), fit_view(together[:, 1], dimension // 2))
    undecided = ScoringConstants(1.0, 1.0, 1.0)
    fitted_on = tuple(sorted(task.name for task in tasks))
    zero = np.zeros(dimension, np.int64)
    from nodes.base_model import FEATURE_LAYER, PROMPT_TOKENS, RESPONSE_TOKENS

    feature_map = FeatureMap(
        name, model.model_id, FEATURE_LAYER, (PROMPT_TOKENS, RESPONSE_TOKENS), views, zero, undecided, undecided, fitted_on
    )
    features = {task.name: (feature_map(task.train), feature_map(task.test)) for task in tasks}
    centre = np.rint(np.mean([train.mean(axis=0) for train, _ in features.values()], axis=0) * CENTRE_SCALE).astype(np.int64)
    feature_map = replace(feature_map, centre=centre)
    half = dimension // 2
    feature_map = replace(
        feature_map,
        full=_variances([train for train, _ in features.values()]),
        prompt_only=_variances([train[:, :half] for train, _ in features.values()]),
    )
    source = noise or operating_system()
    return replace(
        feature_map,
        full=replace(feature_map.full, threshold=_threshold(features, feature_map, 2, source)),
        prompt_only=replace(feature_map.prompt_only, threshold=_threshold(features, feature_map, 1, source)),
    )


def _variances(groups: Sequence[NDArray[np.float64]]) -> ScoringConstants:
    """Between-task and within-task variance a coordinate, the former corrected for the sampling of its means."""
    within = float(np.mean([group.var(axis=0, ddof=1).mean() for group in groups]))
    between = float(np.var([group.mean(axis=0) for group in groups], axis=0, ddof=1).mean())
    sampling = within * float(np.mean([1 / len(group) for group in groups]))
    return ScoringConstants(max(between - sampling, 0.02 * between), within, 1.0)


def _threshold(
    features: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], feature_map: FeatureMap, views: int, noise: NoiseSource
) -> float:
    """Return the d2/sd0 that REJECTED of the true pairs exceed: real mechanism, real score, public data."""
    rng = np.random.default_rng(0)  # which public texts are drawn protects nobody
    distances = []
    for train, test in features.values():
        for _ in range(DRAWS):
            own = train[rng.permutation(len(train))[:CALIBRATION_UNITS]]
            asked = test[rng.permutation(len(test))[:QUERY_SIZE]]
            sketch = sketch_of(asked, feature_map, views)
            released = estimate(quantise(own), feature_map.map_id, CALIBRATION, noise)
            distances.append(_distance(released, sketch, feature_map))
    return float(np.quantile(distances, 1 - REJECTED))


def _distance(specification: Specification, sketch: Sketch, feature_map: FeatureMap) -> float:
    used = sketch.views * feature_map.view_dimension
    mean = centred_mean(specification, feature_map)
    columns = Columns(np.array([specification.count]), np.array([specification.noise_std]), np.array([float(mean[:used] @ mean[:used])]))
    return float(score(np.array([mean @ sketch.centred_mean]), columns, sketch, feature_map).distance[0])
