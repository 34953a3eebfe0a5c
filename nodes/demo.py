"""`veilmart demo`: the whole story on one machine, on texts that the project makes up itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.console import print_lines, print_table
from nodes.demo_texts import demo_tasks, generate
from nodes.guard import Progress, ignore_progress
from nodes.simulate import NO_GUARANTEE, Settings, adapter_path, simulate
from protocol.features import FeatureMap

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

TRAINING_RECORDS, TEST_RECORDS = 120, 60
QUERY_SIZE, LOSS_RECORDS = 40, 24


def write_demo_data(folder: Path) -> Path:
    """Write the records of the six owners as TASK/train.jsonl and TASK/test.jsonl; return the folder."""
    for task in demo_tasks():
        for split, count in (("train", TRAINING_RECORDS), ("test", TEST_RECORDS)):
            path = folder / task.name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            records = generate(task.name, count, "train" if split == "train" else "test")
            lines = [json.dumps({"prompt": record.prompt, "response": record.response}) for record in records]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def run_demo(home: Path, model: BaseModel, feature_map: FeatureMap, on_progress: Progress = ignore_progress) -> dict[str, Any]:
    """Return the result of the demo (schema veilmart.demo/1): a simulation, and one question answered by base and specialist."""
    from nodes.adapter import Adapter
    from nodes.finetune import Recipe

    folder = home / "demo"
    if folder.exists():
        shutil.rmtree(folder)  # the owners of an earlier demo are as made up as their records
    data = write_demo_data(folder / "data")
    settings = Settings(
        data=data, out=folder / "run", tasks=tuple(task.name for task in demo_tasks()), query_size=QUERY_SIZE, queries=1,
        epsilon_spec=1.0, recipe=Recipe(), test_records=LOSS_RECORDS, query_pool=TEST_RECORDS,
    )  # fmt: skip
    result = simulate(settings, model, feature_map, on_progress)
    asked = demo_tasks()[0]
    chosen = next(query["chosen"] for query in result["queries"] if query["task"] == asked.name)
    on_progress("answer", 0, 1)
    adapter = Adapter.from_bytes(adapter_path(settings.out, chosen, result).read_bytes(), base_model=model.model_id)
    answer = {
        "task": asked.name,
        "chosen": chosen,
        "question": asked.question,
        "base": model.generate(asked.question, None, 48),
        "specialist": model.generate(asked.question, adapter, 48),
    }
    on_progress("answer", 1, 1)
    return {**result, "schema": "veilmart.demo/1", "answer": answer, "run": str(settings.out)}


def print_result(result: Mapping[str, Any], out: Path) -> None:
    """Print a simulation's result for people."""
    _print_table_of_tasks(result)
    bytes_sent, bytes_received = result["bytes"]["sent"], result["bytes"]["received"]
    abstained = {kind: share for kind, share in result["abstained"].items() if share is not None}
    lines = [
        f"right owner first: {_percent(result['top1'])}, among the first three: {_percent(result['top3'])} of {len(result['queries'])} queries",
        "no match reported: " + ", ".join(f"{kind} {_percent(share)}" for kind, share in abstained.items()),
        f"adapter guarantee: {result['adapter_guarantee']}",
        f"left out (the map was fitted on them): {', '.join(result['public_tasks_left_out']) or 'none'}",
        f"CPU seconds: {', '.join(f'{stage} {seconds}' for stage, seconds in result['cpu_seconds'].items())}",
        f"bytes sent: {_counts(bytes_sent)}; received: {_counts(bytes_received)}",
        f"wall {result['wall_seconds']} s, run folder {out}",
    ]
    print_lines(*lines)


def print_demo(result: Mapping[str, Any]) -> None:
    """Print the demo's table, and the two answers side by side."""
    _print_table_of_tasks(result)
    answer = result["answer"]
    server = result["server_cpu_ms_per_query"]
    lines = [
        "losses: nats per response token on held-out records; lower is better",
        f"adapter guarantee: {NO_GUARANTEE}",
        f"matching: {result['matching']}" + (f", {server:.1f} ms of market CPU a query" if server is not None else ""),
        "",
        f"question ({answer['task']}): {answer['question']}",
        f"  base model:             {' '.join(answer['base'].split())}",
        f"  {answer['chosen']} (chosen):  {' '.join(answer['specialist'].split())}",
        "",
        f"wall {result['wall_seconds']} s; everything is under {result['run']}",
    ]
    print_lines(*lines)


def _print_table_of_tasks(result: Mapping[str, Any]) -> None:
    owners = {owner["task"]: owner for owner in result["owners"]}
    first: dict[str, Any] = {}
    for query in result["queries"]:
        first.setdefault(query["task"], query)
    rows = []
    for task, query in first.items():
        loss, owner = result["losses"].get(task), owners[query["chosen"]]
        losses = [f"{loss[name]:.2f}" for name in ("base", "chosen", "oracle")] if loss else ["-", "-", "-"]
        epsilon_adapter = owner["epsilon_adapter"] or "-"
        rows.append([task, query["chosen"], f"{query['llr']:.1f} ± {query['std']:.1f}", *losses, f"{owner['epsilon_spec']:g}", epsilon_adapter])
    columns = ["task", "chosen learnware", "score", "loss base", "chosen", "best possible", "epsilon specification", "epsilon adapter"]
    print_table(columns, rows)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or "none"
