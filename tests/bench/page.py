"""Measure what visitors of the page cost those who match: encrypted queries without visitors, with them, without, with them.

    python -m tests.bench.page [--releases N] [--queries N] [--json]

The market is `veilmart market up` with its page, in processes of their own on loopback.  Visitors ask back to back, VISITORS at a time, for
the pages that cost most; a querier asks one encrypted query after the other.  All of it shares the cores of one machine, so that what the
visitors' own client takes is in the figures as well.  Also the CPU time of a first screen.  About a minute of CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from nodes.market_client import MarketClient
from protocol.encryption import MatchPlan, QueryKey
from protocol.scoring import sketch_of
from tests.bench.market import MAP, fill
from tests.bench.matching import machine
from tests.bench.relay import quantiles
from tests.e2e.processes import cpu_of, market_process, settle
from tests.e2e.test_page_process import page_of, read
from tests.protocol.worlds import features

VISITORS = 2
PAGES = ("", "map", "?q=owner-1&sort=records", "map?epsilon=1", "log")


class Visitors:
    """Threads that look at pages back to back while this is entered."""

    def __init__(self, base: str) -> None:
        self._base, self._stop, self.looked = base, threading.Event(), 0
        self._threads = [threading.Thread(target=self._look, daemon=True) for _ in range(VISITORS)]

    def __enter__(self) -> Visitors:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            for path in PAGES:
                with urllib.request.urlopen(self._base + path, timeout=120) as answer:
                    answer.read()
                self.looked += 1


def measured(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Return the figures at a market with so many releases."""
    fill(folder / "home" / "market", rows)
    sketch = sketch_of(features(40, 3, MAP.dimension), MAP, 2)
    with market_process(folder / "home", page="0") as (started, process):
        base = started["page"]
        with MarketClient(started["address"], Path(started["ca"]), folder / "q") as client:
            head, plan = client.sync(MAP).head, MatchPlan.build(rows, MAP.dimension)

            def queries() -> list[float]:
                took = []
                for _ in range(count):
                    query = QueryKey.fresh(plan).encrypt(sketch.centred_mean).to_bytes()
                    began = time.perf_counter()
                    client.match(MAP.map_id, head, query, plan.answer_bytes)
                    took.append(time.perf_counter() - began)
                return took

            while read(base + "healthz")[0] != 200:
                time.sleep(1.0)
            for path in PAGES:
                read(base + path)
            settle(process.pid)
            queries()  # the index is built and the kernels are compiled
            page = page_of(process.pid)
            before = cpu_of(page)
            for _ in range(20):
                read(base)
            screen = (cpu_of(page) - before) / 20
            runs: dict[str, list[list[float]]] = {"without": [], "with": []}
            looked = 0
            for _ in range(2):
                runs["without"].append(queries())
                with Visitors(base) as visitors:
                    runs["with"].append(queries())
                looked += visitors.looked
    found = {name: [quantiles(run) for run in both] for name, both in runs.items()}
    together = {name: quantiles([second for run in both for second in run]) for name, both in runs.items()}
    return {
        "schema": "veilmart.bench.page/1", "machine": machine(), "releases": rows, "queries_a_run": count, "visitors": VISITORS,
        "pages_looked_at": looked, "first_screen_cpu_ms": round(1e3 * screen, 1), "runs": found, "together": together,
        "p99_ratio": round(together["with"]["p99_ms"] / together["without"]["p99_ms"], 2),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), asked.releases, asked.queries)
    print(json.dumps(result, indent=1) if asked.json else "\n".join(f"{name} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
