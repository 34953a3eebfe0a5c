"""A release holds from one day to another: one that is over, or from the future, is neither taken, ranked, pulled nor used."""

import hashlib
import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import service as services
from nodes.learnwares import local_learnware, pull_learnware
from nodes.market_client import MarketClient, find_release_id
from nodes.query import find_encrypted, find_in_mirror
from protocol import verify
from protocol.catalogue import Terms, scalars_of
from protocol.errors import FormatError, NotFound, OutsideWindow
from protocol.release import AdapterReference, open_envelope, sign_release
from protocol.scoring import sketch_of
from protocol.window import END_OF_DAYS, Window, day_of
from tests.command_line import run
from tests.market_node.market import running_market
from tests.protocol.worlds import DIMENSION, adapter_bytes, envelope_of, features, release_of, small_map

MAP = small_map()
KEY = Ed25519PrivateKey.generate()
DATA = adapter_bytes()
ADAPTER = AdapterReference(hashlib.sha256(DATA).digest(), len(DATA))
DAY = 86_400
TODAY = day_of(time.time())


def envelope(window: Window, seed: int = 0, key=KEY) -> bytes:
    return envelope_of(MAP, key, seed=seed, window=window, adapter=ADAPTER)


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        yield client, store


def set_clock(monkeypatch, days: int) -> None:
    """Set the querier's clock, and nobody else's."""
    monkeypatch.setattr(MarketClient, "today", staticmethod(lambda: TODAY + days))


@pytest.mark.parametrize(
    ("day", "holds"), [(98, False), (99, True), (100, True), (110, True), (111, False)], ids=["too early", "skew", "first", "last", "over"]
)
def test_both_ends_belong_to_a_window_and_a_clock_may_be_a_day_behind(day, holds):
    window = Window.beginning(100, 11)
    assert window == Window(100, 110)
    assert window.holds(day) == holds
    if holds:
        window.require(day, "notes")
    else:
        with pytest.raises(OutsideWindow, match="notes"):
            window.require(day, "notes")


def test_a_window_is_told_in_dates_and_never_beyond_its_end():
    assert str(Window(0, END_OF_DAYS)) == "1970-01-01 to 2149-06-06"
    assert Window.beginning(END_OF_DAYS - 3, 365).last == END_OF_DAYS
    assert day_of(20_783 * DAY + DAY - 1) == 20_783
    for first, last in ((2, 1), (-1, 1), (0, END_OF_DAYS + 1)):
        with pytest.raises(FormatError):
            Window(first, last)


def test_a_window_needs_renewal_in_its_last_third_before_it_begins_and_after_it_is_over():
    window = Window(100, 190)
    assert [window.needs_renewal(day) for day in (98, 99, 100, 160, 161, 190, 191)] == [True, False, False, False, True, True, True]


@pytest.mark.parametrize(
    "window", [Window(TODAY - 40, TODAY - 2), Window(TODAY + 3, TODAY + 90), Window(0, 0)], ids=["over", "from the future", "1970"]
)
def test_a_market_takes_no_release_that_does_not_hold(market, monkeypatch, window):
    client, store = market
    with pytest.raises(OutsideWindow):
        client.publish(envelope(window))
    assert store.head().size == 0
    monkeypatch.setattr(services, "day_of", lambda seconds: window.first)  # control: a market whose clock stands elsewhere takes it
    assert client.publish(envelope(window)).index == 0


def test_who_lost_the_receipt_of_what_is_over_gets_it_again(market, monkeypatch):
    client, _ = market
    sent = envelope(Window(TODAY, TODAY + 5))
    client.publish(sent)
    monkeypatch.setattr(services, "day_of", lambda seconds: TODAY + 6)
    assert client.publish(sent).index == 0
    with pytest.raises(OutsideWindow):
        client.publish(envelope(Window(TODAY, TODAY + 5), 1, Ed25519PrivateKey.generate()))


