"""Populations: which record is charged to which ledger.

An epsilon is a statement about one population's ledger.  If two ledgers of one owner charged the same record, its true loss would be
what both say together, and neither would know.  So every home keeps one list of what was charged to whom: a digest of each record and,
where the unit is a field, of each value of it.  What this can see is the same record or the same unit in the same home.  A record that
was edited, another home, or a person who appears under two names is not seen (docs/privacy.md).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path

from nodes.ledger import DEFAULT_POPULATION, declared
from nodes.records import OwnedRecords
from protocol.codec import domain_tag
from protocol.errors import PopulationConflict, UsageError
from protocol.privacy import RECORD, PrivacyUnit

SCHEMA = "CREATE TABLE IF NOT EXISTS claim (digest BLOB PRIMARY KEY, population TEXT NOT NULL) STRICT, WITHOUT ROWID"


def folder_of(home: Path, population: str) -> Path:
    """Return the folder of a population's ledger, key and adapters."""
    return home / "node" if population == DEFAULT_POPULATION else home / "node" / "populations" / population


def unit_of(folder: Path) -> PrivacyUnit:
    """Return the privacy unit of the ledger in a population's folder, which is for life; the record where it has charged nothing yet."""
    there = declared(folder / "ledger.db")
    return there[1] if there else RECORD


def claims_of(home: Path) -> Path:
    """Return the file of the claims of all populations of a home."""
    return home / "node" / "claims.db"


def digests_of(owned: OwnedRecords) -> list[bytes]:
    """Return what identifies the records, and the units where these are a field.  Private: they confirm a guess."""
    texts = [json.dumps([type(record).__name__, *astuple(record)]) for record in owned.records]
    digests = [hashlib.sha256(domain_tag("claimed-record", 1) + text.encode()).digest()[:16] for text in texts]
    if owned.units is not None:
        digests += [hashlib.sha256(domain_tag("claimed-unit", 1) + unit.encode()).digest()[:16] for unit in owned.units]
    return sorted(set(digests))


def require_unclaimed(path: Path, population: str, digests: Sequence[bytes]) -> None:
    """Raise PopulationConflict if another population of this home was charged for one of these."""
    with _claims(path) as db:
        _check(db, population, digests)


def claim(path: Path, population: str, digests: Sequence[bytes]) -> None:
    """Note, durably, that this population is charged for these; raise PopulationConflict if another one is.

    Called before the charge: a crash in between leaves a claim without a charge, which wastes nothing but a name.
    """
    with _claims(path) as db:
        _check(db, population, digests)
        db.executemany("INSERT OR IGNORE INTO claim VALUES (?, ?)", ((digest, population) for digest in digests))


def claimed_by(path: Path, population: str) -> list[bytes]:
    """Return what this population claimed in this home."""
    with _claims(path) as db:
        return [bytes(digest) for (digest,) in db.execute("SELECT digest FROM claim WHERE population = ?", (population,))]


def _check(db: sqlite3.Connection, population: str, digests: Sequence[bytes]) -> None:
    others: dict[str, int] = {}
    for digest in digests:
        found = db.execute("SELECT population FROM claim WHERE digest = ? AND population != ?", (digest, population)).fetchone()
        if found:
            others[found[0]] = others.get(found[0], 0) + 1
    if others:
        name, count = max(others.items(), key=lambda item: item[1])
        raise PopulationConflict(
            f"population {population!r}: {count} of its records or units are charged to population {name!r} already",
            hint=f"what they lose would be the sum of both ledgers: use --population {name}, or take these records out of the file",
        )


@contextmanager
def _claims(path: Path) -> Iterator[sqlite3.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA synchronous=EXTRA")
        db.execute("BEGIN IMMEDIATE")
        db.execute(SCHEMA)
        yield db
        db.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise UsageError(f"{path}: {error}", hint="nothing was charged; free the disk or the lock, or restore the file") from None
    finally:
        db.close()
