"""A record's embedding is a function of that record alone: the claim on which the sensitivity of a release rests.

The control runs the same comparison on padded batches, where it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes.base_model import BaseModel, Embedding
from nodes.records import Pair, Record, Text
from protocol.features import EmbeddingKind

ORGANS = ("heart", "left kidney", "liver", "lung", "inner ear", "spine", "thyroid gland")
CITIES = ("Turin", "Lagos", "Osaka", "Quito", "Bergen")


def varied_records(count: int) -> list[Record]:
    """Return records of many lengths and kinds, no two alike."""

    def one(i: int) -> Record:
        organ, city = ORGANS[i % len(ORGANS)], CITIES[i % len(CITIES)]
        match i % 4:
            case 0:
                return Pair(
                    f"Which tests does a patient of {20 + i} years need whose {organ} hurts at night?",
                    f"First a scan of the {organ}. " * (1 + i % 6),
                )
            case 1:
                return Pair(f"Train {i} leaves {city} at {i % 24}:{i % 60:02d}. When does it arrive?", f"After {i % 9} hours.")
            case 2:
                return Text(f"Note {i}. " + f"The {organ} was examined in {city}; value {i * i % 97}. " * (1 + i % 5))
        return Pair(
            f"def f{i}(x): return x * {i} + " + " + ".join(str(k) for k in range(i % 30)), f"It computes {i} x." + " Slowly." * (i % 11)
        )

    return [one(i) for i in range(count)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


Embed = Callable[[Sequence[Record]], Embedding]


def changed_by_one_record(embed: Embed, records: Sequence[Record], dropped: Sequence[int]) -> int:
    """Return how many embeddings of other records change, bit for bit, when one is dropped, added or the order is reversed."""
    whole = embed(records)
    count = sum(a.tobytes() != b.tobytes() for a, b in zip(embed(records[::-1])[::-1], whole, strict=True))
    for i in dropped:
        rest = embed([*records[:i], *records[i + 1 :]])
        count += sum(a.tobytes() != b.tobytes() for a, b in zip(rest, np.delete(whole, i, axis=0), strict=True))
    longer = embed([Text("one more record " * 30), *records])[1:]
    return count + sum(a.tobytes() != b.tobytes() for a, b in zip(longer, whole, strict=True))


def test_no_record_touches_another_in_a_tiny_model(tiny_model_directory: Path, threads: Callable[[int], None]) -> None:
    model, records = BaseModel.open(tiny_model_directory), varied_records(24)
    reference = model.embed_alone(records, 1, layer=2).tobytes()
    for intra_op in (1, 2):
        threads(intra_op)
        for workers in (1, 2):
            assert model.embed_alone(records, workers, layer=2).tobytes() == reference
            assert changed_by_one_record(lambda some, w=workers: model.embed_alone(some, w, layer=2), records, [0, 7, 23]) == 0


def test_no_record_touches_another_in_the_gradients_of_a_tiny_model(tiny_model_directory: Path) -> None:
    model, records = BaseModel.open(tiny_model_directory), varied_records(12)

    def embed(some: Sequence[Record], workers: int = 2) -> Embedding:
        return model.embed_alone(some, workers, layer=model.layers, kind=EmbeddingKind.LORA_GRADIENTS)

    assert embed(records, 1).tobytes() == embed(records, 2).tobytes()
    assert changed_by_one_record(embed, records, [0, 7]) == 0


@pytest.mark.slow
def test_no_record_touches_another(slm_directory: Path, threads: Callable[[int], None]) -> None:
    model, records = BaseModel.open(slm_directory), varied_records(200)
    reference = model.embed_alone(records, 1).tobytes()
    for intra_op, workers in ((1, 1), (1, 2), (2, 1), (2, 2)):
        threads(intra_op)
        assert model.embed_alone(records, workers).tobytes() == reference
    assert changed_by_one_record(lambda some: model.embed_alone(some, 2), records, [0, 57, 131, 199]) == 0
    threads(1)
    assert changed_by_one_record(lambda some: model.embed_alone(some, 1), records, [100]) == 0
    assert model.prefix_pass(records[:20])[0].tobytes() == model.embed_alone(records[:20]).tobytes()


@pytest.mark.slow
def test_control_in_padded_batches_one_record_changes_others(slm_directory: Path) -> None:
    model, records = BaseModel.open(slm_directory), varied_records(200)
    assert changed_by_one_record(lambda some: model.embed_batched(some, 24), records, [0, 57, 131, 199]) > 0
