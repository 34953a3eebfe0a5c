"""Acknowledged means on the disk: the market's store and the owner's ledger under power cuts, each with a build that must lose."""

import json
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from market_node.members import INVITES, Members
from market_node.store import Store
from nodes.ledger import Budget, Ledger, inspect
from protocol.errors import VeilmartError
from protocol.transparency import root_of_all
from tests.power_cut import images, shared_sqlite, write_image

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shared_sqlite() is None, reason="Python's SQLite is built in without its symbols: nothing can be recorded")

# Each program runs alone in a process, since the recorder sits below every connection of its process; it prints its record.
RECORD = """
import json, os, sys
from pathlib import Path
from tests.power_cut import Recorder
recorder, home = Recorder(), Path(sys.argv[1])
{program}
for entry in recorder.log:
    print(json.dumps([part.hex() if isinstance(part, bytes) else part for part in entry]))
sys.stdout.flush()
os._exit(0)  # connections that are closed while Python ends would call back into what is gone
"""
MARKET = """
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from market_node import database, store as stores
from protocol.catalogue import scalars_of
from protocol.release import open_envelope
from tests.protocol.worlds import envelope_of, small_map
from sqlalchemy import event
feature_map = small_map()
weaken = {weaken!r}
if weaken:
    configure = database.configure
    def weaker(connection, record):
        configure(connection, record)
        connection.execute("PRAGMA synchronous=" + weaken)
    database.configure = weaker
store = stores.Store.open(home)
for seed in range(40):
    envelope = envelope_of(feature_map, Ed25519PrivateKey.generate(), seed=seed)
    release = open_envelope(envelope)
    store.append(release, envelope, scalars_of(release, feature_map))
    recorder.ack(envelope)
"""
TOGETHER = (
    MARKET.rpartition("for seed")[0]
    + """
for start in range(0, 40, 8):
    envelopes = [envelope_of(feature_map, Ed25519PrivateKey.generate(), seed=seed) for seed in range(start, start + 8)]
    releases = [open_envelope(envelope) for envelope in envelopes]
    store.append_all([(release, envelope, scalars_of(release, feature_map)) for release, envelope in zip(releases, envelopes)])
    for envelope in envelopes:
        recorder.ack(envelope)
"""
)
# Members lie in the market's database and are opened as the store opens it.  Quotas lie beside and may lose what was charged last.
MEMBERS = """
from market_node import database, store as stores
from market_node.members import *
weaken = {weaken!r}
if weaken:
    configure = database.configure
    def weaker(connection, record):
        configure(connection, record)
        connection.execute("PRAGMA synchronous=" + weaken)
    database.configure = weaker
members = Members.open(home)
for number in range(30):
    secret = members.invite(f"clinic {{number}}", 1_900_000_000)
    recorder.ack(secret_hash(secret))
    recorder.ack(members.enrol(secret, number.to_bytes(32, "big"), "", 1_800_000_000).owner)
"""
LEDGER = """
import sqlite3
from nodes import ledger as ledgers
from protocol.privacy import Guarantee
weaken = {weaken!r}
if weaken:
    real = ledgers.sqlite3.connect
    class Weaker(sqlite3.Connection):
        def execute(self, sql, *rest):
            return super().execute(sql.replace("synchronous=EXTRA", "synchronous=" + weaken), *rest)
    ledgers.sqlite3.connect = lambda *args, **how: real(*args, **how, factory=Weaker)
ledger = ledgers.Ledger.open(home / "ledger.db", ledgers.Budget(20.0, 1e-6))
for number in range(25):
    envelope = bytes([number]) * 900
    ledger.charge(bytes([number]), ledgers.specification_charge(Guarantee(0.2, 1e-6)), lambda n, previous: (bytes([n]) * 32, envelope))
    recorder.ack(envelope)
"""


