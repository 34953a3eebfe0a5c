"""Where an option's default comes from, in which order, and what is refused: nothing here runs a command that computes."""

import json

import pytest

from nodes.configuration import NEVER, PROJECT_FILE, files, options_of, user_file
from nodes.known_market import remember
from protocol.errors import UsageError
from tests.command_line import COMMANDS, accept, run

FIND = ["find", "task.jsonl", "--market", "a:1", "--ca", "ca.crt"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home and a current folder of their own, and an environment that says nothing else."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("VEILMART_HOME", str(tmp_path / "home"))
    for name in ("VEILMART_MARKET", "VEILMART_CA", "VEILMART_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_the_higher_source_wins(home, monkeypatch, tmp_path):
    """Flag, environment, --config or ./veilmart.toml, config.toml, default: each one alone beats all that follow."""
    other = tmp_path / "other.toml"
    seen = [accept(FIND).params["top"]]
    user_file().write_text("[find]\ntop = 2\n")
    seen.append(accept(FIND).params["top"])
    (tmp_path / "here" / PROJECT_FILE).write_text("[find]\ntop = 3\n")
    seen.append(accept(FIND).params["top"])
    other.write_text("[find]\ntop = 4\n")
    seen.append(accept([*FIND, "--config", str(other)]).params["top"])
    assert accept(["--config", str(other), *FIND]).params["top"] == 4, "before the command as after it"
    monkeypatch.setenv("VEILMART_FIND_TOP", "6")
    seen.append(accept([*FIND, "--config", str(other)]).params["top"])
    seen.append(accept([*FIND, "-k", "7"]).params["top"])
    assert seen == [5, 2, 3, 4, 6, 7]


def test_a_table_nearer_to_the_command_wins(home):
    user_file().write_text('[all]\npopulation = "a"\n[node]\npopulation = "b"\n[node.ledger]\npopulation = "c"\n')
    wanted = {("node", "ledger"): "c", ("node", "log"): "b", ("doctor",): "a"}
    assert {words: accept(list(words)).params["population"] for words in wanted} == wanted


def test_every_option_can_be_set_but_secrets_and_what_must_be_said_each_time():
    settable = {key for command in COMMANDS.values() for key in options_of(command)}
    assert not settable & NEVER
    assert {"invite", "json", "allow-network"} <= NEVER
    assert {"market", "ca", "map", "top", "epsilon", "largest-epsilon", "home", "no-progress"} <= settable


WRONG = {
    "a key that no command has": ("[find]\ntopp = 3\n", "find.topp", "did you mean top?"),
    "a key of another command": ("[find]\npolicy = 'x'\n", "find.policy", ""),
    "a command that is none": ("[fnd]\ntop = 3\n", "[fnd]", "did you mean find?"),
    "a command of another group": ("[node.find]\ntop = 3\n", "[node.find]", ""),
    "a key outside of a table": ("top = 3\n", "top", "[all]"),
    "a word for a number": ('[find]\ntop = "three"\n', "find.top", ""),
    "a number out of range": ("[find]\ntop = 0\n", "find.top", ""),
    "a number for a switch": ("[find]\nmirror = 1\n", "find.mirror", ""),
    "a switch for a number": ("[find]\ntop = true\n", "find.top", ""),
    "one value for several": ('[ask]\nlearnware = "a"\n', "ask.learnware", ""),
    "several values for one": ("[find]\ntop = [3]\n", "find.top", ""),
    "a secret": ('[node.join]\ninvite = "file:x"\n', "node.join.invite", ""),
    "the form of the output": ("[all]\njson = true\n", "all.json", ""),
    "leave to use the network": ('[model.import]\nallow-network = true\n', "model.import.allow-network", ""),
    "no TOML": ("[find\n", "TOML", ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "key", "hint"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named_by_file_and_key(home, capsys, text, key, hint):
    user_file().write_text(text)
    done = run(capsys, "paths")
    assert done.code == 2
    assert str(user_file()) in done.err
    assert key in done.err
    assert hint in done.err


def test_a_good_file_of_the_same_kind_is_taken(home, capsys):
    """Control."""
    user_file().write_text('[find]\ntop = 3\nmirror = true\n[ask]\nlearnware = ["a"]\n[all]\nca = "x"\n')
    assert run(capsys, "paths").code == 0


def test_help_is_there_whatever_the_file_says(home, capsys):
    user_file().write_text("[find\n")
    assert run(capsys, "find", "--help").code == 0
    assert run(capsys, "find", "x").code == 2


def test_a_path_is_relative_to_the_file_that_names_it(home, tmp_path):
    user_file().write_text('[all]\nca = "market/ca.crt"\nmarket = "a:1"\nbase = "~/models/x"\n')
    params = accept(["find", "task.jsonl"]).params
    assert str(params["ca"]) == str(home / "market" / "ca.crt")
    assert not str(params["base"]).startswith(str(home))


def test_a_file_of_somebody_else_in_the_current_folder_is_refused(home, tmp_path):
    here = tmp_path / "here" / PROJECT_FILE
    here.write_text("[find]\ntop = 3\n")
    here.chmod(0o644)
    assert accept(FIND).params["top"] == 3, "control"
    here.chmod(0o646)
    with pytest.raises(UsageError, match="others may not write"):
        accept(FIND)
    assert accept([*FIND, "--config", str(here)]).params["top"] == 3, "whoever names it has read it"


def test_a_named_file_must_be_there(home, tmp_path):
    with pytest.raises(UsageError, match=r"none\.toml"):
        accept([*FIND, "--config", str(tmp_path / "none.toml")])


def test_a_named_market_is_never_mixed_with_the_one_of_the_home(home, monkeypatch):
    remember(home, "known:1", bytes(32))

    def market_of(*words: str) -> tuple[str | None, str]:
        params = accept(["audit", "export", "-o", "x", *words]).params
        return params["market"], str(params["ca"])

    known = ("known:1", str(home / "market-ca.crt"))
    assert market_of() == known
    assert market_of("--market", "other:2") == ("other:2", "None")
    assert market_of("--ca", "x") == (None, "x")
    monkeypatch.setenv("VEILMART_CA", "x")
    assert market_of() == (None, "x")
    monkeypatch.delenv("VEILMART_CA")
    user_file().write_text('[all]\nmarket = "file:3"\n')
    assert market_of() == ("file:3", "None")
    user_file().unlink()
    assert market_of("--home", str(home / "elsewhere")) == (None, "None")
    assert market_of("--home", str(home)) == known
    (home / "market.toml").write_text("not toml [")
    assert market_of() == (None, "None"), "a damaged file is as none: the command asks"


def test_show_says_where_each_value_comes_from(home, capsys, tmp_path):
    user_file().write_text('[all]\nmarket = "m:1"\n[find]\ntop = 3\n')
    done = run(capsys, "config", "show", "find", "--origin", "--json", VEILMART_FIND_PLACES_PER_ORG="0", VEILMART_FIND_INVITE="x")
    shown = json.loads(done.out)
    assert (shown["schema"], shown["command"], shown["files"]) == ("veilmart.config/1", "find", [str(user_file())])
    rows = {row["key"]: (row["value"], row["origin"]) for row in shown["settings"]}
    assert rows["top"] == (3, str(user_file()))
    assert rows["market"] == ("m:1", str(user_file()))
    assert rows["places-per-org"] == ("0", "VEILMART_FIND_PLACES_PER_ORG")
    assert rows["auto"] == (False, "default")
    done = run(capsys, "config", "show", "--origin")
    assert ["find.top", "3", str(user_file())] in [line.split("\t") for line in done.out.splitlines()]
    assert run(capsys, "config", "show", "fnd").code == 2


def test_path_names_the_file_that_is_read(home, capsys):
    assert run(capsys, "config", "path").out.strip() == str(user_file()) == str(home / "config.toml")
    assert files() == ()
    user_file().write_text("")
    assert files() == (user_file(),)
