"""What workers are worth: memory, encoding, CPU and throughput of encrypted queries by one and by two of them.

    python -m tests.bench.shards --rows 1000000 [--out FILE]

Synthetic unit rows in the dimension of the shipped map, encoded tile by tile into files as a market does; queries encrypted beforehand,
eight in a pass, parsed but not opened.  The ways of answering take turns, in one order for a round; one worker is the first of the two.
Ratios are medians over rounds of what one round gave, so that other work on the machine, while it lasts longer than a round, cancels.
Where it does not, `path_ms` says what a pass takes on cores of its own: CPU of the front, one query after the other, and of the slowest
part.  Memory is proportional (Pss): a page that several processes map counts once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from market_node.index import TileFolder, Version
from market_node.shards import Crew, Evaluator, InProcess, Shards, Steps, Worker, evaluator
from protocol.catalogue import EMPTY_CATALOGUE
from protocol.encryption import EncryptedQuery, MatchPlan, QueryKey
from protocol.evaluation import EncodedIndex
from protocol.proof import index_digest
from tests.bench.matching import machine, unit_rows
from tests.patient_ray import patient

DIMENSION = 96  # of kme-lin-96
A_PASS = 8  # as market_node.service.QUERIES_A_PASS
WORKERS = 2


class Alone(Crew):
    """The first worker of a front, by itself."""

    def __init__(self, front: Shards) -> None:
        self._front, self.size = front, 1

    def start(self, place: int) -> Worker:
        """Return it."""
        worker = self._front._workers[place]
        assert worker is not None
        return worker

    def room(self, plan: MatchPlan, queries: int) -> Steps:
        """As the front's crew."""
        return self._front._crew.room(plan, queries)

    def ship(self, steps: Steps) -> Steps:
        """As the front's crew."""
        return self._front._crew.ship(steps)

    def close(self) -> None:
        """Leave it to the front."""


def encoded(rows: int, folder: Path) -> tuple[Version, dict[str, float]]:
    """Return an index of synthetic rows whose full tiles lie in files, and what encoding it took."""
    plan, files = MatchPlan.build(rows, DIMENSION), TileFolder(folder)
    tiles, paths, cpu_s, wall_s = [], list[Path | None](), 0.0, 0.0
    for start in range(0, rows, plan.rows_per_tile):
        matrix = unit_rows(min(plan.rows_per_tile, rows - start), DIMENSION, start)
        cpu, wall = time.process_time(), time.perf_counter()
        tile = EncodedIndex.build(matrix, replace(plan, rows=len(matrix))).tiles[0]
        cpu_s, wall_s = cpu_s + time.process_time() - cpu, wall_s + time.perf_counter() - wall
        full = len(matrix) == plan.rows_per_tile
        tiles.append(files.keep(str(start), tile) if full else tile)
        paths.append(files.path(str(start)) if full else None)
    index = EncodedIndex(plan, tuple(tiles))
    return Version(EMPTY_CATALOGUE, index, index_digest(index), tuple(paths)), {"cpu_s": round(cpu_s, 2), "wall_s": round(wall_s, 2)}


def memory_mb(process: int | str, field: str = "Pss") -> int:
    """Return the memory of a process of this machine."""
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) // 1000
    raise RuntimeError(f"no {field} in smaps_rollup")


def recorded_parts(front: Evaluator) -> list[int]:
    """Return the list in which from now on the front's parts write their nanoseconds of CPU."""
    parts: list[int] = []
    if isinstance(front, Shards):
        honest = front._part

        def part(*what: Any) -> Any:
            answered = honest(*what)
            parts.append(answered.cpu_ns)
            return answered

        front._part = part  # type: ignore[method-assign]
    return parts


def settled(front: Shards, version: Version) -> Shards:
    """Return a front whose workers are up and have the tiles."""
    front.hold(version)
    while front.workers().answering < front._crew.size:
        time.sleep(0.1)
    return front


