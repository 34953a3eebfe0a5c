"""Signed answers: what a market commits to when it answers, and how anybody finds out whether it was true (docs/protocol.md 7.11).

Evaluation is public and deterministic, so query, state of the catalogue and rows determine every byte of an answer.  The market signs
which answer it gave to which query; whoever holds that, and the releases, evaluates again.  A wrong answer is then proved by its own
signature, without a key, a task or a score leaving the querier.

    signature over  "veilmart/answer/v1\\0" || SHA-256(query) || map id || state of the catalogue || index digest || SHA-256(answer)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from protocol.catalogue import Head, Tables, centred_means, tables_of, verify_head
from protocol.codec import decode, domain_tag, encode, take
from protocol.encryption import EncryptedQuery, MatchPlan, preset
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, VeilmartError
from protocol.evaluation import EncodedIndex, evaluate
from protocol.features import FeatureMap
from protocol.release import Release

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ANSWER = domain_tag("answer", 1)
INDEX = domain_tag("index", 1)
PROOF = domain_tag("proof", 1)
RELEASES = domain_tag("releases", 1)
_IDS = 32


def index_digest(index: EncodedIndex) -> bytes:
    """Return what names an index: SHA-256 over its plan and the digests of its tiles, each of layout and rows."""
    plan = index.plan
    layout = f"{plan.parameters.name} {plan.layout.value} {plan.rows} {plan.dimension} {plan.groups} {plan.baby}\0"
    return hashlib.sha256(INDEX + layout.encode() + b"".join(tile.digest for tile in index.tiles)).digest()


@dataclass(frozen=True, slots=True)
class Statement:
    """What a market says by signing an answer: digests of 32 bytes each."""

    query: bytes
    map_id: bytes
    state: bytes  # digest of the catalogue's head
    index: bytes
    answer: bytes

    @property
    def signed_bytes(self) -> bytes:
        """What the market signs."""
        return ANSWER + self.query + self.map_id + self.state + self.index + self.answer


def statement_of(query: bytes, map_id: bytes, head: Head, index: bytes, answer: bytes) -> Statement:
    """Return the statement that `answer` is what the index of this digest gives to `query` at this state of the catalogue."""
    return Statement(hashlib.sha256(query).digest(), map_id, head.digest, index, hashlib.sha256(answer).digest())


def sign_statement(statement: Statement, market_key: Ed25519PrivateKey) -> bytes:
    """Return the market's signature, 64 bytes."""
    return market_key.sign(statement.signed_bytes)


def verify_statement(statement: Statement, signature: bytes, market_key: bytes) -> None:
    """Raise InvalidSignature unless the market signed exactly this: this answer to this query at this state."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(market_key).verify(signature, statement.signed_bytes)
    except (BadSignature, ValueError):
        raise InvalidSignature(
            "answer: the market's signature does not verify for this query, catalogue and answer",
            hint="do not use this answer: it may be one to another query, or changed on its way",
        ) from None


@dataclass(frozen=True, slots=True)
class AnswerProof:
    """One exchange as a file: neither the key of the query nor anything of the task is in it."""

    market_key: bytes
    map_id: bytes
    parameters: str  # name of the preset
    head: Head
    index: bytes  # digest, as the market said it
    query: bytes
    answer: bytes
    signature: bytes

    @property
    def statement(self) -> Statement:
        """What the market signed, if it did."""
        return statement_of(self.query, self.map_id, self.head, self.index, self.answer)

    def to_bytes(self) -> bytes:
        """Return canonical bytes (docs/protocol.md 1)."""
        metadata = {
            "answer_bytes": len(self.answer), "parameters": self.parameters, "query_bytes": len(self.query), "size": self.head.size,
            "terms_size": self.head.terms_size,
        }  # fmt: skip
        ids = self.market_key + self.map_id + self.head.rows + self.head.terms + self.head.cards + self.index
        return encode(PROOF, metadata, ids + self.head.signature + self.signature + self.query + self.answer)

    @classmethod
    def from_bytes(cls, data: bytes) -> AnswerProof:
        """Return the exchange in a file; raise FormatError for anything else."""
        metadata, payload = decode(PROOF, data)
        fields = {"answer_bytes": int, "parameters": str, "query_bytes": int, "size": int, "terms_size": int}
        answer_bytes, parameters, query_bytes, size, terms_size = take(metadata, fields, "proof")
        fixed = 6 * _IDS + 2 * 64
        if min(answer_bytes, query_bytes, size) < 1 or not 0 <= terms_size < 1 << 32 or size >= 1 << 40:
            raise FormatError("proof: expected positive sizes")
        if len(payload) != fixed + query_bytes + answer_bytes:
            raise FormatError(f"proof: expected {fixed + query_bytes + answer_bytes} bytes after the metadata, got {len(payload)}")
        ids = [payload[start : start + _IDS] for start in range(0, 6 * _IDS, _IDS)]
        signatures = payload[6 * _IDS : 6 * _IDS + 64], payload[6 * _IDS + 64 : fixed]
        head = Head(size, ids[2], terms_size, ids[3], ids[4], signatures[0])
        query, answer = payload[fixed : fixed + query_bytes], payload[fixed + query_bytes :]
        return cls(ids[0], ids[1], parameters, head, ids[5], query, answer, signatures[1])


class Finding(StrEnum):
    """What a proof shows."""

    HONEST = "honest"
    WRONG = "proven wrong"
    NO_PROOF = "not a proof"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A finding and its reason in words that a person can check."""

    finding: Finding
    reason: str


