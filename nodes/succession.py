"""Which keys an owner had before: rotations that both keys signed, kept beside the key, and found again in a market's notices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import UsageError
from protocol.keys import signing_key, write_durably
from protocol.notices import Kind, Notice, market_of, open_notice, sign_notice

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY, NEXT = "owner.key", "owner.key.next"


def keys_before(folder: Path, owner: bytes) -> tuple[bytes, ...]:
    """Return the keys that this owner had before in a population's folder, the newest first; raise for a rotation that was forged."""
    known = {}
    for path in sorted((folder / "rotations").glob("*.rotation")):
        data = path.read_bytes()
        notice = open_notice(data, market_of(data))
        if notice.kind is Kind.ROTATION:
            known[notice.subjects[0]] = notice.owner
    before: list[bytes] = []
    while (old := known.get(owner)) is not None and old not in before:
        before.append(owner := old)
    return tuple(before)


def keep_rotations(folder: Path, owner: bytes, rotations: Iterable[bytes]) -> None:
    """Keep, of these rotations, those that led to an owner's key, in a population's folder."""
    by_new = {open_notice(data, market_of(data)).subjects[0]: data for data in rotations}
    while (data := by_new.pop(owner, None)) is not None:
        path = folder / "rotations" / f"{owner.hex()}.rotation"
        if not path.exists():
            write_durably(path, data)
        owner = open_notice(data, market_of(data)).owner


def begin_rotation(folder: Path, market_key: bytes) -> tuple[bytes, bytes]:
    """Return the notice of a rotation to a new key, and that key's public half; the same again until `finish_rotation`.

    The new key lies on the disk before anybody is told of it.
    """
    if not (folder / KEY).exists():
        raise UsageError(f"{folder / KEY}: there is no key to rotate", hint="--population names another one")
    old, new = signing_key(folder / KEY), signing_key(folder / NEXT)
    public = _public(new)
    return sign_notice(Notice(Kind.ROTATION, market_key, _public(old), (public,)), old, new), public


def finish_rotation(folder: Path, notice: bytes) -> None:
    """Put the new key in the old one's place, after the market logged the notice; the old key is gone then."""
    keep_rotations(folder, _public(signing_key(folder / NEXT)), [notice])  # first: it tells the ledger whose key the new one is
    os.replace(folder / NEXT, folder / KEY)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()
