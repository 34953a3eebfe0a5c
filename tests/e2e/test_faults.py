"""Networks that delay, cut, reset and go silent: nothing is done twice, and once they are well so are we, within seconds."""

import asyncio
import hashlib
import sqlite3
import threading
import time
from contextlib import closing, suppress
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.quotas import Limits
from market_node.server import OPTIONS
from market_node.service import MarketService
from nodes import market_client
from nodes.base_model import BaseModel
from nodes.market_client import MarketClient
from nodes.query import find_encrypted
from nodes.relay import ask_relayed
from protocol import channel
from protocol.errors import GuardUnreachable, MarketUnreachable
from protocol.release import AdapterReference, open_envelope
from tests.e2e.fault_proxy import DOWN, UP, FaultProxy
from tests.market_node import market as markets
from tests.market_node.market import running_market
from tests.nodes.guard_processes import wait_for
from tests.nodes.owners import tiny_map
from tests.nodes.relays import EVERYTHING, RULES, ThreadWorker, owner_with_adapter, publish, relayed
from tests.nodes.test_answers import MAP, SKETCH
from tests.protocol.worlds import adapter_bytes, envelope_of

RECOVERY_S = 5.0  # after healing, beside what the same takes on a network that was never ill, measured in the same test
ADAPTER_WIDTH = 200  # 24 kB
GONE = (MarketUnreachable, GuardUnreachable)


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A market behind the proxy."""
    home = tmp_path_factory.mktemp("market")
    with running_market(home, MAP, limits=Limits()) as (address, ca, store):
        host, _, port = address.rpartition(":")
        with FaultProxy(host, int(port)) as proxy:
            yield SimpleNamespace(home=home, ca=ca, store=store, proxy=proxy)


class Owner:
    """Somebody new at the market, with one release that names an adapter, and what is to be done: again and again, until it is."""

    def __init__(self, market, home, seed: int) -> None:
        self.market, self.client = market, MarketClient(market.proxy.address, market.ca, home)
        self.key = Ed25519PrivateKey.generate()
        self.data = adapter_bytes(alpha=1 + seed, width=ADAPTER_WIDTH)
        self.adapter = AdapterReference(hashlib.sha256(self.data).digest(), len(self.data))
        self.envelope = envelope_of(MAP, self.key, seed=seed, adapter=self.adapter)
        self.acknowledged = []

    def publish(self) -> None:
        self.acknowledged.append(self.client.publish(self.envelope).index)

    def upload(self) -> None:
        self.client.upload_adapter(self.adapter, self.data)

    def find(self) -> None:
        assert find_encrypted(SKETCH, self.client, MAP).ranking is not None

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes_raw()

    def effects(self) -> tuple[int, int, int]:
        """Return how many releases of this owner are in the log, and how many releases and adapters its quota was charged for."""
        held = self.market.store.envelopes(0, 1 << 30)
        mine = [open_envelope(envelope).owner == self.public for envelope in held]
        assert {held[index] for index in self.acknowledged} <= {self.envelope}
        with closing(sqlite3.connect(self.market.home / "quotas.db")) as db:
            rows = db.execute("SELECT kind, count(*) FROM handed_in WHERE owner = ? GROUP BY kind", (self.public,)).fetchall()
        return sum(mine), dict(rows).get("RELEASES", 0), dict(rows).get("ADAPTER_BYTES", 0)


@pytest.fixture
def owner(market, tmp_path):
    Owner.count = getattr(Owner, "count", 0) + 1
    market.proxy.heal()
    owner = Owner(market, tmp_path / "home", Owner.count)
    yield owner
    owner.client.__exit__()


def until_done(what) -> float:
    """Do it again until the network lets it through; return the seconds."""
    started = time.monotonic()
    while True:
        try:
            what()
        except GONE:
            assert time.monotonic() - started < 240, "it never came back"
            time.sleep(0.05)
        else:
            return time.monotonic() - started


def in_background(what) -> threading.Thread:
    """Do it once, in a thread; what a network does to it is no failure."""

    def once() -> None:
        with suppress(*GONE):
            what()

    thread = threading.Thread(target=once)
    thread.start()
    return thread


def late(proxy, what):
    proxy.latency_s = 0.05
    what()


def in_pieces(proxy, what):
    proxy.slice_bytes = 1 if what.__name__ != "find" else 16  # a query is 130 kB
    what()


def cut_on_its_way(proxy, what):
    proxy.hold = {UP}
    doing = in_background(what)
    doing.join(0.3)  # long enough for some of it to be under way, and if not, it is the fault between two calls
    proxy.reset()
    proxy.heal()
    doing.join()


def answer_lost(proxy, what):
    for _ in range(5):  # what comes down first may be another connection's, or the answer to a ping
        before = proxy.lost_answers
        proxy.lose_answer()
        try:
            what()
        except GONE:
            break
    else:
        pytest.fail("no answer was lost")
    assert proxy.lost_answers == before + 1


def closed(proxy, what):
    proxy.drop()


def refused(proxy, what):
    proxy.refusing = True
    proxy.reset()
    with pytest.raises(MarketUnreachable):
        what()


def partition(proxy, what):
    proxy.hold = {UP, DOWN}
    doing = in_background(what)
    doing.join(0.5)
    proxy.heal()
    doing.join()


FAULTS = [late, in_pieces, cut_on_its_way, answer_lost, closed, refused, partition]


def suffer(owner, fault, name: str) -> float:
    """Let a fault come over an operation; return the seconds that it took once the network was well, beyond what it takes in health."""
    proxy, what = owner.market.proxy, getattr(owner, name)
    if name != "publish":
        until_done(owner.publish)
    healthy = until_done(lambda: owner.client.sync(MAP))
    fault(proxy, what)
    proxy.heal()
    seconds = until_done(what)
    return max(seconds - 20 * healthy, 0.0)


@pytest.mark.parametrize("name", ["publish", "upload", "find"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_has_an_effect_twice_or_lasts_longer_than_itself(owner, fault, name):
    assert suffer(owner, fault, name) < RECOVERY_S
    assert owner.effects() == (1, 1, int(name == "upload"))
    if name == "upload":
        assert owner.client.download_adapter(owner.adapter) == owner.data
    adapters = owner.market.home / "adapters"
    wait_for(lambda: not list(adapters.glob(".upload-*")))


def test_a_client_that_signs_anew_for_each_attempt_is_caught_by_that_test(owner):
    """Control: what the market knows a request by is the release's id, so other bytes are another request."""
    number = iter(range(1, 99))

    def publish_anew() -> None:
        owner.envelope = envelope_of(MAP, owner.key, seed=1, adapter=owner.adapter, number=next(number))
        owner.client.publish(owner.envelope)

    owner.client.sync(MAP)  # connected: what comes down next is the answer
    while not owner.effects()[0]:  # what came down first may have been no answer
        answer_lost(owner.market.proxy, publish_anew)
    until_done(publish_anew)
    assert owner.effects()[0] > 1


