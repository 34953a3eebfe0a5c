"""The price before spending: what the owner reads, for people and for programs, holds no drawn noise and no private text."""

import json

import pytest

from nodes.base_model import BaseModel
from nodes.commands.publish import _rule_of_thumb, _show_plan
from nodes.finetune import Recipe
from nodes.guard import Order, Policy
from nodes.ledger import Budget
from nodes.owner import require_welcome
from protocol.admission import AdmissionPolicy
from protocol.errors import NotAdmitted
from protocol.privacy import Guarantee, PrivacyUnit
from tests.nodes.owners import MARKER, make_guard, write_records
from tests.nodes.test_guard import forbidden_noise, of_persons, write_lines

ONE = Order(Guarantee(1.0, 1e-6))


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def plan_of(tmp_path, model, count=120, **how):
    return make_guard(tmp_path / "home", write_records(tmp_path / "notes.jsonl", count), model, forbidden_noise(), **how).plan(ONE)


def test_a_program_reads_price_fields_and_sizes(tmp_path, model, capsys):
    plan = plan_of(tmp_path, model)
    _show_plan(plan, "default", as_json=True)
    text = capsys.readouterr().out
    shown = json.loads(text)
    assert (shown["asked"], shown["spent"], shown["left"], shown["budget"]) == (pytest.approx(1.0, abs=1e-3), 0.0, 4.0, 4.0)
    assert shown["noise_std"] == pytest.approx(17_836.8, abs=0.1)
    assert shown["payload"] == "<9 integers, not drawn>"
    assert (shown["n_times_epsilon"], shown["unit"], shown["population"], shown["paid_before"]) == (120.0, "record", "default", False)
    sent = shown["would_send"]
    assert {"owner", "previous", "epsilon", "delta", "unit", "relation", "noise_variance", "map_id"} <= set(sent["fields"])
    assert sent["release_bytes"] == len(plan.release.body) + 64
    assert MARKER not in text


def test_a_person_reads_the_same(tmp_path, model, capsys):
    _show_plan(plan_of(tmp_path, model, recipe=Recipe(rank=2, max_steps=2)), "default", as_json=False)
    text = capsys.readouterr().out
    for words in ("<9 integers, not drawn>", "asked 1.00, spent 0.00, left 4.00", "sigma 17,837", "unit record", "120", "guarantee none",
                  "<32 bytes, not trained>", "signature", "noise_variance", "nothing was drawn, sent or spent"):  # fmt: skip
        assert words in text, words
    assert MARKER not in text


def test_the_size_that_is_promised_is_the_size_that_is_sent(tmp_path, model):
    plan = plan_of(tmp_path, model)
    assert len(make_guard(tmp_path / "home", tmp_path / "notes.jsonl", model).release(ONE)) == plan.release_bytes


def test_what_was_paid_before_costs_nothing_though_nothing_is_left(tmp_path, model, capsys):
    policy = Policy(budget=Budget(1.1, 1e-6))
    data = write_records(tmp_path / "notes.jsonl", 120)
    make_guard(tmp_path / "home", data, model, policy=policy).release(ONE)
    plan = make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=policy).plan(ONE)
    assert plan.stored
    _show_plan(plan, "default", as_json=False)
    assert "paid before: the stored bytes are sent again, nothing is charged" in capsys.readouterr().out


def test_units_are_shown_and_counted(tmp_path, model, capsys):
    data = tmp_path / "a.jsonl"
    write_lines(data, of_persons(600, 30))
    plan = make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=Policy(unit=PrivacyUnit("person"))).plan(ONE)
    _show_plan(plan, "patients", as_json=False)
    text = capsys.readouterr().out
    for words in ("population     patients; unit field:person, for life", "600 of 30 units", "30: WARNING"):
        assert words in text, words


@pytest.mark.parametrize(("strength", "words"), [
    (400, "trustworthy"), (200, "trustworthy"), (199, "too little for a trustworthy"), (100, "nearly as without noise"),
    (99, "uncertain"), (50, "uncertain"), (49, "WARNING"),
])  # fmt: skip
def test_the_rule_of_thumb(strength, words):
    assert words in _rule_of_thumb(strength)


def test_what_the_market_would_refuse_is_told_before_it_is_paid_for(tmp_path, model):
    plan = plan_of(tmp_path, model)
    assert require_welcome(plan, AdmissionPolicy()) == ""
    assert "warning" in require_welcome(plan, AdmissionPolicy(smallest_count=100))
    for policy in (AdmissionPolicy(largest_epsilon=0.5), AdmissionPolicy(delta=1e-5)):
        with pytest.raises(NotAdmitted):
            require_welcome(plan, policy)


@pytest.mark.parametrize("least", [1, 119, 120, 121, 1 << 19])
def test_a_market_cannot_measure_the_number_of_units_by_its_smallest_count(tmp_path, model, least):
    warning = require_welcome(plan_of(tmp_path, model), AdmissionPolicy(smallest_count=least))  # goes on, whatever the market chose
    assert ("after the charge" in warning) == (least > 1)
