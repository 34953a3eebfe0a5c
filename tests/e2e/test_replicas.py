"""Three market processes over one PostgreSQL: killed and restarted under load, they lose nothing, show one log and fail no query."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import store
from market_node.witness import WitnessOf
from nodes.base_model import BaseModel
from nodes.market_client import MarketClient
from nodes.query import find_encrypted
from protocol import transparency
from protocol.errors import GuardUnreachable, MarketUnreachable, VeilmartError
from protocol.features import default_map
from protocol.health import require_serving
from protocol.release import open_envelope
from protocol.scoring import sketch_of
from protocol.transparency import open_checkpoint
from tests.e2e.forked import ForkedMarket
from tests.nodes.guard_processes import wait_for
from tests.nodes.owners import tiny_map
from tests.nodes.relays import RULES, ThreadWorker, owner_with_adapter, publish, relayed
from tests.nodes.test_relay import answered
from tests.protocol.worlds import envelope_of, features

pytestmark = pytest.mark.slow
MAP = default_map()
NAME = "witness.example"


@dataclass
class Load:
    """Owners who publish, queriers who search and a witness who looks, until told to stop, and what became of it."""

    market: str
    ca: Path
    home: Path
    acknowledged: list[bytes] = field(default_factory=list)
    queries: int = 0
    repeated: list[str] = field(default_factory=list)  # by the querier: what the client itself tries again elsewhere is not among them
    failed: list[str] = field(default_factory=list)  # queries that failed then too
    looks: int = 0
    lies: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def publish(self, place: int) -> None:
        with MarketClient(self.market, self.ca, self.home / f"owner{place}") as client:
            envelope = envelope_of(MAP, Ed25519PrivateKey.generate(), seed=place)
            while not self.stop.wait(0.1):
                try:
                    client.publish(envelope)
                except MarketUnreachable:
                    continue  # the same bytes again
                self.acknowledged.append(envelope)
                envelope = envelope_of(MAP, Ed25519PrivateKey.generate(), seed=len(self.acknowledged))

    def search(self) -> None:
        sketch = sketch_of(features(40, 3, MAP.dimension), MAP, 2)
        with MarketClient(self.market, self.ca, self.home / "querier") as client:
            while not self.stop.wait(0.2):
                try:
                    find_encrypted(sketch, client, MAP)
                except VeilmartError as error:
                    self.repeated.append(str(error))
                    try:
                        find_encrypted(sketch, client, MAP)
                    except VeilmartError as again:
                        self.failed.append(str(again))
                self.queries += 1

    def watch(self) -> None:
        witness = WitnessOf(self.market, self.ca, self.home / "witness", NAME)
        while not self.stop.wait(0.2):
            try:
                witness.observe()
                self.looks += 1
            except MarketUnreachable:
                continue
            except VeilmartError as error:
                self.lies.append(str(error))

    @contextmanager
    def running(self) -> Iterator[None]:
        ended: list[str] = []

        def to_its_end(work, *args) -> None:
            try:
                work(*args)
            except BaseException as error:  # noqa: BLE001 - told below
                ended.append(f"{work.__name__}: {error!r}")

        works = [(self.publish, 0), (self.publish, 1), (self.search,), (self.watch,)]
        threads = [threading.Thread(target=to_its_end, args=work) for work in works]
        [thread.start() for thread in threads]
        try:
            yield
        finally:
            self.stop.set()
            [thread.join(120) for thread in threads]
        assert ended == []


@pytest.fixture
def trio(request, tmp_path, postgres):
    """Three processes of one market over an empty PostgreSQL, harmed where a test says how, and a load that does not run yet."""
    home = tmp_path / "home"
    home.mkdir()
    witness = WitnessOf("127.0.0.1:1", Path("none"), tmp_path / "witness", NAME).witness
    harm = getattr(request, "param", None)
    markets = [ForkedMarket(home, "--database", postgres.url(), "--witness", str(witness), harm=harm)]
    markets[0].start()
    for _ in range(2):
        markets.append(ForkedMarket(home, "--witness", str(witness), harm=harm))  # the folder says by now where the records lie
        markets[-1].start()
    load = Load(",".join(market.address for market in markets), markets[0].ca, tmp_path)
    with MarketClient(load.market, load.ca, tmp_path / "first") as client:
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate()))
    yield markets, load
    for market in markets:
        market.stop()


def one_log(markets: list[ForkedMarket], load: Load) -> list[bytes]:
    """Return the releases that every process shows, in one log under one checkpoint that extends what the witness signed."""
    shown = []
    for place, market in enumerate(markets):
        with MarketClient(market.address, load.ca, load.home / f"auditor{place}") as client:
            envelopes = client.envelopes(MAP)  # under the root of its checkpoint
            shown.append((client.checkpoint_note().partition(b"\n\n")[0], envelopes))
            signed = open_checkpoint((load.home / "witness" / "signed.checkpoint").read_bytes(), client.market_key)
            assert client.prove_consistency(signed.size, len(envelopes)) is not None
    WitnessOf(load.market, load.ca, load.home / "witness", NAME).observe()
    assert shown[0] == shown[1] == shown[2]
    held = shown[0][1]
    assert len({open_envelope(envelope).release_id for envelope in held}) == len(held), "each once"
    return held


def survive(trio, kills: int) -> tuple[Load, int]:
    """Return the load after so many kills, each of a process chosen at random that serves again before the next; and how many it lost.

    A query is answered between two kills: on busy cores a call may take longer than a process lives, and then nobody can answer it.
    """
    markets, load = trio
    with load.running():
        for _ in range(kills):
            before = load.queries
            wait_for(lambda before=before: load.queries > before, 120)
            time.sleep(0.5 * random.random())
            market = random.choice(markets)
            market.stop(signal.SIGKILL)
            market.start()
            require_serving(market.address, load.ca)
        time.sleep(1)
    return load, len(set(load.acknowledged) - set(one_log(markets, load)))


def report(load: Load, kills: int, lost: int) -> str:
    return (
        f"{kills} kills: {len(load.acknowledged)} acknowledged, {lost} lost; {load.queries} queries, {len(load.repeated)} repeated, "
        f"{len(load.failed)} failed; "
        f"{load.looks} looks of the witness, {len(load.lies)} contradictions"
    )


def test_twenty_kills_lose_nothing_fork_nothing_and_fail_no_query(trio):
    load, lost = survive(trio, 20)
    print(report(load, 20, lost))  # noqa: T201 - the figures
    assert min(len(load.acknowledged), load.queries, load.looks) > 5, "it was under load"
    assert (lost, load.failed, load.lies) == (0, [], [])


@pytest.mark.nightly
def test_two_hundred_kills_lose_nothing_fork_nothing_and_fail_no_query(trio):
    load, lost = survive(trio, 200)
    print(report(load, 200, lost))  # noqa: T201 - the figures
    assert min(len(load.acknowledged), load.queries, load.looks) > 50
    assert (lost, load.failed, load.lies) == (0, [], [])


def acknowledge_too_early() -> None:
    """Let this process promise a place in the log before it is written: what a kill then loses, nobody can say."""
    append = store.Store.append_all

    def later(self, offers):
        with self._engine.connect() as db:
            head = store._head(db)
            if not head.size:  # the first one's client believes nothing yet
                return append(self, offers)
            promised = store.Stored(head.size, head, store._log(db, head.size))
        threading.Timer(0.8, lambda: append(self, offers)).start()
        return [promised] * len(offers)

    store.Store.append_all = later


@pytest.mark.nightly
@pytest.mark.parametrize("trio", [acknowledge_too_early], indirect=True)
def test_control_processes_that_acknowledge_too_early_lose(trio, monkeypatch):
    """The client of this test believes the promise, since an honest one refuses a receipt without its proof."""
    monkeypatch.setattr(transparency.Receipt, "verify", lambda self: transparency.open_checkpoint(self.checkpoint, self.market_key))
    _, lost = survive(trio, 10)
    assert lost > 0


def test_a_rolling_restart_fails_no_query(trio):
    markets, load = trio
    with load.running():
        for market in markets:
            assert market.stop() == 0
            assert require_serving(load.market, load.ca).seconds < 10, "of several addresses one is enough"
            market.start()
            before = load.queries
            wait_for(lambda before=before: load.queries > before + 1, 120)  # one that began after the restart
    assert (load.failed, load.lies) == ([], [])
    assert set(load.acknowledged) <= set(one_log(markets, load))


def test_control_a_client_of_one_process_alone_fails_in_its_restart(trio):
    markets, load = trio
    load.market = markets[0].address
    with load.running():
        wait_for(lambda: load.queries, 120)
        markets[0].stop(signal.SIGKILL)
        wait_for(lambda: load.failed, 120)
        markets[0].start()


def test_a_question_reaches_a_guard_that_dialled_in_at_another_process(tmp_path, postgres, tiny_model_directory):
    model, home = BaseModel.open(tiny_model_directory), tmp_path / "home"
    home.mkdir()
    (tmp_path / "tiny.map").write_bytes(tiny_map(model).manifest)
    options = "--map", str(tmp_path / "tiny.map"), "--smallest-count", "1", "--database", postgres.url()
    guard, envelope = owner_with_adapter(tmp_path / "owner", model)
    markets = [ForkedMarket(home, *options) for _ in range(2)]
    [market.start() for market in markets]
    ca, worker = markets[0].ca, ThreadWorker(guard.answerer(RULES))
    publish(envelope, markets[0].address, ca, tmp_path / "owner")
    with MarketClient(markets[1].address, ca, tmp_path / "querier") as client:
        with pytest.raises(GuardUnreachable, match="not connected"):
            client.introduction(open_envelope(envelope).release_id)
        with relayed(envelope, worker, markets[0].address, ca, tmp_path / "owner"):
            assert answered(client, tmp_path, model)
            markets[0].stop(signal.SIGKILL)
            assert not answered(client, tmp_path, model)
            markets[0].start()  # the guard dials again by itself
            wait_for(lambda: answered(client, tmp_path, model), 120)
    assert [market.stop() for market in markets] == [0, 0]
    assert os.listdir(home / "market" / "processes") == []
