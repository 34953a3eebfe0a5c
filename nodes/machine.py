"""What this machine has to offer, and what a run took of it: cores, free memory, peak memory and CPU of all its processes.

Read from /proc, so a system without it gives no peaks; nothing else depends on them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SAMPLE_S = 0.5
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # how torch says it, on a CPU and on a GPU
PROC = Path("/proc")


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def out_of_memory_is(make: Callable[[], Exception]) -> Iterator[None]:
    """Raise `make()` in place of Python's and of torch's errors for memory that is not there: torch's are RuntimeErrors like any other."""
    try:
        yield
    except MemoryError:
        raise make() from None
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in NO_MEMORY):
            raise
        raise make() from None


def free_bytes() -> int | None:
    """Return how much memory may be taken, by the system and by the control group; None where nobody says."""
    found = [value for value in (_available(), _left_in_group()) if value is not None]
    return min(found) if found else None


def _available() -> int | None:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group() -> int | None:
    try:
        most, used = (Path("/sys/fs/cgroup", name).read_text().strip() for name in ("memory.max", "memory.current"))
        return int(most) - int(used)
    except (OSError, ValueError):  # no control group, or "max"
        return None


@dataclass(frozen=True, slots=True)
class Use:
    """What processes took: peaks of their proportional memory, and CPU seconds, by process."""

    peak_bytes: int  # of all together, at one time
    peak_bytes_each: dict[str, int]  # the largest of each kind of process
    cpu_s: float


class Watch:
    """Samples a process, everything it starts, and everything `also` finds, until it is left."""

    def __init__(self, also: Callable[[], set[int]] = set) -> None:
        self._also, self._ended = also, threading.Event()
        self._peak, self._each, self._cpu = 0, {}, {}  # type: ignore[var-annotated]
        self._thread = threading.Thread(target=self._sample_until_end, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._before = {pid: cpu_s(pid) for pid in family(os.getpid())}
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def use(self) -> Use:
        """Return what was taken so far."""
        self._sample()
        cpu = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu.items())
        return Use(self._peak, dict(self._each), cpu)

    def _sample_until_end(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        total = 0
        for pid in family(os.getpid()) | self._also():
            size, name = resident_bytes(pid), name_of(pid)
            total += size
            self._each[name] = max(self._each.get(name, 0), size)
            self._cpu[pid] = max(self._cpu.get(pid, 0.0), cpu_s(pid))
        self._peak = max(self._peak, total)


def family(root: int) -> set[int]:
    """Return a process and all its descendants that live."""
    parents: dict[int, int] = {}
    for entry in PROC.glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
    found, fresh = {root}, {root}
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found


def with_variable(name: str, value: str) -> set[int]:
    """Return the processes that were started with this environment variable: those that left the family of who started them."""
    wanted, found = f"{name}={value}".encode(), set()
    for entry in PROC.glob("[0-9]*/environ"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                found.add(int(entry.parent.name))
        except OSError:
            continue
    return found


def resident_bytes(pid: int) -> int:
    """Return the proportional set size of a process: pages that several share are counted once among them."""
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process with all its threads, user and system."""
    try:
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def name_of(pid: int) -> str:
    """Return what kind of process it is: the last part of its program, or of the module that Python runs."""
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    if pid == os.getpid():
        return "simulation"
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]
    named = [word for word in words if word and not word.startswith("-")]
    if len(named) > 1 and "python" in Path(named[0]).name:
        named = named[1:]
    return " ".join([Path(named[0]).name, *(["market"] if "market" in named else [])]) if named else "unknown"