def test_what_is_over_by_the_queriers_own_clock_is_neither_ranked_nor_pulled_nor_used(market, tmp_path, monkeypatch):
    """The market's clock is right, or it lies: it is not asked."""
    client, _ = market
    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    short, long = (release_of(MAP, key, seed=seed, adapter=ADAPTER, window=Window(TODAY, TODAY + days))
                   for key, seed, days in zip(keys, (0, 1), (5, 50), strict=True))  # fmt: skip
    for key, release in zip(keys, (short, long), strict=True):
        client.publish(sign_release(release, key))
    client.upload_adapter(ADAPTER, DATA)
    sketch, home = sketch_of(features(40, 0, DIMENSION), MAP, 2), tmp_path / "pulled"

    def ranked() -> list[set[bytes]]:
        found = [find(sketch, client, MAP) for find in (find_encrypted, find_in_mirror)]
        return [{match.release_id for match in one.ranking.matches} for one in found]

    for days in (0, 5):  # control: while it holds
        set_clock(monkeypatch, days)
        assert ranked() == [{short.release_id, long.release_id}] * 2
    assert pull_learnware("owner-0", client, home, MAP).load_adapter("ab" * 32)

    set_clock(monkeypatch, 6)
    assert ranked() == [{long.release_id}] * 2
    assert client.mirror(MAP).refused == ()  # the market did nothing wrong
    for name in ("owner-0", short.title):
        with pytest.raises(OutsideWindow, match="held until"):
            pull_learnware(name, client, home, MAP)
    with pytest.raises(OutsideWindow):
        local_learnware("owner-0", home).load_adapter("ab" * 32)
    catalogue = client.sync(MAP)
    assert find_release_id("owner-0", catalogue, holding_alone=False) == short.release_id  # to withdraw it, or audit it
    assert client.receipt(short.release_id, 0).index == 0
    with pytest.raises(NotFound):
        find_release_id("nobody", catalogue)

    set_clock(monkeypatch, -3)
    assert ranked() == [set()] * 2
    with pytest.raises(OutsideWindow, match="holds from"):
        pull_learnware("owner-0", client, home, MAP)


def test_a_market_that_lengthens_a_window_in_its_catalogue_is_noticed(market, tmp_path, monkeypatch):
    client, store = market
    release = open_envelope(sent := envelope_of(MAP, KEY, window=Window(TODAY - 9, TODAY - 2)))
    longer = release_of(MAP, KEY, window=Window(TODAY - 9, TODAY + 90))
    honest = Terms.of
    monkeypatch.setattr(Terms, "of", classmethod(lambda cls, shown: honest(longer)))
    store.append(release, sent, scalars_of(release, MAP))
    monkeypatch.setattr(Terms, "of", honest)
    with pytest.raises(FormatError, match="not its own"):
        pull_learnware("owner-0", client, tmp_path / "pulled", MAP)
    with pytest.raises(FormatError):
        client.mirror(MAP)


def test_verify_says_whether_a_release_holds_and_refuses_only_where_asked(market, tmp_path, capsys, monkeypatch):
    client, _ = market
    (file := tmp_path / "notes.receipt").write_bytes(client.publish(envelope(Window(TODAY, TODAY + 5))).to_bytes())
    for days, holds, code in ((0, True, 0), (6, False, 7)):
        monkeypatch.setattr(verify, "day_of", lambda seconds, days=days: TODAY + days)
        shown = json.loads(run(capsys, "verify", "release", str(file), "--json", home=tmp_path).out)
        assert (shown["holds"], shown["valid_until"]) == (holds, str(Window(0, TODAY + 5))[-10:])
        assert verify.main([str(file)]) == 0
        assert verify.main([str(file), "--holding"]) == code
        assert ("NOT today" in capsys.readouterr().out) == (not holds)
        assert run(capsys, "verify", "release", str(file), "--holding", home=tmp_path).code == code
