"""The owner's ledger: every charge and the bytes it paid for, in one durable transaction, in one chain of hashes.

One ledger belongs to one *population* and one privacy unit for life.  It covers every file, map, specification and adapter made from
that population; adding a record opens no new budget.
Training takes minutes and sends nothing, so its charge is a transaction of its own, before the first draw; the adapter it paid for is
noted when it is done, and is the only one that this charge will ever give.
A round of a cohort is charged before the masked numbers leave, and never given back: who carries the messages may tell this member that
the round broke off, and have the sum from the others.  No two charges are of one round, and no round is joined again.
Order is part of the protocol (docs/protocol.md 4.4): admission, noise, then *one* commit that holds the charge and the noisy bytes, and
only then may anything be sent.  A crash before the commit leaves neither; a crash after it re-sends the stored bytes.

    hash_0 = SHA-256(tag || population, unit)        hash_k = SHA-256(tag || hash_{k-1} || charge and SHA-256(envelope) of entry k)

The chain shows that an entry was changed, removed or slipped in.  It cannot show that the *newest* entries are missing, as after
restoring a backup: the market's list of releases does (`require_current`, `absorb`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from nodes.succession import keys_before
from protocol.codec import canonical_json, domain_tag, format_decimal
from protocol.errors import BudgetSpent, CohortAborted, FormatError, LedgerBehind, LedgerDamaged, PopulationConflict, UsageError
from protocol.privacy import (
    RECORD,
    Event,
    Gaussian,
    Guarantee,
    PrivacyUnit,
    PrivateTraining,
    event_from_plain,
    event_to_plain,
    ledger_epsilon,
    noise_variance,
    specification_event,
)
from protocol.release import AdapterReference, Release, open_envelope
from protocol.specification import NORM_SQUARED

POPULATION = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
DEFAULT_POPULATION = "default"
COHORT_TAG, RENEWAL_TAG = domain_tag("cohort-charge", 1), domain_tag("renewal", 1)
LEDGER_TAG, ENTRY_TAG = domain_tag("ledger", 2), domain_tag("ledger-entry", 2)
SCHEMA = (
    """
CREATE TABLE IF NOT EXISTS ledger (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    population TEXT NOT NULL,
    unit TEXT NOT NULL,
    compared INTEGER NOT NULL            -- 0 from a restore until the market's releases were compared: nothing is drawn meanwhile
) STRICT""",
    """
CREATE TABLE IF NOT EXISTS entry (
    number INTEGER PRIMARY KEY,          -- place in the chain, from 1
    release_number INTEGER NOT NULL,     -- place in the owner's chain of releases
    request BLOB NOT NULL UNIQUE,        -- digest of data, map and settings: the same request gets the same bytes
    events TEXT NOT NULL,                -- canonical JSON: what this charge composes as
    delta TEXT NOT NULL,
    origin TEXT NOT NULL,                -- drawn or renewed: made here; market: charged again from the market's list
    release_id BLOB NOT NULL,
    envelope BLOB NOT NULL,              -- the signed release that this charge paid for; empty for a training and a cohort's round
    hash BLOB NOT NULL
) STRICT""",
    """
CREATE TABLE IF NOT EXISTS trained (
    request BLOB PRIMARY KEY,            -- of a training that is done
    digest BLOB NOT NULL                 -- of the one adapter that its charge paid for
) STRICT""",
)
# Only in a backup: what its population claimed, so that a restored home still refuses the same record under another population.
CLAIMED = "CREATE TABLE IF NOT EXISTS claimed (digest BLOB PRIMARY KEY) STRICT, WITHOUT ROWID"
# A release of the market wins over one of the same number that was drawn here after a restore and can never be published.
NEWEST = "WHERE envelope != x'' ORDER BY release_number DESC, origin = 'market' DESC, number DESC LIMIT 1"


@dataclass(frozen=True, slots=True)
class Budget:
    """What the owner allows for life, in add-or-remove-one epsilon at one delta."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        Guarantee(self.epsilon, self.delta)  # raises UsageError for what is no epsilon or no delta


@dataclass(frozen=True, slots=True)
class Charge:
    """What one release costs: the mechanisms it runs, and the delta its guarantee is stated at."""

    events: tuple[Event, ...]
    delta: float


