"""The benchmark's pure functions on tiny worlds whose answers are known, and the page that quotes its result."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from protocol.hazmat.noise import NoiseSource
from protocol.scoring import sketch_of
from tests.bench.embeddings import Task
from tests.bench.experiments import hundred_owners, mixtures, pure_cells, siblings_of
from tests.bench.rules import (
    RULES,
    area_under_curve,
    choose,
    excess,
    interval,
    mixture_weights,
    of_labels,
    of_task,
    pools_of,
    publish,
    sample,
    similarities,
    total_variation,
)
from tests.bench.tables import fill, tables
from tests.protocol.worlds import WIDTH, small_map

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def make_tasks(count: int = 4, labels: int = 1) -> list[Task]:
    """Tasks whose embeddings point in different directions."""
    rng, feature_map, tasks = np.random.default_rng(1), small_map(), []
    for number in range(count):
        direction = np.random.default_rng(100 + number).standard_normal((1, 2, WIDTH))
        train, test = (feature_map((3 * direction + rng.standard_normal((60, 2, WIDTH))).astype(np.float32)) for _ in range(2))
        named = tuple(str(i % labels) if labels > 1 else "" for i in range(60))
        tasks.append(Task(f"task-{number}", train, test, named, named))
    return tasks


def simulated() -> NoiseSource:
    return NoiseSource(random.Random(0).randbytes, simulated=True)


@pytest.mark.parametrize("epsilon", [math.inf, 8.0])
def test_every_rule_finds_the_owner_of_the_task_when_noise_is_small(epsilon):
    tasks, feature_map = make_tasks(), small_map()
    market = publish([np.tile(task.train, (10, 1)) for task in tasks], [epsilon] * len(tasks), feature_map, simulated())
    for right, task in enumerate(tasks):
        ranked = similarities(market, sketch_of(task.test, feature_map, 2), feature_map)
        assert tuple(ranked) == RULES
        # The debiased MMD gives noise back to the noisy; with equal owners that is no difference.
        assert {rule: int(np.argmax(values)) for rule, values in ranked.items()} == dict.fromkeys(RULES, right)


def test_a_row_of_the_pure_experiment_counts_as_it_says():
    tasks, feature_map = make_tasks(), small_map()
    full, prompts = pure_cells(tasks, feature_map, 100, math.inf, (50,), repeats=3, per_task=True)
    assert (full["view"], prompts["view"], full["queries"]) == ("full", "prompt-only", 12)
    assert full["top1"] == [1.0, 1.0, 1.0]
    assert full["top3"][0] == 1.0
    assert sum(full["present"].values()) == pytest.approx(1, abs=1e-3)
    assert full["owners_bootstrapped"] == [task.name for task in tasks]  # 60 records each, 100 asked for
    assert full["queries_bootstrapped"] == []
    assert [row["task"] for row in full["per_task"]] == [task.name for task in tasks]


def test_siblings_are_the_declared_ones_and_never_the_task_itself():
    assert siblings_of("health-pubmedqa") == {"health-pubmed-conclusion"}
    assert siblings_of("health-medquad-rare") == {"health-medquad-cancer", "health-medquad-genetics"}
    assert siblings_of("code-python") == frozenset()


def test_records_are_drawn_once_where_there_are_enough_and_again_where_not():
    rng = np.random.default_rng(0)
    assert len(set(choose(rng, 50, 40).tolist())) == 40
    assert choose(rng, 5, 40).max() < 5


def test_total_variation_and_loss():
    owners = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    distances = total_variation(owners, np.array([0.75, 0.25, 0.0]))
    assert distances.tolist() == [0.25, 0.25, 1.0]
    assert [excess(distances, pick) for pick in range(3)] == [0.0, 0.0, 0.75]


def test_compositions_keep_to_one_task_and_sum_to_one():
    pools, rng = pools_of(make_tasks(3, labels=4)), np.random.default_rng(2)
    assert len(pools.tasks) == 12
    for draw in (of_task, of_labels):
        for _ in range(20):
            weights = draw(pools, rng)
            assert weights.sum() == pytest.approx(1)
            assert len(set(pools.tasks[weights > 0])) == 1
    assert sum(of_task(pools, rng) > 0) == 4  # a shard has every label of its task
    assert sum(of_labels(pools, rng) > 0) <= 2  # a subset has at most half
    assert len(sample(pools.train, of_labels(pools, rng), 500, rng)) == 500


def test_mixture_weights_without_noise_are_exact():
    means = np.random.default_rng(3).standard_normal((5, 40))
    truth = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
    assert mixture_weights(means, truth @ means) == pytest.approx(truth, abs=1e-4)


def test_noise_left_on_the_diagonal_evens_the_weights_out():
    rng, truth, std = np.random.default_rng(4), np.array([1.0, 0.0, 0.0, 0.0]), 1.5
    means = rng.standard_normal((4, 400))
    plain, corrected = [], []
    for _ in range(20):
        noisy = means + std * rng.standard_normal(means.shape)
        plain.append(total_variation(mixture_weights(noisy, means[0]), truth))
        corrected.append(total_variation(mixture_weights(noisy, means[0], 400 * std**2), truth))
    assert np.mean(corrected) < 0.1 < 0.3 < np.mean(plain)


def test_area_under_curve_counts_ties_half():
    assert area_under_curve(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert area_under_curve(np.array([0.0]), np.array([0.0])) == 0.5
    assert area_under_curve(np.array([0.0, 2.0]), np.array([1.0])) == 0.5


def test_an_interval_is_over_groups():
    assert interval(np.ones(10)) == [1.0, 1.0]
    low, high = interval(np.array([0.0, 1.0] * 50))
    assert 0.35 < low < 0.5 < high < 0.65


def test_the_markets_of_the_benchmark_run_on_a_tiny_world():
    result = hundred_owners(make_tasks(4, labels=4), small_map(), markets=1, queries=4)
    rules = result["total_variation"]["rules"]
    assert result["noisy_picks"]["random pick"] == [0.2, 0.2, 0.2]
    assert rules["LLR"]["llr_minus_rule"] == [0.0, 0.0, 0.0]
    assert 0 <= rules["LLR"]["loss"][0] < rules["random pick"]["loss"][0]
    assert all(0 <= row["corrected"][0] <= 1 for row in mixtures(make_tasks(), small_map(), repeats=1))


def test_only_what_stands_between_the_markers_is_replaced():
    page = "a\n<!-- table: x -->\nold\n<!-- end -->\nb\n<!-- table: y -->\n<!-- end -->\n"
    assert fill(page, {"x": "new", "y": "too"}) == "a\n<!-- table: x -->\nnew\n<!-- end -->\nb\n<!-- table: y -->\ntoo\n<!-- end -->\n"


def test_the_page_of_results_shows_what_was_measured():
    page, result = (RESULTS / "README.md").read_text(), json.loads((RESULTS / "specification.json").read_text())
    assert not result["quick"]
    assert fill(page, tables(result)) == page
    assert "<!-- table: targets -->\n|" in page
