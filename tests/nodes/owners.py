"""An owner over the tiny model: a map fitted for it, a data file, a guard."""

import json
from pathlib import Path

import numpy as np

from nodes.base_model import PROMPT_TOKENS, RESPONSE_TOKENS, BaseModel
from nodes.guard import Guard
from protocol.features import EmbeddingKind, FeatureMap, ScoringConstants, View
from protocol.hazmat.noise import operating_system
from protocol.release import Card

LAYER, SPLIT, DIMENSION = 2, 3, 8
MARKER = "PRIVATE-MARKER-9301"


def tiny_map(model: BaseModel) -> FeatureMap:
    rng = np.random.default_rng(4)

    def view() -> View:
        axes = np.linalg.qr(rng.standard_normal((model.width, DIMENSION // 2)))[0].astype(np.float32)
        zeros, ones = np.zeros(model.width, np.float32), np.ones(model.width, np.float32)
        return View(zeros, ones, zeros, axes)

    constants = ScoringConstants(0.02, 0.2, norm=0.5, norm_std=0.2, drift=0.01, related=0.5, threshold=3.0)
    limits = (PROMPT_TOKENS, RESPONSE_TOKENS)
    return FeatureMap(
        "tiny", model.model_id, EmbeddingKind.HIDDEN_STATES, LAYER, limits, (view(), view()), np.zeros(DIMENSION, np.int64),
        constants, constants, ("public",),
    )  # fmt: skip


def write_records(path: Path, count: int = 40, word: str = "wool") -> Path:
    lines = [json.dumps({"prompt": f"{MARKER} number {i} of {word}", "response": f"{word} {i * 7 % 13}"}) for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def make_guard(home: Path, data: Path, model: BaseModel, noise=None, **how) -> Guard:
    return Guard(home, data, Card(data.stem), model, tiny_map(model), noise or operating_system(), split=SPLIT, **how)
