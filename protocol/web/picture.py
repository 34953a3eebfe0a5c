"""Pictures as SVG: classes of static/style.css and presentation attributes, so that no policy of ours stops them.

A kind is told by colour and shape, c1 to c5, so that neither has to be seen alone.  All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

SHAPES = {"c1": "circle", "c2": "square", "c3": "triangle", "c4": "diamond", "c5": "cross"}


def tag(name: str, *inside: str, **attributes: object) -> Markup:
    """Return an element; what is inside is escaped unless it is markup.  `class_` and `font_size` are spelt class and font-size."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.1f}" if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{''.join(escape(part) for part in inside)}</{name}>")  # every part was escaped


def joined(parts: Iterable[str]) -> Markup:
    """Return pieces one after the other; what is not markup is escaped."""
    return Markup("\n").join(parts)


def text(x: float, y: float, words: str, class_: str = "soft", anchor: str = "start") -> Markup:
    """Return words at a place; anchor: start, middle or end of them is there."""
    return tag("text", words, class_=class_, text_anchor=anchor, x=float(x), y=float(y))


def mark(kind: str, x: float, y: float, size: float = 5.5) -> Markup:
    """Return the mark of a kind, centred at a place.  size: about half its width."""
    match SHAPES[kind]:
        case "circle":
            return tag("circle", class_=kind, cx=float(x), cy=float(y), r=size)
        case "square":
            return tag("rect", class_=kind, x=x - 0.9 * size, y=y - 0.9 * size, width=1.8 * size, height=1.8 * size)
        case "triangle":
            corners = [(0.0, -1.25), (1.15, 0.9), (-1.15, 0.9)]
        case "diamond":
            corners = [(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]
        case _:
            arm = ((-1, -0.35), (-0.35, -0.35), (-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35))
            corners = [(1.15 * a, 1.15 * b) for a, b in (*arm, *((-a, -b) for a, b in arm))]
    return tag("polygon", class_=kind, points=" ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in corners))


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its label, its value with a standard deviation (or None), and the words beside it."""

    label: str
    value: float
    error: float | None = None
    words: str = ""
    kind: str = "c1"


def bars(rows: Sequence[Bar], title: str, width: int = 640, label_width: int = 170) -> Markup:
    """Return horizontal bars from zero with their errors; values may be negative."""
    row, words_width = 28, 110
    low = min([0.0, *(bar.value - (bar.error or 0.0) for bar in rows)])
    high = max([0.0, *(bar.value + (bar.error or 0.0) for bar in rows)])
    scale = (width - label_width - words_width) / (high - low or 1.0)

    def x(value: float) -> float:
        return label_width + (value - low) * scale

    parts = []
    for number, bar in enumerate(rows):
        top = row * number + 6.0
        middle = top + 8
        start, end = sorted((x(0.0), x(bar.value)))
        parts += [text(0, middle + 5, bar.label, ""), tag("rect", class_=bar.kind, x=start, y=top, width=end - start, height=16.0)]
        if bar.error is not None:
            ends = x(bar.value - bar.error), x(bar.value + bar.error)
            whisker = f"M{ends[0]:.1f} {middle:.1f}H{ends[1]:.1f}" + "".join(f"M{at:.1f} {middle - 4:.1f}v8" for at in ends)
            parts.append(tag("path", class_="error", d=whisker))
        parts.append(text(x(max(bar.value, 0.0) + (bar.error or 0.0)) + 7, middle + 5, bar.words))
    parts.append(tag("path", class_="axis", d=f"M{x(0.0):.1f} 0v{row * len(rows)}"))
    return tag("svg", tag("title", title), *parts, class_="bars", viewBox=f"0 0 {width} {row * len(rows) + 2}", role="img")


@dataclass(frozen=True, slots=True)
class Line:
    """A series of places in a chart, joined in their order."""

    label: str
    places: Sequence[tuple[float, float]]
    kind: str = "c1"


def lines(
    series: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    width: int = 640,
    height: int = 300,
    x_ticks: Mapping[float, str] | None = None,
) -> Markup:
    """Return series over common axes, each with its mark, and a legend; nothing where there is no place at all.

    x_ticks: what stands below which places, where these are not the numbers themselves (of a logarithm, say).
    """
    places = [place for line in series for place in line.places]
    if not places:
        return Markup("")
    left, right, top, bottom = 64, 16, 26, 66
    (x_low, x_high), (y_low, y_high) = (_range([place[axis] for place in places]) for axis in (0, 1))

    def x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * (width - left - right)

    def y(value: float) -> float:
        return top + (y_high - value) / (y_high - y_low) * (height - top - bottom)

    floor = height - bottom
    parts = []
    for value in ticks(y_low, y_high):
        parts += [
            tag("path", class_="grid", d=f"M{left} {y(value):.1f}H{width - right}"),
            text(left - 8, y(value) + 4, f"{value:g}", anchor="end"),
        ]
    below = x_ticks if x_ticks is not None else {value: f"{value:g}" for value in ticks(x_low, x_high)}
    for value, words in below.items():
        parts += [tag("path", class_="grid", d=f"M{x(value):.1f} {top}V{floor}"), text(x(value), floor + 18, words, anchor="middle")]
    parts += [text((left + width - right) / 2, floor + 36, x_label, anchor="middle"), text(0, 14, y_label)]
    here = float(left)
    for line in series:
        parts.append(tag("polyline", class_=f"line {line.kind}-line", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.places)))
        parts += [mark(line.kind, x(a), y(b), 4.0) for a, b in line.places]
        parts += [mark(line.kind, here, height - 9.0, 4.0), text(here + 11, height - 4, line.label)]
        here += 40 + 7.2 * len(line.label)
    return tag("svg", tag("title", title), *parts, viewBox=f"0 0 {width} {height}", role="img")


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


# Axes and labels ----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two logarithms; every multiple where that leaves fewer than three."""
    powers = range(math.floor(low) - 1, math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= math.log10(factor * 10.0**power) <= high]
        if len(found) >= 3:
            break
    return [round(value, 6) for value in found]


def spread(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Return where labels stand beside these places: in their order, `gap` apart, between top and bottom."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    found, free = [0.0] * len(places), top
    for i in order:
        found[i] = max(places[i] + 4, free)
        free = found[i] + gap
    ceiling = bottom
    for i in reversed(order):
        found[i] = min(found[i], ceiling)
        ceiling = found[i] - gap
    return found
