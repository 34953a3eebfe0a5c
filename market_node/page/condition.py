"""Whether the market serves, and how it fares: its own health call, and the counts that it keeps for its operator."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from market_node.metrics import COUNTS
from market_node.server import ADDRESS
from protocol.errors import NotFound, VeilmartError
from protocol.health import require_serving

ASK_S = 10.0  # however many look, the market is asked no more often, and nobody sees its load move from one call to the next
OLD_S = 60.0  # counts of a market that is gone


def address_of(home: Path) -> str:
    """Return where a market on this machine is reached; "" where none was started."""
    path = home / ADDRESS
    address = path.read_text().strip() if path.exists() else ""
    for everywhere, here in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        address = here + address.removeprefix(everywhere) if address.startswith(everywhere) else address
    return address


def counts_text(home: Path) -> str:
    """Return what the market counted, as Prometheus reads it; "" where it has not written anything lately."""
    path = home / COUNTS
    try:
        return path.read_text() if time.time() - path.stat().st_mtime < OLD_S else ""
    except OSError:
        return ""


class Condition:
    """What is known of a market beside its database; for any thread."""

    def __init__(self, home: Path, timeout_s: float = 2.0) -> None:
        self._home, self._timeout_s = home, timeout_s
        self._lock, self._asked, self._told = threading.Lock(), -math.inf, dict[str, Any]()

    def now(self) -> dict[str, Any]:
        """Return whether the market serves and what it counted, as a JSON value, as of at most ASK_S ago."""
        with self._lock:
            if time.monotonic() - self._asked >= ASK_S:
                self._told = {**self._serving(), **read_counts(counts_text(self._home))}
                self._asked = time.monotonic()
            return self._told

    def _serving(self) -> dict[str, Any]:
        address = address_of(self._home)
        if not address:
            return {"serving": False, "why": NotFound.code, "milliseconds": None}
        try:
            answer = require_serving(address, self._home / "ca.crt", self._timeout_s)
        except VeilmartError as error:
            return {"serving": False, "why": error.code, "milliseconds": None}
        return {"serving": True, "why": "", "milliseconds": round(1e3 * answer.seconds, 1)}


def read_counts(text: str) -> dict[str, Any]:
    """Return calls with their outcomes and how long they took, and what is held, from what Prometheus would read.

    A time is the upper end of the bucket that holds the median, or 95 of 100 calls; None where that bucket has no end.
    """
    buckets: dict[str, list[tuple[float, float]]] = defaultdict(list)
    outcomes: dict[str, dict[str, int]] = defaultdict(dict)
    held: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "veilmart_call_seconds_bucket":
                buckets[sample.labels["call"]].append((float(sample.labels["le"]), sample.value))
            elif sample.name == "veilmart_calls_total" and sample.value:
                outcomes[sample.labels["call"]][sample.labels["outcome"]] = int(sample.value)
            elif not sample.labels:
                held[sample.name] = sample.value
    calls = [
        {
            "call": call, "ok": counted.get("OK", 0), "other": sum(counted.values()) - counted.get("OK", 0),
            "p50_ms": _quantile(buckets[call], 0.5), "p95_ms": _quantile(buckets[call], 0.95),
        }
        for call, counted in sorted(outcomes.items())
    ]  # fmt: skip
    names = {"queries": "veilmart_queries", "uploads": "veilmart_uploads", "unsent_bytes": "veilmart_unsent_bytes"}
    found = {name: int(held[metric]) if metric in held else None for name, metric in names.items()}
    return {"counted": bool(text), "calls": calls, **found, "started": held.get("process_start_time_seconds")}


def _quantile(buckets: list[tuple[float, float]], share: float) -> float | None:
    ordered = sorted(buckets)
    whole = ordered[-1][1] if ordered else 0.0
    end = next((end for end, below in ordered if whole and below >= share * whole), math.inf)
    return 1e3 * end if math.isfinite(end) else None
