"""Clients of a market under load, one role a process: a call begins when the plan says, whatever became of those before it.

    python -m tests.bench.load_clients FOLDER        (started by tests.bench.market_load)

Each role is a list of workers, and each worker a client of its own, as that many people would be.  Arrival times are fixed beforehand and
a latency counts from the planned arrival, the wait for a free worker included: a market that stands still for a second shows in all the
calls that were planned for that second, not in the one that waited (coordinated omission).
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient
from nodes.membership import Membership
from protocol.catalogue import Catalogue
from protocol.certificates import proves
from protocol.encryption import MatchPlan, QueryKey
from protocol.enrolment import sign_enrolment
from protocol.errors import StaleCatalogue, VeilmartError
from protocol.features import VIEWS, default_map
from protocol.release import Card, sign_release
from protocol.scoring import sketch_of
from protocol.sealing import ask, require_introduction
from tests.bench.page import PAGES
from tests.bench.relay import TEXT
from tests.protocol.worlds import features, release_of

MAP = default_map()
SEEN = (*PAGES, "aggregates", "health")  # health asks the market over a connection of its own
PATIENCE_S = 60
DONE = "ok"


class Outcome(NamedTuple):
    """How one call ended."""

    kind: str
    planned_s: float  # since the start of the run; negative while it warms up
    latency_s: float  # from the planned arrival to the verified answer
    code: str  # DONE, or the code of the error


@dataclass(frozen=True)
class Role:
    """What a process of clients is told."""

    name: str
    folder: Path
    address: str
    ca: Path
    page: str  # address of the market's page
    secrets: tuple[bytes, ...]  # of invites, one an owner
    answering: bytes  # id of the release whose guard answers questions
    answerer: bytes  # its owner
    workers: int

    @classmethod
    def read(cls, folder: Path) -> Role:
        """Return what `write` left in a folder."""
        told = json.loads((folder / "role.json").read_text())
        secrets = tuple(bytes.fromhex(secret) for secret in told["secrets"])
        answering, answerer = bytes.fromhex(told["answering"]), bytes.fromhex(told["answerer"])
        return cls(told["name"], folder, told["address"], Path(told["ca"]), told["page"], secrets, answering, answerer, told["workers"])

    def write(self) -> None:
        """Leave everything in the folder."""
        told = {
            "name": self.name, "address": self.address, "ca": str(self.ca), "page": self.page, "workers": self.workers,
            "secrets": [secret.hex() for secret in self.secrets], "answering": self.answering.hex(), "answerer": self.answerer.hex(),
        }  # fmt: skip
        (self.folder / "role.json").write_text(json.dumps(told))

    def client(self, number: int, membership: Membership | None = None) -> MarketClient:
        """Return a connection of a worker's own, with a home of its own."""
        return MarketClient(self.address, self.ca, self.folder / f"client-{number}", membership)


Worker = Callable[[str], None]  # makes one call of a kind, and raises what it ended with


def enrolled(address: str, ca: Path, home: Path, secret: bytes) -> tuple[Ed25519PrivateKey, Membership]:
    """Return the key of a new member, by an invite's secret, and what gets it certificates."""
    key = Ed25519PrivateKey.generate()
    owner = key.public_key().public_bytes_raw()
    with MarketClient(address, ca, home) as client:
        market_key = client.describe().market_key
        client.enrol(secret, owner, "", sign_enrolment(market_key, secret, key, ""))
    return key, Membership(home / "node", owner, proves(key))


def owners(role: Role) -> list[Worker]:
    """Members that register release after release of one chain each, or send their last one again."""
    made = release_of(MAP, Ed25519PrivateKey.generate())

    def owner(number: int, secret: bytes) -> Worker:
        key, membership = enrolled(role.address, role.ca, role.folder / f"client-{number}", secret)
        public, client, rng = key.public_key().public_bytes_raw(), role.client(number, membership), np.random.default_rng(number)
        last, count = b"", 0

        def publish(kind: str) -> None:
            nonlocal last, count
            if kind == "register" or not last:
                sums = made.specification.noisy_sums.copy()
                sums[1:] += rng.integers(-100_000, 100_000, MAP.dimension, dtype=np.int32)
                release = replace(
                    made, owner=public, release_number=count + 1, previous=bytes([1]) * 32 if count else b"",
                    specification=replace(made.specification, noisy_sums=sums), card=Card(f"owner-{number}-{count}"),
                )  # fmt: skip
                last, count = sign_release(release, key), count + 1
            client.publish(last)

        return publish

    return [owner(number, secret) for number, secret in enumerate(role.secrets)]


