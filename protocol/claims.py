"""What an owner signs: the claims of a release, read with the standard library alone (docs/protocol.md 4).

envelope = release bytes || Ed25519 signature over them          release id = SHA-256 of the release bytes

A release of a cohort (protocol/cohort.py) also holds the signatures of all who took part; whoever publishes it is one of them.

Everything that can be wrong with a release's bytes is found here, so an auditor needs no numerical library to refuse one
(protocol/verify.py); protocol/release.py gives the same claims as values to compute with.
"""

from __future__ import annotations

import hashlib
import re
import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from protocol.codec import decode, domain_tag, encode, format_decimal, parse_decimal, parse_hex, take
from protocol.cohort import CohortSeal, Resilience, statement_of
from protocol.errors import FormatError, InvalidSignature, UsageError
from protocol.privacy import (
    NORM_SQUARED,
    NOT_PRIVATE,
    AdapterGuarantee,
    Guarantee,
    NeighbouringRelation,
    PrivacyUnit,
    PrivateTraining,
    noise_variance,
    training_from_plain,
    training_to_plain,
)
from protocol.window import Window

MAGIC = domain_tag("release", 3)
SIGNATURE_BYTES = 64
NO_ID, IDS = bytes(32), 5  # the payload begins with owner, previous release, base model, map and adapter, 32 bytes each
MAX_ENVELOPE_BYTES = 16 << 10
MAX_ADAPTER_BYTES = 64 << 20
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """Which adapter a release speaks of, and what its privacy guarantee is."""

    digest: bytes  # SHA-256 of the adapter's bytes
    size_bytes: int
    guarantee: AdapterGuarantee = NOT_PRIVATE  # "none": trained without differential privacy

    def __post_init__(self) -> None:
        if len(self.digest) != 32 or not 0 < self.size_bytes <= MAX_ADAPTER_BYTES:
            raise FormatError(f"adapter: expected a SHA-256 digest and 1 to {MAX_ADAPTER_BYTES} bytes")
        if isinstance(self.guarantee, str) and self.guarantee != NOT_PRIVATE:
            raise FormatError("adapter.guarantee: expected 'none', or a guarantee with the mechanism that keeps it")


@dataclass(frozen=True, slots=True)
class Card:
    """What people read before they choose."""

    name: str  # unique within its owner, e.g. "notes"
    summary: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"name: expected 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit, got {len(self.name)} characters"
            )
        if max(len(self.summary), len(self.licence)) > 500:
            raise UsageError("card: expected at most 500 characters a field")
        try:
            (self.summary + self.licence).encode()
        except UnicodeEncodeError:  # a lone surrogate, as Python reads bytes of a command line that are no UTF-8
            raise UsageError("card: expected text in UTF-8, got other bytes", hint="set the terminal to UTF-8") from None


class Identified(ABC):
    """What is called after its release bytes and its card."""

    card: Card
    owner: bytes
    cohort: CohortSeal | None

    @cached_property
    @abstractmethod
    def body(self) -> bytes:
        """The release bytes: what is signed, hashed and logged."""

    @cached_property
    def release_id(self) -> bytes:
        """SHA-256 of the release bytes."""
        return hashlib.sha256(self.body).digest()

    @property
    def signers(self) -> tuple[bytes, ...]:
        """Keys of all owners who signed, and whose records are in the sums."""
        return self.cohort.survivors if self.cohort else (self.owner,)

    @property
    def title(self) -> str:
        """How people call it: name@first digits of the id."""
        return f"{self.card.name}@{self.release_id.hex()[:8]}"


