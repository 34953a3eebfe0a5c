"""Who may publish: invites that were handed out and the owners who used them, in the market's database.

An invite is for one owner, once; the market keeps a hash of its secret.  Everything that is wrong with an invite is one error.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from sqlalchemy import Column, LargeBinary, String, Table, func, insert, select

from market_node.store import METADATA, Beside, Whole
from protocol.enrolment import ORGANISATION, SECRET_BYTES, secret_hash
from protocol.errors import NotFound, Unauthorised, UsageError

INVITES = Table(
    "invite",
    METADATA,
    Column("secret_hash", LargeBinary(32), primary_key=True),
    Column("organisation", String, nullable=False),
    Column("expires", Whole, nullable=False),  # seconds since 1970
    Column("used_by", LargeBinary(32)),  # an owner's key
)
MEMBERS = Table(
    "member",
    METADATA,
    Column("owner", LargeBinary(32), primary_key=True),
    Column("organisation", String, nullable=False),
    Column("supernode_key", String, nullable=False),
    Column("joined", Whole, nullable=False),  # seconds since 1970
    Column("removed", Whole),
)
LONGEST_INVITE_S = 90 * 86_400


@dataclass(frozen=True, slots=True)
class Member:
    """An owner who may publish, or might until it was removed."""

    owner: bytes
    organisation: str
    supernode_key: str
    joined: int
    removed: int | None

    @property
    def node_name(self) -> str:
        """How its SuperNode is called: the organisation and the first digits of the owner's key."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.organisation.lower()).strip("-")
        return f"{slug[:40]}-{self.owner.hex()[:8]}".lstrip("-")


class Members(Beside):
    """The members of one market; safe beside the running market, which shares the database."""

    def invite(self, organisation: str, expires: int, most: int | None = None, now: int = 0) -> bytes:
        """Return the secret of a new invite; only its hash is kept.

        most: raise UsageError where an organisation has so many members and open invites already; None for any number.
        """
        if not ORGANISATION.fullmatch(organisation):
            raise UsageError("--org: expected 1 to 63 letters, digits, blanks, '.', '_', '-' between letters or digits")
        secret = secrets.token_bytes(SECRET_BYTES)
        with self._readable(), self._writing.begin() as db:
            is_open = INVITES.c.used_by.is_(None) & (INVITES.c.expires > now) & (INVITES.c.organisation == organisation)
            is_member = MEMBERS.c.removed.is_(None) & (MEMBERS.c.organisation == organisation)
            counts = [select(func.count()).select_from(table).where(which) for table, which in ((INVITES, is_open), (MEMBERS, is_member))]
            if most is not None and (have := sum(db.execute(count).scalar_one() for count in counts)) >= most:
                raise UsageError(
                    f"market invite: {organisation} has {have} members and open invites, and at most {most} are meant",
                    hint="--owners-per-org raises it; `veilmart market members` lists them",
                )
            db.execute(insert(INVITES).values(secret_hash=secret_hash(secret), organisation=organisation, expires=expires))
        return secret

    def enrol(self, secret: bytes, owner: bytes, supernode_key: str, now: int) -> Member:
        """Return the member that an invite makes of an owner; the same owner again changes nothing.

        Raises Unauthorised, in the same words, for an invite that is unknown, over, or used by another owner.
        """
        with self._readable(), self._writing.begin() as db:
            found = db.execute(select(INVITES).where(INVITES.c.secret_hash == secret_hash(secret))).first()
            known = db.execute(select(MEMBERS).where(MEMBERS.c.owner == owner)).first()
            again = found is not None and found.used_by == owner and known is not None and known.supernode_key == supernode_key
            if again and known is not None and known.removed is None:
                return Member(*known)
            if found is None or found.used_by is not None or now >= found.expires:
                raise Unauthorised("invite: unknown, used or expired", hint="ask the market's operator for a new one")
            if known is not None and known.removed is None and known.supernode_key != supernode_key:
                raise Unauthorised("invite: this owner is a member with another SuperNode", hint="the operator removes a member first")
            values = {"organisation": found.organisation, "supernode_key": supernode_key, "joined": now, "removed": None}
            if known is None:
                db.execute(insert(MEMBERS).values(owner=owner, **values))
            else:
                db.execute(MEMBERS.update().where(MEMBERS.c.owner == owner).values(values))
            db.execute(INVITES.update().where(INVITES.c.secret_hash == secret_hash(secret)).values(used_by=owner))
            return Member(owner, found.organisation, supernode_key, now, None)

    def knows(self, owner: bytes) -> bool:
        """Return whether this owner is or was a member."""
        with self._readable(), self._engine.connect() as db:
            return db.execute(select(MEMBERS.c.owner).where(MEMBERS.c.owner == owner)).first() is not None

    def rotate(self, owner: bytes, successor: bytes, now: int) -> None:
        """Let an owner go on under another key, as the member that it is; one that is none, or none any more, changes nothing."""
        with self._readable(), self._writing.begin() as db:
            known = db.execute(select(MEMBERS).where(MEMBERS.c.owner == owner, MEMBERS.c.removed.is_(None))).first()
            if known is not None and db.execute(select(MEMBERS.c.owner).where(MEMBERS.c.owner == successor)).first() is None:
                values = {"organisation": known.organisation, "supernode_key": known.supernode_key, "joined": now, "removed": None}
                db.execute(insert(MEMBERS).values(owner=successor, **values))
                db.execute(MEMBERS.update().where(MEMBERS.c.owner == owner).values(removed=now))

    def may_publish(self, owner: bytes) -> bool:
        """Return whether this owner is a member now."""
        with self._readable(), self._engine.connect() as db:
            return db.execute(select(MEMBERS.c.owner).where(MEMBERS.c.owner == owner, MEMBERS.c.removed.is_(None))).first() is not None

    def all(self) -> list[Member]:
        """Return all members, also those that were removed, in the order in which they joined."""
        with self._readable(), self._engine.connect() as db:
            return [Member(*row) for row in db.execute(select(MEMBERS).order_by(MEMBERS.c.joined, MEMBERS.c.owner))]

    def remove(self, owner: str, now: int) -> Member:
        """Return the member that is one no more, named by the first digits of its key; what it published stays in the log."""
        hits = [member for member in self.all() if member.removed is None and len(owner) >= 8 and member.owner.hex().startswith(owner)]
        if len(hits) != 1:
            raise NotFound(f"member {owner}: expected the first digits, at least 8, of one member's key", hint="`veilmart market members`")
        with self._readable(), self._writing.begin() as db:
            db.execute(MEMBERS.update().where(MEMBERS.c.owner == hits[0].owner).values(removed=now))
        return hits[0]
