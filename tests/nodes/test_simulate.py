"""A simulation: the same seed gives the same releases, a killed run goes on, and one that cannot succeed ends at once and says why."""

import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from nodes import machine
from nodes.base_model import BaseModel
from nodes.crew import WORKER_BYTES, plan_run
from nodes.finetune import Recipe
from nodes.mixes import Mix
from nodes.simulate import MarketProcess, Settings, new_run_folder, plan_tasks, simulate, wait_until_free
from protocol.errors import CampaignFailed, MarketUnreachable, UsageError
from protocol.features import default_map
from protocol.release import open_envelope
from tests.nodes.owners import MARKER, SPLIT, tiny_map, write_records

RECIPE = Recipe(rank=2, alpha=4, epochs=1, max_steps=2)


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def settings_of(tmp_path, out="run", **how):
    for task in ("a", "b"):
        for split in ("train", "test"):
            write_records(tmp_path / "data" / task / f"{split}.jsonl", 90, f"{task}{split}")
    how = {"nodes": 4, "records": 20, "queries": 0, "test_records": 0, "split": SPLIT, "recipe": RECIPE, "seed": 3, **how}
    return Settings(data=tmp_path / "data", out=tmp_path / out, **how)


def run(settings, model, **how):
    return simulate(settings, model, tiny_map(model), **how)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_digest_whatever_the_number_of_workers(tmp_path, model):
    first = run(settings_of(tmp_path, workers=1), model)
    second = run(settings_of(tmp_path, "again", workers=3), model)
    assert first["digest"] == second["digest"]
    assert [owner["adapter_digest"] for owner in first["owners"]] == [owner["adapter_digest"] for owner in second["owners"]]
    assert first["owners"][0]["release_id"] != second["owners"][0]["release_id"], "keys are fresh in every run"
    other = run(settings_of(tmp_path, "other", seed=4), model)
    assert other["digest"] != first["digest"], "the control: another seed"


def charges(folder):
    found = {}
    for path in sorted(folder.glob("repeat-0/owners/*/ledger.db")):
        with sqlite3.connect(path) as db:
            found[path.parent.name] = db.execute("SELECT count(*) FROM entry").fetchone()[0]
    return found


@pytest.mark.slow
def test_a_run_that_was_interrupted_goes_on_and_pays_for_nothing_twice(tmp_path, model):
    settings = settings_of(tmp_path)
    whole = run(settings_of(tmp_path, "whole"), model)
    _half(settings)
    before = charges(settings.out)
    assert 1 <= sum(before.values()) < 4
    kept = {path: path.read_bytes() for path in settings.out.glob("repeat-0/owners/*/adapters/*")}
    result = run(settings, model)
    assert charges(settings.out) == dict.fromkeys(charges(settings.out), 1)
    assert len(charges(settings.out)) == 4
    assert result["digest"] == whole["digest"]
    assert all(path.read_bytes() == data for path, data in kept.items())
    ids = [owner["release_id"] for owner in result["owners"]]
    assert [owner["release_id"] for owner in run(settings, model)["owners"]] == ids, "a finished run sends the stored bytes again"


