"""Sealed questions and answers: what a querier and a guard say to each other past a market that forwards bytes (docs/protocol.md 6.14).

    introduction   who answers for a release, under which key, and what may be asked; signed by the release's owner
    question       text and a key for the answer, sealed to the introduction's key (HPKE, RFC 9180, base mode)
    answer         text, sealed to the question's key

The market can show an older introduction of the same owner until it is over, and nothing else: a question says under which introduction it
was sealed, an answer is bound to the question by a secret that only the guard read in it.  Nothing here reads a socket, a file or a clock.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidSignature, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

INTRODUCTION = domain_tag("introduction", 1)
ANNOUNCEMENT = domain_tag("announcement", 1)
QUESTION = domain_tag("question", 1)
ASKER = domain_tag("asker", 1)
REPLY = domain_tag("reply", 1)
SEALED_QUESTION = domain_tag("sealed-question", 1)
SEALED_REPLY = domain_tag("sealed-reply", 1)

ID_BYTES, SIGNATURE_BYTES = 32, 64
CHALLENGE_BYTES = SECRET_BYTES = 32
SIZES = (4 << 10, 16 << 10, 64 << 10)  # of what is sealed: the market sees which of them, and no length
REPLY_BYTES_A_TOKEN = 12  # twice what text takes: the size of an answer follows from what was asked for
MAX_SEALED_BYTES = SIZES[-1] + 2048
MAX_INTRODUCTION_BYTES = 4096
MAX_QUESTION_BYTES = 32 << 10  # of text in UTF-8
MAX_REPLY_BYTES = 60 << 10
MAX_TOKENS = 2048


class Suite(StrEnum):
    """How keys are agreed on; HKDF-SHA256 and AES-128-GCM follow in both."""

    X25519 = "x25519"
    HYBRID = "mlkem768-x25519"  # stays sealed unless both are broken: what is recorded today is safe from tomorrow's quantum computer

    @property
    def overhead_bytes(self) -> int:
        """How much longer what is sealed is than what was padded: the encapsulated key and a tag of 16 bytes."""
        return 48 if self is Suite.X25519 else 1136


KEY_BYTES = {Suite.X25519: 32, Suite.HYBRID: 1184 + 32}


class Refusal(StrEnum):
    """Why a guard gives no answer; told to the querier, sealed as an answer is."""

    NONE = ""
    UNKNOWN_ASKER = "unknown-asker"
    TOO_LONG = "too-long"
    TOO_MANY = "too-many"


# Sealing ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpeningKey:
    """The key that opens what was sealed to its public half; lives in memory alone."""

    suite: Suite
    public: bytes
    _private: Any = field(repr=False)

    @classmethod
    def generate(cls, suite: Suite = Suite.HYBRID) -> OpeningKey:
        """Return a fresh key."""
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
        from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

        classical = X25519PrivateKey.generate()
        public = classical.public_key().public_bytes_raw()
        if suite is Suite.X25519:
            return cls(suite, public, classical)
        lattice = MLKEM768PrivateKey.generate()
        return cls(suite, lattice.public_key().public_bytes_raw() + public, MLKEM768X25519PrivateKey(lattice, classical))

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """Return what was sealed to this key under the same info; raise InvalidSignature for anything else."""
        from cryptography.exceptions import InvalidTag

        try:
            return _unpadded(_hpke(self.suite).decrypt(sealed, self._private, info))
        except (InvalidTag, ValueError):
            raise InvalidSignature("relay: what came does not open with this key") from None


def seal(suite: Suite, public: bytes, content: bytes, info: bytes, least_bytes: int = 0) -> bytes:
    """Return the content, padded to the smallest size that holds it and `least_bytes`, sealed to a public key."""
    sealed: bytes = _hpke(suite).encrypt(_padded(content, least_bytes), _public_key(suite, public), info)
    return sealed


def _hpke(suite: Suite) -> Any:
    from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM
    from cryptography.hazmat.primitives.hpke import Suite as Hpke

    kem = KEM.X25519 if suite is Suite.X25519 else KEM.MLKEM768_X25519
    return Hpke(kem, KDF.HKDF_SHA256, AEAD.AES_128_GCM)


def _public_key(suite: Suite, public: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
    from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

    try:
        classical = X25519PublicKey.from_public_bytes(public[-32:])
        if suite is Suite.X25519:
            return classical
        return MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(public[:-32]), classical)
    except ValueError:
        raise FormatError(f"relay: expected a public key of {suite}") from None


def _padded(content: bytes, least_bytes: int) -> bytes:
    framed = len(content).to_bytes(4, "little") + content
    for size in SIZES:
        if max(len(framed), least_bytes) <= size:
            return framed.ljust(size, b"\0")
    raise UsageError(f"relay: expected at most {SIZES[-1] - 4} bytes, got {len(content)}", hint="ask something shorter")


def _unpadded(padded: bytes) -> bytes:
    length = int.from_bytes(padded[:4], "little")
    content, rest = padded[4 : 4 + length], padded[4 + length :]
    if len(padded) not in SIZES or len(content) != length or rest.strip(b"\0"):
        raise FormatError("relay: expected padding of zeros to one of the sizes")
    return content


# Introductions ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Introduction:
    """Who answers for a release, under which key, and what may be asked."""

    owner: bytes  # Ed25519 public key, that of the release
    release_id: bytes
    suite: Suite
    public: bytes  # key that questions are sealed to
    expires: int  # seconds since 1970
    known_askers: bool  # whether the owner answers to askers of its choice alone
    longest_question: int  # bytes of UTF-8
    most_tokens: int  # of an answer

    def __post_init__(self) -> None:
        if len(self.owner) != ID_BYTES or len(self.release_id) != ID_BYTES or len(self.public) != KEY_BYTES[self.suite]:
            raise FormatError("introduction: expected owner and release of 32 bytes, and a key of its suite")
        if not 0 < self.expires < 1 << 40:
            raise FormatError("introduction: expected an end in seconds since 1970")
        if not (1 <= self.longest_question <= MAX_QUESTION_BYTES and 1 <= self.most_tokens <= MAX_TOKENS):
            raise FormatError(f"introduction: expected questions of 1 to {MAX_QUESTION_BYTES} bytes, answers of 1 to {MAX_TOKENS} tokens")

    @property
    def body(self) -> bytes:
        """What is signed."""
        metadata = {
            "expires": self.expires, "known_askers": int(self.known_askers), "longest_question": self.longest_question,
            "most_tokens": self.most_tokens, "suite": str(self.suite),
        }  # fmt: skip
        return encode(INTRODUCTION, metadata, self.owner + self.release_id + self.public)


def sign_introduction(introduction: Introduction, owner_key: Ed25519PrivateKey) -> bytes:
    """Return an introduction as it travels: its bytes and the owner's signature."""
    return introduction.body + owner_key.sign(introduction.body)


