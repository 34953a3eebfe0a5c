"""What processes hold while they run, looked at from outside; and whether it grows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import theilslopes

MEGABYTE = 1 << 20
BLOCKS = 24
CONFIDENCE = 0.95


class Held(NamedTuple):
    """What one process holds at one moment."""

    at_s: float  # since the start of the run
    rss_mb: float
    anonymous_mb: float  # without what is mapped from files
    descriptors: int
    threads: int


class Slope(NamedTuple):
    """A growth an hour, with its interval."""

    an_hour: float
    low: float
    high: float


@dataclass
class Watch:
    """Samples of a process and all that it started, by name."""

    pid: int
    start: float  # by the monotonic clock
    samples: dict[str, list[Held]] = field(default_factory=dict)

    def look(self) -> None:
        """Take one sample of every process; one that ends meanwhile is left out."""
        for pid in family(self.pid):
            try:
                name, held = name_of(pid, self.pid), held_by(pid, time.monotonic() - self.start)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if held is not None:
                self.samples.setdefault(name, []).append(held)


def family(pid: int) -> list[int]:
    """Return a process and all that it started, and they."""
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def name_of(pid: int, root: int) -> str:
    """Return what a process of a market is: the market, its page, or another by the module that it runs."""
    if pid == root:
        return "market"
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    module = words[words.index(b"-m") + 1].decode() if b"-m" in words else "other"
    return "page" if module == "market_node.page" else module


def held_by(pid: int, at_s: float) -> Held | None:
    """Return what a process holds now; None for one that has ended and was not waited for."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    if "VmRSS" not in status:
        return None
    rss, anonymous = (int(status[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
    return Held(round(at_s, 2), round(rss, 3), round(anonymous, 3), len(list(Path(f"/proc/{pid}/fd").iterdir())), int(status["Threads"]))


def growth(at_s: Sequence[float], values: Sequence[float], blocks: int = BLOCKS) -> Slope:
    """Return by how much values grow in an hour: Theil and Sen's median of slopes, with its interval, between medians of equal blocks.

    Neighbouring samples tell nearly the same, and the interval of a rank test that counts them all would be too narrow: medians of blocks
    are what is compared.  Source: Sen 1968; scipy.stats.theilslopes.
    """
    blocks = min(blocks, len(values) // 3)
    if blocks < 4:
        raise ValueError(f"growth: expected at least 12 samples, got {len(values)}")
    times = [float(np.median(part)) for part in np.array_split(np.asarray(at_s, float), blocks)]
    medians = [float(np.median(part)) for part in np.array_split(np.asarray(values, float), blocks)]
    slope, _, low, high = theilslopes(medians, times, CONFIDENCE)
    return Slope(3600 * float(slope), 3600 * float(low), 3600 * float(high))


def between(samples: Sequence[Held], begin_s: float, end_s: float) -> list[Held]:
    """Return the samples of a time."""
    return [one for one in samples if begin_s <= one.at_s < end_s]


def thinned(samples: Sequence[Held], most: int) -> list[Held]:
    """Return at most so many samples, evenly spread."""
    picked: NDArray[np.intp] = np.unique(np.linspace(0, len(samples) - 1, min(most, len(samples))).astype(int))
    return [samples[i] for i in picked]
