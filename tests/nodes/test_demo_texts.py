import random

import pytest

from nodes.demo_texts import MAKERS, demo_tasks, generate
from protocol.errors import UsageError

NAMES = [task.name for task in demo_tasks()]


def prompts(records):
    return {record.prompt for record in records}


@pytest.mark.parametrize("name", NAMES)
def test_an_owner_has_enough_different_records_and_no_prompt_is_in_both_splits(name):
    train, test = generate(name, 160, "train"), generate(name, 80, "test")
    assert (len(train), len(test)) == (len(prompts(train)), len(prompts(test))) == (160, 80)
    assert not prompts(train) & prompts(test)


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_both_splits_even_under_two_seeds(name):
    assert not prompts(generate(name, 160, "train", seed=1)) & prompts(generate(name, 80, "test", seed=2))


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_alone_chooses_the_records_and_a_smaller_count_is_a_prefix(name):
    records = generate(name, 60, "train", seed=3)
    random.seed(7)  # the global generator has no say
    assert records == generate(name, 60, "train", seed=3)
    assert records[:20] == generate(name, 20, "train", seed=3)
    assert records != generate(name, 60, "train", seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short_and_one_prompt_has_one_response(name):
    draw, seen = random.Random(5), {}
    for _ in range(4000):
        prompt, response = MAKERS[name](draw)
        assert seen.setdefault(prompt, response) == response
        assert 8 <= len(prompt.split()) <= 20
        assert 1 <= len(response.split()) <= 14
    assert len(seen) >= 360


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_more_records_than_the_templates_have_is_refused(name, monkeypatch):
    monkeypatch.setitem(MAKERS, name, lambda draw: (f"prompt {draw.randrange(12)}", "response"))
    with pytest.raises(UsageError, match=f"{name}: expected at most .* train records, got 13"):
        generate(name, 13, "train")


def test_there_are_six_owners_of_six_domains():
    assert sorted(NAMES) == sorted(MAKERS)
    assert len(NAMES) == len({task.domain for task in demo_tasks()}) == 6


@pytest.mark.parametrize(("name", "count"), [("bank-letters", 544), ("lease-clauses", 128), ("kitchen-cards", 145)])
def test_the_question_shown_was_never_trained_on(name, count):
    question = next(task.question for task in demo_tasks() if task.name == name)
    assert question in prompts(generate(name, count, "test"))  # the whole test split of the tasks small enough to list


def test_every_shown_question_is_a_prompt_of_the_test_split(monkeypatch):
    for task in demo_tasks():
        monkeypatch.setitem(MAKERS, task.name, lambda draw, question=task.question: (question, "response"))
        assert prompts(generate(task.name, 1, "test")) == {task.question}
