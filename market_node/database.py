"""Where a market's records lie: SQLite in its folder, or PostgreSQL, which several market processes may share.

A folder says by the file `database.url` that its records lie in PostgreSQL; whatever works on the folder finds them there.  Both databases
promise the same (docs/decisions/0020-replicas.md): a transaction that writes has the database to itself from its first read on, one that
reads sees one state, and what was committed is on the disk.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import Connection, Engine, MetaData, create_engine, event, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool

from market_node.migrations import MARKET, QUOTAS
from protocol.errors import MarketUnreachable, NotFound, UsageError
from protocol.keys import write_durably

URL_FILE = "database.url"
FILES = {MARKET: "market.db", QUOTAS: "quotas.db"}
WRITES = "veilmart_writes"
OTHERWISE = "put back a copy of the file, or start in a new folder"
# PostgreSQL ---
LOCKS = {MARKET: (7_665, 1), QUOTAS: (7_665, 2)}  # of its writers; numbers of ours, in a database of ours
# A process that was stopped in the middle of a transaction holds the lock: the server ends its transaction after this.
IDLE_S = 10
WAIT_S = 20  # for the lock; whoever waits longer is told to come again
AWAY_S = 10  # until a server that says nothing is given up
CONNECTIONS = 4  # kept of one list of one process
ROWS_A_COPY = 500


def is_shared(home: Path) -> bool:
    """Return whether several processes may serve this market at once."""
    return (home / URL_FILE).is_file()


def is_there(home: Path) -> bool:
    """Return whether a market's records were made for this folder."""
    return is_shared(home) or (home / FILES[MARKET]).exists()


def name_of(home: Path, chain: str = MARKET) -> str:
    """Return how an error names a database; never with what a URL says."""
    return f"{home / URL_FILE}" if is_shared(home) else f"{home / FILES[chain]}"


def use(home: Path, url: str) -> None:
    """Let the records of a folder lie in PostgreSQL from now on.

    Raises UsageError for a URL with a password or to another machine without its certificate, and where the folder has records elsewhere.
    """
    _parameters(url)
    file = home / URL_FILE
    if (home / FILES[MARKET]).exists():
        hint = "`veilmart market backup`, and `veilmart market restore --database` into another --home"
        raise UsageError(f"--database: this market's records lie in {home / FILES[MARKET]}", hint=hint)
    if file.exists() and file.read_text().strip() != url:
        raise UsageError(f"--database: another one is named in {file}", hint="leave the option out, or edit the file if the server moved")
    if not file.exists():
        write_durably(file, f"{url}\n".encode())


def open_engine(home: Path, chain: str, *, reads_only: bool = False) -> Engine:
    """Return an engine for a database of a market, made if it is not there.

    reads_only: the database itself keeps it from writing, whatever is asked of it.
    Raises UsageError for a server that loses commits, MarketUnreachable for one that does not answer.
    """
    if is_shared(home):
        return _postgres(home, chain, reads_only)
    return _read_only_file(home / FILES[chain]) if reads_only else file_engine(home / FILES[chain], synced=chain == MARKET)


@contextmanager
def opened(home: Path, chain: str, *, reads_only: bool = False, hint: str = OTHERWISE) -> Iterator[Engine]:
    """Yield an engine to begin with; where the beginning fails nothing stays open, and the error is one of `readable`."""
    with readable(home, chain, hint):
        engine = open_engine(home, chain, reads_only=reads_only)
        try:
            yield engine
        except BaseException:
            engine.dispose()
            raise


def writing(engine: Engine) -> Engine:
    """Return the engine for transactions that write: each has its database to itself before it reads."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(**{WRITES: True})
    # Not REPEATABLE READ: its snapshot would be from before the wait for the lock.  What is read under the lock is the newest.
    return engine.execution_options(**{WRITES: True}, isolation_level="READ COMMITTED")


@contextmanager
def readable(home: Path, chain: str = MARKET, hint: str = OTHERWISE) -> Iterator[None]:
    """Turn what a database says into UsageError, or MarketUnreachable where it does not answer."""
    try:
        yield
    except DatabaseError as error:
        if is_away(error):
            raise away() from None
        raise UsageError(f"{name_of(home, chain)}: expected a market's database, got: {_words(error)}", hint=hint) from None


def is_away(error: BaseException | None) -> bool:
    """Return whether this error says that PostgreSQL does not answer, or ended a connection."""
    if not isinstance(error, DatabaseError) or not hasattr(error.orig, "sqlstate") or disk_is_full(error):
        return False
    return isinstance(error, OperationalError) or error.connection_invalidated


def away() -> MarketUnreachable:
    """Return the error that a caller gets then."""
    return MarketUnreachable("market: its database does not answer", hint="nothing was acknowledged; try again in a few seconds")


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether this error, or the one that it was raised over, says that there is no room left in a database or beside it."""
    if isinstance(error, UsageError):
        return disk_is_full(error.__context__)
    if isinstance(error, DatabaseError):
        full = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        return full or getattr(error.orig, "sqlstate", None) == "53100"
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def copy_records(source: Engine, target: Engine, tables: MetaData) -> None:
    """Copy all records of these tables, as of one moment, in one transaction; the target's tables are there and empty."""
    with source.connect() as old, writing(target).begin() as new:
        for table in tables.sorted_tables:
            for rows in old.execute(select(table)).mappings().partitions(ROWS_A_COPY):
                new.execute(table.insert(), [dict(row) for row in rows])


def _words(error: DatabaseError) -> str:
    # PostgreSQL adds lines with the values of a record.
    return str(error.orig).partition("\n")[0]


