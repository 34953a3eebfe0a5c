"""The market's gRPC service: checks what comes in, calls one function, answers.  The only table from errors to statuses is here."""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from market_node.index import Version
from market_node.matcher import Answer as MatchAnswer
from market_node.matcher import Matcher
from market_node.store import AdapterUpload, Store, read_chunks
from protocol import errors
from protocol.admission import AdmissionPolicy, admit
from protocol.catalogue import PAGE_SIZE, Head, scalars_of, sign_head
from protocol.channel import CHUNK_BYTES, CODE_KEY, RETRY_KEY
from protocol.codec import format_decimal
from protocol.encryption import STD128
from protocol.errors import FormatError, IncompatibleSpecification, QuotaExceeded, StaleCatalogue, UsageError, VeilmartError
from protocol.features import FeatureMap
from protocol.release import open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketServicer

log = logging.getLogger("veilmart.market")

# error -> status; a subclass comes before its parent
STATUSES: tuple[tuple[type[VeilmartError], grpc.StatusCode], ...] = (
    (errors.StaleCatalogue, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.IncompatibleSpecification, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.NotAdmitted, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.FormatError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidSignature, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.InvalidAdapter, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UsageError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.FeatureNormError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.Unauthorised, grpc.StatusCode.PERMISSION_DENIED),
    (errors.QuotaExceeded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyPublished, grpc.StatusCode.ALREADY_EXISTS),
)
UPLOAD_S = 30.0  # a query must have arrived by then
ADAPTER_S = 120.0
QUERIES_AT_ONCE = 32  # bodies held in memory; more are refused, not queued
QUERIES_A_PASS = 8  # share a pass over the tiles; each takes 64 kB of memory for a baby step
REFRESH_S = 0.5
RETRY_S = 1  # told to whom a limit turned away
UNSENT_BYTES = 64 << 20  # answers that their queriers have not read yet; beyond them new queries are refused
UPLOADS_AT_ONCE = 8
ENTRIES_A_READ = 256
ROWS_A_READ = PAGE_SIZE  # together one chunk
PAGES_A_CALL = 64
MAX_DEADLINE_S = ADAPTER_S + 5.0
MAX_DETAILS = 500  # characters; an error may name a field that a stranger chose, and gRPC refuses trailers beyond 8 KiB

Answer = TypeVar("Answer")


