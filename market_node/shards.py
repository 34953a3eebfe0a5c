"""Where the tiles of the index are answered: in this process, by worker processes of this machine, or by a Ray cluster.

The market's process is the front.  It parses queries, checks their ranges and computes their baby steps once; each worker answers a
range of tiles, and the front puts the parts together: the same bytes as without workers.  A worker knows a tile by the digest of its
layout and rows, and is asked for tiles by digest, so that no answer mixes two states of the catalogue.
The front has every tile itself.  It answers what a worker that died or went silent leaves, until another one has taken its place.
Source: docs/decisions/0019-shards.md.
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from market_node.events import WorkerEnded, WorkerNotStarted, kind_of, tell, where
from market_node.index import VERSIONS_KEPT, Version
from protocol.errors import UsageError

if TYPE_CHECKING:
    from protocol.encryption import EncryptedQuery, EncryptedScores, MatchPlan
    from protocol.evaluation import EncodedTile

LEAST_TILES = 16  # about 60 000 releases, where a query takes 12 ms of CPU: two workers of 100 MB each save 4 of them
MOST_WORKERS = 8  # unless somebody asks for more
PATIENCE_S, PATIENCE = 10.0, 20  # a worker may take so long, or so many times what its part should take, before it counts as lost
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a worker that was lost twice in a row is started again


class WorkerLost(Exception):
    """A worker died, did not come up, or said nothing in time."""


class Workers(NamedTuple):
    """How many answer now, and how many were lost since the start."""

    answering: int
    lost: int


class Evaluator(Protocol):
    """Answers queries over a version of the index; for callers in any thread."""

    def hold(self, version: Version) -> None:
        """Bring the tiles of a version to where they are answered, before the first query needs them there."""

    def evaluate(self, version: Version, queries: Sequence[EncryptedQuery]) -> tuple[list[EncryptedScores], int]:
        """Return the encrypted scores of each query, made for the version's plan, and the nanoseconds of CPU that all took together."""

    def workers(self) -> Workers:
        """Return how many there are; none where the caller's thread answers."""

    def close(self) -> None:
        """End what was started."""


class InProcess:
    """Answers in the caller's thread."""

    def hold(self, version: Version) -> None:
        """Do nothing: the tiles are here."""

    def evaluate(self, version: Version, queries: Sequence[EncryptedQuery]) -> tuple[list[EncryptedScores], int]:
        """As `Evaluator.evaluate`."""
        from protocol.evaluation import evaluate_many

        started = time.thread_time_ns()
        return evaluate_many(version.index, queries), time.thread_time_ns() - started

    def workers(self) -> Workers:
        """Return none."""
        return Workers(0, 0)

    def close(self) -> None:
        """Do nothing."""


def evaluator(workers: int | None, ray: str = "") -> Evaluator:
    """Return where a market answers.

    workers: how many; 0 for this process alone; None for as many as there are cores, as soon as the catalogue is large enough.
    ray: address of a Ray cluster, or "local" for one that is started here; "" for processes of this machine.
    Raises UsageError where Ray is not installed or does not answer, and for processes on a system that cannot share memory with them.
    """
    if ray:
        if workers == 0:
            raise UsageError("--workers 0: with --ray there are workers", hint="leave out one of the two")
        from market_node.shard_ray import RayCrew

        return Shards(RayCrew(ray, workers), LEAST_TILES if workers is None else 1)
    can_share = hasattr(os, "memfd_create")
    cores = len(os.sched_getaffinity(0)) if can_share else 1
    if workers == 0 or (workers is None and cores == 1):
        return InProcess()
    if not can_share:
        raise UsageError("--workers: this system has no anonymous shared memory", hint="--workers 0 answers in the market's process")
    from market_node.shard_process import ProcessCrew

    if workers is None:
        return Shards(ProcessCrew(min(cores, MOST_WORKERS)), LEAST_TILES)
    return Shards(ProcessCrew(workers), 1)


# --- what a kind of workers is made of -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The answers of a range of tiles, (queries, tiles, tile_bytes), and the nanoseconds of CPU that they took."""

    answers: NDArray[np.uint8]
    cpu_ns: int


@dataclass(frozen=True, slots=True, eq=False)
class Steps:
    """What every worker needs of the queries of a pass, computed once."""

    baby: NDArray[np.uint64]  # protocol.evaluation.steps_shape
    giant_keys: NDArray[np.float64]  # (queries, 2 polynomials, 2 limbs, degree)
    shared: Any  # how the workers of a crew find both


