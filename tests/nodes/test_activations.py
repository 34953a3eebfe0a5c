"""The cache of states: the same numbers in memory and on disk, and nothing of it left behind."""

import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from nodes.activations import cached_pass
from nodes.base_model import BaseModel
from nodes.finetune import Recipe, finetune
from nodes.records import Pair
from protocol.errors import UsageError

SPLIT = 3
RECORDS = [Pair(f"question {i}", "yes " * (1 + i % 3)) for i in range(70)]  # more than are passed at a time
LONG = [Pair("word " * 3000, "answer " * 3000), Pair("short", "x")]


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def test_states_on_disk_are_those_in_memory_and_no_file_is_to_be_seen(model, tmp_path):
    expected, plain = model.prefix_pass(RECORDS, SPLIT, layer=2)
    seen = []
    embedding, stored = cached_pass(model, RECORDS, SPLIT, 2, tmp_path, lambda done, of: seen.append((done, of)), memory_bytes=1000)
    assert np.array_equal(embedding, expected)
    assert all(torch.equal(one.hidden, two.hidden) for one, two in zip(stored, plain, strict=True))
    assert list(tmp_path.iterdir()) == []  # the file has no name while it is used, nor after
    assert seen[-1] == (70, 70)
    assert finetune(model, stored, Recipe(max_steps=2)).digest == finetune(model, plain, Recipe(max_steps=2)).digest


def test_a_full_disk_shows_before_the_first_pass(model, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**9, 10**9, 100))
    monkeypatch.setattr(BaseModel, "prefix_pass", lambda *args, **how: pytest.fail("computed"))
    with pytest.raises(UsageError, match="MB free"):
        cached_pass(model, RECORDS, SPLIT, 2, tmp_path, memory_bytes=1000)


def test_records_longer_than_the_views_are_cut_alike(model, tmp_path):
    _, states = cached_pass(model, LONG, SPLIT, 2, tmp_path)
    assert len(states[0].encoded.tokens) <= 60 + 40 + len(model._turn) + 1
    finetune(model, states, Recipe(max_steps=1))