def specification_charge(guarantee: Guarantee) -> Charge:
    """Return the charge of a specification alone, under this guarantee."""
    return Charge((specification_event(noise_variance(guarantee, NORM_SQUARED), NORM_SQUARED),), guarantee.delta)


def release_charge(release: Release) -> Charge:
    """Return the charge of everything that a release gives away under a guarantee: its specification, and a private adapter.

    Of a cohort's release it is that of the guarantee, and not of all the noise that is published: colluders know theirs.
    """
    if release.cohort is not None:
        return specification_charge(release.specification.guarantee)
    events: tuple[Event, ...] = (specification_event(release.specification.noise_variance, NORM_SQUARED),)
    delta = release.specification.guarantee.delta
    if release.adapter is not None and isinstance(trained := release.adapter.guarantee, PrivateTraining):
        events, delta = (*events, trained.event), min(delta, trained.guarantee.delta)
    return Charge(events, delta)


def cohort_request(cohort_id: bytes) -> bytes:
    """Return what the charge of a cohort's round is known by."""
    return hashlib.sha256(COHORT_TAG + cohort_id).digest()


def renewal_request(release_id: bytes) -> bytes:
    """Return what the next renewal of a release is known by."""
    return _digest(RENEWAL_TAG, b"", release_id)


def epsilon_of(adapter: AdapterReference | None) -> str | float | None:
    """Return an adapter's epsilon as people are shown it: a number, "none" without a guarantee, nothing without an adapter."""
    if adapter is None:
        return None
    return adapter.guarantee if isinstance(adapter.guarantee, str) else adapter.guarantee.guarantee.epsilon


def total_of(release: Release) -> str | float:
    """Return what a release's specification and adapter say together: an epsilon, or "unbounded"."""
    if release.adapter is None:
        return release.specification.guarantee.epsilon
    charge = release_charge(release)
    return "unbounded" if isinstance(release.adapter.guarantee, str) else ledger_epsilon(charge.events, charge.delta)


class Rule(StrEnum):
    """How a history is composed."""

    GAUSSIAN = "gaussian"  # exact, mu_total^2 = sum of mu_i^2
    RENYI_FILTER = "renyi filter"  # as soon as a subsampled mechanism is in it


@dataclass(frozen=True, slots=True)
class Price:
    """What a release would cost, before anything is drawn."""

    asked: float
    spent: float
    total: float  # spent and asked together; below their sum, since Gaussian releases compose by the root of squares
    limit: float
    delta: float = 1e-6  # all four at this delta
    rule: Rule = Rule.GAUSSIAN  # by which `total` was composed

    @property
    def left(self) -> float:
        """Budget not spent yet; a release may ask for more than this, since epsilons compose below their sum."""
        return max(self.limit - self.spent, 0.0)

    @property
    def affordable(self) -> bool:
        """Whether the ledger would admit the release."""
        return self.total <= self.limit

    def require(self) -> None:
        """Raise BudgetSpent unless the ledger would admit the release."""
        if not self.affordable:
            raise BudgetSpent(self.asked, self.spent, self.limit)


class Origin(StrEnum):
    """Where an entry came from."""

    DRAWN = "drawn"
    RENEWED = "renewed"  # signed again with a new window: nothing was drawn or charged
    TRAINED = "trained"  # a training: no release of its own
    COHORT = "cohort"  # a round of a cohort: the release is everybody's, and lies in the chain of whoever publishes it
    MARKET = "market"


@dataclass(frozen=True, slots=True)
class Entry:
    """One charge with the bytes it paid for."""

    number: int
    release_number: int
    request: bytes
    charge: Charge
    origin: Origin
    release_id: bytes
    envelope: bytes
    hash: bytes  # of this entry and all before it


