"""Tables and pictures of the learnware benchmark, from its result alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.learnware_measures import ENOUGH, MATCHES_MIXED, MIXED_UNLESS, find, named, public_and_encrypted
from tests.bench.learnware_policies import SCENARIOS
from tests.bench.tables import fill, markdown

Row = dict[str, Any]
CONSTANTS = ("base", "random", "best single", "pooled", "oracle")
# The seed system's public tables, restated: score of the picks on seen and unseen tasks of one domain, higher is better.
SEED_SPLIT = (
    ("10 seen", 56.48, 54.66, 55.05, 58.20, 68.62, 69.31),
    ("7 unseen", 59.22, 63.63, 57.96, 61.82, 63.71, 65.62),
)
PAGE = """# Choosing one specialist a task

    python -m tests.bench.learnware --data DIR --out RUN
    python -m tests.bench.learnware --out RUN --report docs/results

The first command trains and measures, and goes on where it was killed; the second makes `learnware.json`, the pictures and every table
on this page that stands between markers from the run's folder, without training.
Losses are nats per response token on test texts that no query is drawn from; gap closed is (random - chosen) / (random - oracle), a ratio
of sums over tasks, with a 95 % interval by bootstrap over tasks. *Seen*: owners of the task are in the market. *Unseen*: every owner with
a record of the task is left out. *Domain left out*: every owner with a record of its domain.
The specifications' noise is simulated, from the run's seed, and stamped so.

## Targets

<!-- table: learnware-targets -->
<!-- end -->

## The run

<!-- table: learnware-run -->
<!-- end -->

## Policies

Two views, at the epsilon of the releases. What needs a user's own texts is measured with texts that are not scored.
Gradients cost ten times what states do, so the specifications of `kme-grad-64` are of a few records an owner, and noisier for it.

<!-- table: learnware-policies -->
<!-- end -->

![Gap closed by policy](learnware-gap.svg)

## Noise, and queries of prompts alone

<!-- table: learnware-epsilon -->
<!-- end -->

![Gap closed against epsilon](learnware-epsilon.svg)

What the noise of the releases costs: a paired difference, its interval over tasks.

<!-- table: learnware-noise -->
<!-- end -->

## What a score promises

Every owner for every task, one query each, by the verdict that the querier is given; the gain is the share of the base model's loss that
the specialist saves.

<!-- table: learnware-verdicts -->
<!-- end -->

![Gain against score](learnware-score.svg)

## Beside the seed system

Its published finance tables (scores, higher is better), and this run (losses, lower is better).

<!-- table: learnware-seed -->
<!-- end -->

## By task

<!-- table: learnware-tasks -->
<!-- end -->

## Private adapters

<!-- table: learnware-private -->
<!-- end -->

## A larger model

<!-- table: learnware-larger -->
<!-- end -->

## Through the market

<!-- table: learnware-matching -->
<!-- end -->

## Cost

<!-- table: learnware-cost -->
<!-- end -->
"""


def tables(result: Row) -> dict[str, str]:
    """Return every table by its name."""
    return {
        "learnware-targets": _targets(result),
        "learnware-run": _run(result),
        "learnware-policies": _policies(result),
        "learnware-epsilon": _epsilon(result),
        "learnware-noise": _noise(result),
        "learnware-verdicts": _verdicts(result),
        "learnware-seed": _seed(result),
        "learnware-tasks": _tasks(result),
        "learnware-private": _private(result),
        "learnware-larger": _larger(result),
        "learnware-matching": _matching(result),
        "learnware-cost": _cost(result),
    }


def publish(result: Row, text: str, folder: Path) -> None:
    """Write the result's JSON, the pictures, and the page: a new one where there is none, else the tables between its markers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learnware.json").write_text(text)
    page = folder / "learnware.md"
    page.write_text(fill(page.read_text() if page.exists() else PAGE, tables(result)))
    draw(result, folder)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _gap(row: Row | None) -> str:
    return "-" if row is None else "{} ({} to {})".format(*(round(100 * value) for value in row["gap"]))


def _maybe(result: Row, scenario: str, policy: str, epsilon: str = "", view: str = "full") -> Row | None:
    try:
        return find(result, scenario, policy, epsilon, view)
    except ValueError:
        return None


def _targets(result: Row) -> str:
    rows = [
        [one["what"], one["target"], f"{100 * one['measured']:.1f} %" if one["share"] else one["measured"],
         "yes" if one["reached"] else "**missed**"] for one in result["targets"]
    ]  # fmt: skip
    return markdown(["what", "target", "measured", "reached"], rows)


