"""A simulation that cannot succeed ends at once and says why."""

import shutil
import time

import pytest

from nodes.base_model import BaseModel
from nodes.simulate import Settings, new_run_folder, plan_tasks, simulate
from protocol.errors import CampaignFailed, UsageError
from protocol.features import default_map
from tests.nodes.owners import MARKER, write_records


@pytest.mark.slow
def test_an_owner_that_is_refused_ends_the_campaign_at_once(tmp_path, slm_directory):
    for task in ("a", "b"):
        write_records(tmp_path / "data" / task / "train.jsonl", 10)  # the policy's minimum is 20
        write_records(tmp_path / "data" / task / "test.jsonl", 10)
    start = time.monotonic()
    with pytest.raises(CampaignFailed, match="at least 20 records") as caught:
        simulate(Settings(data=tmp_path / "data", out=tmp_path / "run"), BaseModel.open(slm_directory), default_map())
    assert time.monotonic() - start < 60
    assert MARKER not in str(caught.value)


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
