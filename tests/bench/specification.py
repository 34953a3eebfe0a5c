"""How well specifications are matched: the real mechanism, the real score, real tasks that the map was not fitted on.

    python -m tests.bench.specification [--quick] [--json] [--data DIR] [--base DIR] [--maps NAME...] [--cache DIR] [--out FILE]

1. `pure`: one owner a task.  Top-1 and top-3 by number of records, epsilon, size and view of the query; and the verdicts, with the right
   owner there and left out.
2. `hundred_owners`: owners that hold label subsets, shards and mixtures of tasks; the expected loss of the pick, by rule of ranking.
   The loss is the total variation distance between the user's and the picked owner's composition over (task x label) cells, minus that
   of the best owner in the market; also given: the same for the true squared distance of population means.
3. `heterogeneous`: pure owners of unequal size and epsilon, some tasks absent; top-1 and AUC(present, absent), by rule.
4. `maps`: some cells for every shipped map.  The first map named is the one that all other experiments use.
5. `mixtures`: convex weights of a mixture, with the noise taken off the Gram matrix and without.
6. `cost`: CPU from embeddings to a specification, and its bytes.

Texts are embedded in padded batches, since nothing is released.  Noise is the operating system's, so two runs differ; seeds choose records
and queries only.  Where a task has fewer records than are asked for they are drawn with replacement, and the row names the task.
A full run writes docs/results/specification.json, the pictures beside it and the tables of the README there: about 7 CPU minutes
from a full cache.  --quick takes a tenth of the draws, about 75 CPU seconds, and writes only what --out names.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import platformdirs

from protocol.features import EmbeddingKind, open_map, shipped_maps
from tests.bench.embeddings import LIMITS, Source
from tests.bench.experiments import Row, cost, heterogeneous, hundred_owners, mixtures, pure_cells
from tests.bench.rules import DELTA
from tests.bench.tables import judge, tables

SCHEMA = "veilmart.bench.specification/2"
RESULTS = Path(__file__).parents[2] / "docs" / "results"
SIZES = (5, 20, 50, 200)
COUNTS, EPSILONS = (50, 100, 200, 500), (0.1, 0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
VERDICTS = [(50, 1.0), (100, 1.0), (150, 1.0), (200, 1.0), (500, 1.0), (5000, 1.0), (500, 0.1)]
MAP_CELLS = [(50, 1.0), (100, 1.0), (200, 1.0), (500, 1.0), (500, 0.1)]


def say(what: str) -> None:
    """Tell a person how far the run is."""
    sys.stderr.write(f"{time.process_time():7.0f} CPU s  {what}\n")


def measure(source: Source, maps: list[str], quick: bool) -> Row:
    """Run every experiment and return the result."""
    few, some, many = (10, 10, 25) if quick else (50, 100, 250)  # releases drawn a task and cell
    feature_map = open_map(maps[0])
    tasks = source.tasks(feature_map)
    started = time.process_time()

    pure: list[Row] = []
    cells = [(n, epsilon, SIZES) for n in COUNTS for epsilon in EPSILONS] + [
        (n, epsilon, (50,)) for n, epsilon in VERDICTS if n not in COUNTS
    ]
    for n, epsilon, sizes in cells:
        said = (n, epsilon) in VERDICTS
        rows = pure_cells(tasks, feature_map, n, epsilon, sizes, many if said else some, per_task=said)
        for row in rows:
            if row["query_size"] != 50:
                row.pop("per_task", None)
        pure += rows
        say(f"pure owners, n = {n}, epsilon = {epsilon:g}")

    of_maps = [row for row in pure if (row["n"], row["epsilon"]) in MAP_CELLS and row["query_size"] == 50]
    of_maps = [{key: value for key, value in row.items() if key != "per_task"} for row in of_maps]
    for name in maps[1:]:
        other = open_map(name)
        if quick and other.embedding is EmbeddingKind.LORA_GRADIENTS:
            say(f"{name}: left out of the quick form, its texts take long to embed")
            continue
        others = source.tasks(other)
        for n, epsilon in MAP_CELLS:
            of_maps += pure_cells(others, other, n, epsilon, (50,), some)
        say(f"map {name}")

    owners = hundred_owners(tasks, feature_map, *((10, 40) if quick else (120, 200)))
    say("hundred owners")
    unequal = heterogeneous(tasks, feature_map, some)
    say("heterogeneous market")
    weights = mixtures(tasks, feature_map, few)
    say("mixture weights")
    return {
        "schema": SCHEMA,
        "quick": quick,
        "map": feature_map.name,
        "map_id": feature_map.map_id.hex(),
        "maps": of_maps,
        "tasks": [task.name for task in tasks],
        "texts": {"train": {t.name: len(t.train) for t in tasks}, "test": {t.name: len(t.test) for t in tasks}},
        "limits": {str(kind): list(limits) for kind, limits in LIMITS.items()},
        "delta": DELTA,
        "targets": judge(pure),
        "pure": pure,
        "hundred_owners": owners,
        "heterogeneous": unequal,
        "mixtures": weights,
        "cost": cost(feature_map),
        "cpu_seconds": round(time.process_time() - started),
    }


def to_text(result: dict[str, Any]) -> str:
    """Return the result as JSON with one line a row."""
    parts = []
    for key, value in result.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n  " + ",\n  ".join(json.dumps(row) for row in value) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Run the benchmark; print its tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VEILMART_HOME") or platformdirs.user_data_path("veilmart"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=home / "models" / "smollm2-135m")
    parser.add_argument(
        "--maps", nargs="+", metavar="NAME", default=list(shipped_maps()), help="shipped names or files; the first is scored fully"
    )
    parser.add_argument("--cache", type=Path, help="a folder that keeps embeddings between runs")
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, help="the JSON file; a full run writes docs/results/specification.json unless told otherwise")
    arguments = parser.parse_args()
    if not arguments.data.is_dir():
        parser.error(f"needs {arguments.data}: real task data not present")
    result = measure(Source(arguments.data, arguments.base, arguments.cache), arguments.maps, arguments.quick)
    out: Path | None = arguments.out or (None if arguments.quick else RESULTS / "specification.json")
    if out:
        out.write_text(to_text(result))
        publish_beside(result, out.parent)
    print(to_text(result) if arguments.json else "\n\n".join(f"{name}\n\n{table}" for name, table in tables(result).items()))


def publish_beside(result: Row, folder: Path) -> None:
    """Write the pictures, and the tables of the README if there is one."""
    from tests.bench.pictures import draw
    from tests.bench.tables import fill

    draw(result, folder)
    page = folder / "README.md"
    if page.exists():
        page.write_text(fill(page.read_text(), tables(result)))


if __name__ == "__main__":
    main()