@pytest.fixture
def quick_pings(monkeypatch):
    """What takes up to 20 s takes 3: the rule is the same, and the real figures are tried every night."""
    quick = {"grpc.keepalive_time_ms": 1000, "grpc.keepalive_timeout_ms": 2000, "grpc.http2.ping_timeout_ms": 2000}
    monkeypatch.setattr(channel, "OPTIONS", [(name, quick.get(name, value)) for name, value in channel.OPTIONS])


def give_up_and_go_on(owner, home, directions) -> None:
    """Nobody is told that the connection is dead: the call that meets it fails before its deadline, and the next one works."""
    with MarketClient(owner.market.proxy.address, owner.market.ca, home) as owner.client:
        until_done(owner.publish)
        healthy = until_done(owner.publish)
        owner.market.proxy.silence(*directions)
        with pytest.raises(MarketUnreachable, match="unavailable"):  # its deadline would say "deadline exceeded"
            owner.publish()
        assert until_done(owner.publish) - 20 * healthy < RECOVERY_S
    assert owner.effects() == (1, 1, 0)


DIRECTIONS = pytest.mark.parametrize("directions", [(UP,), (DOWN,), (UP, DOWN)], ids=["nothing goes up", "nothing comes down", "nothing"])


@DIRECTIONS
def test_a_connection_that_carries_nothing_any_more_is_given_up_and_the_next_one_works(owner, tmp_path, quick_pings, directions):
    give_up_and_go_on(owner, tmp_path / "other", directions)


@pytest.mark.nightly
@DIRECTIONS
def test_the_same_at_the_pace_at_which_we_really_ask(owner, tmp_path, directions):
    give_up_and_go_on(owner, tmp_path / "other", directions)


