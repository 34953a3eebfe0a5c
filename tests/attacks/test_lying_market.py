"""T10, T11 and T13: a market that answers what it did not sign, and one that stands still; each beside a client that looks away."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from market_node.witness import WitnessOf
from nodes import market_client
from nodes.market_client import MarketClient
from nodes.query import find_encrypted, find_in_mirror
from protocol.encryption import EncryptedScores
from protocol.errors import InvalidProof, InvalidSignature
from tests.market_node.market import running_market
from tests.market_node.test_witness import new_envelope
from tests.nodes.test_answers import MAP, SKETCH, lying, publish

DAY = 24 * 3600


def turns_scores_round(matcher, version, queries, answers):
    """Negate every score, as a market can without reading one; all of them stay possible."""
    turned = []
    for answer in answers:
        plan = version.index.plan
        words = EncryptedScores.from_bytes(answer.data, plan).coefficients().astype(object)
        negated = ((plan.parameters.data_prime - words) % plan.parameters.data_prime).astype(np.uint64)
        drops = np.array(plan.parameters.drops, np.uint64)[None, :, None]
        rounded = (negated + (np.uint64(1) << (drops - np.uint64(1)))) >> drops  # to nearest: else the error would show in empty slots
        turned.append(replace(answer, data=EncryptedScores.pack(plan, rounded).to_bytes()))
    return turned


def test_a_ranking_that_was_turned_round_passes_where_nobody_verifies(tmp_path, monkeypatch):
    """Every score stays plausible: the market's signature under its own answer is what shows it."""
    market = running_market(tmp_path / "m", MAP, service_type=lying(turns_scores_round))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client)
        with pytest.raises(InvalidSignature):
            find_encrypted(SKETCH, client, MAP)
        monkeypatch.setattr(market_client, "verify_statement", lambda *_: None)  # the control
        believed, true = (find(SKETCH, client, MAP).scores.llr for find in (find_encrypted, find_in_mirror))
        assert (np.abs(believed - true) > 1).all()


def set_clock(monkeypatch, ahead_s: float) -> None:
    """Set the clock by which the client judges; that of the connection stays, as it would on another machine."""
    monkeypatch.setattr(market_client, "time", SimpleNamespace(time=lambda: time.time() + ahead_s))


@pytest.fixture
def witnessed(tmp_path):
    """A market whose witness signed a moment ago, and the home of a client that trusts this witness."""
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        witness = WitnessOf(address, ca, tmp_path / "witness", "witness.example").witness
    home = tmp_path / "home"
    home.mkdir()
    (home / "witnesses").write_text(f"{witness}\n")
    with running_market(tmp_path / "m", MAP, witnesses=(witness,)) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
        WitnessOf(address, ca, tmp_path / "witness", "witness.example").observe()
        yield address, ca, home


def test_a_market_that_stands_still_for_a_day_is_refused_where_a_witness_is_trusted(witnessed, monkeypatch):
    """Freeze: what it shows was signed, and is consistent with all that is known; it is only old."""
    address, ca, home = witnessed
    with MarketClient(address, ca, home) as client:
        assert client.describe().head.size == 1
        set_clock(monkeypatch, DAY + 600)
        with pytest.raises(InvalidProof):
            client.describe()
        (home / "witnesses").unlink()  # the control: without one nothing tells how old a log is
        assert client.describe().head.size == 1


def test_a_clock_ten_years_off_believes_no_witness_and_forgets_nothing(witnessed, monkeypatch):
    address, ca, home = witnessed
    with MarketClient(address, ca, home) as client:
        client.describe()
        known = client.checkpoint_note()
        for years in (-10, 10):
            set_clock(monkeypatch, years * 365 * DAY)
            with pytest.raises(InvalidProof):
                client.describe()
            assert client.checkpoint_note() == known
        set_clock(monkeypatch, 0)
        assert client.describe().head.size == 1
