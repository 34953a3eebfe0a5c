"""Does choosing one private specialist a task pay?  Specialists, encrypted queries, seen and unseen tasks, and what a choice is worth.

    python -m tests.bench.learnware --data DIR --out RUN [--specialists N] [--epsilon-spec E] [--epsilon-adapter none E...] [--maps ...]
    python -m tests.bench.learnware --out RUN --report docs/results

The first line prints what it will take, measured on a few texts, and works piece by piece: a specialist, the states of a task's texts,
the losses of one specialist on one task.  Every piece is a file of RUN; with --resume it goes on where it was killed.  RUN holds states of
the texts and owners' records: it is as private as they are.

The second line makes learnware.json, the tables of learnware.md and the pictures from RUN, without a model and without training; with
more --draws of the noise than the run had, if so asked.

* Owners: shards, label subsets and mixtures of two related tasks, disjoint, 60 records and more each, dealt by the seed.
  Each one's guard trains and releases; a real market's process holds the releases and answers encrypted queries.
* Users: queries of 50 test texts a task, with responses and of prompts alone.  Texts that are scored are in no query.
* Losses come from a matrix (specialist x text): the lower layers read a text once, each specialist costs the upper layers alone.
* Noise of the specifications, and of private adapters, is simulated from the seed, so that the same seed gives the same tables.
  Other epsilons are drawn over the same features; nothing is trained again for them.
* What is fitted is fitted on the ten public tasks of the map, with specialists of their own.

--quick: four specialists of three tasks on a few texts, about a minute.  Thirty on two cores: the defaults.  A hundred, on a GPU:
--specialists 100 --largest 2000 --texts 64 --device auto.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs

from nodes.finetune import Recipe
from nodes.machine import cores
from protocol.errors import VeilmartError
from protocol.features import open_map
from tests.bench.learnware_measures import analyse, named
from tests.bench.learnware_report import headline, publish, tables
from tests.bench.learnware_run import Run, say
from tests.bench.learnware_world import Settings
from tests.bench.specification import to_text

Row = dict[str, Any]
QUICK = {
    "tasks": ("finance-banking77", "math-gsm8k", "math-aqua"), "public_tasks": ("math-program", "travel-restaurant", "code-sql-advising"),
    "specialists": 4, "smallest": 20, "largest": 30, "texts": 5, "validation": 2, "public_texts": 3, "queries": 2, "query_size": 20,
    "query_pool": 20, "draws": 2, "epsilons": (1.0, 8.0), "maps": ("kme-lin-96", "kme-rff-256"), "pooled_steps": 5,
    "recipe": Recipe(max_steps=5), "public_specialists": 3, "larger_texts": 2,
}  # fmt: skip


def epsilon_or_none(text: str) -> float | None:
    """Return the number that a text names, or None for "none"."""
    return None if text == "none" else float(text)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Return what was asked for."""
    usual = Settings(Path(), Path())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VEILMART_HOME") or platformdirs.user_data_path("veilmart"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--base", type=Path, default=home / "models" / "smollm2-135m")
    parser.add_argument("--specialists", type=int, default=usual.specialists, metavar="N")
    parser.add_argument(
        "--public-specialists", type=int, metavar="N", help="of public tasks, on which rules are fitted; a third of the others, 10 at least"
    )
    parser.add_argument("--smallest", type=int, default=usual.smallest, help="records of an owner, at least")
    parser.add_argument("--largest", type=int, default=usual.largest, help="records of an owner, at most")
    parser.add_argument("--texts", type=int, default=usual.texts, help="scored texts a task")
    parser.add_argument("--queries", type=int, default=usual.queries, help="queries a task")
    parser.add_argument("--draws", type=int, help=f"of every specification's noise, {usual.draws} unless given; a report may have more")
    parser.add_argument(
        "--epsilon-spec", type=float, default=usual.epsilon_spec, metavar="E", help="of the specifications that are released"
    )
    parser.add_argument(
        "--epsilon-adapter",
        nargs="+",
        type=epsilon_or_none,
        default=[None],
        metavar="E",
        help="none, or numbers: a block of specialists each",
    )
    parser.add_argument("--maps", nargs="+", default=list(usual.maps), help="shipped names or files; the first is the market's")
    parser.add_argument("--larger", default="", metavar="DIR", help="a larger frozen model to compare with")
    parser.add_argument("--device", default="cpu", choices=("cpu", "auto", "cuda"), help="where specialists are trained and scored")
    parser.add_argument("--workers", type=int, default=cores(), help="threads; changes nothing but time")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--quick", action="store_true", help="four specialists, about a minute")
    parser.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="train nothing: write JSON, tables and pictures of RUN there")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser.parse_args(words)


def settings_of(asked: argparse.Namespace) -> Settings:
    """Return the settings that a command line names."""
    # First the block that all others stand beside.
    adapters = (None, *dict.fromkeys(epsilon for epsilon in asked.epsilon_adapter if epsilon is not None))
    settings = Settings(
        asked.data, asked.out, specialists=asked.specialists, smallest=asked.smallest, largest=asked.largest, texts=asked.texts,
        queries=asked.queries, epsilon_spec=asked.epsilon_spec, adapters=adapters, maps=tuple(asked.maps),
        larger=asked.larger, seed=asked.seed, public_specialists=asked.public_specialists or max(10, asked.specialists // 3),
    )  # fmt: skip
    return replace(settings, **QUICK) if asked.quick else settings


def main(words: list[str] | None = None) -> int:
    """Run the benchmark, or report on a run."""
    asked = parse(words)
    try:
        settings = Settings.of_run(asked.out) if asked.report else settings_of(asked)
        if asked.draws:
            settings = replace(settings, draws=asked.draws)  # after the run: they are drawn over the same features
        run = Run(settings, asked.base, [open_map(name) for name in settings.maps], asked.device, max(1, asked.workers))
        if not asked.report:
            run.begin(asked.resume)
            run.work()
            if settings.larger:
                from tests.bench.learnware_larger import compare_with

                compare_with(run, Path(settings.larger))
        result = analyse(run)
        text = to_text(result)
        if asked.report:
            publish(result, text, asked.report)
        else:
            (asked.out / "result.json").write_text(text)
    except VeilmartError as error:
        sys.stderr.write(f"{error}\n{error.hint}\n")
        return error.exit_code
    if asked.json:
        print(text)
        return 0
    print("\n\n".join(f"{name}\n\n{table}" for name, table in tables(result).items()))
    for row in headline(result)[:3]:
        say(f"unseen, epsilon {named(result['epsilon_spec'])}: {row['policy']} closes {100 * row['gap'][0]:.0f} % of the gap")
    return 0


if __name__ == "__main__":
    sys.exit(main())
