"""Conflicts: two releases of one number that an owner's key signed, with a market's signature under both (docs/protocol.md 6.24).

An honest node never signs two: it is a copy of another, was put back from an older ledger, or its key is somebody else's too.  The first
release is in the market's log; the second was refused there.  Whoever holds the file can show both, without a network.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.claims import Claims, open_claims
from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidProof, InvalidSignature
from protocol.transparency import Checkpoint, Receipt

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CONFLICT = domain_tag("conflict", 1)
SIGNATURE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Conflict:
    """Evidence of two releases of one number."""

    receipt: Receipt  # of the release that is in the log
    second: bytes  # envelope of the one that was refused
    signature: bytes  # of the market

    @property
    def signed_bytes(self) -> bytes:
        """What the market signs."""
        parts = (self.receipt.to_bytes(), self.second)
        return encode(CONFLICT, {}, b"".join(struct.pack("<I", len(part)) + part for part in parts))

    def to_bytes(self) -> bytes:
        """Return the canonical bytes: kind `conflict`; receipt and second envelope with their lengths, signature."""
        return self.signed_bytes + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Conflict:
        """Return the evidence of its canonical bytes; raise FormatError for any others.  Nothing is verified yet."""
        metadata, payload = decode(CONFLICT, data)
        take(metadata, {}, "conflict")
        rest, parts = payload, []
        for _ in range(2):
            if len(rest) < 4 or len(rest) - 4 < (size := struct.unpack_from("<I", rest)[0]):
                raise FormatError("conflict: cut off")
            parts.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        conflict = cls(Receipt.from_bytes(parts[0]), parts[1], rest)
        if len(rest) != SIGNATURE_BYTES or conflict.to_bytes() != data:
            raise FormatError("conflict: not in canonical form")
        return conflict

    def verify(self) -> tuple[Claims, Claims, Checkpoint]:
        """Return the logged and the refused release and the checkpoint that the first is under.

        Raises InvalidSignature, InvalidProof or FormatError unless one owner signed both, under one number, they are two, the first is in
        the log, and the market signed that it was offered the second.
        """
        from cryptography.exceptions import InvalidSignature as BadSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.receipt.market_key).verify(self.signature, self.signed_bytes)
        except (BadSignature, ValueError):
            raise InvalidSignature("conflict: the market's signature does not verify") from None
        checkpoint = self.receipt.verify()
        first, second = open_claims(self.receipt.envelope), open_claims(self.second)  # both signatures of the owner
        if first.owner != second.owner:
            raise InvalidProof("conflict: expected two releases of one owner, got those of two")
        if first.release_number != second.release_number:
            raise InvalidProof(f"conflict: expected one number, got {first.release_number} and {second.release_number}")
        if first.release_id == second.release_id:
            raise InvalidProof("conflict: expected two releases, got one twice")
        return first, second, checkpoint


def sign_conflict(receipt: Receipt, second: bytes, market_key: Ed25519PrivateKey) -> Conflict:
    """Return the evidence that an owner signed the release of a receipt and a second one of the same number."""
    return Conflict(receipt, second, market_key.sign(Conflict(receipt, second, b"").signed_bytes))


def is_conflict(data: bytes) -> bool:
    """Return whether bytes are evidence of a conflict, as far as their beginning tells."""
    return data.startswith(CONFLICT)
