"""The market's store: releases in a database, adapters as content-addressed files.  Acknowledged means committed."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    text,
)

from market_node.database import is_there, name_of, opened, readable, writing
from market_node.migrations import MARKET, require_newest, upgrade
from protocol.catalogue import (
    EMPTY_CATALOGUE,
    EMPTY_HEAD,
    MAX_TERMS,
    PAGE_SIZE,
    SCALARS_BYTES,
    Head,
    Terms,
    card_of,
    extend_head,
    name_of_map,
    pages_of,
    root_of_pages,
)
from protocol.claims import Claims, parse_claims
from protocol.errors import AlreadyPublished, FormatError, InvalidAdapter, NotAdmitted, NotFound, Unauthorised, UsageError, VeilmartError
from protocol.features import FeatureMap
from protocol.notices import Kind, Notice
from protocol.release import MAX_ADAPTER_BYTES, NO_ID, SIGNATURE_BYTES, Release, open_envelope
from protocol.transparency import (
    EMPTY_ROOT,
    HASH_BYTES,
    Nodes,
    appended,
    leaf_hash,
    prove_consistency,
    prove_inclusion,
    root_of,
    root_of_all,
)

METADATA = MetaData()
# Integers of SQLite have 64 bits, and so have those of PostgreSQL that are declared as such: sizes and seconds since 1970 need them.
Whole = Integer().with_variant(BigInteger, "postgresql")
RELEASES = Table(
    "release",
    METADATA,
    Column("position", Whole, primary_key=True, autoincrement=False),  # from 0, without gaps
    Column("release_id", LargeBinary(32), nullable=False, unique=True),
    Column("owner", LargeBinary(32), nullable=False),
    Column("release_number", Whole, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("row", LargeBinary(16), nullable=False),
    Column("card", LargeBinary, nullable=False),
    # The state of the catalogue up to and with this release: chains over rows, terms and the cards of its page, and the root of all cards.
    Column("rows_chain", LargeBinary(32), nullable=False),
    Column("terms_size", Whole, nullable=False),
    Column("terms_chain", LargeBinary(32), nullable=False),
    Column("page_chain", LargeBinary(32), nullable=False),
    Column("cards_root", LargeBinary(32), nullable=False),
    UniqueConstraint("owner", "release_number"),
)
TERMS = Table(
    "terms",
    METADATA,
    Column("number", Whole, primary_key=True, autoincrement=False),  # from 0, in the order of first use
    Column("body", LargeBinary, nullable=False, unique=True),
)
# Full subtrees of the log over all envelopes (protocol/transparency.py): two for every release, written once.
NODES = Table(
    "log_node",
    METADATA,
    Column("level", Whole, primary_key=True, autoincrement=False),
    Column("number", Whole, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary(32), nullable=False),
)
ADD_RELEASE, ADD_NODES = insert(RELEASES), insert(NODES)
ONE_NODE = select(NODES.c.hash).where(NODES.c.level == bindparam("at"), NODES.c.number == bindparam("which"))  # built once: it is hot
COSIGNED = Table(
    "cosigned",
    METADATA,
    Column("witness", String, primary_key=True),
    Column("size", Whole, nullable=False),
    Column("note", LargeBinary, nullable=False),
)
# What was said about releases since, in the order in which it came (protocol/notices.py), and which releases no longer stand by it.
NOTICES = Table(
    "notice",
    METADATA,
    Column("position", Whole, primary_key=True, autoincrement=False),  # from 0, without gaps
    Column("kind", String, nullable=False),
    Column("owner", LargeBinary(32), nullable=False),
    Column("successor", LargeBinary(32)),  # of a rotation
    Column("body", LargeBinary, nullable=False, unique=True),
)
# Asked for every release that comes, so built once.
HELD = select(RELEASES.c.position).where(RELEASES.c.release_id == bindparam("id"))
SAME = select(RELEASES.c.position, RELEASES.c.release_id).where(
    (RELEASES.c.release_id == bindparam("id"))
    | ((RELEASES.c.owner == bindparam("of")) & (RELEASES.c.release_number == bindparam("numbered")))
)
ENDED = select(NOTICES.c.position).where(
    NOTICES.c.owner == bindparam("of"), (NOTICES.c.kind == str(Kind.REVOCATION)) | (NOTICES.c.kind == str(Kind.ROTATION))
)
GONE = Table("gone", METADATA, Column("release_id", LargeBinary(32), primary_key=True))
STANDING = RELEASES.c.release_id.not_in(select(GONE.c.release_id))


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a release lies, and the catalogue's state that includes it."""

    position: int
    head: Head  # not signed
    log: Log


