"""PostgreSQL under a market: what is refused, one log whoever appends, copies from one database to the other, and a server that goes away.

What both databases have to do is tested on both (test_store.py, test_members.py).
"""

import signal
import stat
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import DatabaseError

from market_node import database, migrations
from market_node.backup import back_up, restore
from market_node.database import URL_FILE, copy_records, disk_is_full, is_away, open_engine, use, writing
from market_node.members import Members
from market_node.migrations import MARKET, QUOTAS, declared, revisions
from market_node.quotas import Limits, Quota, Quotas
from market_node.store import RELEASES, Store, _Growing
from protocol.catalogue import scalars_of
from protocol.errors import MarketUnreachable, NotFound, QuotaExceeded, UsageError
from protocol.release import open_envelope
from protocol.transparency import root_of_all
from tests.market_node.test_migrations import differences, golden, with_next
from tests.market_node.test_store import ENVELOPES, MAP, append
from tests.postgres import running
from tests.protocol.worlds import envelope_of

SECRET = "open-sesame"


@pytest.fixture
def home(tmp_path, postgres):
    """A market's folder over an empty PostgreSQL."""
    use(tmp_path, postgres.url())
    return tmp_path


@pytest.fixture
def two(home):
    """The stores of two processes over one PostgreSQL."""
    stores = Store.open(home), Store.open(home)
    yield stores
    for store in stores:
        store.close()


# URLs ----------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "a password": (f"postgresql://veilmart:{SECRET}@localhost/market", "no password"),
    "a password further behind": (f"postgresql://veilmart@localhost/market?password={SECRET}", "no password"),
    "no host": ("postgresql:///market", "expected a host"),
    "another machine without TLS": ("postgresql://veilmart@db.example/market?sslmode=require", "sslmode=verify-full"),
    "another machine among ours": ("postgresql://veilmart@localhost,db.example/market?sslmode=prefer", "sslmode=verify-full"),
    "another machine by its address": ("postgresql://veilmart@localhost/market?hostaddr=10.0.0.1&sslmode=disable", "sslmode=verify-full"),
    "no URL": (f"mysql://veilmart:{SECRET}@localhost/market", "expected postgresql"),
}


@pytest.mark.parametrize(("url", "why"), REFUSED.values(), ids=REFUSED)
def test_a_url_is_refused_without_being_quoted(tmp_path, url, why):
    with pytest.raises(UsageError, match=why) as caught:
        use(tmp_path, url)
    assert SECRET not in f"{caught.value} {caught.value.hint} {caught.value.__cause__}"
    assert not (tmp_path / URL_FILE).exists()


def test_a_password_in_the_environment_is_refused(tmp_path, monkeypatch):
    url = "postgresql://veilmart@localhost/market"
    use(tmp_path, url)
    monkeypatch.setenv("PGPASSWORD", SECRET)
    with pytest.raises(UsageError, match="no password"):
        use(tmp_path, url)


def test_another_machine_has_to_show_its_certificate(tmp_path):
    assert database._parameters("postgresql://veilmart@db.example/market")["sslmode"] == "verify-full"
    assert "sslmode" not in database._parameters("postgresql://veilmart@[::1]/market"), "the control"


def test_a_folder_keeps_its_url_for_its_owner_alone_and_takes_no_other(tmp_path):
    url = "postgresql://veilmart@/market?host=/run/postgresql"
    use(tmp_path, url)
    use(tmp_path, url)
    assert stat.S_IMODE((tmp_path / URL_FILE).stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="another one is named"):
        use(tmp_path, url + "2")
    (tmp_path / URL_FILE).unlink()
    Store.open(tmp_path).close()
    with pytest.raises(UsageError, match=r"records lie in .*market\.db"):
        use(tmp_path, url)


def test_a_server_that_is_not_there_is_said_to_be_away(tmp_path):
    use(tmp_path, f"postgresql://veilmart@/market?host={tmp_path}")
    for opened in (Store.open, Members.open, Store.reading, lambda home: Quotas.open(home, Limits())):
        with pytest.raises(MarketUnreachable, match="database does not answer"):
            opened(tmp_path)


# One log -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_one_process_appends_the_other_has_at_once(two):
    for number, envelope in enumerate(ENVELOPES):
        assert append(two[number % 2], envelope).position == number
        assert two[0].log() == two[1].log()
    assert two[1].root(4) == root_of_all(ENVELOPES)
    assert append(two[1], ENVELOPES[0]).position == 0, "whoever lost the receipt may ask anybody"


