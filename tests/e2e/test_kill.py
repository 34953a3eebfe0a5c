"""A market that is killed under load: what it acknowledged is there when it comes back, in one log."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient
from protocol.errors import VeilmartError
from protocol.features import default_map
from protocol.release import open_envelope
from tests.e2e.processes import environment
from tests.nodes.guard_processes import wait_for
from tests.protocol.worlds import envelope_of

MAP = default_map()
HEALTHY_S = 2.0  # from the start of the process to the first answer, less what Python needs to import: measured beside it
LONGEST_LIFE_S = 0.5  # of a market after its first acknowledgement, until it is killed again
PAUSE_S = 0.05  # of each of two owners, between two releases


class Market:
    """A market process on a fixed port, started and killed again and again."""

    def __init__(self, home, program: str = "") -> None:
        self.home, self.port, self._program = home, 0, program

    def start(self) -> float:
        """Return the seconds until it said that it is ready."""
        what = ["-c", self._program] if self._program else ["-m", "nodes.command"]
        command = [sys.executable, *what, "market", "up", "--no-page", "--open", "--port", str(self.port), "--json"]
        started = time.monotonic()
        with (self.home / "market.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment(self.home))
        said = json.loads(self.process.stdout.readline())
        self.port, self.ca = int(said["address"].rpartition(":")[2]), said["ca"]
        return time.monotonic() - started

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=20)
        self.process.stdout.close()


def survive(tmp_path, kills: int, program: str = "") -> tuple[list[bytes], int, list[float]]:
    """Return the releases that were acknowledged, how many of them the market lost, and its seconds to be ready after each kill."""
    home = tmp_path / "home"
    home.mkdir()
    market, acknowledged, stop = Market(home, program), [], threading.Event()
    market.start()
    # Made beforehand, so that publishing is all that happens when the kill comes; each is another owner's.  More than can be published
    # until the last kill: at most one in PAUSE_S, while the market is up.
    count = int(1.5 * kills * LONGEST_LIFE_S / PAUSE_S)
    waiting = [[envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(count)] for _ in range(2)]

    def publish(envelopes: list[bytes], home: Path) -> None:
        while envelopes and not stop.is_set():
            try:
                with MarketClient(f"127.0.0.1:{market.port}", Path(market.ca), home) as client:
                    while envelopes and not stop.is_set():
                        client.publish(envelopes[-1])
                        acknowledged.append(envelopes.pop())
                        time.sleep(PAUSE_S)
            except VeilmartError:
                time.sleep(PAUSE_S)  # it is dead: the same bytes again, later

    threads = [threading.Thread(target=publish, args=(envelopes, tmp_path / f"client{n}")) for n, envelopes in enumerate(waiting)]
    [thread.start() for thread in threads]
    seconds = []
    for _ in range(kills):
        before = len(acknowledged)
        wait_for(lambda before=before: len(acknowledged) > before)  # they have found it again, however busy the machine is
        time.sleep(LONGEST_LIFE_S * int.from_bytes(os.urandom(2), "little") / 65536)
        assert all(waiting), "each kill comes under load"
        market.kill()
        seconds.append(market.start())
    time.sleep(1)
    stop.set()
    [thread.join(60) for thread in threads]
    try:
        with MarketClient(f"127.0.0.1:{market.port}", Path(market.ca), tmp_path / "auditor") as client:
            held = client.envelopes(MAP)
    finally:
        market.kill()
    assert len({open_envelope(envelope).release_id for envelope in held}) == len(held), "each once"
    return acknowledged, len(set(acknowledged) - set(held)), seconds


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    acknowledged, lost, seconds = survive(tmp_path, 20)
    assert len(acknowledged) > 20, "it was under load"
    assert lost == 0
    assert sorted(seconds)[len(seconds) // 2] < HEALTHY_S + import_seconds()


def import_seconds() -> float:
    """What any command of this size costs before its first line runs, on this machine and now."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import nodes.command, market_node.server, numba"], check=True)
    return time.monotonic() - started


# Acknowledges before the transaction: what a kill then loses, nobody can say.
TOO_EARLY = """
import threading
from market_node import store
append = store.Store.append_all
def later(self, offers):
    with self._engine.connect() as db:
        head = store._head(db)
        promised = store.Stored(head.size, head, store._log(db, head.size))
    threading.Timer(0.3, lambda: append(self, offers)).start()
    return [promised] * len(offers)
store.Store.append_all = later
from nodes.command import main
main()
"""


@pytest.mark.slow
def test_a_market_that_acknowledges_too_early_loses(tmp_path, monkeypatch):
    """Control.  The client of this test believes the promise, since an honest one refuses a receipt without its proof."""
    from protocol import transparency

    monkeypatch.setattr(transparency.Receipt, "verify", lambda self: transparency.open_checkpoint(self.checkpoint, self.market_key))
    _, lost, _ = survive(tmp_path, 8, TOO_EARLY)
    assert lost > 0


@pytest.mark.nightly
def test_two_hundred_kills_lose_nothing(tmp_path):
    acknowledged, lost, seconds = survive(tmp_path, 200)
    assert len(acknowledged) > 200
    assert lost == 0
    assert sorted(seconds)[100] < HEALTHY_S + import_seconds()
