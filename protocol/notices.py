"""Notices: what is said about releases after they were published (docs/protocol.md 6.17).  The log of releases stays as it is.

    withdrawal   an owner takes a release of its own back
    rotation     an owner goes on under another key; both keys sign
    revocation   the market takes all releases of an owner back, and takes none any more

All notices of a market are one append-only list under a Merkle tree of its own, whose size and root the market signs, by themselves and
in every checkpoint of its log.  Whoever follows it holds all of them, so that one which is dropped or exchanged later shows; and who trusts
a witness learns of each that the witness saw.  Nothing here reads a socket or a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidProof, InvalidSignature
from protocol.transparency import HASH_BYTES, Checkpoint, appended, leaf_hash, prove_inclusion, root_of_all, verify_inclusion

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

NOTICE = domain_tag("notice", 1)
SUCCESSION = domain_tag("succession", 1)
LIST = domain_tag("notices", 1)
ID_BYTES, SIGNATURE_BYTES = 32, 64
MAX_NOTICE_BYTES = 1 << 20
MAX_NOTICES_BYTES = 1 << 26  # read of a list before the call is cancelled
MOST_RELEASES = 16_384  # of one revocation


class Kind(StrEnum):
    """What a notice does."""

    WITHDRAWAL = "withdrawal"
    ROTATION = "rotation"
    REVOCATION = "revocation"


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice, for one market alone."""

    kind: Kind
    market_key: bytes
    owner: bytes
    subjects: tuple[bytes, ...]  # ids of the releases that are taken back; of a rotation, the new key

    def __post_init__(self) -> None:
        if any(len(part) != ID_BYTES for part in (self.market_key, self.owner, *self.subjects)):
            raise FormatError("notice: expected keys and ids of 32 bytes")
        most = MOST_RELEASES if self.kind is Kind.REVOCATION else 1
        if len(self.subjects) > most or (self.kind is not Kind.REVOCATION and not self.subjects):
            raise FormatError(f"notice: expected at most {most} releases in a {self.kind}")
        if tuple(sorted(set(self.subjects))) != self.subjects or (self.kind is Kind.ROTATION and self.subjects == (self.owner,)):
            raise FormatError("notice: expected its releases in order and once each, or a key that is another one")

    @property
    def body(self) -> bytes:
        """What is signed."""
        return encode(NOTICE, {"kind": str(self.kind)}, self.market_key + self.owner + b"".join(self.subjects))

    @property
    def taken_back(self) -> tuple[bytes, ...]:
        """Ids of the releases that no longer stand."""
        return () if self.kind is Kind.ROTATION else self.subjects


def sign_notice(notice: Notice, key: Ed25519PrivateKey, successor: Ed25519PrivateKey | None = None) -> bytes:
    """Return a notice as it travels: its bytes and the signature of the owner, or of the market for a revocation.

    successor: of a rotation, the new key, which proves that whoever names it has it.
    """
    signed = notice.body + key.sign(notice.body)
    return signed + successor.sign(SUCCESSION + notice.body) if successor is not None else signed


def open_notice(data: bytes, market_key: bytes) -> Notice:
    """Return the notice if it is for this market and signed by whoever may; raise FormatError or InvalidSignature."""
    if len(data) > MAX_NOTICE_BYTES:
        raise FormatError(f"notice: expected at most {MAX_NOTICE_BYTES} bytes, got {len(data)}")
    metadata, payload = decode(NOTICE, data)
    (kind,) = take(metadata, {"kind": str}, "notice")
    if kind not in set(Kind):
        raise FormatError("notice: expected a withdrawal, a rotation or a revocation")
    signatures = SIGNATURE_BYTES * (2 if kind == Kind.ROTATION else 1)
    ids, rest = payload[:-signatures], payload[-signatures:]
    if len(rest) != signatures or len(ids) < 2 * ID_BYTES or len(ids) % ID_BYTES:
        raise FormatError("notice: expected keys, ids and signatures")
    parts = [ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)]
    notice = Notice(Kind(kind), parts[0], parts[1], tuple(parts[2:]))
    if notice.market_key != market_key:
        raise InvalidSignature("notice: it is for another market")
    _verify(market_key if notice.kind is Kind.REVOCATION else notice.owner, rest[:SIGNATURE_BYTES], notice.body)
    if notice.kind is Kind.ROTATION:
        _verify(notice.subjects[0], rest[SIGNATURE_BYTES:], SUCCESSION + notice.body)
    return notice


