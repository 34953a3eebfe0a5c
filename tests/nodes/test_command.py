"""The command line as a person meets it: speed, errors, exit codes.  Nothing here loads the model."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.commands.options import unit_in
from nodes.owner import name_from
from protocol.errors import UsageError
from protocol.privacy import PrivacyUnit
from protocol.release import Card

SECRET = "SECRET-4410"


def veilmart(*words: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodes.command", *words]
    env = {**os.environ, "VEILMART_HOME": str(home), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_help_answers_in_half_a_second(tmp_path):
    """CPU seconds of the whole process: the wall clock of a shared machine would measure its neighbours."""
    seconds = []
    for _ in range(5):
        before = os.times()
        done = veilmart("--help", home=tmp_path)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
    assert statistics.median(seconds) < 0.5


COMMANDS = [
    "demo", "sim", "find", "pull", "ask", "market up", "node publish", "node train", "node ledger", "node backup", "node restore",
    "node repair", "model import", "map fit", "map show", "catalogue export", "verify answer",
    "campaign run", "campaign list", "campaign show", "paths", "node up",
    "audit training", "audit node", "browse",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, tmp_path):
    done = veilmart(*command.split(), "--help", home=tmp_path)
    assert done.returncode == 0
    assert f"Example: veilmart {command}" in done.stdout


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_wrong_input_gets_one_clear_error_and_its_exit_code(tmp_path):
    ca = written(tmp_path / "ca.crt", "no certificate")
    good = written(tmp_path / "good.jsonl", '{"text": "a b"}\n')
    bad = written(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n{{"text": "{SECRET}"\n')
    cases = [
        (2, ["find", "absent.jsonl", "--market", "127.0.0.1:9", "--ca", ca], "absent.jsonl"),
        (2, ["find", bad, "--market", "127.0.0.1:9", "--ca", ca], "bad.jsonl, line 2"),
        (2, ["find", good, "--market", "127.0.0.1:9", "--ca", str(tmp_path / "no.crt")], "no.crt"),
        (2, ["find", good, "--market", "nowhere", "--ca", ca], "HOST:PORT"),
        (6, ["find", good, "--market", "127.0.0.1:9", "--ca", ca], "no answer"),
        (2, ["node", "publish", "--data", good], "--market"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--base", str(tmp_path)], "model directory"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--epsilon-adapter", "some"], "a number or 'none'"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--epsilon-adapter", "-1"], "epsilon"),
        (2, ["node", "train", "--data", good, "--epsilon-adapter", "nan"], "epsilon"),
        (2, ["node", "train", "--data", good, "--base", str(tmp_path)], "model directory"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--epsilon", "0"], "epsilon"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--unit", "a b"], "unit"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--unit", "text"], "whom it belongs to"),
        (2, ["node", "publish", "--data", good, "--dry-run", "--population", "../x"], "--population"),
        (2, ["node", "restore", good], "not a usable backup"),
        (2, ["market", "up", "--port", "0", "--largest-epsilon", "50"], "largest epsilon"),
        (2, ["sim", "--data", str(tmp_path / "none")], "no such folder"),
        (2, ["sim", "--data", str(tmp_path), "--out", str(tmp_path)], "new or empty folder"),
        (2, ["ask", "-m", "x@00000000"], "Missing argument"),
        (3, ["ask", "-m", "x@00000000", "hello"], "not pulled"),
        (2, ["map", "show", str(tmp_path / "none.map")], "none.map"),
        (7, ["map", "show", good], "veilmart/map/v2"),
        (2, ["model", "import", "--gguf", good], "SHA-256"),
        (2, ["frobnicate"], "frobnicate"),
        (2, ["find", good, "--market", "127.0.0.1:9", "--ca", ca, "--mirror", "--auto"], "nothing to choose"),
        (2, ["find", good, "--market", "127.0.0.1:9", "--ca", ca, "--base-model", "XYZ"], "hexadecimal"),
        (2, ["verify", "answer", str(tmp_path / "none.proof")], "none.proof"),
        (2, ["verify", "answer", good, "--releases", good], "veilmart/proof/v1"),
        (2, ["market", "up", "--port", "0", "--home", good], "good.jsonl"),
    ]
    for code, words, expected in cases:
        done = veilmart(*words, home=tmp_path / "home")
        told = done.stdout + done.stderr
        assert done.returncode == code, (words, told)
        assert expected.lower() in told.lower(), (words, told)
        assert "Traceback" not in told
        assert SECRET not in told
        assert len(done.stderr.strip().splitlines()) <= 12


def test_errors_are_json_when_json_was_asked_for(tmp_path):
    done = veilmart("find", "absent.jsonl", "--market", "127.0.0.1:9", "--ca", "x", "--json", home=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (2, "records")


def test_a_failed_import_leaves_nothing_half_written(tmp_path):
    home = tmp_path / "home"
    veilmart("model", "import", "--gguf", written(tmp_path / "x.gguf", "GGUF nonsense"), home=home)
    assert [path for path in home.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_the_shipped_map_is_shown(tmp_path):
    shown = json.loads(veilmart("map", "show", "--json", home=tmp_path).stdout)
    assert shown["schema"] == "veilmart.map/1"
    assert shown["dimension"] == 96


def test_a_traceback_appears_only_on_request(tmp_path):
    assert "Traceback" in veilmart("--debug", "map", "show", "none.map", home=tmp_path).stderr


@pytest.mark.parametrize(("text", "unit"), [("record", ""), ("person", "person"), ("field:person", "person")])
def test_a_unit_is_taken_as_it_is_printed(tmp_path, text, unit):
    assert unit_in(text, tmp_path) == PrivacyUnit(unit)


@pytest.mark.parametrize("text", ["field:", "field:field:person", "recor d"])
def test_what_is_no_unit_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="unit"):
        unit_in(text, tmp_path)


def test_a_card_that_is_no_utf8_is_the_callers_mistake(tmp_path):
    for field in ("summary", "licence"):
        with pytest.raises(UsageError, match="UTF-8"):
            Card("notes", **{field: os.fsdecode(b"caf\xe9")})
    command = ("node", "publish", "--data", written(tmp_path / "a.jsonl", '{"text": "a"}'), "--dry-run", "--no-train")
    done = veilmart(*command, "--summary", os.fsdecode(b"caf\xe9"), home=tmp_path)
    assert (done.returncode, "UTF-8" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("file", "name"), [("My Notes 2026.jsonl", "my-notes-2026"), ("données.txt", "donn-es"), ("...", "learnware"), ("x" * 90, "x" * 63)]
)
def test_a_learnware_without_a_name_is_called_after_its_file(file, name):
    assert Card(name_from(Path(file))).name == name
