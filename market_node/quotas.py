"""How much one owner may hand in within a day: releases, and bytes of adapters.

What was handed in lies in a file of its own beside the market's database, so that a restart forgets nothing.  It is no part of a backup:
whoever loses it has given everybody a new day, and a power cut may give away the last seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    delete,
    event,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError

from market_node.migrations import QUOTAS, upgrade
from market_node.store import begin, configure
from protocol.errors import QuotaExceeded, UsageError
from protocol.release import MAX_ADAPTER_BYTES

METADATA = MetaData()
HANDED_IN = Table(
    "handed_in",
    METADATA,
    Column("owner", LargeBinary, nullable=False),
    Column("kind", String, nullable=False),
    Column("at", Integer, nullable=False),  # seconds since 1970
    Column("amount", Integer, nullable=False),
    Index("handed_in_by", "owner", "kind", "at"),
)
OF_OWNER = (  # asked for every release that comes, so built once
    select(HANDED_IN.c.at, HANDED_IN.c.amount)
    .where(HANDED_IN.c.owner == bindparam("of"), HANDED_IN.c.kind == bindparam("what"))
    .order_by(HANDED_IN.c.at)
)
WINDOW_S = 86_400


class Quota(Enum):
    """What is counted; the value says it to a person."""

    RELEASES = "releases"
    ADAPTER_BYTES = "bytes of adapters"
    ROTATIONS = "new keys"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one owner may hand in within any 24 hours; 0 for any amount."""

    releases: int = 100
    adapter_bytes: int = 1 << 30
    rotations: int = 10  # each is a notice that every client keeps for ever

    def __post_init__(self) -> None:
        if min(self.releases, self.adapter_bytes, self.rotations) < 0:
            raise UsageError("quotas: expected no negative number")
        if 0 < self.adapter_bytes < MAX_ADAPTER_BYTES:
            raise UsageError(f"quotas: expected at least {MAX_ADAPTER_BYTES >> 20} MB of adapters a day, since one may be as large")

    def of(self, kind: Quota) -> int:
        """Return the limit of a kind."""
        return {Quota.RELEASES: self.releases, Quota.ADAPTER_BYTES: self.adapter_bytes, Quota.ROTATIONS: self.rotations}[kind]


UNLIMITED = Limits(0, 0, 0)


class Quotas:
    """What every owner handed in within the last day, and the limits; used by one thread."""

    def __init__(self, engine: Engine, file: Path, limits: Limits) -> None:
        self._engine, self._file, self._limits = engine, file, limits
        self._writing = engine.execution_options(veilmart_writes=True)

    @classmethod
    def open(cls, home: Path, limits: Limits) -> Quotas:
        """Return the quotas in a market's folder."""
        file = home / "quotas.db"
        engine = create_engine(f"sqlite:///{file}", hide_parameters=True)
        event.listen(engine, "connect", configure)
        event.listen(engine, "connect", _without_sync)
        event.listen(engine, "begin", begin)
        quotas = cls(engine, file, limits)
        with quotas._readable():
            upgrade(engine, QUOTAS)
        return quotas

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def require(self, owner: bytes, kind: Quota, amount: int, now: int) -> None:
        """Return if an owner may hand in so much now; raise QuotaExceeded with the seconds after which it may."""
        limit = self._limits.of(kind)
        if not limit:
            return
        with self._readable(), self._engine.connect() as db:
            # A clock that was ahead left entries in the future: they count as of now, and not until that future has passed.
            recent = [(min(at, now), size) for at, size in db.execute(OF_OWNER, {"of": owner, "what": kind.name}) if at > now - WINDOW_S]
        left = limit - sum(size for _, size in recent) - amount
        if left >= 0:
            return
        wait = WINDOW_S
        for at, size in recent:  # the oldest leave the window first
            left += size
            if left >= 0:
                wait = max(at + WINDOW_S - now, 1)
                break
        raise QuotaExceeded(f"{kind.value}: this owner's limit is {limit} within 24 hours", retry_after_s=wait)

    def charge(self, owner: bytes, kind: Quota, amount: int, now: int) -> None:
        """Count what an owner handed in, and forget what left the window."""
        self.charge_all([owner], kind, amount, now)

    def charge_all(self, owners: Sequence[bytes], kind: Quota, amount: int, now: int) -> None:
        """Count what each of these owners handed in, an owner as often as it is named, in one transaction."""
        if not self._limits.of(kind) or not owners:
            return
        with self._readable(), self._writing.begin() as db:
            db.execute(update(HANDED_IN).where(HANDED_IN.c.at > now).values(at=now))
            db.execute(delete(HANDED_IN).where(HANDED_IN.c.at <= now - WINDOW_S))
            db.execute(insert(HANDED_IN), [{"owner": owner, "kind": kind.name, "at": now, "amount": amount} for owner in owners])

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except DatabaseError as error:
            raise UsageError(
                f"{self._file}: {error.orig}", hint="free the disk, or delete the file: everybody then has a new day"
            ) from None


def _without_sync(connection: Any, record: object) -> None:
    # Nobody is promised that a charge outlives a power cut, and a sync of the disk for each would be one of four for a release.
    del record
    connection.execute("PRAGMA synchronous=NORMAL")
