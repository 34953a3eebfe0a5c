"""The market as a client sees it: every answer is checked before it is believed."""

from __future__ import annotations

import hashlib
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nodes.membership import Membership
from protocol.admission import AdmissionPolicy, admit_release
from protocol.aggregation import Aggregates, open_aggregates, require_honest
from protocol.catalogue import (
    EMPTY_HEAD,
    MAX_TERMS,
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
    parse_cards,
    root_of_pages,
    split_cards,
    verify_head,
)
from protocol.certificates import verify_answer
from protocol.channel import CALL_TIMEOUT_S, CHUNK_BYTES, addresses_of, connect, error_from_status
from protocol.codec import parse_decimal
from protocol.conflict import Conflict
from protocol.encryption import STD128
from protocol.errors import (
    AlreadyPublished,
    FormatError,
    IncompatibleSpecification,
    InvalidAdapter,
    InvalidProof,
    InvalidSignature,
    MarketUnreachable,
    NotAdmitted,
    NotFound,
    QuotaExceeded,
    UsageError,
    VeilmartError,
)
from protocol.features import FeatureMap, shipped_map, shipped_maps
from protocol.keys import write_durably
from protocol.notices import (
    MAX_NOTICES_BYTES,
    Kind,
    Notice,
    NoticesHead,
    open_notice,
    open_notices,
    require_listed,
    require_rightful,
    taken_back,
    verify_logged,
)
from protocol.organisations import Organisations, open_organisations
from protocol.proof import AnswerProof, verify_statement
from protocol.release import MAX_ADAPTER_BYTES, MAX_ENVELOPE_BYTES, AdapterReference, Release, open_envelope
from protocol.transparency import Checkpoint, Receipt, accept, open_checkpoint, root_of_all, verify_consistency
from protocol.window import day_of
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from protocol.witness import Witness, require_witnessed, require_witnessed_notices

TRANSFER_TIMEOUT_S = 120.0
CHANNELS = 8  # kept open by a client that turns from one process of its market to the next
LONGEST_PAUSE_S = 10  # what a market says beyond it is for a person
MAX_CATALOGUE_BYTES = 1 << 30  # a hostile market could otherwise fill the memory before it shows a signed size
MIN_ENTRY_BYTES = 64  # a signature, or a base model and a guarantee; shorter entries would cost many times their bytes in memory
MAX_ANSWER_BYTES = 1 << 26  # read of one answer before the call is cancelled, whatever was expected
PAGES_A_CALL = 64
MAX_AGGREGATES_BYTES = 4 << 20
COPY = 3  # form of the local copies, that of the catalogue: those of another lie in another folder and are not read
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Description:
    """What a market says about itself."""

    market_key: bytes
    map_ids: tuple[bytes, ...]
    simulation: bool
    head: Head
    admission: AdmissionPolicy  # which specifications it says it takes
    may_publish: bool  # whether the owner that was asked about may
    witnessed: tuple[bytes, ...] = ()  # the newest note that each witness signed, as the market hands them out; not verified
    members_port: int = 0  # on the same host: where calls of members are taken; 0: at this one
    witnesses: tuple[str, ...] = ()  # trusted here, and signed this log within 24 hours