@dataclass(frozen=True, slots=True)
class Log:
    """The log at the size of a head."""

    root: bytes
    inclusion: tuple[bytes, ...] = ()  # proof of one entry, where one was asked for
    notices: tuple[int, bytes] | None = None  # size and root of the notices at that time


Offer = tuple[Release, bytes, bytes]
"""A release, its envelope and its row without the number of its terms."""


class Store:
    """All that a market keeps.  One writer at a time, of this process or another; readers at any time."""

    def __init__(self, engine: Engine, home: Path) -> None:
        self.home = home
        self._engine, self._adapters = engine, home / "adapters"
        self._writing = writing(engine)
        self._noticed = (0, EMPTY_ROOT)

    @classmethod
    def open(cls, home: Path, *, alone: bool = True) -> Store:
        """Return the store of a folder, made if it is not there.  alone: no other process works on it, so that it is tidied up."""
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        adapters = home / "adapters"
        adapters.mkdir(exist_ok=True, mode=0o700)
        for half_written in adapters.glob(".upload-*") if alone else ():  # a killed process leaves these; nothing was acknowledged for them
            half_written.unlink()
        with opened(home, MARKET) as engine:
            if engine.dialect.name == "sqlite":
                _require_second_version(engine, home)
            upgrade(engine, MARKET)
            store = cls(engine, home)
            store._complete_log()
            return store

    @classmethod
    def beside(cls, home: Path) -> Store:
        """Return the store of a market that may be running: nothing is tidied up.  Raises NotFound where there is none."""
        if not is_there(home):
            raise NotFound(f"{home}: no market here yet", hint="`veilmart market up` makes one")
        with opened(home, MARKET) as engine:
            upgrade(engine, MARKET)
            return cls(engine, home)

    @classmethod
    def reading(cls, home: Path) -> Store:
        """Return the store of a market that may be running, opened so that nothing can be written; raise NotFound where there is none."""
        if not is_there(home):
            raise NotFound(f"{home}: no market here yet", hint="`veilmart market up` makes one")
        with opened(home, MARKET, reads_only=True) as engine:
            require_newest(engine, MARKET)
            return cls(engine, home)

    def require_map(self, feature_map: FeatureMap) -> None:
        """Raise UsageError if the releases here are under another map: rows under two maps mean nothing together.

        The first one tells, since every release is checked against the map before it is appended.
        """
        with readable(self.home):
            first = self.envelopes(0, 1)
        there = open_envelope(first[0]).specification.map_id if first else feature_map.map_id
        if there != feature_map.map_id:
            raise UsageError(
                f"{self.home}: expected the map of its releases, {name_of_map(there)}, got {name_of_map(feature_map.map_id)}",
                hint="start with --map of its releases, or in a new folder",
            )
        self._adapter_in_envelope = _adapter_in_envelope(self._engine.dialect.name, feature_map.dimension)
        with readable(self.home), self._writing.begin() as db:
            db.execute(text(f"CREATE INDEX IF NOT EXISTS release_adapter ON release ({self._adapter_in_envelope})"))

    def names_adapter(self, digest: bytes) -> bool:
        """Return whether a release that stands names this adapter; `require_map` comes before."""
        with self._engine.connect() as db:
            return _names_adapter(db, self._adapter_in_envelope, digest)

    def owns_adapter(self, owner: bytes, digest: bytes) -> bool:
        """Return whether a release that stands, of this owner or of a key it had before, names this adapter; `require_map` comes first."""
        line = self.line_of(owner)
        with self._engine.connect() as db:
            return any(_names_adapter(db, self._adapter_in_envelope, digest, key) for key in line)

    def naming(self, digest: bytes, owner: bytes | None = None) -> Iterator[Claims]:
        """Yield what the releases say that stand and name this adapter, of this owner if one is given; `require_map` comes before."""
        if digest == NO_ID:
            return
        query = select(RELEASES.c.envelope).where(_names(self._adapter_in_envelope, digest), STANDING)
        if owner is not None:
            query = query.where(RELEASES.c.owner.in_(self.line_of(owner)))
        with self._engine.connect() as db:
            found = db.execute(query.order_by(RELEASES.c.position).limit(1000)).all()
        for (envelope,) in found:
            yield parse_claims(bytes(envelope)[:-SIGNATURE_BYTES])

    def holds(self, release_id: bytes) -> bool:
        """Return whether a release is here."""
        with self._engine.connect() as db:
            return db.execute(HELD, {"id": release_id}).first() is not None

    def has_adapter(self, digest: bytes) -> bool:
        """Return whether an adapter is here."""
        return len(digest) == 32 and (self._adapters / digest.hex()).is_file()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def append(self, release: Release, envelope: bytes, scalars: bytes) -> Stored:
        """Return where the release lies; the same bytes again change nothing.

        scalars: its row without the number of its terms, which is given here.
        Raises AlreadyPublished if the owner published other bytes under this release number.
        """
        (stored,) = self.append_all([(release, envelope, scalars)])
        if isinstance(stored, VeilmartError):
            raise stored
        return stored

    def append_all(self, offers: Sequence[Offer]) -> list[Stored | VeilmartError]:
        """Return what became of releases that came together, in order: one transaction and one sync of the disk for all of them.

        An offer that is refused changes nothing for the others; all that are stored are under the same state.
        """
        if any(len(scalars) != SCALARS_BYTES for _, _, scalars in offers):
            raise FormatError(f"row: expected {SCALARS_BYTES} bytes of scalars")
        with self._writing.begin() as db:
            growing = _Growing(db)
            placed = [growing.place(*offer) for offer in offers]
            head, nodes = growing.head, _nodes(db)
            root, noticed = root_of(head.size, nodes), self._notices_state(db)
            return [
                at if isinstance(at, VeilmartError) else Stored(at, head, Log(root, tuple(prove_inclusion(at, head.size, nodes)), noticed))
                for at in placed
            ]

    def notices(self) -> list[bytes]:
        """Return all notices in order."""
        with self._engine.connect() as db:
            return _notices(db)

    def append_notice(self, notice: Notice, data: bytes) -> tuple[int, list[bytes]]:
        """Return the index of a notice and all notices, in one transaction; the same bytes again change nothing.

        Adapters that only releases name which no longer stand are deleted after the commit.
        Raises Unauthorised for a release of another owner, for a key that was rotated away or revoked, and for one to rotate to that is
        known here; NotFound for a release that is not here, or was taken back already: its owner can sign the same in other bytes for ever.
        """
        with self._writing.begin() as db:
            known = db.execute(select(NOTICES.c.position).where(NOTICES.c.body == data)).first()
            if known is None:
                releases = [_release(db, release_id) for release_id in notice.taken_back]
                if any(notice.owner not in _line(db, release.owner) for release in releases):
                    raise Unauthorised("notice: the release is of another owner")
                if notice.kind is Kind.WITHDRAWAL and _is_gone(db, notice.subjects[0]):
                    raise NotFound("notice: the release was taken back already")
                if notice.kind is not Kind.REVOCATION and _line(db, notice.owner)[-1] != notice.owner:
                    raise Unauthorised("notice: this key was rotated away")
                successor = notice.subjects[0] if notice.kind is Kind.ROTATION else None
                if successor is not None and _is_known(db, successor):
                    raise Unauthorised("notice: the new key is known at this market already")
                if successor is not None and _is_revoked(db, notice.owner):
                    raise Unauthorised("notice: this owner was revoked")
                position = db.execute(select(func.count()).select_from(NOTICES)).scalar_one()
                values = {"kind": str(notice.kind), "owner": notice.owner, "successor": successor, "body": data}
                db.execute(insert(NOTICES).values(position=position, **values))
                for release in releases:
                    if not _is_gone(db, release.release_id):
                        db.execute(insert(GONE).values(release_id=release.release_id))
            else:
                position = known.position
            entries = _notices(db)
        self._drop_adapters(notice.taken_back)
        return position, entries

    def _drop_adapters(self, release_ids: Iterable[bytes]) -> None:
        """Delete the adapters of releases that no longer stand, unless another one names them; again it changes nothing."""
        with self._engine.connect() as db:
            for release_id in release_ids:
                release = _release(db, release_id)
                where = _adapter_in_envelope(db.dialect.name, release.specification.dimension)
                if release.adapter is None or _names_adapter(db, where, release.adapter.digest):
                    continue
                (self._adapters / release.adapter.digest.hex()).unlink(missing_ok=True)

    def stands(self, release_id: bytes) -> bool:
        """Return whether a release was neither withdrawn nor revoked."""
        with self._engine.connect() as db:
            return db.execute(select(GONE).where(GONE.c.release_id == release_id)).first() is None

    def has_notice(self, data: bytes) -> bool:
        """Return whether a notice is logged."""
        with self._engine.connect() as db:
            return db.execute(select(NOTICES.c.position).where(NOTICES.c.body == data)).first() is not None

    def knows(self, key: bytes) -> bool:
        """Return whether a release or a notice here is of this key."""
        with self._engine.connect() as db:
            return _is_known(db, key)

    def may_own(self, owner: bytes) -> bool:
        """Return whether an owner was neither revoked nor has gone on under another key."""
        with self._engine.connect() as db:
            return db.execute(ENDED, {"of": owner}).first() is None

    def line_of(self, owner: bytes) -> list[bytes]:
        """Return all keys that an owner has had here, the oldest first."""
        with self._engine.connect() as db:
            while (before := db.execute(select(NOTICES.c.owner).where(NOTICES.c.successor == owner)).first()) is not None:
                owner = bytes(before.owner)
            return _line(db, owner)

    def releases_of(self, owners: Sequence[bytes]) -> list[bytes]:
        """Return the ids of all releases of these owners."""
        with self._engine.connect() as db:
            return [bytes(value) for (value,) in db.execute(select(RELEASES.c.release_id).where(RELEASES.c.owner.in_(owners)))]

    def owners(self) -> list[bytes]:
        """Return everybody who published here."""
        with self._engine.connect() as db:
            return [bytes(value) for (value,) in db.execute(select(RELEASES.c.owner).distinct())]

    def owners_from(self, start: int, most: int) -> list[bytes]:
        """Return the owners of at most `most` releases from a position on, in the order of the catalogue."""
        return self._column(RELEASES.c.owner, start, start + most)

    def head(self) -> Head:
        """Return the state of the catalogue, not signed."""
        with self._engine.connect() as db:
            return _head(db)

    def head_at(self, size: int) -> Head:
        """Return the state of the catalogue when it had `size` releases; raise NotFound for a size it never had."""
        with self._engine.connect() as db:
            if size > _head(db).size:  # before it is asked for: a stranger's number may be larger than any that SQLite knows
                raise NotFound(f"catalogue: it never had {size} releases")
            return _head(db, size)

    def log(self) -> tuple[Head, Log]:
        """Return the state of the catalogue, not signed, and the log of the same size."""
        with self._engine.connect() as db:
            head = _head(db)
            return head, self._log(db, head.size)

    def consistency(self, first: int, second: int) -> list[bytes]:
        """Return the proof that the log of `second` releases begins with that of `first`; raise NotFound for a size it never had."""
        with self._engine.connect() as db:
            if second > (size := _head(db).size):
                raise NotFound(f"log: it has {size} entries, not {second}")
            return prove_consistency(first, second, _nodes(db))

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """Return the proof that a release is at `index` of the log of `size` releases; raise NotFound for a size it never had."""
        with self._engine.connect() as db:
            if size > (have := _head(db).size):
                raise NotFound(f"log: it has {have} entries, not {size}")
            return prove_inclusion(index, size, _nodes(db))

    def root(self, size: int) -> bytes:
        """Return the root of the log of `size` releases; raise NotFound for a size it never had."""
        with self._engine.connect() as db:
            if size > (have := _head(db).size):
                raise NotFound(f"log: it has {have} entries, not {size}")
            return root_of(size, _nodes(db))

    def keep_cosigned(self, witness: str, size: int, note: bytes, signed_at: Callable[[bytes], int] = lambda note: 0) -> None:
        """Keep a checkpoint that a witness signed, unless one of that witness is kept that is larger, or as large and signed later.

        signed_at: when it signed a note.  Anybody can send an old note again, and notes count for a day.
        """
        with self._writing.begin() as db:
            known = db.execute(select(COSIGNED.c.size, COSIGNED.c.note).where(COSIGNED.c.witness == witness)).first()
            if known is None:
                db.execute(insert(COSIGNED).values(witness=witness, size=size, note=note))
            elif known.size < size or (known.size == size and signed_at(bytes(known.note)) <= signed_at(note)):
                db.execute(COSIGNED.update().where(COSIGNED.c.witness == witness).values(size=size, note=note))

    def cosigned(self) -> list[bytes]:
        """Return the newest checkpoint of each witness."""
        with self._engine.connect() as db:
            return [bytes(note) for (note,) in db.execute(select(COSIGNED.c.note).order_by(COSIGNED.c.witness))]

    def logged_under(self, owner: bytes, release_number: int) -> tuple[bytes, int, Head, Log]:
        """Return envelope and position of an owner's release of a number, and the state with its inclusion proof; raise NotFound."""
        with self._engine.connect() as db:
            query = select(RELEASES.c.position, RELEASES.c.envelope)
            found = db.execute(query.where(RELEASES.c.owner == owner, RELEASES.c.release_number == release_number)).first()
            if found is None:
                raise NotFound(f"release {release_number} of this owner: not here")
            head = _head(db)
            return bytes(found.envelope), found.position, head, self._log(db, head.size, found.position)

    def _log(self, db: Any, size: int, index: int | None = None) -> Log:
        """Return the log at a size with the notices of the same moment; the caller's transaction covers both."""
        return replace(_log(db, size, index), notices=self._notices_state(db))

    def _notices_state(self, db: Any) -> tuple[int, bytes]:
        count = db.execute(select(func.coalesce(func.max(NOTICES.c.position) + 1, 0))).scalar_one()
        if count != self._noticed[0]:  # the list only grows, so that its size tells its root
            self._noticed = count, root_of_all(_notices(db))
        return self._noticed

    def _complete_log(self) -> None:
        """Log the releases that a version without a log stored."""
        with self._writing.begin() as db:
            logged = db.execute(select(func.count()).where(NODES.c.level == 0)).scalar_one()
            for index in range(logged, _head(db).size):
                envelope = db.execute(select(RELEASES.c.envelope).where(RELEASES.c.position == index)).scalar_one()
                _append_to_log(db, index, bytes(envelope))

    def envelope(self, release_id: bytes) -> bytes:
        """Return the envelope of a release; raise NotFound."""
        with self._engine.connect() as db:
            return _envelope(db, release_id)

    def envelopes(self, start: int, stop: int) -> list[bytes]:
        """Return the envelopes of the positions [start, stop) in order."""
        return self._column(RELEASES.c.envelope, start, stop)

    def rows(self, start: int, stop: int) -> bytes:
        """Return the rows of the positions [start, stop), one after the other."""
        return b"".join(self._column(RELEASES.c.row, start, stop))

    def cards(self, start: int, stop: int) -> list[bytes]:
        """Return the cards of the positions [start, stop) in order."""
        return self._column(RELEASES.c.card, start, stop)

    def terms(self, start: int, stop: int) -> list[bytes]:
        """Return the terms with the numbers [start, stop) in order."""
        query = select(TERMS.c.body).where(TERMS.c.number >= start, TERMS.c.number < stop).order_by(TERMS.c.number)
        with self._engine.connect() as db:
            return [bytes(value) for (value,) in db.execute(query)]

    def page_chains(self, size: int) -> list[bytes]:
        """Return the chains of all pages of cards when the catalogue had `size` releases."""
        with self._engine.connect() as db:
            return _page_chains(db, size)

    def _column(self, column: Any, start: int, stop: int) -> list[bytes]:
        query = select(column).where(RELEASES.c.position >= start, RELEASES.c.position < stop).order_by(RELEASES.c.position)
        with self._engine.connect() as db:
            return [bytes(value) for (value,) in db.execute(query)]

    def adapter_file(self, digest: bytes) -> Path:
        """Return the file of an adapter; raise NotFound."""
        path = self._adapters / digest.hex()
        if len(digest) != 32 or not path.is_file():
            raise NotFound(
                f"adapter {digest.hex()[:16]}: not here", hint="its owner published the specification alone, or has not uploaded it"
            )
        return path

    def receive_adapter(self, digest: bytes, size_bytes: int) -> AdapterUpload:
        """Return an upload to write to; raise FormatError for a digest or size out of range."""
        if len(digest) != 32 or not 0 < size_bytes <= MAX_ADAPTER_BYTES:
            raise FormatError(f"adapter: expected a SHA-256 digest and 1 to {MAX_ADAPTER_BYTES} bytes")
        return AdapterUpload(self._adapters, digest, size_bytes)


