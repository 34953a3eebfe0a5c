"""No record is dealt twice, and every mix is what its name says."""

import random

import pytest

from nodes.mixes import Mix, Owner, deal, read_owners, write_owners
from protocol.errors import UsageError
from tests.nodes.owners import write_records

TASKS = ["a", "b", "c"]


@pytest.fixture
def data(tmp_path):
    for task in TASKS:
        write_records(tmp_path / "data" / task / "train.jsonl", 120, task)
    return tmp_path / "data"


def dealt(data, nodes, mix, records=None, minimum=10, seed=1):
    return deal(data, TASKS, nodes, Mix.parse(mix), records, minimum, random.Random(seed))


@pytest.mark.parametrize("mix", ["pure", "shards", "dirichlet:0.1", "dirichlet:0.001", "dirichlet:100"])
def test_no_record_is_dealt_twice(data, mix):
    owners = dealt(data, 7, mix)
    lines = [line for _, own in owners for line in own]
    assert len(owners) == 7
    assert len(lines) == len(set(lines)) >= 350
    assert all(owner.count == len(own) for owner, own in owners)


def test_pure_owners_have_one_task_each_and_tasks_are_taken_in_turn(data):
    owners = [owner for owner, _ in dealt(data, 7, "pure", records=32)]
    assert [owner.task for owner in owners] == ["a", "b", "c", "a", "b", "c", "a"]
    assert all(owner.records == {owner.task: 32} for owner in owners)
    assert owners[3].name == "a.2"


def test_one_owner_a_task_is_named_after_it_and_has_all_its_records(data):
    owners = [owner for owner, _ in dealt(data, None, "pure")]
    assert [(owner.name, owner.count) for owner in owners] == [("a", 120), ("b", 120), ("c", 120)]


def test_shards_hold_at_most_four_tasks_and_usually_few(data):
    owners = [owner for owner, _ in dealt(data, 6, "shards", records=40)]
    assert all(owner.count == 40 and len(owner.records) <= 4 for owner in owners)


def test_a_small_alpha_gives_nearly_pure_owners_and_a_large_one_even_mixtures(data):
    def purity(mix):
        owners = [owner for owner, _ in dealt(data, 9, mix, records=20)]
        return sum(owner.records[owner.task] / owner.count for owner in owners) / len(owners)

    assert purity("dirichlet:0.01") > 0.8 > 0.55 > purity("dirichlet:1000")


def test_owners_with_too_few_records_are_refused_before_the_start(data):
    with pytest.raises(UsageError, match="at least 30"):
        dealt(data, 15, "pure", minimum=30)


@pytest.mark.parametrize("text", ["", "impure", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:nan", "dirichlet:inf", "pure:1"])
def test_another_mix_is_refused(text):
    with pytest.raises(UsageError, match="mix"):
        Mix.parse(text)


def test_owners_are_there_once_all_their_records_are(tmp_path, data):
    owners = dealt(data, 4, "shards")
    assert read_owners(tmp_path / "run") is None
    write_owners(tmp_path / "run", owners)
    assert read_owners(tmp_path / "run") == [owner for owner, _ in owners]
    assert (tmp_path / "run" / "data" / "owner-001" / "train.jsonl").read_bytes().splitlines() == owners[0][1]


def test_the_task_of_an_owner_is_that_of_most_of_its_records():
    assert Owner("o", {"a": 3, "b": 5}).task == "b"
    assert Owner("o", {"b": 4, "a": 4}).task == "a"
