"""The market's gRPC service: checks what comes in, calls one function, answers.  The only table from errors to statuses is here."""

from __future__ import annotations

import asyncio
import datetime
import functools
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from sqlalchemy.exc import DatabaseError

from market_node.aggregates import Aggregates, Signed
from market_node.backup import keep_newest, keep_newest_notices, require_newest, require_newest_notices
from market_node.certificates import Gate, certificate_of
from market_node.database import away, disk_is_full, is_away
from market_node.directory import Directory
from market_node.events import (
    AdapterStored,
    CertificateIssued,
    Cosigned,
    DatabaseAway,
    DiskFull,
    Enrolled,
    Incident,
    IndexFailed,
    Noticed,
    Published,
    kind_of,
    short,
    tell,
    where,
)
from market_node.index import Version
from market_node.matcher import Answer as MatchAnswer
from market_node.matcher import Matcher
from market_node.members import Member, Members
from market_node.neighbours import Neighbours, was_passed_on
from market_node.quotas import Quota, Quotas
from market_node.relay import LINE_S, Switchboard
from market_node.shards import Evaluator
from market_node.store import Log, Offer, Store, Stored, read_chunks
from market_node.superlink import canonical_key, hand_over_supernode
from market_node.uploads import Uploads
from protocol import errors
from protocol.adapter_check import AT_ONCE, Checkers, Manifest, require_said
from protocol.admission import AdmissionPolicy, admit_release
from protocol.catalogue import PAGE_SIZE, Head, scalars_of, sign_head
from protocol.certificates import open_request, sign_answer
from protocol.channel import CHUNK_BYTES, CODE_KEY, RETRY_KEY
from protocol.claims import Claims
from protocol.codec import format_decimal
from protocol.conflict import sign_conflict
from protocol.encryption import STD128
from protocol.enrolment import MAX_SUPERNODE_KEY, SECRET_BYTES, verify_enrolment
from protocol.errors import (
    FormatError,
    IncompatibleSpecification,
    InvalidAdapter,
    InvalidProof,
    InvalidSignature,
    NotFound,
    QuotaExceeded,
    StaleCatalogue,
    Unauthorised,
    UsageError,
    VeilmartError,
)
from protocol.features import FeatureMap
from protocol.notices import Kind, Notice, inclusion_in, open_notice, sign_notices
from protocol.organisations import Organisations
from protocol.release import AdapterReference, Release, open_envelope
from protocol.transparency import Checkpoint, Receipt, open_checkpoint, origin_of, sign_checkpoint
from protocol.window import day_of
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketServicer
from protocol.witness import Witness, cosigned_at

# error -> status; a subclass comes before its parent
STATUSES: tuple[tuple[type[VeilmartError], grpc.StatusCode], ...] = (
    (errors.StaleCatalogue, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IncompatibleSpecification, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotAdmitted, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.OutsideWindow, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.FormatError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidSignature, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidAdapter, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.FeatureNormError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthorised, grpc.StatusCode.PERMISSION_DENIED),
    (errors.QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.MarketUnreachable, grpc.StatusCode.UNAVAILABLE),
    (errors.GuardUnreachable, grpc.StatusCode.ABORTED),  # not UNAVAILABLE: that says that the market is away
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyPublished, grpc.StatusCode.ALREADY_EXISTS),
)
UPLOAD_S = 30.0  # a query must have arrived by then
ANNOUNCEMENT_S = 10.0  # an upload that says nothing for so long is ended; it holds no place yet
ADAPTER_S = 120.0
QUERIES_AT_ONCE = 32  # bodies held in memory; more are refused, not queued
QUERIES_A_PASS = 8  # share a pass over the tiles; each takes 64 kB of memory for a baby step
REFRESH_S = 0.5
FOLLOW_S = 1.0
REFUSED_INVITES, REFUSED_INVITES_S = 20, 60.0  # so many within so many seconds are refused with a word of what is wrong
UNSENT_BYTES = 64 << 20  # answers that their queriers have not read yet; beyond them new queries are refused
RELEASES_A_COMMIT = 64  # share a transaction, a sync of the disk and the two signatures
ENTRIES_A_READ = 256
ROWS_A_READ = PAGE_SIZE  # together one chunk
PAGES_A_CALL = 64
MAX_DEADLINE_S = ADAPTER_S + 5.0
MAX_LINE_S = LINE_S + 60.0  # a guard's stream waits for questions
DISK_FULL_S = 60  # after which a client may try again
REQUEST_S = 3600  # a request for a certificate is that fresh by this market's clock
MAX_DETAILS = 500  # characters; an error may name a field that a stranger chose, and gRPC refuses trailers beyond 8 KiB

Answer = TypeVar("Answer")
Appended = tuple[Stored, pb.SignedHead, bytes]
"""Where a release lies, the head and the checkpoint that it is under, signed."""


