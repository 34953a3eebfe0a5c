"""The market's store: releases in a database, adapters as content-addressed files.  Acknowledged means committed."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Engine, Integer, LargeBinary, MetaData, Table, UniqueConstraint, create_engine, event, insert, select
from sqlalchemy.exc import DatabaseError

from protocol.catalogue import (
    EMPTY_CATALOGUE,
    EMPTY_HEAD,
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
from protocol.errors import AlreadyPublished, FormatError, InvalidAdapter, NotFound, UsageError
from protocol.features import FeatureMap
from protocol.release import MAX_ADAPTER_BYTES, Release, open_envelope

METADATA = MetaData()
RELEASES = Table(
    "release",
    METADATA,
    Column("position", Integer, primary_key=True, autoincrement=False),  # from 0, without gaps
    Column("release_id", LargeBinary(32), nullable=False, unique=True),
    Column("owner", LargeBinary(32), nullable=False),
    Column("release_number", Integer, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("row", LargeBinary(16), nullable=False),
    Column("card", LargeBinary, nullable=False),
    # The state of the catalogue up to and with this release: chains over rows, terms and the cards of its page, and the root of all cards.
    Column("rows_chain", LargeBinary(32), nullable=False),
    Column("terms_size", Integer, nullable=False),
    Column("terms_chain", LargeBinary(32), nullable=False),
    Column("page_chain", LargeBinary(32), nullable=False),
    Column("cards_root", LargeBinary(32), nullable=False),
    UniqueConstraint("owner", "release_number"),
)
TERMS = Table(
    "terms",
    METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),  # from 0, in the order of first use
    Column("body", LargeBinary, nullable=False, unique=True),
)


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a release lies, and the catalogue's state that includes it."""

    position: int
    head: Head  # not signed


class Store:
    """All that a market keeps.  One writer; readers at any time."""

    def __init__(self, engine: Engine, home: Path) -> None:
        self.home = home
        self._engine, self._adapters = engine, home / "adapters"
        self._writing = engine.execution_options(veilmart_writes=True)

    @classmethod
    def open(cls, home: Path) -> Store:
        """Return the store in a folder, made if it is not there."""
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        adapters = home / "adapters"
        adapters.mkdir(exist_ok=True, mode=0o700)
        for half_written in adapters.glob(".upload-*"):  # a killed process leaves these; nothing was acknowledged for them
            half_written.unlink()
        engine = create_engine(f"sqlite:///{home / 'market.db'}", hide_parameters=True)  # they would reach the log in an error's text
        event.listen(engine, "connect", _configure)
        event.listen(engine, "begin", _begin)
        with _readable(home), engine.connect() as db:
            known = [row[1] for row in db.exec_driver_sql("PRAGMA table_info(release)")]
        if known and "page_chain" not in known:
            engine.dispose()
            raise UsageError(
                f"{home / 'market.db'}: expected a catalogue of version 2, got an older one", hint="start in a new folder and publish again"
            )
        with _readable(home):
            METADATA.create_all(engine)
        return cls(engine, home)

    def require_map(self, feature_map: FeatureMap) -> None:
        """Raise UsageError if the releases here are under another map: rows under two maps mean nothing together.

        The first one tells, since every release is checked against the map before it is appended.
        """
        with _readable(self.home):
            first = self.envelopes(0, 1)
        there = open_envelope(first[0]).specification.map_id if first else feature_map.map_id
        if there != feature_map.map_id:
            raise UsageError(
                f"{self.home}: expected the map of its releases, {name_of_map(there)}, got {name_of_map(feature_map.map_id)}",
                hint="start with --map of its releases, or in a new folder",
            )

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def append(self, release: Release, envelope: bytes, scalars: bytes) -> Stored:
        """Return where the release lies, in one transaction; the same bytes again change nothing.

        scalars: its row without the number of its terms, which is given here.
        Raises AlreadyPublished if the owner published other bytes under this release number.
        """
        if len(scalars) != SCALARS_BYTES:
            raise FormatError(f"row: expected {SCALARS_BYTES} bytes of scalars, got {len(scalars)}")
        with self._writing.begin() as db:
            head = _head(db)
            known = db.execute(select(RELEASES.c.position).where(RELEASES.c.release_id == release.release_id)).first()
            if known:
                return Stored(known.position, head)
            number = db.execute(
                select(RELEASES.c.position).where(RELEASES.c.owner == release.owner, RELEASES.c.release_number == release.release_number)
            ).first()
            if number:
                raise AlreadyPublished(f"release {release.release_number} of this owner is published with other bytes")
            terms, terms_size, terms_chain = Terms.of(release).body, head.terms_size, head.terms
            entry = db.execute(select(TERMS.c.number).where(TERMS.c.body == terms)).first()
            if entry is None:
                db.execute(insert(TERMS).values(number=terms_size, body=terms))
                terms_size, terms_chain = terms_size + 1, extend_head(terms_chain, [terms])
            row = scalars + (entry.number if entry else head.terms_size).to_bytes(4, "little")
            rows_chain, card, pages = extend_head(head.rows, [row]), card_of(release), _page_chains(db, head.size)
            if head.size % PAGE_SIZE == 0:
                pages.append(EMPTY_HEAD)
            pages[-1] = extend_head(pages[-1], [card])
            root = root_of_pages(pages)
            values = {
                "position": head.size, "release_id": release.release_id, "owner": release.owner, "release_number": release.release_number,
                "envelope": envelope, "row": row, "card": card, "rows_chain": rows_chain, "terms_size": terms_size,
                "terms_chain": terms_chain, "page_chain": pages[-1], "cards_root": root,
            }  # fmt: skip
            db.execute(insert(RELEASES).values(values))
        return Stored(head.size, Head(head.size + 1, rows_chain, terms_size, terms_chain, root, b""))

    def head(self) -> Head:
        """Return the state of the catalogue, not signed."""
        with self._engine.connect() as db:
            return _head(db)

    def head_at(self, size: int) -> Head:
        """Return the state of the catalogue when it had `size` releases; raise NotFound for a size it never had."""
        with self._engine.connect() as db:
            return _head(db, size)

    def envelope(self, release_id: bytes) -> bytes:
        """Return the envelope of a release; raise NotFound."""
        with self._engine.connect() as db:
            found = db.execute(select(RELEASES.c.envelope).where(RELEASES.c.release_id == release_id)).first()
        if not found:
            raise NotFound(f"release {release_id.hex()[:16]}: not here")
        return bytes(found.envelope)

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
    """An adapter on its way in: written beside the others, renamed among them only when size and digest are right."""

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

    def finish(self) -> None:
        """Keep the adapter; raise InvalidAdapter unless exactly the announced bytes came."""
        if self._written != self._size or self._hash.digest() != self._digest:
            raise InvalidAdapter("adapter: size or digest is not what was announced")
        self._file.flush()
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


