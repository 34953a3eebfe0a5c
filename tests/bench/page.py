"""Measure what visitors of the page cost those who match: encrypted queries without visitors, with them, without, with them.

    python -m tests.bench.page [--releases N] [--queries N] [--json]

The market is `veilmart market up` with its page, in processes of their own on loopback.  Visitors ask back to back, VISITORS at a time, for
the pages that cost most, from a process of lower priority, since they would be elsewhere; a querier asks one encrypted query after the
other.  All of it shares the cores of one machine.  Also the CPU time of a first screen.  About a minute of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
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


def visit(base: str) -> None:
    """Be a process of visitors: look at pages back to back until standard input ends, then print how many were seen."""
    os.nice(10)  # visitors come from elsewhere: what they compute is not to be taken from who is measured
    looked, stop = [0] * VISITORS, threading.Event()

    def look(number: int) -> None:
        while not stop.is_set():
            for path in PAGES:
                with urllib.request.urlopen(base + path, timeout=120) as answer:
                    answer.read()
                looked[number] += 1

    threads = [threading.Thread(target=look, args=(number,), daemon=True) for number in range(VISITORS)]
    for thread in threads:
        thread.start()
    while not all(looked):
        time.sleep(0.05)
    print("looking", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    print(sum(looked))


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
                words = [sys.executable, "-m", "tests.bench.page", "--visit", base]
                visitors = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                assert visitors.stdout is not None
                visitors.stdout.readline()
                runs["with"].append(queries())
                looked += int(visitors.communicate()[0])
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
    parser.add_argument("--visit", metavar="ADDRESS", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.visit:
        visit(asked.visit)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measured(Path(folder), asked.releases, asked.queries)
    print(json.dumps(result, indent=1) if asked.json else "\n".join(f"{name} {value}" for name, value in result.items()))


if __name__ == "__main__":
    main()