class AdapterUpload:
    """An adapter on its way in: written beside the others, renamed among them only when size, digest and content are right."""

    def __init__(self, folder: Path, digest: bytes, size_bytes: int) -> None:
        self._folder, self._digest, self._size = folder, digest, size_bytes
        self._temporary = folder / f".upload-{secrets.token_hex(8)}"
        self._file = open(os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")  # noqa: SIM115 - closed in close()
        self._hash, self._written = hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        """Append a chunk; raise InvalidAdapter beyond the announced size."""
        self._written += len(data)
        if self._written > self._size:
            raise InvalidAdapter(f"adapter: expected {self._size} bytes, got more")
        self._hash.update(data)
        self._file.write(data)

    def finish(self, check: Callable[[int], None] = lambda file: None) -> None:
        """Keep the adapter; raise InvalidAdapter unless exactly the announced bytes came and `check` lets the file pass."""
        if self._written != self._size or self._hash.digest() != self._digest:
            raise InvalidAdapter("adapter: size or digest is not what was announced")
        self._file.flush()
        with self._temporary.open("rb") as readable:  # who checks it cannot change it
            check(readable.fileno())
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self._folder / self._digest.hex())
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        """Drop what was not finished."""
        try:
            self._file.close()  # writes what is buffered, which a full disk refuses
        finally:
            self._temporary.unlink(missing_ok=True)


