import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from nodes.ledger import Budget, Ledger
from protocol.errors import BudgetSpent, UsageError
from protocol.privacy import Guarantee

ONE = Guarantee(1.0, 1e-6)


def make(label: bytes):
    return lambda number, previous: (label.ljust(32, b"."), label + bytes([number]) + previous)


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger.db", Budget(2.1, 1e-6))


def test_the_same_request_gets_the_same_bytes_and_pays_once(ledger):
    first = ledger.charge(b"r", ONE, make(b"a"))
    spent = ledger.price(ONE).spent
    assert ledger.charge(b"r", ONE, make(b"another draw")) == first == ledger.stored(b"r") == ledger.latest()
    assert ledger.price(ONE).spent == spent == pytest.approx(1.0, abs=1e-3)


def test_releases_form_a_chain(ledger):
    ledger.charge(b"r1", ONE, make(b"a"))
    assert ledger.charge(b"r2", ONE, make(b"b")) == b"b" + bytes([2]) + b"a".ljust(32, b".")


def test_a_refused_release_draws_nothing_and_spends_nothing(ledger):
    drawn = []

    def draw(number, previous):
        drawn.append(number)
        return make(b"x")(number, previous)

    for request in (b"1", b"2", b"3"):
        ledger.charge(request, ONE, draw)
    before = ledger.price(ONE).spent
    with pytest.raises(BudgetSpent) as refused:
        ledger.charge(b"4", ONE, draw)
    assert refused.value.spent == pytest.approx(ledger.price(ONE).spent)
    assert len(drawn) == sqlite3.connect(ledger._path).execute("SELECT COUNT(*) FROM charge").fetchone()[0]
    assert before <= ledger.price(ONE).spent <= 2.1


def test_a_draw_that_fails_charges_nothing(ledger):
    def fail(number, previous):
        raise RuntimeError("the disk is full, say")

    with pytest.raises(RuntimeError):
        ledger.charge(b"r", ONE, fail)
    assert ledger.price(ONE).spent == 0.0
    assert ledger.stored(b"r") is None


def test_the_budget_outlives_the_process(tmp_path):
    Ledger.open(tmp_path / "l.db", Budget(1.2, 1e-6)).charge(b"r", ONE, make(b"a"))
    with pytest.raises(BudgetSpent):
        Ledger.open(tmp_path / "l.db", Budget(1.2, 1e-6)).charge(b"s", ONE, make(b"b"))


def test_every_connection_is_fully_synchronous(ledger):
    with ledger._transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 3  # EXTRA: FULL leaves the removal of the journal unsynced


def test_a_larger_delta_does_not_make_what_was_spent_smaller(tmp_path):
    for number in range(4):
        Ledger.open(tmp_path / "l.db", Budget(2.4, 1e-6)).charge(bytes([number]), ONE, make(b"a"))
    strict, lax = (Ledger.open(tmp_path / "l.db", Budget(2.4, delta)).price(Guarantee(1.0, 1e-2)) for delta in (1e-6, 1e-2))
    assert lax.spent == strict.spent > 2.0


@pytest.mark.parametrize("epsilon", [0.0, float("nan"), float("inf"), 100.0])
def test_a_budget_that_means_nothing_is_refused(epsilon):
    with pytest.raises(UsageError):
        Budget(epsilon, 1e-6)


def test_only_the_owner_can_read_the_ledger(ledger):
    assert ledger._path.stat().st_mode & 0o077 == 0


def test_a_file_that_is_no_ledger_is_refused(tmp_path):
    (tmp_path / "l.db").write_bytes(b"not a database" * 100)
    with pytest.raises(UsageError, match="not a usable ledger"):
        Ledger.open(tmp_path / "l.db", Budget(1, 1e-6))


RELEASER = """
    import os, signal, sys
    from pathlib import Path
    from nodes.ledger import Budget, Ledger
    from protocol.privacy import Guarantee
    where = sys.argv[2]
    ledger = Ledger.open(Path(sys.argv[1]), Budget(8.0, 1e-6))
    def draw(number, previous):
        envelope = os.urandom(16)
        if where == "after the draw": os.kill(os.getpid(), signal.SIGKILL)
        return os.urandom(32), envelope
    envelope = ledger.charge(b"r", Guarantee(1.0, 1e-6), draw)
    if where == "after the commit": os.kill(os.getpid(), signal.SIGKILL)
    print(envelope.hex(), flush=True)          # "sent"
    if where == "after sending": os.kill(os.getpid(), signal.SIGKILL)
"""
# The broken order: send first, record later.
CHARGE = 'envelope = ledger.charge(b"r", Guarantee(1.0, 1e-6), draw)'
SEND_FIRST = """
    envelope = ledger.stored(b"r") or os.urandom(16)
    print(envelope.hex(), flush=True)
    if where == "after sending": os.kill(os.getpid(), signal.SIGKILL)
    ledger.charge(b"r", Guarantee(1.0, 1e-6), lambda n, p: (os.urandom(32), envelope))
"""
assert CHARGE in RELEASER
BROKEN = RELEASER.replace("    " + CHARGE + "\n", SEND_FIRST)
CRASHES = ("after the draw", "after the commit", "after sending")


def sent_around(crash: str, code: str, path) -> set[str]:
    """Run the releaser into a crash and once more to its end; return the distinct byte strings that left."""
    sent: set[str] = set()
    for where in (crash, "nowhere"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(path), where]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        sent.update(done.stdout.split())
    return sent


@pytest.mark.parametrize("crash", CRASHES)
def test_whatever_crashes_one_byte_string_leaves_and_it_is_charged(tmp_path, crash):
    path = tmp_path / "l.db"
    assert len(sent_around(crash, RELEASER, path)) == 1
    assert Ledger.open(path, Budget(8.0, 1e-6)).price(ONE).spent == pytest.approx(1.0, abs=1e-3)


def test_sending_before_recording_is_caught_by_that_test(tmp_path):
    assert len(sent_around("after sending", BROKEN, tmp_path / "l.db")) == 2


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from nodes.ledger import Budget, Ledger
    from protocol.errors import UsageError
    from protocol.privacy import Guarantee
    ledger = Ledger.open(Path(sys.argv[1]), Budget(8.0, 1e-6))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        print("sent", ledger.charge(b"r", Guarantee(1.0, 1e-6), lambda n, p: (bytes(32), bytes(8000))).hex()[:4])
    except UsageError as error:
        print("refused", error.hint)
"""


@pytest.mark.parametrize(("room", "outcome", "spent"), [(0, "refused", 0.0), (1 << 20, "sent", 1.0)])
def test_a_full_disk_charges_nothing_and_lets_nothing_out(tmp_path, room, outcome, spent):
    path = tmp_path / "l.db"
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == outcome
    assert Ledger.open(path, Budget(8.0, 1e-6)).price(ONE).spent == pytest.approx(spent, abs=1e-3)
