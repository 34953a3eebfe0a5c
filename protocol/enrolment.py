"""Enrolment: how an owner's key becomes a market's member with one line of text (docs/protocol.md 6.12).

invite     one line that the operator hands over: address, authority and key of the market, a secret for one use, when it ends
enrolment  the secret, the owner's key, the SuperNode's key, and the owner's signature over all three and the market's key
words      a key as a few pronounceable words, which two people compare on the telephone
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidSignature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

INVITE = domain_tag("invite", 1)
ENROLMENT = domain_tag("enrolment", 1)
SECRET = domain_tag("invite-secret", 1)
PREFIX = "veilmart-invite-"
ORGANISATION = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ._-]{0,61}[A-Za-z0-9])?")
WHOLE = "copy the whole line of `veilmart market invite`"
SECRET_BYTES, CHECK_BYTES = 32, 8
MAX_INVITE_CHARACTERS = 8192
MAX_SUPERNODE_KEY = 600
WORDS = 4
CONSONANTS, VOWELS = "bdfghjklmnprstvz", "aiou"  # proquints: Wilkerson, arXiv:0901.4016


def words_of(key: bytes) -> str:
    """Return a key's fingerprint, 64 bits of its SHA-256, as four proquints."""
    digest = hashlib.sha256(key).digest()
    return "-".join(_proquint(int.from_bytes(digest[2 * i : 2 * i + 2], "big")) for i in range(WORDS))


def _proquint(value: int) -> str:
    letters = (
        CONSONANTS[value >> 12],
        VOWELS[value >> 10 & 3],
        CONSONANTS[value >> 6 & 15],
        VOWELS[value >> 4 & 3],
        CONSONANTS[value & 15],
    )
    return "".join(letters)


@dataclass(frozen=True, slots=True)
class Invite:
    """What an operator hands to one organisation."""

    address: str  # HOST:PORT
    organisation: str
    expires: int  # seconds since 1970
    market_key: bytes
    secret: bytes
    authority: bytes  # the market's certificate authority, PEM

    def __str__(self) -> str:
        metadata = {"address": self.address, "expires": self.expires, "organisation": self.organisation}
        data = encode(INVITE, metadata, self.market_key + self.secret + self.authority)
        data += hashlib.sha256(data).digest()[:CHECK_BYTES]  # a line that was copied in part must not look whole
        return PREFIX + base64.urlsafe_b64encode(data).decode("ascii").rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Invite:
        """Return the invite of its line; raise FormatError for any other, without quoting it: it holds a secret."""
        text = text.strip()
        if not text.startswith(PREFIX) or len(text) > MAX_INVITE_CHARACTERS:
            raise FormatError(f"invite: expected one line that begins with {PREFIX}", hint=WHOLE)
        body = text.removeprefix(PREFIX)
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raise FormatError("invite: not all of it is there", hint=WHOLE) from None
        data, check = data[:-CHECK_BYTES], data[-CHECK_BYTES:]
        if hashlib.sha256(data).digest()[:CHECK_BYTES] != check:
            raise FormatError("invite: not all of it is there", hint=WHOLE)
        metadata, payload = decode(INVITE, data)
        address, expires, organisation = take(metadata, {"address": str, "expires": int, "organisation": str}, "invite")
        key, secret, authority = payload[:32], payload[32 : 32 + SECRET_BYTES], payload[32 + SECRET_BYTES :]
        if len(secret) != SECRET_BYTES or not authority.startswith(b"-----BEGIN CERTIFICATE-----"):
            raise FormatError("invite: not all of it is there", hint=WHOLE)
        return cls(address, organisation, expires, key, secret, authority)


def secret_hash(secret: bytes) -> bytes:
    """Return what a market keeps of an invite's secret."""
    return hashlib.sha256(SECRET + secret).digest()


def enrolment_bytes(market_key: bytes, secret: bytes, owner: bytes, supernode_key: str) -> bytes:
    """Return what an owner signs to enrol: that the key is its own, for this market, invite and SuperNode alone."""
    return ENROLMENT + market_key + secret_hash(secret) + owner + hashlib.sha256(supernode_key.encode()).digest()


def sign_enrolment(market_key: bytes, secret: bytes, owner_key: Ed25519PrivateKey, supernode_key: str) -> bytes:
    """Return the owner's signature, 64 bytes."""
    return owner_key.sign(enrolment_bytes(market_key, secret, owner_key.public_key().public_bytes_raw(), supernode_key))


def verify_enrolment(market_key: bytes, secret: bytes, owner: bytes, supernode_key: str, signature: bytes) -> None:
    """Raise InvalidSignature unless the holder of the owner's key asked for exactly this."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(owner).verify(signature, enrolment_bytes(market_key, secret, owner, supernode_key))
    except (BadSignature, ValueError):
        raise InvalidSignature("enrolment: the owner's signature does not verify") from None