# SQLite --------------------------------------------------------------------------------------------------------------------


def file_engine(file: Path, *, synced: bool = True) -> Engine:
    """Return an engine for a file of SQLite.  synced: whether a commit is on the disk."""
    engine = create_engine(f"sqlite:///{file}", hide_parameters=True)  # they would reach the log in an error's text
    event.listen(engine, "connect", configure)
    if not synced:
        event.listen(engine, "connect", _without_sync)
    event.listen(engine, "begin", begin)
    return engine


def _read_only_file(file: Path) -> Engine:
    address = f"file:{quote(str(file.absolute()))}?mode=ro"

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(address, uri=True, check_same_thread=False, isolation_level=None)
        connection.execute("PRAGMA busy_timeout=10000")
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, hide_parameters=True)
    event.listen(engine, "begin", begin)
    return engine


def configure(connection: Any, record: object) -> None:
    """Set up a new connection to a file."""
    del record
    connection.isolation_level = None  # transactions are ours, see `begin`
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _without_sync(connection: Any, record: object) -> None:
    # Nobody is promised that a charge outlives a power cut, and a sync of the disk for each would be one of four for a release.
    del record
    connection.execute("PRAGMA synchronous=NORMAL")


def begin(connection: Any) -> None:
    """Begin a transaction in a file."""
    # SQLite's driver begins transactions too late for a read followed by a write, so we begin them: a writer takes its lock before it
    # reads, or another could append in between; a reader takes none, or it would stop the writer.
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


# PostgreSQL ----------------------------------------------------------------------------------------------------------------


def _postgres(home: Path, chain: str, reads_only: bool) -> Engine:
    """Return an engine whose tables lie in a schema of the chain's name."""
    psycopg = _driver()
    # Commits of quotas wait for no disk, as in a file: nobody is promised that a charge outlives a power cut.
    settings = {
        "search_path": chain,
        "synchronous_commit": "off" if chain == QUOTAS else "on",
        "idle_in_transaction_session_timeout": f"{IDLE_S}s",
        "lock_timeout": f"{WAIT_S}s",
        "default_transaction_read_only": "on" if reads_only else "off",
    }
    parameters = _parameters((home / URL_FILE).read_text().strip())
    parameters["options"] = " ".join(f"-c {name}={value}" for name, value in settings.items())

    def connect() -> Any:
        return psycopg.connect(**parameters)

    engine = create_engine(
        "postgresql+psycopg://", creator=connect, poolclass=QueuePool, pool_size=CONNECTIONS, pool_pre_ping=True, hide_parameters=True,
        isolation_level="REPEATABLE READ",  # a reader sees one state: head, log and notices of one checkpoint
    )  # fmt: skip

    @event.listens_for(engine, "begin")
    def lock(connection: Connection) -> None:
        if connection.get_execution_options().get(WRITES):
            # It lives and ends with the transaction: whoever lost it cannot commit.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCKS[chain][0]}, {LOCKS[chain][1]})")

    try:
        with engine.connect() as db:
            _require_durable(db, home)
            there = db.exec_driver_sql("SELECT 1 FROM pg_namespace WHERE nspname = %s", (chain,)).first() is not None
        if there:
            return engine
        if reads_only:
            raise NotFound(f"{home}: no market here yet", hint="`veilmart market up` makes one")
        with writing(engine).begin() as db:
            db.exec_driver_sql(f"CREATE SCHEMA IF NOT EXISTS {chain}")
    except BaseException:
        engine.dispose()
        raise
    engine.dispose()  # SQLAlchemy asked for the name of the schema when it connected first
    return _postgres(home, chain, reads_only)


def _require_durable(db: Connection, home: Path) -> None:
    for name in ("fsync", "full_page_writes"):
        if db.exec_driver_sql(f"SHOW {name}").scalar() != "on":
            raise UsageError(f"{home / URL_FILE}: the server runs with {name} = off, and loses what it acknowledged", hint=f"{name} = on")


def _parameters(url: str) -> dict[str, Any]:
    """Return what libpq is given.  Raises UsageError for a URL that says a password, or leads to another machine without TLS."""
    psycopg = _driver()
    try:
        found = dict(psycopg.conninfo.conninfo_to_dict(url))
    except psycopg.Error:
        raise UsageError("--database: expected postgresql://USER@HOST/NAME") from None  # the URL may hold what nobody should read
    if "password" in found or "PGPASSWORD" in os.environ:
        hint = "libpq reads it from ~/.pgpass, mode 0600, or from the file that `passfile=` in the URL names"
        raise UsageError("--database: expected no password in the URL or the environment", hint=hint)
    hosts = str(found.get("host") or "").split(",")
    if not all(hosts) or "service" in found:
        raise UsageError("--database: expected a host, or ?host=/run/postgresql for a socket")
    if not all(map(_is_here, hosts)) or "hostaddr" in found:
        if found.get("sslmode", "verify-full") != "verify-full":
            raise UsageError("--database: another machine needs sslmode=verify-full", hint="and sslrootcert= names its authority")
        found["sslmode"] = "verify-full"
    return {
        "connect_timeout": AWAY_S, "keepalives_idle": AWAY_S, "tcp_user_timeout": 1000 * AWAY_S, **found,
        "client_encoding": "UTF8", "target_session_attrs": "primary",  # a standby may be behind
    }  # fmt: skip


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.startswith("/") or host == "localhost"


def _driver() -> Any:
    try:
        import psycopg
        import psycopg.conninfo
    except ImportError:
        raise UsageError("--database: psycopg is not installed", hint="pip install 'veilmart[postgres]'") from None
    return psycopg
