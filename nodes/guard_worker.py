"""The guard's worker: the process that has everything private, forked from the one that answers."""

from __future__ import annotations

import base64
import ctypes
import itertools
import json
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from nodes.guard import Order
from protocol import errors
from protocol.codec import format_decimal
from protocol.errors import GuardUnreachable, VeilmartError
from protocol.privacy import Guarantee
from protocol.release import open_envelope

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from nodes.answerer import Answerer
    from nodes.guard import Guard
    from nodes.policy import RelayRules

log = logging.getLogger("veilmart.guard")

PR_SET_PDEATHSIG = 1
LOWEST_PRIORITY = 19
PROVE_S = 30.0
QUESTIONS_WAITING = 8  # of the relay; more get no answer


class Worker:
    """A worker process, from this side of the pipe.

    What passes is JSON: numbers of orders, and what became of them; and of the relay sealed questions and answers, which this side cannot
    open.  relay: the owner's rules for questions, or None to answer none.
    """

    def __init__(self, make: Callable[[], Guard], relay: RelayRules | None = None) -> None:
        """Fork the worker; return when its guard is there, or raise what it raised.

        Forked and not started anew, so that neither data nor key nor settings pass through arguments or the environment.  It has to
        happen before any thread or gRPC channel exists here.
        """
        fork = multiprocessing.get_context("fork")
        self._pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=_work, args=(make, theirs, self._pipe, os.getpid(), relay), name="veilmart-guard", daemon=True)
        self.process.start()
        theirs.close()
        try:
            told = json.loads(self._pipe.recv_bytes())
        except EOFError:
            raise VeilmartError("guard: its process ended before it was ready", hint="out of memory, or killed?") from None
        if "error" in told:
            raise _error_of(told)
        self.owner, self.map_id, self.base_model = str(told["owner"]), str(told["map_id"]), str(told["base_model"])
        self._lock = threading.Lock()
        self._calls: dict[int, Future[list[bytes]]] = {}
        self._numbers = itertools.count(1)

    def introduce(self, envelope: bytes, market_key: bytes, challenge: bytes) -> Future[list[bytes]]:
        """Ask for an introduction of a release and the owner's answer to a market's challenge; nothing where there is no adapter for it."""
        return self._call("introduce", [envelope, market_key, challenge])

    def prove(self, market_key: bytes, public_key: bytes, asked: int) -> bytes:
        """Return the owner's proof that a TLS key speaks for it at a market; raise GuardUnreachable where the worker is gone."""
        made = self._call("prove", [market_key, public_key, asked.to_bytes(8, "little")]).result(PROVE_S)
        if not made:
            raise GuardUnreachable("guard: its process with the owner's key is gone")
        return made[0]

    def answer(self, sealed: bytes, patience_s: float) -> Future[list[bytes]]:
        """Ask for the sealed answer to a sealed question; empty where there is none."""
        return self._call("answer", [sealed], patience_s=patience_s)

    def take_part(self, ask: bytes) -> Future[list[bytes]]:
        """Ask for the owner's message for a step of a cohort's round; empty where it takes no part."""
        return self._call("take_part", [ask])

    def _call(self, what: str, parts: list[bytes], **more: float) -> Future[list[bytes]]:
        number, future = next(self._numbers), Future[list[bytes]]()
        self._calls[number] = future
        plain = {"call": number, "what": what, "parts": _texts(parts), **more}
        try:
            with self._lock:
                self._pipe.send_bytes(json.dumps(plain).encode())
        except OSError:
            self._calls.pop(number)
            future.set_result([])
        return future

    def hand_over(self, number: int, order: Order) -> None:
        """Give the worker an order."""
        guarantee = order.guarantee
        plain = {
            "order": number, "epsilon": guarantee.epsilon, "delta": guarantee.delta,
            "map_id": order.map_id.hex(), "occasion": order.occasion, "epsilon_adapter": order.epsilon_adapter,
        }  # fmt: skip
        with self._lock:
            try:
                self._pipe.send_bytes(json.dumps(plain).encode())
            except OSError:
                log.error("guard gone order=%d", number)  # it stays in the journal, and is served after the next start

    def listen(self, outcome: Callable[[dict[str, Any]], None]) -> None:
        """Pass on what the worker tells of each order, from a thread, until it ends."""

        def run() -> None:
            while True:
                try:
                    told = json.loads(self._pipe.recv_bytes())
                except (EOFError, OSError):
                    for future in list(self._calls.values()):
                        future.set_result([])
                    return
                if "call" in told:
                    self._calls.pop(told["call"]).set_result(_parts(told["parts"]))
                    continue
                try:
                    outcome(told)
                except VeilmartError as error:
                    log.error("outcome not noted yet order=%d error=%s", told["order"], error.code)

        threading.Thread(target=run, name="guard-outcomes", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self.process.is_alive()

    def close(self) -> None:
        """End the worker, whatever it is doing: what was not committed is not charged, and its order stays in the journal."""
        self.process.kill()
        self.process.join()


def _texts(parts: list[bytes]) -> list[str]:
    return [base64.b64encode(part).decode() for part in parts]


def _parts(texts: list[str]) -> list[bytes]:
    return [base64.b64decode(text) for text in texts]


def _error_of(told: dict[str, str]) -> VeilmartError:
    kind: type[VeilmartError] = getattr(errors, told["error"], VeilmartError)
    error = VeilmartError.__new__(kind)  # some classes make their message themselves; this one is made already
    VeilmartError.__init__(error, told["message"], told["hint"])
    return error


def _work(make: Callable[[], Guard], pipe: Connection, other_end: Connection, parent: int, relay: RelayRules | None) -> None:
    other_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the desk gets it too, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    try:
        guard = make()
    except VeilmartError as error:
        told = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
        pipe.send_bytes(json.dumps(told).encode())
        return
    os.nice(LOWEST_PRIORITY)  # from here on somebody may be asking, and answers must not wait for us
    model, feature_map = guard.serves
    pipe.send_bytes(json.dumps({"owner": guard.owner.hex(), "map_id": feature_map.hex(), "base_model": model}).encode())
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    sending = threading.Lock()

    def tell(told: dict[str, Any]) -> None:
        with sending:
            pipe.send_bytes(json.dumps(told).encode())

    calls = _Calls(guard.answerer(relay), tell) if relay is not None else None
    steps: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_take_part, args=(guard, steps, tell), name="guard-cohort", daemon=True).start()
    threading.Thread(target=_read, args=(pipe, orders, steps, calls), daemon=True).start()
    while True:
        plain = orders.get()
        before = len(guard.failures)
        guard.request(
            Order(Guarantee(plain["epsilon"], plain["delta"]), bytes.fromhex(plain["map_id"]), plain["occasion"], plain["epsilon_adapter"]),
        )
        guard.work()
        told = {"order": plain["order"], "release": "", "code": ""}
        if len(guard.failures) > before:
            told["code"] = guard.failures[-1].code
            log.warning("order refused order=%d epsilon=%s code=%s", plain["order"], format_decimal(plain["epsilon"]), told["code"])
        elif (envelope := guard.collect()) is not None:
            told["release"] = open_envelope(envelope).release_id.hex()
        tell(told)


