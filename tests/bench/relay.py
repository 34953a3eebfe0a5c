"""Measure what the relay adds to an answer: the way of a sealed question to a guard and of its answer back, without the model's time.

    python -m tests.bench.relay --questions 300

Market, guard's line and querier are what they are in use, over TLS on loopback, the market in a process of its own; only the guard's worker
answers a fixed text at once.  Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient
from nodes.policy import RelayRules
from protocol.sealing import (
    Introduction,
    OpeningKey,
    Reply,
    announcement_bytes,
    ask,
    open_question,
    require_introduction,
    sign_introduction,
)
from tests.e2e.processes import market_process, settle
from tests.nodes.relays import relayed
from tests.protocol.worlds import ADAPTER, release_of, sign_release, small_map

KEY, TEXT = Ed25519PrivateKey.generate(), "pt c/o chest pain, what now? " * 8


class AtOnce:
    """A worker that seals a fixed answer."""

    def __init__(self, release_id: bytes, owner: Ed25519PrivateKey = KEY) -> None:
        self._release_id, self._owner, self._key, self._introduction = release_id, owner, OpeningKey.generate(), b""

    def introduce(self, envelope: bytes, market_key: bytes, challenge: bytes) -> Future[list[bytes]]:
        owner, made = self._owner.public_key().public_bytes_raw(), Future[list[bytes]]()
        shown = Introduction(owner, self._release_id, self._key.suite, self._key.public, int(time.time()) + 3600, False, 4000, 256)
        self._introduction = sign_introduction(shown, self._owner)
        made.set_result([self._introduction, self._owner.sign(announcement_bytes(market_key, challenge, self._introduction))])
        return made

    def answer(self, sealed: bytes, patience_s: float) -> Future[list[bytes]]:
        answered = Future[list[bytes]]()
        question = open_question(sealed, self._introduction, self._key)
        answered.set_result([question.seal(Reply(question.text, 64, True))])
        return answered


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Return median and 99th percentile in milliseconds."""
    return {"p50_ms": round(1e3 * float(np.median(seconds)), 2), "p99_ms": round(1e3 * float(np.quantile(seconds, 0.99)), 2)}


def relay(home: Path, count: int) -> dict[str, Any]:
    """Return what a question costs on its way, one after the other, then eight at a time."""
    feature_map = small_map()
    release = release_of(feature_map, KEY, adapter=ADAPTER)
    (home / "small.map").write_bytes(feature_map.manifest)
    with market_process(home / "market", options=("--open", "--map", str(home / "small.map"))) as (started, process):
        settle(process.pid)
        address, ca = started["address"], Path(started["ca"])
        rules = RelayRules(questions_per_hour=1_000_000)
        with MarketClient(address, ca, home / "querier") as client:
            client.publish(envelope := sign_release(release, KEY))
            with relayed(envelope, AtOnce(release.release_id), address, ca, home / "owner", rules):
                introduction = client.introduction(release.release_id)
                require_introduction(introduction, release.owner, release.release_id, int(time.time()))

                def once(_: int) -> tuple[float, float]:
                    began = time.perf_counter()
                    sealed = ask(introduction, TEXT, 64)
                    sent = time.perf_counter()
                    answer = client.ask(release.release_id, sealed.sealed, 30)
                    came = time.perf_counter()
                    if sealed.open(answer).text != TEXT:
                        raise SystemExit("another answer than was given")
                    return came - sent, time.perf_counter() - began

                for number in range(20):
                    once(number)
                alone = [once(number) for number in range(count)]
                with ThreadPoolExecutor(8) as pool:
                    together = list(pool.map(once, range(count)))
    return {
        "questions": count,
        "sealed_bytes": len(ask(introduction, TEXT, 64).sealed),
        "forwarded": quantiles([sent for sent, _ in alone]),
        "with_sealing": quantiles([whole for _, whole in alone]),
        "forwarded_eight_at_a_time": quantiles([sent for sent, _ in together]),
        "target_ms": 10.0,
    }


def main() -> None:
    """Print the figures as one JSON object."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--questions", type=int, default=300)
    count = asked.parse_args().questions
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(relay(Path(folder), count), indent=1))


if __name__ == "__main__":
    main()
