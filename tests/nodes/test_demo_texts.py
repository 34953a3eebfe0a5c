import pytest

from nodes.demo_texts import demo_tasks, generate

NAMES = [task.name for task in demo_tasks()]


@pytest.mark.parametrize("name", NAMES)
def test_an_owner_has_enough_different_records_and_no_prompt_is_in_both_splits(name):
    train, test = generate(name, 160, "train"), generate(name, 80, "test")
    assert len({record.prompt for record in train}) == 160
    assert len({record.prompt for record in test}) == 80
    assert not {record.prompt for record in train} & {record.prompt for record in test}


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short_and_always_the_same(name):
    records = generate(name, 60, "train")
    assert records == generate(name, 60, "train")
    assert max(len(text.split()) for record in records for text in (record.prompt, record.response)) <= 30


def test_there_are_six_owners_of_six_domains():
    assert len(NAMES) == len({task.domain for task in demo_tasks()}) == 6
