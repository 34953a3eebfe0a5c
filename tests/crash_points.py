"""Crash points of a release, from the draw to the receipt: a process of its own for every schedule, killed where the schedule says.

Owner and market run in one process that is forked anew for each run and kills itself (SIGKILL) at its N-th point; what it left on the disk
is what the next run finds.  Both are the real ones, guard, ledger, client, service and store; between client and service there is no
network but a wire that keeps every byte string which leaves.  `python -m tests.crash_points FOLDER MODEL [--pairs] [--send-first]` prints
what the schedules came to, as JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event

from market_node.quotas import Limits, Quotas
from market_node.store import Store
from nodes import guard as guards
from nodes import ledger as ledgers
from nodes import market_client as clients
from nodes.base_model import BaseModel
from nodes.guard import Order, Policy
from nodes.ledger import Budget, Ledger
from nodes.market_client import MarketClient
from protocol.keys import write_durably
from protocol.privacy import Guarantee
from protocol.transparency import Receipt
from tests.market_node.local import LocalStub, QuietService
from tests.nodes.owners import make_guard, tiny_map, write_records

ORDER = Order(Guarantee(1.0, 1e-6))
BUDGET = Budget(8.0, 1e-6)
RECORDS = 150  # admitted by a market whatever the noise


class Points:
    """Places where the process may die; the one with the number `at`, from 1, is where it does."""

    def __init__(self, at: int, seen: Path) -> None:
        self.at, self._seen, self._count = at, seen, 0

    def __call__(self, name: str) -> None:
        self._count += 1
        with self._seen.open("a") as file:
            file.write(f"{name}\n")
        if self._count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Wire(LocalStub):
    """The market's calls; every release that is sent is kept in a file first."""

    def __init__(self, service, kept: Path, point: Points) -> None:
        super().__init__(service)
        self._kept, self._point = kept, point

    def Publish(self, request, timeout=None):
        self._point("about to send")
        with self._kept.open("a") as file:
            file.write(request.envelope.hex() + "\n")
        self._point("on the wire")
        answer = self.__getattr__("Publish")(request)
        self._point("answered")
        return answer


def watch(point: Points) -> None:
    """Put points into this process."""
    charging = []

    class Connection(sqlite3.Connection):
        def execute(self, sql, *rest):
            committing = sql == "COMMIT" and charging
            if committing:
                point("ledger: before its commit")
            found = super().execute(sql, *rest)
            if committing:
                charging.clear()
                point("ledger: after its commit")
            if sql.startswith("INSERT INTO entry"):
                charging.append(True)
                point("ledger: charge and bytes written, not committed")
            return found

    connect, replace = sqlite3.connect, os.replace
    ledgers.sqlite3.connect = lambda *args, **how: connect(*args, **how, factory=Connection)

    def replacing(source, target):
        kind = Path(target).suffix
        if kind in (".checkpoint", ".receipt"):
            point(f"before a {kind[1:]} is kept")
        replace(source, target)
        if kind in (".checkpoint", ".receipt"):
            point(f"a {kind[1:]} is kept")

    os.replace = replacing

    def after(module, name: str, what: str) -> None:
        real = getattr(module, name)

        def called(*args, **how):
            answer = real(*args, **how)
            point(what)
            return answer

        setattr(module, name, called)

    after(guards, "claim", "records claimed")
    after(guards, "estimate", "drawn")
    after(guards, "sign_release", "signed")
    after(Store, "append_all", "market: stored")


def publish(world: Path, model: BaseModel, at: int, send_first: bool) -> None:
    """As `veilmart node publish`: compare with the market, release, send, keep the receipt; die at point `at` (0: at none)."""
    point = Points(at, world / "points")
    feature_map = tiny_map(model)
    watch(point)
    point("start")
    store = Store.open(world / "m")
    event.listen(store._engine, "commit", lambda db: point("market: before its commit"))
    key = Ed25519PrivateKey.from_private_bytes((world / "m" / "market.key").read_bytes())
    service = QuietService(store, feature_map, key, simulation=False, quotas=Quotas.open(world / "m", Limits()))
    clients.connect, clients.MarketStub = lambda address, ca, apart: None, lambda channel: Wire(service, world / "wire", point)
    client = MarketClient("market:1", world / "m" / "market.key", world / "home")
    guard = make_guard(world / "home", world / "notes.jsonl", model, policy=Policy(budget=BUDGET), embed=embed_cheaply(model))
    guard.require_current(client.releases_of(guard.owners, feature_map))
    late = charge_late(guard) if send_first else None
    envelope = guard.release(ORDER)
    receipt = client.publish(envelope)
    if late is not None:
        late()
    write_durably(world / "home" / f"{receipt.index}.receipt", receipt.to_bytes())


