"""Backups of a market, and what keeps a restored one from contradicting what was signed before (docs/protocol.md 6.11).

A market must never sign another release at an index that it signed before.  So it keeps, in files beside the database and apart from it,
the newest checkpoint it gave out, and serves only a log that holds it: a database that was put back from an older copy is refused.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine, select

from market_node.campaigns import all_campaigns, campaigns_of
from market_node.database import URL_FILE, copy_records, file_engine, is_shared, is_there, open_engine, readable, use
from market_node.migrations import MARKET, declared, upgrade
from market_node.store import Store
from protocol.errors import FormatError, InvalidProof, NotFound, UsageError, VeilmartError
from protocol.keys import write_durably
from protocol.transparency import Checkpoint, open_checkpoint, root_of_all

NEWEST, NEWEST_NOTICES = "newest.checkpoint", "newest.notices"
DATABASE = ("market.db", "market.db-wal", "market.db-shm")
KEYS = ("market.key", "ca.key", "ca-next.key", "ca-next.until", "ca.crt", "server.key", "server.crt")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    checkpoint: Checkpoint | None  # None: nothing was published yet
    adapters: int
    keys: bool
    campaigns: int = 0


def require_newest(store: Store, market_key: bytes) -> None:
    """Raise InvalidProof unless the store holds every release under the newest checkpoint that this market gave out."""
    path = store.home / NEWEST
    if not path.exists():
        return
    known = open_checkpoint(path.read_bytes(), market_key)
    try:
        held = store.root(known.size) == known.root
        why = "another release stands at an index that was signed"
    except NotFound:
        held, why = False, f"it has {store.head().size} releases, and {known.size} were signed"
    if not held:
        raise InvalidProof(
            f"{store.home}: the database is older than what this market signed, or another: {why}",
            hint="restore the newest backup; whoever saw the missing releases has them (`veilmart catalogue export`)",
        )


def require_newest_notices(store: Store) -> None:
    """Raise InvalidProof unless the store begins with the notices that this market signed: a withdrawn release must not come back."""
    path = store.home / NEWEST_NOTICES
    if not path.exists():
        return
    known, entries = path.read_bytes(), store.notices()
    size = int.from_bytes(known[:8], "little")
    if size > len(entries) or root_of_all(entries[:size]) != known[8:]:
        raise InvalidProof(
            f"{store.home}: the database is older than what this market signed: it has {len(entries)} notices, and {size} were signed",
            hint="restore the newest backup; owners keep the notices that they sent, below receipts/",
        )


@contextmanager
def _keeping(home: Path) -> Iterator[None]:
    # Two processes of one market would each compare with the same older file, and the smaller of their two could stay.
    with (home / "newest.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def keep_newest_notices(home: Path, size: int, root: bytes) -> None:
    """Keep size and root of the notices that are about to be given out, unless a larger list is kept."""
    path = home / NEWEST_NOTICES
    with _keeping(home):
        if not path.exists() or int.from_bytes(path.read_bytes()[:8], "little") < size:
            write_durably(path, size.to_bytes(8, "little") + root, 0o644)


def keep_newest(home: Path, note: bytes, size: int, market_key: bytes) -> None:
    """Keep a checkpoint that is about to be given out, unless a larger one is kept."""
    path = home / NEWEST
    with _keeping(home):
        if not path.exists() or open_checkpoint(path.read_bytes(), market_key).size < size:
            write_durably(path, note, 0o644)


def back_up(home: Path, folder: Path, *, keys: bool, on_progress: Progress = lambda stage, done, of: None) -> Backup:
    """Copy a market, which may go on serving, into a new folder; raise UsageError for one that is not empty."""
    _require_empty(folder)
    if not is_there(home):
        raise NotFound(f"{home}: no market here yet", hint="`veilmart market up` makes one")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Campaigns and checkpoint first: the database that is copied after them holds at least what they say was published.
    _copy_campaigns(home, folder)
    for name in (NEWEST, NEWEST_NOTICES):
        if (home / name).exists():
            write_durably(folder / name, (home / name).read_bytes(), 0o644)
    os.close(os.open(folder / "market.db", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))  # a folder that was there may be open to all
    if is_shared(home):
        with readable(home):
            _copy(open_engine(home, MARKET, reads_only=True), file_engine(folder / "market.db"))
    else:
        source, target = sqlite3.connect(f"file:{home / 'market.db'}?mode=ro", uri=True), sqlite3.connect(folder / "market.db")
        try:
            source.backup(target, pages=1000, progress=lambda status, left, of: on_progress("database", of - left, of))
        finally:
            source.close()
            target.close()
    adapters = [path for path in sorted((home / "adapters").glob("*")) if not path.name.startswith(".")]
    (folder / "adapters").mkdir(mode=0o700)
    for done, path in enumerate(adapters, start=1):
        shutil.copy2(path, folder / "adapters" / path.name)
        on_progress("adapters", done, len(adapters))
    for name in KEYS if keys else ("ca.crt",):
        if (home / name).exists():
            write_durably(folder / name, (home / name).read_bytes(), (home / name).stat().st_mode & 0o777)
    return _checked(folder, keys, on_progress)


def restore(folder: Path, home: Path, *, database: str = "", on_progress: Progress = lambda stage, done, of: None) -> Backup:
    """Put a backup, verified release by release, into an empty folder; keys that lie in `home` already stay.

    database: URL of PostgreSQL, empty, where the records are to lie; "" for a file in the folder.
    Raises UsageError if the market's database is there, FormatError or InvalidProof for a backup that does not hold what it says.
    """
    # What SQLite wrote beside a database that was killed, and that somebody moved away, would be played into the one that is restored.
    if any((home / name).exists() for name in DATABASE):
        raise UsageError(f"{home}: there is a market already", hint=f"restore into another --home, or move {', '.join(DATABASE)} away")
    if is_shared(home):
        raise UsageError(f"{home}: there is a market already, in PostgreSQL", hint="restore into another --home")
    found = _checked(folder, (folder / "market.key").exists(), on_progress)
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in KEYS:
        if (folder / name).exists() and not (home / name).exists():
            write_durably(home / name, (folder / name).read_bytes(), (folder / name).stat().st_mode & 0o777)
    (home / "adapters").mkdir(exist_ok=True, mode=0o700)
    for path in (folder / "adapters").glob("*"):
        write_durably(home / "adapters" / path.name, path.read_bytes())
    _copy_campaigns(folder, home)
    # A checkpoint that is here and larger stays: it says that this backup is too old to serve from.
    for here, there in ((home / name, folder / name) for name in (NEWEST, NEWEST_NOTICES)):
        if there.exists() and not here.exists():
            write_durably(here, there.read_bytes(), 0o644)
    # Last: without it there is no market here.
    if database:
        use(home, database)
        try:
            with readable(home):
                _copy(file_engine(folder / "market.db"), open_engine(home, MARKET))
        except VeilmartError:
            (home / URL_FILE).unlink()
            raise
    else:
        write_durably(home / "market.db", (folder / "market.db").read_bytes())
    return found


def _copy(source: Engine, target: Engine) -> None:
    """Copy a market's records into a database without any."""
    try:
        upgrade(target, MARKET)
        with target.connect() as db:
            if any(db.execute(select(table).limit(1)).first() for table in declared(MARKET).sorted_tables):
                raise UsageError("--database: there is a market already", hint="restore into an empty database")
        copy_records(source, target, declared(MARKET))
    finally:
        source.dispose()
        target.dispose()


