"""T16: a market guesses which of the learnwares that were fetched together was wanted."""

import hashlib
import json
import secrets
from contextlib import contextmanager, nullcontext, suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes import learnwares
from nodes.command import build
from nodes.learnwares import fetch_order, local_learnware, pull_learnware
from nodes.market_client import MarketClient
from protocol.errors import InvalidAdapter, UsageError
from protocol.release import AdapterReference, open_envelope
from tests.market_node.market import TakesAnything, running_market
from tests.nodes.test_adapter import adapter
from tests.protocol.worlds import envelope_of, small_map

MAP, OFFERED, COVER, RUNS = small_map(), 24, 7, 10_000
CHOOSE = secrets.SystemRandom()


@contextmanager
def offering(folder, spoil=lambda data: data):
    """A market with learnwares of one kind, and one without an adapter; it looks into none."""
    with (
        running_market(folder / "m", MAP, service_type=TakesAnything) as (address, ca, _),
        MarketClient(address, ca, folder / "home") as client,
    ):
        for seed in range(OFFERED):
            data = spoil(adapter(alpha=seed + 1).to_bytes())
            reference = AdapterReference(hashlib.sha256(data).digest(), len(data))
            client.upload_adapter(reference, data)
            client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed, adapter=reference))
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=OFFERED))
        yield client


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory):
    with offering(tmp_path_factory.mktemp("market")) as client:
        return client.sync(MAP)


def share_guessed(order_of, catalogue) -> float:
    """Return how often the market's best rule is right: it learns on one half which rule that is, and guesses on the other."""
    seen = [(wanted := CHOOSE.randrange(OFFERED), order_of(wanted, catalogue, COVER)) for _ in range(RUNS)]
    counts = [sum(at in order for _, order in seen) for at in range(OFFERED + 1)]
    rules = [lambda order, place=place: order[place] for place in range(COVER + 1)]
    rules += [lambda order, place=place: sorted(order)[place] for place in range(COVER + 1)]
    rules += [lambda order: min(order, key=counts.__getitem__), lambda order: max(order, key=counts.__getitem__)]

    def right(rule, runs) -> float:
        return sum(rule(order) == wanted for wanted, order in runs) / len(runs)

    best = max(rules, key=lambda rule: right(rule, seen[: RUNS // 2]))
    return right(best, seen[RUNS // 2 :])


def test_no_rule_guesses_better_than_chance(catalogue):
    assert share_guessed(fetch_order, catalogue) <= 1 / (COVER + 1) + 0.02  # more than four standard deviations


def wanted_first(wanted, catalogue, cover):
    return sorted(fetch_order(wanted, catalogue, cover), key=lambda at: at != wanted)


def neighbours(wanted, catalogue, cover):
    around = range(wanted - cover // 2, wanted + cover - cover // 2 + 1)
    return CHOOSE.sample([at % OFFERED for at in around], cover + 1)


def the_same_others(wanted, catalogue, cover):
    return CHOOSE.sample([wanted, *[at for at in range(OFFERED) if at != wanted][:cover]], cover + 1)


@pytest.mark.parametrize("broken", [wanted_first, neighbours, the_same_others])
def test_a_cover_that_gives_the_wanted_one_away_is_caught(catalogue, broken):
    assert share_guessed(broken, catalogue) > 0.4


def test_others_are_of_the_kind_that_could_be_wanted(catalogue):
    for _ in range(50):
        order = fetch_order(3, catalogue, COVER)
        assert 3 in order
        assert OFFERED not in order, "a release without an adapter could not have been wanted in its place"
        assert len(set(order)) == COVER + 1
    with pytest.raises(UsageError, match="expected at most 23"):
        fetch_order(3, catalogue, OFFERED)


def watched(client, monkeypatch) -> list[bytes]:
    """Record what the market is asked for."""
    asked: list[bytes] = []
    for name in ("release", "download_adapter"):
        call = getattr(client, name)

        def recorded(what, *more, call=call):
            asked.append(what if isinstance(what, bytes) else what.digest)
            return call(what, *more)

        monkeypatch.setattr(client, name, recorded)
    return asked


def test_all_are_fetched_alike_and_one_is_kept(tmp_path, monkeypatch):
    with offering(tmp_path) as client:
        asked = watched(client, monkeypatch)
        pulled = pull_learnware("owner-5", client, tmp_path / "home", MAP, cover=COVER)
    assert len(set(asked)) == 2 * (COVER + 1)
    assert pulled.release.release_id in asked
    assert [path.name for path in (tmp_path / "home" / "learnwares").iterdir()] == [pulled.release.release_id.hex()]


def test_the_command_says_what_is_hidden_and_what_is_not(tmp_path, capsys):
    (tmp_path / "small.map").write_bytes(MAP.manifest)
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        for seed in range(3):
            client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))
        words = [
            "pull",
            "owner-1",
            "--market",
            address,
            "--ca",
            str(ca),
            "--map",
            str(tmp_path / "small.map"),
            "--home",
            str(tmp_path / "h"),
        ]
        build(None)([*words, "--cover", "2"], standalone_mode=False)
        assert "among 3 in random order" in capsys.readouterr().out
        build(None)(words, standalone_mode=False)
        assert "the market saw which one" in capsys.readouterr().out
        build(None)([*words, "--cover", "2", "--json"], standalone_mode=False)
        assert json.loads(capsys.readouterr().out)["cover"] == 2
        with pytest.raises(UsageError, match="expected at most 2"):
            build(None)([*words, "--cover", "3"], standalone_mode=False)


def spoiled(reference, *_):
    raise InvalidAdapter("not the bytes that were asked for")


def test_what_is_wrong_with_the_wanted_one_is_said_after_all_were_fetched(tmp_path, monkeypatch):
    """A market would only have to spoil adapters and to see where a client stops."""
    with offering(tmp_path, spoil=lambda data: data[:-1]) as client:  # no adapter, under the right digest
        asked = watched(client, monkeypatch)
        with pytest.raises(InvalidAdapter):
            pull_learnware("owner-5", client, tmp_path / "home", MAP, cover=COVER)
        assert len(set(asked)) == 2 * (COVER + 1)
        asked.clear()
        monkeypatch.setattr(client, "download_adapter", spoiled)
        with pytest.raises(InvalidAdapter):
            pull_learnware("owner-5", client, tmp_path / "home", MAP, cover=COVER)
        assert len(set(asked)) == COVER + 1
        # The control: a client that stops at what is wrong with the wanted one shows it last.
        monkeypatch.setattr(learnwares, "_fetched_among", stops_at_the_first_error)
        asked.clear()
        with pytest.raises(InvalidAdapter):
            pull_learnware("owner-5", client, tmp_path / "home", MAP, cover=COVER)
        assert open_envelope(client.release(asked[-1])).card.name == "owner-5"
    assert local_learnware("owner-5", tmp_path / "home") is None


def stops_at_the_first_error(order, wanted, catalogue, client, on_progress):
    for at in order:
        envelope = client.release(catalogue.release_ids[at])
        with nullcontext() if at == wanted else suppress(InvalidAdapter):
            client.download_adapter(open_envelope(envelope).adapter)
    raise AssertionError("nothing was wrong")
