import signal
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing, suppress

import pytest

from nodes.ledger import (
    Budget,
    Charge,
    Ledger,
    Origin,
    Price,
    Rule,
    claims_in,
    declared,
    inspect,
    restore,
    set_aside,
    specification_charge,
)
from nodes.populations import claim, claimed_by, require_unclaimed
from protocol.errors import BudgetSpent, LedgerBehind, LedgerDamaged, PopulationConflict, UsageError
from protocol.privacy import RECORD, Guarantee, PoissonSampledGaussian, PrivacyUnit, composed_epsilon, filter_epsilon

ONE = specification_charge(Guarantee(1.0, 1e-6))


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
    assert len(drawn) == sqlite3.connect(ledger._path).execute("SELECT COUNT(*) FROM entry").fetchone()[0]
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
    strict, lax = (
        Ledger.open(tmp_path / "l.db", Budget(2.4, delta)).price(specification_charge(Guarantee(1.0, 1e-2))) for delta in (1e-6, 1e-2)
    )
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
    from nodes.ledger import Budget, Ledger, specification_charge
    from protocol.privacy import Guarantee
    where = sys.argv[2]
    ledger = Ledger.open(Path(sys.argv[1]), Budget(8.0, 1e-6))
    def draw(number, previous):
        envelope = os.urandom(16)
        if where == "after the draw": os.kill(os.getpid(), signal.SIGKILL)
        return os.urandom(32), envelope
    envelope = ledger.charge(b"r", specification_charge(Guarantee(1.0, 1e-6)), draw)
    if where == "after the commit": os.kill(os.getpid(), signal.SIGKILL)
    print(envelope.hex(), flush=True)          # "sent"
    if where == "after sending": os.kill(os.getpid(), signal.SIGKILL)
"""
# The broken order: send first, record later.
CHARGE = 'envelope = ledger.charge(b"r", specification_charge(Guarantee(1.0, 1e-6)), draw)'
SEND_FIRST = """
    envelope = ledger.stored(b"r") or os.urandom(16)
    print(envelope.hex(), flush=True)
    if where == "after sending": os.kill(os.getpid(), signal.SIGKILL)
    ledger.charge(b"r", specification_charge(Guarantee(1.0, 1e-6)), lambda n, p: (os.urandom(32), envelope))
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
    from nodes.ledger import Budget, Ledger, specification_charge
    from protocol.errors import UsageError
    from protocol.privacy import Guarantee
    ledger = Ledger.open(Path(sys.argv[1]), Budget(8.0, 1e-6))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
    try:
        print("sent", ledger.charge(b"r", specification_charge(Guarantee(1.0, 1e-6)), lambda n, p: (bytes(32), bytes(8000))).hex()[:4])
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


# The chain -------------------------------------------------------------------------------------------------------------


def three_charges(path) -> Ledger:
    ledger = Ledger.open(path, Budget(8.0, 1e-6))
    for label in (b"a", b"b", b"c"):
        ledger.charge(label, ONE, make(label))
    return ledger


def tamper(path, statement: str, *values) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(statement, values)
        db.commit()


