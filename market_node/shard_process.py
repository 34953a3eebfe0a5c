"""The front's end of workers that are processes of this machine; their own end is `market_node/shard_worker.py`."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from market_node.index import HEADER_BYTES, Version, open_tile
from market_node.shard_worker import DIGEST_BYTES, MOST_DIGESTS, REPLY, Kind, Outcome, plan_numbers, request, room_bytes, room_in
from market_node.shards import Crew, Part, Steps, Worker, WorkerLost
from protocol.adapter_check import KEPT_ENVIRONMENT

if TYPE_CHECKING:
    from protocol.encryption import MatchPlan
    from protocol.evaluation import EncodedTile

COMMAND: Sequence[str] = (sys.executable, "-m", "market_node.shard_worker")
# Where numba finds kernels that are compiled already, and which processor it compiles for.
ENVIRONMENT = (*KEPT_ENVIRONMENT, "HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
START_S = 120.0  # the first start on a machine compiles the kernels
GIVE_S = 10.0  # for a frame that asks for no arithmetic


def anonymous(size: int, data: memoryview | None = None) -> int:
    """Return a descriptor of shared memory of this size, which nobody can resize, nor write to if it has `data` from the start."""
    made = os.memfd_create("veilmart", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(made, size)
        # A worker that shrank it would end the market's process at its next look; one that wrote to a tile would answer for the others.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        if data is not None:
            written = 0
            while written < len(data):
                written += os.pwrite(made, data[written:], written)
            seals |= fcntl.F_SEAL_WRITE
        fcntl.fcntl(made, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(made)
        raise
    return made


class Memory:
    """What front and workers share in a pass, for as long as passes fit into it."""

    def __init__(self, size: int) -> None:
        self.file, self.size = anonymous(size), size
        self.mapped = mmap.mmap(self.file, size)

    def __del__(self) -> None:
        os.close(self.file)  # what is mapped goes with the last array in it


class ProcessCrew(Crew):
    """Processes of this machine."""

    def __init__(self, size: int, worker: Callable[[], ProcessWorker] | None = None) -> None:
        self.size, self._make = size, worker or ProcessWorker
        self._workers: set[ProcessWorker] = set()
        self._memory: Memory | None = None
        self._closing, self._closed = threading.Lock(), False

    def start(self, place: int) -> Worker:
        """As `Crew.start`."""
        with self._closing:
            if self._closed:
                raise WorkerLost("the market stops")
            worker = self._make()
            self._workers = {known for known in self._workers if known.alive()} | {worker}
        try:
            worker.wait_until_ready()
        except WorkerLost:
            worker.close()
            raise
        return worker

    def room(self, plan: MatchPlan, queries: int) -> Steps:
        """As `Crew.room`."""
        size = room_bytes(plan, queries, plan.tiles)
        if self._memory is None or self._memory.size < size:
            self._memory = None  # its memory first
            self._memory = Memory(size)
        room = room_in(self._memory.mapped, plan, queries, plan.tiles)
        return Steps(room.baby, room.giant_keys, self._memory)

    def ship(self, steps: Steps) -> Steps:
        """As `Crew.ship`: they were written where workers read."""
        return steps

    def close(self) -> None:
        """As `Crew.close`."""
        with self._closing:
            self._closed = True
            for worker in self._workers:
                worker.close()


class ProcessWorker(Worker):
    """One process, from its start to its end."""

    def __init__(self) -> None:
        super().__init__()
        self._exchanging = threading.Lock()
        self._memory: Memory | None = None  # what it was told of
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = self.launch(theirs)

    def launch(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """Start the process at the other end."""
        # In the folder that this very code lies in: a worker of another version would answer in other bytes.
        return subprocess.Popen(
            [*COMMAND, str(theirs.fileno())], pass_fds=(theirs.fileno(),), cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def alive(self) -> bool:
        """Return whether the process has not ended."""
        return self._process.poll() is None

    def wait_until_ready(self) -> None:
        """Return when it takes frames; raise WorkerLost if it ends or takes too long."""
        self._connection.settimeout(START_S)
        self._receive(bytes(DIGEST_BYTES))

    def give(self, tile: EncodedTile, file: Path | None) -> None:
        """As `Worker.give`."""
        opened = open_tile(file, tile) if file is not None else None
        offset = HEADER_BYTES if opened is not None else 0
        if opened is None:
            try:
                opened = anonymous(tile.diagonals.nbytes, tile.diagonals.reshape(-1).view("u1").data)
            except OSError:
                raise WorkerLost("there is no memory for a tile that it lacks") from None
        try:
            self._exchange(request(Kind.TILE, tile.digest, (offset, *tile.diagonals.shape)), tile.digest, GIVE_S, opened)
        finally:
            os.close(opened)

    def forget(self, digests: Sequence[bytes]) -> None:
        """As `Worker.forget`."""
        for at in range(0, len(digests), MOST_DIGESTS):
            self._exchange(request(Kind.FORGET, digests=digests[at : at + MOST_DIGESTS]), bytes(DIGEST_BYTES), GIVE_S)

    def ask(self, steps: Steps, version: Version, places: range, patience_s: float) -> Part | None:
        """As `Worker.ask`; the answers lie in the room, until the next pass."""
        memory, plan, queries = steps.shared, version.index.plan, len(steps.baby)
        if memory is not self._memory:
            self._exchange(request(Kind.ROOM, numbers=(memory.size,)), bytes(DIGEST_BYTES), GIVE_S, memory.file)
            self._memory = memory
        cpu_ns = 0
        for start in range(places.start, places.stop, MOST_DIGESTS):
            digests = [tile.digest for tile in version.index.tiles[start : min(start + MOST_DIGESTS, places.stop)]]
            numbers = (*plan_numbers(plan), queries, start, plan.tiles)
            outcome, spent = self._exchange(request(Kind.ANSWER, version.digest, numbers, digests), version.digest, patience_s)
            if outcome == Outcome.MISSING:
                return None
            cpu_ns += spent
        room = room_in(memory.mapped, plan, queries, plan.tiles)
        return Part(room.answers[:, places.start : places.stop], cpu_ns)

    def close(self) -> None:
        """As `Worker.close`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()  # from here on it writes to no room
        self._connection.close()

    def _exchange(self, frame: bytes, name: bytes, patience_s: float, file: int | None = None) -> tuple[int, int]:
        with self._exchanging:
            try:
                self._connection.settimeout(patience_s)
                socket.send_fds(self._connection, [frame], [] if file is None else [file])
            except OSError:
                raise WorkerLost("it takes no frame") from None
            return self._receive(name)

    def _receive(self, name: bytes) -> tuple[int, int]:
        try:
            frame = self._connection.recv(REPLY.size + 1)
        except OSError:  # nothing in time, or nobody there any more
            frame = b""
        if len(frame) != REPLY.size:
            raise WorkerLost("it ended, or said nothing in time")
        outcome, named, cpu_ns = REPLY.unpack(frame)
        if named != name:
            raise WorkerLost("it answered something else")
        return outcome, cpu_ns