def _copy_campaigns(source: Path, target: Path) -> None:
    """Copy what is kept of campaigns: plans, what became of each node with its envelope, receipts.  A file that is there stays."""
    root = campaigns_of(source)
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".receipt") and not path.name.startswith("."):
            place = campaigns_of(target) / path.relative_to(root)
            if not place.exists():
                write_durably(place, path.read_bytes(), path.stat().st_mode & 0o777)


def _checked(folder: Path, keys: bool, on_progress: Progress) -> Backup:
    """Return what is in a backup; raise unless its log is the one under its checkpoint and every adapter has its digest."""
    import hashlib

    if not (folder / "market.db").is_file():
        raise UsageError(f"{folder}: expected a backup of `veilmart market backup`")
    store = Store.open(folder)
    try:
        size = store.head().size
        envelopes = store.envelopes(0, size)
        if root_of_all(envelopes) != store.root(size):
            raise FormatError(f"{folder / 'market.db'}: its releases are not those of its log")
        checkpoint = None
        if (folder / NEWEST).exists():
            note = (folder / NEWEST).read_bytes()
            checkpoint = open_checkpoint(note, bytes.fromhex(note.partition(b"\n")[0].rpartition(b"/")[2].decode("ascii", "replace")))
            require_newest(store, bytes.fromhex(checkpoint.origin.rpartition("/")[2]))
        require_newest_notices(store)
    except ValueError:
        raise FormatError(f"{folder / NEWEST}: expected a checkpoint") from None
    finally:
        store.close()
    adapters = sorted((folder / "adapters").glob("*"))
    for done, path in enumerate(adapters, start=1):
        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
            raise FormatError(f"{path}: expected bytes of the digest that is its name")
        on_progress("check", done, len(adapters))
    campaigns = all_campaigns(campaigns_of(folder))
    for campaign in campaigns:
        campaign.results()  # raises FormatError for one that is damaged
    return Backup(checkpoint, len(adapters), keys, len(campaigns))


def _require_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder}: expected a new or empty folder", hint="a backup never overwrites one")