def read_chunks(path: Path, size: int) -> Iterator[bytes]:
    """Return the file's content in chunks."""
    with path.open("rb") as file:
        while chunk := file.read(size):
            yield chunk


def _require_second_version(engine: Engine, home: Path) -> None:
    with engine.connect() as db:
        known = [row[1] for row in db.exec_driver_sql("PRAGMA table_info(release)")]
    if known and "page_chain" not in known:
        raise UsageError(
            f"{name_of(home)}: expected a catalogue of version 2, got an older one", hint="start in a new folder and publish again"
        )


LISTS = "free the disk or the lock, or put back a copy"


class Beside:
    """A list in the market's database; safe beside the running market, which shares it."""

    def __init__(self, engine: Engine, home: Path) -> None:
        self._engine, self._home = engine, home
        self._writing = writing(engine)

    @classmethod
    def open(cls, home: Path) -> Self:
        """Return the list of a market's folder."""
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with opened(home, MARKET, hint=LISTS) as engine:
            upgrade(engine, MARKET)
            return cls(engine, home)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _readable(self) -> Iterator[None]:
        with readable(self._home, hint=LISTS):
            yield


class _Growing:
    """The catalogue and its log while releases are appended in one transaction."""

    def __init__(self, db: Any) -> None:
        self._db, self.head = db, _head(db)
        self._pages, self._terms = _page_chains(db, self.head.size), dict[bytes, int]()

    def place(self, release: Release, envelope: bytes, scalars: bytes) -> int | VeilmartError:
        """Return the position of a release, appended if it is new, or why it is not taken."""
        asked = {"id": release.release_id, "of": release.owner, "numbered": release.release_number}
        known = self._db.execute(SAME, asked).first()
        if known is not None and bytes(known.release_id) == release.release_id:
            return int(known.position)
        if known is not None:
            return AlreadyPublished(f"release {release.release_number} of this owner is published with other bytes")
        head = self.head
        number, terms_size, terms_chain = self._number_of(Terms.of(release).body)
        if number >= MAX_TERMS:
            return NotAdmitted(
                f"terms: this market holds {MAX_TERMS} of them, and clients take no more", hint="use a licence that is there"
            )
        row = scalars + number.to_bytes(4, "little")
        rows_chain, card = extend_head(head.rows, [row]), card_of(release)
        if head.size % PAGE_SIZE == 0:
            self._pages.append(EMPTY_HEAD)
        self._pages[-1] = extend_head(self._pages[-1], [card])
        root = root_of_pages(self._pages)
        values = {
            "position": head.size, "release_id": release.release_id, "owner": release.owner, "release_number": release.release_number,
            "envelope": envelope, "row": row, "card": card, "rows_chain": rows_chain, "terms_size": terms_size,
            "terms_chain": terms_chain, "page_chain": self._pages[-1], "cards_root": root,
        }  # fmt: skip
        self._db.execute(ADD_RELEASE, values)
        _append_to_log(self._db, head.size, envelope)
        self.head = Head(head.size + 1, rows_chain, terms_size, terms_chain, root, b"")
        return head.size

    def _number_of(self, terms: bytes) -> tuple[int, int, bytes]:
        """Return the number of terms, given here if they are new, and the size and chain of all terms with them."""
        size, chain = self.head.terms_size, self.head.terms
        if terms not in self._terms:
            entry = self._db.execute(select(TERMS.c.number).where(TERMS.c.body == terms)).first()
            if entry is None and size >= MAX_TERMS:
                return size, size, chain
            if entry is None:
                self._db.execute(insert(TERMS), {"number": size, "body": terms})
                self._terms[terms] = size
                return size, size + 1, extend_head(chain, [terms])
            self._terms[terms] = entry.number
        return self._terms[terms], size, chain