CHEAPER = '{"events":[{"kind":"gaussian","multiplier":"1000.0"}]}'
TAMPERED = {
    "a cheaper charge": ("UPDATE entry SET events = ? WHERE number = 2", CHEAPER),
    "another delta": ("UPDATE entry SET delta = '0.01' WHERE number = 2",),
    "another envelope": ("UPDATE entry SET envelope = x'00' WHERE number = 1",),
    "another request": ("UPDATE entry SET request = x'00' WHERE number = 3",),
    "another release": ("UPDATE entry SET release_id = zeroblob(32) WHERE number = 1",),
    "another release number": ("UPDATE entry SET release_number = 7 WHERE number = 3",),
    "another origin": ("UPDATE entry SET origin = 'market' WHERE number = 3",),
    "an entry removed from the middle": ("DELETE FROM entry WHERE number = 2",),
    "the first entry removed": ("DELETE FROM entry WHERE number = 1",),
    "an entry removed and the rest moved up": ("UPDATE entry SET number = 0 WHERE number = 1",),
    "another population": ("UPDATE ledger SET population = 'elsewhere'",),
    "another unit": ("UPDATE ledger SET unit = 'field:person'",),
    "a forged hash": ("UPDATE entry SET hash = zeroblob(32) WHERE number = 3",),
    "no declaration": ("DELETE FROM ledger",),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_an_entry_that_something_else_touched_is_noticed_and_nothing_is_drawn(tmp_path, change):
    path = tmp_path / "l.db"
    ledger, drawn = three_charges(path), []
    tamper(path, *change)
    with pytest.raises((LedgerDamaged, PopulationConflict)):
        Ledger.open(path, Budget(8.0, 1e-6))
    with pytest.raises((LedgerDamaged, PopulationConflict)):  # also by a process that had it open
        ledger.charge(b"d", ONE, lambda number, previous: drawn.append(number) or make(b"d")(number, previous))
    assert drawn == []


def test_an_untouched_chain_verifies(tmp_path):
    """The control: a change that changes nothing is no damage, and every hash depends on the one before."""
    path = tmp_path / "l.db"
    three_charges(path)
    tamper(path, "UPDATE entry SET delta = delta, events = events")
    entries = Ledger.open(path, Budget(8.0, 1e-6)).entries()
    assert [(entry.number, entry.release_number, entry.origin) for entry in entries] == [(n, n, Origin.DRAWN) for n in (1, 2, 3)]
    assert len({entry.hash for entry in entries}) == 3


def test_the_chain_alone_cannot_see_that_the_newest_entries_are_missing(tmp_path):
    """Said plainly, because a restored backup looks like this; the market's list is what shows it."""
    path = tmp_path / "l.db"
    three_charges(path)
    tamper(path, "DELETE FROM entry WHERE number = 3")
    assert len(Ledger.open(path, Budget(8.0, 1e-6)).entries()) == 2


# One population, one unit, for life ------------------------------------------------------------------------------------

OTHERS = {"another population": {"population": "patients"}, "another unit": {"unit": PrivacyUnit("person")}}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_ledger_has_one_population_and_one_unit_for_life(tmp_path, other):
    path = tmp_path / "l.db"
    Ledger.open(path, Budget(8.0, 1e-6)).charge(b"r", ONE, make(b"a"))
    with pytest.raises(PopulationConflict, match="for life"):
        Ledger.open(path, Budget(8.0, 1e-6), **other)


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_ledger_that_charged_nothing_binds_nobody(tmp_path, other):
    path = tmp_path / "l.db"
    Ledger.open(path, Budget(8.0, 1e-6)).price(ONE)  # a dry run, say
    Ledger.open(path, Budget(8.0, 1e-6), **other).charge(b"r", ONE, make(b"a"))
    assert declared(path) == (other.get("population", "default"), other.get("unit", RECORD))


def test_a_race_of_two_declarations_is_decided_by_the_first_charge(tmp_path):
    path = tmp_path / "l.db"
    records, persons = Ledger.open(path, Budget(8.0, 1e-6)), Ledger.open(path, Budget(8.0, 1e-6), unit=PrivacyUnit("person"))
    records.charge(b"r", ONE, make(b"a"))
    with pytest.raises(PopulationConflict):
        persons.charge(b"s", ONE, make(b"b"))


def test_a_name_that_would_leave_its_folder_is_no_population(tmp_path):
    with pytest.raises(UsageError, match="population"):
        Ledger.open(tmp_path / "l.db", Budget(8.0, 1e-6), "../other")


FIRST_FORM = """
CREATE TABLE charge (
    number INTEGER PRIMARY KEY, request BLOB NOT NULL UNIQUE, epsilon REAL NOT NULL, delta REAL NOT NULL, multiplier REAL NOT NULL,
    release_id BLOB NOT NULL, envelope BLOB NOT NULL
) STRICT
"""


def test_a_ledger_of_the_first_form_keeps_every_charge(tmp_path):
    path = tmp_path / "l.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute(FIRST_FORM)
        for number in (1, 2):
            values = (number, bytes([number]), 1.0, 1e-6, 4.2247, bytes([number]) * 32, b"envelope %d" % number)
            db.execute("INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        db.commit()
    for _ in range(2):  # the second time there is nothing left to carry over
        ledger = Ledger.open(path, Budget(8.0, 1e-6))
        assert [entry.envelope for entry in ledger.entries()] == [b"envelope 1", b"envelope 2"]
        assert ledger.price(ONE).spent == pytest.approx(composed_epsilon([4.2247] * 2, 1e-6))
        assert ledger.stored(bytes([1])) == b"envelope 1"
    with pytest.raises(PopulationConflict):
        Ledger.open(path, Budget(8.0, 1e-6), unit=PrivacyUnit("person"))


# Other mechanisms ------------------------------------------------------------------------------------------------------

TRAINING = PoissonSampledGaussian(1.0, 0.016, 300)
WITH_ADAPTER = Charge((*ONE.events, TRAINING), 1e-6)


def test_a_release_with_a_private_adapter_is_one_charge_of_two_events_judged_by_the_filter(tmp_path):
    ledger = Ledger.open(tmp_path / "l.db", Budget(3.0, 1e-6))
    price = ledger.price(WITH_ADAPTER)
    assert (price.rule, price.spent, price.total) == (Rule.RENYI_FILTER, 0.0, pytest.approx(2.9425, abs=1e-3))
    ledger.charge(b"r", WITH_ADAPTER, make(b"a"))
    assert Ledger.open(tmp_path / "l.db", Budget(3.0, 1e-6)).entries()[0].charge == WITH_ADAPTER
    with pytest.raises(BudgetSpent):
        ledger.charge(b"s", ONE, make(b"b"))


def test_gaussians_before_a_training_are_judged_with_it(tmp_path):
    ledger = Ledger.open(tmp_path / "l.db", Budget(8.0, 1e-6))
    ledger.charge(b"r", ONE, make(b"a"))
    assert ledger.price(ONE).rule is Rule.GAUSSIAN
    ledger.charge(b"s", Charge((TRAINING,), 1e-6), make(b"b"))
    price = ledger.price(ONE)
    assert price.rule is Rule.RENYI_FILTER
    assert price.spent == filter_epsilon([*ONE.events, TRAINING], 1e-6) > composed_epsilon([ONE.events[0].multiplier], 1e-6)


def test_what_is_left_is_never_negative():
    assert Price(1.0, 5.0, 5.5, 4.0).left == 0.0
    assert Price(1.0, 1.0, 1.4, 4.0).left == 3.0


# Copies ----------------------------------------------------------------------------------------------------------------


def test_a_backup_restores_every_charge_and_draws_nothing_before_it_was_compared(tmp_path):
    path, copy = tmp_path / "l.db", tmp_path / "copy"
    entries = three_charges(path).entries()
    assert Ledger.open(path, Budget(8.0, 1e-6)).backup(copy) == 3
    assert copy.stat().st_mode & 0o077 == 0
    path.unlink()
    assert restore(copy, path, "default") == 3
    ledger, drawn = Ledger.open(path, Budget(8.0, 1e-6)), []
    assert ledger.entries() == entries
    assert not ledger.compared
    assert ledger.charge(b"a", ONE, make(b"again")) == entries[0].envelope, "what is stored may be sent again"
    with pytest.raises(LedgerBehind, match="restored"):
        ledger.charge(b"d", ONE, lambda number, previous: drawn.append(number) or make(b"d")(number, previous))
    assert drawn == []
    assert path.stat().st_mode & 0o077 == 0


def test_a_copied_file_would_draw_at_once(tmp_path):
    """The control, and the reason for the comparison with the market: whoever copies the file by hand gets no such mark."""
    three_charges(tmp_path / "l.db")
    (tmp_path / "copy.db").write_bytes((tmp_path / "l.db").read_bytes())
    assert Ledger.open(tmp_path / "copy.db", Budget(8.0, 1e-6)).charge(b"d", ONE, make(b"d"))


def test_a_backup_taken_while_another_process_charges_is_consistent(tmp_path):
    path = tmp_path / "l.db"
    three_charges(path)
    code = """
        import sys
        from pathlib import Path
        from nodes.ledger import Budget, Ledger, specification_charge
        from protocol.privacy import Guarantee
        ledger = Ledger.open(Path(sys.argv[1]), Budget(20.0, 1e-6))
        print("ready", flush=True)
        for number in range(60):
            ledger.charge(b"n%d" % number, specification_charge(Guarantee(0.1, 1e-6)), lambda n, p: (bytes([n]) * 32, bytes(3000)))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    counts = [Ledger.open(path, Budget(20.0, 1e-6)).backup(tmp_path / f"copy-{k}") for k in range(5)]
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    assert counts == sorted(counts)
    assert [len(inspect(tmp_path / f"copy-{k}")) for k in range(5)] == counts
    assert len(inspect(path)) == 63


def test_a_backup_never_overwrites_and_never_goes_back(tmp_path):
    path, copy = tmp_path / "l.db", tmp_path / "copy"
    ledger = three_charges(path)
    ledger.backup(copy)
    with pytest.raises(UsageError, match="already there"):
        ledger.backup(copy)
    ledger.charge(b"d", ONE, make(b"d"))
    with pytest.raises(LedgerBehind, match="lacks"):
        restore(copy, path, "default")
    assert len(ledger.entries()) == 4


def test_a_damaged_ledger_is_set_aside_and_a_sound_one_is_not(tmp_path):
    path, copy = tmp_path / "l.db", tmp_path / "copy"
    three_charges(path).backup(copy)
    with pytest.raises(UsageError, match="sound"):
        set_aside(path)
    tamper(path, *TAMPERED["a cheaper charge"])
    assert restore(copy, path, "default") == 3
    assert len(list(tmp_path.glob("l.db.damaged-*"))) == 1


def test_a_restored_home_still_knows_which_records_its_population_charged(tmp_path):
    claims, path, copy = tmp_path / "claims.db", tmp_path / "l.db", tmp_path / "copy"
    claim(claims, "default", [b"one", b"two"])
    claim(claims, "others", [b"three"])
    three_charges(path).backup(copy, lambda: claimed_by(claims, "default"))
    assert claims_in(copy) == [b"one", b"two"]
    claims.unlink()
    path.unlink()
    assert restore(copy, path, "default", lambda digests: claim(claims, "default", digests)) == 3
    for digest in (b"one", b"two"):
        with pytest.raises(PopulationConflict):
            require_unclaimed(claims, "others", [digest])
    require_unclaimed(claims, "others", [b"three"])
    again = tmp_path / "again"  # and the restored ledger can be backed up like any other
    Ledger.open(path, Budget(8.0, 1e-6)).backup(again, lambda: claimed_by(claims, "default"))
    assert claims_in(again) == claims_in(copy)


def test_a_backup_is_not_restored_over_the_claims_of_another_population(tmp_path):
    claims, path, copy = tmp_path / "claims.db", tmp_path / "l.db", tmp_path / "copy"
    three_charges(path).backup(copy, lambda: [b"one"])
    path.unlink()
    claim(claims, "others", [b"one"])
    with pytest.raises(PopulationConflict):
        restore(copy, path, "default", lambda digests: claim(claims, "default", digests))
    assert not path.exists()


def test_a_ledger_whose_writer_was_killed_is_no_damaged_one(tmp_path):
    path, copy = tmp_path / "l.db", tmp_path / "copy"
    entries = three_charges(path).entries()
    Ledger.open(path, Budget(8.0, 1e-6)).backup(copy)
    code = """
        import os, sqlite3, sys
        db = sqlite3.connect(sys.argv[1], isolation_level=None)
        db.execute("PRAGMA cache_size = 1")  # so that half of the transaction is in the file when the writer dies
        db.execute("BEGIN IMMEDIATE")
        for number in range(4, 60):
            db.execute("INSERT INTO entry SELECT ?, release_number, randomblob(32), events, delta, origin, release_id, randomblob(4000), "
                       "hash FROM entry WHERE number = 1", (number,))
        os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=False).returncode == 9
    assert path.with_name("l.db-journal").stat().st_size > 0
    half_written, journal = path.read_bytes(), path.with_name("l.db-journal").read_bytes()
    for look in (lambda: declared(path), lambda: inspect(path), lambda: restore(copy, path, "default")):
        path.write_bytes(half_written)
        path.with_name("l.db-journal").write_bytes(journal)
        assert look() in (("default", RECORD), entries, 3)
    assert list(tmp_path.glob("l.db.damaged-*")) == []
    path.unlink()  # lost, and the journal of its writer is still there
    path.with_name("l.db-journal").write_bytes(journal)
    before = copy.read_bytes()
    assert restore(copy, path, "default") == 3
    assert not path.with_name("l.db-journal").exists()
    assert copy.read_bytes() == before
    path.with_name("l.db-journal").write_bytes(journal)  # the control: the restored ledger is not what is read then
    restored = path.read_bytes()
    with suppress(LedgerDamaged, sqlite3.DatabaseError), closing(sqlite3.connect(path)) as db:
        db.execute("SELECT 1 FROM sqlite_schema").fetchone()
    assert path.read_bytes() != restored


@pytest.mark.parametrize("content", [b"", b"no database" * 500])
def test_what_is_no_backup_is_not_restored(tmp_path, content):
    (tmp_path / "copy").write_bytes(content)
    with pytest.raises(UsageError, match="not a usable backup"):
        restore(tmp_path / "copy", tmp_path / "l.db", "default")
    assert not (tmp_path / "l.db").exists()


def test_the_backup_of_another_population_is_not_restored(tmp_path):
    three_charges(tmp_path / "l.db").backup(tmp_path / "copy")
    with pytest.raises(PopulationConflict, match="default"):
        restore(tmp_path / "copy", tmp_path / "other.db", "patients")
