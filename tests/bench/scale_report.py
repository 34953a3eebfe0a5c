"""The tables of docs/scale.md and its picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tests.bench.tables import markdown


def power(number: float) -> str:
    """Return a power of ten as people write it."""
    return f"10^{round(math.log10(number))}"


def short(number: float) -> str:
    """Return a number with three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def ordered(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values of a column, ascending."""
    return sorted({row[name] for row in rows})


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the tables of docs/scale.md by their names."""
    sizes, rates = ordered(result["costs"], "releases"), ordered(result["costs"], "queries_a_second")
    queries = [
        [
            power(row["releases"]), row["way"] + (" *" if row["extrapolated"] else ""), row["shows"],
            *(short(row[name]) for name in ("up_kb", "down_kb", "cpu_ms", "index_gb")),
        ]
        for row in result["costs"] if row["queries_a_second"] == rates[0]
    ]  # fmt: skip
    months = []
    for releases in sizes:
        of_size = [row for row in result["costs"] if row["releases"] == releases]
        for way in dict.fromkeys(row["way"] for row in of_size):
            cells = [row for row in of_size if row["way"] == way]
            months.append([power(releases), way, *(f"{short(row['cores'])} / {short(row['month_whole'])}" for row in cells)])
    found = []
    for kind in dict.fromkeys(row["kind"] for row in result["recall"]):
        for use, releases in dict.fromkeys((row["use"], row["releases"]) for row in result["recall"] if row["kind"] == kind):
            cells = [row for row in result["recall"] if (row["kind"], row["use"], row["releases"]) == (kind, use, releases)]
            by_probes = {row["probes"]: row for row in cells}
            chosen = [by_probes.get(probes) for probes in (1, 4, 16)]
            line = [
                kind, short(releases), cells[0]["clusters"],
                *(f"{100 * row['recall_at_1']:.1f} / {100 * row['recall_at_10']:.1f}" if row else "-" for row in chosen),
                f"{100 * cells[0]['right_task']:.1f} of {100 * cells[0]['right_task_exact']:.1f}",
                cells[0]["probes_needed"],
            ]  # fmt: skip
            if line not in found:  # two uses may need the same clusters
                found.append(line)
    seen = [
        [
            row["kind"], row["way"], f"{row['bits']:.1f} of {row['of_bits']:.1f}",
            *(f"{100 * row[look]['task']:.0f} / {100 * row[look]['domain']:.0f}" for look in ("once", "every_time")),
            f"{row['once']['tasks_left']:,.0f} / {row['every_time']['tasks_left']:,.0f}",
        ]
        for row in result["leak"]
    ]  # fmt: skip
    needed = []
    for size in sizes:
        for rate in rates:
            of = [row for row in result["costs"] if (row["releases"], row["queries_a_second"]) == (size, rate)]
            private = min((row for row in of if row["shows"] == "nothing"), key=lambda row: row["month_whole"])
            cheapest = min(of, key=lambda row: row["month_whole"])
            needed.append(
                [
                    power(size), f"{rate:,}", private["way"], short(private["cores"]), short(private["month_whole"]),
                    short(private["month_whole"] / (rate * 730 * 3600 / 1e6)), cheapest["way"], short(cheapest["month_whole"]),
                ]
            )  # fmt: skip
    faster = [
        [power(row["releases"]), row["way"], *(short(row[name]) for name in ("cores", "month_cores", "pass_ms", "accelerators", "month"))]
        for row in result["accelerators"]
    ]
    kept = [[power(row["releases"]), *(short(value) for name, value in row.items() if name != "releases")] for row in result["publishing"]]
    head = [name.replace("_", " ").replace(" mb", " MB").replace(" gb", " GB") for name in result["publishing"][0] if name != "releases"]
    return {
        "needed": markdown(
            ["releases", "queries a second", "cheapest that shows nothing", "cores", "money a month", "money a million queries",
             "cheapest of all", "money a month"], needed),
        "accelerators": markdown(
            ["releases", "way", "cores, 10 000 a second", "money for cores", "ms a pass by memory alone", "accelerators", "money for them"],
            faster),
        "queries": markdown(["releases", "way", "the market sees", "kB up", "kB down", "CPU ms", "index GB"], queries),
        "months": markdown(["releases", "way", *(f"cores / money a month, {rate:,} a second" for rate in rates)], months),
        "recall": markdown(
            ["catalogue", "releases", "clusters", "1 probe: best / ten best found, %", "4 probes", "16 probes", "right task, 1 probe, %",
             "probes for 95 %"], found),
        "leak": markdown(
            ["catalogue", "what is probed", "bits of the task", "task / domain guessed, once, %", "ten times, %",
             "tasks left, once / ten times"], seen),
        "publishing": markdown(["releases", *head], kept),
    }  # fmt: skip


def picture(result: Mapping[str, Any]) -> Any:
    """Draw what a few probes find, and what they cost, of each size."""
    import matplotlib.pyplot as plt

    from tests.bench.pictures import STYLES

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    sizes = ordered(result["recall"], "releases")
    for kind, alpha in zip(dict.fromkeys(row["kind"] for row in result["recall"]), (1.0, 0.45), strict=True):
        for size, (colour, marker, line) in zip(sizes, STYLES, strict=False):
            rows = [row for row in result["recall"] if (row["kind"], row["releases"], row["use"]) == (kind, size, "tile")]
            left.plot(
                [row["probes"] for row in rows], [100 * row["recall_at_1"] for row in rows], color=colour, marker=marker, linestyle=line,
                alpha=alpha, markersize=4, label=f"{power(size)}, {rows[0]['clusters']} clusters, {kind}",
            )  # fmt: skip
    left.set(xscale="log", xlabel="clusters probed", ylabel="best match found, %", title="recall", ylim=(70, 101))
    left.legend(loc="lower right", fontsize=8)
    once = [row for row in result["costs"] if row["queries_a_second"] == ordered(result["costs"], "queries_a_second")[0]]
    names = ("exact scan", "in the clear", "groups", "numbers hidden", "super-clusters")
    for place, (colour, marker, line) in zip((0, 1, 3, 4), STYLES, strict=True):
        of_way = [[row for row in once if row["releases"] == size][place] for size in ordered(once, "releases")]
        right.plot(
            [row["down_kb"] + row["up_kb"] for row in of_way], [row["cpu_ms"] for row in of_way], color=colour, marker=marker,
            linestyle=line, label=names[place],
        )  # fmt: skip
        for row in of_way:
            right.annotate(power(row["releases"]), (row["down_kb"] + row["up_kb"], row["cpu_ms"]), fontsize=8, color=colour)
    right.set(xscale="log", yscale="log", xlabel="kB moved a query", ylabel="CPU ms of the market a query", title="cost")
    right.legend(loc="lower right", fontsize=9)
    return figure