class _Calls:
    """The relay's side of the worker: introductions are made at once, questions are answered one at a time, beside the orders."""

    def __init__(self, answerer: Answerer, tell: Callable[[dict[str, Any]], None]) -> None:
        self._answerer, self._tell = answerer, tell
        self._questions: queue.Queue[tuple[dict[str, Any], float]] = queue.Queue(QUESTIONS_WAITING)
        threading.Thread(target=self._answer, name="guard-answers", daemon=True).start()

    def take(self, plain: dict[str, Any]) -> None:
        """Serve a call, or queue it."""
        if plain["what"] == "answer":
            try:
                self._questions.put_nowait((plain, time.monotonic() + plain["patience_s"]))
            except queue.Full:
                self._tell({"call": plain["call"], "parts": _texts([b""])})
            return
        made: list[bytes] = []
        try:
            if plain["what"] == "prove":
                market_key, public_key, asked = _parts(plain["parts"])
                made = [self._answerer.prove(market_key, public_key, int.from_bytes(asked, "little"))]
            else:
                made = [*self._answerer.introduce(*_parts(plain["parts"]))]
        except VeilmartError as error:
            log.warning("not introduced code=%s", error.code)
        self._tell({"call": plain["call"], "parts": _texts(made)})

    def _answer(self) -> None:
        while True:
            plain, ends = self._questions.get()
            left = ends - time.monotonic()  # an asker that went away while others were answered costs nothing
            answer = self._answerer.answer(_parts(plain["parts"])[0], left) if left > 0 else b""
            self._tell({"call": plain["call"], "parts": _texts([answer])})


def _take_part(guard: Guard, steps: queue.Queue[dict[str, Any]], tell: Callable[[dict[str, Any]], None]) -> None:
    """Answer steps of cohorts' rounds, one at a time and beside the orders; a refusal is told by its code, here alone."""
    while True:
        plain, said = steps.get(), b""
        try:
            said = guard.take_part(_parts(plain["parts"])[0])
        except VeilmartError as error:
            log.warning("step of a cohort refused code=%s", error.code)
        except Exception as error:  # noqa: BLE001 - the thread must go on, and the text may hold what is private
            log.error("step of a cohort failed kind=%s", type(error).__name__)
        tell({"call": plain["call"], "parts": _texts([said])})


def _read(pipe: Connection, orders: queue.Queue[dict[str, Any]], steps: queue.Queue[dict[str, Any]], calls: _Calls | None) -> None:
    while True:
        try:
            plain = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the desk is gone; what is not committed is not charged
        if "call" not in plain:
            orders.put(plain)
        elif plain["what"] == "take_part":
            steps.put(plain)
        elif calls is not None:
            calls.take(plain)
