"""Wherever owner and market die, and die again when started anew: one byte string leaves, it is paid for once, and all finishes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
POINTS = {
    "start", "records claimed", "drawn", "signed", "ledger: charge and bytes written, not committed", "ledger: before its commit",
    "ledger: after its commit", "about to send", "on the wire", "market: before its commit", "market: stored",
    "before a checkpoint is kept", "a checkpoint is kept", "answered", "before a receipt is kept", "a receipt is kept",
}  # fmt: skip


def schedules(folder, model, *flags: str) -> dict:
    command = [sys.executable, "-m", "tests.crash_points", str(folder), str(model), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_pair_of_crashes_leaves_one_byte_string_that_is_charged_once(folder_in_memory, tiny_model_directory):
    found = schedules(folder_in_memory, tiny_model_directory, "--pairs")
    assert set(found["names"]) >= POINTS
    assert found["points"] > len(POINTS), "some are passed more than once"
    assert found["schedules"] > found["points"] ** 2 / 3, "pairs: the further the first run came, the fewer points are left for the second"
    assert (found["strings"], found["undercounted"], found["overcounted"], found["unfinished"]) == (1, 0, 0, 0)


@pytest.mark.slow
def test_sending_before_charging_is_caught_by_that_test(folder_in_memory, tiny_model_directory):
    """Control, for which one crash is enough."""
    found = schedules(folder_in_memory, tiny_model_directory, "--send-first")
    assert found["strings"] == 2
    assert found["undercounted"] > 0
    assert found["unfinished"] > 0