def market_of(data: bytes) -> bytes:
    """Return the key of the market that a notice is for; nothing is verified."""
    return decode(NOTICE, data)[1][:ID_BYTES]


def _verify(key: bytes, signature: bytes, data: bytes) -> None:
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (BadSignature, ValueError):
        raise InvalidSignature("notice: the signature does not verify") from None


# The list -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NoticesHead:
    """Size and root of a market's notices, signed by it."""

    size: int
    root: bytes
    signature: bytes

    @property
    def signed_bytes(self) -> bytes:
        """What the market signs."""
        return LIST + self.size.to_bytes(8, "little") + self.root

    def verify(self, market_key: bytes) -> None:
        """Raise InvalidSignature unless the market signed this."""
        if len(self.root) != HASH_BYTES or not 0 <= self.size < 1 << 40:
            raise FormatError("notices: expected a root of 32 bytes and a plausible size")
        _verify(market_key, self.signature, self.signed_bytes)


def sign_notices(entries: Sequence[bytes], market_key: Ed25519PrivateKey) -> NoticesHead:
    """Return the signed head of a list of notices."""
    head = NoticesHead(len(entries), root_of_all(entries), b"")
    return NoticesHead(head.size, head.root, market_key.sign(head.signed_bytes))


def open_notices(entries: Sequence[bytes], head: NoticesHead, market_key: bytes) -> tuple[Notice, ...]:
    """Return all notices of a market if it signed exactly these; raise otherwise."""
    head.verify(market_key)
    if len(entries) != head.size or root_of_all(entries) != head.root:
        raise FormatError(f"notices: expected the {head.size} under the signed head, got {len(entries)} that do not give it")
    return tuple(open_notice(entry, market_key) for entry in entries)


def require_listed(entries: Sequence[bytes], checkpoint: Checkpoint) -> None:
    """Raise InvalidProof unless the notices begin with those that a checkpoint binds; one without any binds none."""
    if checkpoint.notices is None:
        return
    size, root = checkpoint.notices
    if size > len(entries) or root_of_all(entries[:size]) != root:
        raise InvalidProof(f"notices: expected to begin with the {size} that the market signed in a checkpoint, got others")


def inclusion_in(entries: Sequence[bytes], index: int) -> list[bytes]:
    """Return the proof that a list holds its entry at an index."""
    nodes: dict[tuple[int, int], bytes] = {}
    for number, entry in enumerate(entries):
        nodes.update({(level, at): value for level, at, value in appended(number, leaf_hash(entry), lambda *at: nodes[at])})
    return prove_inclusion(index, len(entries), lambda *at: nodes[at])


def verify_logged(entry: bytes, index: int, inclusion: Sequence[bytes], head: NoticesHead, market_key: bytes) -> None:
    """Raise unless the market signed a list that holds this notice at this index: the sender keeps that as its receipt."""
    head.verify(market_key)
    verify_inclusion(leaf_hash(entry), index, head.size, inclusion, head.root)


def require_rightful(notices: Iterable[Notice], owner_of: Mapping[bytes, bytes]) -> None:
    """Raise InvalidProof if a release was withdrawn by somebody who is neither its owner nor goes on for it.

    owner_of: the owners of the releases that are known, by id.  A market that logs such a notice has signed that it did.
    """
    successor: dict[bytes, bytes] = {}
    for notice in notices:
        if notice.kind is Kind.ROTATION:
            successor.setdefault(notice.owner, notice.subjects[0])
        for release_id in notice.taken_back:
            owner = owner_of.get(release_id, notice.owner)
            passed: set[bytes] = set()
            while owner != notice.owner and owner not in passed and owner in successor:
                passed.add(owner)
                owner = successor[owner]
            if owner != notice.owner:
                raise InvalidProof(
                    f"notices: release {release_id.hex()[:16]} was taken back for an owner who is not its own",
                    hint="the market logged what no honest one would: keep the folder `catalogues` and ask its operator",
                )


def taken_back(notices: Iterable[Notice]) -> frozenset[bytes]:
    """Return the ids of all releases that no longer stand."""
    return frozenset(release_id for notice in notices for release_id in notice.taken_back)


def first_keys(notices: Iterable[Notice]) -> dict[bytes, bytes]:
    """Return, for each key that an owner went on under, the first key that this owner had; both signed each step between them."""
    first: dict[bytes, bytes] = {}
    for notice in notices:
        if notice.kind is Kind.ROTATION:
            first.setdefault(notice.subjects[0], first.get(notice.owner, notice.owner))
    return first
