"""The market as a client sees it: every answer is checked before it is believed."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from protocol.admission import AdmissionPolicy, admit
from protocol.catalogue import (
    EMPTY_HEAD,
    MAX_TERMS_BYTES,
    PAGE_SIZE,
    ROW,
    Catalogue,
    Head,
    extend_head,
    open_cards,
    open_mirror,
    open_rows,
    pages_of,
    root_of_pages,
    split_cards,
    verify_head,
)
from protocol.channel import CALL_TIMEOUT_S, CHUNK_BYTES, connect, error_from_status
from protocol.codec import parse_decimal
from protocol.encryption import STD128
from protocol.errors import (
    FormatError,
    IncompatibleSpecification,
    InvalidAdapter,
    InvalidSignature,
    NotAdmitted,
    NotFound,
    UsageError,
)
from protocol.features import FeatureMap, shipped_map, shipped_maps
from protocol.keys import write_durably
from protocol.proof import AnswerProof, verify_statement
from protocol.release import MAX_ADAPTER_BYTES, MAX_ENVELOPE_BYTES, AdapterReference, Release, open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub

TRANSFER_TIMEOUT_S = 120.0
MAX_CATALOGUE_BYTES = 1 << 30  # a hostile market could otherwise fill the memory before it shows a signed size
MAX_TERMS = 1 << 16
MIN_ENTRY_BYTES = 64  # a signature, or a base model and a guarantee; shorter entries would cost many times their bytes in memory
MAX_ANSWER_BYTES = 1 << 26  # read of one answer before the call is cancelled, whatever was expected
PAGES_A_CALL = 64
COPY = 2  # form of the local copies, that of the catalogue: those of another lie in another folder and are not read
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Description:
    """What a market says about itself."""

    market_key: bytes
    map_ids: tuple[bytes, ...]
    simulation: bool
    head: Head
    admission: AdmissionPolicy  # which specifications it says it takes


@dataclass(frozen=True, slots=True)
class Mirror:
    """A local copy of all releases that are admitted: rank on it and nothing about the query leaves."""

    catalogue: Catalogue  # under the market's signed head; rows of admitted releases only
    releases: tuple[Release, ...]
    refused: tuple[bytes, ...] = ()  # ids of releases that the market holds against its own policy


@dataclass(frozen=True, slots=True)
class Exchange:
    """An encrypted query, its answer and the market's signature under both; the CPU time that the market says it took."""

    proof: AnswerProof
    server_cpu_ms: float


@dataclass
class Traffic:
    """Bytes sent and received, by kind of message."""

    sent: dict[str, int] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)

    def count(self, kind: str, sent: int, received: int) -> None:
        """Add one call."""
        self.sent[kind] = self.sent.get(kind, 0) + sent
        self.received[kind] = self.received.get(kind, 0) + received


