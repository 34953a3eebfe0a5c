"""The schemas of a market's databases: a chain of migrations each, which only grows (docs/decisions/0012-migrations.md).

A database says in `alembic_version` which migration it is at.  An empty one is made as the tables are declared today, which is what the
chain comes to.  One with tables and without a version is from before there were migrations: the first migration of each chain makes what
is not there and leaves what is; PostgreSQL has none of these.  tests/market_node/test_migrations.py holds the hash of every one.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from sqlalchemy import Column, Connection, Engine, MetaData, String, Table, insert, inspect, select

from protocol.errors import UsageError

FOLDER = Path(__file__).parent
MARKET, QUOTAS = "market", "quotas"  # chains, a folder each
VERSION = Table("alembic_version", MetaData(), Column("version_num", String(32), primary_key=True))  # as alembic makes it
_ALONE = threading.Lock()  # alembic keeps the connection that it works on in a global


def revisions(chain: str) -> list[str]:
    """Return the names of a chain's migrations, the oldest first."""
    return sorted(path.stem for path in (FOLDER / chain).glob(f"{chain}_[0-9]*.py"))


def upgrade(engine: Engine, chain: str) -> None:
    """Bring a database to the newest schema in one transaction; for one that is there already nothing is written.

    Raises UsageError, and changes nothing, for a database that a
    newer version wrote.
    """
    known = revisions(chain)
    with engine.connect() as db:
        if _version(db, known) == known[-1]:
            return
    from market_node.database import writing  # whose module knows the chains

    with _ALONE, writing(engine).begin() as db:
        found = _version(db, known)  # asked again: another process may have come first
        if found is None and not inspect(db).get_table_names():
            declared(chain).create_all(db)
            VERSION.create(db)
            db.execute(insert(VERSION).values(version_num=known[-1]))
        elif found != known[-1]:
            _migrate(db, chain)


def require_newest(engine: Engine, chain: str) -> None:
    """Raise UsageError unless a database is at the newest schema: whoever may only read cannot bring it there."""
    known = revisions(chain)
    with engine.connect() as db:
        found = _version(db, known)
    if found != known[-1]:
        raise UsageError(f"its schema is {found or 'without a version'}, expected {known[-1]}", hint="`veilmart market up` brings it there")


def declared(chain: str) -> MetaData:
    """Return the tables of a chain's database as today's code knows them."""
    from market_node.certificates import ISSUED  # beside the store's tables, as members are
    from market_node.members import MEMBERS
    from market_node.quotas import HANDED_IN

    assert MEMBERS.metadata is ISSUED.metadata
    return MEMBERS.metadata if chain == MARKET else HANDED_IN.metadata


def _version(db: Connection, known: list[str]) -> str | None:
    if not inspect(db).has_table(VERSION.name):
        return None
    found = db.execute(select(VERSION.c.version_num)).scalar_one_or_none()
    if found is not None and found not in known:
        raise UsageError(
            f"{db.engine.url.database}: its schema is {found}, of a newer version; this one knows {known[0]} to {known[-1]}",
            hint="start the version that wrote it, or restore a backup that is older; nothing was changed",
        )
    return found


def _migrate(db: Connection, chain: str) -> None:
    # Loaded here alone: it costs 0.4 s, and a market that is at its newest schema, or new, never needs it.
    logging.getLogger("alembic").setLevel(logging.WARNING)  # else it tells of its plugins
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "market_node:migrations")
    config.set_main_option("path_separator", "newline")
    config.set_main_option("version_locations", str(FOLDER / chain).replace("%", "%%"))
    config.attributes["connection"] = db
    command.upgrade(config, "head")
