"""The measured tables as Markdown: what the benchmark prints, and what stands between the markers of docs/results/README.md."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

# What is to be reached: n, epsilon, view, measure, bound.  A share of queries of 50 texts; "<=" bounds what must stay small.
TARGETS: tuple[tuple[str, int, float, str, str, str, float], ...] = (
    ("top-1, full queries", 500, 1.0, "full", "top1", ">=", 0.999),
    ("top-1, full queries", 200, 1.0, "full", "top1", ">=", 0.995),
    ("top-1, full queries", 100, 1.0, "full", "top1", ">=", 0.98),
    ("top-1, full queries", 50, 1.0, "full", "top1", ">=", 0.87),
    ("top-1, full queries", 500, 0.1, "full", "top1", ">=", 0.91),
    ("top-1, prompt-only, pair as one", 500, 1.0, "prompt-only", "top1_pair_as_one", ">=", 0.995),
    ("top-1, prompt-only, pair as one", 200, 1.0, "prompt-only", "top1_pair_as_one", ">=", 0.98),
    ("top-1, prompt-only, pair as one", 100, 1.0, "prompt-only", "top1_pair_as_one", ">=", 0.90),
    *(("found: match, and the right release", n, 1.0, "full", "found", ">=", 0.98) for n in (200, 500, 5000)),
    *(("false match, right owner left out", n, 1.0, "full", "false", "<=", 0.005) for n in (200, 500, 5000)),
    *(("wrong match below the power limit", n, 1.0, "full", "wrong", "<=", 0.02) for n in (50, 100, 150)),
    *(("false match below the power limit", n, 1.0, "full", "false", "<=", 0.02) for n in (50, 100, 150)),
    *(("own task left out, a sibling there: verdict sibling", n, 1.0, "full", "sibling", ">=", 0.80) for n in (200, 500, 5000)),
    *(("the same, and a declared sibling is named", n, 1.0, "full", "sibling_declared", ">=", 0.80) for n in (200, 500, 5000)),
)


def find(rows: Sequence[Row], n: int, epsilon: float | str, view: str, size: int = 50) -> Row:
    """Return the one row of a cell."""
    (row,) = [row for row in rows if (row["n"], row["epsilon"], row["view"], row["query_size"]) == (n, epsilon, view, size)]
    return row


def judge(cells: Sequence[Row]) -> list[Row]:
    """Return every target with what was measured and whether it is reached.

    `close`: nearer to its bound than two standard errors of this many queries, so that another run may say the opposite.
    """
    judged = []
    for what, n, epsilon, view, measure, relation, bound in TARGETS:
        cell = find(cells, n, epsilon, view)
        value, low, high = cell[measure]
        reached = value >= bound if relation == ">=" else value <= bound
        row: Row = {"what": what, "n": n, "epsilon": epsilon, "target": f"{relation} {bound}", "measured": [value, low, high]}
        judged.append(row | {"reached": reached, "close": abs(value - bound) <= 2 * math.sqrt(bound * (1 - bound) / cell["queries"])})
    return judged


def tables(result: Row) -> dict[str, str]:
    """Return every table by its name."""
    return {
        "targets": _targets(result["targets"]),
        "top1-full": _top1(result["pure"], "full", "top1"),
        "top1-prompt-only": _top1(result["pure"], "prompt-only", "top1_pair_as_one"),
        "query-size": _query_size(result["pure"]),
        "verdicts": _verdicts(result["pure"]),
        "per-task": _per_task(find(result["pure"], 200, 1.0, "full")["per_task"]),
        "owners": _owners(result["hundred_owners"]),
        "heterogeneous": _heterogeneous(result["heterogeneous"]),
        "maps": _maps(result),
        "mixtures": _mixtures(result["mixtures"]),
        "cost": _cost(result),
    }


def fill(page: str, made: dict[str, str]) -> str:
    """Return a page with each table put between its markers <!-- table: name --> and <!-- end -->."""

    def table(found: re.Match[str]) -> str:
        return f"<!-- table: {found[1]} -->\n{made[found[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_interval(values: Sequence[float], digits: int = 1, factor: float = 100) -> str:
    value, low, high = (f"{factor * one:.{digits}f}" for one in values)
    return f"{value} ({low} to {high})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _targets(targets: Sequence[Row]) -> str:
    rows = [
        [
            t["what"],
            t["n"],
            f"{t['epsilon']:g}",
            f"{t['target'].split()[0]} {100 * float(t['target'].split()[1]):g}",
            _with_interval(t["measured"], 2),
            ("yes" if t["reached"] else "**missed**") + (", at the bound" if t["close"] else ""),
        ]
        for t in targets
    ]
    return markdown(["share of queries, %", "n", "epsilon", "target", "measured (95 % over tasks)", "reached"], rows)


def _top1(cells: Sequence[Row], view: str, measure: str) -> str:
    grid = [row for row in cells if row["view"] == view and row["query_size"] == 50]
    epsilons = sorted({row["epsilon"] for row in grid}, key=float)
    counts = sorted({row["n"] for row in grid if row["epsilon"] == 0.1})
    rows = [[n, *(_percent(find(cells, n, epsilon, view)[measure][0]) for epsilon in epsilons)] for n in counts]
    return markdown(["n", *(f"eps {epsilon:g}" if isinstance(epsilon, float) else "no noise" for epsilon in epsilons)], rows)


def _query_size(cells: Sequence[Row]) -> str:
    wanted = [row for row in cells if row["epsilon"] == 1.0]
    sizes = sorted({row["query_size"] for row in wanted})
    counts = sorted({row["n"] for row in wanted if row["query_size"] == min(sizes)})
    measures = (("full", "top1"), ("full", "top3"), ("prompt-only", "top1"), ("prompt-only", "top1_pair_as_one"))
    rows = [
        [n, size, *(_percent(find(cells, n, 1.0, view, size)[measure][0]) for view, measure in measures)] for n in counts for size in sizes
    ]
    return markdown(["n", "texts", "full, top-1", "full, top-3", "prompt-only, top-1", "prompt-only, top-1, pair as one"], rows)


def _verdicts(cells: Sequence[Row]) -> str:
    rows = []
    for view in ("full", "prompt-only"):
        for row in sorted((r for r in cells if "per_task" in r and r["view"] == view), key=lambda r: (-r["epsilon"], r["n"])):
            measures = (_with_interval(row[m]) for m in ("found", "wrong", "false", "sibling", "sibling_declared"))
            said = (_percent(row[case]["cannot tell"]) for case in ("present", "absent"))
            rows.append([view, row["n"], f"{row['epsilon']:g}", *measures, _percent(row["sibling_of_none"][0]), *said])
    head = [
        "view",
        "n",
        "eps",
        "found",
        "wrong match",
        "false match",
        "verdict sibling",
        "and a declared one",
        "sibling where none is declared",
    ]
    return markdown([*head, "cannot tell, present", "cannot tell, absent"], rows)


def _per_task(tasks: Sequence[Row]) -> str:
    rows = []
    for t in tasks:
        shares = (_percent(t[key]) for key in ("top1", "found", "false", "sibling"))
        rows.append([t["task"], *shares, t["falsely_matched"] or "-", t["best_other"], ", ".join(t["siblings"]) or "-"])
    head = ["task", "top-1", "found", "false match", "verdict sibling, left out", "matched falsely", "best of the others"]
    return markdown([*head, "declared siblings"], rows)


def _owners(result: Row) -> str:
    rows = []
    for rule, loss in result["total_variation"]["rules"].items():
        distance = result["distance"]["rules"][rule]
        kinds = (f"{100 * value[0]:.1f}" for value in loss["by_kind"].values())
        differences = (_with_interval(of["llr_minus_rule"]) if rule != "LLR" else "-" for of in (loss, distance))
        rows.append(
            [
                rule,
                _with_interval(loss["loss"]),
                *kinds,
                _with_interval(distance["loss"]),
                *differences,
                _percent(result["noisy_picks"][rule][0]),
            ]
        )
    kinds = list(result["total_variation"]["rules"]["LLR"]["by_kind"])
    head = ["rule", "TV loss x 100", *kinds, "distance loss x 100", "LLR minus rule, TV", "LLR minus rule, distance"]
    return markdown([*head, "% of picks among the noisiest fifth"], rows)


def _heterogeneous(rows: Sequence[Row]) -> str:
    return markdown(
        ["rule", "top-1 %", "AUC(present, absent)"], [[r["rule"], _with_interval(r["top1"]), _with_interval(r["auc"], 3, 1)] for r in rows]
    )


def _maps(result: Row) -> str:
    names = list(dict.fromkeys(row["map"] for row in result["maps"]))
    wanted = ((50, 1.0), (100, 1.0), (200, 1.0), (500, 1.0), (500, 0.1))
    rows = []
    for name in names:
        cells = [row for row in result["maps"] if row["map"] == name]
        full = (_percent(find(cells, n, epsilon, "full")["top1"][0]) for n, epsilon in wanted)
        prompts = _percent(find(cells, 100, 1.0, "prompt-only")["top1_pair_as_one"][0])
        verdicts = (" / ".join(_percent(find(cells, n, 1.0, "full")[m][0]) for m in ("found", "false")) for n in (200, 500))
        rows.append([name, *full, prompts, *verdicts])
    head = ["map", *(f"n={n}, eps {epsilon:g}" for n, epsilon in wanted), "prompt-only, pair as one, n=100"]
    return markdown([*head, "found / false, n=200", "found / false, n=500"], rows)


def _mixtures(rows: Sequence[Row]) -> str:
    body = [[r["n"], r["epsilon"], r["query_size"], *(_with_interval(r[k], 3, 1) for k in ("plain", "corrected"))] for r in rows]
    return markdown(["n", "epsilon", "texts", "plain", "noise taken off"], body)


def _cost(result: Row) -> str:
    cost = result["cost"]
    return markdown(
        ["what", "measured", "target"],
        [
            [f"{cost['records']} records from embeddings to specification, CPU s", cost["cpu_seconds"], "<= 0.25"],
            ["bytes of the noisy sums", cost["bytes_of_sums"], "-"],
            ["bytes of a release with metadata and signature, no summary", cost["bytes_of_envelope"], "<= 1024"],
            ["CPU s of the whole benchmark, embedding not counted when cached", result["cpu_seconds"], "-"],
        ],
    )
