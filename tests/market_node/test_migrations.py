"""A market's databases through their schemas: migrations never change, no record is touched, and what is newer is left alone."""

import hashlib
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event

from market_node import migrations
from market_node.backup import back_up, restore
from market_node.database import WRITES, begin, configure
from market_node.members import Members
from market_node.migrations import MARKET, QUOTAS, VERSION, declared, revisions, upgrade
from market_node.quotas import Limits, Quota, Quotas
from market_node.store import Store
from protocol.errors import QuotaExceeded, UsageError
from protocol.transparency import root_of_all

VECTORS = Path(__file__).parents[1] / "vectors"
# Released migrations.  A line is added for a new one; none is ever changed: databases that are out there went through these bytes.
HASHES = {
    "market_0001": "146c91f0e221013ce636f9e6f3f1f77b0ad0c3d4f92dce30c9f866a0f74f9c7c",
    "quotas_0001": "7685b0c3598bf9a3b8147c17aaeec458b38925f1b944b0da0a1936e88a057325",
}
FILES = {MARKET: "market.db", QUOTAS: "quotas.db"}
OPEN = {MARKET: Store.open, QUOTAS: lambda home: Quotas.open(home, Limits())}
CHAINS = pytest.mark.parametrize("chain", FILES)


def differing(folder: Path) -> set[str]:
    """Return the migrations that are not the ones listed: changed, missing, or not listed."""
    found = {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*/*_[0-9]*.py")}
    return {name for name in found.keys() | HASHES.keys() if found.get(name) != HASHES.get(name)}


def test_no_migration_was_ever_edited():
    assert differing(migrations.FOLDER) == set()


def test_an_edited_a_removed_and_an_unlisted_migration_are_noticed(tmp_path):
    """Control."""
    for path in migrations.FOLDER.glob("*/*_[0-9]*.py"):
        (tmp_path / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.parent.name)
    assert differing(tmp_path) == set()
    with (tmp_path / "market" / "market_0001.py").open("a") as file:
        file.write("\n")
    (tmp_path / "quotas" / "quotas_0001.py").rename(tmp_path / "quotas" / "quotas_0002.py")
    assert differing(tmp_path) == {"market_0001", "quotas_0001", "quotas_0002"}


# Golden databases: what version 0.1 wrote (tests/vectors/make_databases.py), as text ---------------------------------------


def golden(chain: str, folder: Path) -> Path:
    """Return a folder with the database of version 0.1, made before there were migrations."""
    folder.mkdir(exist_ok=True)
    with closing(sqlite3.connect(folder / FILES[chain])) as db:
        db.executescript((VECTORS / f"{chain}-1.sql").read_text())
    return folder


def records(file: Path, like: dict | None = None) -> dict[str, tuple[tuple[str, ...], list[tuple]]]:
    """Return columns and rows of every table but the version's; `like`: only the tables and columns that are in there."""
    with closing(sqlite3.connect(file)) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'") if name != VERSION.name]
        if like is not None:
            names = [name for name in names if name in like]
        found = {}
        for name in names:
            columns = tuple(row[1] for row in db.execute(f"PRAGMA table_info({name})")) if like is None else like[name][0]
            quoted = ", ".join(f'"{column}"' for column in columns)
            found[name] = (columns, db.execute(f"SELECT {quoted} FROM {name} ORDER BY rowid").fetchall())
        return found


def schema(file: Path) -> set[tuple[str, str]]:
    """Return what defines tables and indices, blanks apart."""
    with closing(sqlite3.connect(file)) as db:
        rows = db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
        return {(name, " ".join(sql.split()).replace(" )", ")")) for name, sql in rows}


def version(file: Path) -> str:
    with closing(sqlite3.connect(file)) as db:
        return db.execute("SELECT version_num FROM alembic_version").fetchone()[0]


@CHAINS
def test_a_database_from_before_migrations_is_stamped_and_keeps_every_record(tmp_path, chain):
    file = golden(chain, tmp_path) / FILES[chain]
    before = records(file)
    assert all(rows for _, rows in before.values()), "every table of the golden database holds something"
    for _ in range(2):
        OPEN[chain](tmp_path).close()
        assert (records(file), version(file)) == (before, revisions(chain)[-1])


def test_the_golden_market_is_served_from(tmp_path):
    golden(MARKET, tmp_path)
    store, members = Store.open(tmp_path), Members.open(tmp_path)
    envelopes = store.envelopes(0, store.head().size)
    assert store.root(5) == root_of_all(envelopes)
    assert (len(envelopes), len(store.notices()), store.cosigned(), len(members.all())) == (5, 2, [b"a note of a witness"], 5)
    owner = members.all()[0].owner
    store.close()
    members.close()
    golden(QUOTAS, tmp_path)
    quotas = Quotas.open(tmp_path, Limits(releases=1))
    with pytest.raises(QuotaExceeded):
        quotas.require(owner, Quota.RELEASES, 1, 1_800_000_010)
    quotas.close()


@CHAINS
def test_a_new_database_is_what_the_chain_comes_to(tmp_path, chain):
    """A new one is made from the declared tables, without the chain: the two must never differ."""
    (tmp_path / "new").mkdir()
    OPEN[chain](tmp_path / "new").close()
    old = golden(chain, tmp_path / "old")
    OPEN[chain](old).close()
    assert version(tmp_path / "new" / FILES[chain]) == version(old / FILES[chain]) == revisions(chain)[-1]
    by_chain = schema(old / FILES[chain])
    with_version = {(name, sql.replace("CONSTRAINT alembic_version_pkc ", "")) for name, sql in by_chain}
    assert schema(tmp_path / "new" / FILES[chain]) == {(name, sql) for name, sql in with_version if name != "release_adapter"}


@CHAINS
def test_the_tables_that_the_code_declares_are_those_of_the_chain(tmp_path, chain):
    """By the chain alone, on an empty database; and a column that no migration made is seen."""
    engine = engine_of(tmp_path / "by-chain.db")
    with engine.execution_options(**{WRITES: True}).begin() as db:
        migrations._migrate(db, chain)
    assert differences(engine, chain) == []
    with engine.begin() as db:
        table = next(iter(declared(chain).tables))
        db.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN by_nobody INTEGER")
    assert differences(engine, chain)
    engine.dispose()


def engine_of(file: Path, transactions: bool = True):
    engine = create_engine(f"sqlite:///{file}")
    event.listen(engine, "connect", configure)
    if transactions:
        event.listen(engine, "begin", begin)
    return engine


def differences(engine, chain: str) -> list:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with engine.connect() as db:
        return compare_metadata(MigrationContext.configure(db), declared(chain))


# One schema further --------------------------------------------------------------------------------------------------------

NEXT = """
import sqlalchemy as sa
from alembic import op
revision, down_revision = "{chain}_0002", "{chain}_0001"
def upgrade() -> None:
    op.add_column("{table}", sa.Column("licence", sa.String, nullable=True))
    op.create_table("tenant", sa.Column("name", sa.String, primary_key=True))
    {more}
"""


def with_next(chain: str, folder: Path, monkeypatch, more: str = "pass") -> None:
    """Add a migration that changes something to a copy of the chain, for the rest of the test."""
    shutil.copytree(migrations.FOLDER, folder / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    table = {MARKET: "release", QUOTAS: "handed_in"}[chain]
    (folder / "migrations" / chain / f"{chain}_0002.py").write_text(NEXT.format(chain=chain, table=table, more=more))
    monkeypatch.setattr(migrations, "FOLDER", folder / "migrations")


@CHAINS
@pytest.mark.parametrize("stamped", [False, True], ids=["from before migrations", "stamped"])
def test_the_next_schema_keeps_every_record_byte_for_byte(tmp_path, monkeypatch, chain, stamped):
    home = golden(chain, tmp_path / "home")
    if stamped:
        OPEN[chain](home).close()
    before = records(home / FILES[chain])
    with_next(chain, tmp_path, monkeypatch)
    OPEN[chain](home).close()
    assert version(home / FILES[chain]) == f"{chain}_0002"
    assert records(home / FILES[chain], like=before) == before
    assert "tenant" in dict(schema(home / FILES[chain]))


@CHAINS
@pytest.mark.parametrize("harm", ["DELETE FROM {table} WHERE rowid = 2", "UPDATE {table} SET owner = zeroblob(32) WHERE rowid = 3"])
def test_a_migration_that_loses_or_changes_a_record_is_noticed(tmp_path, monkeypatch, chain, harm):
    """Control."""
    home = golden(chain, tmp_path / "home")
    before = records(home / FILES[chain])
    table = {MARKET: "release", QUOTAS: "handed_in"}[chain]
    with_next(chain, tmp_path, monkeypatch, f'op.execute("{harm.format(table=table)}")')
    engine = engine_of(home / FILES[chain])
    upgrade(engine, chain)
    engine.dispose()
    assert records(home / FILES[chain], like=before) != before


@CHAINS
@pytest.mark.parametrize("transactions", [True, False], ids=["one transaction", "control: none"])
def test_a_migration_that_fails_on_the_way_changes_nothing(tmp_path, monkeypatch, chain, transactions):
    home = golden(chain, tmp_path / "home")
    before = (records(home / FILES[chain]), schema(home / FILES[chain]))
    with_next(chain, tmp_path, monkeypatch, "raise OSError('the disk is full, say')")
    engine = engine_of(home / FILES[chain], transactions)
    with pytest.raises(OSError, match="full"):
        upgrade(engine, chain)
    engine.dispose()
    unchanged = (records(home / FILES[chain]), schema(home / FILES[chain])) == before
    assert unchanged == transactions


OPENERS = {
    "the market": (MARKET, Store.open),
    "a command beside it": (MARKET, Store.beside),
    "its members": (MARKET, Members.open),
    "its quotas": (QUOTAS, lambda home: Quotas.open(home, Limits())),
}


@pytest.mark.parametrize(("chain", "opener"), OPENERS.values(), ids=OPENERS)
def test_a_newer_schema_is_refused_and_left_as_it_is(tmp_path, monkeypatch, chain, opener):
    home = golden(chain, tmp_path / "home")
    with monkeypatch.context() as newer:
        with_next(chain, tmp_path, newer)
        OPEN[chain](home).close()
    before = (home / FILES[chain]).read_bytes()
    with pytest.raises(UsageError, match=rf"{FILES[chain]}: its schema is {chain}_0002, of a newer version") as caught:
        opener(home)
    assert "nothing was changed" in caught.value.hint
    assert (home / FILES[chain]).read_bytes() == before


def test_a_backup_of_a_newer_schema_is_not_restored(tmp_path, monkeypatch):
    home = golden(MARKET, tmp_path / "home")
    with monkeypatch.context() as newer:
        with_next(MARKET, tmp_path, newer)
        back_up(home, tmp_path / "backup", keys=False)
    with pytest.raises(UsageError, match="newer version"):
        restore(tmp_path / "backup", tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_many_who_open_an_old_database_at_once_migrate_it_once(tmp_path):
    golden(MARKET, tmp_path)
    before, failures = records(tmp_path / "market.db"), []

    def open_it() -> None:
        try:
            Members.open(tmp_path).close()
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    program = "import sys; from pathlib import Path; from market_node.store import Store; Store.open(Path(sys.argv[1])).close()"
    others = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [other.wait(120) for other in others] == [0, 0]
    assert failures == []
    assert (records(tmp_path / "market.db"), version(tmp_path / "market.db")) == (before, "market_0001")


def test_a_database_at_its_newest_schema_is_opened_without_alembic_and_without_a_write(tmp_path):
    Store.open(tmp_path).close()
    program = (
        "import sys; from pathlib import Path; from market_node.members import Members; Members.open(Path(sys.argv[1])).close();"
        " print(sorted(name for name in sys.modules if name.startswith('alembic')))"
    )
    before = (tmp_path / "market.db").read_bytes()
    for home in (tmp_path, tmp_path / "new"):
        done = subprocess.run([sys.executable, "-c", program, str(home)], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
    assert (tmp_path / "market.db").read_bytes() == before
