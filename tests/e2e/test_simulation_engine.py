"""Flower's simulation engine carries the same campaign: equal seeds give equal specifications, byte for byte, and nothing stays behind."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest

from nodes import simulation_engine
from protocol.errors import CampaignFailed, UsageError
from tests.e2e.processes import veilmart

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[sim]'")


@pytest.fixture
def data() -> Path:
    folder = Path(os.environ.get("VEILMART_DATA", "../shared/data"))
    if not (folder / "math-gsm8k").is_dir():
        (pytest.fail if os.environ.get("VEILMART_REQUIRE_DATA") else pytest.skip)("no real task data: set VEILMART_DATA")
    return folder


def flower_processes() -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith((b"flower-superlink", b"raylet", b"gcs_server")) for word in words):
            found.add(int(path.parent.name))
    return found


@needs_ray
def test_both_engines_give_the_same_specifications_byte_for_byte(tmp_path, slm_directory, data):
    before, runs = flower_processes(), {}
    for engine, seed in (("grid", "5"), ("flower", "5"), ("grid", "6")):
        out = veilmart(
            "sim", "--engine", engine, "--data", str(data), "--nodes", "10", "--no-train", "--records", "30", "--query-size", "20",
            "--queries", "1", "--test-records", "1", "--seed", seed,
            "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / f"{engine}-{seed}"),
            "--base", str(slm_directory), "--json", "-q", home=tmp_path / "home",
        )  # fmt: skip
        runs[engine, seed] = json.loads(out)
    assert runs["grid", "5"]["digest"] == runs["flower", "5"]["digest"]
    assert runs["grid", "5"]["digest"] != runs["grid", "6"]["digest"], "control: the digest sees the specifications"
    assert len(runs["flower", "5"]["owners"]) == 10
    assert flower_processes() <= before, "what was started has ended"


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="needs Ray") as caught:
        simulation_engine.require_ray()
    assert "veilmart[sim]" in caught.value.hint


class Failing:
    """Stands where a guard stood that fails."""

    def request(self, order) -> None:
        raise CampaignFailed("an owner failed")

    def collect(self) -> bytes | None:
        raise CampaignFailed("PRIVATE-TEXT-4471")


@needs_ray
def test_a_run_without_a_market_ends_with_its_cause(tmp_path):
    """The ServerApp cannot even connect: the run's failure is an error here, and nothing of a guard's trouble is in Flower's log."""
    config = {"market": "127.0.0.1:1", "ca": str(tmp_path / "none.crt"), "epsilon": "1.0", "delta": "1e-06", "timeout-s": 5.0}
    config["out"] = str(tmp_path / "account.json")
    with pytest.raises(CampaignFailed):
        simulation_engine.run_campaign(tmp_path, [Failing(), Failing()], config, 1, 200.0)
    assert "PRIVATE-TEXT" not in (tmp_path / "flower" / "run.log").read_text()


@needs_ray
@pytest.mark.parametrize(("failures", "ends_well"), [(2, True), (3, False)])
def test_ray_that_does_not_start_in_time_is_started_again(tmp_path, monkeypatch, failures, ends_well):
    """Ray waits 30 s for its own processes, whatever one asks for: seen to be too short with six busy processes on two cores."""
    account, tries = tmp_path / "account.json", []

    def flwr_run(command, *, stdout, **others):
        tries.append(command)
        if len(tries) <= failures:
            stdout.write(b'  File "raybackend.py", line 52, in __init__\n  File "raybackend.py", line 119, in init_ray\n    ray.init(\n')
            return subprocess.CompletedProcess(command, 1)
        account.write_text("{}")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(simulation_engine.subprocess, "run", flwr_run)
    if ends_well:
        simulation_engine.run_campaign(tmp_path, [Failing(), Failing()], {"out": str(account)}, 1, 200.0)
    else:
        with pytest.raises(CampaignFailed, match="Ray did not start"):
            simulation_engine.run_campaign(tmp_path, [Failing(), Failing()], {"out": str(account)}, 1, 200.0)
    assert len(tries) == 3
