"""How much one owner may hand in within a day: releases, and bytes of adapters.

What was handed in lies in a database of its own beside the market's, so that a restart forgets nothing.  It is no part of a backup:
whoever loses it has given everybody a new day, and a power cut may give away the last seconds.  Of several market processes each sees
what the others counted; what is under way at the same moment at two of them may exceed a limit together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sqlalchemy import (
    Column,
    Engine,
    Index,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    delete,
    insert,
    select,
    update,
)

from market_node.database import opened, readable, writing
from market_node.migrations import QUOTAS, upgrade
from market_node.store import Whole
from protocol.errors import QuotaExceeded, UsageError
from protocol.release import MAX_ADAPTER_BYTES

METADATA = MetaData()
HANDED_IN = Table(
    "handed_in",
    METADATA,
    Column("owner", LargeBinary, nullable=False),
    Column("kind", String, nullable=False),
    Column("at", Whole, nullable=False),  # seconds since 1970
    Column("amount", Whole, nullable=False),
    Index("handed_in_by", "owner", "kind", "at"),
)
OF_OWNER = (  # asked for every release that comes, so built once
    select(HANDED_IN.c.at, HANDED_IN.c.amount)
    .where(HANDED_IN.c.owner == bindparam("of"), HANDED_IN.c.kind == bindparam("what"))
    .order_by(HANDED_IN.c.at)
)
WINDOW_S = 86_400
OTHERWISE = "free the disk, or delete the file: everybody then has a new day"


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

    def __init__(self, engine: Engine, home: Path, limits: Limits) -> None:
        self._engine, self._home, self._limits = engine, home, limits
        self._writing = writing(engine)

    @classmethod
    def open(cls, home: Path, limits: Limits) -> Quotas:
        """Return the quotas of a market's folder."""
        with opened(home, QUOTAS, hint=OTHERWISE) as engine:
            upgrade(engine, QUOTAS)
            return cls(engine, home, limits)

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
        with readable(self._home, QUOTAS, OTHERWISE):
            yield
