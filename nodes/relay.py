"""The relay from a node's side: the line that a guard's desk keeps to the market, and a querier's question.

The desk dials out and listens nowhere.  It passes sealed bytes between the market's stream and the worker, whose key it does not have.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nodes.answerer import Rate
from nodes.learnwares import fetch_release
from nodes.market_client import MarketClient
from nodes.membership import Membership
from nodes.policy import RelayRules
from protocol.channel import error_from_status
from protocol.errors import MarketUnreachable, NotFound, QuotaExceeded, Unauthorised, UsageError, VeilmartError
from protocol.keys import signing_key
from protocol.release import open_envelope
from protocol.sealing import Refusal, Reply, ask, require_introduction
from protocol.wire import market_pb2 as pb

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol.features import FeatureMap
    from protocol.release import Release

log = logging.getLogger("veilmart.guard")

LINE_S = 3600.0  # longest life of a stream
RENEW_S = 3000.0  # a second stream, with a fresh key, takes over before
SILENCE_S = 60.0  # the market gives a sign of life every 20 s
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # between two attempts: doubled each time, and a random part of it, so that a fleet spreads
AWAY_PAUSE_S = 4.0  # the longest where the market does not answer at all: back within 5 s of it
STEADY_S = 30.0  # a stream that lasted so long was a good one: the next attempt is the first again
WATCH_S = 0.25
INTRODUCE_S = 30.0
FLOOD = 60  # times the owner's rate are looked at
ANSWER_S = 120.0  # what a querier waits at most


class Answers(Protocol):
    """The worker as the line needs it."""

    def introduce(self, envelope: bytes, market_key: bytes, challenge: bytes) -> Future[list[bytes]]:
        """Return what the market is shown of a release's owner."""
        ...

    def answer(self, sealed: bytes, patience_s: float) -> Future[list[bytes]]:
        """Return the sealed answer to a sealed question."""
        ...


class _Stream:
    """One stream to the market, in a thread of its own, from dialling to its end."""

    def __init__(self, client: MarketClient, envelope: bytes, worker: Answers, rate: Rate) -> None:
        self._client, self._worker, self._rate = client, worker, rate
        self.envelope, self.began = envelope, time.monotonic()
        self.connected, self.ended = threading.Event(), threading.Event()
        self.error: VeilmartError | None = None
        self._heard, self._outgoing = time.monotonic(), queue.SimpleQueue[pb.FromGuard | None]()
        self._call: Any = None
        threading.Thread(target=self._run, name="guard-relay", daemon=True).start()

    @property
    def silent(self) -> bool:
        return time.monotonic() - self._heard > SILENCE_S

    def close(self) -> None:
        self._outgoing.put(None)
        if self._call is not None:
            self._call.cancel()

    def _run(self) -> None:
        import grpc

        try:
            market_key = self._client.describe().market_key
            self._call = self._client.relay(iter(self._outgoing.get, None), LINE_S)
            for message in self._call:
                self._heard = time.monotonic()
                self._take(message, market_key)
        except grpc.RpcError as error:
            self.error = error_from_status(error)
        except VeilmartError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - the guard goes on without this stream, and dials again
            self.error = VeilmartError(f"unexpected {type(error).__name__} in the relay")
        finally:
            self._outgoing.put(None)
            self.ended.set()

    def _take(self, message: Any, market_key: bytes) -> None:
        if message.challenge:
            made = self._worker.introduce(self.envelope, market_key, bytes(message.challenge)).result(INTRODUCE_S)
            if not made:
                raise NotFound("relay: there is no adapter here for the newest release")
            self._outgoing.put(pb.FromGuard(introduction=made[0], signature=made[1]))
        elif message.connected:
            self.connected.set()
        elif not message.number:
            self._outgoing.put(pb.FromGuard())
        elif not self._rate.take():
            self._outgoing.put(pb.FromGuard(number=message.number))
        else:
            number = int(message.number)
            answer = self._worker.answer(bytes(message.sealed), min(message.patience_ms / 1000, ANSWER_S))
            answer.add_done_callback(lambda done: self._outgoing.put(pb.FromGuard(number=number, sealed=b"".join(done.result()))))


