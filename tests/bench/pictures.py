"""The pictures of docs/results: SVG with text as text, no background, greys that read on white and on black, colours of Okabe and Ito."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tests.bench.tables import TARGETS, find

Row = dict[str, Any]
GREY = "#7a7a7a"
BLUE, RED, GREEN, PURPLE = "#0087d1", "#d55e00", "#009e73", "#cc79a7"
STYLES = ((BLUE, "o", "-"), (RED, "s", "--"), (GREEN, "^", "-."), (PURPLE, "D", ":"))  # in lines colour is never the only difference
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "veilmart", "font.family": "sans-serif", "font.size": 11, "text.color": GREY,
    "axes.edgecolor": GREY, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25, "axes.axisbelow": True, "legend.frameon": False,
}  # fmt: skip


def draw(result: Row, folder: Path) -> None:
    """Write the pictures of a full result."""
    for name, picture in (("top1", _top1), ("verdicts", _verdicts), ("owners", _owners)):
        save(picture, result, folder / f"specification-{name}.svg")


def save(picture: Callable[[Row], Any], result: Row, file: Path) -> None:
    """Write a picture of a result; equal results give equal bytes."""
    with plt.rc_context(SETTINGS):
        figure = picture(result)
        figure.savefig(file, transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    # The writer ends some lines with a space.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def _top1(result: Row) -> Any:
    figure, both = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    panels = (("full", "top1", "full queries"), ("prompt-only", "top1_pair_as_one", "prompts only, identical-prompt pair as one"))
    for axes, (view, measure, title) in zip(both, panels, strict=True):
        for n, (colour, marker, line) in zip((50, 100, 200, 500), STYLES, strict=True):
            cells = [
                row for row in result["pure"]
                if row["view"] == view and row["n"] == n and row["query_size"] == 50 and isinstance(row["epsilon"], float)
            ]  # fmt: skip
            cells.sort(key=lambda row: row["epsilon"])
            x = [n * row["epsilon"] for row in cells]
            axes.plot(x, [100 * row[measure][0] for row in cells], color=colour, marker=marker, linestyle=line, label=f"n = {n}")
            axes.fill_between(
                x, [100 * row[measure][1] for row in cells], [100 * row[measure][2] for row in cells], color=colour, alpha=0.12, linewidth=0
            )
            aims = [(m * epsilon, 100 * bound) for _, m, epsilon, of, what, _, bound in TARGETS if (m, of, what) == (n, view, measure)]
            x, y = [at for at, _ in aims], [bound for _, bound in aims]
            axes.plot(x, y, color=colour, marker="_", markersize=20, markeredgewidth=2, linestyle="")
        axes.plot([], [], color=GREY, marker="_", markersize=20, markeredgewidth=2, linestyle="", label="target, in the colour of its n")
        axes.set(xscale="log", xlabel="n x epsilon", title=title, ylim=(0, 102))
    both[0].set_ylabel("top-1, % of 50-text queries")
    both[1].legend(loc="lower right")
    return figure


def _verdicts(result: Row) -> Any:
    figure, axes = plt.subplots(figsize=(7.5, 4.2))
    counts = sorted({row["n"] for row in result["pure"] if "per_task" in row and row["epsilon"] == 1.0})
    cells = [find(result["pure"], n, 1.0, "full") for n in counts]
    lines = {
        "found: match, and the right one": [row["found"][0] for row in cells],
        "false match, right owner left out": [row["false"][0] for row in cells],
        "verdict sibling, declared sibling there": [row["sibling"][0] for row in cells],
        "cannot tell, right owner there": [row["present"]["cannot tell"] for row in cells],
    }
    for (label, values), (colour, marker, line) in zip(lines.items(), STYLES, strict=True):
        axes.plot(counts, [100 * value for value in values], color=colour, marker=marker, linestyle=line, label=label)
    axes.set(xscale="log", xlabel="records n of every owner, epsilon 1", ylabel="% of queries", ylim=(-2, 102))
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    axes.legend(loc="center right")
    return figure


def _owners(result: Row) -> Any:
    figure, both = plt.subplots(1, 2, figsize=(11, 4.2))
    names = {"total_variation": "total variation of the composition", "distance": "squared distance of population means"}
    for axes, (measure, title) in zip(both, names.items(), strict=True):
        rules = {rule: of for rule, of in result["hundred_owners"][measure]["rules"].items() if rule != "random pick"}
        _bars(axes, rules)
        axes.set_title(f"loss in {title}")
    both[0].set_ylabel("expected loss beyond the best owner")
    both[0].legend(loc="upper right", fontsize=9)
    return figure


def _bars(axes: Axes, rules: dict[str, Row]) -> None:
    kinds = ["all", *next(iter(rules.values()))["by_kind"]]
    for place, ((rule, of), (colour, _, _)) in enumerate(zip(rules.items(), STYLES, strict=True)):
        values = [of["loss"], *of["by_kind"].values()]
        x = [k + 0.2 * (place - 1.5) for k in range(len(kinds))]
        height = [value for value, _, _ in values]
        errors = [[max(value - low, 0) for value, low, _ in values], [max(high - value, 0) for value, _, high in values]]
        axes.bar(x, height, 0.18, color=colour, label=rule)
        axes.errorbar(x, height, errors, color=GREY, linestyle="", capsize=2, linewidth=1)
    axes.set_xticks(
        range(len(kinds)), [kind.replace(" of a task", "\nof a task").replace("Dirichlet ", "Dirichlet\n") for kind in kinds], fontsize=9
    )