def publish_together(stores, each: int) -> list[Exception]:
    """Append as many releases through every store at once; return what went wrong."""
    failures: list[Exception] = []

    def publish(store: Store, first: int) -> None:
        for seed in range(first, first + each):
            try:
                append(store, envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))
            except Exception as error:  # noqa: BLE001 - judged by the test
                failures.append(error)

    threads = [threading.Thread(target=publish, args=(store, 100 * place)) for place, store in enumerate(stores)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return failures


@pytest.mark.slow
def test_two_processes_that_append_at_once_make_one_log(two):
    assert publish_together(two, 15) == []
    envelopes = two[0].envelopes(0, 100)
    assert len(envelopes) == 30
    assert two[0].root(30) == root_of_all(envelopes)


@pytest.mark.slow
def test_control_without_the_lock_they_collide(two, monkeypatch):
    for store in two:
        store._writing = store._writing.execution_options(**{database.WRITES: False})
    assert publish_together(two, 15), "the primary key refuses the second of two at one position"


def begun(store: Store, envelope: bytes):
    """Return a transaction that has placed a release and was stopped before its commit, and where it placed it."""
    release, db = open_envelope(envelope), store._writing.connect()
    db.begin()
    return db, _Growing(db).place(release, envelope, scalars_of(release, MAP))


@pytest.mark.slow
def test_a_process_that_was_paused_holds_nobody_up_and_does_not_fork_the_log(home, monkeypatch):
    monkeypatch.setattr(database, "IDLE_S", 1)
    paused, other = Store.open(home), Store.open(home)
    db, position = begun(paused, ENVELOPES[0])
    assert append(other, ENVELOPES[1]).position == position == 0  # once the server has ended the transaction that slept
    with pytest.raises(DatabaseError) as caught:
        db.commit()
    assert is_away(caught.value)
    db.close()
    assert append(paused, ENVELOPES[0]).position == 1, "it goes on over a new connection"
    assert other.root(2) == root_of_all([ENVELOPES[1], ENVELOPES[0]])
    paused.close()
    other.close()


@pytest.mark.slow
def test_control_without_lock_and_primary_key_it_would_fork(two, postgres):
    paused, other = two
    for table, key in (("release", "release_pkey"), ("log_node", "log_node_pkey"), ("terms", "terms_pkey"), ("terms", "terms_body_key")):
        postgres.run(f"ALTER TABLE market.{table} DROP CONSTRAINT {key}")
    paused._writing = paused._writing.execution_options(**{database.WRITES: False})
    db, position = begun(paused, ENVELOPES[0])
    assert append(other, ENVELOPES[1]).position == position
    db.commit()
    db.close()
    assert postgres.run("SELECT position, count(*) FROM market.release GROUP BY position") == "0|2"


@pytest.mark.slow
def test_a_reader_sees_one_state_whatever_is_appended_meanwhile(two):
    append(two[0], ENVELOPES[0])
    with two[0]._engine.connect() as reader:
        assert reader.exec_driver_sql("SELECT count(*) FROM release").scalar() == 1
        append(two[1], ENVELOPES[1])
        assert reader.exec_driver_sql("SELECT count(*) FROM release").scalar() == 1


# What a commit is worth, and who may write -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["fsync", "full_page_writes"])
def test_a_server_that_loses_commits_is_refused(home, postgres, setting):
    Store.open(home).close()
    try:
        postgres.run(f"ALTER SYSTEM SET {setting} = off")
        postgres.run("SELECT pg_reload_conf()")
        with pytest.raises(UsageError, match=f"{setting} = off"):
            Store.open(home)
    finally:
        postgres.run("ALTER SYSTEM RESET ALL")
        postgres.run("SELECT pg_reload_conf()")


@pytest.mark.slow
def test_commits_of_releases_wait_for_the_disk_whatever_the_server_does_by_itself(home, postgres):
    try:
        postgres.run("ALTER SYSTEM SET synchronous_commit = off")
        postgres.run("SELECT pg_reload_conf()")
        for chain, expected in ((MARKET, "on"), (QUOTAS, "off")):
            engine = open_engine(home, chain)
            for one in (engine, writing(engine)):
                with one.connect() as db:
                    assert db.exec_driver_sql("SHOW synchronous_commit").scalar() == expected
            engine.dispose()
    finally:
        postgres.run("ALTER SYSTEM RESET ALL")
        postgres.run("SELECT pg_reload_conf()")


@pytest.mark.slow
def test_whoever_only_reads_cannot_write(home):
    with pytest.raises(NotFound, match="no market here yet"):
        Store.reading(home)
    store = Store.open(home)
    append(store, ENVELOPES[0])
    reading = Store.reading(home)
    assert reading.envelopes(0, 9) == ENVELOPES[:1]
    for writer, outcome in (
        (reading, pytest.raises(DatabaseError, match="read-only")),
        (store, pytest.raises(UsageError, match="control")),
    ):
        with outcome, writer._writing.begin() as db:
            db.execute(RELEASES.delete())
            raise UsageError("control: this one could, and is rolled back")
    reading.close()
    store.close()


@pytest.mark.slow
def test_what_an_owner_handed_in_at_one_process_counts_at_the_other(home):
    first, second = (Quotas.open(home, Limits(releases=2)) for _ in range(2))
    first.charge(bytes(32), Quota.RELEASES, 2, 1_000)
    with pytest.raises(QuotaExceeded):
        second.require(bytes(32), Quota.RELEASES, 1, 1_010)
    second.require(bytes(31) + b"x", Quota.RELEASES, 1, 1_010)
    first.close()
    second.close()


# Schemas --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_database_has_the_tables_that_the_code_declares_and_goes_through_the_next_migration(home, tmp_path, monkeypatch, postgres):
    for opened in (Store.open, lambda home: Quotas.open(home, Limits())):
        opened(home).close()
    for chain in (MARKET, QUOTAS):
        engine = open_engine(home, chain)
        assert differences(engine, chain) == []
        engine.dispose()
        assert postgres.run(f"SELECT version_num FROM {chain}.alembic_version") == revisions(chain)[-1]
    store = Store.open(home)
    append(store, ENVELOPES[0])
    store.close()
    with monkeypatch.context() as newer:
        with_next(MARKET, tmp_path, newer)
        Store.open(home).close()
        assert postgres.run("SELECT count(licence), count(*) FROM market.release") == "0|1"
    with pytest.raises(UsageError, match="its schema is market_0002, of a newer version"):
        Store.open(home)
    assert postgres.run("SELECT version_num FROM market.alembic_version") == "market_0002"


@pytest.mark.slow
def test_many_who_open_a_new_database_at_once_make_it_once(home):
    failures: list[Exception] = []

    def open_it() -> None:
        try:
            Members.open(home).close()
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []


# From one database to the other --------------------------------------------------------------------------------------------


def records(home) -> dict[str, list]:
    engine = open_engine(home, MARKET)
    with engine.connect() as db:
        found = {table.name: sorted(map(tuple, db.execute(table.select())), key=repr) for table in declared(MARKET).sorted_tables}
    engine.dispose()
    return found


@pytest.mark.slow
def test_a_market_moves_to_postgresql_and_back_with_every_record(tmp_path, postgres):
    old = golden(MARKET, tmp_path / "old")
    Store.open(old).close()
    before = records(old)
    assert all(rows for name, rows in before.items() if name != "certificate")
    back_up(old, tmp_path / "backup", keys=False)
    restore(tmp_path / "backup", tmp_path / "moved", database=postgres.url())
    assert not (tmp_path / "moved" / "market.db").exists()
    assert records(tmp_path / "moved") == before
    back_up(tmp_path / "moved", tmp_path / "again", keys=False)
    restore(tmp_path / "again", tmp_path / "back")
    assert records(tmp_path / "back") == before
    store = Store.open(tmp_path / "back")
    assert store.root(5) == root_of_all(store.envelopes(0, 5))
    store.close()
    with pytest.raises(UsageError, match="there is a market already"):
        restore(tmp_path / "again", tmp_path / "moved")
    url = (tmp_path / "moved" / URL_FILE).read_text().strip()
    with pytest.raises(UsageError, match="there is a market already"):
        restore(tmp_path / "again", tmp_path / "other", database=url)
    assert not (tmp_path / "other" / URL_FILE).exists()


@pytest.mark.slow
def test_a_copy_is_of_one_moment(two, tmp_path):
    """A release that comes while a backup is written is in it with its log, or not at all."""
    stop = threading.Event()

    def publish() -> None:
        for seed in range(200):
            if stop.is_set():
                return
            append(two[1], envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))

    append(two[0], ENVELOPES[0])
    thread = threading.Thread(target=publish)
    thread.start()
    try:
        for number in range(3):
            target = database.file_engine(tmp_path / f"{number}.db")
            migrations.upgrade(target, MARKET)
            copy_records(two[0]._engine, target, declared(MARKET))
            copy = Store(target, tmp_path)
            assert copy.root(copy.head().size) == root_of_all(copy.envelopes(0, 1000))
            copy.close()
    finally:
        stop.set()
        thread.join()