@dataclass(frozen=True)
class Claims(Identified):
    """One learnware as its owner signed it."""

    owner: bytes  # Ed25519 public key
    release_number: int  # position in the owner's chain, from 1
    previous: bytes  # id of the owner's previous release, empty for the first
    base_model: bytes  # identity of the base model
    map_id: bytes
    noisy_sums: tuple[int, ...]  # int32 each, element 0 the count coordinate
    noise_variance: int
    guarantee: Guarantee
    adapter: AdapterReference | None
    card: Card
    simulated: bool  # made with noise that is not secret; a real market refuses it
    window: Window  # when it holds
    cohort: CohortSeal | None = None  # where several owners released it together

    def __post_init__(self) -> None:
        # Everybody recomputes the noise from the claim: a release with less noise than its epsilon needs does not exist.
        least = noise_variance(self.guarantee, NORM_SQUARED)
        if self.noise_variance < least:
            raise FormatError(f"noise_variance: epsilon {self.guarantee.epsilon:g} needs at least {least}, got {self.noise_variance}")
        if self.cohort is not None:
            self.cohort.require(self.guarantee, self.noise_variance)
            if self.owner not in self.cohort.survivors:
                raise FormatError("cohort: expected to be published by one of its survivors")
            if self.adapter is not None or self.card != Card(self.card.name):  # nobody signed these but the one who publishes
                raise FormatError("cohort: expected a name alone, no adapter, summary or licence")

    @cached_property
    def body(self) -> bytes:
        """The release bytes: what is signed, hashed and logged."""
        adapter = self.adapter
        metadata: dict[str, Any] = {
            "adapter": {"guarantee": training_to_plain(adapter.guarantee), "size_bytes": adapter.size_bytes} if adapter else {},
            "card": {"licence": self.card.licence, "name": self.card.name, "summary": self.card.summary},
            "delta": format_decimal(self.guarantee.delta),
            "epsilon": format_decimal(self.guarantee.epsilon),
            "noise_variance": self.noise_variance,
            "relation": str(self.guarantee.relation),
            "release_number": self.release_number,
            "simulated": int(self.simulated),
            "unit": str(self.guarantee.unit),
            **_cohort_to_plain(self.cohort),
            "valid_from": self.window.first,
            "valid_until": self.window.last,
        }
        sealed = b"".join((*self.cohort.survivors, *self.cohort.signatures)) if self.cohort else b""
        ids = (self.owner, self.previous or NO_ID, self.base_model, self.map_id, adapter.digest if adapter else NO_ID)
        return encode(MAGIC, metadata, sealed + b"".join(ids) + struct.pack(f"<{len(self.noisy_sums)}i", *self.noisy_sums))