def measured(rows: int, rounds: int, ray: str, stack: ExitStack) -> dict[str, Any]:
    """Return everything for one size of catalogue."""
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    version, encoding = encoded(rows, Path(folder))
    plan = version.index.plan
    queries = [
        EncryptedQuery.from_bytes(QueryKey.fresh(plan).encrypt(unit_rows(1, DIMENSION, q)[0]).to_bytes(), plan) for q in range(A_PASS)
    ]
    fronts: dict[str, Evaluator] = {"in process": InProcess()}
    for kind, address in {"processes": "", **({"ray": ray} if ray else {})}.items():
        with patient() if address else nullcontext():
            two = evaluator(WORKERS, address)
        assert isinstance(two, Shards)
        stack.enter_context(closing(two))
        fronts[f"{kind}, 2"] = settled(two, version)
        one = Shards(Alone(two), 1)
        stack.callback(one.close)
        fronts[f"{kind}, 1"] = settled(one, version)
    passes: dict[str, Callable[[], tuple[list[bytes], int, int]]] = {}
    for name, front in fronts.items():
        parts = recorded_parts(front)
        for count in (1, A_PASS):

            def ask(front: Evaluator = front, count: int = count, parts: list[int] = parts) -> tuple[list[bytes], int, int]:
                parts.clear()
                scores, cpu_ns = front.evaluate(version, queries[:count])
                return [one.to_bytes() for one in scores], cpu_ns, cpu_ns - sum(parts) + max(parts, default=0)

            passes[f"{name}: {count}"] = ask
    right = passes[f"in process: {A_PASS}"]()[0]
    for name, ask in passes.items():
        got, _, _ = ask()
        assert got == right[: len(got)], f"{name}: other bytes"
    seen: dict[str, list[tuple[float, ...]]] = {name: [] for name in passes}
    load = [os.getloadavg()[0]]
    for _ in range(rounds):
        for name, ask in passes.items():
            started = time.perf_counter()
            got, cpu_ns, path_ns = ask()
            wall_ms = 1e3 * (time.perf_counter() - started)
            seen[name].append(tuple(spent / len(got) for spent in (wall_ms, cpu_ns / 1e6, path_ns / 1e6)))
        load.append(os.getloadavg()[0])
    ways = {
        name: {
            label: round(statistics.median(each), 2)
            for label, each in zip(("wall_ms", "cpu_ms", "path_ms"), zip(*times, strict=True), strict=True)
        }
        for name, times in seen.items()
    }
    gains = {}
    for kind in ("processes", "ray") if ray else ("processes",):
        for count in (1, A_PASS):
            pairs = list(zip(seen[f"{kind}, 1: {count}"], seen[f"{kind}, 2: {count}"], strict=True))
            for label, which in (("wall", 0), ("path", 2)):
                gains[f"{kind}: {count}, {label}"] = sorted(round(one[which] / two[which], 2) for one, two in pairs)
    workers = [worker.pid for name, front in fronts.items() if name.endswith(", 2") for worker in front._workers]  # type: ignore[attr-defined]
    return {
        "rows": rows, "dimension": DIMENSION, "rounds": rounds, "load_of_the_machine": sorted(load), "encoding": encoding,
        "plan": {"tiles": plan.tiles, "baby": plan.baby, "giant": plan.giant, "rows_per_tile": plan.rows_per_tile},
        "tiles_mb": round(sum(tile.diagonals.nbytes for tile in version.index.tiles) / 1e6),
        "memory_mb": {"front": memory_mb("self"), "workers": [memory_mb(pid) for pid in workers]},
        "unshared_mb": {"front": memory_mb("self", "Private_Dirty"), "workers": [memory_mb(pid, "Private_Dirty") for pid in workers]},
        "bytes_down": plan.answer_bytes, "a_query": ways,
        "gain_of_two": {name: {"median": statistics.median(each), "rounds": each} for name, each in gains.items()},
    }  # fmt: skip


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ray", default="local" if importlib.util.find_spec("ray") else "", help="address of a cluster; '' leaves Ray out")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    arguments = parser.parse_args()
    cells = []
    for rows in arguments.rows:
        with ExitStack() as stack:
            cells.append(measured(rows, arguments.rounds, arguments.ray, stack))
            sys.stderr.write(f"{rows}: {json.dumps(cells[-1]['gain_of_two'])}\n")
    result = {
        "schema": "veilmart.bench.shards/1", "command": f"python -m tests.bench.shards --rows {' '.join(map(str, arguments.rows))}",
        "machine": machine(), "cells": cells,
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