def judge(proof: AnswerProof, releases: Sequence[Release], feature_map: FeatureMap) -> Judgement:
    """Return whether the market that signed an answer gave the right one.  No IO, no randomness.

    releases: all releases of the catalogue at the proof's head, in order; a longer catalogue will do.
    "Proven wrong" is said only if the market of `proof.market_key` signed head, query and answer, the releases are those of that head,
    and its rows, its terms or evaluation are other bytes.  Whatever could be somebody else's mistake is "not a proof", and accuses nobody.
    """
    try:
        verify_head(proof.head, proof.market_key)
        verify_statement(proof.statement, proof.signature, proof.market_key)
    except InvalidSignature as error:
        return Judgement(Finding.NO_PROOF, str(error))
    if proof.map_id != feature_map.map_id:
        return Judgement(Finding.NO_PROOF, f"the answer is for the map {proof.map_id.hex()[:16]}, not {feature_map.map_id.hex()[:16]}")
    if len(releases) < proof.head.size:
        return Judgement(Finding.NO_PROOF, f"expected the {proof.head.size} releases of that catalogue, got {len(releases)}")
    releases = releases[: proof.head.size]
    try:
        tables: Tables = tables_of(releases, feature_map)
    except (FormatError, IncompatibleSpecification) as error:
        return Judgement(Finding.NO_PROOF, f"releases: {error}")
    head = tables.head()
    if (head.size, head.cards) == (proof.head.size, proof.head.cards) and head.signed_bytes != proof.head.signed_bytes:
        # Cards hold the ids, so these are the releases of that head, and rows and terms follow from them without any choice.
        return Judgement(Finding.WRONG, "the market signed rows or terms that are not those of its releases")
    if head.signed_bytes != proof.head.signed_bytes:
        return Judgement(Finding.NO_PROOF, "the releases are not those of the catalogue that the market signed")
    try:
        plan = MatchPlan.build(proof.head.size, feature_map.dimension, preset(proof.parameters))
        query = EncryptedQuery.from_bytes(proof.query, plan)
    except VeilmartError as error:  # an honest market refuses such a query, but to sign an answer to it is nothing that can be wrong
        return Judgement(Finding.NO_PROOF, f"query: {error}")
    index = EncodedIndex.build(centred_means([release.specification for release in releases], feature_map), plan)
    if index_digest(index) != proof.index:
        return Judgement(Finding.WRONG, "the market signed an index that is not the one of its catalogue")
    if evaluate(index, query).to_bytes() != proof.answer:
        return Judgement(Finding.WRONG, "the market signed an answer that its catalogue does not give to this query")
    return Judgement(Finding.HONEST, f"the answer is the one that {proof.head.size} releases give to this query")


def pack_releases(envelopes: Sequence[bytes]) -> bytes:
    """Return envelopes as one file, in the order of the catalogue."""
    sizes = b"".join(len(envelope).to_bytes(4, "little") for envelope in envelopes)
    return encode(RELEASES, {"size": len(envelopes)}, sizes + b"".join(envelopes))


def unpack_releases(data: bytes) -> list[bytes]:
    """Return the envelopes in a file of `pack_releases`; raise FormatError for anything else."""
    metadata, payload = decode(RELEASES, data)
    (count,) = take(metadata, {"size": int}, "releases")
    if not 0 <= 4 * count <= len(payload):
        raise FormatError("releases: expected as many lengths as envelopes")
    sizes = [int.from_bytes(payload[4 * i : 4 * i + 4], "little") for i in range(count)]
    if 4 * count + sum(sizes) != len(payload):
        raise FormatError("releases: expected the envelopes that the lengths name, got another number of bytes")
    envelopes, start = [], 4 * count
    for size in sizes:
        envelopes.append(payload[start : start + size])
        start += size
    return envelopes
