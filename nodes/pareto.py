"""The page that `veilmart compare` writes: one file, a picture of loss against time and the same numbers as a table, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from nodes.compare import Row, pareto_front
from nodes.page import document
from nodes.reuse.strategies import Strategy
from protocol.web.picture import decades, mark, spread, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 64, 170, 24, 56
LABEL_GAP = 17  # between the base lines of two labels
# Who computes an answer, by the kinds of protocol/web/picture.py: told by shape and colour, so neither has to be seen alone.
KINDS = {"c5": "base model alone", "c1": "specialists", "c2": "specialist with the larger model", "c3": "larger model alone"}
KIND_OF = {Strategy.BASE: "c5", Strategy.SINGLE: "c1", Strategy.MIXTURE: "c1", Strategy.LARGER: "c3"}
JOINT = "c2"

STYLE = """
svg .front { fill: none; stroke: var(--soft); stroke-dasharray: 5 4; stroke-width: 1.5; }
svg .best { font-weight: 600; }
svg .c1 { fill: var(--c1); } svg .c2 { fill: var(--c2); } svg .c3 { fill: var(--c3); } svg .c5 { fill: var(--c5); }
"""


def page(rows: Sequence[Row], name: str, scored: int) -> str:
    """Return the HTML page; `name` says on what the strategies were compared, `scored` on how many records."""
    columns = table_columns(rows)
    head = "".join(f"<th scope=col>{escape(title)}</th>" for title in columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, columns)) + "</tr>" for row in rows)
    front = ", ".join(row.name for row in pareto_front(rows))
    return document(
        f"Strategies on {name}", STYLE,
        f"""<p>Down is better (fewer nats per response token), left is faster. The dashed line joins what nothing else beats in both:
<strong>{escape(front)}</strong>. Bars are one standard error over {scored} records that were not used to calibrate.</p>
{picture(rows)}
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>No strategy here sends a prompt to another machine: "left" counts prompts, "escalated" those that the larger local model answered.
"epsilon" is that of the specifications by which the specialists were chosen; an adapter trained without a guarantee has none,
and what its owner spent in total is then unbounded.</p>""",
    )  # fmt: skip


def table_columns(rows: Sequence[Row]) -> list[str]:
    """Return the columns of the table, without those that say nothing here."""
    exact = ["exact"] if any(row.exact_match is not None for row in rows) else []
    return [
        "strategy",
        "nats/token",
        "± error",
        *exact,
        "s/answer",
        "tokens/s",
        "fetched",
        "weights",
        "left",
        "escalated",
        "epsilon",
        "adapter",
    ]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Return what a row shows in these columns."""
    epsilon = "-" if row.epsilon_specification is None else f"{row.epsilon_specification:g}"
    shown = {
        "strategy": row.name, "nats/token": f"{row.nats_per_token:.3f}", "± error": f"{row.nats_error:.3f}",
        "exact": "-" if row.exact_match is None else f"{100 * row.exact_match:.0f} %", "s/answer": f"{row.seconds:.2f}",
        "tokens/s": f"{row.tokens_per_second:.1f}", "fetched": _bytes(row.fetched_bytes), "weights": _bytes(row.weights_bytes),
        "left": f"{100 * row.left_share:.0f} %", "escalated": f"{100 * row.escalated_share:.0f} %", "epsilon": epsilon,
        "adapter": row.guarantee_adapter or "-",
    }  # fmt: skip
    return [shown[column] for column in columns]


def _bytes(count: int) -> str:
    return "-" if not count else f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"


def picture(rows: Sequence[Row]) -> str:
    """Return the SVG: time on a logarithmic axis, loss with its error, the Pareto front."""
    times = [row.seconds for row in rows]
    low, high = math.log10(min(times)) - 0.1, math.log10(max(times)) + 0.1
    bottom = min(row.nats_per_token - row.nats_error for row in rows)
    top = max(row.nats_per_token + row.nats_error for row in rows)
    margin = 0.06 * (top - bottom or 1.0)
    bottom, top = bottom - margin, top + margin

    def x(seconds: float) -> float:
        return LEFT + (math.log10(seconds) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(nats: float) -> float:
        return TOP + (top - nats) / (top - bottom) * (HEIGHT - TOP - BOTTOM)

    floor, side = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t"><title id="t">Loss against time of each strategy; '
        "the table below has the numbers</title>"
    ]
    for nats in ticks(bottom, top):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{side}" y1="{y(nats):.1f}" y2="{y(nats):.1f}"/>')
        parts.append(f'<text class="soft" text-anchor="end" x="{LEFT - 8}" y="{y(nats) + 4:.1f}">{nats:g}</text>')
    for seconds in decades(low, high):
        parts.append(f'<line class="grid" x1="{x(seconds):.1f}" x2="{x(seconds):.1f}" y1="{TOP}" y2="{floor}"/>')
        parts.append(f'<text class="soft" text-anchor="middle" x="{x(seconds):.1f}" y="{floor + 18}">{seconds:g}</text>')
    parts.append(f'<text class="soft" text-anchor="middle" x="{(LEFT + side) / 2}" y="{floor + 36}">seconds an answer (median)</text>')
    parts.append(f'<text class="soft" x="{LEFT - 48}" y="{TOP - 8}">nats per response token</text>')
    front = pareto_front(rows)
    parts.append(
        '<polyline class="front" points="' + " ".join(f"{x(row.seconds):.1f},{y(row.nats_per_token):.1f}" for row in front) + '"/>'
    )
    labels = spread([y(row.nats_per_token) for row in rows], LABEL_GAP, TOP, HEIGHT - BOTTOM + 10)
    for row, label in zip(rows, labels, strict=True):
        kind = KIND_OF.get(row.strategy, JOINT)
        at, down = x(row.seconds), y(row.nats_per_token)
        parts.append(f'<line class="lead" x1="{at:.1f}" x2="{side + 10}" y1="{down:.1f}" y2="{label - 4:.1f}"/>')
        low_end, high_end = y(row.nats_per_token - row.nats_error), y(row.nats_per_token + row.nats_error)
        parts.append(f'<rect class="{kind}" x="{at - 0.8:.1f}" y="{high_end:.1f}" width="1.6" height="{low_end - high_end:.1f}"/>')
        parts.append(mark(kind, at, down))
        best = ' class="best"' if row in front else ""
        parts.append(f'<text{best} x="{side + 14}" y="{label:.1f}">{escape(row.name)}</text>')
    here = float(LEFT)
    for kind, title in KINDS.items():
        if any(KIND_OF.get(row.strategy, JOINT) == kind for row in rows):
            parts.append(mark(kind, here, HEIGHT - 8))
            parts.append(f'<text class="soft" x="{here + 11}" y="{HEIGHT - 4}">{title}</text>')
            here += 36 + 6.9 * len(title)
    return "\n".join([*parts, "</svg>"])