def embed_cheaply(model: BaseModel) -> Callable:
    """Return embeddings that cost nothing: where they come from is no part of this."""

    def embed(records, *, layer, kind, on_progress=None):
        return np.random.default_rng(1).standard_normal((len(records), 2, model.width)).astype(np.float32)

    return embed


def charge_late(guard) -> Callable[[], None]:
    """Control: let the guard send what it drew, and charge for it once the market has answered."""
    ledger, waiting = guard._ledger, []
    charge = ledger.charge

    def draw_only(request, price, make, *, first_only=False):
        release_id, envelope = make(*ledger.next_release())
        waiting.append((request, price, lambda number, previous: (release_id, envelope)))
        return envelope

    ledger.charge = draw_only
    return lambda: charge(*waiting[0])


def run(world: Path, model: BaseModel, at: int, send_first: bool) -> bool:
    """Return whether a run came to its end; False for one that was killed at its point."""
    child = os.fork()
    if child == 0:
        try:
            publish(world, model, at, send_first)
        except BaseException as error:  # noqa: BLE001 - told by the exit code, since the process must end here
            (world / "failed").write_text(f"{type(error).__name__}: {error}")
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    return True


def outcome(world: Path) -> tuple[int, int, int, bool]:
    """Return distinct byte strings that left, how many of them the ledger does not know, its entries, and whether all is finished."""
    sent = set((world / "wire").read_text().split()) if (world / "wire").exists() else set()
    entries = Ledger.open(world / "home" / "ledger.db", BUDGET).entries()
    charged = {entry.envelope.hex() for entry in entries}
    store = Store.open(world / "m")
    held = [envelope.hex() for envelope in store.envelopes(0, store.head().size)]
    store.close()
    receipts = [Receipt.from_bytes(path.read_bytes()) for path in (world / "home").glob("*.receipt")]
    for receipt in receipts:
        receipt.verify()
    finished = [receipt.envelope.hex() for receipt in receipts] == held == list(sent) and not (world / "failed").exists()
    return len(sent), len(sent - charged), len(entries), finished


def schedules(folder: Path, model: BaseModel, pairs: bool, send_first: bool) -> dict:
    """Return what all schedules of one crash, or of two, came to."""
    empty = folder / "empty"
    (empty / "m").mkdir(parents=True)
    write_durably(empty / "m" / "market.key", Ed25519PrivateKey.generate().private_bytes_raw())
    write_records(empty / "notes.jsonl", RECORDS)
    Store.open(empty / "m").close()
    found = {"schedules": 0, "strings": 0, "undercounted": 0, "overcounted": 0, "unfinished": 0}
    names: set[str] = set()

    def judge(world: Path) -> None:
        assert run(world, model, 0, send_first)
        strings, unknown, entries, finished = outcome(world)
        names.update((world / "points").read_text().splitlines())
        found["schedules"] += 1
        found["strings"] = max(found["strings"], strings)
        found["undercounted"] += unknown > 0
        found["overcounted"] += entries > 1
        found["unfinished"] += not finished

    def copied(source: Path, name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return Path(shutil.copytree(source, folder / name))

    first = 0
    while True:
        first += 1
        crashed = copied(empty, "crashed")
        if run(crashed, model, first, send_first):
            break
        second = 0
        while pairs:
            second += 1
            world = copied(crashed, "world")
            ended = run(world, model, second, send_first)
            judge(world)
            if ended:
                break
        if not pairs:
            judge(copied(crashed, "world"))
    return {**found, "points": first - 1, "names": sorted(names)}


def main() -> None:
    torch.set_num_threads(1)
    folder, model = Path(sys.argv[1]), BaseModel.open(Path(sys.argv[2]))
    print(json.dumps(schedules(folder, model, "--pairs" in sys.argv, "--send-first" in sys.argv)))  # noqa: T201


if __name__ == "__main__":
    main()
