"""Results of simulations for people: one table and a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nodes.console import print_lines, print_table


def print_result(result: Mapping[str, Any], out: Path) -> None:
    """Print a simulation's result for people."""
    print_table_of_tasks(result)
    bytes_sent, bytes_received = result["bytes"]["sent"], result["bytes"]["received"]
    abstained = {kind: share for kind, share in result["abstained"].items() if share is not None}
    first, three = _percent(result["top1"]), _percent(result["top3"])
    lines = [
        f"right owner first: {first}, among the first three: {three} of {len(result['queries'])} queries",
        "no match reported: " + ", ".join(f"{kind} {_percent(share)}" for kind, share in abstained.items()),
        f"adapter guarantee: {result['adapter_guarantee']}",
        f"left out (the map was fitted on them): {', '.join(result['public_tasks_left_out']) or 'none'}",
        f"CPU seconds: {', '.join(f'{stage} {seconds}' for stage, seconds in result['cpu_seconds'].items())}",
        f"matching: {result['matching']}, market CPU a query: {_milliseconds(result['server_cpu_ms_per_query'])}",
        f"bytes sent: {_counts(bytes_sent)}; received: {_counts(bytes_received)}",
        f"peak memory {result['peak_memory_bytes'] / (1 << 30):.2f} GiB, CPU {result['cpu_seconds_all_processes']} s, of all processes",
        f"digest of all releases {result['digest']}"
        + ("" if result["simulated_noise"] else " (noise is fresh in every run without --seed)"),
        f"wall {result['wall_seconds']} s, run folder {out}",
    ]
    print_lines(*lines)


def print_table_of_tasks(result: Mapping[str, Any]) -> None:
    """Print task, chosen learnware, score, losses and both epsilons, a row a task."""
    owners = {owner["owner"]: owner for owner in result["owners"]}
    first: dict[str, Any] = {}
    for query in result["queries"]:
        first.setdefault(query["task"], query)
    rows = []
    for task, query in first.items():
        loss, owner = result["losses"].get(task), owners[query["chosen"]]
        losses = [_nats(loss[name]) for name in ("base", "chosen", "oracle")] if loss else ["-", "-", "-"]
        epsilon_adapter = owner["epsilon_adapter"] or "-"
        rows.append(
            [task, query["chosen"], f"{query['llr']:.1f} ± {query['std']:.1f}", *losses, f"{owner['epsilon_spec']:g}", epsilon_adapter]
        )
    columns = ["task", "chosen learnware", "score", "loss base", "chosen", "best possible", "epsilon specification", "epsilon adapter"]
    print_table(columns, rows)


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"
