"""The guard on a unix socket, and the client that a shim reaches it with.

Two processes, so that no answer can tell what the guard is doing.  The *desk* holds neither data nor model nor key: it writes orders into
the journal, hands them on, and answers from memory.  The *worker*, forked from it before it serves, has everything private, runs at the
lowest priority, and tells the desk of each order whether it was released or refused, and nothing else.

    shim --unix socket, SO_PEERCRED--> door --private socket--> desk --pipe--> worker
                                                                  `--> journal

What a caller can see of an answer is its content and its moment.  Content: one constant, or the release that became visible at the last
slot.  Moment: a multiple of REPLY_S after the call came in, so that what an answer took inside does not show; what is left is the
scheduler's jitter in waking us, which tests/attacks/test_guard_side_channels.py bounds.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nodes.guard import Order, Reachable, Status
from nodes.journal import Entry, Journal
from nodes.policy import Schedule, Service
from protocol.codec import format_decimal, parse_decimal, parse_limit
from protocol.cohort_round import MAX_ASK_BYTES, Ask, Step
from protocol.errors import GuardUnreachable, UsageError, VeilmartError
from protocol.privacy import Guarantee
from protocol.wire import guard_pb2 as pb
from protocol.wire.guard_pb2_grpc import GuardServicer, GuardStub, add_GuardServicer_to_server

log = logging.getLogger("veilmart.guard")

REPLY_S = 0.05  # answers leave at multiples of this after the call
IDLE_TICK_S = 1.0  # between two looks at the ledger where there are no slots
LONGEST_PATH = 100  # of a socket, in bytes; Linux takes 107
CALL_S = 30.0
SETTLE_S = 0.02
CONNECTIONS = 64
TURNED_AWAY_S = 60.0  # between two lines of the log on callers that were turned away
OPTIONS = [("grpc.max_receive_message_length", MAX_ASK_BYTES + (1 << 10)), ("grpc.so_reuseport", 0), ("grpc.enable_http_proxy", 0)]

HELD_STEPS = 64  # of cohorts, whose answers are kept for whoever asks again

HandOver = Callable[[int, Order], None]
TakePart = Callable[[bytes], Future[list[bytes]]]


class Desk(Reachable):
    """Takes orders and answers, from the journal and from memory alone.

    released: reads the newest stored envelope, and the one with an id, from the ledger.  hand_over: gives an order to the worker.
    take_part: gives the worker a step of a cohort's round; None: the owner joins none.
    """

    def __init__(
        self,
        journal: Journal,
        service: Service,
        released: Callable[[str | None], tuple[str, bytes] | None],
        hand_over: HandOver,
        *,
        schedule: Schedule | None = None,
        delta: float = 1e-6,
        take_part: TakePart | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._journal, self._service, self._released, self._hand_over = journal, service, released, hand_over
        self._schedule, self._delta, self._clock, self._now = schedule, delta, clock, now
        self._lock, self._slotting = threading.Lock(), threading.Lock()
        self._tokens, since_limited = _rate_left(journal.found, service.orders_per_hour, now())
        self._filled = clock()
        self._limited_at = self._filled - since_limited
        self._outcomes: list[dict[str, Any]] = []  # not in the journal yet
        self._take_part = take_part
        self._steps: OrderedDict[bytes, _CohortStep] = OrderedDict()  # by the digest of what was asked
        self._since_slot = 0
        shown = [entry.fields["release"] for entry in journal.found if entry.event == "shown"]
        self._visible = released(str(shown[-1])) if shown else None
        occasions = [int(entry.fields["occasion"]) for entry in journal.found if entry.event == "scheduled"]
        self._occasion = max(occasions, default=0)

    def resume(self) -> None:
        """Hand over what was accepted and has no outcome: the journal is the queue."""
        done = {entry.fields["order"] for entry in self._journal.found if entry.event in ("released", "refused")}
        for entry in self._journal.found:
            if entry.event in ("asked", "scheduled") and entry.number not in done:
                self._hand_over(entry.number, order_of(entry))

    def request(self, order: Order) -> None:
        """Accept an order, durably, or drop it where the policy's rate is used up: its sender is told the same."""
        if self._admit():
            entry = self._journal.append("asked", **_fields(order))
            with self._lock:
                self._since_slot += 1
            self._hand_over(entry.number, order)

    def malformed(self) -> None:
        """Note that something came that is no order."""
        if self._admit():
            self._journal.append("malformed")

    def collect(self) -> bytes | None:
        """Return the release that was visible at the last slot, or None."""
        visible = self._visible
        return visible[1] if visible else None

    def take_part(self, ask: bytes) -> bytes:
        """Return this owner's message for a step of a cohort's round, once it is there and visible; else nothing, for whatever reason.

        The masked numbers alone take a time that tells how many records there are, so they become visible at a slot.
        """
        if self._take_part is None:
            return b""
        digest = hashlib.sha256(ask).digest()
        with self._lock:
            held = self._steps.get(digest)
        if held is None:
            try:
                of = Ask.from_bytes(ask)
            except VeilmartError:
                self.malformed()
                return b""
            if not self._admit():
                return b""
            self._journal.append("cohort", step=str(of.step), cohort=of.cohort.cohort_id.hex())  # before the worker may charge for it
            held = _CohortStep(self._take_part(ask), waits=of.step is Step.MASK and bool(self._service.slot_s))
            with self._lock:
                held = self._steps.setdefault(digest, held)
                while len(self._steps) > HELD_STEPS:
                    self._steps.popitem(last=False)
        return held.answer()

    def status(self) -> Status:
        """Return how many orders came since the last slot, served or not, and whether a release is visible."""
        return Status(self._since_slot, self._visible is not None)

    def outcome(self, told: dict[str, Any]) -> None:
        """Note what became of an order; kept for the next slot while the journal's disk is full."""
        with self._lock:
            self._outcomes.append(told)
        self._write_outcomes()
        if not self._service.slot_s:
            self.slot()

    def slot(self) -> None:
        """Show what is released by now; start what the schedule has due."""
        with self._slotting:  # without slots the clock and the worker's news come here at once, and an occasion is due once
            self._slot()

    def _slot(self) -> None:
        with self._lock:
            self._since_slot = 0
            for step in self._steps.values():
                step.show()
        self._write_outcomes()
        newest = self._released(None)
        if newest is not None and (self._visible is None or newest[0] != self._visible[0]):
            self._journal.append("shown", release=newest[0])  # before it is: after a start, only what was shown is visible at once
            self._visible = newest
        if self._schedule is not None:
            due = self._schedule.occasion(self._now())
            if due > self._occasion:  # a clock that went back makes none again, and one far ahead makes one
                order = Order(Guarantee(self._schedule.epsilon, self._delta), occasion=due)
                entry = self._journal.append("scheduled", **_fields(order))
                self._occasion = due
                self._hand_over(entry.number, order)

    def _admit(self) -> bool:
        with self._lock:
            now = self._clock()
            most = float(self._service.orders_per_hour)
            self._tokens = min(most, self._tokens + (now - self._filled) * most / 3600)
            self._filled = now
            if self._tokens >= 1:
                self._tokens -= 1
                return True
            tell = now - self._limited_at >= 3600
            if tell:
                self._limited_at = now
        if tell:  # once an hour: whoever floods the guard must not fill the disk
            self._journal.append("limited")
        return False

    def _write_outcomes(self) -> None:
        with self._lock:
            while self._outcomes:
                told = self._outcomes[0]
                kept = {name: told[name] for name in ("order", "release", "code") if told.get(name)}
                self._journal.append("released" if told.get("release") else "refused", **kept)
                self._outcomes.pop(0)