class Ledger:
    """An SQLite file with synchronous=EXTRA; `open` it, never construct it."""

    def __init__(self, path: Path, budget: Budget, population: str, unit: PrivacyUnit) -> None:
        self._path, self.budget, self.population, self.unit = path, budget, population, unit
        self._owners: tuple[bytes, ...] | None = None  # as `require_owner` was told

    @classmethod
    def open(
        cls, path: Path, budget: Budget, population: str = DEFAULT_POPULATION, unit: PrivacyUnit = RECORD, *, behind: bool = False
    ) -> Ledger:
        """Return the ledger in a file, made if it is not there, its chain verified.

        behind: charges are known to be missing, so nothing is drawn until `absorb` or `require_current`; noted with the declaration.
        Population and unit are declared by the first charge and hold for life: raises PopulationConflict for others, LedgerDamaged if
        an entry is not the one that was written, UsageError for a file that is no ledger.
        """
        if not POPULATION.fullmatch(population):
            raise UsageError("population: expected 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        ledger = cls(path, budget, population, unit)
        try:
            with ledger._transaction() as db:
                ledger._declare(db)
                if behind:
                    db.execute("UPDATE ledger SET compared = 0")
                _verified(db)
        except sqlite3.DatabaseError as error:
            raise UsageError(
                f"{path}: not a usable ledger ({type(error).__name__})",
                hint="`veilmart node restore` takes a backup; never start a new one",
            ) from None
        path.chmod(0o600)
        return ledger

    def _declare(self, db: sqlite3.Connection) -> None:
        for statement in SCHEMA:
            db.execute(statement)
        if db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'charge'").fetchone():
            _upgrade(db, self.population)
        found = db.execute("SELECT population, unit FROM ledger").fetchone()
        charged = db.execute("SELECT 1 FROM entry").fetchone()
        if found and charged and tuple(found) != (self.population, str(self.unit)):
            raise PopulationConflict(
                f"{self._path}: this ledger is of population {found[0]!r} with unit {found[1]!r} for life, "
                f"got {self.population!r} with unit {str(self.unit)!r}",
                hint="epsilons of different units do not add up; another population needs data of its own (--population)",
            )
        if not charged:  # nothing was promised yet, so a dry run binds nobody
            db.execute("INSERT INTO ledger VALUES (1, ?, ?, 1) ON CONFLICT (one) DO UPDATE SET population = excluded.population, "
                       "unit = excluded.unit", (self.population, str(self.unit)))  # fmt: skip

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

    # Reading ---------------------------------------------------------------------------------------------------------

    def stored(self, request: bytes) -> bytes | None:
        """Return the envelope that this request already paid for."""
        with self._transaction() as db:
            found = db.execute("SELECT envelope FROM entry WHERE request = ?", (request,)).fetchone()
        return bytes(found[0]) if found else None

    def latest(self) -> bytes | None:
        """Return the envelope of the newest release."""
        with self._transaction() as db:
            found = db.execute(f"SELECT envelope FROM entry {NEWEST}").fetchone()
        return bytes(found[0]) if found else None

    def released(self, release_id: str | None = None) -> tuple[str, bytes] | None:
        """Return id and envelope of the newest release, or of the one with this id, if it is there."""
        with self._transaction() as db:
            if release_id is None:
                found = db.execute(f"SELECT release_id, envelope FROM entry {NEWEST}").fetchone()
            else:
                of = bytes.fromhex(release_id) or None  # a training has no id
                found = db.execute("SELECT release_id, envelope FROM entry WHERE release_id = ?", (of,)).fetchone()
        return (bytes(found[0]).hex(), bytes(found[1])) if found else None

    def entries(self) -> list[Entry]:
        """Return all entries in the order of the chain; raise LedgerDamaged if the chain does not verify."""
        with self._transaction() as db:
            return _verified(db)

    @property
    def compared(self) -> bool:
        """Whether the ledger may draw: False from a restore until the market's releases were compared with it."""
        with self._transaction() as db:
            return bool(db.execute("SELECT compared FROM ledger").fetchone()[0])

    def next_release(self) -> tuple[int, bytes]:
        """Return number and predecessor (id of the newest release, empty for the first) of the next release."""
        with self._transaction() as db:
            return _next_release(db)

    # Charging --------------------------------------------------------------------------------------------------------

    def price(self, charge: Charge) -> Price:
        """Return what this charge would cost now; draws and spends nothing."""
        with self._transaction() as db:
            return self._price(db, charge)

    def _price(self, db: sqlite3.Connection, charge: Charge) -> Price:
        rows = db.execute("SELECT events, delta FROM entry").fetchall()
        spent = [event for text, _ in rows for event in _events_of(text)]
        # A larger delta would make everything already spent look smaller: never judge at one above what the charges were made at.
        delta = min([self.budget.delta, *(float(text) for _, text in rows)])
        together = [*spent, *charge.events]
        rule = Rule.GAUSSIAN if all(isinstance(event, Gaussian) for event in together) else Rule.RENYI_FILTER
        asked, before, total = (ledger_epsilon(events, delta) for events in (charge.events, spent, together))
        return Price(asked, before, total, self.budget.epsilon, delta, rule)

    def charge(
        self, request: bytes, charge: Charge, make: Callable[[int, bytes], tuple[bytes, bytes]], *, first_only: bool = False,
        origin: Origin = Origin.DRAWN,
    ) -> bytes:  # fmt: skip
        """Return the envelope for a request: the stored one, or a new one that is charged and stored in one transaction.

        first_only: if anything was charged already, return the newest stored envelope instead, whatever the request.

        make(release number, id of the previous release) draws the noise and returns (release id, envelope).  It is called only after
        admission; if it raises, nothing is charged.  A charge without events is of a specification that was paid before; `origin` says so.
        Raises BudgetSpent or LedgerBehind before anything is drawn.
        """
        with self._transaction() as db:
            _verified(db)  # never build on a chain that something else has touched since it was opened
            found = db.execute("SELECT envelope FROM entry WHERE request = ?", (request,)).fetchone()
            if found:
                return bytes(found[0])
            newest = db.execute(f"SELECT envelope FROM entry {NEWEST}").fetchone() if first_only else None
            if newest:  # asked in here: another guard of this home may have charged since the caller looked
                return bytes(newest[0])
            if not db.execute("SELECT compared FROM ledger").fetchone()[0]:
                raise not_compared()
            self._declare(db)
            if charge.events:
                self._price(db, charge).require()
            number, previous = _next_release(db)
            release_id, envelope = make(number, previous)
            _append(db, number, request, charge, origin, release_id, envelope)
        return envelope

    def charge_training(self, request: bytes, charge: Charge) -> None:
        """Charge a training and commit, before anything is drawn for it; one that was charged before is paid for.

        Raises BudgetSpent or LedgerBehind, and then nothing may be drawn.
        """
        with self._transaction() as db:
            _verified(db)
            if db.execute("SELECT 1 FROM entry WHERE request = ?", (request,)).fetchone():
                return
            if not db.execute("SELECT compared FROM ledger").fetchone()[0]:
                raise not_compared()
            self._declare(db)
            self._price(db, charge).require()
            _append(db, 0, request, charge, Origin.TRAINED, b"", b"")

    def charge_cohort(self, cohort_id: bytes, charge: Charge, rounds: int) -> None:
        """Charge a round of a cohort and commit, before the noise is drawn and anything of it leaves.

        rounds: how many this population's policy allows for life.  Raises CohortAborted for a round that was charged before, since its
        masks are gone; UsageError beyond the policy; BudgetSpent or LedgerBehind.  Then nothing may leave.
        """
        request = cohort_request(cohort_id)
        with self._transaction() as db:
            _verified(db)
            if db.execute("SELECT 1 FROM entry WHERE request = ?", (request,)).fetchone():
                raise CohortAborted("cohort: this round was charged before, and is not joined a second time")
            (joined,) = db.execute("SELECT count(*) FROM entry WHERE origin = ?", (str(Origin.COHORT),)).fetchone()
            if joined >= rounds:
                raise UsageError(
                    f"cohort: the policy allows {rounds} rounds, all were charged", hint="[cohort] rounds, in the owner's policy"
                )
            if not db.execute("SELECT compared FROM ledger").fetchone()[0]:
                raise not_compared()
            self._declare(db)
            self._price(db, charge).require()
            _append(db, 0, request, charge, Origin.COHORT, b"", b"")

    def charged(self, request: bytes) -> bool:
        """Whether this request was charged before."""
        with self._transaction() as db:
            return db.execute("SELECT 1 FROM entry WHERE request = ?", (request,)).fetchone() is not None

    def trained(self, request: bytes) -> bytes | None:
        """Return the digest of the adapter that a training gave, or None if it was not done."""
        with self._transaction() as db:
            found = db.execute("SELECT digest FROM trained WHERE request = ?", (request,)).fetchone()
        return bytes(found[0]) if found else None

    def note_trained(self, request: bytes, digest: bytes) -> None:
        """Note, durably, that a training is done: before its adapter is shown to anybody, so that no second one is ever made."""
        with self._transaction() as db:
            db.execute("INSERT INTO trained VALUES (?, ?)", (request, digest))

    # Comparing with the market ---------------------------------------------------------------------------------------

    def require_owner(self, owner: bytes | None) -> None:
        """Raise UsageError unless this public key, or one before it, signed the newest release.

        None, for no key, passes only where nothing was charged.
        The market is asked for the releases of one owner.  With another key it has none, and an older ledger would look current.
        """
        if owner is not None:
            self._owners = (owner, *keys_before(self._path.parent, owner))
        latest = self.latest()
        signer = open_envelope(latest).owner if latest is not None else owner
        if signer != owner and (owner is None or signer not in keys_before(self._path.parent, owner)):
            assert signer is not None
            got = "no key" if owner is None else f"the key of {owner.hex()[:16]}"
            raise UsageError(
                f"{self._path.with_name('owner.key')}: expected the key of owner {signer.hex()[:16]}, who signed this ledger's releases, "
                f"got {got}",
                hint="put the copy that `veilmart node backup --key` made there, mode 0600; other data may begin anew (--population)",
            )

    def missing(self, releases: Sequence[Release]) -> list[Release]:
        """Return those of the owner's releases that this ledger does not know, in the order of their numbers."""
        with self._transaction() as db:
            return _missing(db, releases, self._owners)

    def require_current(self, releases: Sequence[Release]) -> None:
        """Note that the ledger was compared with all releases of its owner; raise LedgerBehind if it does not know one of them.

        From then on nothing is drawn, also after a restart, until `absorb` has charged what is missing.
        """
        with self._transaction() as db:
            missing = _missing(db, releases, self._owners)
            db.execute("UPDATE ledger SET compared = ?", (int(not missing),))
        if missing:
            raise LedgerBehind(
                f"ledger: the market holds {len(missing)} releases of this owner that the ledger does not know; the first is number "
                f"{missing[0].release_number}",
                hint="the ledger was restored from an older copy, or is not the only one; `veilmart node repair` charges what is missing",
            )

    def absorb(self, envelopes: Sequence[bytes]) -> int:
        """Charge every release of the market that the ledger does not know, from its envelope; return how many.

        What was spent was spent: this never refuses, even beyond the budget.  A renewal costs nothing here either: it has the numbers and
        the adapter of a release that is charged.  Raises PopulationConflict for a release of another unit.
        """
        by_id = {release.release_id: (release, envelope) for envelope in envelopes for release in [open_envelope(envelope)]}
        with self._transaction() as db:
            self._declare(db)
            # In here: another process may be charging the same.
            missing = _missing(db, [release for release, _ in by_id.values()], self._owners)
            for release in missing:
                if (unit := release.specification.guarantee.unit) != self.unit:
                    raise PopulationConflict(
                        f"release {release.release_number}: its unit is {str(unit)!r}, that of this ledger {str(self.unit)!r}",
                        hint="declare the unit of the lost ledger (--unit)",
                    )
            paid = {_given_away(release): release for release in _releases(db)}
            for release in missing:
                if release.cohort is not None:
                    _absorb_round(db, release, release.cohort.cohort_id)
                    if not _is_own(release, self._owners):
                        continue
                earlier = paid.get(_given_away(release))
                paid_before = release.cohort is not None or earlier is not None
                charge = Charge((), release.specification.guarantee.delta) if paid_before else release_charge(release)
                paid[_given_away(release)] = release
                request, envelope = _absorbed_request(db, release, earlier), by_id[release.release_id][1]
                _append(db, release.release_number, request, charge, Origin.MARKET, release.release_id, envelope)
            db.execute("UPDATE ledger SET compared = 1")
        return len(missing)

    # Copies ----------------------------------------------------------------------------------------------------------

    def backup(self, target: Path, claims: Callable[[], Sequence[bytes]] = tuple) -> int:
        """Write a consistent copy that only its owner can read, charges and envelopes included; return its number of entries.

        claims: reads what this population claimed (populations.py), after the copy: a claim comes before its charge, so none is left out.
        """
        if target.exists():
            raise UsageError(f"{target}: already there", hint="a backup never overwrites one")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            with closing(sqlite3.connect(self._path, timeout=30)) as source, closing(sqlite3.connect(temporary)) as copy:
                source.backup(copy)
                count = len(_verified(copy))
                copy.execute(CLAIMED)
                copy.executemany("INSERT OR IGNORE INTO claimed VALUES (?)", ((digest,) for digest in claims()))
                copy.commit()
            _sync(temporary)
            os.replace(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return count


@contextmanager
def in_use(folder: Path, *, alone: bool = False) -> Iterator[None]:
    """Mark a population's folder as one that a guard draws from, until left.

    Guards share it: the transaction decides between them.  What puts another file in the ledger's place needs it `alone`: a charge that
    is being committed to the file that was moved away would be lost.  Raises UsageError where the two meet.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / "in-use.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        who = "a guard is using this ledger" if alone else "this ledger is being restored"
        raise UsageError(f"{folder}: {who}", hint="stop `veilmart node up` first" if alone else "try again when it is done") from None
    try:
        yield
    finally:
        os.close(descriptor)  # and with it the lock


def not_compared() -> LedgerBehind:
    """Return the refusal of a ledger that was restored and not compared with the market since."""
    return LedgerBehind(
        "ledger: restored from a backup, or behind the market, and not repaired since: releases made later may be missing from it",
        hint="`veilmart node repair` compares it with the market and charges what is missing",
    )


def claims_in(backup: Path) -> list[bytes] | None:
    """Return the claims that a backup holds, or None for one from before backups held any."""
    with closing(_read_only(backup)) as db:
        if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'claimed'").fetchone():
            return None
        return [bytes(digest) for (digest,) in db.execute("SELECT digest FROM claimed")]


def restore(backup: Path, path: Path, population: str, claim: Callable[[Sequence[bytes]], None] = lambda claims: None) -> int:
    """Put a backup in the ledger's place and return its number of entries; nothing is drawn from it until it was compared.

    claim: takes back what the backup says this population claimed, before its charges are there again.
    Raises PopulationConflict for the backup of another population, LedgerBehind if the ledger that is there has entries that the backup
    lacks.  A damaged one is moved aside, never removed.
    """
    if not backup.is_file():
        raise UsageError(f"{backup}: no such file")
    entries = _usable(backup)
    if entries is None:
        raise UsageError(f"{backup}: not a usable backup of a ledger")
    with closing(_read_only(backup)) as db:
        of = str(db.execute("SELECT population FROM ledger").fetchone()[0])
    if of != population:
        raise PopulationConflict(f"{backup}: expected a ledger of population {population!r}, got one of {of!r}", hint=f"--population {of}")
    if path.exists():
        there = _usable(path)
        if there is None:
            set_aside(path)
        elif [entry.hash for entry in there] != [entry.hash for entry in entries[: len(there)]]:
            raise LedgerBehind(
                f"{backup}: the ledger that is there has entries that this backup lacks ({len(there)} against {len(entries)})",
                hint="keep the one that is there; a backup is for a ledger that is lost or damaged",
            )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    claim(claims_in(backup) or [])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with closing(_read_only(backup)) as source, closing(sqlite3.connect(temporary)) as copy:
            source.backup(copy)
            copy.execute("UPDATE ledger SET compared = 0")
            copy.execute("DROP TABLE IF EXISTS claimed")
            copy.commit()
        _sync(temporary)
        if not path.exists():  # of a ledger that was killed and then lost: left behind, it would be played into the restored one
            path.with_name(path.name + "-journal").unlink(missing_ok=True)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return len(entries)


def set_aside(path: Path) -> Path | None:
    """Rename a damaged ledger, with the journal that belongs to it, and return its new name; None if there is no ledger.

    Raises UsageError for one whose chain verifies: a sound ledger is never replaced.
    """
    if not path.exists():
        return None
    if _usable(path) is not None:
        raise UsageError(f"{path}: this ledger is sound", hint="`veilmart node repair` without --rebuild charges what is missing")
    aside = path.with_name(f"{path.name}.damaged-{os.urandom(4).hex()}")
    for suffix in ("-journal", ""):  # left behind, the journal would be played into the file that takes this one's place
        if path.with_name(path.name + suffix).exists():
            os.replace(path.with_name(path.name + suffix), aside.with_name(aside.name + suffix))
    return aside


def _usable(path: Path) -> list[Entry] | None:
    try:
        return inspect(path)
    except (sqlite3.DatabaseError, LedgerDamaged):
        return None


def inspect(path: Path) -> list[Entry]:
    """Return the verified entries of a file, rolling back only what a killed writer left; raise LedgerDamaged or a DatabaseError."""
    with closing(_read_only(path)) as db:
        return _verified(db)


def declared(path: Path) -> tuple[str, PrivacyUnit] | None:
    """Return population and unit of a ledger that has charged something, or None."""
    if not path.is_file():
        return None
    with suppress(sqlite3.DatabaseError), closing(_read_only(path)) as db:
        if db.execute("SELECT 1 FROM entry").fetchone():
            found = db.execute("SELECT population, unit FROM ledger").fetchone()
            return (str(found[0]), PrivacyUnit.parse(str(found[1]))) if found else None
    return None


def _read_only(path: Path) -> sqlite3.Connection:
    journal = path.with_name(path.name + "-journal")
    if journal.exists() and journal.stat().st_size:
        # A writer was killed.  A connection that may not write cannot roll back what it left, and would call a sound ledger damaged.
        with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=30)) as db:
            db.execute("SELECT 1 FROM sqlite_schema").fetchone()
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)


def _missing(db: sqlite3.Connection, releases: Sequence[Release], owners: Sequence[bytes] | None) -> list[Release]:
    unknown = not_in(releases, _verified(db), owners)
    return sorted(unknown, key=lambda release: release.release_number)


def not_in(releases: Sequence[Release], entries: Sequence[Entry], owners: Sequence[bytes] | None) -> list[Release]:
    """Return those of an owner's releases that entries of a ledger do not know.

    A release of a cohort is known by its round, unless this owner published it: then it has a place in the chain as well.
    owners: the owner's keys; None: every release is in the owner's chain.
    """
    ids, requests = {entry.release_id for entry in entries}, {entry.request for entry in entries}

    def is_known(release: Release) -> bool:
        joined = release.cohort is not None and cohort_request(release.cohort.cohort_id) in requests
        return release.release_id in ids or (joined and not _is_own(release, owners))

    return [release for release in releases if not is_known(release)]


def _is_own(release: Release, owners: Sequence[bytes] | None) -> bool:
    return owners is None or release.owner in owners


def _releases(db: sqlite3.Connection) -> list[Release]:
    """Return the releases that are charged, in the order of their numbers."""
    return sorted((open_envelope(entry.envelope) for entry in _verified(db) if entry.envelope), key=lambda release: release.release_number)


def _given_away(release: Release) -> tuple[object, ...]:
    """Return all of a release that was made from records; who has two that agree in it has learnt nothing from the second."""
    specification = release.specification
    return specification.map_id, specification.noisy_sums.tobytes(), specification.noise_variance, specification.guarantee, release.adapter


def _absorbed_request(db: sqlite3.Connection, release: Release, earlier: Release | None) -> bytes:
    """Return what a release of the market is known by; of a renewal what a guard asks for, which then signs no other one."""
    if earlier is not None and earlier.release_number < release.release_number:
        request = renewal_request(earlier.release_id)
        if not db.execute("SELECT 1 FROM entry WHERE request = ?", (request,)).fetchone():
            return request
    return hashlib.sha256(domain_tag("absorbed", 1) + release.release_id).digest()


def _absorb_round(db: sqlite3.Connection, release: Release, cohort_id: bytes) -> None:
    request = cohort_request(cohort_id)
    if not db.execute("SELECT 1 FROM entry WHERE request = ?", (request,)).fetchone():
        _append(db, 0, request, release_charge(release), Origin.COHORT, b"", b"")


def _next_release(db: sqlite3.Connection) -> tuple[int, bytes]:
    last = db.execute(f"SELECT release_number, release_id FROM entry {NEWEST}").fetchone()
    return (int(last[0]) + 1, bytes(last[1])) if last else (1, b"")


def _genesis(db: sqlite3.Connection) -> bytes:
    found = db.execute("SELECT population, unit FROM ledger").fetchone()
    if not found:
        raise LedgerDamaged("ledger: it declares no population", hint="`veilmart node restore` takes a backup")
    population, unit = found
    return _digest(LEDGER_TAG, b"", population.encode(), unit.encode())


def _digest(tag: bytes, before: bytes, *parts: bytes) -> bytes:
    digest = hashlib.sha256(tag + before)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _entry_hash(before: bytes, number: int, release_number: int, request: bytes, events: str, delta: str, origin: str,
                release_id: bytes, envelope: bytes) -> bytes:  # fmt: skip
    plain = (str(number), str(release_number), events, delta, origin)
    return _digest(
        ENTRY_TAG, before, *(text.encode() for text in plain), request, release_id, hashlib.sha256(envelope).digest()
    )  # fmt: skip


def _append(db: sqlite3.Connection, release_number: int, request: bytes, charge: Charge, origin: Origin, release_id: bytes,
            envelope: bytes) -> None:  # fmt: skip
    last = db.execute("SELECT number, hash FROM entry ORDER BY number DESC LIMIT 1").fetchone()
    number, before = (int(last[0]) + 1, bytes(last[1])) if last else (1, _genesis(db))
    events, delta = _events_text(charge.events), format_decimal(charge.delta)
    digest = _entry_hash(before, number, release_number, request, events, delta, str(origin), release_id, envelope)
    row = (number, release_number, request, events, delta, str(origin), release_id, envelope, digest)
    db.execute("INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _verified(db: sqlite3.Connection) -> list[Entry]:
    """Return the entries of a ledger if each one's hash is that of the entry and everything before it; raise LedgerDamaged."""
    entries: list[Entry] = []
    if not db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'ledger'").fetchone():
        raise LedgerDamaged("ledger: it declares no population", hint="`veilmart node restore` takes a backup")
    before = _genesis(db)
    for row in db.execute(
        "SELECT number, release_number, request, events, delta, origin, release_id, envelope, hash FROM entry ORDER BY number"
    ):
        number, release_number, request, events, delta, origin, release_id, envelope, found = row
        expected = _entry_hash(before, len(entries) + 1, release_number, request, events, delta, origin, release_id, envelope)
        if found != expected or number != len(entries) + 1:
            raise LedgerDamaged(
                f"ledger: entry {len(entries) + 1} is not the one that was written",
                hint="`veilmart node restore` takes a backup; then `veilmart node repair` charges what the market has beyond it",
            )
        charge = Charge(_events_of(events), float(delta))
        entries.append(Entry(number, release_number, request, charge, Origin(origin), release_id, envelope, found))
        before = found
    return entries


def _events_text(events: Sequence[Event]) -> str:
    return canonical_json({"events": [event_to_plain(event) for event in events]}).decode()


def _events_of(text: str) -> tuple[Event, ...]:
    try:
        return tuple(event_from_plain(plain) for plain in json.loads(text)["events"])
    except (ValueError, KeyError, TypeError, FormatError):
        raise LedgerDamaged("ledger: an entry's events cannot be read", hint="`veilmart node restore` takes a backup") from None


def _upgrade(db: sqlite3.Connection, population: str) -> None:
    """Carry the charges of the first form of the ledger (no chain, unit record) over; none may be lost."""
    db.execute("INSERT OR IGNORE INTO ledger VALUES (1, ?, 'record', 1)", (population,))
    rows = db.execute("SELECT number, request, delta, multiplier, release_id, envelope FROM charge ORDER BY number").fetchall()
    for number, request, delta, multiplier, release_id, envelope in rows:
        _append(db, number, request, Charge((Gaussian(multiplier),), delta), Origin.DRAWN, release_id, envelope)
    db.execute("DROP TABLE charge")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
