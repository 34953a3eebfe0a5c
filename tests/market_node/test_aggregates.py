"""A market's aggregates: they follow its log, what was taken back leaves them, and making them is bounded."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from market_node import aggregates
from market_node.aggregates import LEAST_PAUSE_S, PAUSE_FACTOR, Aggregates, Running
from nodes.market_client import MarketClient
from protocol.aggregation import State, aggregates_of, parse_aggregates
from protocol.notices import Kind, Notice, sign_notice, taken_back
from protocol.release import Card, sign_release
from tests.market_node.market import running_market
from tests.protocol.worlds import release_of, small_map

MAP = small_map()
MARKET = Ed25519PrivateKey.generate()
PUBLIC = MARKET.public_key().public_bytes_raw()
OWNER = Ed25519PrivateKey.generate()
NAMES = ("finance-a", "finance-b", "health-x", "law", "math_1")
STATE = State(MAP.map_id, 0, bytes(32), 0, bytes(32))


def named(number: int, owner: Ed25519PrivateKey = OWNER):
    release = release_of(MAP, owner, number=number, seed=number % 7, count=60 + 50 * (number % 9))
    return replace(release, card=Card(NAMES[number % len(NAMES)]))


RELEASES = [named(number) for number in range(1, 25)]
ENVELOPES = [sign_release(release, OWNER) for release in RELEASES]


def withdrawal(release) -> Notice:
    return Notice(Kind.WITHDRAWAL, PUBLIC, OWNER.public_key().public_bytes_raw(), (release.release_id,))


class InMemory:
    """Of a store what aggregates read."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self.reads = 0

    def envelopes(self, start: int, stop: int) -> list[bytes]:
        self.reads += stop - start
        return self.kept[start:stop]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(["publish", "publish", "withdraw", "look"]), st.integers(0, 23)), max_size=60))
def test_what_is_kept_up_is_bit_for_bit_what_is_made_from_scratch(steps):
    """Any order of publishing, withdrawing (also twice, and before somebody looks) and looking."""
    store, notices = InMemory(), []
    running = Running(store, MAP, PUBLIC)
    for what, which in [*steps, ("look", 0)]:
        size = len(store.kept)
        if what == "publish" and size < len(ENVELOPES):
            store.kept.append(ENVELOPES[size])
        elif what == "withdraw" and which < size:
            notices.append(withdrawal(RELEASES[which]))
        elif what == "look":
            running.follow(size, [sign_notice(notice, OWNER) for notice in notices])
            scratch = aggregates_of(RELEASES[:size], taken_back(notices), MAP, STATE)
            assert running.made(STATE).body == scratch.body
    assert store.reads == len(store.kept), "every release is read once"


def test_control_a_market_that_forgets_to_take_a_release_out_is_caught(monkeypatch):
    monkeypatch.setattr(Running, "_take_back", lambda self, release_id: None)
    with pytest.raises(AssertionError):
        test_what_is_kept_up_is_bit_for_bit_what_is_made_from_scratch()


def test_a_notice_that_is_read_before_its_release_counts():
    store, notice = InMemory(), sign_notice(withdrawal(RELEASES[1]), OWNER)
    running = Running(store, MAP, PUBLIC)
    store.kept = ENVELOPES[:1]
    running.follow(1, [notice])
    store.kept = ENVELOPES[:3]
    running.follow(3, [notice])
    assert running.made(STATE).body == aggregates_of(RELEASES[:3], {RELEASES[1].release_id}, MAP, STATE).body


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_they_are_made_again_for_news_alone_and_seldom(monkeypatch):
    """Time passes where the work is done: 3 s a state."""
    clock, store = Clock(), InMemory()
    made, real = [], Running.made

    def slow(self, state):
        clock.now += 3.0
        made.append(state.size)
        return real(self, state)

    monkeypatch.setattr(Running, "made", slow)
    kept = Aggregates(store, MAP, MARKET, clock)
    store.kept = ENVELOPES[:5]
    first = kept.build(5, bytes(32), [], bytes(32))
    clock.now += 1000
    assert kept.build(5, bytes(32), [], bytes(32)) is first, "no news, no work, however long ago"
    store.kept = ENVELOPES[:6]
    second = kept.build(6, bytes(32), [], bytes(32))
    store.kept = ENVELOPES[:8]
    for size in (7, 8, 8):
        assert kept.build(size, bytes(32), [], bytes(32)) is second
    clock.now += PAUSE_FACTOR * 3.0
    assert parse_aggregates(kept.build(8, bytes(32), [], bytes(32)).body).state.size == 8
    assert made == [5, 6, 8]
    assert kept.held(8, 0) is not None
    clock.now += max(PAUSE_FACTOR * 3.0, LEAST_PAUSE_S)
    assert kept.held(9, 0) is None
    assert kept.held(8, 1) is None


@pytest.fixture
def at_once(monkeypatch):
    """A market that rests so little between two states that a test need not wait."""
    monkeypatch.setattr(aggregates, "LEAST_PAUSE_S", 0.0)
    monkeypatch.setattr(aggregates, "PAUSE_FACTOR", 0)


def test_a_withdrawn_release_leaves_the_aggregates_and_an_auditor_agrees(tmp_path, at_once):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        assert client.recomputed_aggregates(MAP).federation.releases == 0
        for envelope in ENVELOPES[:6]:
            client.publish(envelope)
        before = client.recomputed_aggregates(MAP)
        assert (before.federation.releases, before.state.size) == (6, 6)
        market_key = client.market_key
        assert market_key is not None
        notice = Notice(Kind.WITHDRAWAL, market_key, OWNER.public_key().public_bytes_raw(), (RELEASES[2].release_id,))
        client.submit(sign_notice(notice, OWNER))
        after = client.recomputed_aggregates(MAP)
    assert (after.federation.releases, after.state.size, after.state.notices_size) == (5, 6, 1)
    assert RELEASES[2].title in {leaf.title for leaf in before.leaves} - {leaf.title for leaf in after.leaves}
    assert RELEASES[2].card.name == "law"
    assert {group.name for group in before.domains} - {group.name for group in after.domains} == {"law"}


def test_a_restarted_market_says_the_same(tmp_path):
    bodies = []
    for _ in range(2):
        with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
            for envelope in ENVELOPES[:5]:
                client.publish(envelope)
            bodies.append(client.aggregates(MAP).body)
    assert bodies[0] == bodies[1]


def test_the_event_says_sizes_alone(caplog):
    store = InMemory()
    store.kept = ENVELOPES[:2]
    with caplog.at_level("INFO", "veilmart.market"):
        Aggregates(store, MAP, MARKET).build(2, bytes(32), [], bytes(32))
    assert [record.getMessage().split()[:2] for record in caplog.records] == [["Aggregated", "size=2"]]