class _CohortStep:
    """A step that was handed over: its answer, and whether it may be seen."""

    def __init__(self, future: Future[list[bytes]], *, waits: bool) -> None:
        self._future, self._waits = future, waits

    def show(self) -> None:
        """A slot has come: what is there may be seen from now on."""
        if self._future.done():
            self._waits = False

    def answer(self) -> bytes:
        """Return the answer, or nothing."""
        if self._waits or not self._future.done():
            return b""
        return b"".join(self._future.result()[:1])


def _rate_left(found: Sequence[Entry], orders_per_hour: int, now: datetime) -> tuple[float, float]:
    """Return how many orders are free now, and the seconds since the last line that said none was; both as the journal's lines tell.

    So a start, which a caller may be able to cause, gives nobody more.  Lines from a clock that was ahead count as of now.
    """
    tokens, last, limited = float(orders_per_hour), -math.inf, -math.inf
    present = now.timestamp()

    def refill(at: float) -> None:
        nonlocal tokens, last
        if at > last:
            tokens, last = min(orders_per_hour, tokens + (at - last) * orders_per_hour / 3600), at

    for entry in found:
        at = min(datetime.fromisoformat(entry.time).timestamp(), present)
        if entry.event in ("asked", "malformed", "cohort"):
            refill(at)
            tokens = max(tokens - 1, 0.0)
        elif entry.event == "limited":
            limited = at
    refill(present)
    return tokens, present - limited


