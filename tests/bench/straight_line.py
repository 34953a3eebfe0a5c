"""The model work of a simulated federation in a plain loop, and nothing else: what `veilmart sim` is measured against.

Prefix pass, features and training of the same owners with the same records, the same model and the same cores; no guard, ledger, noise,
campaign, market or query.  Prints one JSON object.

    python -m tests.bench.straight_line --data ../shared/data --nodes 100 --records 20
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import platformdirs
import torch

from nodes.base_model import SPLIT_LAYER, BaseModel
from nodes.finetune import Recipe, finetune
from nodes.guard import map_alone
from nodes.machine import Watch, cores
from nodes.mixes import Mix, deal
from nodes.records import parse_record
from protocol.features import FeatureMap, default_map


def owner(model: BaseModel, feature_map: FeatureMap, lines: list[bytes]) -> str:
    """Do one owner's model work; return the digest of its adapter."""
    records = [parse_record(line, "record") for line in lines]
    embedding, activations = model.prefix_pass(records, SPLIT_LAYER, 1, layer=feature_map.layer)
    map_alone(feature_map, embedding)
    return hashlib.sha256(finetune(model, activations, Recipe(), workers=1).to_bytes()).hexdigest()


def main() -> None:
    """Measure the loop over all owners, as many at a time as there are cores."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--data", type=Path, default=Path("../shared/data"))
    asked.add_argument("--nodes", type=int, default=100)
    asked.add_argument("--records", type=int, default=20)
    asked.add_argument("--workers", type=int, default=cores())
    options = asked.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    feature_map = default_map()
    model = BaseModel.open(platformdirs.user_data_path("veilmart") / "models" / "smollm2-135m")
    tasks = sorted(folder.name for folder in options.data.iterdir() if (folder / "train.jsonl").is_file())
    tasks = [task for task in tasks if task not in feature_map.fitted_on]
    owners = deal(options.data, tasks, options.nodes, Mix(), options.records, 1, random.Random(0))
    opened, cpu = time.monotonic(), time.process_time()
    with Watch() as watch, ThreadPoolExecutor(options.workers) as pool:
        adapters = list(pool.map(lambda one: owner(model, feature_map, one[1]), owners))
        cpu = time.process_time() - cpu
        use = watch.use()
    print(json.dumps({
        "schema": "veilmart.bench.straight-line/1", "nodes": len(owners), "records": options.records, "workers": options.workers,
        "wall_s": round(time.monotonic() - started, 2), "owners_wall_s": round(time.monotonic() - opened, 2), "owners_cpu_s": round(cpu, 2),
        "peak_memory_bytes": use.peak_bytes, "adapters": hashlib.sha256(" ".join(adapters).encode()).hexdigest(),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