def queriers(role: Role) -> list[Worker]:
    """Queriers that share what one of them synced last, as the programs of one house do; a state that is too old is synced again."""
    sketch = sketch_of(features(40, 3, MAP.dimension), MAP, len(VIEWS))
    known: list[tuple[Catalogue, Any]] = []

    def querier(number: int) -> Worker:
        client = role.client(number)

        def sync() -> None:
            catalogue = client.sync(MAP)
            norms = np.sqrt(np.maximum(catalogue.columns(len(VIEWS)).norms_squared, 0.0))
            known[:] = [(catalogue, norms)]

        def query() -> None:
            catalogue, norms = known[0]
            plan = MatchPlan.build(catalogue.head.size, MAP.dimension)
            key = QueryKey.fresh(plan)
            exchange = client.match(MAP.map_id, catalogue.head, key.encrypt(sketch.centred_mean).to_bytes(), plan.answer_bytes)
            key.decrypt(exchange.proof.answer, norms)

        def call(kind: str) -> None:
            if kind == "sync" or not known:
                sync()
            if kind == "query":
                try:
                    query()
                except StaleCatalogue:
                    sync()
                    query()

        return call

    return [querier(number) for number in range(role.workers)]


def askers(role: Role) -> list[Worker]:
    """Queriers that ask a guard through the relay and open its answer."""

    def asker(number: int) -> Worker:
        client = role.client(number)
        introduction = client.introduction(role.answering)
        require_introduction(introduction, role.answerer, role.answering, int(time.time()))

        def call(kind: str) -> None:
            del kind
            sealed = ask(introduction, TEXT, 64)
            if sealed.open(client.ask(role.answering, sealed.sealed, PATIENCE_S)).text != TEXT:
                raise ValueError("another answer than was given")

        return call

    return [asker(number) for number in range(role.workers)]


def visitors(role: Role) -> list[Worker]:
    """Visitors of the market's page, who look at what costs most, one page after the other."""

    def visitor(number: int) -> Worker:
        seen = number

        def call(kind: str) -> None:
            nonlocal seen
            del kind
            seen += 1
            with urllib.request.urlopen(role.page + SEEN[seen % len(SEEN)], timeout=PATIENCE_S) as answer:
                answer.read()

        return call

    return [visitor(number) for number in range(role.workers)]


ROLES: dict[str, tuple[Callable[[Role], list[Worker]], tuple[str, ...]]] = {
    "owners": (owners, ("register", "re-send")),
    "queriers": (queriers, ("query", "sync")),
    "askers": (askers, ("ask",)),
    "visitors": (visitors, ("page",)),
}


def code_of(call: Worker, kind: str) -> str:
    """Return how a call ended."""
    try:
        call(kind)
    except VeilmartError as error:
        return error.code
    except urllib.error.HTTPError as error:
        return f"http-{error.code}"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is counted, and the run goes on
        return type(error).__name__
    return DONE


def open_loop(start: float, arrivals: Sequence[tuple[float, str]], workers: Sequence[Worker]) -> list[Outcome]:
    """Return how calls ended that begin at `start` + their time by the monotonic clock, or as soon after it as a worker is free.

    arrivals: (seconds, kind), ascending.
    """
    waiting: SimpleQueue[tuple[float, str] | None] = SimpleQueue()
    found: list[Outcome] = []  # appending is atomic

    def work(call: Worker) -> None:
        while (arrival := waiting.get()) is not None:
            planned, kind = arrival
            code = code_of(call, kind)
            found.append(Outcome(kind, planned, time.monotonic() - start - planned, code))

    threads = [threading.Thread(target=work, args=(call,)) for call in workers]
    for thread in threads:
        thread.start()
    for arrival in arrivals:
        time.sleep(max(start + arrival[0] - time.monotonic(), 0.0))
        waiting.put(arrival)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()
    return found


def main(folder: Path) -> None:
    """Be one process of clients: say ready, wait for the start on stdin, and leave the outcomes in the folder."""
    role = Role.read(folder)
    make, kinds = ROLES[role.name]
    workers = make(role)
    for worker in workers:  # once each, or the first call of everybody would fall into one moment
        worker(kinds[0])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    start = float(sys.stdin.readline())
    arrivals = [(float(at), str(kind)) for at, kind in json.loads((folder / "arrivals.json").read_text())]
    (folder / "outcomes.json").write_text(json.dumps(open_loop(start, arrivals, workers)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
