"""The command line as a person meets it: speed, help, errors, exit codes.  Nothing here loads the real model."""

import contextlib
import datetime
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import grpc
import pytest

from market_node.identity import market_identity
from nodes.command import _told
from nodes.commands.options import unit_in
from nodes.owner import name_from
from protocol.errors import UsageError
from protocol.privacy import PrivacyUnit
from protocol.release import Card
from tests.command_line import COMMANDS, accept, run

ROOT = Path(__file__).parents[2]
SECRET = "SECRET-4410"


def veilmart(*words: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, where a test is about the process."""
    command = [sys.executable, "-m", "nodes.command", *words]
    env = {**os.environ, "VEILMART_HOME": str(home), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> str:
    """The file of an authority that no market here uses, beside a certificate and key of it."""
    return str(market_identity(tmp_path_factory.mktemp("m"), (), datetime.datetime.now(datetime.UTC)).ca_file)


def test_help_answers_in_half_a_second(tmp_path):
    """CPU seconds of the whole process: the wall clock of a shared machine would measure its neighbours."""
    seconds = []
    for _ in range(3):
        before = os.times()
        done = veilmart("--help", home=tmp_path)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
    assert statistics.median(seconds) < 0.5


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_is_accepted(name, monkeypatch):
    for variable in ("VEILMART_MARKET", "VEILMART_CA"):
        monkeypatch.setenv(variable, "x")  # `market add` or `node join` said so before
    examples = re.findall(r"Example: veilmart (.+)", COMMANDS[name].help)
    assert examples
    for example in examples:
        assert accept(shlex.split(example.partition(" > ")[0])).command is COMMANDS[name], example


def test_every_command_speaks_json_and_what_lists_can_say_ids_alone():
    options = {name: {word for option in command.params for word in option.opts} for name, command in COMMANDS.items()}
    assert [name for name, words in options.items() if "--json" not in words] == []
    listing = {"find", "browse", "model list", "node ledger", "node log", "campaign list", "market members", "pki show"}
    assert {name for name in listing if not {"-q", "--quiet"} <= options[name]} == set()


def test_no_command_is_help_and_ls_is_list(capsys, tmp_path):
    for words in ([], ["node"], ["market"]):
        done = run(capsys, *words, home=tmp_path)
        assert (done.code, done.err) == (0, ""), words
        assert "Usage: veilmart" in done.out
    assert run(capsys, "model", "ls", home=tmp_path).out == run(capsys, "model", "list", home=tmp_path).out != ""
    assert run(capsys, "node", "ls", home=tmp_path).code == 2, "an alias of what is not there"


def test_the_shell_is_told_what_fits(tmp_path, capsys, monkeypatch):
    def completed(words: str) -> set[str]:
        count = str(len(words.split(" ")) - 1)
        done = run(capsys, home=tmp_path, _VEILMART_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=count)
        return set(done.out.split())

    (tmp_path / "market.toml").write_text('[market]\naddress = "known.example:7443"\n')
    (tmp_path / "config.toml").write_text("no configuration is read here [")
    assert completed("veilmart find --mar") == {"--market"}
    assert completed("veilmart find --market kno") == {"known.example:7443"}
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    assert "_VEILMART_COMPLETE=complete_bash" in run(capsys, "--show-completion", home=tmp_path).out


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_wrong_input_gets_one_clear_error_and_its_exit_code(tmp_path, capsys, authority):
    ca = authority
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
        (2, ["find", good, "--market", "127.0.0.1:9", "--ca", good], "good.jsonl: expected a certificate authority"),
        (2, ["ask", "-m", "x@00000000"], "Missing argument"),
        (2, ["ask", "-m", "x@00000000", "one", SECRET], "needs quotes"),
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
        done = run(capsys, *words, home=tmp_path / "home")
        assert done.code == code, (words, done.told)
        assert expected.lower() in done.told.lower(), (words, done.told)
        assert "Traceback" not in done.told
        assert SECRET not in done.told
        assert done.out == "", "an error is no result"
        assert len(done.err.strip().splitlines()) <= 3, done.err


def test_click_itself_would_repeat_what_was_typed():
    """Control: what it says of an argument too many is the argument."""
    with pytest.raises(click.UsageError, match=SECRET):
        accept(["ask", "-m", "x", "one", SECRET])


def test_errors_are_json_when_json_was_asked_for(tmp_path, capsys):
    for words, code in (
        (["find", "absent.jsonl", "--market", "127.0.0.1:9", "--ca", "x"], "records"), (["find"], "usage"), (["frobnicate"], "usage"),
    ):  # fmt: skip
        done = run(capsys, *words, "--json", home=tmp_path)
        error = json.loads(done.out)["error"]
        assert (done.code, error["code"], done.err) == (2, code, "")
        assert error["message"]
        assert "hint" in error


# Exit codes: each that docs/configuration.md has ------------------------------------------------------------------------------------------


def documented() -> list[int]:
    table = (ROOT / "docs" / "configuration.md").read_text().partition("## Exit codes")[2]
    return [int(code) for code in re.findall(r"^\| \*\*(\d+)\*\* \|", table, re.MULTILINE)]


@pytest.fixture
def tiny(tmp_path, tiny_model_directory) -> list[str]:
    """The options for the tiny model, and for a map of it."""
    from nodes.base_model import BaseModel
    from tests.nodes.owners import tiny_map

    (tmp_path / "tiny.map").write_bytes(tiny_map(BaseModel.open(tiny_model_directory)).manifest)
    return ["--base", str(tiny_model_directory), "--map", str(tmp_path / "tiny.map")]


@contextlib.contextmanager
def stranger(authority: str) -> Iterator[str]:
    """The address of a server with a market's certificate that is no market: it knows none of the calls."""
    key, certificate = (Path(authority).with_name(name).read_bytes() for name in ("server.key", "server.crt"))
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def provoke(code: int, folder: Path, authority: str, address: str, tiny: list[str]) -> list[str]:
    """Return a command line that ends with this code."""
    good = written(folder / "good.jsonl", "".join(f'{{"prompt": "a{n}", "response": "b"}}\n' for n in range(60)))
    return {
        0: ["paths"],
        1: ["catalogue", "checkpoint", "--market", address, "--ca", authority],
        2: ["frobnicate"],
        3: ["ask", "-m", "x@00000000", "hello"],
        4: ["doctor", "--base", str(folder / "no-model")],
        5: ["node", "publish", "--data", good, "--dry-run", "--epsilon", "1.5", "--budget", "1", "--no-train", *tiny],
        6: ["find", good, "--market", "127.0.0.1:9", "--ca", authority],
        7: ["verify", "release", good],
    }[code]


@pytest.mark.parametrize("code", [code for code in documented() if code != 130])
def test_every_documented_exit_code_is_provoked(code, tmp_path, capsys, authority, request):
    tiny = request.getfixturevalue("tiny") if code == 5 else []  # loads a model
    with stranger(authority) if code == 1 else contextlib.nullcontext("") as address:
        done = run(capsys, *provoke(code, tmp_path, authority, address, tiny), home=tmp_path / "home")
    assert done.code == code, done.told
    assert "Traceback" not in done.told


def test_every_code_of_the_design_is_documented():
    assert documented() == [0, 1, 2, 3, 4, 5, 6, 7, 130]


def test_what_is_interrupted_ends_with_130(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    # A shell starts what runs in the background, such as a whole suite, with interrupts ignored.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "nodes.command", "verify", "release", str(tmp_path / "pipe")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        with (tmp_path / "pipe").open("wb"):  # returns once the command has opened the other end, and waits for bytes
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err


# Private text -----------------------------------------------------------------------------------------------------------------------------


def test_no_bad_file_is_repeated(tmp_path, capsys, authority, tiny):
    """A canary in every kind of file that a command reads; the file is wrong in several ways."""
    home = tmp_path / "home"
    texts = {
        "broken": f'{{"text": "{SECRET}"\n',
        "value": f'{{"text": ["{SECRET}"]}}\n',
        "toml": f'[specification]\nlargest_epsilon = "{SECRET}"\n',  # names of keys are told, on purpose
        "latin": f"\xff{SECRET}",
    }
    market = ["--market", "127.0.0.1:9", "--ca", authority]
    for kind, text in texts.items():
        path = tmp_path / kind
        path.write_bytes(text.encode("latin-1"))
        file = str(path)
        for words in (
            ["find", file, *market], ["find", authority, "--market", "127.0.0.1:9", "--ca", file],
            ["node", "publish", "--data", file, "--dry-run", "--no-train", *tiny], ["node", "train", "--data", file, "--dry-run", *tiny],
            ["node", "policy", file], ["node", "restore", file], ["node", "join", "127.0.0.1:9", "--invite", f"file:{file}"],
            ["verify", "release", file], ["verify", "bundle", file], ["verify", "conflict", file],
            ["verify", "answer", file, "--releases", file], ["audit", "release", file],
            ["audit", "report", "-o", file + ".d", "--releases", "0", "--with", file],
            ["map", "show", file], ["model", "import", "--gguf", file], ["catalogue", "trust", SECRET[:3]],
            ["pki", "issue", "--csr", file, "-o", file + ".crt"], ["market", "restore", file], ["compare", "--validation", file],
        ):  # fmt: skip
            path.chmod(0o600)
            done = run(capsys, *words, home=home)
            assert done.code not in (0, 1), (words, done.told)
            assert SECRET not in done.told, (kind, words)
            assert "Traceback" not in done.told


def test_an_error_that_was_not_written_for_people_is_not_repeated():
    with pytest.raises(ValueError, match=SECRET) as caught:
        int(SECRET)
    told = _told(caught.value)
    assert SECRET not in f"{told} {told.hint}"
    assert re.fullmatch(r"unexpected ValueError at test_command\.py:\d+", str(told))


def test_a_failed_import_leaves_nothing_half_written(tmp_path, capsys):
    home = tmp_path / "home"
    assert run(capsys, "model", "import", "--gguf", written(tmp_path / "x.gguf", "GGUF nonsense"), home=home).code == 2
    assert [path for path in home.rglob("*") if path.is_file() and path.stat().st_size] == []


def test_the_shipped_map_is_shown(tmp_path, capsys):
    shown = json.loads(run(capsys, "map", "show", "--json", home=tmp_path).out)
    assert shown["schema"] == "veilmart.map/1"
    assert shown["dimension"] == 96


def test_a_traceback_appears_only_on_request(tmp_path):
    for words in (("--debug", "map", "show", "none.map"), ("map", "show", "none.map", "--debug")):
        assert "Traceback" in veilmart(*words, home=tmp_path).stderr


@pytest.mark.parametrize(("text", "unit"), [("record", ""), ("person", "person"), ("field:person", "person")])
def test_a_unit_is_taken_as_it_is_printed(tmp_path, text, unit):
    assert unit_in(text, tmp_path) == PrivacyUnit(unit)


@pytest.mark.parametrize("text", ["field:", "field:field:person", "recor d"])
def test_what_is_no_unit_is_refused(tmp_path, text):
    with pytest.raises(UsageError, match="unit"):
        unit_in(text, tmp_path)


def test_a_card_that_is_no_utf8_is_the_callers_mistake(tmp_path, capsys):
    for field in ("summary", "licence"):
        with pytest.raises(UsageError, match="UTF-8"):
            Card("notes", **{field: os.fsdecode(b"caf\xe9")})
    command = ("node", "publish", "--data", written(tmp_path / "a.jsonl", '{"text": "a"}'), "--dry-run", "--no-train")
    done = run(capsys, *command, "--summary", os.fsdecode(b"caf\xe9"), home=tmp_path)
    assert (done.code, "UTF-8" in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("file", "name"), [("My Notes 2026.jsonl", "my-notes-2026"), ("données.txt", "donn-es"), ("...", "learnware"), ("x" * 90, "x" * 63)]
)
def test_a_learnware_without_a_name_is_called_after_its_file(file, name):
    assert Card(name_from(Path(file))).name == name


def test_a_log_that_cannot_be_written_writes_nothing_else():
    """`tests/market_node/test_events.py` has what it would write, and the control."""
    program = "import logging, sys; sys.argv[1:] = ['--version']\nfrom nodes.command import main\n"
    program += "try: main()\nfinally: print(logging.raiseExceptions)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
