"""The relay: guards that dialled out, and the sealed questions on their way to them.  Everything that passes is opaque here.

A guard holds one stream.  A question waits for its answer in memory and nowhere else; what a guard has not answered yet is bounded for each
guard and in bytes for all, and beyond that questions are refused, not queued.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from market_node.events import RelayClosed, RelayConnected, short, tell
from protocol.errors import FormatError, GuardUnreachable, QuotaExceeded, Unauthorised
from protocol.release import open_envelope
from protocol.sealing import CHALLENGE_BYTES, ID_BYTES, MAX_SEALED_BYTES, open_introduction, require_introduction, verify_announcement
from protocol.wire import market_pb2 as pb

ANNOUNCE_S = 10.0  # a guard that dials in has said who it is by then
SIGN_OF_LIFE_S = 20.0  # between two, from us to a guard, which answers each
SILENCE_S = 60.0  # a guard that says nothing for so long is gone, whatever its connection looks like
LINE_S = 3600.0  # longest life of a stream: then the guard dials again, with a fresh key
UNANSWERED = 8  # questions of one guard
HELD_BYTES = 16 << 20  # of sealed questions and answers, together
LINES = 1024  # guards at once
MARGIN_S = 0.5  # taken from what an asker waits, so that it is told why before its own call ends

Vouch = Callable[[bytes], Awaitable[None]]  # raises Unauthorised unless a guard's connection still stands for this owner
GONE = "relay: the guard of this release is not connected"


@dataclass(slots=True)
class Meter:
    """What passed on one line: counts and bytes, nothing about askers."""

    asked: int = 0
    answered: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Line:
    """One guard's stream."""

    def __init__(self, owner: bytes, release_id: bytes, introduction: bytes, vouch: Vouch) -> None:
        self.owner, self.release_id, self.introduction, self.vouch = owner, release_id, introduction, vouch
        self.meter = Meter()
        self._outgoing: asyncio.Queue[pb.ToGuard | None] = asyncio.Queue()  # bounded by UNANSWERED
        self._unanswered: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._heard = time.monotonic()
        self.retired = False

    async def ask(self, sealed: bytes, patience_s: float) -> bytes:
        """Return the sealed answer; raise GuardUnreachable where none comes in time."""
        if len(self._unanswered) >= UNANSWERED:
            raise QuotaExceeded("relay: too many questions wait for this guard", hint="try again in a few seconds")
        self._number += 1
        number, answered = self._number, asyncio.Future[bytes]()
        self._unanswered[number] = answered
        self.meter.asked, self.meter.bytes_in = self.meter.asked + 1, self.meter.bytes_in + len(sealed)
        self._outgoing.put_nowait(pb.ToGuard(number=number, sealed=sealed, patience_ms=int(1000 * patience_s)))
        try:
            async with asyncio.timeout(patience_s):
                answer = await answered
        except TimeoutError:
            raise GuardUnreachable(
                "relay: the guard did not answer in time", hint="it may be busy: ask again, or for fewer --tokens"
            ) from None
        finally:
            del self._unanswered[number]
            if self.retired:
                self._outgoing.put_nowait(None)
        if not answer:
            # One word for all reasons that a guard tells nobody: too many come, it opened nothing, it was stopped.
            raise GuardUnreachable("relay: the guard gave no answer", hint="try again later")
        self.meter.answered, self.meter.bytes_out = self.meter.answered + 1, self.meter.bytes_out + len(answer)
        return answer

    async def read(self, messages: AsyncIterator[pb.FromGuard]) -> None:
        """Take answers and signs of life until the guard hangs up."""
        try:
            async for message in messages:
                self._heard = time.monotonic()
                if len(message.sealed) > MAX_SEALED_BYTES:
                    raise FormatError(f"answer: expected at most {MAX_SEALED_BYTES} bytes, got {len(message.sealed)}")
                answered = self._unanswered.get(message.number)
                if answered is not None and not answered.done():  # later than its asker waited: dropped
                    answered.set_result(bytes(message.sealed))
        finally:
            self.hang_up()

    async def messages(self) -> AsyncIterator[pb.ToGuard]:
        """Yield what goes to the guard until it hung up, fell silent, or was followed by another and has answered all."""
        ends = time.monotonic() + LINE_S
        while not (self.retired and not self._unanswered):
            try:
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    message = await self._outgoing.get()
            except TimeoutError:
                message = pb.ToGuard()
            now = time.monotonic()
            if now - self._heard > SILENCE_S or now > ends:
                return
            if message is not None:
                yield message

    def retire(self) -> None:
        """Take no more questions: another line has this one's place."""
        self.retired = True
        self._outgoing.put_nowait(None)

    def hang_up(self) -> None:
        """Tell all who wait that no answer comes."""
        self.retired = True
        for answered in self._unanswered.values():
            if not answered.done():
                answered.set_exception(GuardUnreachable(GONE, hint="its owner has to run `veilmart node up` with [relay] in its policy"))
        self._outgoing.put_nowait(None)