def _run(result: Row) -> str:
    kinds = [owner["kind"] for owner in result["owners"]]
    sizes = [sum(owner["records"].values()) for owner in result["owners"]]
    of = result["settings"]
    rows: list[list[object]] = [
        ["specialists", f"{len(sizes)}: " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))],
        ["tasks", len(result["tasks"])],
        ["records an owner", f"{min(sizes)} to {max(sizes)}, median {int(np.median(sizes))}, {sum(sizes)} together"],
        ["texts a task: scored / a user's own", f"{of['texts']} / {of['validation']}"],
        ["queries a task, texts each", f"{of['queries']}, {of['query_size']}"],
        ["draws of the noise", of["draws"]],
        ["records an owner, texts a query, where gradients are the features", of["gradient_records"]],
        ["specialists of public tasks, for what is fitted", result["public_owners"]],
        ["epsilon of a specification; of an adapter", f"{result['epsilon_spec']:g}; "
         + ", ".join("none" if epsilon is None else f"{epsilon:g}" for epsilon in result["adapter_guarantee"].values())],
        ["map", result["map"]],
        ["seed", result["seed"]],
    ]  # fmt: skip
    return markdown(["what", "this run"], rows)


def _names(result: Row, epsilon: str) -> list[str]:
    """Return the policies at an epsilon, those that close most of the gap on unseen tasks first."""
    rows = [row for row in result["policies"] if (row["scenario"], row["view"], row["epsilon"]) == ("unseen", "full", epsilon)]
    rows = rows or [row for row in result["policies"] if (row["scenario"], row["view"], row["epsilon"]) == ("seen", "full", epsilon)]
    return [row["policy"] for row in sorted(rows, key=lambda row: (-row["gap"][0], row["policy"]))]


def _policies(result: Row) -> str:
    epsilon = named(result["epsilon_spec"])
    rows = []
    for policy in [*CONSTANTS, *_names(result, epsilon)]:
        own = "" if policy in CONSTANTS else epsilon
        seen, unseen, domain = (_maybe(result, scenario, policy, own) for scenario in SCENARIOS)
        quiet = _maybe(result, "unseen", policy, "none") if own else None
        rows.append([
            policy, _number(seen and seen["loss"]), _percent(seen and seen["excess"]),
            f"{seen['beats_base']}/{seen['tasks']}" if seen else "-",
            _percent(seen and seen["exact"]), _number(unseen and unseen["loss"]),
            f"{unseen['beats_base']}/{unseen['tasks']}" if unseen else "-", _gap(unseen), _percent(unseen and unseen["gap_median"]),
            _percent(unseen and unseen["exact"]), _gap(quiet), _gap(domain),
        ])  # fmt: skip
    head = ["policy", "seen: loss", "over oracle, %", "beats base", "exact answers, %", "unseen: loss", "beats base"]
    return markdown(
        [*head, "gap closed, % (95 %)", "median, %", "exact answers, %", "without noise: gap closed, %", "domain left out: gap closed, %"],
        rows,
    )


def _epsilons(result: Row) -> list[str]:
    found = {row["epsilon"] for row in result["policies"] if row["policy"] == "LLR"}
    return [*sorted(found - {"none"}, key=float), *(["none"] if "none" in found else [])]


def _epsilon(result: Row) -> str:
    epsilons = _epsilons(result)
    rows = []
    for policy in ("LLR", "cosine", "MMD"):
        for view in ("full", "prompt-only"):
            for scenario in (*SCENARIOS[:2], ENOUGH):
                rows.append([policy, view, scenario, *(_gap(_maybe(result, scenario, policy, epsilon, view)) for epsilon in epsilons)])
    head = [f"eps {epsilon}" if epsilon != "none" else "no noise" for epsilon in epsilons]
    return markdown(["rule", "query", "market", *head], rows)