def _head(db: Any, size: int | None = None) -> Head:
    state = (RELEASES.c.position, RELEASES.c.rows_chain, RELEASES.c.terms_size, RELEASES.c.terms_chain, RELEASES.c.cards_root)
    query = select(*state).order_by(RELEASES.c.position.desc()).limit(1)
    last = db.execute(query if size is None else query.where(RELEASES.c.position == size - 1)).first()
    if last is None:
        if size:
            raise NotFound(f"catalogue: it never had {size} releases")
        return EMPTY_CATALOGUE
    return Head(last.position + 1, bytes(last.rows_chain), last.terms_size, bytes(last.terms_chain), bytes(last.cards_root), b"")


def _envelope(db: Any, release_id: bytes) -> bytes:
    found = db.execute(select(RELEASES.c.envelope).where(RELEASES.c.release_id == release_id)).first()
    if not found:
        raise NotFound(f"release {release_id.hex()[:16]}: not here")
    return bytes(found.envelope)


def _release(db: Any, release_id: bytes) -> Release:
    return open_envelope(_envelope(db, release_id))


def _line(db: Any, owner: bytes) -> list[bytes]:
    """Return a key and those that follow it; no key is rotated to twice, so this ends."""
    line = [owner]
    while found := db.execute(select(NOTICES.c.successor).where(NOTICES.c.owner == line[-1], NOTICES.c.successor.is_not(None))).first():
        line.append(bytes(found.successor))
    return line