def test_without_pings_such_a_connection_swallows_call_after_call(owner, tmp_path, quick_pings, monkeypatch):
    """Control."""
    monkeypatch.setattr(channel, "OPTIONS", [option for option in channel.OPTIONS if "ping" not in option[0] and "alive" not in option[0]])
    with MarketClient(owner.market.proxy.address, owner.market.ca, tmp_path / "other") as owner.client:
        until_done(owner.publish)
        monkeypatch.setattr(market_client, "CALL_TIMEOUT_S", 3.0)
        owner.market.proxy.silence(UP, DOWN)
        for _ in range(3):
            with pytest.raises(MarketUnreachable, match="deadline"):
                owner.publish()


class TakesTime(MarketService):
    """Says nothing while five pings come."""

    async def Describe(self, request, context):
        await asyncio.sleep(5.5)
        return await super().Describe(request, context)


def described_after_a_while(folder, monkeypatch, market_options) -> None:
    monkeypatch.setattr(markets, "OPTIONS", market_options)
    with running_market(folder / "market", MAP, service_type=TakesTime) as (address, ca, _):
        with MarketClient(address, ca, folder / "home") as client:
            client.describe()


@pytest.mark.slow
def test_an_answer_that_takes_many_pings_arrives(tmp_path, quick_pings, monkeypatch):
    """At a tenth of our pace on both sides: gRPC asks no oftener than once a second."""
    pace = "grpc.http2.min_ping_interval_without_data_ms"
    assert dict(channel.OPTIONS)["grpc.keepalive_time_ms"] == 1000
    options = [(name, value // 10 if name == pace else value) for name, value in OPTIONS]
    assert options != OPTIONS
    described_after_a_while(tmp_path, monkeypatch, options)


@pytest.mark.slow
def test_a_market_that_was_not_told_of_the_pings_cuts_such_a_call(tmp_path, quick_pings, monkeypatch):
    """Control: gRPC's own limit is a ping in five minutes, and the third that comes sooner ends the connection."""
    with pytest.raises(MarketUnreachable, match="unavailable"):
        described_after_a_while(tmp_path, monkeypatch, [option for option in OPTIONS if "ping" not in option[0]])


@pytest.mark.slow
@pytest.mark.alone
def test_after_a_long_outage_a_client_is_back_within_seconds(owner):
    """gRPC tries again after 1, 1.6, 2.6, 4.1, 6.6, 10.5 s and so on, up to two minutes, if nobody tells it otherwise."""
    until_done(owner.publish)
    assert suffer(owner, lambda proxy, what: outage(proxy, what, 15.0), "publish") < RECOVERY_S
    assert owner.effects() == (1, 1, 0)


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def silent(proxy, what):
    proxy.silence(UP, DOWN)
    with pytest.raises(GONE):
        what()


def away(proxy, what):
    outage(proxy, what, 10.0)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("fault", [late, in_pieces, answer_lost, closed, partition, away, silent], ids=lambda fault: fault.__name__)
def test_a_relayed_question_reaches_the_guard_at_most_once_and_is_answered_once_the_network_is_well(model, tmp_path, quick_pings, fault):
    """Guard and querier both reach the market through the proxy."""
    guard, envelope = owner_with_adapter(tmp_path / "owner", model)
    worker, asked = ThreadWorker(guard.answerer(RULES)), []
    with running_market(tmp_path / "market", tiny_map(model), policy=EVERYTHING) as (address, ca, _):
        host, _, port = address.rpartition(":")
        publish(envelope, address, ca, tmp_path / "owner")
        with FaultProxy(host, int(port)) as proxy, relayed(envelope, worker, proxy.address, ca, tmp_path / "guard"):
            with MarketClient(proxy.address, ca, tmp_path / "querier") as client:

                def ask() -> None:
                    asked.append("question")
                    ask_relayed("wool", f"question {len(asked)}", 4, client, tmp_path / "querier", tiny_map(model))

                healthy, recovered = until_done(ask), []
                while not recovered or (recovered[-1] > RECOVERY_S and len(recovered) < 3):  # other work on the machine adds to it
                    fault(proxy, ask)
                    proxy.heal()
                    recovered.append(until_done(ask) - 20 * healthy)
    assert min(recovered) < RECOVERY_S
    assert 2 <= len(worker.seen) <= len(asked)
    assert len(set(worker.seen)) == len(worker.seen)


def outage(proxy, what, seconds: float) -> None:
    """Refuse all connections for so long, while a client goes on trying."""
    proxy.refusing = True
    proxy.reset()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with pytest.raises(GONE):
            what()
        time.sleep(0.2)