# A server that goes away --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_crashes_loses_nothing_and_is_waited_for(tmp_path):
    with running() as server:
        use(tmp_path, server.url())
        store, members = Store.open(tmp_path), Members.open(tmp_path)
        acknowledged = [append(store, envelope).position for envelope in ENVELOPES[:3]]
        server.stop(signal.SIGQUIT)
        with pytest.raises(DatabaseError) as caught:
            append(store, ENVELOPES[3])
        assert is_away(caught.value)
        assert not disk_is_full(caught.value)
        with pytest.raises(MarketUnreachable):
            members.all()
        server.start()
        assert append(store, ENVELOPES[3]).position == 3, "without a restart of the market"
        assert acknowledged == [0, 1, 2]
        assert store.root(4) == root_of_all(ENVELOPES)
        store.close()
        members.close()


def test_a_full_disk_of_a_server_is_none_that_is_away():
    from psycopg.errors import AdminShutdown, DiskFull, UniqueViolation
    from sqlalchemy.exc import IntegrityError, OperationalError

    full, ended = OperationalError("INSERT", {}, DiskFull()), OperationalError("SELECT", {}, AdminShutdown())
    refused = IntegrityError("INSERT", {}, UniqueViolation())
    assert [(disk_is_full(error), is_away(error)) for error in (full, ended, refused)] == [(True, False), (False, True), (False, False)]