def open_claims(envelope: bytes) -> Claims:
    """Return what an envelope's owner signed; raise FormatError or InvalidSignature.  No IO."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if not SIGNATURE_BYTES < len(envelope) <= MAX_ENVELOPE_BYTES:
        raise FormatError(f"envelope: expected {SIGNATURE_BYTES + 1} to {MAX_ENVELOPE_BYTES} bytes, got {len(envelope)}")
    body, signature = envelope[:-SIGNATURE_BYTES], envelope[-SIGNATURE_BYTES:]
    claims = parse_claims(body)
    try:
        Ed25519PublicKey.from_public_bytes(claims.owner).verify(signature, body)
    except (BadSignature, ValueError):
        raise InvalidSignature("release: the owner's signature does not verify") from None
    if claims.cohort is not None:
        claims.cohort.verify(_statement_of(claims, claims.cohort))
    return claims


def parse_claims(body: bytes) -> Claims:
    """Return the claims of a release's canonical bytes; raise FormatError for any other encoding."""
    metadata, payload = decode(MAGIC, body)
    cohort, payload = _cohort_from_plain(metadata.pop("cohort", None), payload)
    fields = {
        "adapter": dict, "card": dict, "delta": str, "epsilon": str, "noise_variance": int, "relation": str, "release_number": int,
        "simulated": int, "unit": str, "valid_from": int, "valid_until": int,
    }  # fmt: skip
    adapter, card, delta, epsilon, variance, relation, number, simulated, unit, first, last = take(metadata, fields, "release")
    ids, payload = payload[: IDS * len(NO_ID)], payload[IDS * len(NO_ID) :]
    if len(payload) % 4 or not 8 <= len(payload) <= 4 * 4097:
        raise FormatError(f"release: expected {IDS} ids and 2 to 4097 int32 sums, got {len(ids) + len(payload)} bytes")
    owner, previous, base_model, map_id, digest = (ids[start : start + len(NO_ID)] for start in range(0, len(ids), len(NO_ID)))
    if not 1 <= number < 1 << 53 or simulated not in (0, 1):
        raise FormatError("release: release_number or simulated out of range")
    if (number == 1) != (previous == NO_ID):
        raise FormatError("release.previous: expected the previous release's id, empty for release 1 only")
    try:
        guarantee = Guarantee(
            parse_decimal(epsilon, "release.epsilon"),
            parse_decimal(delta, "release.delta"),
            NeighbouringRelation(relation),
            PrivacyUnit.parse(unit),
        )
        card_value = Card(*take(card, {"name": str, "summary": str, "licence": str}, "release.card"))
    except (UsageError, ValueError) as error:
        text = str(error) if isinstance(error, UsageError) else "unknown neighbouring relation or privacy unit"
        raise FormatError(f"release: {text}") from None
    reference = None
    if adapter:
        kind = str if isinstance(adapter.get("guarantee"), str) else dict
        size_bytes, promise = take(adapter, {"size_bytes": int, "guarantee": kind}, "release.adapter")
        reference = AdapterReference(digest, size_bytes, training_from_plain(promise))
        if isinstance(reference.guarantee, PrivateTraining) and reference.guarantee.guarantee.unit != guarantee.unit:
            raise FormatError("release.adapter: expected the unit of the specification, since both are of one population")
    claims = Claims(
        owner, number, b"" if previous == NO_ID else previous, base_model, map_id, struct.unpack(f"<{len(payload) // 4}i", payload),
        variance, guarantee, reference, card_value, bool(simulated), Window(first, last), cohort,
    )  # fmt: skip
    if claims.body != body:  # whatever slipped through above: only the canonical bytes are a release
        raise FormatError("release: not in canonical form")
    return claims


def _statement_of(claims: Claims, cohort: CohortSeal) -> bytes:
    return statement_of(
        cohort.cohort_id, cohort.resilience, cohort.survivors, claims.card.name, claims.base_model, claims.map_id, claims.guarantee,
        claims.noise_variance, claims.simulated, claims.noisy_sums,
    )  # fmt: skip


def _cohort_to_plain(cohort: CohortSeal | None) -> dict[str, Any]:
    """Return the field of a cohort's release; that of one owner has none, and its bytes are what they were before there were cohorts."""
    if cohort is None:
        return {}
    sizes = cohort.resilience
    plain = {"colluders": sizes.colluders, "dropouts": sizes.dropouts, "id": cohort.cohort_id.hex(), "members": sizes.members}
    return {"cohort": {**plain, "survivors": len(cohort.survivors)}}


def _cohort_from_plain(plain: object, payload: bytes) -> tuple[CohortSeal | None, bytes]:
    """Return the cohort of a release and the rest of its payload: keys and signatures of the survivors come first."""
    if plain is None:
        return None, payload
    if not isinstance(plain, dict):
        raise FormatError("release.cohort: expected an object")
    fields = {"colluders": int, "dropouts": int, "id": str, "members": int, "survivors": int}
    colluders, dropouts, cohort_id, members, survivors = take(plain, fields, "release.cohort")
    sizes = Resilience(members, dropouts, colluders)
    if not sizes.least_survivors <= survivors <= members or len(payload) < survivors * (len(NO_ID) + SIGNATURE_BYTES):
        raise FormatError("release.cohort: expected the key and the signature of each survivor")
    keys, rest = payload[: survivors * len(NO_ID)], payload[survivors * len(NO_ID) :]
    signatures, rest = rest[: survivors * SIGNATURE_BYTES], rest[survivors * SIGNATURE_BYTES :]
    seal = CohortSeal(parse_hex(cohort_id, 32, "release.cohort.id"), sizes, _pieces(keys, len(NO_ID)), _pieces(signatures, SIGNATURE_BYTES))
    return seal, rest


def _pieces(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[start : start + size] for start in range(0, len(data), size))
