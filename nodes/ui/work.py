"""What takes long: one worker, one piece of work after the other, so that a page never waits and a model is in memory once.

Work goes on when its page is left, and says so wherever a page is open; it can be stopped there.  Results stay in memory, the newest few,
until the program ends: nothing of them is written anywhere.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from protocol.errors import NotFound, QuotaExceeded, VeilmartError

MOST_WAITING = 8
MOST_KEPT = 20  # finished ones; a result is some kilobytes

log = logging.getLogger("veilmart.ui")


class State(StrEnum):
    """How far a piece of work is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    STOPPED = "stopped"


class Stopped(Exception):
    """Raised inside work that its user stopped, where it next reports progress."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, in the three lines of the command line.  Not the error itself: it holds on to the records that it came from."""

    code: str
    message: str
    hint: str = ""


@dataclass
class Job:
    """One piece of work.  Written by the worker, read by pages: each field is replaced whole."""

    kind: str  # which page it came from
    title: str  # what it is, for people
    run: Callable[[Job], Mapping[str, Any]]
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: State = State.WAITING
    stage: str = ""
    done: int = 0
    of: int = 0
    partial: Mapping[str, str] = field(default_factory=dict)  # what is known before the end, by name
    result: Mapping[str, Any] | None = None
    error: Failure | None = None
    seconds: float = 0.0
    _stop: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        """Whether nothing more will change."""
        return self.state in (State.DONE, State.FAILED, State.STOPPED)

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop and has not yet."""
        return self._stop.is_set() and not self.over

    def stop(self) -> None:
        """Stop at the next step."""
        self._stop.set()

    def progress(self, stage: str, done: int, of: int) -> None:
        """Note how far a stage is; raise Stopped if the work is not wanted any more."""
        if self._stop.is_set():
            raise Stopped
        self.stage, self.done, self.of = stage, done, of

    def tell(self, name: str, text: str) -> None:
        """Show text before the end; raise Stopped as `progress` does."""
        if self._stop.is_set():
            raise Stopped
        self.partial = {**self.partial, name: text}


class Worker:
    """One thread that runs jobs in their order.  A context manager: leaving it stops what runs."""

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="veilmart-ui-work", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending = True
            for job in self._jobs.values():
                job.stop()
            self._changed.notify_all()
        self._thread.join(timeout=5)  # a step of a model takes no longer; the thread ends with the process in any case

    def start(self, kind: str, title: str, run: Callable[[Job], Mapping[str, Any]]) -> Job:
        """Return new work that waits for its turn; raise QuotaExceeded where too much waits already."""
        job = Job(kind, title, run)
        with self._changed:
            if sum(not other.over for other in self._jobs.values()) > MOST_WAITING:
                raise QuotaExceeded(f"more than {MOST_WAITING} pieces of work wait already", hint="stop one of them")
            self._jobs[job.id] = job
            over = [other.id for other in self._jobs.values() if other.over]
            for old in over[: max(len(over) - MOST_KEPT, 0)]:
                del self._jobs[old]
            self._changed.notify_all()
        return job

    def find(self, job_id: str) -> Job:
        """Return a job; raise NotFound for one that is not there, or not any more."""
        with self._changed:
            if job_id not in self._jobs:
                raise NotFound("this work is not known here", hint=f"the newest {MOST_KEPT} results are kept while `veilmart ui` runs")
            return self._jobs[job_id]

    def jobs(self, kind: str | None = None) -> list[Job]:
        """Return what was started, the newest first."""
        with self._changed:
            return [job for job in reversed(self._jobs.values()) if kind in (None, job.kind)]

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ending and (job := self._next()) is None:
                    self._changed.wait()
                if self._ending:
                    return
                assert job is not None
                job.state = State.RUNNING
            started = time.monotonic()
            state = _finished(job)
            job.seconds, job.run = time.monotonic() - started, _forgotten  # with the records that came for it
            job.state = state  # last: whoever sees it sees the result
            log.info("work kind=%s state=%s seconds=%.1f", job.kind, job.state, job.seconds)

    def _next(self) -> Job | None:
        return next((job for job in self._jobs.values() if job.state is State.WAITING), None)


def _forgotten(job: Job) -> Mapping[str, Any]:
    raise AssertionError("work is run once")


def _finished(job: Job) -> State:
    try:
        job.progress(job.stage, 0, 0)  # stopped while it waited?
        job.result = job.run(job)
        return State.DONE
    except Stopped:
        return State.STOPPED
    except VeilmartError as error:
        job.error = Failure(error.code, str(error), error.hint)
    except Exception as error:  # noqa: BLE001  # its text may hold private records, so only its type is told and logged
        job.error = Failure(VeilmartError.code, f"unexpected {type(error).__name__}")
    log.warning("work failed kind=%s code=%s", job.kind, job.error.code)
    return State.FAILED