@dataclass(frozen=True, slots=True)
class Mirror:
    """A local copy of all releases that are admitted: rank on it and nothing about the query leaves."""

    catalogue: Catalogue  # under the market's signed head; rows of admitted releases only
    releases: tuple[Release, ...]
    positions: tuple[int, ...]  # of these releases in the market's catalogue
    refused: tuple[bytes, ...] = ()  # ids of releases that the market holds against its own policy
    notices: tuple[Notice, ...] = ()


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
    """A connection to one market.  `home` keeps what was synced before, one folder a market key.

    address: HOST:PORT, or several with commas between them, of processes of one market: a call that one of them does not answer is made
    again at the others, once each; every call may be made again.
    membership: under whose certificate members' calls go out where the market has a port for them; None: under nobody's.
    """

    def __init__(self, address: str, ca: Path, home: Path, membership: Membership | None = None) -> None:
        self._addresses, self.ca, self._membership = addresses_of(address), ca, membership
        random.shuffle(self._addresses)  # so that the processes share the clients
        self._channels: list[Any] = []
        self._reach(self._addresses[0])
        self._home, self._witnesses = home / "catalogues", home / "witnesses"
        # Who holds the authority may issue a new server certificate, but the key that signs the catalogue must stay what it was.
        self._pins = [self._home / f"{authority}.market-key" for authority in _authorities_in(ca.read_bytes())]
        self._kept_checkpoints = [pin.with_suffix(".checkpoint") for pin in self._pins]
        self.traffic = Traffic()

    def __enter__(self) -> MarketClient:
        return self

    def __exit__(self, *_: object) -> None:
        for channel in self._channels:
            channel.close()

    def _reach(self, address: str) -> None:
        """Make calls at an address from now on."""
        self._address = address
        self._channels.append(connect(address, self.ca, apart=len(self._addresses) > 1))
        while len(self._channels) > CHANNELS:  # streams of those before go on
            self._channels.pop(0).close()
        self._stub = MarketStub(self._channels[-1])  # type: ignore[no-untyped-call]  # generated code is not annotated
        self._members_port: int | None = None  # known once the market described itself
        self._members: tuple[tuple[int, bytes], MarketStub] | None = None  # at which port, under which key and certificate

    def _call(self, call: Callable[[], Answer]) -> Answer:
        """Return what a call returns that goes through `_stub`; one that may be made again from its start."""
        import grpc

        for left in reversed(range(len(self._addresses))):
            try:
                return call()
            except grpc.RpcError as error:
                told = error_from_status(error)
                if not left or not isinstance(told, MarketUnreachable):
                    raise told from None
                self._reach(self._addresses[(self._addresses.index(self._address) + 1) % len(self._addresses)])
        raise AssertionError("a market has an address")

    def describe(self, owner: bytes = b"") -> Description:
        """Return what the market says about itself, its head verified; `owner`: who asks whether it may publish."""
        answer = self._call(lambda: self._stub.Describe(pb.DescribeRequest(owner=owner), timeout=CALL_TIMEOUT_S))
        self.traffic.count("describe", 0, answer.ByteSize())
        head = _head(answer.head)
        verify_head(head, answer.market_key)
        pin = _there(self._pins)
        if pin is not None and pin.read_bytes() != answer.market_key:
            raise InvalidSignature(
                "market: its catalogue key is another than before", hint=f"if its operator confirms the change, remove {pin}"
            )
        _write_missing(self._pins, bytes(answer.market_key))
        self._members_port = int(answer.members_port)
        self._remember(bytes(answer.checkpoint), head, bytes(answer.market_key))
        witnessed = tuple(bytes(note) for note in answer.witnessed)
        witnesses = self._require_witnesses(witnessed, bytes(answer.checkpoint), bytes(answer.market_key))
        admission = _admission(answer.admission)
        return Description(
            answer.market_key, tuple(answer.map_ids), answer.simulation, head, admission, bool(answer.may_publish), witnessed,
            self._members_port, witnesses,
        )  # fmt: skip

    def _remember(self, note: bytes, head: Head, market_key: bytes) -> None:
        """Keep the log's newest checkpoint; raise InvalidProof if the market cannot prove that it only appended to the one kept here."""
        checkpoint = open_checkpoint(note, market_key)
        if checkpoint.size != head.size or checkpoint.catalogue != head.digest:
            raise InvalidProof("checkpoint: expected the catalogue's head in it, got another")
        known = self.checkpoint(market_key)
        if known == checkpoint:
            _write_missing(self._kept_checkpoints, self.checkpoint_note())
            return
        proof: list[bytes] = []
        if known is not None and min(known.size, checkpoint.size) > 0 and known.size != checkpoint.size:
            proof = self.prove_consistency(*sorted((known.size, checkpoint.size)))
        try:
            newer = accept(known, checkpoint, proof)
        except InvalidProof as error:
            raise _two_histories("log", str(error)) from None
        if newer is checkpoint:
            for path in self._kept_checkpoints:
                write_durably(path, note, 0o644)

    def _require_witnesses(self, notes: Sequence[bytes], shown: bytes, market_key: bytes) -> tuple[str, ...]:
        """Return the names of the witnesses that this home trusts and that signed the log that is shown.

        Raises InvalidProof where it trusts some, and none of them signed.
        """
        checkpoint, witnesses = open_checkpoint(shown, market_key), read_witnesses(self._witnesses)
        if not witnesses or not checkpoint.size:
            return ()
        return tuple(require_witnessed(notes, witnesses, market_key, checkpoint, self.prove_consistency, time.time()))

    @staticmethod
    def today() -> int:
        """Return the day of this clock, by which it is decided whether a release holds: a market's word would revive what is over."""
        return day_of(time.time())

    def checkpoint(self, market_key: bytes) -> Checkpoint | None:
        """Return the newest checkpoint of this market that was seen from this home, or None."""
        return open_checkpoint(self.checkpoint_note(), market_key) if _there(self._kept_checkpoints) else None

    @property
    def market_key(self) -> bytes | None:
        """The key that this home knows the market by, or None before the first contact."""
        pin = _there(self._pins)
        return pin.read_bytes() if pin is not None else None

    def checkpoint_note(self) -> bytes:
        """Return the signed note of that checkpoint; raise NotFound if there is none."""
        path = _there(self._kept_checkpoints)
        if path is None:
            raise NotFound("checkpoint: none was seen yet")
        return path.read_bytes()

    def prove_consistency(self, first: int, second: int) -> list[bytes]:
        """Return the market's proof that its log of `second` entries begins with that of `first`; not verified."""
        request = pb.ConsistencyRequest(first=first, second=second)
        answer = self._call(lambda: self._stub.ProveConsistency(request, timeout=CALL_TIMEOUT_S))
        self.traffic.count("log", request.ByteSize(), answer.ByteSize())
        return [bytes(value) for value in answer.hashes]

    def receipt(self, release_id: bytes, index: int) -> Receipt:
        """Return the receipt of a release that is at `index` of the log, under the newest checkpoint; verified."""
        market_key, envelope = self.describe().market_key, self.release(release_id)
        note = self.checkpoint_note()
        request = pb.InclusionRequest(index=index, size=open_checkpoint(note, market_key).size)
        answer = self._call(lambda: self._stub.ProveInclusion(request, timeout=CALL_TIMEOUT_S))
        self.traffic.count("log", request.ByteSize(), answer.ByteSize())
        receipt = Receipt(envelope, market_key, index, note, tuple(bytes(value) for value in answer.hashes))
        receipt.verify()
        return receipt

    def enrol(self, secret: bytes, owner: bytes, supernode_key: str, signature: bytes) -> tuple[str, str, str]:
        """Return organisation, name of the SuperNode and address of the SuperLink ("": none) of a new member; idempotent."""
        request = pb.EnrolRequest(secret=secret, owner=owner, supernode_key=supernode_key, signature=signature)
        answer = self._call(lambda: self._stub.Enrol(request, timeout=TRANSFER_TIMEOUT_S))
        return answer.organisation, answer.node_name, answer.superlink

    def certify(self, request: bytes) -> tuple[bytes, bytes]:
        """Return a new certificate of an owner and all authorities of the market, PEM; that its own key signed both is verified."""
        market_key = self.market_key or self.describe().market_key
        message = pb.CertifyRequest(request=request)
        answer = self._call(lambda: self._stub.Certify(message, timeout=CALL_TIMEOUT_S))
        self.traffic.count("certificate", message.ByteSize(), answer.ByteSize())
        verify_answer(market_key, request, answer.certificate, answer.authorities, answer.signature)
        return bytes(answer.certificate), bytes(answer.authorities)

    def _member_stub(self) -> MarketStub:
        """Return what members' calls go through: the members' port under the owner's certificate, where the market has one."""
        if self._membership is None:
            return self._stub
        if self._members_port is None:
            self.describe()
        if not self._members_port:
            return self._stub
        stub = self._stub
        own = self._membership.current(self, self.market_key or self.describe().market_key)
        if self._stub is not stub:  # turned to another process meanwhile, whose port may be another
            return self._member_stub()
        if self._members is None or self._members[0] != (self._members_port, own):
            # Streams of the channel before go on until they end.
            apart = len(self._addresses) > 1
            channel = connect(f"{self._address.rpartition(':')[0]}:{self._members_port}", self.ca, own, apart=apart)
            self._channels.append(channel)
            self._members = (self._members_port, own), MarketStub(channel)  # type: ignore[no-untyped-call]
        return self._members[1]

    def knock(self) -> None:
        """Raise what calls of a member would: no certificate to be had, a revoked one, a port that is closed; nothing without a port."""
        if self._member_stub() is not self._stub:
            self._call_as_member(lambda stub: stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S))

    def _call_as_member(self, call: Callable[[MarketStub], Answer]) -> Answer:
        try:
            return self._call(lambda: call(self._member_stub()))
        except MarketUnreachable as error:
            if self._members is None:
                raise
            raise MarketUnreachable(
                f"{error} on its port for members, {self._members_port}",
                hint="it turns away certificates that it does not trust: `veilmart node certificate --renew`; or is the port closed?",
            ) from None

    def publish(self, envelope: bytes) -> Receipt:
        """Publish a release and return the market's receipt, verified; idempotent.

        Raises AlreadyPublished for another release of the same number; the market's evidence of that is kept in the folder `conflicts`.
        """
        request = pb.PublishRequest(envelope=envelope)
        try:
            receipt = self._call_as_member(lambda stub: stub.Publish(request, timeout=CALL_TIMEOUT_S))
        except AlreadyPublished as error:
            error.hint = self._keep_conflict(envelope)
            raise
        self.traffic.count("publish", request.ByteSize(), receipt.ByteSize())
        if receipt.release_id != open_envelope(envelope).release_id:
            raise FormatError("receipt: expected the id of the release that was sent")
        market_key = self.describe().market_key  # also: does what was seen before still stand?
        promise = Receipt(envelope, market_key, int(receipt.index), bytes(receipt.checkpoint), tuple(map(bytes, receipt.inclusion)))
        checkpoint, head = promise.verify(), _head(receipt.head)
        verify_head(head, market_key)
        if (checkpoint.size, checkpoint.catalogue) != (head.size, head.digest):
            raise InvalidProof("receipt: expected the catalogue's head in its checkpoint, got another")
        self._remember(bytes(receipt.checkpoint), head, market_key)
        return promise

    def _keep_conflict(self, envelope: bytes) -> str:
        """Keep the market's evidence that this release has a twin; return what to do with it."""
        request = pb.PublishRequest(envelope=envelope)
        try:
            market_key = self.describe().market_key
            answer = self._call(lambda: self._stub.ProveConflict(request, timeout=CALL_TIMEOUT_S))
            conflict = Conflict.from_bytes(bytes(answer.evidence))
            first, _, _ = conflict.verify()
            if conflict.second != envelope or conflict.receipt.market_key != market_key:
                raise InvalidProof("conflict: expected this market's evidence about the release that was sent")
        except VeilmartError as error:
            return f"the market did not prove it ({error}): do not believe it, and ask its operator"
        file = self._home.parent / "conflicts" / f"{first.owner.hex()[:16]}-{first.release_number}.conflict"
        write_durably(file, conflict.to_bytes(), 0o644)
        return f"{file} proves that this key signed both (`veilmart verify conflict`): is this node a copy, or its ledger an older one?"

    def release(self, release_id: bytes) -> bytes:
        """Return the envelope of a release; its signature and id are verified."""
        answer = self._call(lambda: self._stub.GetRelease(pb.ReleaseRequest(release_id=release_id), timeout=CALL_TIMEOUT_S))
        if open_envelope(answer.envelope).release_id != release_id:
            raise FormatError("release: expected the release that was asked for")
        return bytes(answer.envelope)

    def upload_adapter(self, reference: AdapterReference, data: bytes) -> None:
        """Send an adapter's bytes; a market that has no place for a moment is asked again, for two minutes."""

        def chunks() -> Iterator[Any]:
            yield pb.AdapterChunk(digest=reference.digest, size_bytes=reference.size_bytes)
            for start in range(0, len(data), CHUNK_BYTES):
                yield pb.AdapterChunk(data=data[start : start + CHUNK_BYTES])

        until = time.monotonic() + TRANSFER_TIMEOUT_S
        while True:
            try:
                self._call_as_member(lambda stub: stub.UploadAdapter(chunks(), timeout=TRANSFER_TIMEOUT_S))
                break
            except QuotaExceeded as error:
                if error.retry_after_s > LONGEST_PAUSE_S or time.monotonic() > until:
                    raise
                time.sleep(error.retry_after_s * random.uniform(1, 2))  # others were told the same
        self.traffic.count("adapter", len(data), 0)

    def download_adapter(self, reference: AdapterReference, on_progress: Callable[[int, int], None] = lambda done, of: None) -> bytes:
        """Return an adapter's bytes; raise InvalidAdapter unless size and digest are the release's."""
        data = bytearray()

        def collect() -> None:
            data.clear()
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

    def introduction(self, release_id: bytes) -> bytes:
        """Return the introduction that the market shows for a release; not verified."""
        request = pb.IntroductionRequest(release_id=release_id)
        answer = self._call(lambda: self._stub.GetIntroduction(request, timeout=CALL_TIMEOUT_S))
        self.traffic.count("relay", request.ByteSize(), answer.ByteSize())
        return bytes(answer.introduction)

    def ask(self, release_id: bytes, sealed: bytes, timeout_s: float) -> bytes:
        """Return the sealed answer of a release's guard to a sealed question."""
        request = pb.SealedQuestion(release_id=release_id, sealed=sealed)
        answer = self._call(lambda: self._stub.Ask(request, timeout=timeout_s))
        self.traffic.count("relay", request.ByteSize(), answer.ByteSize())
        return bytes(answer.sealed)

    def relay(self, messages: Iterator[Any], timeout_s: float) -> Any:
        """Return the stream of what the market passes on to a guard; it raises gRPC's own errors, and `cancel` ends it."""
        return self._member_stub().Relay(messages, timeout=timeout_s)

    def match(self, map_id: bytes, head: Head, query: bytes, answer_bytes: int) -> Exchange:
        """Return the market's answer to an encrypted query, exactly `answer_bytes` long, with the market's signature verified.

        Raises StaleCatalogue if the catalogue is not at `head` any more, InvalidSignature for an answer that the market did not sign as one
        to this query at this head: it is used for nothing then, and the market is not told.
        """
        market_key = self.market_key or self.describe().market_key

        def chunks() -> Iterator[Any]:
            yield pb.MatchChunk(profile=STD128.name, map_id=map_id, catalogue_size=head.size, catalogue_head=head.digest)
            for start in range(0, len(query), CHUNK_BYTES):
                yield pb.MatchChunk(data=query[start : start + CHUNK_BYTES])

        answer, last, received = bytearray(), pb.ScoresChunk(), 0

        def collect() -> None:
            nonlocal last, received
            answer.clear()
            received = 0
            # A market that is new on its machine compiles its kernels first: 18 s of CPU, and longer where it shares a core.
            for chunk in self._stub.Match(chunks(), timeout=TRANSFER_TIMEOUT_S):
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
        self._remember(news.checkpoint, news.head, description.market_key)
        catalogue = self._cards(folder, catalogue)
        if news.rows:
            _write_entries(folder / "rows", [rows])
        if news.terms:
            _write_entries(folder / "terms", terms)
        return replace(catalogue, gone=taken_back(self._notices(description)), today=self.today())

    def organisations(self, head: Head) -> Organisations:
        """Return which releases under this head are one organisation's, by the market's word; its signature is verified."""
        market_key = self.market_key or self.describe().market_key
        most = 128 * head.size + (1 << 16)

        def collect() -> tuple[Organisations, bytes]:
            numbers, names, signature, received = bytearray(), list[str](), b"", 0
            request = pb.OrganisationsRequest(catalogue_size=head.size)
            for chunk in self._stub.GetOrganisations(request, timeout=TRANSFER_TIMEOUT_S):
                received += chunk.ByteSize()
                if received > most:
                    raise FormatError(f"organisations: expected at most {most} bytes, got more")
                numbers += chunk.numbers
                names.extend(chunk.names)
                signature = bytes(chunk.signature)
            self.traffic.count("organisations", request.ByteSize(), received)
            return open_organisations(bytes(numbers), names, head.size), signature

        organisations, signature = self._call(collect)
        organisations.verify(signature, head.digest, market_key)
        return organisations

    def notices(self) -> tuple[Notice, ...]:
        """Return all notices of this market, none of those that were seen before missing or changed."""
        return self._notices(self.describe())

    def rotations(self) -> list[bytes]:
        """Return the rotations among this market's notices, as they travel."""
        description = self.describe()
        kinds = [notice.kind for notice in self._notices(description)]
        entries = _read_entries(self._folder(description) / "notices")
        return [entry for entry, kind in zip(entries, kinds, strict=True) if kind is Kind.ROTATION]

    def submit(self, notice: bytes) -> int:
        """Have a notice logged and return its index, proven to be under a head that the market signed; idempotent."""
        market_key = self.describe().market_key
        open_notice(notice, market_key)
        request = pb.NoticeRequest(notice=notice)
        receipt = self._call_as_member(lambda stub: stub.SubmitNotice(request, timeout=CALL_TIMEOUT_S))
        verify_logged(notice, int(receipt.index), [bytes(value) for value in receipt.inclusion], _notices_head(receipt.head), market_key)
        return int(receipt.index)

    def _notices(self, description: Description) -> tuple[Notice, ...]:
        path, key = self._folder(description) / "notices", description.market_key
        known, checkpoint = _read_entries(path), self.checkpoint(key)  # read before: a newer one may bind more than what is fetched now
        news, head = self._fetch_notices(len(known))
        if head.size < len(known):
            raise _two_histories("notices")
        try:
            notices = open_notices([*known, *news], head, key)
        except FormatError:
            # What is kept here was verified: if all of them, fetched anew, give the head, the market has changed what it signed before.
            everything, head = self._fetch_notices(0)
            open_notices(everything, head, key)
            raise _two_histories("notices") from None
        self._require_whole([*known, *news], checkpoint, description)
        if news:
            _write_entries(path, [*known, *news])
        return notices

    def _require_whole(self, entries: Sequence[bytes], checkpoint: Checkpoint | None, description: Description) -> None:
        """Raise InvalidProof if notices are missing that a checkpoint of this market binds, or that a trusted witness saw."""
        if checkpoint is None or not checkpoint.size:
            return
        try:
            require_listed(entries, checkpoint)
        except InvalidProof as error:
            raise _two_histories("notices", str(error)) from None
        if witnesses := read_witnesses(self._witnesses):
            require_witnessed_notices(entries, description.witnessed, witnesses, description.market_key, time.time())

    def _fetch_notices(self, start: int) -> tuple[list[bytes], NoticesHead]:
        def collect() -> tuple[list[bytes], NoticesHead]:
            entries: list[bytes] = []
            head: NoticesHead | None = None
            received = 0
            request = pb.NoticesRequest(from_index=start)
            for chunk in self._stub.SyncNotices(request, timeout=TRANSFER_TIMEOUT_S):
                received += chunk.ByteSize()
                if received > MAX_NOTICES_BYTES:
                    raise FormatError(f"notices: expected at most {MAX_NOTICES_BYTES} bytes, got more")
                entries.extend(bytes(entry) for entry in chunk.entries)
                if chunk.HasField("head"):
                    head = _notices_head(chunk.head)
            self.traffic.count("notices", request.ByteSize(), received)
            if head is None:
                raise FormatError("notices: expected a signed head on the last chunk")
            return entries, head

        return self._call(collect)

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

        A release that breaks the market's own admission policy, was taken back, or does not hold today has no place in a ranking; the
        others go on.
        """
        description = self._accepting(feature_map)
        _, releases, catalogue = self._releases(description, feature_map)
        kept, refused, today = [], [], self.today()
        notices = self._notices(description)
        require_rightful(notices, {release.release_id: release.owner for release in releases})
        gone = taken_back(notices)
        for position, release in enumerate(releases):
            if release.release_id in gone or not release.window.holds(today):
                continue
            try:
                admit_release(release, description.admission)
                kept.append(position)
            except NotAdmitted:
                refused.append(release.release_id)
        if len(kept) == len(releases):
            return Mirror(catalogue, releases, tuple(kept), notices=notices)
        return Mirror(catalogue.only(kept), tuple(releases[i] for i in kept), tuple(kept), tuple(refused), notices)

    def envelopes(self, feature_map: FeatureMap) -> list[bytes]:
        """Return the envelopes of all releases in the order of the catalogue, every one verified."""
        return self._releases(self._accepting(feature_map), feature_map)[0]

    def aggregates(self, feature_map: FeatureMap) -> Aggregates:
        """Return what all standing releases say together, signed, of this log and these notices; not recomputed.

        What is fetched does not depend on what somebody looks for: the same bytes for everybody.
        """
        return self._aggregates(self._accepting(feature_map), feature_map)[0]

    def recomputed_aggregates(self, feature_map: FeatureMap) -> Aggregates:
        """Return the same, recomputed here from all releases; raise InvalidProof if the market signed other numbers."""
        description = self._accepting(feature_map)
        aggregates, notices = self._aggregates(description, feature_map)
        state = aggregates.state
        envelopes, releases, _ = self._releases(description, feature_map)
        if len(envelopes) < state.size or root_of_all(envelopes[: state.size]) != state.root:
            raise InvalidProof("aggregates: of another log than that of the market")
        require_rightful(notices, {release.release_id: release.owner for release in releases})
        require_honest(aggregates, releases[: state.size], taken_back(notices[: state.notices_size]), feature_map)
        return aggregates

    def _aggregates(self, description: Description, feature_map: FeatureMap) -> tuple[Aggregates, tuple[Notice, ...]]:
        """Return the aggregates, proven to be of the log and the notices that this home knows, and all notices."""
        aggregates = open_aggregates(*self._fetch_aggregates(), description.market_key)
        state, known = aggregates.state, self.checkpoint(description.market_key)
        if (state.map_id, len(aggregates.federation.centre)) != (feature_map.map_id, feature_map.dimension):
            raise IncompatibleSpecification(f"aggregates: expected the map {feature_map.map_id.hex()[:16]}, got {state.map_id.hex()[:16]}")
        if state.size and known is not None and known.size:
            older, newer = sorted(((state.size, state.root), (known.size, known.root)))
            proof = self.prove_consistency(older[0], newer[0]) if older[0] < newer[0] else []
            verify_consistency(older[0], newer[0], older[1], newer[1], proof)
        notices = self._notices(description)
        entries = _read_entries(self._folder(description) / "notices")[: state.notices_size]
        if len(entries) != state.notices_size or root_of_all(entries) != state.notices_root:
            raise InvalidProof("aggregates: of other notices than those of the market")
        return aggregates, notices

    def _fetch_aggregates(self) -> tuple[bytes, bytes]:
        def collect() -> tuple[bytes, bytes]:
            data, signature = bytearray(), b""
            request = pb.AggregatesRequest()
            for chunk in self._stub.GetAggregates(request, timeout=TRANSFER_TIMEOUT_S):
                data += chunk.data
                signature = bytes(chunk.signature)
                if len(data) > MAX_AGGREGATES_BYTES:
                    raise FormatError(f"aggregates: expected at most {MAX_AGGREGATES_BYTES} bytes, got more")
            self.traffic.count("aggregates", request.ByteSize(), len(data))
            return bytes(data), signature

        return self._call(collect)

    def releases_of(self, owners: Sequence[bytes], feature_map: FeatureMap) -> list[bytes]:
        """Return the envelopes of all releases that one of these keys of one owner signed, cohorts' among them, from the whole catalogue.

        A market that leaves one out breaks its own chain.
        The market learns that somebody synced, not whose releases were looked for.
        """
        envelopes, releases, _ = self._releases(self._accepting(feature_map), feature_map)
        return [envelope for envelope, release in zip(envelopes, releases, strict=True) if set(release.signers) & set(owners)]

    def kept_release(self, description: Description, position: int, release_id: bytes) -> Release | None:
        """Return a release from the copy of all releases, where this home keeps one that has it; nobody is asked."""
        envelopes = _read_entries(self._folder(description) / "envelopes")
        release = open_envelope(envelopes[position]) if position < len(envelopes) else None
        return release if release is not None and release.release_id == release_id else None

    def _releases(self, description: Description, feature_map: FeatureMap) -> tuple[list[bytes], tuple[Release, ...], Catalogue]:
        path = self._folder(description) / "envelopes"
        known = _read_entries(path)
        news = self._fetch(pb.CATALOGUE_FORM_ENVELOPES, len(known), 0)
        envelopes = [*known, *news.envelopes]
        releases = tuple(open_envelope(envelope) for envelope in envelopes)
        catalogue = open_mirror(feature_map, releases, news.head, description.market_key)
        self._remember(news.checkpoint, news.head, description.market_key)
        if root_of_all(envelopes) != open_checkpoint(news.checkpoint, description.market_key).root:
            raise InvalidProof("catalogue: expected the releases that are in the log, got others")
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
            note = b""
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
                    head, note = _head(chunk.head), bytes(chunk.checkpoint)
            self.traffic.count("catalogue", request.ByteSize(), received)
            if head is None:
                raise FormatError("catalogue: expected a signed head on the last chunk")
            if head.size < start:
                raise InvalidSignature(
                    f"catalogue: expected at least the {start} releases known here, got {head.size}: the market has gone back in time"
                )
            return _News(envelopes, bytes(rows), new_terms, head, note)

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


def _authorities_in(pem: bytes) -> list[str]:
    """Return what each authority in a file is known by here: while one follows another, what is remembered of a market follows too."""
    begin = b"-----BEGIN CERTIFICATE-----"
    parts = [begin + part for part in pem.split(begin)[1:]] if pem.count(begin) > 1 else [pem]
    return [hashlib.sha256(part).hexdigest()[:32] for part in parts]


def _there(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.exists()), None)


def _write_missing(paths: Sequence[Path], data: bytes) -> None:
    for path in paths:
        if not path.exists():
            write_durably(path, data, 0o644)


def read_witnesses(path: Path) -> list[Witness]:
    """Return the witnesses that a home trusts: a file of one verifier key a line, none if there is no file."""
    return [Witness.parse(line) for line in path.read_text().split()] if path.exists() else []


@dataclass(frozen=True, slots=True)
class _News:
    envelopes: list[bytes]
    rows: bytes
    terms: list[bytes]
    head: Head
    checkpoint: bytes  # signed note


def _hint_for_maps(map_ids: Sequence[bytes]) -> str:
    for name in shipped_maps():
        if shipped_map(name).map_id in map_ids:
            return f"the market works with --map {name}"
    return "give the market's map as --map FILE, or install the veilmart version that ships it"


def _two_histories(what: str, why: str = "what was synced before is not in it") -> InvalidProof:
    return InvalidProof(
        f"market: its {what} contradicts what this home has seen ({why}): the market shows two histories",
        hint="keep the folder `catalogues` as it is, it shows what was signed before, and ask the market's operator",
    )


def _kept_page(folder: Path, page: int, size: int) -> tuple[list[bytes], range]:
    """Return the cards of a page that are kept here, none beyond `size`, and the positions of those that are not."""
    stop = min((page + 1) * PAGE_SIZE, size)
    cards = _read_entries(folder / "cards" / str(page))[: stop - page * PAGE_SIZE]
    return cards, range(page * PAGE_SIZE + len(cards), stop)


def names_kept(home: Path) -> Iterator[str]:
    """Yield NAME@HEX of every release whose card was synced to a home, without asking anybody; unchecked, for a person to choose from."""
    for page in sorted((home / "catalogues").glob(f"*-v{COPY}/cards/*")):
        for body in _read_entries(page):
            (card,) = parse_cards([body])
            yield f"{card.name}@{card.release_id.hex()[:8]}"


def find_release_id(text: str, catalogue: Catalogue, *, standing_alone: bool = True, holding_alone: bool = True) -> bytes:
    """Return the id that `text` names: NAME@HEX, HEX (at least 8 digits) or a NAME that only one release has.

    standing_alone: whether releases that were taken back are left out.  holding_alone: whether those are, too, that do not hold today;
    raises OutsideWindow where no other is left.
    """
    name, _, digits = text.rpartition("@")
    found = {
        card.release_id: catalogue.terms_of(position).window
        for position, card in catalogue.cards.items()
        if (name in ("", card.name) and len(digits) >= 8 and card.release_id.hex().startswith(digits)) or (not name and digits == card.name)
    }
    hits = [release_id for release_id in found if release_id not in catalogue.gone or not standing_alone]
    if holding_alone and standing_alone and (today := catalogue.today) is not None:
        over = hits
        hits = [release_id for release_id in over if found[release_id].holds(today)]
        if over and not hits:
            found[over[-1]].require(today, text)
    if len(hits) == 1:
        return hits[0]
    if found and not hits:
        raise NotFound(f"{text}: it was taken back, by its owner or by the market", hint="`veilmart find` lists those that stand")
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
            parse_decimal(message.largest_adapter_epsilon, "admission.largest_adapter_epsilon")
            if message.largest_adapter_epsilon
            else None,
        )
    except UsageError as error:
        raise FormatError(f"market: {error}") from None


def _notices_head(message: Any) -> NoticesHead:
    return NoticesHead(int(message.size), bytes(message.root), bytes(message.signature))


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