async def refuse(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the error's status; what was not raised on purpose becomes INTERNAL with an incident id and nothing else."""
    if disk_is_full(error):
        tell(DiskFull(where(error.__traceback__)))
        hint = "nothing was acknowledged; once its operator has freed the disk, the same goes through"
        error = QuotaExceeded("market: its disk is full", hint=hint, retry_after_s=DISK_FULL_S)
    if is_away(error):
        tell(DatabaseAway(where(error.__traceback__)))
        error = away()
    for kind, status in STATUSES:
        if isinstance(error, kind):
            hint = f" ({error.hint})" if isinstance(error, VeilmartError) and error.hint else ""
            code = error.code if isinstance(error, VeilmartError) else kind.code
            later = ((RETRY_KEY, str(error.retry_after_s)),) if isinstance(error, QuotaExceeded) else ()
            await context.abort(status, f"{error}{hint}"[:MAX_DETAILS], trailing_metadata=((CODE_KEY, code), *later))
    if isinstance(error, TimeoutError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time")
    incident = secrets.token_hex(8)
    tell(Incident(incident, kind_of(error), where(error.__traceback__)))
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error, incident {incident}")


def check_deadline(context: grpc.aio.ServicerContext, most_s: float = MAX_DEADLINE_S) -> None:
    """Raise UsageError unless the client waits at most `most_s`: without a deadline, one that stops reading holds its memory here."""
    left = context.time_remaining()
    if left is None or left > most_s:
        raise UsageError(f"deadline: expected one of at most {most_s:.0f} s, got {'none' if left is None else f'{left:.0f} s'}")


def answering(handler: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
    """Return a unary-response handler whose errors follow the table."""

    @functools.wraps(handler)
    async def run(self: MarketService, request: Any, context: grpc.aio.ServicerContext) -> Answer:
        try:
            check_deadline(context)
            return await handler(self, request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:
            await refuse(context, error)
            raise  # not reached: abort raises

    return run


def streaming(handler: Callable[..., AsyncIterator[Answer]], most_s: float = MAX_DEADLINE_S) -> Callable[..., AsyncIterator[Answer]]:
    """Return a stream-response handler whose errors follow the table."""

    @functools.wraps(handler)
    async def run(self: MarketService, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Answer]:
        try:
            check_deadline(context, most_s)
            async for message in handler(self, request, context):
                yield message
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 - refuse() always ends the call by raising
            await refuse(context, error)

    return run


def in_chunks(entries: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the entries in order, in lists of at most CHUNK_BYTES together (an entry is never longer than that)."""
    chunk: list[bytes] = []
    size = 0
    for entry in entries:
        if chunk and size + len(entry) > CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(entry)
        size += len(entry)
    if chunk:
        yield chunk


def message_of(head: Head) -> pb.SignedHead:
    """Return a head as it travels."""
    return pb.SignedHead(
        size=head.size, head=head.rows, signature=head.signature, terms_size=head.terms_size, terms=head.terms, cards=head.cards
    )


def said_by(release: Release | Claims) -> Manifest:
    """Return what a release says of its adapter."""
    return Manifest(release.base_model.hex(), str(release.adapter.guarantee) if release.adapter is not None else "")


def host_of(peer: str) -> str:
    """Return where a connection comes from, without its port: who sends, where nobody shows a certificate."""
    return peer.rpartition(":")[0]


def data_of(chunk: pb.AdapterChunk) -> bytes:
    """Return the bytes in a chunk of an adapter; raise FormatError for too many."""
    if len(chunk.data) > CHUNK_BYTES:
        raise FormatError(f"adapter: expected chunks of at most {CHUNK_BYTES} bytes, got {len(chunk.data)}")
    return bytes(chunk.data)


async def to_its_end(work: asyncio.Future[Answer]) -> Answer:
    """Return what comes of work in another thread; a caller that goes away meanwhile lets go of nothing that it still uses."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        with suppress(Exception):
            await work
        raise


def _settle(answered: asyncio.Future[Any], result: object) -> None:
    if answered.done():
        return
    if isinstance(result, Exception):
        answered.set_exception(result)
    else:
        answered.set_result(result)


def _reads(pages: Sequence[int], known: int, size: int) -> Iterator[tuple[int, int]]:
    for page in pages:
        stop = min((page + 1) * PAGE_SIZE, size)
        for start in range(max(page * PAGE_SIZE, known), stop, ENTRIES_A_READ):
            yield start, min(start + ENTRIES_A_READ, stop)


@dataclass(frozen=True, slots=True)
class Load:
    """What a market holds at a moment; numbers alone, for its operator."""

    releases: int  # under the newest checkpoint that was given out
    queries: int
    uploads: int
    upload_bytes: int  # announced for these
    unsent_bytes: int
    workers: int  # that answer queries now, beside the market's process
    workers_lost: int  # since it started


class MarketService(MarketServicer):
    """One market over one store and one feature map.  policy: which specifications it takes."""

    def __init__(
        self,
        store: Store,
        feature_map: FeatureMap,
        market_key: Any,
        *,
        simulation: bool,
        policy: AdmissionPolicy | None = None,
        witnesses: Sequence[Witness] = (),
        members: Members | None = None,
        register: Callable[[Member], str] = lambda member: "",
        quotas: Quotas | None = None,
        gate: Gate | None = None,
        neighbours: Neighbours | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        store.require_map(feature_map)
        self._store, self._map, self._key, self._simulation = store, feature_map, market_key, simulation
        self._policy, self._witnesses = policy or AdmissionPolicy(), {witness.name: witness for witness in witnesses}
        # members: who may publish; None: anybody.  register: lets a member's SuperNode connect, and says where.
        self._members, self._register, self._quotas = members, register, quotas
        self._gate = gate  # None: calls of members are taken from anywhere, on their signatures
        self._neighbours = neighbours  # other processes over the same records; None: there are none
        self._directory = Directory(store, members)
        self._refused_invites: deque[float] = deque(maxlen=REFUSED_INVITES)
        # Registering costs a process of two CPU-seconds: one at a time, and once for each member, who may ask as often as it likes.
        self._registering, self._superlink_of = asyncio.Lock(), dict[Member, str]()
        self._public = market_key.public_key().public_bytes_raw()
        require_newest(store, self._public)
        require_newest_notices(store)
        self._given_out = self._notices_given_out = 0
        self._shown = self._notices_shown = 0, b""
        self._matcher = Matcher(store, feature_map, market_key, evaluator)
        # One thread writes and reads the store, one encodes, one evaluates: neither the event loop nor a query whose index is there waits
        # for disk or encoding.
        self._storing = ThreadPoolExecutor(1, "store")
        self._indexing = ThreadPoolExecutor(1, "index")
        self._matching = ThreadPoolExecutor(1, "match")
        self._checking, self._checkers = ThreadPoolExecutor(AT_ONCE, "check"), Checkers()
        self.warm = self._matching.submit(self._matcher.warm_up)
        self._aggregates, self._aggregating = Aggregates(store, feature_map, market_key), ThreadPoolExecutor(1, "aggregate")
        self._indexing.submit(self._first_index)
        self._offers: deque[tuple[Offer, asyncio.Future[Appended]]] = deque()
        self._refreshing: asyncio.Task[None] | None = None
        self._news = True
        self._waiting_lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[Version, bytes, asyncio.Future[Any]]]] = {}
        self._queries = asyncio.Semaphore(QUERIES_AT_ONCE)
        self._unsent = 0
        self._uploads = Uploads()
        self._manifests: dict[bytes, Manifest] = {}  # of adapters that were read since this market came up, by digest
        self._relay = Switchboard(
            self._public,
            functools.partial(self._store_call, self._store.envelope),
            functools.partial(self._store_call, self._may_answer),
        )

    async def follow(self, every_s: float = FOLLOW_S) -> None:
        """Have the index of what other processes publish built before somebody asks for it, until cancelled."""
        size = 0
        while True:
            with suppress(DatabaseError):  # it is away: whoever calls is told
                newest = (await self._store_call(self._store.head)).size
                if newest != size:
                    size = newest
                    self._refresh_soon()
            await asyncio.sleep(every_s)

    def hang_up(self) -> None:
        """End the streams of all guards, which would otherwise keep the server from stopping."""
        self._relay.close()

    def load(self) -> Load:
        """Return what is held now; safe from any thread."""
        uploads = self._uploads
        waiting, workers = QUERIES_AT_ONCE - self._queries._value, self._matcher.evaluator.workers()
        return Load(self._given_out, waiting, uploads.count, uploads.announced_bytes, self._unsent, *workers)

    def close(self) -> None:
        """Stop the threads."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._indexing.shutdown(cancel_futures=True)
        self._matching.shutdown(cancel_futures=True)
        self._checking.shutdown(wait=False, cancel_futures=True)
        self._checkers.close()  # a file that is being read keeps no market from stopping
        self._checking.shutdown()
        self._aggregating.shutdown(cancel_futures=True)
        self._storing.shutdown()

    async def _store_call(self, function: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._storing, functools.partial(function, *args, **kwargs))

    def _checkpoint(self, head: Head, logged: Log) -> bytes:
        """Return the signed note of this state; what is given out is kept first, so that no older database is ever served again."""
        if self._neighbours is not None and (head.size, logged.root) != self._shown:
            # A server that is not ours may become an older copy of itself while we run.  What any process of this market gave out is in
            # the folder: nothing is signed that contradicts it.
            require_newest(self._store, self._public)
            self._shown = head.size, logged.root
        note = sign_checkpoint(Checkpoint(origin_of(self._public), head.size, logged.root, head.digest, logged.notices), self._key)
        if logged.notices is not None:
            self._keep_notices(*logged.notices)
        if head.size > self._given_out:
            keep_newest(self._store.home, note, head.size, self._public)
            self._given_out = head.size
        return note

    def _state(self) -> tuple[Head, bytes]:
        head, logged = self._store.log()
        return head, self._checkpoint(head, logged)

    def _signed(self, head: Head) -> pb.SignedHead:
        return message_of(sign_head(head, self._key))

    @answering
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.MarketDescription:
        """Say who the market is; a member that shows its certificate hears whether that is good."""
        if self._gate is not None and (shown := certificate_of(context)):
            await self._store_call(self._gate.caller, shown, int(time.time()))
        head, note = await self._store_call(self._state)
        return pb.MarketDescription(
            market_key=self._public, map_ids=[self._map.map_id], simulation=self._simulation, head=self._signed(head),
            admission=pb.Admission(
                largest_epsilon=format_decimal(self._policy.largest_epsilon),
                delta="" if self._policy.delta is None else format_decimal(self._policy.delta),
                smallest_count=self._policy.smallest_count or 0,
                largest_adapter_epsilon=format_decimal(adapters) if (adapters := self._policy.largest_adapter_epsilon) is not None else "",
            ),
            checkpoint=note,
            witnessed=await self._store_call(self._store.cosigned),
            may_publish=await self._store_call(self._may_publish, bytes(request.owner)),
            members_port=self._gate.port if self._gate is not None else 0,
        )  # fmt: skip

    @answering
    async def Publish(self, request: pb.PublishRequest, context: Any) -> pb.Receipt:
        """Store a signed release."""
        release = open_envelope(request.envelope)
        await self._require_caller(certificate_of(context), release.owner, courier=True)
        if release.simulated and not self._simulation:
            raise UsageError("release: made with simulated noise, which protects nobody; this market is no simulation")
        # The release's base model is that of its adapter; the specification is under the map, whose encoder an owner may run beside it.
        scalars = scalars_of(release, self._map)
        admit_release(release, self._policy)
        today = day_of(time.time())
        # Whoever lost the receipt of a release that is over since gets it again.
        if not release.window.holds(today) and not await self._store_call(self._store.holds, release.release_id):
            release.window.require(today, "release")
        await self._require_sound(release)
        loop, answered = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()
        self._offers.append(((release, bytes(request.envelope), scalars), answered))
        # One transaction for each offer is queued; the first that gets its turn takes all that wait, and the others find nothing left.
        loop.run_in_executor(self._storing, self._append_waiting, loop)
        stored, head, note = await answered
        self._refresh_soon()
        tell(Published(short(release.release_id), stored.position, len(request.envelope)))
        return pb.Receipt(
            release_id=release.release_id, index=stored.position, head=head, checkpoint=note, inclusion=stored.log.inclusion
        )  # fmt: skip

    async def _require_sound(self, release: Release) -> None:
        """Raise InvalidAdapter if an adapter that is here already is not what this release says of it."""
        if release.adapter is None or not self._store.has_adapter(digest := release.adapter.digest):
            return
        if digest not in self._manifests:  # it came in another life of this market
            with self._store.adapter_file(digest).open("rb") as file:
                look = asyncio.get_running_loop().run_in_executor(self._checking, self._checkers.check, file.fileno())
                self._manifests[digest] = await to_its_end(look)
        require_said(self._manifests[digest], said_by(release))
        if (size := self._store.adapter_file(digest).stat().st_size) != release.adapter.size_bytes:
            raise InvalidAdapter(f"adapter: expected {release.adapter.size_bytes} bytes, as its release says, got {size}")

    @answering
    async def ProveConflict(self, request: pb.PublishRequest, context: Any) -> pb.ConflictProof:
        """Answer the evidence that the owner of a release signed another one of the same number."""
        del context
        release, second = open_envelope(request.envelope), bytes(request.envelope)
        envelope, index, head, logged = await self._store_call(self._store.logged_under, release.owner, release.release_number)
        if open_envelope(envelope).release_id == release.release_id:
            raise NotFound("conflict: this very release is in the log")
        note = await self._store_call(self._checkpoint, head, logged)
        receipt = Receipt(envelope, self._public, index, note, logged.inclusion)
        return pb.ConflictProof(evidence=sign_conflict(receipt, second, self._key).to_bytes())

    def _append_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting: list[tuple[Offer, asyncio.Future[Appended]]] = []
        while self._offers and len(waiting) < RELEASES_A_COMMIT:
            offer, answered = self._offers.popleft()
            if not answered.done():  # its owner went away, and comes again with the same bytes
                waiting.append((offer, answered))
        if not waiting:
            return
        try:
            results = self._append([offer for offer, _ in waiting])
        except Exception as error:  # noqa: BLE001 - told to each of them, and answered as an incident: nothing was stored
            results = [error] * len(waiting)
        for (_, answered), result in zip(waiting, results, strict=True):
            loop.call_soon_threadsafe(_settle, answered, result)

    def _append(self, offers: Sequence[Offer]) -> list[Appended | Exception]:
        """Store releases that came together; return for each what its receipt is made of, or why it was refused."""
        now, refused, charged = int(time.time()), dict[int, Exception](), Counter[bytes]()
        new: dict[bytes, int] = {}
        for place, (release, _, _) in enumerate(offers):
            try:
                if not all(self._may_publish(signer) for signer in release.signers):
                    raise Unauthorised(
                        "release: its owner, or one of its cohort, is not enrolled at this market",
                        hint="`veilmart node join` with an invite of its operator",
                    )
                # The same bytes again are no other release: whoever lost the receipt gets it, and pays nothing.
                if self._quotas is not None and release.release_id not in new and not self._store.holds(release.release_id):
                    self._quotas.require(release.owner, Quota.RELEASES, 1 + charged[release.owner], now)
                    charged[release.owner] += 1
                    new[release.release_id] = place
            except VeilmartError as error:
                refused[place] = error
        taken = [place for place in range(len(offers)) if place not in refused]
        stored = dict(zip(taken, self._store.append_all([offers[place] for place in taken]) if taken else [], strict=True))
        if self._quotas is not None:  # after the commit: a crash in between gives them away
            owners = [offers[place][0].owner for place in new.values() if isinstance(stored[place], Stored)]
            self._quotas.charge_all(owners, Quota.RELEASES, 1, now)
        shown: tuple[pb.SignedHead, bytes] | None = None
        results: list[Appended | Exception] = []
        for place in range(len(offers)):
            outcome = stored.get(place) or refused[place]
            if isinstance(outcome, Stored):
                shown = shown or (self._signed(outcome.head), self._checkpoint(outcome.head, outcome.log))  # one state for all
                results.append((outcome, *shown))
            else:
                results.append(outcome)
        return results

    def _may_publish(self, owner: bytes) -> bool:
        return (self._members is None or self._members.may_publish(owner)) and self._store.may_own(owner)

    def _may_answer(self, owner: bytes, release_id: bytes) -> bool:
        return self._may_publish(owner) and self._store.stands(release_id)

    async def _require_caller(self, shown: bytes, owner: bytes, *, courier: bool = False) -> None:
        """Raise Unauthorised unless a certificate stands for this owner, or for our own courier, where there is a members' port."""
        if self._gate is not None:
            ours = self._public if courier else None
            await self._store_call(self._gate.require, shown, owner, int(time.time()), courier=ours)

    @answering
    async def Certify(self, request: pb.CertifyRequest, context: Any) -> pb.Certified:
        """Give a member a certificate."""
        del context
        if self._gate is None:
            raise UsageError("certify: this market has no port for members, and gives nobody a certificate")
        data, now = bytes(request.request), datetime.datetime.now(datetime.UTC)
        asked = open_request(data, self._public)
        apart = now.timestamp() - asked.asked
        if abs(apart) > REQUEST_S:
            raise UsageError(f"certificate request: {apart:.0f} s old by this market's clock", hint="set the clock, and ask again")
        if not await self._store_call(self._may_publish, asked.name.key):
            raise Unauthorised(
                "certificate request: its owner is not enrolled at this market", hint="`veilmart node join` with an invite of its operator"
            )
        try:
            made, trusted = await self._store_call(self._gate.issue, asked, now)
        except UsageError:  # names files of ours
            raise UsageError("certify: this market cannot issue one now", hint="tell its operator") from None
        tell(CertificateIssued(short(asked.name.key)))
        return pb.Certified(certificate=made, authorities=trusted, signature=sign_answer(self._key, data, made, trusted))

    @answering
    async def SubmitNotice(self, request: pb.NoticeRequest, context: Any) -> pb.NoticeReceipt:
        """Log an owner's notice."""
        data = bytes(request.notice)
        notice = open_notice(data, self._public)
        # No member's any more may still be taken back by whoever has a certificate: removal lets nobody publish, and takes no other right.
        await self._require_caller(certificate_of(context), notice.owner)
        receipt = await self._store_call(self._keep_notice, notice, data)
        tell(Noticed(str(notice.kind), short(notice.owner), receipt.index))
        return receipt

    def _keep_notice(self, notice: Notice, data: bytes) -> pb.NoticeReceipt:
        rotation = notice.kind is Kind.ROTATION
        new = rotation and not self._store.has_notice(data)
        if new:  # where it is logged already, the new key is a member by this very notice
            self._require_rotation(notice)
        index, entries = self._store.append_notice(notice, data)
        if new and self._quotas is not None:
            self._quotas.charge(self._store.line_of(notice.owner)[0], Quota.ROTATIONS, 1, int(time.time()))
        if rotation and self._members is not None:  # after the commit: who is killed here sends the same notice again
            self._members.rotate(notice.owner, notice.subjects[0], int(time.time()))
            hand_over_supernode(self._store.home, notice.owner, notice.subjects[0])
        return pb.NoticeReceipt(index=index, inclusion=inclusion_in(entries, index), head=self._signed_notices(entries))

    def _require_rotation(self, notice: Notice) -> None:
        """Raise Unauthorised or QuotaExceeded for an owner who is nobody here, or goes on under one key after the other."""
        known = self._members is not None and self._members.knows(notice.owner)
        if not known and not self._store.knows(notice.owner):
            raise Unauthorised("notice: nothing here is of this key")
        if self._members is not None and self._members.knows(notice.subjects[0]) and self._store.may_own(notice.owner):
            raise Unauthorised("notice: the new key is a member's")
        if self._quotas is not None:
            self._quotas.require(self._store.line_of(notice.owner)[0], Quota.ROTATIONS, 1, int(time.time()))

    def _notices(self) -> tuple[list[bytes], pb.NoticesHead]:
        entries = self._store.notices()
        return entries, self._signed_notices(entries)

    def _signed_notices(self, entries: Sequence[bytes]) -> pb.NoticesHead:
        head = sign_notices(entries, self._key)
        self._keep_notices(head.size, head.root)
        return pb.NoticesHead(size=head.size, root=head.root, signature=head.signature)

    def _keep_notices(self, size: int, root: bytes) -> None:
        if self._neighbours is not None and (size, root) != self._notices_shown:
            require_newest_notices(self._store)
            self._notices_shown = size, root
        if size > self._notices_given_out:  # before they are: as for checkpoints
            keep_newest_notices(self._store.home, size, root)
            self._notices_given_out = size

    @streaming
    async def SyncNotices(self, request: pb.NoticesRequest, context: Any) -> AsyncIterator[pb.NoticesChunk]:
        """Answer the notices from a position on, up to one signed head."""
        del context
        entries, head = await self._store_call(self._notices)
        for chunk in in_chunks(entries[request.from_index :]):
            yield pb.NoticesChunk(entries=chunk)
        yield pb.NoticesChunk(head=head)

    @streaming
    async def GetAggregates(self, request: pb.AggregatesRequest, context: Any) -> AsyncIterator[pb.AggregatesChunk]:
        """Answer what all standing releases say together; it depends on nothing that is asked."""
        del request, context
        size, root, notices, notices_root = await self._store_call(self._logged)
        signed: Signed | None = self._aggregates.held(size, len(notices))
        if signed is None:
            build = functools.partial(self._aggregates.build, size, root, notices, notices_root)
            signed = await asyncio.get_running_loop().run_in_executor(self._aggregating, build)
        for start in range(0, len(signed.body), CHUNK_BYTES):
            yield pb.AggregatesChunk(data=signed.body[start : start + CHUNK_BYTES])
        yield pb.AggregatesChunk(signature=signed.signature)

    def _logged(self) -> tuple[int, bytes, list[bytes], bytes]:
        """Return size and root of the log, and the notices and their root; kept as given out, since they are about to be signed."""
        entries, notices = self._notices()
        head, logged = self._store.log()
        self._checkpoint(head, logged)
        return head.size, logged.root, entries, notices.root

    @streaming
    async def GetOrganisations(self, request: pb.OrganisationsRequest, context: Any) -> AsyncIterator[pb.OrganisationsChunk]:
        """Answer which releases are one organisation's."""
        del context
        organisations, signature = await self._store_call(self._organisations, request.catalogue_size)
        numbers = organisations.numbers.astype("<u4").tobytes()
        for start in range(0, len(numbers), CHUNK_BYTES):
            yield pb.OrganisationsChunk(numbers=numbers[start : start + CHUNK_BYTES])
        for start in range(0, len(organisations.names), ENTRIES_A_READ):
            yield pb.OrganisationsChunk(names=organisations.names[start : start + ENTRIES_A_READ])
        yield pb.OrganisationsChunk(signature=signature)

    def _organisations(self, size: int) -> tuple[Organisations, bytes]:
        head = self._store.head_at(size)
        organisations = self._directory.at(size)
        return organisations, organisations.sign(head.digest, self._key)

    @answering
    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.Enrolled:
        """Make an owner a member."""
        del context
        if self._members is None:
            raise UsageError("enrol: anybody may publish at this market, nobody is enrolled")
        now = time.time()
        secret, owner, key = bytes(request.secret), bytes(request.owner), request.supernode_key
        if len(secret) != SECRET_BYTES or len(owner) != 32 or len(key) > MAX_SUPERNODE_KEY:
            raise FormatError("enrol: expected a secret and a key of 32 bytes, and a SuperNode key")
        if key:
            canonical_key(key)  # before the invite is used
        verify_enrolment(self._public, secret, owner, key, bytes(request.signature))
        try:
            member = await self._store_call(self._members.enrol, secret, owner, key, int(now))
        except Unauthorised:
            # An invite that is good is taken all the same: who sends wrong ones must not keep others out, and 256 bits are not guessed.
            if len(self._refused_invites) == REFUSED_INVITES and now - self._refused_invites[0] < REFUSED_INVITES_S:
                raise QuotaExceeded("invites: too many were refused", hint="try again in a minute", retry_after_s=60) from None
            self._refused_invites.append(now)
            raise
        # After the commit: whoever is killed here comes again with the same invite, and is registered then.
        superlink = self._superlink_of.get(member, "")
        if not superlink:
            async with self._registering:
                superlink = await asyncio.to_thread(self._register, member)
            if superlink:
                self._superlink_of[member] = superlink
        tell(Enrolled(short(owner)))
        return pb.Enrolled(organisation=member.organisation, node_name=member.node_name, superlink=superlink)

    @answering
    async def ProveConsistency(self, request: pb.ConsistencyRequest, context: Any) -> pb.LogProof:
        """Answer the proof that the log of one size begins with that of another."""
        del context
        return pb.LogProof(hashes=await self._store_call(self._store.consistency, request.first, request.second))

    @answering
    async def ProveInclusion(self, request: pb.InclusionRequest, context: Any) -> pb.LogProof:
        """Answer the proof that a release is at an index of the log of some size."""
        del context
        return pb.LogProof(hashes=await self._store_call(self._store.inclusion, request.index, request.size))

    @answering
    async def GetRelease(self, request: pb.ReleaseRequest, context: Any) -> pb.Release:
        """Answer one release."""
        del context
        return pb.Release(envelope=await self._store_call(self._store.envelope, bytes(request.release_id)))

    @answering
    async def Cosign(self, request: pb.CosignRequest, context: Any) -> pb.Cosigned:
        """Keep a checkpoint of this log that one of the market's witnesses signed."""
        del context
        note = bytes(request.note)
        checkpoint = open_checkpoint(note, self._public)
        for name, witness in self._witnesses.items():
            with suppress(InvalidSignature):
                cosigned_at(note, witness)
                if await self._store_call(self._store.root, checkpoint.size) != checkpoint.root:
                    raise InvalidProof("checkpoint: of another log than this one")  # signed with this key: somebody else has it
                await self._store_call(
                    self._store.keep_cosigned, name, checkpoint.size, note, functools.partial(cosigned_at, witness=witness)
                )
                tell(Cosigned(name, checkpoint.size))
                return pb.Cosigned()
        raise Unauthorised("checkpoint: signed by none of this market's witnesses", hint="`veilmart market up --witness` names them")

    @streaming
    async def SyncCatalogue(self, request: pb.SyncRequest, context: Any) -> AsyncIterator[pb.CatalogueChunk]:
        """Answer the catalogue from a position on, up to one signed head."""
        del context
        head, note = await self._store_call(self._state)
        if request.form == pb.CATALOGUE_FORM_ROWS:
            for start in range(request.from_terms, head.terms_size, ENTRIES_A_READ):
                stop = min(start + ENTRIES_A_READ, head.terms_size)
                for terms in in_chunks(await self._store_call(self._store.terms, start, stop)):
                    yield pb.CatalogueChunk(terms=terms)
            for start in range(request.from_index, head.size, ROWS_A_READ):
                yield pb.CatalogueChunk(rows=await self._store_call(self._store.rows, start, min(start + ROWS_A_READ, head.size)))
        else:
            for start in range(request.from_index, head.size, ENTRIES_A_READ):
                stop = min(start + ENTRIES_A_READ, head.size)
                for entries in in_chunks(await self._store_call(self._store.envelopes, start, stop)):
                    yield pb.CatalogueChunk(entries=entries)
        yield pb.CatalogueChunk(head=self._signed(head), checkpoint=note)

    @streaming
    async def GetCards(self, request: pb.CardsRequest, context: Any) -> AsyncIterator[pb.CardsChunk]:
        """Answer the digests of all pages of cards, then the pages that were asked for."""
        del context
        size, pages = request.catalogue_size, list(request.pages)
        if size > (await self._store_call(self._store.head)).size:
            raise StaleCatalogue(f"cards: there is no catalogue of {size} releases yet", hint="sync and ask again")
        if len(pages) > PAGES_A_CALL or any(page * PAGE_SIZE >= size for page in pages) or pages != sorted(set(pages)):
            raise FormatError(f"cards: expected at most {PAGES_A_CALL} pages of the catalogue, in ascending order")
        chains = b"".join(await self._store_call(self._store.page_chains, size))
        for start in range(0, len(chains), CHUNK_BYTES):
            yield pb.CardsChunk(digests=chains[start : start + CHUNK_BYTES])
        for start, stop in _reads(pages, request.from_index, size):
            for cards in in_chunks(await self._store_call(self._store.cards, start, stop)):
                yield pb.CardsChunk(data=b"".join(cards))

    @answering
    async def UploadAdapter(self, request: AsyncIterator[pb.AdapterChunk], context: Any) -> pb.AdapterStored:
        """Receive an adapter."""
        caller, sender = None, host_of(context.peer())
        if self._gate is not None:
            caller = (await self._store_call(self._gate.caller, certificate_of(context), int(time.time()))).key
            sender = caller.hex()
        async with asyncio.timeout(ANNOUNCEMENT_S):
            first = await anext(aiter(request), None)
        if first is None:
            raise FormatError("adapter: expected at least one chunk")
        await self._require_wanted(bytes(first.digest), caller)
        announced = AdapterReference(bytes(first.digest), first.size_bytes)
        digest, size = announced.digest, announced.size_bytes
        named_by = await self._store_call(self._described, digest, size, caller)
        if self._store.has_adapter(digest):  # sent again, whoever lost the answer: nothing is read
            return pb.AdapterStored(digest=digest)
        # Without a port for members nobody says who uploads, so it is charged to the first owner whose release names it, and only when all
        # of it came with the right digest: otherwise whoever reaches the port could use up an owner's quota.  Adapters that no release
        # names share one.
        payer = await self._store_call(self._payer, caller or named_by or b"", digest, size)
        with self._uploads.ticket(sender, size):
            upload = self._store.receive_adapter(digest, size)
            try:
                async with asyncio.timeout(ADAPTER_S):
                    await asyncio.to_thread(upload.write, data_of(first))
                    async for chunk in request:
                        await asyncio.to_thread(upload.write, data_of(chunk))
                    admit_file = functools.partial(self._admit_adapter, payer, digest, size, caller)
                    await to_its_end(asyncio.get_running_loop().run_in_executor(self._checking, upload.finish, admit_file))
            finally:
                upload.close()
        tell(AdapterStored(short(digest)))
        return pb.AdapterStored(digest=digest)

    def _admit_adapter(self, payer: bytes | None, digest: bytes, size: int, caller: bytes | None, file: int) -> None:
        """Return if a file that came whole may be kept, and charge for it; raise InvalidAdapter or QuotaExceeded."""
        manifest = self._checkers.check(file)
        self._storing.submit(self._described, digest, size, caller, manifest).result()
        if payer is not None:
            self._storing.submit(self._charge_adapter, payer, digest, size).result()
        self._manifests[digest] = manifest

    def _described(self, digest: bytes, size: int, caller: bytes | None, manifest: Manifest | None = None) -> bytes | None:
        """Return the owner of the first release that names an adapter and says so of it; None where no release names it.

        Raises InvalidAdapter where all say something else.  One that says the truth is enough: a stranger's release may name it too, and
        whoever pulls that one finds out.  caller: whose releases count, None for everybody's.
        """
        named = False
        for claims in self._store.naming(digest, caller):
            named = True
            if claims.adapter is not None and claims.adapter.size_bytes == size and manifest in (None, said_by(claims)):
                return claims.owner
        if named:
            found = f"{manifest.base_model[:16]}, {manifest.guarantee}" if manifest is not None else f"{size} bytes"
            raise InvalidAdapter(f"adapter: expected what its release says of it, got {found}")
        return None

    def _charge_adapter(self, payer: bytes, digest: bytes, size: int) -> None:
        # Asked again: others may have been stored while this one was on its way.  In one thread, so that two are not compared with the
        # same state; before it is kept, so that a crash in between costs the owner a second charge and never gives one away.
        if self._quotas is not None and not self._store.has_adapter(digest):
            now = int(time.time())
            self._quotas.require(payer, Quota.ADAPTER_BYTES, size, now)
            self._quotas.charge(payer, Quota.ADAPTER_BYTES, size, now)

    def _payer(self, owner: bytes, digest: bytes, size: int) -> bytes | None:
        """Return whose quota an adapter is charged to once it is stored, None for nobody's; raise QuotaExceeded beyond it."""
        if self._quotas is None or self._store.has_adapter(digest):
            return None
        self._quotas.require(owner, Quota.ADAPTER_BYTES, size, int(time.time()))
        return owner

    async def _require_wanted(self, digest: bytes, caller: bytes | None) -> None:
        if caller is not None and not await self._store_call(self._store.owns_adapter, caller, digest):
            raise Unauthorised("adapter: no release of yours in the log names it", hint="publish its release first")
        # Nobody says who uploads.  Without this, whoever reaches the port could fill the disk, and no release would be stored any more.
        if self._members is not None and not await self._store_call(self._store.names_adapter, digest):
            raise Unauthorised("adapter: no release in the log names it", hint="publish its release first")

    @streaming
    async def DownloadAdapter(self, request: pb.AdapterRequest, context: Any) -> AsyncIterator[pb.AdapterChunk]:
        """Send an adapter."""
        del context
        chunks = read_chunks(self._store.adapter_file(bytes(request.digest)), CHUNK_BYTES)
        while (data := await asyncio.to_thread(next, chunks, None)) is not None:
            yield pb.AdapterChunk(data=data)

    @streaming
    async def Match(self, request: AsyncIterator[pb.MatchChunk], context: Any) -> AsyncIterator[pb.ScoresChunk]:
        """Answer an encrypted query."""
        del context
        if self._queries.locked() or self._unsent > UNSENT_BYTES:
            raise QuotaExceeded("queries: too many at once", hint="try again in a second")
        async with self._queries:
            first, query = await self._receive_query(request)
            answer = await self._answer(first.catalogue_size, bytes(first.catalogue_head), query)
        self._unsent += len(answer.data)
        try:
            for start in range(0, len(answer.data), CHUNK_BYTES):
                data = answer.data[start : start + CHUNK_BYTES]
                if start + CHUNK_BYTES < len(answer.data):
                    yield pb.ScoresChunk(data=data)
                else:
                    yield pb.ScoresChunk(data=data, server_cpu_ns=answer.cpu_ns, index_digest=answer.index, signature=answer.signature)
        finally:
            self._unsent -= len(answer.data)

    @functools.partial(streaming, most_s=MAX_LINE_S)
    async def Relay(self, request: AsyncIterator[pb.FromGuard], context: Any) -> AsyncIterator[pb.ToGuard]:
        """Keep a guard's line open."""
        shown = certificate_of(context)
        if self._gate is not None:  # before it is challenged
            await self._store_call(self._gate.caller, shown, int(time.time()))
        async for message in self._relay.serve(request, functools.partial(self._require_caller, shown)):
            yield message

    @answering
    async def GetIntroduction(self, request: pb.IntroductionRequest, context: Any) -> pb.Introduction:
        """Answer who answers for a release."""
        release_id = bytes(request.release_id)
        if (elsewhere := self._elsewhere(release_id, context)) and (there := await elsewhere.introduction(release_id)) is not None:
            return pb.Introduction(introduction=there)
        return pb.Introduction(introduction=await self._relay.introduction(release_id))

    @answering
    async def Ask(self, request: pb.SealedQuestion, context: Any) -> pb.SealedAnswer:
        """Pass a sealed question on, and its sealed answer back."""
        release_id, sealed, patience_s = bytes(request.release_id), bytes(request.sealed), context.time_remaining()
        if (elsewhere := self._elsewhere(release_id, context)) and (
            there := await elsewhere.ask(release_id, sealed, patience_s)
        ) is not None:
            return pb.SealedAnswer(sealed=there)
        return pb.SealedAnswer(sealed=await self._relay.ask(release_id, sealed, patience_s))

    def _elsewhere(self, release_id: bytes, context: Any) -> Neighbours | None:
        """Return the other processes of this market where one of them may have the guard that did not dial in here."""
        return None if self._relay.has_line(release_id) or was_passed_on(context) else self._neighbours

    async def _answer(self, size: int, state: bytes, query: bytes) -> MatchAnswer:
        """Return the answer to a query; those that wait for the same index share one pass over its tiles."""
        loop = asyncio.get_running_loop()
        index = self._matcher.index
        version = index.held(size, state)
        if version is None:
            version = await loop.run_in_executor(self._indexing, index.build, size, state)
        answered: asyncio.Future[MatchAnswer] = loop.create_future()
        with self._waiting_lock:
            self._waiting.setdefault(version.digest, []).append((version, query, answered))
        # One pass for each query is queued; the first that gets its turn takes all that wait, and the others find nothing left.
        loop.run_in_executor(self._matching, self._pass, version.digest, loop)
        return await answered

    def _pass(self, digest: bytes, loop: asyncio.AbstractEventLoop) -> None:
        with self._waiting_lock:
            waiting = self._waiting.pop(digest, [])
            if len(waiting) > QUERIES_A_PASS:
                self._waiting[digest] = waiting[QUERIES_A_PASS:]
        batch = [entry for entry in waiting[:QUERIES_A_PASS] if not entry[2].done()]  # without queriers that went away
        if not batch:
            return
        try:
            results: Sequence[MatchAnswer | Exception] = self._matcher.answer(batch[0][0], [query for _, query, _ in batch])
        except Exception as error:  # noqa: BLE001 - told to each of them, and answered as an incident
            results = [error] * len(batch)
        for (_, _, answered), result in zip(batch, results, strict=True):
            loop.call_soon_threadsafe(_settle, answered, result)

    def _first_index(self) -> None:
        try:
            self._matcher.refresh()
        except Exception as error:  # noqa: BLE001 - told as an event, and tried again with the next release
            tell(IndexFailed(kind_of(error), where(error.__traceback__)))

    def _refresh_soon(self) -> None:
        """Have the newest index built in a while, however many releases come until then."""
        self._news = True
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())

    async def _refresh(self) -> None:
        while self._news:
            self._news = False
            await asyncio.sleep(REFRESH_S)
            try:
                await asyncio.get_running_loop().run_in_executor(self._indexing, self._matcher.refresh)
            except Exception as error:  # noqa: BLE001 - as above
                tell(IndexFailed(kind_of(error), where(error.__traceback__)))

    async def _receive_query(self, chunks: AsyncIterator[pb.MatchChunk]) -> tuple[pb.MatchChunk, bytes]:
        first: pb.MatchChunk | None = None
        data = bytearray()
        async with asyncio.timeout(UPLOAD_S):
            async for chunk in chunks:
                if first is None:
                    first = chunk
                    self._check_query_header(chunk)
                data += chunk.data
                if len(chunk.data) > CHUNK_BYTES or len(data) > STD128.query_bytes:
                    raise FormatError(f"query: expected {STD128.query_bytes} bytes in chunks of at most {CHUNK_BYTES}, got more")
        if first is None or len(data) != STD128.query_bytes:
            raise FormatError(f"query: expected {STD128.query_bytes} bytes, got {len(data)}")
        return first, bytes(data)

    def _check_query_header(self, first: pb.MatchChunk) -> None:
        if first.profile != STD128.name:
            raise IncompatibleSpecification(f"profile: this market evaluates {STD128.name}")
        if first.map_id != self._map.map_id:
            raise IncompatibleSpecification(f"map: expected {self._map.map_id.hex()[:16]}, got {bytes(first.map_id).hex()[:16]}")
