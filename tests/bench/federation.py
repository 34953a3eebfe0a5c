"""Measure a simulated federation against a straight-line script, turn by turn, and write docs/results/federation.json.

    python -m tests.bench.federation --data ../shared/data --nodes 8 --records 20 --turns 2 --out docs/results/federation.json

Other parts of the file, such as that of Flower's deployment, are kept as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nodes.machine import cores


def run(*words: str) -> dict[str, Any]:
    """Run a Python module and return the JSON object that it prints."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def trained(data: Path, nodes: int, records: int, folder: Path) -> dict[str, Any]:
    """Return the result of a simulation with training and nothing that the straight line does not do."""
    started = time.monotonic()
    result = run(
        "nodes.command", "sim", "--engine", "grid", "--data", str(data), "--nodes", str(nodes), "--records", str(records), "--queries", "0",
        "--test-records", "0", "--seed", "1", "--out", str(folder), "--json", "-q",
    )  # fmt: skip
    return {**result, "command_wall_s": round(time.monotonic() - started, 2)}


def from_cache(data: Path, nodes: int, records: int, folder: Path) -> float:
    """Return the seconds of a command that makes specifications from embeddings that an earlier one left."""
    seconds = 0.0
    for turn in range(2):
        started = time.monotonic()
        run(
            "nodes.command", "sim", "--data", str(data), "--nodes", str(nodes), "--records", str(records), "--queries", "0", "--no-train",
            "--seed", "1", "--cache", str(folder / "cache"), "--out", str(folder / f"cached-{turn}"), "--json", "-q",
        )  # fmt: skip
        seconds = time.monotonic() - started
    return round(seconds, 2)


def main() -> None:
    """Run both in turns and write what they took."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--nodes", type=int, default=100)
    asked.add_argument("--records", type=int, default=20)
    asked.add_argument("--turns", type=int, default=2)
    asked.add_argument("--cached-nodes", type=int, default=100)
    asked.add_argument("--out", type=Path, default=Path("docs/results/federation.json"))
    options = asked.parse_args()
    lines, grids = [], []
    with tempfile.TemporaryDirectory(prefix="veilmart-") as folder:
        for turn in range(options.turns):
            words = ("--data", str(options.data), "--nodes", str(options.nodes), "--records", str(options.records))
            lines.append(run("tests.bench.straight_line", *words))
            grids.append(trained(options.data, options.nodes, options.records, Path(folder, f"trained-{turn}")))
        cached = from_cache(options.data, options.cached_nodes, options.records, Path(folder)) if options.cached_nodes else None
    campaign = [one["campaigns"][0] for one in grids]
    turns = list(zip(grids, lines, strict=True))
    words = " ".join(f"--{name} {getattr(options, name)}" for name in ("nodes", "records", "turns"))
    use = [
        {
            "wall_s": one["command_wall_s"], "owners_cpu_s": one["cpu_seconds"]["owners"],
            "market_cpu_s": one["cpu_seconds"]["market_process"], "all_processes_cpu_s": one["cpu_seconds_all_processes"],
            "peak_memory_bytes": one["peak_memory_bytes"], "digest": one["digest"],
        }
        for one in grids
    ]  # fmt: skip
    part = {
        "command": f"python -m tests.bench.federation {words}",
        "cores": cores(), "load_before": [round(load, 1) for load in os.getloadavg()],
        "nodes": options.nodes, "records": options.records,
        "straight_line": [{name: one[name] for name in ("wall_s", "owners_cpu_s", "peak_memory_bytes")} for one in lines],
        "simulation": use,
        "cpu_ratio": round(statistics.median(grid["cpu_seconds"]["owners"] / line["owners_cpu_s"] for grid, line in turns), 3),
        "wall_ratio": round(statistics.median(grid["command_wall_s"] / line["wall_s"] for grid, line in turns), 3),
        "message_ms": round(1000 * statistics.median(one["message_s"] / one["messages"] for one in campaign), 3),
        "messages": [one["messages"] for one in campaign],
        "memory_bytes_each": grids[0]["peak_memory_bytes_each"],
        "specifications_from_cache_s": {"nodes": options.cached_nodes, "wall": cached},
    }  # fmt: skip
    there = json.loads(options.out.read_text()) if options.out.exists() else {"schema": "veilmart.bench.federation/1"}
    options.out.write_text(json.dumps({**there, "grid": part}, indent=1) + "\n")


if __name__ == "__main__":
    main()