class MarketClient:
    """A connection to one market.  `home` keeps what was synced before, one folder a market key."""

    def __init__(self, address: str, ca: Path, home: Path) -> None:
        self._channel = connect(address, ca)
        self._stub = MarketStub(self._channel)  # type: ignore[no-untyped-call]  # generated code is not annotated
        self._home = home / "catalogues"
        # Who holds the authority may issue a new server certificate, but the key that signs the catalogue must stay what it was.
        self._pin = self._home / f"{hashlib.sha256(ca.read_bytes()).hexdigest()[:32]}.market-key"
        self.traffic = Traffic()

    def __enter__(self) -> MarketClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def _call(self, call: Callable[[], Answer]) -> Answer:
        import grpc

        try:
            return call()
        except grpc.RpcError as error:
            raise error_from_status(error) from None

    def describe(self) -> Description:
        """Return what the market says about itself, its head verified."""
        answer = self._call(lambda: self._stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S))
        self.traffic.count("describe", 0, answer.ByteSize())
        head = _head(answer.head)
        verify_head(head, answer.market_key)
        if not self._pin.exists():
            write_durably(self._pin, answer.market_key, 0o644)
        elif self._pin.read_bytes() != answer.market_key:
            raise InvalidSignature(
                "market: its catalogue key is another than before", hint=f"if its operator confirms the change, remove {self._pin}"
            )
        return Description(answer.market_key, tuple(answer.map_ids), answer.simulation, head, _admission(answer.admission))

    def publish(self, envelope: bytes) -> int:
        """Publish a release and return its position; idempotent."""
        request = pb.PublishRequest(envelope=envelope)
        receipt = self._call(lambda: self._stub.Publish(request, timeout=CALL_TIMEOUT_S))
        self.traffic.count("publish", request.ByteSize(), receipt.ByteSize())
        if receipt.release_id != open_envelope(envelope).release_id:
            raise FormatError("receipt: expected the id of the release that was sent")
        head = _head(receipt.head)
        verify_head(head, self.describe().market_key)
        if receipt.index >= head.size:
            raise FormatError(f"receipt: expected a position below {head.size}, got {receipt.index}")
        return int(receipt.index)

    def release(self, release_id: bytes) -> bytes:
        """Return the envelope of a release; its signature and id are verified."""
        answer = self._call(lambda: self._stub.GetRelease(pb.ReleaseRequest(release_id=release_id), timeout=CALL_TIMEOUT_S))
        if open_envelope(answer.envelope).release_id != release_id:
            raise FormatError("release: expected the release that was asked for")
        return bytes(answer.envelope)

    def upload_adapter(self, reference: AdapterReference, data: bytes) -> None:
        """Send an adapter's bytes."""

        def chunks() -> Iterator[Any]:
            yield pb.AdapterChunk(digest=reference.digest, size_bytes=reference.size_bytes)
            for start in range(0, len(data), CHUNK_BYTES):
                yield pb.AdapterChunk(data=data[start : start + CHUNK_BYTES])

        self._call(lambda: self._stub.UploadAdapter(chunks(), timeout=TRANSFER_TIMEOUT_S))
        self.traffic.count("adapter", len(data), 0)

    def download_adapter(self, reference: AdapterReference, on_progress: Callable[[int, int], None] = lambda done, of: None) -> bytes:
        """Return an adapter's bytes; raise InvalidAdapter unless size and digest are the release's."""
        data = bytearray()

        def collect() -> None:
            for chunk in self._stub.DownloadAdapter(pb.AdapterRequest(digest=reference.digest), timeout=TRANSFER_TIMEOUT_S):
                data.extend(chunk.data)
                on_progress(len(data), reference.size_bytes)
                if len(data) > min(reference.size_bytes, MAX_ADAPTER_BYTES):  # endless data: stop at the promised size
                    raise InvalidAdapter(f"adapter: expected {reference.size_bytes} bytes, got more")

        self._call(collect)
        self.traffic.count("adapter", 0, len(data))
        if hashlib.sha256(data).digest() != reference.digest:
            raise InvalidAdapter(f"adapter: expected the digest {reference.digest.hex()[:16]} of its release, got other bytes")
        return bytes(data)

    def match(self, map_id: bytes, head: Head, query: bytes, answer_bytes: int) -> Exchange:
        """Return the market's answer to an encrypted query, exactly `answer_bytes` long, with the market's signature verified.

        Raises StaleCatalogue if the catalogue is not at `head` any more, InvalidSignature for an answer that the market did not sign as one
        to this query at this head: it is used for nothing then, and the market is not told.
        """
        market_key = self._pin.read_bytes() if self._pin.exists() else self.describe().market_key

        def chunks() -> Iterator[Any]:
            yield pb.MatchChunk(profile=STD128.name, map_id=map_id, catalogue_size=head.size, catalogue_head=head.digest)
            for start in range(0, len(query), CHUNK_BYTES):
                yield pb.MatchChunk(data=query[start : start + CHUNK_BYTES])

        answer, last, received = bytearray(), pb.ScoresChunk(), 0

        def collect() -> None:
            nonlocal last, received
            for chunk in self._stub.Match(chunks(), timeout=CALL_TIMEOUT_S):
                received += len(chunk.data)
                answer.extend(chunk.data[: max(answer_bytes - len(answer), 0)])
                last = chunk
                if received > MAX_ANSWER_BYTES:
                    raise FormatError(f"encrypted scores: expected {answer_bytes} bytes, got more than {MAX_ANSWER_BYTES}")

        # Read to its end: a call that breaks off where an answer is refused would show the market where.
        self._call(collect)
        self.traffic.count("query", len(query), received)
        if received != answer_bytes or len(last.index_digest) != 32:
            raise FormatError(f"encrypted scores: expected {answer_bytes} bytes and the digest of an index, got {received}")
        proof = AnswerProof(
            market_key, map_id, STD128.name, head, bytes(last.index_digest), query, bytes(answer), bytes(last.signature)
        )  # fmt: skip
        verify_statement(proof.statement, proof.signature, market_key)
        return Exchange(proof, int(last.server_cpu_ns) / 1e6)

    def sync(self, feature_map: FeatureMap) -> Catalogue:
        """Return scalars and cards of all releases, fetching only what is new since the last time: 16 and about 45 bytes a release.

        All cards, before anything is asked: which of them are wanted depends on scores, and a market that chooses the scores would read
        the query off what is fetched.
        """
        description = self._accepting(feature_map)
        folder = self._folder(description)
        rows, terms = _read_rows(folder / "rows"), _read_entries(folder / "terms")
        used = np.frombuffer(rows, ROW)["terms"].max(initial=0) + 1 if rows else 0
        if used != len(terms):  # a process was stopped between two files, or one was damaged: both can be fetched again
            rows, terms = b"", []
        news = self._fetch(pb.CATALOGUE_FORM_ROWS, len(rows) // ROW.itemsize, len(terms))
        rows, terms = rows + news.rows, [*terms, *news.terms]
        catalogue = open_rows(feature_map, rows, terms, news.head, description.market_key)
        catalogue = self._cards(folder, catalogue)
        if news.rows:
            _write_entries(folder / "rows", [rows])
        if news.terms:
            _write_entries(folder / "terms", terms)
        return catalogue

    def _cards(self, folder: Path, catalogue: Catalogue) -> Catalogue:
        """Return the catalogue with all cards, fetched where they are not kept here."""
        size, news = len(catalogue), False
        chains = _read_entries(folder / "pages")
        if len(chains) != pages_of(size) or root_of_pages(chains) != catalogue.head.cards:
            chains, _ = self._fetch_cards(size, [], 0)
            news = bool(chains)
        pages = range(pages_of(size))
        for start in range(0, len(pages), PAGES_A_CALL):
            part = {page: _kept_page(folder, page, size) for page in pages[start : start + PAGES_A_CALL]}
            whole = {page: cards for page, (cards, _) in part.items()}
            missing = [page for page, (_, lacking) in part.items() if lacking]
            if missing:
                # The first page is continued; a later one has cards here only after damage, and comes from its start.
                first = missing[0] * PAGE_SIZE + len(whole[missing[0]])
                _, data = self._fetch_cards(size, missing, first)
                stops = [min((page + 1) * PAGE_SIZE, size) for page in missing]
                new = split_cards(data, sum(stop - max(page * PAGE_SIZE, first) for page, stop in zip(missing, stops, strict=True)))
                for page, stop in zip(missing, stops, strict=True):
                    count = stop - max(page * PAGE_SIZE, first)
                    known, whole[page], new = whole[page], new[:count], new[count:]
                    if page == missing[0]:
                        whole[page] = known + whole[page]
                    if whole[page][: len(known)] != known:
                        raise _two_histories("cards")
            try:
                catalogue = open_cards(catalogue, chains, whole)
            except FormatError:
                # The copy here is sealed: a page that begins with it and is not under the head was rewritten, or continued with lies.
                seen = [page for page, (cards, _) in part.items() if cards]
                if root_of_pages(chains) == catalogue.head.cards and any(extend_head(EMPTY_HEAD, whole[p]) != chains[p] for p in seen):
                    raise _two_histories("cards") from None
                raise
            for page in missing:
                _write_entries(folder / "cards" / str(page), whole[page])
        if news:
            _write_entries(folder / "pages", chains)
        return catalogue

    def mirror(self, feature_map: FeatureMap) -> Mirror:
        """Return all releases, fetching only what is new; every signature is verified, every row, term and card recomputed, every release
        admitted again here.

        A release that breaks the market's own admission policy has no place in a ranking; the others go on.
        """
        description = self._accepting(feature_map)
        _, releases, catalogue = self._releases(description, feature_map)
        kept = []
        for position, release in enumerate(releases):
            with suppress(NotAdmitted):
                admit(release.specification, description.admission)
                kept.append(position)
        if len(kept) == len(releases):
            return Mirror(catalogue, releases)
        refused = tuple(release.release_id for i, release in enumerate(releases) if i not in set(kept))
        return Mirror(catalogue.only(kept), tuple(releases[i] for i in kept), refused)

    def envelopes(self, feature_map: FeatureMap) -> list[bytes]:
        """Return the envelopes of all releases in the order of the catalogue, every one verified."""
        return self._releases(self._accepting(feature_map), feature_map)[0]

    def releases_of(self, owner: bytes, feature_map: FeatureMap) -> list[bytes]:
        """Return the envelopes of all releases of one owner, from the whole catalogue: a market that leaves one out breaks its own chain.

        The market learns that somebody synced, not whose releases were looked for.
        """
        envelopes, releases, _ = self._releases(self._accepting(feature_map), feature_map)
        return [envelope for envelope, release in zip(envelopes, releases, strict=True) if release.owner == owner]

    def _releases(self, description: Description, feature_map: FeatureMap) -> tuple[list[bytes], tuple[Release, ...], Catalogue]:
        path = self._folder(description) / "envelopes"
        known = _read_entries(path)
        news = self._fetch(pb.CATALOGUE_FORM_ENVELOPES, len(known), 0)
        envelopes = [*known, *news.envelopes]
        releases = tuple(open_envelope(envelope) for envelope in envelopes)
        catalogue = open_mirror(feature_map, releases, news.head, description.market_key)
        rows, seen = catalogue.rows.tobytes(), _read_rows(path.with_name("rows"))
        if rows[: len(seen)] != seen[: len(rows)]:
            raise _two_histories("rows")
        if any(terms.body != body for terms, body in zip(catalogue.terms, _read_entries(path.with_name("terms")), strict=False)):
            raise _two_histories("terms")
        for page in range(pages_of(len(catalogue))):
            kept, _ = _kept_page(path.parent, page, len(catalogue))
            if any(catalogue.card(page * PAGE_SIZE + at).body != body for at, body in enumerate(kept)):
                raise _two_histories("cards")
        if news.envelopes:
            _write_entries(path, envelopes)
        return envelopes, releases, catalogue

    def _accepting(self, feature_map: FeatureMap) -> Description:
        description = self.describe()
        if feature_map.map_id not in description.map_ids:
            raise IncompatibleSpecification(
                f"map: this market works with {', '.join(i.hex()[:16] for i in description.map_ids)}, got {feature_map.map_id.hex()[:16]}",
                hint=_hint_for_maps(description.map_ids),
            )
        return description

    def _folder(self, description: Description) -> Path:
        return self._home / f"{description.market_key.hex()[:32]}-v{COPY}"

    def _fetch(self, form: Any, start: int, terms: int) -> _News:
        def collect() -> _News:
            envelopes: list[bytes] = []
            rows = bytearray()
            new_terms: list[bytes] = []
            head: Head | None = None
            received = 0
            request = pb.SyncRequest(from_index=start, form=form, from_terms=terms)
            for chunk in self._stub.SyncCatalogue(request, timeout=TRANSFER_TIMEOUT_S):
                received += chunk.ByteSize()
                if received > MAX_CATALOGUE_BYTES:
                    raise FormatError(f"catalogue: expected at most {MAX_CATALOGUE_BYTES} bytes of news, got more")
                if (chunk.entries and form == pb.CATALOGUE_FORM_ROWS) or ((chunk.rows or chunk.terms) and form != pb.CATALOGUE_FORM_ROWS):
                    raise FormatError("catalogue: expected the form that was asked for, got entries of another")
                if terms + len(new_terms) + len(chunk.terms) > MAX_TERMS:
                    raise FormatError(f"catalogue: expected at most {MAX_TERMS} terms, got more")
                for entries, most in ((chunk.entries, MAX_ENVELOPE_BYTES), (chunk.terms, MAX_TERMS_BYTES)):
                    if any(not MIN_ENTRY_BYTES <= len(entry) <= most for entry in entries):
                        raise FormatError(f"catalogue: expected entries of {MIN_ENTRY_BYTES} to {most} bytes, got one outside")
                envelopes.extend(chunk.entries)
                new_terms.extend(chunk.terms)
                rows += chunk.rows
                if chunk.HasField("head"):
                    head = _head(chunk.head)
            self.traffic.count("catalogue", request.ByteSize(), received)
            if head is None:
                raise FormatError("catalogue: expected a signed head on the last chunk")
            if head.size < start:
                raise InvalidSignature(
                    f"catalogue: expected at least the {start} releases known here, got {head.size}: the market has gone back in time"
                )
            return _News(envelopes, bytes(rows), new_terms, head)

        return self._call(collect)

    def _fetch_cards(self, size: int, pages: Sequence[int], first: int) -> tuple[list[bytes], bytes]:
        """Return the chains of all pages, and the cards of these pages from position `first` on."""

        def collect() -> tuple[list[bytes], bytes]:
            digests, data = bytearray(), bytearray()
            received, most = 0, 33 * pages_of(size) + len(pages) * PAGE_SIZE * 100 + (1 << 16)
            request = pb.CardsRequest(catalogue_size=size, pages=pages, from_index=first)
            for chunk in self._stub.GetCards(request, timeout=TRANSFER_TIMEOUT_S):
                received += chunk.ByteSize()
                if received > most:
                    raise FormatError(f"cards: expected at most {most} bytes, got more")
                digests += chunk.digests
                data += chunk.data
            self.traffic.count("cards", request.ByteSize(), received)
            return [bytes(digests[start : start + 32]) for start in range(0, len(digests), 32)], bytes(data)

        return self._call(collect)


@dataclass(frozen=True, slots=True)
class _News:
    envelopes: list[bytes]
    rows: bytes
    terms: list[bytes]
    head: Head


def _hint_for_maps(map_ids: Sequence[bytes]) -> str:
    for name in shipped_maps():
        if shipped_map(name).map_id in map_ids:
            return f"the market works with --map {name}"
    return "give the market's map as --map FILE, or install the veilmart version that ships it"


def _two_histories(what: str) -> InvalidSignature:
    return InvalidSignature(
        f"catalogue: expected the {what} that were synced before, got others: the market shows two histories",
        hint="keep the folder `catalogues` as it is, it shows what was signed before, and ask the market's operator",
    )


def _kept_page(folder: Path, page: int, size: int) -> tuple[list[bytes], range]:
    """Return the cards of a page that are kept here, none beyond `size`, and the positions of those that are not."""
    stop = min((page + 1) * PAGE_SIZE, size)
    cards = _read_entries(folder / "cards" / str(page))[: stop - page * PAGE_SIZE]
    return cards, range(page * PAGE_SIZE + len(cards), stop)


def find_release_id(text: str, catalogue: Catalogue) -> bytes:
    """Return the id that `text` names: NAME@HEX, HEX (at least 8 digits) or a NAME that only one release has."""
    name, _, digits = text.rpartition("@")
    hits = [
        card.release_id
        for card in catalogue.cards.values()
        if (name in ("", card.name) and len(digits) >= 8 and card.release_id.hex().startswith(digits)) or (not name and digits == card.name)
    ]
    if len(hits) == 1:
        return hits[0]
    if hits:
        raise UsageError(
            f"{text}: names {len(hits)} releases", hint="give NAME@ and the first digits of the id, as `veilmart find` prints them"
        )
    raise NotFound(f"{text}: no such release among the {len(catalogue)} of this market", hint="`veilmart find` lists them")


def _admission(message: Any) -> AdmissionPolicy:
    try:
        return AdmissionPolicy(
            parse_decimal(message.largest_epsilon, "admission.largest_epsilon"),
            parse_decimal(message.delta, "admission.delta") if message.delta else None,
            message.smallest_count or None,
        )
    except UsageError as error:
        raise FormatError(f"market: {error}") from None


def _head(message: Any) -> Head:
    if any(len(part) != len(EMPTY_HEAD) for part in (message.head, message.terms, message.cards)) or message.size >= 1 << 40:
        raise FormatError("catalogue head: expected three chains of 32 bytes and a plausible size")
    chains = bytes(message.head), int(message.terms_size), bytes(message.terms), bytes(message.cards)
    return Head(int(message.size), *chains, bytes(message.signature))


def _read_entries(path: Path) -> list[bytes]:
    """Return the entries of a local copy; a damaged copy is dropped, since everything in it can be fetched again."""
    if not path.exists():
        return []
    data, entries, start = path.read_bytes(), [], 0
    seal, data = data[:32], data[32:]
    if extend_head(EMPTY_HEAD, [data]) != seal:
        path.unlink()
        return []
    while start < len(data):
        (size,) = struct.unpack_from("<I", data, start)
        entries.append(data[start + 4 : start + 4 + size])
        start += 4 + size
    return entries


def _read_rows(path: Path) -> bytes:
    """Return the rows of a local copy; one that holds no whole rows is another program's and is dropped."""
    rows = b"".join(_read_entries(path))
    if len(rows) % ROW.itemsize:
        path.unlink()
        return b""
    return rows


def _write_entries(path: Path, entries: list[bytes]) -> None:
    data = b"".join(struct.pack("<I", len(entry)) + entry for entry in entries)
    write_durably(path, extend_head(EMPTY_HEAD, [data]) + data)