class Worker(ABC):
    """One that answers ranges of tiles; raises WorkerLost at any call once it is gone."""

    def __init__(self) -> None:
        self._holding = threading.Lock()
        self._held: OrderedDict[bytes, frozenset[bytes]] = OrderedDict()  # digests of tiles by version

    def hold(self, version: Version, places: range) -> None:
        """Give the worker what it lacks of these tiles, and let it forget what no version uses that was held lately."""
        tiles = version.index.tiles[places.start : places.stop]
        with self._holding:
            known = frozenset().union(*self._held.values())
            for tile, file in zip(tiles, version.files[places.start : places.stop], strict=True):
                if tile.digest not in known:
                    self.give(tile, file)
            self._held[version.digest] = self._held.pop(version.digest, frozenset()) | {tile.digest for tile in tiles}
            old = frozenset[bytes]()
            while len(self._held) > VERSIONS_KEPT:
                old |= self._held.popitem(last=False)[1]
            if gone := old.difference(*self._held.values()):
                self.forget(sorted(gone))

    def answer(self, steps: Steps, version: Version, places: range, patience_s: float) -> Part:
        """Return the answers of these tiles of a version; give it those that it lacks first."""
        wanted = [tile.digest for tile in version.index.tiles[places.start : places.stop]]
        for _ in range(2):
            if not self._held.get(version.digest, frozenset()).issuperset(wanted):
                self.hold(version, places)
            part = self.ask(steps, version, places, patience_s)
            if part is not None:
                return part
            with self._holding:
                self._held.clear()  # it knows better what it has
        raise WorkerLost("it lacks tiles that it was given")

    @abstractmethod
    def give(self, tile: EncodedTile, file: Path | None) -> None:
        """Let the worker have a tile, which lies in a file if one is named."""

    @abstractmethod
    def forget(self, digests: Sequence[bytes]) -> None:
        """Let the worker drop tiles."""

    @abstractmethod
    def ask(self, steps: Steps, version: Version, places: range, patience_s: float) -> Part | None:
        """Return its answers, or None if it lacks one of the tiles."""

    @abstractmethod
    def close(self) -> None:
        """End the worker, whatever it is doing."""


class Crew(ABC):
    """A kind of workers: how many there should be, how one is started, and how the steps of a pass reach all of them."""

    size: int

    @abstractmethod
    def start(self, place: int) -> Worker:
        """Return a worker that is ready; raise WorkerLost if it does not come up."""

    @abstractmethod
    def room(self, plan: MatchPlan, queries: int) -> Steps:
        """Return empty arrays for the steps of so many queries; those of the pass before may be the same memory."""

    @abstractmethod
    def ship(self, steps: Steps) -> Steps:
        """Return the steps, now that they are computed, as workers can read them."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, and those that are being started."""


# --- the front -------------------------------------------------------------------------------------------------------


