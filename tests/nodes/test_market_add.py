"""A market is remembered once it has answered under its authority, and later commands need no address."""

import datetime
import json

import pytest

from market_node.identity import market_identity
from nodes.known_market import market_of
from tests.command_line import run
from tests.market_node.local import QuietService
from tests.market_node.market import running_market
from tests.protocol.worlds import small_map


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    with running_market(tmp_path_factory.mktemp("market"), small_map(), service_type=QuietService) as (address, ca, _):
        yield address, ca


@pytest.fixture
def other(tmp_path):
    """The authority of another market."""
    return market_identity(tmp_path / "other", (), datetime.datetime.now(datetime.UTC)).ca_file


def test_later_commands_need_no_address(market, tmp_path, capsys):
    address, ca = market
    home = tmp_path / "home"
    done = run(capsys, "catalogue", "checkpoint", home=home)
    assert (done.code, "--market" in done.err) == (2, True), "control"
    added = json.loads(run(capsys, "market", "add", address, "--ca", str(ca), "--json", home=home).out)
    assert (added["schema"], added["market"], added["releases"]) == ("veilmart.market-add/1", address, 0)
    assert json.loads(run(capsys, "catalogue", "checkpoint", "--json", home=home).out)["size"] == 0
    again = run(capsys, "market", "add", address, "--ca", str(ca), "--market-key", added["market_key"][:16], home=home)
    assert (again.code, again.err) == (0, "next: veilmart find FILE\n")


def test_what_is_not_the_market_is_not_remembered(market, other, tmp_path, capsys):
    address, ca = market
    home, text = tmp_path / "home", tmp_path / "text"
    text.write_text("no certificate")
    for words, code, said in (
        (["--ca", str(text)], 2, "expected a certificate authority"),
        (["--ca", str(other)], 7, "not of the given authority"),
        (["--ca", str(ca), "--market-key", "00" * 8], 7, "key"),
        (["--ca", str(ca), "--market-key", "00"], 2, "16 hexadecimal digits"),
    ):
        done = run(capsys, "market", "add", address, *words, home=home)
        assert done.code == code, done.err
        assert said in done.err
        assert market_of(home) is None
    assert len(done.err.splitlines()) <= 2, "gRPC says nothing beside us"


def test_one_home_is_of_one_market(market, other, tmp_path, capsys):
    address, ca = market
    assert run(capsys, "market", "add", address, "--ca", str(ca), home=tmp_path).code == 0
    authority = market_of(tmp_path).authority
    authority.write_bytes(other.read_bytes())
    done = run(capsys, "market", "add", address, "--ca", str(ca), home=tmp_path)
    assert (done.code, "another market" in done.err) == (2, True)
    assert authority.read_bytes() == other.read_bytes()