def open_introduction(data: bytes) -> Introduction:
    """Return the introduction that the owner which it names signed; raise FormatError or InvalidSignature."""
    if not SIGNATURE_BYTES < len(data) <= MAX_INTRODUCTION_BYTES:
        raise FormatError(f"introduction: expected {SIGNATURE_BYTES + 1} to {MAX_INTRODUCTION_BYTES} bytes, got {len(data)}")
    body, signature = data[:-SIGNATURE_BYTES], data[-SIGNATURE_BYTES:]
    metadata, payload = decode(INTRODUCTION, body)
    fields = {"expires": int, "known_askers": int, "longest_question": int, "most_tokens": int, "suite": str}
    expires, known, longest, most, suite = take(metadata, fields, "introduction")
    if suite not in set(Suite) or known not in (0, 1):
        raise FormatError("introduction: unknown suite, or known_askers neither 0 nor 1")
    owner, release_id, public = payload[:ID_BYTES], payload[ID_BYTES : 2 * ID_BYTES], payload[2 * ID_BYTES :]
    introduction = Introduction(owner, release_id, Suite(suite), public, expires, bool(known), longest, most)
    _verify(owner, signature, body, "introduction: the owner's signature does not verify")
    return introduction


def require_introduction(data: bytes, owner: bytes, release_id: bytes, now: int) -> Introduction:
    """Return the introduction if the release's own owner made it for that release and it is not over.

    Without this the market could answer in the owner's place: it chooses which key is shown.
    """
    introduction = open_introduction(data)
    if introduction.owner != owner:
        raise InvalidSignature("introduction: signed by another owner than the release", hint="the market showed a key of somebody else")
    if introduction.release_id != release_id:
        raise InvalidSignature("introduction: of another release than was asked for")
    if introduction.expires <= now:
        raise InvalidSignature("introduction: it is over", hint="is this machine's clock right?  Otherwise the market shows an old key")
    return introduction


def announcement_bytes(market_key: bytes, challenge: bytes, introduction: bytes) -> bytes:
    """Return what an owner signs to answer at a market: introductions are public, so one alone must not take the owner's place."""
    return ANNOUNCEMENT + market_key + challenge + hashlib.sha256(introduction).digest()


def verify_announcement(market_key: bytes, challenge: bytes, introduction: bytes, owner: bytes, signature: bytes) -> None:
    """Raise InvalidSignature unless the owner signed this market's challenge."""
    signed = announcement_bytes(market_key, challenge, introduction)
    _verify(owner, signature, signed, "announcement: the owner's signature does not verify")


def _verify(key: bytes, signature: bytes, data: bytes, message: str) -> None:
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (BadSignature, ValueError):
        raise InvalidSignature(message) from None