class Switchboard:
    """All lines of one market.

    envelope_of: reads a release from the store.  may_answer: whether an owner is a member and a release of it stands.
    """

    def __init__(
        self, market_key: bytes, envelope_of: Callable[[bytes], Awaitable[bytes]], may_answer: Callable[[bytes, bytes], Awaitable[bool]]
    ) -> None:
        self._market_key, self._envelope_of, self._may_answer = market_key, envelope_of, may_answer
        self._lines: dict[bytes, Line] = {}
        self._open = 0
        self._held = 0

    def close(self) -> None:
        """Hang up every line: a market that stops must not wait for them."""
        for line in self._lines.values():
            line.hang_up()

    async def serve(self, messages: AsyncIterator[pb.FromGuard], vouch: Vouch) -> AsyncIterator[pb.ToGuard]:
        """Yield what goes to a guard that dialled in; raise for one that is not the owner of a release here.

        vouch: asked when it announces itself, and again with every question.
        """
        if self._open >= LINES:
            raise QuotaExceeded("relay: too many guards are connected", hint="the guard dials again by itself")
        self._open += 1
        try:
            challenge = secrets.token_bytes(CHALLENGE_BYTES)
            yield pb.ToGuard(challenge=challenge)
            async with asyncio.timeout(ANNOUNCE_S):
                first = await anext(messages, pb.FromGuard())
            line = await self._admit(challenge, bytes(first.introduction), bytes(first.signature), vouch)
            async for message in self._run(line, messages):
                yield message
        finally:
            self._open -= 1

    async def _admit(self, challenge: bytes, introduction: bytes, signature: bytes, vouch: Vouch) -> Line:
        shown = open_introduction(introduction)
        verify_announcement(self._market_key, challenge, introduction, shown.owner, signature)
        await vouch(shown.owner)
        release = open_envelope(await self._envelope_of(shown.release_id))
        require_introduction(introduction, release.owner, release.release_id, int(time.time()))
        if not await self._may_answer(release.owner, release.release_id):
            raise Unauthorised("relay: the owner of this release is not enrolled here, or the release was taken back")
        return Line(release.owner, release.release_id, introduction, vouch)

    async def _run(self, line: Line, messages: AsyncIterator[pb.FromGuard]) -> AsyncIterator[pb.ToGuard]:
        before = self._lines.get(line.release_id)
        if before is not None:
            before.retire()
        self._lines[line.release_id] = line
        tell(RelayConnected(short(line.owner), short(line.release_id)))
        reading = asyncio.create_task(line.read(messages))
        try:
            yield pb.ToGuard(connected=True)
            async for message in line.messages():
                yield message
        finally:
            line.hang_up()
            if self._lines.get(line.release_id) is line:
                del self._lines[line.release_id]
            reading.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await reading
            meter = line.meter
            numbers = (meter.asked, meter.answered, meter.bytes_in, meter.bytes_out)
            tell(RelayClosed(short(line.owner), short(line.release_id), *numbers))

    def has_line(self, release_id: bytes) -> bool:
        """Return whether a guard dialled in here for a release."""
        line = self._lines.get(release_id)
        return line is not None and not line.retired

    async def introduction(self, release_id: bytes) -> bytes:
        """Return the introduction of the guard that answers for a release; raise GuardUnreachable if none does."""
        return (await self._line(release_id)).introduction

    async def ask(self, release_id: bytes, sealed: bytes, patience_s: float) -> bytes:
        """Return the sealed answer to a sealed question."""
        if not ID_BYTES < len(sealed) <= MAX_SEALED_BYTES:
            raise FormatError(f"question: expected at most {MAX_SEALED_BYTES} sealed bytes, got {len(sealed)}")
        line, held = await self._line(release_id), len(sealed) + MAX_SEALED_BYTES
        if self._held + held > HELD_BYTES:
            raise QuotaExceeded("relay: too many questions at once", hint="try again in a few seconds")
        self._held += held
        try:
            return await line.ask(sealed, max(patience_s - MARGIN_S, 0.0))
        finally:
            self._held -= held

    async def _line(self, release_id: bytes) -> Line:
        line = self._lines.get(release_id)
        if line is not None:
            try:
                await line.vouch(line.owner)
            except Unauthorised:
                line.hang_up()  # the guard learns why when it dials again
        # Asked each time: a member may have been removed since its guard dialled in.
        if line is None or line.retired or not await self._may_answer(line.owner, release_id):
            raise GuardUnreachable(GONE, hint="its owner may be away, or answers no questions: `veilmart pull` needs no guard")
        return line