def _fields(order: Order) -> dict[str, str | int]:
    guarantee = order.guarantee
    return {
        "epsilon": format_decimal(guarantee.epsilon), "delta": format_decimal(guarantee.delta), "map": order.map_id.hex(),
        "occasion": order.occasion,
        **({} if order.epsilon_adapter is None else {"epsilon_adapter": format_decimal(order.epsilon_adapter)}),
    }  # fmt: skip


def order_of(entry: Entry) -> Order:
    """Return the order that a line of the journal holds."""
    fields = entry.fields
    guarantee = Guarantee(parse_decimal(str(fields["epsilon"]), "epsilon"), parse_decimal(str(fields["delta"]), "delta"))
    return Order(
        guarantee,
        bytes.fromhex(str(fields["map"])),
        int(fields["occasion"]),
        parse_limit(str(fields.get("epsilon_adapter", "")), "epsilon_adapter"),
    )


def order_from_wire(message: pb.Order) -> Order:
    """Return the order in a message; raise FormatError or UsageError for one that is none."""
    if len(message.map_id) not in (0, 32):
        raise UsageError(f"map_id: expected 32 bytes or none, got {len(message.map_id)}")
    guarantee = Guarantee(parse_decimal(message.epsilon, "epsilon"), parse_decimal(message.delta, "delta"))
    return Order(guarantee, bytes(message.map_id), epsilon_adapter=parse_limit(message.epsilon_adapter, "epsilon_adapter"))


class _Answers(GuardServicer):
    """The four calls.  `padded` decides when each answer leaves."""

    def __init__(self, desk: Desk, padded: Callable[[Awaitable[Any]], Awaitable[Any]]) -> None:
        self._desk, self._padded = desk, padded

    async def Request(self, request: Any, context: Any) -> Any:
        import grpc

        try:
            await self._padded(asyncio.to_thread(self._take, request))
        except Exception as error:  # noqa: BLE001 - a full disk, say: not accepted, and no word of why
            log.error("order not accepted error=%s", type(error).__name__)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "guard failed; details are in the node's own log")
        return pb.Acknowledged()

    async def Collect(self, request: Any, context: Any) -> Any:
        return await self._padded(self._collected())

    async def Status(self, request: Any, context: Any) -> Any:
        return await self._padded(self._status())

    async def TakePart(self, request: Any, context: Any) -> Any:
        try:
            answer = await self._padded(asyncio.to_thread(self._desk.take_part, bytes(request.ask)))
        except Exception as error:  # noqa: BLE001 - a full disk, say: no step is taken, and no word of why
            log.error("step not taken error=%s", type(error).__name__)
            answer = b""
        return pb.CohortAnswer(answer=answer)

    async def _collected(self) -> pb.Collected:
        return pb.Collected(envelope=self._desk.collect() or b"")

    async def _status(self) -> pb.GuardStatus:
        status = self._desk.status()
        return pb.GuardStatus(waiting=status.waiting, available=status.available)

    def _take(self, message: Any) -> None:
        # Whatever is wrong with an order, its sender learns nothing.
        try:
            order = order_from_wire(message)
        except VeilmartError:
            self._desk.malformed()
        else:
            self._desk.request(order)


