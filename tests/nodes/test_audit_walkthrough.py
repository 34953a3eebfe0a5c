"""The walk-through of docs/audit.md is run: every command, in its order, gives the output that is shown, up to numbers and identities."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.command import build
from nodes.market_client import MarketClient
from protocol.features import default_map
from protocol.release import Card, sign_release
from tests.market_node.market import running_market
from tests.protocol.worlds import release_of

PAGE = Path(__file__).parent.parent.parent / "docs" / "audit.md"


def steps(text: str) -> list[tuple[list[str], list[str]]]:
    """Return the commands of the walk-through, as words, each with the lines that are shown below it."""
    section = text.split("## A walk-through")[1].split("\n## ")[0]
    found: list[tuple[list[str], list[str]]] = []
    for line in re.findall(r"^    (.*)$", section, re.MULTILINE):
        if line.startswith("$ veilmart "):
            found.append((shlex.split(line.removeprefix("$ veilmart ")), []))
        else:
            found[-1][1].append(line)
    return found


def shape(line: str) -> str:
    """Return a line with identities and numbers left out, and blanks as one."""
    line = re.sub(r"\b[0-9a-f]{8,}\b", "<id>", line)
    return re.sub(r"\s+", " ", re.sub(r"(?<![\w-])\d[\d.]*(e-\d+)?", "<n>", line)).strip()


def missing(shown: list[str], printed: str) -> list[str]:
    real = {shape(line) for line in printed.splitlines()}
    return [line for line in shown if shape(line) not in real]


@pytest.mark.slow
def test_the_walk_through_gives_the_output_that_is_shown(tmp_path, monkeypatch, capsys):
    feature_map = default_map()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VEILMART_HOME", str(tmp_path / "auditor"))
    with running_market(tmp_path / "m", feature_map) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            for seed, name in enumerate(("recipes", "laws", "notes")):
                key = Ed25519PrivateKey.generate()
                client.publish(sign_release(replace(release_of(feature_map, key, seed=seed), card=Card(name)), key))
        (tmp_path / "ca.crt").write_bytes(ca.read_bytes())
        walked = steps(PAGE.read_text())
        for words, shown in walked:
            words = [address if word == "127.0.0.1:7443" else word for word in words]
            assert not build(None)(words, standalone_mode=False), words
            printed = capsys.readouterr().out
            assert missing(shown, printed) == [], f"veilmart {shlex.join(words)} printed:\n{printed}"
    assert len(walked) >= 9
    assert sum(len(shown) for _, shown in walked) >= 25


def test_output_that_a_command_does_not_print_would_be_noticed():
    printed = "yes log                index 2 of 3 in the log of market 91b2c6d07e4f5a38\n"
    assert missing(["yes log   index 0 of 7 in the log of market 0123456789abcdef"], printed) == []
    assert missing(["NO  log   index 0 of 7 in the log of market 0123456789abcdef"], printed)
    assert missing(["yes log   index 0 of 7 in the log of the market 0123456789abcdef"], printed)