@contextmanager
def _readable(home: Path) -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        raise UsageError(
            f"{home / 'market.db'}: expected a market's database, got: {error.orig}",
            hint="put back a copy of the file, or start in a new folder",
        ) from None


def _configure(connection: Any, record: object) -> None:
    del record
    connection.isolation_level = None  # transactions are ours, see "begin" above
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Any) -> None:
    # SQLite's driver begins transactions too late for a read followed by a write, so we begin them: a writer takes its lock before it
    # reads, or another could append in between; a reader takes none, or it would stop the writer.
    writes = connection.get_execution_options().get("veilmart_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _head(db: Any, size: int | None = None) -> Head:
    state = (RELEASES.c.position, RELEASES.c.rows_chain, RELEASES.c.terms_size, RELEASES.c.terms_chain, RELEASES.c.cards_root)
    query = select(*state).order_by(RELEASES.c.position.desc()).limit(1)
    last = db.execute(query if size is None else query.where(RELEASES.c.position == size - 1)).first()
    if last is None:
        if size:
            raise NotFound(f"catalogue: it never had {size} releases")
        return EMPTY_CATALOGUE
    return Head(last.position + 1, bytes(last.rows_chain), last.terms_size, bytes(last.terms_chain), bytes(last.cards_root), b"")


def _page_chains(db: Any, size: int) -> list[bytes]:
    ends = [min((page + 1) * PAGE_SIZE, size) - 1 for page in range(pages_of(size))]
    chains = []
    for start in range(0, len(ends), 500):  # SQLite takes a bounded number of variables
        query = select(RELEASES.c.page_chain).where(RELEASES.c.position.in_(ends[start : start + 500])).order_by(RELEASES.c.position)
        chains += [bytes(value) for (value,) in db.execute(query)]
    return chains
