"""Every strategy on two real tasks, through a real market: `veilmart compare` as a user runs it.

    python -m tests.bench.compare [--records N] [--data DIR] [--base DIR] [--out FILE] [--pages DIR]

For each task an owner publishes with a specialist from its first 250 training records; a querier pulls both and compares on the first
N test records.  The larger model is the base model with six more layers, faint copies of its last: it proves that the strategies work
and says nothing about what a better model would be worth.  docs/results/compare.json is such a run's --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

from tests.e2e.processes import market_process, veilmart
from tests.e2e.test_serve import write_larger

SCHEMA = "veilmart.bench.compare/1"
TASKS = ("finance-news-sentiment", "travel-restaurant")
TRAINED = 250


def first_lines(source: Path, target: Path, count: int) -> Path:
    """Write the first records of a file to another."""
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:count]))
    return target


def measure(data: Path, base: Path, records: int, pages: Path) -> list[dict[str, Any]]:
    """Publish, pull and compare; return what `compare --json` says of each task."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        larger, model = str(write_larger(base, root / "larger")), ("--base", str(base))
        with market_process(root / "market-home") as (started, _):
            market = ("--market", started["address"], "--ca", started["ca"])
            for task in TASKS:
                own = first_lines(data / task / "train.jsonl", root / f"{task}.jsonl", TRAINED)
                veilmart("node", "publish", "--data", str(own), *market, "--json", *model, home=root / task)
                veilmart("pull", task, *market, "--json", home=root / "querier")
        for task in TASKS:
            mine = first_lines(data / task / "test.jsonl", root / f"{task}-mine.jsonl", records)
            words = ("compare", "--validation", mine, "-m", task, "-m", next(other for other in TASKS if other != task), "--larger", larger)
            page = pages / f"compare-{task}.html"
            said = json.loads(
                veilmart(*words, "--tokens", "16", "--html", str(page), "--json", *model, home=root / "querier", timeout=3600.0)
            )
            found.append({"task": task, "records": records, "strategies": said["strategies"]})
            sys.stderr.write(f"{task}: {len(said['strategies'])} strategies\n")
    return found


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=80)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=platformdirs.user_data_path("veilmart") / "models" / "smollm2-135m")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pages", type=Path, default=Path())
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.stderr.write(f"needs {options.data}: real task data not present\n")
        return 2
    text = json.dumps({"schema": SCHEMA, "tasks": measure(options.data, options.base, options.records, options.pages)}, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
