"""How well specifications are matched: top-1, verdicts with and without the right owner, by number of records and epsilon.

    python tests/bench/specification.py [--quick] [--json] [--data DIR] [--out FILE]

Real mechanism (quantiser, noisy count, discrete Gaussian from the operating system), real score, the shipped map, the tasks it was not
fitted on, one owner a task, all siblings in the market.  Queries are drawn from the test files.  "Absent" takes the right owner out of
the ranking.  Texts are embedded in padded batches: nothing is released.  About 4 minutes on 2 cores, most of it embedding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from nodes.base_model import BaseModel
from nodes.records import read_records
from protocol.catalogue import Columns, centred_mean
from protocol.features import FeatureMap, default_map
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.scoring import Scores, Verdict, score, sketch_of, verdict_of
from protocol.specification import estimate, quantise

CELLS = [(50, 1.0, 2), (100, 1.0, 2), (150, 1.0, 2), (200, 1.0, 2), (500, 1.0, 2), (500, 0.1, 2), (200, 1.0, 1), (500, 1.0, 1)]
TRAIN, TEST, QUERY_SIZE, DELTA = 500, 250, 50, 1e-6


def embed(data: Path, feature_map: FeatureMap, model: BaseModel) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the features of the training and of the test records of every task that the map was not fitted on."""
    tasks = sorted(f.name for f in data.iterdir() if f.is_dir() and f.name not in feature_map.fitted_on)
    features = {}
    for task in tasks:
        train, test = (read_records(data / task / f"{split}.jsonl", limit) for split, limit in (("train", TRAIN), ("test", TEST)))
        features[task] = (feature_map(model.embed_batched(train)), feature_map(model.embed_batched(test)))
        sys.stderr.write(f"embedded {task}\n")
    return features


def cell(
    features: dict[str, tuple[np.ndarray, np.ndarray]],
    feature_map: FeatureMap,
    n: int,
    epsilon: float,
    views: int,
    repeats: int,
    queries: int,
) -> dict[str, Any]:
    """Return the shares of one cell; tasks with fewer than n records are bootstrapped, and named."""
    rng, noise = np.random.default_rng(0), operating_system()  # the seed chooses records and queries, never noise
    used, counts = (
        views * feature_map.view_dimension,
        {"top1": 0, "present": dict.fromkeys(Verdict, 0), "absent": dict.fromkeys(Verdict, 0)},
    )
    total, short = 0, [task for task, (train, _) in features.items() if len(train) < n]
    for _ in range(repeats):
        chosen = [
            train[rng.permutation(len(train))[:n] if len(train) >= n else rng.integers(0, len(train), n)] for train, _ in features.values()
        ]
        released = [estimate(quantise(rows), feature_map.map_id, Guarantee(epsilon, DELTA), noise) for rows in chosen]
        means = np.stack([centred_mean(specification, feature_map) for specification in released])
        columns = Columns(
            np.array([s.count for s in released]), np.array([s.noise_std for s in released]), (means[:, :used] ** 2).sum(axis=1)
        )
        for right, (_, test) in enumerate(features.values()):
            for _ in range(queries):
                sketch = sketch_of(test[rng.permutation(len(test))[:QUERY_SIZE]], feature_map, views)
                scores = score(means @ sketch.centred_mean, columns, sketch, feature_map)
                order = np.argsort(-scores.llr)
                total += 1
                counts["top1"] += int(order[0] == right)
                for kind, best in (("present", order[0]), ("absent", order[order != right][0])):
                    counts[kind][verdict(scores, best, feature_map, views)] += 1
    shares = {kind: {str(v): round(k / total, 4) for v, k in counts[kind].items()} for kind in ("present", "absent")}
    return {
        "n": n,
        "epsilon": epsilon,
        "views": views,
        "queries": total,
        "top1": round(counts["top1"] / total, 4),
        **shares,
        "bootstrapped": short,
    }


def verdict(scores: Scores, i: int, feature_map: FeatureMap, views: int) -> Verdict:
    return verdict_of(float(scores.llr[i]), float(scores.distance[i]), float(scores.resolution[i]), feature_map, views)


def main() -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VEILMART_HOME") or platformdirs.user_data_path("veilmart"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=home / "models" / "smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="a tenth of the queries")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    arguments = parser.parse_args()
    started, feature_map = time.process_time(), default_map()
    features = embed(arguments.data, feature_map, BaseModel.open(arguments.base))
    repeats, queries = (2, 2) if arguments.quick else (10, 5)
    cells = [cell(features, feature_map, n, epsilon, views, repeats, queries) for n, epsilon, views in CELLS]
    result = {
        "schema": "veilmart.bench.specification/1", "map_id": feature_map.map_id.hex(), "tasks": list(features), "query_size": QUERY_SIZE,
        "delta": DELTA, "cells": cells, "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print("n\tepsilon\tviews\ttop-1\tmatch\tcannot tell\tnone\tabsent: match\tcannot tell\tnone")
    for c in cells:
        verdicts = [f"{100 * c[kind][name]:.1f}" for kind in ("present", "absent") for name in ("match", "cannot tell", "none")]
        print("\t".join([str(c["n"]), f"{c['epsilon']:g}", str(c["views"]), f"{100 * c['top1']:.1f}", *verdicts]))


if __name__ == "__main__":
    main()
