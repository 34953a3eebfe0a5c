"""Witnesses: strangers to a market who sign its checkpoints after checking that its log only grew (docs/protocol.md 6.10).

A market can show different logs to different clients, and none of them notices alone.  A witness signs one log, and the one list of
notices that goes with it.  Who trusts a witness asks for its signature, under a checkpoint that the market proves to belong to the log it
shows, and for every notice that was under it.
Formats: C2SP tlog-cosignature (cosignature/v1) on the signed note of a checkpoint, and C2SP signed-note verifier keys.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.errors import FormatError, InvalidProof, InvalidSignature, UsageError
from protocol.notices import require_listed
from protocol.transparency import DASH, Checkpoint, decode_base64, encode_base64, open_checkpoint, verify_consistency

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

COSIGNATURE = 4  # signature type of a signed note
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")
MAX_AGE_S = 24 * 3600
CLOCKS_APART_S = 300


@dataclass(frozen=True, slots=True)
class Witness:
    """Name and Ed25519 public key of a witness."""

    name: str
    public_key: bytes

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or len(self.public_key) != 32:
            raise UsageError("witness: expected a name of letters, digits, '.', '_', '-', '/' and a key of 32 bytes")

    @property
    def key_id(self) -> bytes:
        """What its signature lines begin with, 4 bytes."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([COSIGNATURE]) + self.public_key).digest()[:4]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{encode_base64(bytes([COSIGNATURE]) + self.public_key)}"

    @classmethod
    def parse(cls, text: str) -> Witness:
        """Return the witness of a verifier key NAME+HEX+BASE64; raise UsageError."""
        try:
            name, _, key = text.split("+", 2)
            data = decode_base64(key)
            witness = cls(name, data[1:])
        except (ValueError, FormatError):
            raise UsageError("witness: expected a verifier key NAME+HEX+BASE64", hint="`veilmart market witness` prints it") from None
        if data[:1] != bytes([COSIGNATURE]) or str(witness) != text:
            raise UsageError("witness: the parts of its verifier key do not fit each other", hint="copy it whole")
        return witness


def cosign(note: bytes, name: str, key: Ed25519PrivateKey, now: int) -> bytes:
    """Return the note with a witness's line.  The caller has verified note and log before; `now` in seconds since 1970."""
    witness = Witness(name, key.public_key().public_bytes_raw())
    signature = key.sign(_signed(note, now))
    line = encode_base64(witness.key_id + struct.pack(">Q", now) + signature)
    return note + f"{DASH} {name} {line}\n".encode()


def cosigned_at(note: bytes, witness: Witness) -> int:
    """Return when this witness signed this note, in seconds since 1970; raise InvalidSignature if it did not."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    for line in note.partition(b"\n\n")[2].split(b"\n"):
        words = line.split(b" ")
        if len(words) != 3 or words[0] != DASH.encode() or words[1] != witness.name.encode():
            continue
        try:
            data = decode_base64(words[2])
        except FormatError:
            continue
        if len(data) == 4 + 8 + 64 and data[:4] == witness.key_id:
            (when,) = struct.unpack(">Q", data[4:12])
            try:
                Ed25519PublicKey.from_public_bytes(witness.public_key).verify(data[12:], _signed(note, when))
            except (BadSignature, ValueError):
                continue
            return int(when)
    raise InvalidSignature(f"checkpoint: not signed by the witness {witness.name}")


def require_witnessed(
    notes: Sequence[bytes],
    witnesses: Sequence[Witness],
    market_key: bytes,
    shown: Checkpoint,
    prove: Callable[[int, int], Sequence[bytes]],
    now: float,
) -> list[str]:
    """Return the names of the witnesses under whose checkpoints `shown` stands; raise InvalidProof if there is none of the last 24 hours.

    notes: what the market hands out.  prove: asks it for consistency proofs.
    """
    found = []
    for witness in witnesses:
        for note in notes:
            try:
                seen, when = open_checkpoint(note, market_key), cosigned_at(note, witness)
            except (FormatError, InvalidSignature):
                continue
            if not now - MAX_AGE_S <= when <= now + CLOCKS_APART_S or not 1 <= seen.size <= shown.size:
                continue
            # What a witness signed, and what is shown here: one log, or the market is caught.
            verify_consistency(seen.size, shown.size, seen.root, shown.root, prove(seen.size, shown.size) if seen.size < shown.size else ())
            if seen.size == shown.size and seen.catalogue != shown.catalogue:
                raise InvalidProof(f"checkpoint: the witness {witness.name} signed another catalogue over the same log")
            found.append(witness.name)
            break
    if not found:
        raise InvalidProof(
            f"checkpoint: none of the {len(witnesses)} witnesses trusted here signed this log within 24 hours",
            hint="is a witness running (`veilmart market witness`), and is this computer's clock right?",
        )
    return found


def require_witnessed_notices(
    entries: Sequence[bytes], notes: Sequence[bytes], witnesses: Sequence[Witness], market_key: bytes, now: float
) -> list[str]:
    """Return the names of the witnesses that signed a beginning of these notices; raise InvalidProof if none did within 24 hours.

    notes: what the market hands out.  A list that lacks what one of them signed is refused whatever the others signed.
    """
    found = []
    for witness in witnesses:
        for note in notes:
            try:
                seen, when = open_checkpoint(note, market_key), cosigned_at(note, witness)
            except (FormatError, InvalidSignature):
                continue
            if now - MAX_AGE_S <= when <= now + CLOCKS_APART_S and seen.notices is not None:
                require_listed(entries, seen)
                found.append(witness.name)
                break
    if not found:
        raise InvalidProof(
            f"notices: none of the {len(witnesses)} witnesses trusted here signed them within 24 hours",
            hint="is a witness of this version running (`veilmart market witness`)?",
        )
    return found


def _signed(note: bytes, when: int) -> bytes:
    text, _, _ = note.partition(b"\n\n")
    return f"cosignature/v1\ntime {when}\n".encode() + text + b"\n"