def _is_revoked(db: Any, owner: bytes) -> bool:
    revoked = NOTICES.c.kind == str(Kind.REVOCATION)
    return db.execute(select(NOTICES.c.position).where(NOTICES.c.owner == owner, revoked).limit(1)).first() is not None


def _is_gone(db: Any, release_id: bytes) -> bool:
    return db.execute(select(GONE).where(GONE.c.release_id == release_id)).first() is not None


def _is_known(db: Any, key: bytes) -> bool:
    published = db.execute(select(RELEASES.c.position).where(RELEASES.c.owner == key).limit(1)).first()
    noticed = db.execute(select(NOTICES.c.position).where((NOTICES.c.owner == key) | (NOTICES.c.successor == key)).limit(1)).first()
    return published is not None or noticed is not None


def _notices(db: Any) -> list[bytes]:
    return [bytes(value) for (value,) in db.execute(select(NOTICES.c.body).order_by(NOTICES.c.position))]


def _adapter_in_envelope(dialect: str, dimension: int) -> str:
    # A release ends with the digest of its adapter, as many sums as its map has coordinates, and the signature.
    from_end = HASH_BYTES + 4 * (dimension + 1) + SIGNATURE_BYTES
    # SQLite's form is that of the index in databases that are there.
    first = f"-{from_end}" if dialect == "sqlite" else f"length(envelope) - {from_end - 1}"
    return f"substr(envelope, {first}, {HASH_BYTES})"