# Questions and answers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """What a guard reads: the text, and how the answer is sealed."""

    text: str
    tokens: int  # at most, of the answer
    asker: bytes  # Ed25519 public key, verified; empty: nobody in particular
    sealed_digest: bytes
    _suite: Suite
    _reply_key: bytes
    _secret: bytes = field(repr=False)

    def seal(self, reply: Reply) -> bytes:
        """Return a reply, sealed to this question's asker; its size follows from the tokens that were asked for."""
        metadata = {"finished": int(reply.finished), "refusal": str(reply.refusal), "text": reply.text, "tokens": reply.tokens}
        least = min(self.tokens * REPLY_BYTES_A_TOKEN, SIZES[-1])
        return seal(self._suite, self._reply_key, encode(REPLY, metadata, b""), SEALED_REPLY + self.sealed_digest + self._secret, least)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a guard answers."""

    text: str
    tokens: int
    finished: bool  # False if it was cut at the limit
    refusal: Refusal = Refusal.NONE


@dataclass(frozen=True, slots=True)
class Asked:
    """A sealed question, and what opens its answer."""

    sealed: bytes
    _key: OpeningKey = field(repr=False)
    _secret: bytes = field(repr=False)

    def open(self, sealed: bytes) -> Reply:
        """Return the reply; raise InvalidSignature unless whoever sealed it had read this question."""
        info = SEALED_REPLY + hashlib.sha256(self.sealed).digest() + self._secret
        metadata, payload = decode(REPLY, self._key.open(sealed, info))
        text, tokens, finished, refusal = take(metadata, {"text": str, "tokens": int, "finished": int, "refusal": str}, "reply")
        if payload or finished not in (0, 1) or refusal not in set(Refusal) or not 0 <= tokens <= MAX_TOKENS:
            raise FormatError("reply: a field is out of range")
        return Reply(text, tokens, bool(finished), Refusal(refusal))


def ask(introduction: bytes, text: str, tokens: int, asker_key: Ed25519PrivateKey | None = None) -> Asked:
    """Return a question sealed under an introduction that was verified before.

    asker_key: signs the question, inside the seal, where the owner answers to known askers alone; nothing else tells who asks.
    """
    shown = open_introduction(introduction)
    length = len(text.encode("utf-8", "surrogatepass"))
    if not 1 <= length <= shown.longest_question:
        raise UsageError(f"question: this owner takes 1 to {shown.longest_question} bytes, got {length}")
    if not 1 <= tokens <= shown.most_tokens:
        raise UsageError(f"question: this owner answers with at most {shown.most_tokens} tokens, got {tokens}", hint="give --tokens")
    key, secret, digest = OpeningKey.generate(shown.suite), secrets.token_bytes(SECRET_BYTES), hashlib.sha256(introduction).digest()
    content = encode(QUESTION, {"signed": int(asker_key is not None), "text": text, "tokens": tokens}, secret + key.public)
    if asker_key is not None:
        content += asker_key.public_key().public_bytes_raw() + asker_key.sign(ASKER + digest + content)
    return Asked(digest + seal(shown.suite, shown.public, content, SEALED_QUESTION + digest), key, secret)


def introduction_of(sealed: bytes) -> bytes:
    """Return the digest of the introduction that a question was sealed under."""
    if not ID_BYTES < len(sealed) <= MAX_SEALED_BYTES:
        raise FormatError(f"question: expected at most {MAX_SEALED_BYTES} bytes, got {len(sealed)}")
    return sealed[:ID_BYTES]


def open_question(sealed: bytes, introduction: bytes, key: OpeningKey) -> Question:
    """Return the question; raise InvalidSignature or FormatError unless it was sealed to this key under this introduction."""
    digest = introduction_of(sealed)
    if digest != hashlib.sha256(introduction).digest():
        raise InvalidSignature("question: sealed under another introduction")
    content = key.open(sealed[ID_BYTES:], SEALED_QUESTION + digest)
    metadata, payload = decode(QUESTION, content)
    text, tokens, signed = take(metadata, {"text": str, "tokens": int, "signed": int}, "question")
    end = SECRET_BYTES + KEY_BYTES[key.suite]
    secret, reply_key, rest = payload[:SECRET_BYTES], payload[SECRET_BYTES:end], payload[end:]
    if signed not in (0, 1) or len(reply_key) != KEY_BYTES[key.suite] or len(rest) != signed * (ID_BYTES + SIGNATURE_BYTES):
        raise FormatError("question: a field is out of range")
    if not 1 <= tokens <= MAX_TOKENS:
        raise FormatError(f"question: expected 1 to {MAX_TOKENS} tokens")
    asker = rest[:ID_BYTES]
    if signed:
        _verify(asker, rest[ID_BYTES:], ASKER + digest + content[: -len(rest)], "question: the asker's signature does not verify")
    _public_key(key.suite, reply_key)
    return Question(text, tokens, asker, hashlib.sha256(sealed).digest(), key.suite, reply_key, secret)
