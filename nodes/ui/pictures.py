"""The pictures of the local page, drawn from the facts of a page alone; each has a table beside it that says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from protocol.web.picture import Bar, Line, bars, lines

# Which kind of mark a verdict has, and how it is spelt where there is no room for a sentence.
VERDICTS = {"match": ("c1", "\u2713 match"), "sibling": ("c2", "\u2248 sibling"), "none": ("c5", "\u2715 another task"),
            "cannot tell": ("c4", "? cannot tell")}  # fmt: skip


SHORT = 20  # characters


def match_picture(result: Mapping[str, Any]) -> Markup:
    """Return the scores of the best matches with their noise, in the order of their rank.

    A score far below zero says no more than one below it, and would leave no room for those that say something: its bar is cut off.
    """
    lowest = -max([20.0, *(match["score"] for match in result["matches"])])
    rows = []
    for match in result["matches"]:
        cut = match["score"] < lowest
        words = f"{'← ' if cut else ''}{match['score']:.1f} ± {2 * match['std']:.1f}"
        error = None if cut else 2 * match["std"]
        rows.append(Bar(_short(match["title"]), max(match["score"], lowest), error, words, VERDICTS[match["verdict"]][0]))
    return bars(rows, "Score of each match, in nats, with two standard deviations of its noise", width=440, label_width=140)


def _short(title: str) -> str:
    """Return a title that fits beside a bar; the table has it whole."""
    return title if len(title) <= SHORT else f"{title[: SHORT - 9]}…{title[-8:]}"


def budget_picture(statement: Mapping[str, Any], price: Mapping[str, Any]) -> Markup:
    """Return what was spent after each charge, the limit, and where the next release would lead."""
    spent = [(0.0, 0.0), *((float(entry["number"]), entry["spent_after"]) for entry in statement["entries"])]
    last = spent[-1]
    series = [
        Line("spent", spent, "c1"),
        Line("with the next release", [last, (last[0] + 1, price["total"])], "c3"),
        Line("budget", [(0.0, statement["budget"]), (last[0] + 1, statement["budget"])], "c2"),
    ]
    step = len(spent) // 12 + 1  # as many labels as have room
    below = {number: f"{number:g}" if number else "start" for number, _ in spent[::step]} | {last[0] + 1: "next"}
    return lines(series, "Epsilon spent after each charge", "charge", "epsilon", x_ticks=below, height=280)


def outlook_picture(outlooks: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the shares of the verdicts over epsilon, which is on a logarithmic axis: its number of doublings from 1."""
    from math import log2

    def share(name: str, label: str, kind: str) -> Line:
        return Line(label, [(log2(outlook["epsilon"]), 100 * outlook[name]) for outlook in outlooks], kind)

    series = [share("match", "match", "c1"), share("cannot_tell", "cannot tell", "c4"), share("other", "taken for another task", "c2")]
    labels = {log2(outlook["epsilon"]): f"{outlook['epsilon']:g}" for outlook in outlooks}
    return lines(series, "What queries of your own task would be told, by epsilon", "epsilon", "% of queries", x_ticks=labels, height=300)


def pareto_picture(result: Mapping[str, Any]) -> Markup:
    """Return loss against time of each strategy, as `veilmart compare --html` draws it."""
    from nodes.compare import Row
    from nodes.pareto import picture

    return Markup(picture([Row(**row) for row in result["strategies"]]))  # it escapes the names


def report_body(report: Mapping[str, Any]) -> Markup:
    """Return an auditor's report as `veilmart audit report` draws it, without its frame."""
    from nodes.audit.report_page import body

    return Markup(body(report))  # it escapes all that the report says


def strategies_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of a comparison's table, as `veilmart compare` prints them."""
    from nodes.compare import Row
    from nodes.pareto import cells, table_columns

    rows = [Row(**row) for row in result["strategies"]]
    columns = table_columns(rows)
    return columns, [cells(row, columns) for row in rows]


FOR_TEMPLATES = {
    "verdicts": VERDICTS, "match_picture": match_picture, "budget_picture": budget_picture, "outlook_picture": outlook_picture,
    "pareto_picture": pareto_picture, "report_body": report_body, "strategies_table": strategies_table,
}  # fmt: skip
