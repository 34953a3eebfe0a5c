"""The real tasks as features: embedded once in padded batches (nothing is released), kept in a cache if one is named."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nodes.base_model import BaseModel
from nodes.records import Pair, read_records
from protocol.features import EmbeddingKind, FeatureMap

# Texts read of a task's training and test file.  A gradient costs 0.2 to 0.5 CPU seconds a text.
LIMITS = {EmbeddingKind.HIDDEN_STATES: (600, 300), EmbeddingKind.LORA_GRADIENTS: (150, 60)}


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """Features of one task: (n, D) of its training and of its test records, and the label of each record ("" where there are none)."""

    name: str
    train: NDArray[np.float64]
    test: NDArray[np.float64]
    train_labels: tuple[str, ...]
    test_labels: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Where texts, model and cached embeddings lie."""

    data: Path
    base: Path
    cache: Path | None

    @cached_property
    def model(self) -> BaseModel:
        """The base model, opened when a text is first embedded: a full cache needs none."""
        return BaseModel.open(self.base)

    def tasks(self, feature_map: FeatureMap) -> list[Task]:
        """Return every task that the map was not fitted on."""
        folders = sorted(folder for folder in self.data.iterdir() if folder.is_dir() and folder.name not in feature_map.fitted_on)
        return [self._task(folder, feature_map) for folder in folders]

    def _task(self, folder: Path, feature_map: FeatureMap) -> Task:
        labelled = json.loads((folder / "meta.json").read_text())["kind"] == "classification"
        features, labels = [], []
        for split, limit in zip(("train", "test"), LIMITS[feature_map.embedding], strict=True):
            records = read_records(folder / f"{split}.jsonl", limit)
            embedding = self._cached(f"{folder.name}-{split}-{limit}", feature_map)
            if embedding is None or len(embedding) != len(records):
                self.model.admit_map(feature_map)
                embedding = self.model.embed_batched(records, layer=feature_map.layer, kind=feature_map.embedding)
                self._keep(f"{folder.name}-{split}-{limit}", feature_map, embedding)
                sys.stderr.write(f"embedded {folder.name} {split}\n")
            features.append(feature_map(embedding))
            labels.append(tuple(record.response if labelled and isinstance(record, Pair) else "" for record in records))
        return Task(folder.name, features[0], features[1], labels[0], labels[1])

    def _file(self, what: str, feature_map: FeatureMap) -> Path | None:
        key = f"{what}-{feature_map.base_model[:16]}-{feature_map.embedding}-{feature_map.layer}.npz"
        return self.cache / key if self.cache else None

    def _cached(self, what: str, feature_map: FeatureMap) -> NDArray[np.float32] | None:
        file = self._file(what, feature_map)
        if file is None or not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            embedding: NDArray[np.float32] = arrays["embedding"]
        return embedding

    def _keep(self, what: str, feature_map: FeatureMap, embedding: NDArray[np.float32]) -> None:
        if file := self._file(what, feature_map):
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, embedding=embedding.astype(np.float32))