async def refuse(context: grpc.aio.ServicerContext, error: Exception) -> None:
    """End the call with the error's status; what was not raised on purpose becomes INTERNAL with an incident id and nothing else."""
    for kind, status in STATUSES:
        if isinstance(error, kind):
            hint = f" ({error.hint})" if isinstance(error, VeilmartError) and error.hint else ""
            code = error.code if isinstance(error, VeilmartError) else kind.code
            later = ((RETRY_KEY, str(RETRY_S)),) if isinstance(error, QuotaExceeded) else ()
            await context.abort(status, f"{error}{hint}"[:MAX_DETAILS], trailing_metadata=((CODE_KEY, code), *later))
    if isinstance(error, TimeoutError):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time")
    incident = secrets.token_hex(8)
    log.error("internal incident=%s kind=%s", incident, type(error).__name__, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error, incident {incident}")


def check_deadline(context: grpc.aio.ServicerContext) -> None:
    """Raise UsageError unless the client waits at most MAX_DEADLINE_S: without a deadline, one that stops reading holds its memory here."""
    left = context.time_remaining()
    if left is None or left > MAX_DEADLINE_S:
        raise UsageError(f"deadline: expected one of at most {MAX_DEADLINE_S:.0f} s, got {'none' if left is None else f'{left:.0f} s'}")


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


def streaming(handler: Callable[..., AsyncIterator[Answer]]) -> Callable[..., AsyncIterator[Answer]]:
    """Return a stream-response handler whose errors follow the table."""

    @functools.wraps(handler)
    async def run(self: MarketService, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Answer]:
        try:
            check_deadline(context)
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


class MarketService(MarketServicer):
    """One market over one store and one feature map.  policy: which specifications it takes."""

    def __init__(
        self, store: Store, feature_map: FeatureMap, market_key: Any, *, simulation: bool, policy: AdmissionPolicy | None = None
    ) -> None:
        store.require_map(feature_map)
        self._store, self._map, self._key, self._simulation = store, feature_map, market_key, simulation
        self._policy = policy or AdmissionPolicy()
        self._public = market_key.public_key().public_bytes_raw()
        self._matcher = Matcher(store, feature_map, market_key)
        # One thread writes and reads the store, one encodes, one evaluates: neither the event loop nor a query whose index is there waits
        # for disk or encoding.
        self._storing = ThreadPoolExecutor(1, "store")
        self._indexing = ThreadPoolExecutor(1, "index")
        self._matching = ThreadPoolExecutor(1, "match")
        self._matching.submit(self._matcher.warm_up)
        self._indexing.submit(self._first_index)
        self._refreshing: asyncio.Task[None] | None = None
        self._news = True
        self._waiting_lock = threading.Lock()
        self._waiting: dict[bytes, list[tuple[Version, bytes, asyncio.Future[Any]]]] = {}
        self._queries = asyncio.Semaphore(QUERIES_AT_ONCE)
        self._unsent = 0
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)

    def close(self) -> None:
        """Stop the threads."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        self._indexing.shutdown(cancel_futures=True)
        self._matching.shutdown(cancel_futures=True)
        self._storing.shutdown()

    async def _store_call(self, function: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._storing, functools.partial(function, *args, **kwargs))

    def _signed(self, head: Head) -> pb.SignedHead:
        return message_of(sign_head(head, self._key))

    @answering
    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.MarketDescription:
        """Say who the market is."""
        del request, context
        head = await self._store_call(self._store.head)
        return pb.MarketDescription(
            market_key=self._public, map_ids=[self._map.map_id], simulation=self._simulation, head=self._signed(head),
            admission=pb.Admission(
                largest_epsilon=format_decimal(self._policy.largest_epsilon),
                delta="" if self._policy.delta is None else format_decimal(self._policy.delta),
                smallest_count=self._policy.smallest_count or 0,
            ),
        )  # fmt: skip

    @answering
    async def Publish(self, request: pb.PublishRequest, context: Any) -> pb.Receipt:
        """Store a signed release."""
        del context
        release = open_envelope(request.envelope)
        if release.simulated and not self._simulation:
            raise UsageError("release: made with simulated noise, which protects nobody; this market is no simulation")
        if release.base_model.hex() != self._map.base_model:
            raise IncompatibleSpecification(f"base model: expected {self._map.base_model[:16]}, got {release.base_model.hex()[:16]}")
        scalars = scalars_of(release, self._map)
        admit(release.specification, self._policy)
        stored = await self._store_call(self._store.append, release, bytes(request.envelope), scalars)
        self._refresh_soon()
        log.info("published release=%s position=%d size_bytes=%d", release.release_id.hex()[:16], stored.position, len(request.envelope))
        return pb.Receipt(release_id=release.release_id, index=stored.position, head=self._signed(stored.head))

    @answering
    async def GetRelease(self, request: pb.ReleaseRequest, context: Any) -> pb.Release:
        """Answer one release."""
        del context
        return pb.Release(envelope=await self._store_call(self._store.envelope, bytes(request.release_id)))

    @streaming
    async def SyncCatalogue(self, request: pb.SyncRequest, context: Any) -> AsyncIterator[pb.CatalogueChunk]:
        """Answer the catalogue from a position on, up to one signed head."""
        del context
        head = await self._store_call(self._store.head)
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
        yield pb.CatalogueChunk(head=self._signed(head))

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
        del context
        if self._uploads.locked():
            raise QuotaExceeded("adapters: too many uploads at once", hint="try again in a few seconds")
        async with self._uploads, asyncio.timeout(ADAPTER_S):
            upload: AdapterUpload | None = None
            try:
                async for chunk in request:
                    if len(chunk.data) > CHUNK_BYTES:
                        raise FormatError(f"adapter: expected chunks of at most {CHUNK_BYTES} bytes, got {len(chunk.data)}")
                    if upload is None:
                        upload = self._store.receive_adapter(bytes(chunk.digest), chunk.size_bytes)
                        digest = bytes(chunk.digest)
                    await asyncio.to_thread(upload.write, chunk.data)
                if upload is None:
                    raise FormatError("adapter: expected at least one chunk")
                await asyncio.to_thread(upload.finish)
            finally:
                if upload is not None:
                    upload.close()
        log.info("adapter stored digest=%s", digest.hex()[:16])
        return pb.AdapterStored(digest=digest)

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
            self._matcher.index.refresh()
        except Exception as error:
            log.error("index not built kind=%s", type(error).__name__, exc_info=error)

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
                await asyncio.get_running_loop().run_in_executor(self._indexing, self._matcher.index.refresh)
            except Exception as error:
                log.error("index not refreshed kind=%s", type(error).__name__, exc_info=error)

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