def recorded(program: str, home: Path, weaken: str = "") -> list[tuple]:
    home.mkdir()
    source = RECORD.format(program=program.format(weaken=weaken))
    done = subprocess.run([sys.executable, "-c", source, str(home)], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [tuple(json.loads(line)) for line in done.stdout.splitlines()]
    return [(*e[:3], bytes.fromhex(e[3])) if e[0] == "write" else (e[0], bytes.fromhex(e[1])) if e[0] == "ack" else e for e in log]


def market_holds(folder: Path) -> set[bytes]:
    store = Store.open(folder)
    try:
        envelopes = store.envelopes(0, store.head().size)
        assert store.root(len(envelopes)) == root_of_all(envelopes)
        assert store._engine.connect().exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
        return set(envelopes)
    finally:
        store.close()


def members_hold(folder: Path) -> set[bytes]:
    members = Members.open(folder)
    try:
        invited = {bytes(row.secret_hash) for row in members._engine.connect().execute(INVITES.select())}
        return invited | {member.owner for member in members.all()}
    finally:
        members.close()


def ledger_holds(folder: Path) -> set[bytes]:
    ledger = Ledger.open(folder / "ledger.db", Budget(20.0, 1e-6))  # verifies the chain
    with sqlite3.connect(folder / "ledger.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert inspect(folder / "ledger.db") == ledger.entries()
    return {entry.envelope for entry in ledger.entries()}


BOTH = [
    pytest.param(MARKET, market_holds, id="market"),
    pytest.param(TOGETHER, market_holds, id="releases that come together"),
    pytest.param(LEDGER, ledger_holds, id="ledger"),
]
BESIDE = [
    pytest.param(MEMBERS, members_hold, id="members", marks=pytest.mark.slow),
]


def losses(log: list[tuple], count: int, holds, folder: Path) -> tuple[int, int]:
    """Return in how many images something acknowledged is missing, and how many cannot be opened or are not sound."""
    lost = broken = 0
    for files, acknowledged in images(log, count, random.Random(count)):
        shutil.rmtree(folder, ignore_errors=True)
        write_image(files, folder)
        try:
            lost += bool(acknowledged - holds(folder))
        except (VeilmartError, AssertionError, sqlite3.DatabaseError):
            broken += 1
    return lost, broken


def test_the_recorder_sees_what_sqlite_does(tmp_path):
    log = recorded(LEDGER, tmp_path / "home")
    kinds = {entry[0] for entry in log}
    assert kinds == {"write", "sync", "delete", "ack"}
    final = {}
    for files, _ in images([*log, ("sync", "ledger.db")], 1, random.Random(0)):
        final = files
    assert final, "an image has files"
    whole = list(images(log, 400, random.Random(1)))[-1]
    assert len(whole[1]) >= 24


@pytest.mark.parametrize(("program", "holds"), [*BOTH, *BESIDE])
def test_no_cut_loses_what_was_acknowledged(tmp_path, program, holds):
    log = recorded(program, tmp_path / "home")
    assert losses(log, 150, holds, tmp_path / "image") == (0, 0)


# NORMAL does not sync the write-ahead log at a commit; FULL does not sync the folder after a rollback journal is removed.
@pytest.mark.parametrize(
    ("program", "holds", "weaken"),
    [
        pytest.param(MARKET, market_holds, "NORMAL", id="market"),
        pytest.param(TOGETHER, market_holds, "NORMAL", id="releases that come together"),
        pytest.param(LEDGER, ledger_holds, "FULL", id="ledger"),
        pytest.param(MEMBERS, members_hold, "NORMAL", id="members", marks=pytest.mark.slow),
    ],
)
def test_a_weaker_build_loses(tmp_path, program, holds, weaken):
    """Control."""
    log = recorded(program, tmp_path / "home", weaken)
    lost, broken = losses(log, 150, holds, tmp_path / "image")
    assert lost + broken > 5


@pytest.mark.slow
@pytest.mark.parametrize(("program", "holds"), BOTH)
def test_five_thousand_cuts_lose_nothing(tmp_path, program, holds):
    log = recorded(program, tmp_path / "home")
    assert losses(log, 5000, holds, tmp_path / "image") == (0, 0)


@pytest.mark.nightly
@pytest.mark.parametrize(("program", "holds"), BESIDE)
def test_five_thousand_cuts_lose_no_member(tmp_path, program, holds):
    log = recorded(program, tmp_path / "home")
    assert losses(log, 5000, holds, tmp_path / "image") == (0, 0)
