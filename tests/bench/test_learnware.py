"""The learnware benchmark: owners dealt by the seed alone, measures on numbers that a hand can check, and a whole run that is killed."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from nodes.base_model import BaseModel
from nodes.finetune import Recipe, held_out_loss
from nodes.mixes import Owner
from protocol.errors import UsageError
from protocol.keys import write_durably
from tests.bench import learnware_larger, learnware_run
from tests.bench.learnware import main
from tests.bench.learnware_measures import (
    MATCHES_MIXED,
    MIXED_UNLESS,
    Cell,
    analyse,
    find,
    gap_closed,
    kept_in,
    lost_to_noise,
    named,
    with_interval,
)
from tests.bench.learnware_policies import (
    best,
    candidates,
    fit_ridge,
    fit_weights,
    fitted_mixture,
    mixture_loss,
)
from tests.bench.learnware_report import PAGE, publish, tables
from tests.bench.learnware_run import Run, load_states, save_states, token_losses
from tests.bench.learnware_world import Settings, deal, kind_of, label_features, pairs_of, query_rows, read_pool
from tests.bench.specification import to_text
from tests.nodes.owners import SPLIT, tiny_map

# Owners -------------------------------------------------------------------------------------------------------------------------


def pool(task, count, labels=1):
    return [f"{task} {i}".encode() for i in range(count)], [str(i % labels) if labels > 1 else "" for i in range(count)]


POOLS = {"math-a": pool("math-a", 400), "math-b": pool("math-b", 900), "law-c": pool("law-c", 300, 9), "law-d": pool("law-d", 250)}


def test_no_record_is_dealt_to_two_owners_and_every_task_has_one():
    dealt = deal(POOLS, 12, 20, 200, seed=1)
    lines = [line for _, own in dealt for line in own]
    assert len(lines) == len(set(lines))
    assert {task for owner, _ in dealt for task in owner.records} == set(POOLS)
    assert all(owner.count == len(own) for owner, own in dealt)
    assert min(owner.count for owner, _ in dealt) >= 20


def test_a_third_are_mixtures_of_two_related_tasks_and_label_subsets_leave_labels_out():
    dealt = deal(POOLS, 12, 20, 200, seed=2)
    mixed = [owner for owner, _ in dealt if kind_of(owner.name) == "mixture"]
    assert len(mixed) == 4
    related = pairs_of(sorted(POOLS))
    assert related == [("law-c", "law-d"), ("math-a", "math-b")]
    assert all(tuple(sorted(owner.records)) in related for owner in mixed)
    (subset,) = [own for owner, own in dealt if kind_of(owner.name) == "labels"]
    by_line = dict(zip(*POOLS["law-c"], strict=True))
    assert 2 <= len({by_line[line] for line in subset}) <= 4


def test_the_seed_alone_decides_who_owns_what():
    assert deal(POOLS, 9, 20, 200, seed=3) == deal(dict(reversed(POOLS.items())), 9, 20, 200, seed=3)
    assert deal(POOLS, 9, 20, 200, seed=3) != deal(POOLS, 9, 20, 200, seed=4)


def test_demands_shrink_to_what_a_task_has_and_too_many_are_refused():
    few = {"math-a": pool("math-a", 100), "math-b": pool("math-b", 100)}
    assert sum(owner.count for owner, _ in deal(few, 6, 30, 90, seed=1)) <= 200
    with pytest.raises(UsageError, match="at least"):
        deal(few, 12, 40, 90, seed=1)
    with pytest.raises(UsageError, match="one a task"):
        deal(few, 1, 10, 20, seed=1)


def test_labels_are_read_from_tasks_of_labels_alone(tmp_path):
    for name, kind in (("a", "classification"), ("b", "generation")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "p", "response": "yes"}\n\n')
        (tmp_path / name / "meta.json").write_text(json.dumps({"kind": kind}))
    assert read_pool(tmp_path / "a")[1] == ["yes"]
    assert read_pool(tmp_path / "b")[1] == [""]


def test_a_query_is_drawn_without_repetition_and_depends_on_the_seed():
    rows = query_rows(30, 20, 3, 1, "math-a")
    assert all(len(set(own)) == 20 for own in rows)
    assert rows == query_rows(30, 20, 3, 1, "math-a")
    assert rows != query_rows(30, 20, 3, 2, "math-a")
    assert len(query_rows(5, 20, 1, 1, "x")[0]) == 5


def test_label_features_have_length_one_and_equal_labels_are_equal():
    rows = label_features(["Yes", " yes ", "no", "a rather long answer that goes on and on until it is no label any more, see", ""])
    assert np.allclose((rows**2).sum(axis=1), 1)
    assert (rows[0] == rows[1]).all()
    assert (rows[0] != rows[2]).any()


# Measures -----------------------------------------------------------------------------------------------------------------------


def test_gap_closed_is_a_ratio_of_sums():
    chosen, random, oracle = np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([1.0, 1.0])
    assert gap_closed(chosen, random, oracle) == pytest.approx((1 + 1) / (1 + 3))
    assert gap_closed(oracle, random, oracle) == 1.0
    assert gap_closed(random, random, oracle) == 0.0
    assert gap_closed(chosen, oracle, oracle) == 1.0, "where all picks are the same there is nothing to close"
    assert with_interval(oracle, random, oracle) == [1.0, 1.0, 1.0]
    value, low, high = with_interval(chosen, random, oracle)
    # Two tasks: a bootstrap sample is both, the first twice (1 of 1) or the second twice (1 of 3).
    assert (value, low, high) == (0.5, pytest.approx(1 / 3, abs=1e-3), 1.0)


def test_what_noise_costs_is_the_paired_difference_of_the_gaps_closed():
    quiet, random, oracle = np.array([1.0, 3.0]), np.array([2.0, 4.0]), np.array([1.0, 1.0])
    assert lost_to_noise(quiet, quiet, random, oracle) == [0.0, 0.0, 0.0]
    lost, low, high = lost_to_noise(quiet + np.array([0.5, 0.0]), quiet, random, oracle)
    assert lost == pytest.approx(0.5 / 4)
    assert (low, high) == (0.0, 0.5), "either task alone"
    assert lost_to_noise(quiet - 0.1, quiet, random, oracle)[0] < 0, "noise may help"


def test_a_cell_splits_at_texts_and_counts_whole_answers():
    cell = Cell(np.array([1.0, 2.0, 3.0], np.float32), np.array([True, True, False]), np.array([1, 2]))
    assert (cell.loss, cell.exact) == (2.0, 0.5)
    assert cell.of(0, 1).loss == 1.0
    assert cell.of(1, 2).exact == 0.0


def test_a_mixture_of_probabilities_and_its_fitted_weights():
    nats = -np.log(np.array([[0.5, 0.25], [0.25, 0.75]]))
    assert mixture_loss(nats, np.array([0.5, 0.5])) == pytest.approx(-(math.log(0.375) + math.log(0.5)) / 2)
    assert mixture_loss(nats, np.array([1.0, 0.0])) == pytest.approx(nats[0].mean())
    one_sided = -np.log(np.array([[0.9] * 20, [0.1] * 20]))
    assert fitted_mixture(one_sided)[0] > 0.99
    assert fitted_mixture(np.ones((3, 4))) == pytest.approx(np.full(3, 1 / 3))


def test_a_ridge_finds_what_gains_depend_on_and_ignores_the_level_of_a_task():
    rng = np.random.default_rng(0)
    groups = []
    for level in (0.0, 5.0, -3.0):
        x = rng.standard_normal((200, 3)) + level
        groups.append((x, x @ np.array([1.0, 0.0, -2.0]) + level))
    rows = rng.standard_normal((50, 3))
    assert np.corrcoef(fit_ridge(groups)(rows), rows @ np.array([1.0, 0.0, -2.0]))[0, 1] > 0.999


def test_weights_of_distances_are_those_under_which_the_nearest_gains_most():
    rng = np.random.default_rng(1)
    groups = [(np.column_stack([gains * -1, rng.random(8)]), gains) for gains in rng.random((30, 8))]
    assert fit_weights(groups)[0] >= 0.9


OWNERS = (Owner("shard-001", {"math-a": 300}), Owner("mixture-002", {"math-a": 90, "math-b": 90}), Owner("shard-003", {"law-c": 250}))


def test_who_is_left_out_of_a_scenario():
    assert candidates(OWNERS, "math-b", "seen").tolist() == [True, True, True]
    assert candidates(OWNERS, "math-b", "unseen").tolist() == [True, False, True]
    assert candidates(OWNERS, "math-b", "domain left out").tolist() == [False, False, True]
    assert kept_in(OWNERS, "law-c", "unseen, owners of 200 records or more").tolist() == [True, False, False]
    assert best(np.array([1.0, 5.0, 3.0]), np.array([True, False, True]), 3) == [2, 0]


# Whole runs ---------------------------------------------------------------------------------------------------------------------

TASKS = {"x-wool": "wool", "x-iron": "iron", "y-salt": "salt", "p-one": "tin", "p-two": "gold"}


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for task, word in TASKS.items():
        for part, count in (("train", 90), ("test", 30)):
            lines = [json.dumps({"prompt": f"{part} {i} of {word}", "response": f"{word} {i * 7 % 13}"}) for i in range(count)]
            (folder / task).mkdir(exist_ok=True)
            (folder / task / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_run(data, out, tiny_model_directory, model, workers=1, **how):
    how = {
        "tasks": ("x-wool", "x-iron", "y-salt"), "public_tasks": ("p-one", "p-two"), "specialists": 5, "smallest": 20, "largest": 40,
        "texts": 4, "validation": 2, "public_specialists": 4, "public_texts": 3, "queries": 2, "query_size": 8, "query_pool": 12,
        "draws": 2, "epsilons": (8.0,), "epsilon_spec": 1.0, "adapters": (None, 8.0), "private_smallest": 20, "maps": ("tiny",),
        "split": SPLIT, "recipe": Recipe(rank=2, alpha=4, epochs=1, max_steps=3), "pooled_steps": 4, **how,
    }  # fmt: skip
    return Run(Settings(data, out, **how), tiny_model_directory, [tiny_map(model)], "cpu", workers)


def finished(run, resume=False):
    run.begin(resume)
    run.work()
    return analyse(run)


def without_times(result):
    """What the seed decides: all but seconds, and the noise of ciphertexts."""
    kept = {key: value for key, value in result.items() if key not in ("cost", "matching")}
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory, tiny_model_directory, model):
    run = tiny_run(data, tmp_path_factory.mktemp("learnware") / "run", tiny_model_directory, model)
    return run, finished(run)


def test_the_loss_of_a_cell_is_that_of_the_product(model, data, tmp_path):
    from nodes.records import read_records

    states = model.prefix_pass_batched(read_records(data / "x-wool" / "test.jsonl"), SPLIT, layer=2)[1]
    cell = token_losses(model, None, states, 2)
    assert cell.loss == pytest.approx(held_out_loss(model, None, states), rel=1e-4)
    save_states(tmp_path / "states.npz", states)
    again = token_losses(model, None, load_states(tmp_path / "states.npz"), 1)
    assert (again.nats == cell.nats).all(), "neither the file nor the number of threads changes a loss"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_measures_everything_that_the_tables_show(whole):
    _, result = whole
    assert [row["scenario"] for row in result["policies"] if row["policy"] == "oracle"][:2] == ["domain left out", "seen"]
    epsilon = named(1.0)
    policies = (
        "LLR",
        "cosine",
        "mixture of 3",
        MIXED_UNLESS,
        MATCHES_MIXED,
        "predicted gain",
        "label-aware",
        "LLR; own texts choose among 3",
    )
    for policy in policies:
        assert math.isfinite(find(result, "seen", policy, epsilon)["loss"])
    oracle, random = (find(result, "seen", policy)["loss"] for policy in ("oracle", "random"))
    assert oracle < random
    assert result["matching"]["releases_are_the_seeded_draws"]
    assert result["matching"]["same_choice"] == result["matching"]["queries"] == 3
    assert [row["epsilon_adapter"] for row in result["blocks"]] == [None, 8.0]
    assert result["simulated_noise"]
    assert {row["scenario"] for row in result["noise"]} >= {"seen", "unseen"}
    assert all(table for table in tables(result).values())
    assert {row["stage"] for row in result["cost"]} >= {"texts", "specialists", "losses", "encrypted queries"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_same_seed_gives_the_same_tables_and_another_seed_others(whole, data, tmp_path, tiny_model_directory, model):
    again = finished(tiny_run(data, tmp_path / "again", tiny_model_directory, model, workers=2))
    assert without_times(again) == without_times(whole[1])
    other = finished(tiny_run(data, tmp_path / "other", tiny_model_directory, model, seed=2, encrypted=0))
    assert without_times(other) != without_times(whole[1]), "the control"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_run_goes_on_and_makes_nothing_twice(whole, data, tmp_path, tiny_model_directory, model, monkeypatch):
    out = tmp_path / "killed"
    run = tiny_run(data, out, tiny_model_directory, model, encrypted=0)
    run.begin(False)
    made = []

    def until(limit):
        def make(item):
            if len(made) == limit:
                raise KeyboardInterrupt
            made.append(item.there)
            item.make()

        return make

    monkeypatch.setattr(learnware_run, "make", until(60))
    with pytest.raises(KeyboardInterrupt):
        run.work()
    assert len(made) == 60
    torn = out / "cells" / "none" / "base" / ".x-wool.npz.1.tmp"  # of a piece that was being written: it counts as not there
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"torn")
    with (out / "costs.jsonl").open("a") as log:
        log.write('{"stage": "te')
    with pytest.raises(UsageError, match="a run began here"):
        tiny_run(data, out, tiny_model_directory, model, encrypted=0).begin(False)
    with pytest.raises(UsageError, match="other settings"):
        tiny_run(data, out, tiny_model_directory, model, encrypted=0, draws=1).begin(True)
    monkeypatch.setattr(learnware_run, "make", until(10**6))
    result = finished(tiny_run(data, out, tiny_model_directory, model, encrypted=0), resume=True)
    assert len(made) == len(set(made)), "no piece was made twice"
    assert result["policies"] == whole[1]["policies"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_report_comes_from_the_runs_folder_alone(whole, tmp_path, monkeypatch):
    run, result = whole
    kept = tmp_path / "kept"
    shutil.copytree(run.out, kept, ignore=shutil.ignore_patterns("market", "guards", "texts", "adapters"))
    monkeypatch.setattr(BaseModel, "open", lambda *_, **__: pytest.fail("a model was opened"))
    settings = Settings.of_run(kept)
    assert settings.recipe == run.settings.recipe
    again = analyse(Run(settings, Path("nowhere"), run.maps))
    assert to_text(again) == to_text(result)
    for _ in range(2):  # a page that is there keeps its own words
        publish(again, to_text(again), tmp_path / "docs")
        page = (tmp_path / "docs" / "learnware.md").read_text()
        assert "<!-- table: learnware-policies -->\n|" in page
    assert page.count("<!-- end -->") == PAGE.count("<!-- end -->")
    pictures = {name: (tmp_path / "docs" / f"learnware-{name}.svg").read_bytes() for name in ("gap", "epsilon", "score")}
    publish(again, to_text(again), tmp_path / "twice")
    assert all((tmp_path / "twice" / f"learnware-{name}.svg").read_bytes() == picture for name, picture in pictures.items())
    (kept / "cells" / "none" / "base" / "x-wool.npz").unlink()
    with pytest.raises(FileNotFoundError):
        analyse(Run(settings, Path("nowhere"), run.maps))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_larger_model_answers_beside_the_specialists(whole, tmp_path, tiny_model_directory, model, data, monkeypatch):
    monkeypatch.setattr(learnware_larger, "ANSWER_TOKENS", 2)  # a model of random weights never ends by itself
    out = tmp_path / "run"
    shutil.copytree(whole[0].out, out)
    for task in ("x-wool", "x-iron"):  # as if they had been done before
        for scenario in ("seen", "unseen"):
            found = {"task": task, "scenario": scenario, "owner": "shard-001", "texts": 1, "same_tokenizer": True, "rows": []}
            write_durably(out / "larger" / f"{task}.{scenario}.json", json.dumps(found).encode())
    other = tiny_run(data, out, tiny_model_directory, model, larger_texts=1)
    learnware_larger.compare_with(other, tiny_model_directory)
    result = analyse(other)
    assert {one["scenario"] for one in result["larger"]} == {"seen", "unseen"}
    assert {"base", "larger", "single", "proxy"} <= {row["strategy"] for row in result["larger"][-1]["rows"]}
    assert result["larger"][0]["rows"] == [], "what is there is not done again"
    assert "proxy" in tables(result)["learnware-larger"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quick_form_runs_on_real_tasks(slm_directory, tmp_path, capsys):
    folder = Path(os.environ.get("VEILMART_DATA", "../shared/data"))
    if not folder.is_dir():
        (pytest.fail if os.environ.get("VEILMART_REQUIRE_DATA") else pytest.skip)(f"needs {folder}: real task data not present")
    words = ["--data", str(folder), "--base", str(slm_directory), "--out", str(tmp_path / "run"), "--quick", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["owners"]) == 4
    seen = find(result, "seen", "oracle")
    assert seen["loss"] < find(result, "seen", "base")["loss"]
    assert result["matching"]["same_choice"] == result["matching"]["queries"]
    assert main(["--out", str(tmp_path / "run"), "--report", str(tmp_path / "docs")]) == 0