def _half(settings):
    """Run two of the owners to their release and stop there, as a kill would."""
    program = (
        "import os, sys, pathlib; from nodes import crew; from nodes.base_model import BaseModel\n"
        "from tests.nodes.test_simulate import run, settings_of\n"
        "real = crew.Guard.work\n"
        "made = []\n"
        "def work(self):\n"
        "    if len(made) == 2: os._exit(9)\n"
        "    real(self); made.append(1)\n"
        "crew.Guard.work = work\n"
        f"run(settings_of(pathlib.Path({str(settings.out.parent)!r}), workers=1), BaseModel.open(pathlib.Path({os.environ['TINY']!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 9, done.stderr


@pytest.fixture(autouse=True)
def tiny_in_environment(tiny_model_directory, monkeypatch):
    monkeypatch.setenv("TINY", str(tiny_model_directory))


def test_a_run_folder_takes_one_run_only(tmp_path, model):
    settings = settings_of(tmp_path, recipe=None)
    run(settings, model)
    with pytest.raises(UsageError, match="other settings"):
        run(replace(settings, epsilon_spec=0.5), model)


@pytest.mark.slow
def test_a_cache_of_embeddings_changes_nothing_but_time(tmp_path, model):
    first = run(settings_of(tmp_path, recipe=None, cache=tmp_path / "cache"), model)
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 4
    assert run(settings_of(tmp_path, "again", recipe=None, cache=tmp_path / "cache"), model)["digest"] == first["digest"]
    for file in files:  # the control: the cache is read
        np.save(file, -np.load(file))
    assert run(settings_of(tmp_path, "third", recipe=None, cache=tmp_path / "cache"), model)["digest"] != first["digest"]


@pytest.mark.slow
def test_mixtures_are_matched_by_their_main_task_and_the_use_of_the_machine_is_reported(tmp_path, model):
    plans = []
    settings = settings_of(tmp_path, recipe=None, mix=Mix.parse("dirichlet:0.5"), queries=1, query_size=20, mirror=True)
    result = run(settings, model, on_plan=plans.append)
    assert {query["chosen"] for query in result["queries"]} <= {owner["owner"] for owner in result["owners"]}
    assert all(sum(owner["records"].values()) == 20 for owner in result["owners"])
    assert "4 owners with 80 records" in plans[0].line
    assert result["peak_memory_bytes"] > sum(result["peak_memory_bytes_each"].values()) / 2 > 100 << 20
    assert len(result["peak_memory_bytes_each"]) >= 2, "the market is a process of its own"
    assert result["cpu_seconds_all_processes"] > 0.5
    assert result["campaigns"][0]["messages"] >= 8


@pytest.mark.slow
def test_an_owner_on_another_base_model_specifies_with_the_encoder_of_the_map(tmp_path, model, tiny_model_directory):
    from safetensors.torch import load_file, save_file

    other_directory = tmp_path / "other"
    shutil.copytree(tiny_model_directory, other_directory)
    weights = load_file(other_directory / "model.safetensors")
    save_file({name: weight * 1.25 for name, weight in weights.items()}, other_directory / "model.safetensors", {"format": "pt"})
    other = BaseModel.open(other_directory)
    alone = run(settings_of(tmp_path), model)
    mixed = run(settings_of(tmp_path, "mixed", other_base=1), model, other=other)
    assert [owner["base_model"] for owner in mixed["owners"]] == [model.model_id] * 3 + [other.model_id]
    assert [owner["adapter_digest"] for owner in mixed["owners"]][:3] == [owner["adapter_digest"] for owner in alone["owners"]][:3]
    assert mixed["owners"][3]["adapter_digest"] != alone["owners"][3]["adapter_digest"]
    sums = [_envelope(tmp_path / name / "repeat-0" / "owners" / "b.2").specification.noisy_sums.tolist() for name in ("run", "mixed")]
    assert sums[0] == sums[1], "the specification is the same, whatever model the adapter is on"


def _envelope(home):
    with sqlite3.connect(home / "ledger.db") as db:
        return open_envelope(bytes(db.execute("SELECT envelope FROM entry").fetchone()[0]))


def test_as_many_owners_work_at_a_time_as_cores_and_memory_allow(monkeypatch):
    monkeypatch.setattr("nodes.crew.cores", lambda: 8)
    monkeypatch.setattr("nodes.crew.free_bytes", lambda: 1 << 40)
    assert plan_run(100, 3200, 2, 1 << 29, None).workers == 8
    assert plan_run(3, 96, 2, 1 << 29, None).workers == 3
    monkeypatch.setattr("nodes.crew.free_bytes", lambda: (900 << 20) + (1 << 29) + 3 * WORKER_BYTES + 1)
    assert plan_run(100, 3200, 2, 1 << 29, None).workers == 3
    monkeypatch.setattr("nodes.crew.free_bytes", lambda: 1 << 20)
    assert plan_run(100, 3200, 2, 1 << 29, None).workers == 1


def test_the_watch_sees_children_and_what_left_the_family():
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(60 << 20); print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "VEILMART_MARK": "m7"})  # fmt: skip
    try:
        child.stdout.readline()
        assert child.pid in machine.family(os.getpid())
        assert machine.with_variable("VEILMART_MARK", "m7") == {child.pid}
        assert machine.resident_bytes(child.pid) > 50 << 20
    finally:
        child.communicate()
    assert child.pid not in machine.family(os.getpid())


@pytest.mark.slow
def test_an_owner_that_is_refused_ends_the_campaign_at_once(tmp_path, slm_directory, monkeypatch):
    for task in ("a", "b"):
        write_records(tmp_path / "data" / task / "train.jsonl", 40)
        write_records(tmp_path / "data" / task / "test.jsonl", 10)
    monkeypatch.setattr("nodes.simulate.deal", lambda *what: _deal_too_few(*what))
    start = time.monotonic()
    with pytest.raises(CampaignFailed, match="at least 20 records") as caught:
        simulate(Settings(data=tmp_path / "data", out=tmp_path / "run"), BaseModel.open(slm_directory), default_map())
    assert time.monotonic() - start < 60
    assert MARKER not in str(caught.value)


def _deal_too_few(data, tasks, nodes, mix, records, minimum, choices):
    from nodes.mixes import deal

    return deal(data, tasks, nodes, mix, 10, 1, choices)


def test_a_plan_names_what_is_missing(tmp_path):
    write_records(tmp_path / "data" / "a" / "train.jsonl")
    shutil.copy(tmp_path / "data" / "a" / "train.jsonl", tmp_path / "data" / "a" / "test.jsonl")
    with pytest.raises(UsageError, match="at least 2 owners"):
        plan_tasks(Settings(data=tmp_path / "data", out=tmp_path), default_map())
    with pytest.raises(UsageError, match="nowhere not in"):
        plan_tasks(Settings(data=tmp_path / "data", out=tmp_path, tasks=("nowhere",)), default_map())


def test_two_runs_are_never_mixed(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "result.json").write_text("{}")
    with pytest.raises(UsageError, match="new or empty"):
        new_run_folder(tmp_path / "old", tmp_path)
    assert new_run_folder(tmp_path / "new", tmp_path) == tmp_path / "new"


def test_a_run_waits_for_the_market_of_a_run_that_was_killed_on_its_folder(tmp_path):
    assert wait_until_free(tmp_path) is None, "nobody was there before"
    lock = (tmp_path / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    ended = []

    def end():
        ended.append(True)
        lock.close()

    threading.Timer(0.3, end).start()
    wait_until_free(tmp_path)
    assert ended


def test_a_market_that_does_not_start_is_an_error_with_a_hint_and_leaves_nothing_open(tmp_path, model):
    (tmp_path / "market" / "market.db").mkdir(parents=True)
    with pytest.raises(MarketUnreachable, match="did not start") as caught:
        MarketProcess(tmp_path, tiny_map(model))
    assert "market.log" in caught.value.hint
