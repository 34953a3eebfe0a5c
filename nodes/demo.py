"""`veilmart demo`: the whole story on one machine, on texts that the project makes up itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.console import print_lines
from nodes.demo_texts import demo_tasks, generate
from nodes.guard import Progress, ignore_progress
from nodes.report import print_table_of_tasks
from nodes.simulate import NO_GUARANTEE, Settings, adapter_path, simulate
from protocol.features import FeatureMap

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

TRAINING_RECORDS, TEST_RECORDS = 120, 60
QUERY_SIZE, LOSS_RECORDS = 40, 16
TRAINING_STEPS = 44  # of 4 records: 1.5 passes, so that six owners fit into two minutes on two cores


def write_demo_data(folder: Path) -> list[Path]:
    """Write the records of the six owners as TASK/train.jsonl and TASK/test.jsonl; return the files."""
    files = []
    for task in demo_tasks():
        for split, count in (("train", TRAINING_RECORDS), ("test", TEST_RECORDS)):
            path = folder / task.name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            records = generate(task.name, count, "train" if split == "train" else "test")
            lines = [json.dumps({"prompt": record.prompt, "response": record.response}) for record in records]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            files.append(path)
    return files


def run_demo(home: Path, model: BaseModel, feature_map: FeatureMap, on_progress: Progress = ignore_progress) -> dict[str, Any]:
    """Return the result of the demo (schema veilmart.demo/1): a simulation, and one question answered by base and specialist."""
    from nodes.adapter import Adapter
    from nodes.finetune import Recipe

    folder = home / "demo"
    if folder.exists():
        shutil.rmtree(folder)  # the owners of an earlier demo are as made up as their records
    write_demo_data(folder / "data")
    settings = Settings(
        data=folder / "data", out=folder / "run", tasks=tuple(task.name for task in demo_tasks()), query_size=QUERY_SIZE, queries=1,
        epsilon_spec=1.0, recipe=Recipe(max_steps=TRAINING_STEPS), test_records=LOSS_RECORDS, query_pool=TEST_RECORDS,
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


def print_demo(result: Mapping[str, Any]) -> None:
    """Print the demo's table, and the two answers side by side."""
    print_table_of_tasks(result)
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
