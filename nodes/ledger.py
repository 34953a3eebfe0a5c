"""The owner's ledger: every charge and the bytes it paid for, in one durable transaction.

One ledger belongs to one population and covers every file, map and specification made from it; adding a record opens no new budget.
Order is part of the protocol (docs/protocol.md 4.3): admission, noise, then *one* commit that holds the charge and the noisy bytes, and
only then may anything be sent.  A crash before the commit leaves neither; a crash after it re-sends the stored bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BudgetSpent, UsageError
from protocol.privacy import Guarantee, composed_epsilon, effective_multiplier, noise_variance
from protocol.specification import NORM_SQUARED

SCHEMA = """
CREATE TABLE IF NOT EXISTS charge (
    number INTEGER PRIMARY KEY,          -- release number, from 1
    request BLOB NOT NULL UNIQUE,        -- digest of data, map and settings: the same request gets the same bytes
    epsilon REAL NOT NULL,
    delta REAL NOT NULL,
    multiplier REAL NOT NULL,            -- effective noise multiplier; charges compose through it
    release_id BLOB NOT NULL,
    envelope BLOB NOT NULL               -- the signed release that this charge paid for
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the owner allows for life, in add-or-remove-one epsilon at one delta."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        Guarantee(self.epsilon, self.delta)  # raises UsageError for what is no epsilon or no delta


@dataclass(frozen=True, slots=True)
class Price:
    """What a release would cost, before anything is drawn."""

    asked: float
    spent: float
    total: float  # spent and asked together; below their sum, since Gaussian releases compose by the root of squares
    limit: float

    @property
    def affordable(self) -> bool:
        """Whether the ledger would admit the release."""
        return self.total <= self.limit

    def require(self) -> None:
        """Raise BudgetSpent unless the ledger would admit the release."""
        if not self.affordable:
            raise BudgetSpent(self.asked, self.spent, self.limit)


class Ledger:
    """An SQLite file with synchronous=EXTRA; `open` it, never construct it."""

    def __init__(self, path: Path, budget: Budget) -> None:
        self._path, self.budget = path, budget

    @classmethod
    def open(cls, path: Path, budget: Budget) -> Ledger:
        """Return the ledger in a file, made if it is not there."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        ledger = cls(path, budget)
        try:
            with ledger._transaction() as db:
                db.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{path}: not a usable ledger ({type(error).__name__})", hint="restore it from a backup; never start a new one"
            ) from None
        path.chmod(0o600)
        return ledger

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # A connection a transaction: threads share nothing, and the pragma cannot be forgotten on any of them.
        db = sqlite3.connect(self._path, isolation_level=None, timeout=30)
        try:
            # With a rollback journal the commit is the removal of the journal, and FULL does not sync the folder after it: a power cut
            # could bring the journal, and with it the state before the charge, back.  EXTRA syncs the folder.
            db.execute("PRAGMA synchronous=EXTRA")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, say: nothing was committed, so nothing is charged and nothing may leave
            raise UsageError(f"{self._path}: {error}", hint="nothing was charged; free the disk or the lock, then try again") from None
        finally:
            db.close()  # rolls back what was not committed

    def stored(self, request: bytes) -> bytes | None:
        """Return the envelope that this request already paid for."""
        with self._transaction() as db:
            found = db.execute("SELECT envelope FROM charge WHERE request = ?", (request,)).fetchone()
        return bytes(found[0]) if found else None

    def latest(self) -> bytes | None:
        """Return the envelope of the newest release."""
        with self._transaction() as db:
            found = db.execute("SELECT envelope FROM charge ORDER BY number DESC LIMIT 1").fetchone()
        return bytes(found[0]) if found else None

    def price(self, guarantee: Guarantee) -> Price:
        """Return what a release under this guarantee would cost now; draws and spends nothing."""
        with self._transaction() as db:
            return self._price(db, guarantee)

    def _price(self, db: sqlite3.Connection, guarantee: Guarantee) -> Price:
        spent = [float(row[0]) for row in db.execute("SELECT multiplier FROM charge")]
        # A larger delta would make everything already spent look smaller: never judge at one above what the charges were made at.
        least = db.execute("SELECT min(delta) FROM charge").fetchone()[0]
        asked, delta = _multiplier(guarantee), min(self.budget.delta, float(least or 1.0))
        return Price(
            composed_epsilon([asked], delta), composed_epsilon(spent, delta), composed_epsilon([*spent, asked], delta), self.budget.epsilon
        )

    def charge(self, request: bytes, guarantee: Guarantee, make: Callable[[int, bytes], tuple[bytes, bytes]]) -> bytes:
        """Return the envelope for a request: the stored one, or a new one that is charged and stored in one transaction.

        make(release number, id of the previous release) draws the noise and returns (release id, envelope).  It is called only after
        admission; if it raises, nothing is charged.  Raises BudgetSpent before anything is drawn.
        """
        with self._transaction() as db:
            found = db.execute("SELECT envelope FROM charge WHERE request = ?", (request,)).fetchone()
            if found:
                return bytes(found[0])
            self._price(db, guarantee).require()
            last = db.execute("SELECT number, release_id FROM charge ORDER BY number DESC LIMIT 1").fetchone()
            number, previous = (int(last[0]) + 1, bytes(last[1])) if last else (1, b"")
            release_id, envelope = make(number, previous)
            db.execute(
                "INSERT INTO charge VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, request, guarantee.epsilon, guarantee.delta, _multiplier(guarantee), release_id, envelope),
            )
        return envelope


def _multiplier(guarantee: Guarantee) -> float:
    return effective_multiplier(noise_variance(guarantee, NORM_SQUARED), NORM_SQUARED)