class Shards:
    """Answers by a crew; catalogues of less than `least_tiles` tiles in the caller's thread."""

    def __init__(self, crew: Crew, least_tiles: int) -> None:
        self._crew, self._least_tiles, self._here = crew, least_tiles, InProcess()
        self._workers: list[Worker | None] = [None] * crew.size
        self._passing, self._changing = threading.Lock(), threading.Lock()
        self._threads = ThreadPoolExecutor(crew.size, "shard")
        self._keeper = threading.Thread(target=self._keep, name="shard-keeper", daemon=True)
        self._wanted, self._closing = threading.Event(), False
        self._due, self._pause = [0.0] * crew.size, [0.0] * crew.size
        self._newest: Version | None = None
        self._lost = 0

    def hold(self, version: Version) -> None:
        """As `Evaluator.hold`; the first version that is large enough lets the workers be started."""
        if version.index.plan.tiles < self._least_tiles:
            return
        self._newest = version
        with self._changing:
            if self._keeper.ident is None and not self._closing:
                self._keeper.start()
        for place, places in enumerate(self._ranges(version)):
            worker = self._workers[place]
            if worker is not None:
                try:
                    worker.hold(version, places)
                except WorkerLost as lost:
                    self._lose(place, worker, lost)

    def evaluate(self, version: Version, queries: Sequence[EncryptedQuery]) -> tuple[list[EncryptedScores], int]:
        """As `Evaluator.evaluate`."""
        if not queries or not any(self._workers) or version.index.plan.tiles < self._least_tiles:
            return self._here.evaluate(version, queries)
        from protocol.encryption import EncryptedScores

        plan, started = version.index.plan, time.thread_time_ns()
        with self._passing:
            steps = self._crew.room(plan, len(queries))
            cpu_ns = sum(self._threads.map(lambda q: _compute_steps(queries[q], steps, q), range(len(queries))))
            steps = self._crew.ship(steps)
            ranges = self._ranges(version)
            parts = list(self._threads.map(lambda place: self._part(place, steps, version, ranges[place]), range(len(ranges))))
            scores = [EncryptedScores(plan, b"".join([part.answers[q].data for part in parts])) for q in range(len(queries))]
        return scores, cpu_ns + sum(part.cpu_ns for part in parts) + time.thread_time_ns() - started

    def workers(self) -> Workers:
        """As `Evaluator.workers`."""
        return Workers(sum(worker is not None for worker in self._workers), self._lost)

    def close(self) -> None:
        """End the workers; a pass that is under way is finished by the front."""
        with self._changing:
            self._closing = True
        self._wanted.set()
        self._crew.close()
        if self._keeper.ident is not None:
            self._keeper.join()
        self._threads.shutdown()

    def _ranges(self, version: Version) -> list[range]:
        """Return which tiles each worker answers: equal shares in order, some empty where there are fewer tiles than workers."""
        tiles, size = version.index.plan.tiles, self._crew.size
        return [range(tiles * place // size, tiles * (place + 1) // size) for place in range(size)]

    def _part(self, place: int, steps: Steps, version: Version, places: range) -> Part:
        plan, worker = version.index.plan, self._workers[place]
        if worker is not None and places:
            modelled_s = plan.cost_ns * len(steps.baby) * len(places) / plan.tiles / 1e9
            try:
                part = worker.answer(steps, version, places, max(PATIENCE_S, PATIENCE * modelled_s))
            except WorkerLost as lost:
                self._lose(place, worker, lost)
            else:
                self._pause[place] = 0.0
                return part
        return answer_part(steps, version, places)

    def _lose(self, place: int, worker: Worker, lost: WorkerLost) -> None:
        """Take a worker out of service and have another one started."""
        worker.close()  # before anything else: one that is only slow would write into the room of the next pass
        with self._changing:
            if self._workers[place] is not worker:
                return
            self._workers[place] = None
            if self._closing:
                return
            self._lost += 1
            self._later(place)
        tell(WorkerEnded(place, where(lost.__traceback__)))
        self._wanted.set()

    def _later(self, place: int) -> None:
        self._due[place] = time.monotonic() + self._pause[place]
        self._pause[place] = min(max(2 * self._pause[place], FIRST_PAUSE_S), LONGEST_PAUSE_S)

    def _keep(self) -> None:
        """Start a worker wherever there is none, until the end."""
        while not self._closing:
            missing = [place for place, worker in enumerate(self._workers) if worker is None]
            for place in missing:
                if time.monotonic() >= self._due[place] and not self._closing:
                    self._start(place)
            waiting = [self._due[place] for place, worker in enumerate(self._workers) if worker is None]
            self._wanted.wait(max(0.0, min(waiting) - time.monotonic()) if waiting else None)
            self._wanted.clear()

    def _start(self, place: int) -> None:
        try:
            worker = self._crew.start(place)
        except (WorkerLost, OSError) as error:  # no memory or no process left, say: queries are answered here meanwhile
            with self._changing:
                self._later(place)
            if not self._closing:
                tell(WorkerNotStarted(place, kind_of(error), where(error.__traceback__)))
            return
        version = self._newest
        try:
            if version is not None:
                worker.hold(version, self._ranges(version)[place])
        except WorkerLost:
            pass  # the first query that asks it finds out
        with self._changing:
            self._workers[place] = worker


def answer_part(steps: Steps, version: Version, places: range) -> Part:
    """Return the answers of a range of tiles, computed here."""
    from protocol.evaluation import answer_tiles

    plan, started = version.index.plan, time.thread_time_ns()
    answers = np.empty((len(steps.baby), len(places), plan.parameters.tile_bytes), np.uint8)
    tiles = [tile.diagonals for tile in version.index.tiles[places.start : places.stop]]
    answer_tiles(plan, tiles, steps.baby, steps.giant_keys, answers)
    return Part(answers, time.thread_time_ns() - started)


def _compute_steps(query: EncryptedQuery, steps: Steps, q: int) -> int:
    """Write the steps of one query, and return the nanoseconds of CPU that they took."""
    from protocol.evaluation import baby_steps

    started = time.thread_time_ns()
    opened = query.opened()
    steps.giant_keys[q] = opened.keys[1]
    baby_steps(query.plan, [opened], out=steps.baby[q : q + 1])
    return time.thread_time_ns() - started
