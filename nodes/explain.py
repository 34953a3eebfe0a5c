"""What a command would send to a market, message by message and field by field.

The messages are the protocol's own, filled with zeros of the real lengths, so that a size is what would go over the wire: nothing is
read from private files, nothing is drawn, nothing is sent.  A test runs the commands against a real market and compares
(tests/nodes/test_explain.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protocol.certificates import make_request, new_tls_key
from protocol.channel import CHUNK_BYTES
from protocol.errors import UsageError
from protocol.notices import SIGNATURE_BYTES, Kind, Notice
from protocol.sealing import ID_BYTES, SIZES, Suite

if TYPE_CHECKING:
    from protocol.features import FeatureMap

COMMANDS = ("node publish", "find", "ask", "pull", "node join", "node withdraw", "node rotate-key", "browse")
ZERO_ID = bytes(32)


@dataclass(frozen=True, slots=True)
class Sent:
    """One field of a message."""

    name: str
    size_bytes: int  # as encoded, with what the encoding adds
    says: str


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the market's service."""

    name: str
    when: str
    fields: tuple[Sent, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the message, or of all messages of a stream."""
        return sum(field.size_bytes for field in self.fields)


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that a command would send, what never leaves, and what the market sees besides."""

    command: str
    calls: tuple[Call, ...]
    stays: tuple[str, ...]
    seen: tuple[str, ...]  # by the market, whatever the messages hold


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the sizes depend on; all of it is public."""

    feature_map: FeatureMap
    releases: int = 1_000  # in the market's catalogue
    adapter_bytes: int = 0  # 0: a specification alone
    card_bytes: int = 5  # of the name, the summary and the licence together
    epsilon: float = 1.0
    delta: float = 1e-6


# Every field that a client can send.  A field that is added to a message and not explained here fails a test, and the command.
SAYS: Mapping[str, Mapping[str, str]] = {
    "DescribeRequest": {"owner": "your public key, to hear whether you may publish; empty in every other call"},
    "SyncRequest": {
        "from_index": "how many releases this home knows already",
        "form": "whether whole releases are wanted, or rows of numbers",
        "from_terms": "how many sets of terms this home knows already",
    },
    "CardsRequest": {
        "catalogue_size": "how many releases the catalogue had when it was fetched",
        "pages": "which pages of names are missing here: all of them the first time, whatever is looked for",
        "from_index": "how many names this home knows already",
    },
    "MatchChunk": {
        "profile": "name of the encryption's parameters, the same for everybody",
        "map_id": "which feature map, the market's own",
        "catalogue_size": "how many releases are asked about: all",
        "catalogue_head": "which state of the catalogue",
        "data": "the sketch of your task, encrypted under a fresh key that never leaves, and keys to compute with: always so many bytes",
    },
    "NoticesRequest": {"from_index": "how many withdrawals and revocations this home knows already"},
    "NoticeRequest": {"notice": "what you declare, for this market alone: it is public, and signed with your key"},
    "IntroductionRequest": {"release_id": "which learnware you want to ask: the market sees it"},
    "SealedQuestion": {
        "release_id": "which learnware: the market sees it",
        "sealed": "the question, sealed for the owner's guard, in one of three sizes",
    },
    "ReleaseRequest": {"release_id": "which learnware: the market sees it"},
    "AdapterRequest": {"digest": "which adapter: the market sees it"},
    "AdapterChunk": {
        "digest": "SHA-256 of the adapter, as its release names it",
        "size_bytes": "length of the adapter",
        "data": "the adapter's weights, made from your records: private only if it was trained with an epsilon of its own",
    },
    "EnrolRequest": {
        "secret": "the secret of the invite: it is used up by this",
        "owner": "your public key",
        "supernode_key": "public key with which your SuperNode connects",
        "signature": "proof that you hold the key, for this market and this invite",
    },
    "AggregatesRequest": {},
    "CertifyRequest": {
        "request": "a fresh TLS key, your public key, the time, and your signature for this market alone; a few bytes more or less"
    },
    "OrganisationsRequest": {"catalogue_size": "size of the catalogue that you know"},
    "ConsistencyRequest": {"first": "size of the log when this home saw it last", "second": "its size now"},
}
# An envelope is opaque to gRPC and signed as a whole, so its parts are explained one by one (docs/protocol.md 4).
ENVELOPE = {
    "owner": "your public key: a pseudonym, the same in all your releases",
    "previous": "id of your release before this one",
    "base_model": "which base model the adapter is for",
    "map_id": "which feature map",
    "adapter": "SHA-256 of the adapter, zeros if there is none",
    "sums": "the noisy sum of your records' features: the only numbers that depend on the records",
    "metadata": "card as you write it, epsilon, delta, unit, noise variance, number of the release, the adapter's size and guarantee, "
    "the days from and until which it holds",
    "header": "kind and version of these bytes, and the length of the metadata",
    "signature": "yours, over all of it",
}
TIMES = "from which address, when, and how long each message is"
TEXTS = "your records: no text, no token, no vector of a record, no exact number of them"


def explain(command: str, given: Circumstances) -> Explanation:
    """Return what a command would send; raise UsageError for one that has nothing to explain."""
    match command:
        case "node publish":
            return _publish(given)
        case "find":
            return Explanation(
                command, _find(given),
                ("your texts, their embeddings and their sketch in clear", "the key of the query", "filters, scores and the ranking"), (
                    TIMES, "that somebody asked something", "not the answer: the scores come back encrypted, always all of them",
                ),
            )  # fmt: skip
        case "pull":
            seen = "which learnware you fetch; with --cover N, which N + 1, one of them yours"
            return Explanation(command, (*_sync(given), *_fetch()), ("why you want it",), (TIMES, seen))
        case "ask":
            calls = (
                *_marked(_mirror(given), "only with --task and no -m"),
                *_marked((*_sync(given), *_fetch()), "only for what is not here yet"),
                *_marked(_relayed(), "only with --relay: then the owner reads the question"),
            )
            return Explanation(
                command, calls,
                (
                    "without --relay the question and the answer: models run on this machine alone",
                    "your texts of --task, and what is made of them",
                ),
                (TIMES, "which learnwares you fetch, if they are not here yet, or ask", "nothing at all with --nothing-leaves"),
            )  # fmt: skip
        case "node withdraw":
            calls = (*_sync(given), _fetch()[0], _notice(Kind.WITHDRAWAL))
            return Explanation(command, calls, (TEXTS, "your signing key"), (TIMES, "which release you take back: everybody does"))
        case "node rotate-key":
            first = _call("Describe", "first", _pb().DescribeRequest())
            return Explanation(
                command, (first, _notice(Kind.ROTATION)), (TEXTS, "both signing keys"), (TIMES, "that both keys are yours: everybody does")
            )
        case "browse":
            calls = (
                _call("Describe", "first", _pb().DescribeRequest()),
                _call("GetAggregates", "what all releases say together: the same bytes for everybody", _pb().AggregatesRequest()),
                _consistency(given), _notices(),
                _call("SyncCatalogue", "only with --verify: all releases as they are", _mirror_request()),
            )  # fmt: skip
            return Explanation(command, calls, ("--domain, and what you look at",), (TIMES, "that somebody browses, and verifies or not"))
        case "node join":
            return _join()
        case _:
            raise UsageError(f"explain: expected one of {', '.join(COMMANDS)}", hint="other commands send nothing, or what these send")


def _publish(given: Circumstances) -> Explanation:
    calls = [
        _call("Describe", "first: may you publish, and would it be taken?", _pb().DescribeRequest(owner=ZERO_ID)),
        _call("Describe", "whenever the market is asked for something", _pb().DescribeRequest()),
        _call("SyncCatalogue", "are there releases of yours that the ledger does not know?", _mirror_request()),
        _envelope(given),
    ]  # fmt: skip
    if given.adapter_bytes:
        calls.append(_adapter(given.adapter_bytes))
    calls.append(_consistency(given))
    adapter = () if given.adapter_bytes else ("weights: a specification alone has none",)
    seen = (TIMES, "the topic of your records, roughly: that is what a specification is for", "their number, with noise")
    return Explanation("node publish", tuple(calls), (TEXTS, "noise, ledger, budget and signing key", *adapter), seen)


def _join() -> Explanation:
    csr = make_request(new_tls_key(), ZERO_ID, ZERO_ID, 0, lambda *_: bytes(64))
    request = _pb().EnrolRequest(secret=ZERO_ID, owner=ZERO_ID, supernode_key=_some_supernode_key(), signature=bytes(64))
    calls = (
        _call("Describe", "first: is it the market of the invite?", _pb().DescribeRequest()),
        _call("Enrol", "then", request),
        _call(
            "Certify",
            "where it has a port for members, and when a month is left",
            _pb().CertifyRequest(request=csr),
        ),
    )
    stays = ("your records", "both private keys", "the name of your organisation: the operator wrote it on the invite")
    return Explanation("node join", calls, stays, (TIMES, "that the holder of the invite is the owner of these keys"))


def _sync(given: Circumstances) -> tuple[Call, ...]:
    from protocol.catalogue import pages_of

    pages = range(pages_of(given.releases))
    return (
        _call("Describe", "first, and whenever the market is asked for something", _pb().DescribeRequest()),
        _call("SyncCatalogue", "numbers of all releases", _pb().SyncRequest(form=_pb().CATALOGUE_FORM_ROWS)),
        _call("GetCards", "digests of all pages of names", _pb().CardsRequest(catalogue_size=given.releases)),
        _call("GetCards", "all names that are missing here", _pb().CardsRequest(catalogue_size=given.releases, pages=pages)),
        _consistency(given),
        _notices(),
    )


def _mirror(given: Circumstances) -> tuple[Call, ...]:
    return (
        _call("Describe", "first, and whenever the market is asked for something", _pb().DescribeRequest()),
        _call("SyncCatalogue", "all releases as they are: matching is done here", _mirror_request()),
        _notices(),
        _organisations(given),
    )


def _mirror_request() -> Any:
    return _pb().SyncRequest(form=_pb().CATALOGUE_FORM_ENVELOPES)


def _find(given: Circumstances) -> tuple[Call, ...]:
    from protocol.encryption import STD128

    first = _pb().MatchChunk(
        profile=STD128.name, map_id=given.feature_map.map_id, catalogue_size=given.releases, catalogue_head=ZERO_ID
    )  # fmt: skip
    query = _call("Match", "the query, in chunks", first, *_chunks(_pb().MatchChunk, STD128.query_bytes))
    instead = _call("SyncCatalogue", "with --mirror, instead of all after the first: all releases as they are", _mirror_request())
    return (*_sync(given), _organisations(given), query, instead)


def _organisations(given: Circumstances) -> Call:
    request = _pb().OrganisationsRequest(catalogue_size=given.releases)
    return _call("GetOrganisations", "which releases are one organisation's", request)


def _notices() -> Call:
    return _call("SyncNotices", "what was withdrawn or revoked", _pb().NoticesRequest())


def _notice(kind: Kind) -> Call:
    data = Notice(kind, ZERO_ID, ZERO_ID, (bytes([1]) * 32,)).body + bytes(SIGNATURE_BYTES * (2 if kind is Kind.ROTATION else 1))
    return _call("SubmitNotice", "the declaration", _pb().NoticeRequest(notice=data))


def _relayed() -> tuple[Call, ...]:
    sealed = bytes(ID_BYTES + Suite.HYBRID.overhead_bytes + SIZES[0])
    return (
        _call("GetIntroduction", "which key is the guard's?", _pb().IntroductionRequest(release_id=ZERO_ID)),
        _call("Ask", "the question", _pb().SealedQuestion(release_id=ZERO_ID, sealed=sealed)),
    )


def _fetch() -> tuple[Call, ...]:
    return (
        _call("GetRelease", "the signed release", _pb().ReleaseRequest(release_id=ZERO_ID)),
        _call("DownloadAdapter", "its weights, if it has an adapter", _pb().AdapterRequest(digest=ZERO_ID)),
    )


def _consistency(given: Circumstances) -> Call:
    request = _pb().ConsistencyRequest(first=given.releases, second=given.releases)
    return _call("ProveConsistency", "if the log grew since this home saw it last", request)


def _adapter(size: int) -> Call:
    first = _pb().AdapterChunk(digest=ZERO_ID, size_bytes=size)
    return _call("UploadAdapter", "after the release, in chunks", first, *_chunks(_pb().AdapterChunk, size))


def _envelope(given: Circumstances) -> Call:
    """Return the explanation of a release, built as the guard builds it, with zeros where noisy sums and a signature would stand."""
    import struct

    from protocol.claims import MAGIC, NO_ID, SIGNATURE_BYTES, AdapterReference, Card, Claims
    from protocol.privacy import NORM_SQUARED, Guarantee, noise_variance
    from protocol.window import Window

    guarantee, dimension = Guarantee(given.epsilon, given.delta), given.feature_map.dimension
    adapter = AdapterReference(NO_ID, given.adapter_bytes) if given.adapter_bytes else None
    name = "x" * min(max(given.card_bytes, 1), 63)
    claims = Claims(
        ZERO_ID, 1, b"", bytes.fromhex(given.feature_map.base_model), given.feature_map.map_id, (0,) * (dimension + 1),
        noise_variance(guarantee, NORM_SQUARED), guarantee, adapter, Card(name, "x" * (given.card_bytes - len(name))), False,
        Window(20_000, 20_364),
    )  # fmt: skip
    (metadata,) = struct.unpack_from("<I", claims.body, len(MAGIC))
    sizes = {
        "owner": 32, "previous": 32, "base_model": 32, "map_id": 32, "adapter": 32, "sums": 4 * (dimension + 1), "metadata": metadata,
        "header": len(MAGIC) + 4, "signature": SIGNATURE_BYTES,
    }  # fmt: skip
    envelope = claims.body + bytes(SIGNATURE_BYTES)
    assert sum(sizes.values()) == len(envelope)
    framing = _pb().PublishRequest(envelope=envelope).ByteSize() - len(envelope)
    parts = [Sent(f"envelope.{name}", size, ENVELOPE[name]) for name, size in sizes.items()]
    return Call("Publish", "the release", (*parts, Sent("envelope", framing, "number and length of this field in the message")))


def _call(name: str, when: str, *messages: Any) -> Call:
    """Return the explanation of a call with these messages: each field with its encoded size over all of them."""
    kind = messages[0].DESCRIPTOR
    says = SAYS[kind.name]
    fields = []
    for field in kind.fields:
        size = sum(message.ByteSize() - _without(message, field.name).ByteSize() for message in messages)
        fields.append(Sent(field.name, size, says[field.name] if size else f"{says[field.name]} (nothing here)"))
    return Call(name, when, tuple(fields))


def _without(message: Any, field: str) -> Any:
    rest = type(message)()
    rest.CopyFrom(message)
    rest.ClearField(field)
    return rest


def _chunks(kind: Any, size: int) -> list[Any]:
    return [kind(data=bytes(min(CHUNK_BYTES, size - start))) for start in range(0, size, CHUNK_BYTES)]


def _marked(calls: tuple[Call, ...], when: str) -> tuple[Call, ...]:
    return tuple(Call(call.name, f"{call.when}; {when}", call.fields) for call in calls)


def _some_supernode_key() -> str:
    """Return the line of a public key that belongs to nobody: the curve's own generator."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.derive_private_key(1, ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _pb() -> Any:
    from protocol.wire import market_pb2

    return market_pb2
