"""The comparison: numbers of every strategy, a picture that needs no script, and files that are refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from nodes.base_model import BaseModel
from nodes.compare import Row, compare, lineup, pareto_front
from nodes.pareto import page, picture
from nodes.records import Pair, read_records
from nodes.reuse import Specialist, Strategy
from nodes.reuse.calibration import answered
from nodes.reuse.choice import Choice
from protocol.errors import RecordError
from tests.nodes.test_families import random_adapter, write_model

PAIRS = [Pair("two and three", "five"), Pair("a colour", "blue")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    root = tmp_path_factory.mktemp("models")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = BaseModel.open(write_model(root / "base", "llama"), torch.float32)
    larger = BaseModel.open(write_model(root / "larger", "llama", layers=8, seed=9), torch.float32)
    specialists = tuple(Specialist(f"<notes{seed}>", random_adapter(model, seed), float(seed), 2_000_000) for seed in (1, 2))
    choice = Choice(specialists, (0.6, 0.4), "named by the user")
    silent = lambda what, done, of: None  # noqa: E731
    found = compare(lineup(model, choice, larger, PAIRS[:1], 6, silent), PAIRS[1:], 6, silent)
    torch.set_num_threads(threads)
    return found


def test_every_strategy_has_a_row(rows):
    names = ["base", "larger", "single", "mixture (merge)", "mixture (outputs)", "cascade", "proxy", "speculative"]
    assert [row.name for row in rows] == names
    by = {row.name: row for row in rows}
    assert by["speculative"].nats_per_token == by["larger"].nats_per_token
    assert by["cascade"].nats_per_token in (by["single"].nats_per_token, by["larger"].nats_per_token)
    assert (by["base"].epsilon_specification, by["single"].epsilon_specification) == (None, 1.0)
    assert by["mixture (merge)"].epsilon_specification == 2.0
    assert (by["base"].fetched_bytes, by["single"].fetched_bytes) == (0, 2_000_000)
    assert (by["base"].guarantee_adapter, by["single"].guarantee_adapter) == (None, "none")
    assert by["proxy"].weights_bytes > by["larger"].weights_bytes > by["base"].weights_bytes
    assert all(row.left_share == 0 for row in rows)


def test_the_front_is_what_nothing_beats(rows):
    made = [replace(rows[0], name=name, seconds=s, nats_per_token=n) for name, s, n in (("a", 1, 3), ("b", 2, 3), ("c", 3, 1), ("d", 2, 2))]
    assert [row.name for row in pareto_front(made)] == ["a", "d", "c"]


def test_the_page_is_one_file_without_script_and_names_are_text(rows):
    shown = [replace(rows[0], name="<script>alert(1)</script>"), *rows[1:]]
    text = page(shown, "<b>mine</b>", 1)
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;" in text
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_the_picture_is_well_formed_and_labels_do_not_overlap(rows):
    for shown in (rows, rows[:1], [replace(row, seconds=1.0, nats_per_token=2.0) for row in rows]):
        tree = ElementTree.fromstring(picture(shown))
        places = sorted(float(text.attrib["y"]) for text in tree.iter("text") if text.text in {row.name for row in shown})
        assert len(places) == len(shown)
        assert all(b - a >= 16.9 for a, b in itertools.pairwise(places))
        assert places[0] > 0
        assert places[-1] < 440


BAD_FILES = {
    "an empty file": (b"", "empty file"),
    "one record": (b'{"prompt": "SECRET", "response": "b"}\n', "at least 2 records, got 1"),
    "no responses": (b'{"prompt": "SECRET"}\n{"prompt": "c"}\n', "a response in every record"),
    "bytes that are no text": (b'{"prompt": "SECRET\xff", "response": "b"}\n', "line 1"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_cannot_be_scored_is_refused_without_its_text(tmp_path: Path, data: bytes, reason: str):
    path = tmp_path / "mine.jsonl"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=reason) as refused:
        answered(read_records(path), path.name, 2)
    assert "SECRET" not in str(refused.value) + refused.value.hint


def test_long_responses_have_no_exact_match(tmp_path: Path, rows):
    assert all(row.exact_match is not None for row in rows)
    model = BaseModel.open(write_model(tmp_path, "llama"), torch.float32)
    silent = lambda what, done, of: None  # noqa: E731
    (row,) = compare(lineup(model, None, None, [], 3, silent), [Pair("a", "b" * 60)], 3, silent)
    assert row.exact_match is None
    assert row.strategy is Strategy.BASE