def _noise(result: Row) -> str:
    rows = [
        [row["policy"], row["scenario"], _percent(row["gap"]), _percent(row["without_noise"]),
         "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value + 0.0 for value in row["lost"]))]
        for row in result["noise"] if row["policy"] in ("LLR", "cosine", "mixture of 3", MIXED_UNLESS, MATCHES_MIXED)
    ]  # fmt: skip
    head = ["policy", "market", f"gap closed at eps {named(result['epsilon_spec'])}, %", "without noise, %", "lost, points (95 %)"]
    return markdown(head, sorted(rows))


def _verdicts(result: Row) -> str:
    rows = [
        [row["verdict"], row["pairs"], *(_percent(q) for q in row["gain_quartiles"]), _percent(row["harmful"])]
        for row in result["scores"]["by_verdict"]
    ]
    rows.append(["rank correlation of LLR and gain within a task", "", "", _number(result["scores"]["spearman_within_task"], 2), "", ""])
    return markdown(["verdict", "pairs", "gain, lower quartile, %", "median, %", "upper quartile, %", "worse than base, %"], rows)


def _seed(result: Row) -> str:
    rows: list[list[object]] = []
    for name, base, larger, random, single, chosen, oracle in SEED_SPLIT:
        gaps = [f"{100 * (value - random) / (oracle - random):.0f}" for value in (single, chosen)]
        rows.append([f"seed system, finance, {name}", base, larger, random, single, chosen, oracle, *gaps])
    epsilon = named(result["epsilon_spec"])
    for scenario in SCENARIOS[:2]:
        base, random, single, oracle = (_maybe(result, scenario, policy) for policy in ("base", "random", "best single", "oracle"))
        chosen = _maybe(result, scenario, "LLR", epsilon)
        of = [_number(row and row["loss"]) for row in (base, random, single, chosen, oracle)]
        name = f"this run, {(chosen or {'tasks': 0})['tasks']} {scenario}, LLR at epsilon {epsilon}"
        rows.append([name, of[0], "-", *of[1:], _gap(single), _gap(chosen)])
    head = ["market", "base model", "model ten times larger", "random", "best single", "chosen", "oracle"]
    return markdown([*head, "gap closed by best single, %", "by the choice, %"], rows)


def _tasks(result: Row) -> str:
    keys = [f"{scenario}: {policy}" for scenario in SCENARIOS[:2] for policy in
            ("random", "best single", "LLR", "predicted gain, public scores", "oracle")]  # fmt: skip
    rows = [
        [row["task"], row["owners"], _number(row["seen: base"]), _number(row["seen: pooled"]), *(_number(row[key]) for key in keys)]
        for row in result["per_task"]
    ]
    return markdown(["task", "owners", "base", "pooled", *keys], rows)


def _private(result: Row) -> str:
    rows = []
    for row in result["blocks"]:
        seen, unseen = row.get("seen"), row.get("unseen")
        rows.append([
            "none" if row["epsilon_adapter"] is None else f"{row['epsilon_adapter']:g}", _number(row["own_task_base"]),
            _number(row["own_task"]),
            f"{row['own_task_beats_base']}/{row['specialists']}", _number(seen and seen["chosen"]), _number(seen and seen["oracle"]),
            _number(unseen and unseen["chosen"]), _gap(unseen),
        ])  # fmt: skip
    head = ["epsilon of the adapters", "own task: base", "own task: specialist", "beats base", "seen: chosen", "seen: oracle"]
    return markdown([*head, "unseen: chosen", "unseen: gap closed, %"], rows)


def _larger(result: Row) -> str:
    if not result["larger"]:
        return "Not measured in this run: `--larger DIR` takes a larger frozen model."
    rows = []
    for scenario in SCENARIOS[:2]:
        of = [one for one in result["larger"] if one["scenario"] == scenario]
        for strategy in dict.fromkeys(row["strategy"] for one in of for row in one["rows"]):
            found = [row for one in of for row in one["rows"] if row["strategy"] == strategy]
            exact = [row["exact"] for row in found if row["exact"] is not None]
            rows.append([
                scenario, strategy, len(found), _number(float(np.mean([row["nats"] for row in found]))),
                _percent(float(np.mean(exact)) if exact else None), _number(float(np.mean([row["seconds"] for row in found])), 2),
                _percent(float(np.mean([row["escalated"] for row in found]))),
            ])  # fmt: skip
    return markdown(["market", "strategy", "tasks", "nats a token of its own", "exact answers, %", "s an answer", "passed on, %"], rows)


def _matching(result: Row) -> str:
    match = result["matching"]
    if match is None:
        return "No query went through the market in this run."
    of = match["queries"]
    rows: list[list[object]] = [
        ["encrypted queries that choose as local scores do", f"{match['same_choice']} of {of}"],
        ["largest difference of an LLR", match["largest_llr_difference"]],
        ["releases are the seeded draws that the tables use", "yes" if match["releases_are_the_seeded_draws"] else "**no**"],
        ["bytes of a release / of an adapter", f"{match['release_bytes']:.0f} / {match['adapter_bytes']:.0f}"],
        ["bytes of a query / of its answer", f"{match['sent']['query'] // of} / {match['received']['query'] // of}"],
        ["market CPU of a query, ms", match["server_cpu_ms"]],
    ]
    return markdown(["what", "measured"], rows)


def _cost(result: Row) -> str:
    rows = [[row["stage"], row["pieces"], row["cpu_s"], row["wall_s"]] for row in result["cost"]]
    rows.append(["together", *(round(sum(row[key] for row in result["cost"]), 1) for key in ("pieces", "cpu_s", "wall_s"))])
    return markdown(["stage", "pieces", "CPU s", "wall s"], rows)


# Pictures --------------------------------------------------------------------------------------------------------------------


def draw(result: Row, folder: Path) -> None:
    """Write the pictures."""
    from tests.bench.pictures import save

    for name, picture in (("gap", _gap_picture), ("epsilon", _epsilon_picture), ("score", _score_picture)):
        save(picture, result, folder / f"learnware-{name}.svg")


def _gap_picture(result: Row) -> Any:
    import matplotlib.pyplot as plt

    from tests.bench.pictures import BLUE, GREY, RED

    epsilon = named(result["epsilon_spec"])
    names = ["best single", *reversed(_names(result, epsilon))]
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(names) + 1.4))
    for place, (scenario, colour) in enumerate((("unseen", BLUE), ("seen", RED))):
        for height, policy in enumerate(names):
            row = _maybe(result, scenario, policy, "" if policy == "best single" else epsilon)
            if row is None:
                continue
            value, low, high = (100 * one for one in row["gap"])
            at = height + 0.19 - 0.38 * place
            axes.plot([low, high], [at, at], color=GREY, linewidth=1)
            axes.plot([value], [at], color=colour, marker="os"[place], linestyle="", label=scenario if height == len(names) - 1 else None)
    axes.axvline(90, color=GREY, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set(xlabel=f"gap closed, %, epsilon {epsilon} (line: 95 % over tasks; dashed: target for unseen tasks)")
    axes.set_xlim(left=max(axes.get_xlim()[0], -60))
    axes.legend(loc="lower left")
    return figure


def _epsilon_picture(result: Row) -> Any:
    import matplotlib.pyplot as plt

    from tests.bench.pictures import STYLES

    epsilons = _epsilons(result)
    figure, both = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
    for axes, scenario in zip(both, SCENARIOS[:2], strict=True):
        lines = (("LLR", "full"), ("cosine", "full"), ("MMD", "full"), ("LLR", "prompt-only"))
        for (policy, view), (colour, marker, line) in zip(lines, STYLES, strict=True):
            rows = [_maybe(result, scenario, policy, epsilon, view) for epsilon in epsilons]
            points = [(place, 100 * row["gap"][0]) for place, row in enumerate(rows) if row is not None]
            x, y = [place for place, _ in points], [value for _, value in points]
            axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=policy if view == "full" else f"{policy}, prompts alone")
        axes.set_xticks(range(len(epsilons)), [one if one != "none" else "no noise" for one in epsilons])
        axes.set(xlabel="epsilon of the specifications", title=scenario)
    both[0].set_ylabel("gap closed, %")
    both[0].legend(loc="lower left", fontsize=9)
    return figure


def _score_picture(result: Row) -> Any:
    import matplotlib.pyplot as plt

    from tests.bench.pictures import BLUE, GREY, RED

    points = result["scores"]["points"]
    figure, axes = plt.subplots(figsize=(7.5, 4.4))
    for own, colour, marker, label in (
        (False, BLUE, ".", "owner without a record of the task"),
        (True, RED, "s", "owner with records of it"),
    ):
        of = [point for point in points if point[5] is own]
        axes.plot(
            [p[2] for p in of], [100 * p[3] for p in of], color=colour, marker=marker, linestyle="", markersize=4, label=label, alpha=0.6
        )
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xscale("symlog", linthresh=10)
    axes.set(xlabel="match score (LLR)", ylabel="saved of the base model's loss, %")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -100))
    axes.legend(loc="lower right", fontsize=9)
    return figure


def headline(result: Row, scenario: str = "unseen") -> Sequence[Row]:
    """Return the rows that a person asks for first, best first."""
    return public_and_encrypted(result, scenario, named(result["epsilon_spec"]))