def _names(where: str, digest: bytes) -> ColumnElement[bool]:
    return literal_column(where, LargeBinary) == digest


def _names_adapter(db: Any, where: str, digest: bytes, owner: bytes | None = None) -> bool:
    if digest == NO_ID:  # stands where a release names none
        return False
    query = select(RELEASES.c.position).where(_names(where, digest), STANDING).limit(1)
    return db.execute(query if owner is None else query.where(RELEASES.c.owner == owner)).first() is not None


def _page_chains(db: Any, size: int) -> list[bytes]:
    ends = [min((page + 1) * PAGE_SIZE, size) - 1 for page in range(pages_of(size))]
    chains = []
    for start in range(0, len(ends), 500):  # SQLite takes a bounded number of variables
        query = select(RELEASES.c.page_chain).where(RELEASES.c.position.in_(ends[start : start + 500])).order_by(RELEASES.c.position)
        chains += [bytes(value) for (value,) in db.execute(query)]
    return chains


def _nodes(db: Any) -> Nodes:
    @cache  # a root and a proof at one size share most of their subtrees
    def node(level: int, number: int) -> bytes:
        return bytes(db.execute(ONE_NODE, {"at": level, "which": number}).scalar_one())

    return node


def _append_to_log(db: Any, index: int, envelope: bytes) -> None:
    made = appended(index, leaf_hash(envelope), _nodes(db))
    db.execute(ADD_NODES, [{"level": level, "number": number, "hash": value} for level, number, value in made])


def _log(db: Any, size: int, index: int | None = None) -> Log:
    nodes = _nodes(db)
    return Log(root_of(size, nodes), () if index is None else tuple(prove_inclusion(index, size, nodes)))
