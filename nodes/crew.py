"""The owners' guards of a simulation at work: one owner a thread, each thread computing alone.

Two owners at once, a thread each, take the CPU seconds of one owner with two threads, and no thread waits for another within a step
(measured).  Threads, not processes: torch lets go of the interpreter while it computes, and the model lies in memory once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nodes.guard import Guard, Order, Progress
from nodes.machine import cores, free_bytes
from protocol.errors import CampaignFailed, VeilmartError

MIB = 1 << 20
FIXED_BYTES = 900 * MIB  # Python, torch, Flower and the market process, before any model
WORKER_BYTES = 300 * MIB  # one owner in training: states, gradients, logits
RECORD_PASS_S, RECORD_STEP_S = 0.12, 0.11  # CPU seconds a record: prefix pass; one training pass (measured, fp32)
EMBED_S = 0.03  # CPU seconds a record for the features alone


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run is going to take, said before it starts; times are estimates for a core of its own."""

    owners: int
    records: int
    workers: int
    cores: int
    memory_bytes: int
    free_bytes: int | None
    cpu_s: float
    wall_s: float

    @property
    def line(self) -> str:
        """The plan in one line for people."""
        free = "" if self.free_bytes is None else f" of {self.free_bytes / (1 << 30):.1f} GiB free"
        return (
            f"plan: {self.owners} owners with {self.records} records, {self.workers} at a time on {self.cores} cores; "
            f"memory about {self.memory_bytes / (1 << 30):.1f} GiB{free}; about {self.wall_s / 60:.0f} min ({self.cpu_s:.0f} CPU seconds)"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        return {**asdict(self), "cpu_s": round(self.cpu_s, 1), "wall_s": round(self.wall_s, 1)}


def plan_run(owners: int, records: int, passes: float, model_bytes: int, workers: int | None) -> RunPlan:
    """Return how many owners work at a time, as cores and free memory allow, and what the run takes.

    passes: how often training sees each record, 0 for specifications alone.  workers: a number that the caller insists on.
    """
    free, base = free_bytes(), FIXED_BYTES + model_bytes
    fit = owners if free is None else max(1, (free - base) // WORKER_BYTES)
    chosen = workers or max(1, min(cores(), owners, fit))
    cpu = records * (RECORD_PASS_S + passes * RECORD_STEP_S if passes else EMBED_S)
    return RunPlan(owners, records, chosen, cores(), base + chosen * WORKER_BYTES, free, cpu, cpu / min(chosen, cores()))


class Crew:
    """Threads that serve the orders of many guards; each guard is reached through its `place`."""

    def __init__(self, guards: Mapping[str, Guard], workers: int, on_progress: Progress) -> None:
        self._guards, self._on_progress = guards, on_progress
        self._called: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"owners-{i}", daemon=True) for i in range(workers)]
        self._lock, self._done = threading.Lock(), 0
        self.places = {name: Place(self, name, guard) for name, guard in guards.items()}
        self.failures: dict[str, VeilmartError] = {}

    def __enter__(self) -> Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()

    def call(self, name: str) -> None:
        """Let a thread serve this guard when one is free."""
        self._called.put(name)

    def stop(self) -> None:
        """Let every thread end after the owner it works for."""
        for _ in self._threads:
            self._called.put(None)

    def _work(self) -> None:
        while (name := self._called.get()) is not None and not self.failures:
            guard = self._guards[name]
            guard.work()
            with self._lock:
                self._done += 1
                if guard.failures:
                    self.failures[name] = guard.failures[0]
                self._on_progress("owners", self._done, len(self._guards))


class Place:
    """What a shim reaches: the guard, and the bell that calls a thread to it."""

    def __init__(self, crew: Crew, name: str, guard: Guard) -> None:
        self._crew, self._name, self._guard = crew, name, guard

    def request(self, order: Order) -> None:
        """Hand an order on."""
        self._require_going()
        self._guard.request(order)
        self._crew.call(self._name)

    def collect(self) -> bytes | None:
        """Return the stored envelope, or None."""
        self._require_going()
        return self._guard.collect()

    def take_part(self, ask: bytes) -> bytes:
        """Return the guard's message for a step of a cohort's round."""
        self._require_going()
        return self._guard.take_part(ask)

    def _require_going(self) -> None:
        # Once an owner has failed every question fails, so that the campaign ends instead of waiting.
        if self._crew.failures:
            raise CampaignFailed("an owner failed")