async def at_multiples(work: Awaitable[Any]) -> Any:
    """Do the work, and return or raise at a multiple of REPLY_S after the call."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    try:
        return await work
    finally:
        spent = loop.time() - began
        await asyncio.sleep((math.floor(spent / REPLY_S) + 1) * REPLY_S - spent)


@contextmanager
def serving(
    desk: Desk, path: Path, service: Service, group: int | None = None, padded: Callable[[Awaitable[Any]], Awaitable[Any]] = at_multiples
) -> Iterator[None]:
    """Serve a desk at a socket of mode 0660, owned by us and by a group; raise UsageError if that cannot be done safely."""
    door = _bound(path, group)
    identity = path.lstat().st_ino
    loop = asyncio.new_event_loop()
    ready: threading.Event = threading.Event()
    stop = asyncio.Event()
    failure: list[BaseException] = []

    async def run() -> None:
        async with _desk_server(desk, padded) as inner, _door(door, inner, service, group):
            ticking = asyncio.create_task(_tick(desk, service))
            ready.set()
            await stop.wait()
            ticking.cancel()

    async def settle() -> None:  # connections that were closed or came in at the last moment are let go of in the loop's next rounds
        await asyncio.sleep(SETTLE_S)  # not cancelled before they ran: then nobody would close them
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(SETTLE_S)

    def main() -> None:
        try:
            loop.run_until_complete(run())
            loop.run_until_complete(settle())
        except BaseException as error:  # noqa: BLE001 - told to whoever started us
            failure.append(error)
            ready.set()

    thread = threading.Thread(target=main, name="guard-desk", daemon=True)
    thread.start()
    ready.wait()
    try:
        if failure:
            raise failure[0]
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10.0)
        if not thread.is_alive():
            loop.close()
        door.close()
        if path.exists() and path.lstat().st_ino == identity:  # another guard may have put its own there
            path.unlink(missing_ok=True)


def _bound(path: Path, group: int | None) -> socket.socket:
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(f"{path}: a socket's path has at most {LONGEST_PATH} bytes", hint="--socket names a shorter one")
    if not path.parent.exists():
        path.parent.mkdir(parents=True, mode=0o750)
        if group is not None:
            os.chown(path.parent, -1, group)
            os.chmod(path.parent, 0o750)
    folder = path.parent.stat().st_mode
    if folder & stat.S_IWOTH:  # whoever may write there can put a socket of its own in the place of ours
        raise UsageError(f"{path.parent}: anyone may write to this folder", hint="--socket names one in a folder of yours")
    if path.exists() or path.is_symlink():
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UsageError(f"{path}: expected a free path for the guard's socket, got something else")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise UsageError(f"{path}: another guard is serving there", hint="--socket names another path")
        path.unlink()
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        door.bind(str(path))
    except OSError as error:
        door.close()
        raise UsageError(f"{path}: cannot make a socket there ({error.strerror})", hint="--socket names another path") from None
    finally:
        os.umask(before)
    if group is not None:
        os.chown(path, -1, group)
    os.chmod(path, 0o660)
    return door


@asynccontextmanager
async def _desk_server(desk: Desk, padded: Callable[[Awaitable[Any]], Awaitable[Any]]) -> AsyncIterator[str]:
    """Serve the calls at a socket in a folder that we alone can enter: gRPC does not tell who calls, so a door stands before it."""
    import grpc.aio

    folder = tempfile.mkdtemp(prefix="veilmart-desk-")  # mode 0700
    inner = f"{folder}/desk"
    server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=CONNECTIONS)
    add_GuardServicer_to_server(_Answers(desk, padded), server)  # type: ignore[no-untyped-call]
    server.add_insecure_port(f"unix:{inner}")
    try:
        await server.start()
        yield inner
    finally:
        await server.stop(1.0)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _door(listening: socket.socket, inner: str, service: Service, group: int | None) -> AsyncIterator[None]:
    uids = service.uids | {os.getuid()}
    gids = service.gids | ({group} if group is not None else set())
    open_now: set[asyncio.Task[None]] = set()
    told = -math.inf

    async def let_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, uid, gid = peer_of(writer.get_extra_info("socket"))
        if (uid not in uids and gid not in gids) or len(open_now) >= CONNECTIONS:
            nonlocal told
            if time.monotonic() - told > TURNED_AWAY_S:  # who is turned away may come again at once, and must not fill a disk with lines
                told = time.monotonic()
                log.warning("caller turned away uid=%d gid=%d", uid, gid)
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        try:
            into, out_of = await asyncio.open_unix_connection(inner)
            try:
                await asyncio.gather(_pump(reader, out_of), _pump(into, writer))
            finally:
                out_of.close()
        except OSError:
            pass  # one of the two hung up
        finally:
            writer.close()
            open_now.discard(task)

    server = await asyncio.start_unix_server(let_in, sock=listening)
    try:
        yield
    finally:
        asyncio.get_running_loop().remove_reader(listening.fileno())  # asyncio drops a connection, unclosed, that is half accepted when
        await asyncio.sleep(SETTLE_S)  # the server closes: accept no more, and let those be accepted
        server.close()
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(64 << 10):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


def peer_of(connection: socket.socket) -> tuple[int, int, int]:
    """Return process, user and group of the other end, as the kernel noted them when it connected."""
    process, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return process, uid, gid


async def _tick(desk: Desk, service: Service) -> None:
    period = service.slot_s or IDLE_TICK_S
    while True:
        # Slots lie at multiples of the period by the clock; waiting for one never takes longer than a period, however wrong it is.
        await asyncio.sleep(period - time.time() % period)
        try:
            await asyncio.to_thread(desk.slot)
        except Exception as error:  # noqa: BLE001 - a full disk, say: the next slot tries again
            log.error("slot failed error=%s", type(error).__name__)


class SocketGuard(Reachable):
    """A guard behind a unix socket."""

    def __init__(self, address: str) -> None:
        self._address = address

    def request(self, order: Order) -> None:
        """Queue an order."""
        guarantee = order.guarantee
        most = "" if order.epsilon_adapter is None else format_decimal(order.epsilon_adapter)
        wire = pb.Order(
            epsilon=format_decimal(guarantee.epsilon), delta=format_decimal(guarantee.delta), map_id=order.map_id, epsilon_adapter=most
        )
        self._call("Request", wire)

    def collect(self) -> bytes | None:
        """Return the newest visible envelope, or None."""
        return bytes(self._call("Collect", pb.CollectRequest()).envelope) or None

    def take_part(self, ask: bytes) -> bytes:
        """Return the owner's message for a step of a cohort's round, or nothing: not yet, or never."""
        return bytes(self._call("TakePart", pb.CohortAsk(ask=ask)).answer)

    def status(self) -> Status:
        """Return how many orders came since the last slot and whether a release is visible."""
        answer = self._call("Status", pb.StatusRequest())
        return Status(int(answer.waiting), bool(answer.available))

    def _call(self, name: str, message: Any) -> Any:
        import grpc

        try:
            with grpc.insecure_channel(self._address, options=OPTIONS) as channel:
                return getattr(GuardStub(channel), name)(message, timeout=CALL_S)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            raise GuardUnreachable(
                f"guard: no answer ({error.code().name})", hint="is `veilmart node up` running, and may this user ask it?"
            ) from None