class RelayLine:
    """Keeps one stream to the market for the newest visible release, whatever becomes of connections, until it is closed.

    visible: the guard's newest visible envelope, or None.  membership: for a market with a port for members.
    """

    def __init__(
        self, market: str, ca: Path, home: Path, visible: Callable[[], bytes | None], worker: Answers, rules: RelayRules,
        random_part: Callable[[], float] = random.random, membership: Membership | None = None,
    ) -> None:  # fmt: skip
        self._where = market, ca, home, membership
        self._visible, self._worker, self._random_part = visible, worker, random_part
        # Opening a question costs a millisecond, also one that is nonsense: the owner's own rate counts what is answered, in the worker.
        self._rate = Rate(FLOOD * rules.questions_per_hour)
        self._stop = threading.Event()
        self._said = ""
        self._thread = threading.Thread(target=self._run, name="guard-relay-line", daemon=True)

    def __enter__(self) -> RelayLine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while not self._stop.is_set():
            envelope = self._visible()
            if envelope is None or open_envelope(envelope).adapter is None:
                self._say("waiting", "relay waits for a release with an adapter")
                self._stop.wait(WATCH_S)
                continue
            try:
                with MarketClient(*self._where) as client:
                    lasted, away = self._keep(client, envelope)
            except VeilmartError as error:  # a file of the market's authority that is gone, say
                lasted, away = 0.0, False
                self._say(error.code, f"relay not connected code={error.code}")
            pause = FIRST_PAUSE_S if lasted > STEADY_S else min(2 * pause, AWAY_PAUSE_S if away else LONGEST_PAUSE_S)
            self._stop.wait(pause * (0.5 + 0.5 * self._random_part()))

    def _keep(self, client: MarketClient, envelope: bytes) -> tuple[float, bool]:
        """Hold streams over one connection until none is left; return how long the last one lasted and whether the market is away."""
        newest = _Stream(client, envelope, self._worker, self._rate)
        older: list[_Stream] = []
        not_before = 0.0
        try:
            while not self._stop.is_set() and not newest.silent:
                ended = newest.ended.wait(WATCH_S)
                older = [stream for stream in older if not stream.ended.is_set()]
                if ended and older:  # a release that the market does not have yet, say: the one before is answered meanwhile
                    newest, not_before = older.pop(), time.monotonic() + LONGEST_PAUSE_S
                elif ended:
                    break
                if newest.connected.is_set():
                    self._say(f"connected {id(newest)}", "relay connected")
                    now, visible = time.monotonic(), self._visible() or newest.envelope
                    # The market retires a stream when a newer one for its release has announced itself; its last answers still go out.
                    if now > not_before and (visible != newest.envelope or now - newest.began > RENEW_S):
                        older.append(newest)
                        newest = _Stream(client, visible, self._worker, self._rate)
            if newest.error is not None:
                self._say(newest.error.code, f"relay not connected code={newest.error.code}")
            lasted = time.monotonic() - newest.began if newest.connected.is_set() else 0.0
            return lasted, newest.silent or isinstance(newest.error, MarketUnreachable)
        finally:
            for stream in (newest, *older):
                stream.close()
                stream.ended.wait(5.0)

    def _say(self, what: str, line: str) -> None:
        if what != self._said:  # once for each change: attempts go on for days where a market is away
            self._said = what
            log.info("%s", line)


# The querier --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Relayed:
    """An answer that came from a guard."""

    release: Release
    reply: Reply
    seconds: float
    sent_bytes: int
    received_bytes: int


def ask_relayed(
    name: str, text: str, tokens: int, client: MarketClient, home: Path, feature_map: FeatureMap, timeout_s: float = ANSWER_S
) -> Relayed:
    """Let the guard of a release answer; the market sees that, when and in which size, and neither text.

    Raises InvalidSignature, before anything is sealed, if the key that the market shows is not the owner's.
    """
    started = time.perf_counter()
    _, release = fetch_release(name, client, feature_map)
    if release.adapter is None:
        raise NotFound(f"{release.title}: its owner made no adapter", hint="a specification alone cannot answer")
    introduction = client.introduction(release.release_id)
    shown = require_introduction(introduction, release.owner, release.release_id, int(time.time()))
    key = asker_key(home) if shown.known_askers else None
    asked = ask(introduction, text, tokens, key)
    sealed = client.ask(release.release_id, asked.sealed, timeout_s)
    reply = asked.open(sealed)
    if reply.refusal is Refusal.UNKNOWN_ASKER:
        public = asker_key(home).public_key().public_bytes_raw().hex()
        raise Unauthorised(f"{release.title}: its owner answers to known askers alone", hint=f"give the owner your key: {public}")
    if reply.refusal is Refusal.TOO_MANY:
        raise QuotaExceeded(f"{release.title}: its owner answers no more questions for now", hint="try again later")
    if reply.refusal is Refusal.TOO_LONG:
        raise UsageError("question: with its answer longer than the owner's model or policy takes", hint="shorten it, or lower --tokens")
    return Relayed(release, reply, time.perf_counter() - started, len(asked.sealed), len(sealed))


def asker_key(home: Path) -> Ed25519PrivateKey:
    """Return the key that signs questions to owners who answer to known askers alone; made on first use, told to nobody else."""
    return signing_key(home / "asker.key")
