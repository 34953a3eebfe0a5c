"""The map: specifications in two dimensions, drawn with what their noise leaves unknown.

Specifications are public, so this is post-processing and costs no privacy.  The two axes are those along which the means spread most;
each mean weighs as it does in the score, tau2/(tau2 + w2/n~ + sigma^2), so that releases of much noise do not choose the axes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from market_node.page.reading import Entry, State
from protocol.features import FeatureMap
from protocol.web.picture import mark, tag, text

HALO = 2.4477  # standard deviations within which 95 % of a Gaussian in two dimensions lie
WIDTH, HEIGHT, MARGIN = 760, 480, 28
LARGEST_HALO = 400.0  # of the picture; beyond it a halo covers everything and says no more
KINDS = ("c1", "c2", "c3", "c4")  # of the most frequent domains; c5 of all others
CHARACTER = 7.4  # width of one in a label
# Where a label may stand, as seen from its mark; the first that is free is taken.
NEAR = (
    (10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"), (0, 20, "middle"),
    (7, -12, "start"), (-7, -12, "end"), (7, 20, "start"), (-7, 20, "end"),
)  # fmt: skip
SHARE_BEFORE = {"start": 0.0, "middle": 0.5, "end": 1.0}  # of a label, that lies before its anchor
DOTS = 20_000  # places without a link that are drawn at most


@dataclass(frozen=True, eq=False)
class Projection:
    """Where the releases of a state lie."""

    places: NDArray[np.float64]  # (N, 2)
    kept: float  # share of the squared distances that the two axes keep
    kept_without_noise: float  # the same of what is not noise
    unrelated: float  # distance of two unrelated tasks, as the map knows it


def project(state: State, feature_map: FeatureMap) -> Projection:
    """Return the projection of all releases of a state, found on those that stand."""
    means = state.means
    constants, dimension = feature_map.full, feature_map.dimension
    unrelated = float(np.sqrt(2 * dimension * constants.between))
    standing = np.array([entry.release_id not in state.gone for entry in state.entries[: state.size]], bool)
    if standing.sum() < 2:
        return Projection(np.zeros((len(means), 2)), 1.0, 1.0, unrelated)
    noise = np.array([entry.noise for entry in state.entries[: state.size]]) ** 2
    records = np.array([entry.records for entry in state.entries[: state.size]])
    weights = standing * constants.between / (constants.between + constants.within / records + noise)
    weights /= weights.sum()
    centred = means - weights @ means
    spread, axes = np.linalg.eigh((centred * weights[:, None]).T @ centred)  # ascending
    spread, axes = spread[::-1], axes[:, ::-1][:, :2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], 0) < 0, -1.0, 1.0)  # either sign is right: one is chosen
    # Noise lies along all axes alike: so much of each is noise.
    share = float(weights @ noise)
    signal, whole = float(spread[:2].sum() - 2 * share), float(spread.sum() - dimension * share)
    without = min(max(signal, 0.0) / whole, 1.0) if whole > 0 else 0.0
    return Projection(centred @ axes, float(spread[:2].sum() / spread.sum()) if spread.sum() > 0 else 1.0, without, unrelated)


def kinds_of(state: State) -> dict[str, str]:
    """Return the kind, colour and shape, of each of the most frequent domains; all others are c5."""
    counted = Counter(entry.domain for entry in state.standing)
    frequent = sorted(counted, key=lambda domain: (-counted[domain], domain))[: len(KINDS)]
    return dict(zip(frequent, KINDS, strict=False))


def facts(projection: Projection, kinds: dict[str, str], matched: Sequence[Entry], shown: Sequence[Entry]) -> dict[str, Any]:
    """Return the map as a JSON value: the places of the entries that are shown, with their halos, and of the others that match."""
    here = {entry.position for entry in shown}
    others = [entry.position for entry in matched if entry.position not in here][:DOTS]
    return {
        "kept": round(projection.kept, 4), "kept_without_noise": round(projection.kept_without_noise, 4),
        "unrelated": round(projection.unrelated, 4), "kinds": kinds,
        "points": [
            {
                "id": entry.release_id, "title": entry.title, "domain": entry.domain, "kind": kinds.get(entry.domain, "c5"),
                "x": round(float(projection.places[entry.position, 0]), 4), "y": round(float(projection.places[entry.position, 1]), 4),
                "halo": round(HALO * entry.noise, 4), "epsilon": entry.epsilon, "records": round(entry.records),
            }
            for entry in shown
        ],
        "others": np.round(projection.places[others], 4).tolist(),
    }  # fmt: skip


def sign(kind: str) -> Markup:
    """Return the mark of a kind alone, for a legend."""
    return tag("svg", mark(kind, 8, 8), viewBox="0 0 16 16", aria_hidden="true")


def drawn(found: dict[str, Any]) -> Markup:
    """Return the picture of `facts`: equal scales on both axes, since distances are what it is about."""
    points, others = found["points"], found["others"]
    places = np.array([[point["x"], point["y"]] for point in points] + others).reshape(-1, 2)
    if not len(places):
        return Markup("")
    low, high = places.min(axis=0), places.max(axis=0)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    spans = np.maximum(high - low, 0.15 * found["unrelated"])
    scale = float(min(width / spans[0], height / spans[1]))
    middle = (low + high) / 2

    def at(x: float, y: float) -> tuple[float, float]:
        return MARGIN + width / 2 + (x - middle[0]) * scale, MARGIN + height / 2 - (y - middle[1]) * scale

    centres = [at(point["x"], point["y"]) for point in points]
    parts = [tag("title", "Specifications in two dimensions; the table below has the same releases")]
    if others:
        dots = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in (at(*place) for place in others))
        parts.append(tag("path", class_="dots", d=dots))
    for point, (x, y) in zip(points, centres, strict=True):
        radius = min(point["halo"] * scale, LARGEST_HALO)
        parts.append(tag("circle", class_=f"halo {point['kind']}", cx=x, cy=y, r=radius))
    labels = _labels([(x, y, point["title"].partition("@")[0]) for point, (x, y) in zip(points, centres, strict=True)])
    for point, (x, y), (label_x, label_y, anchor, always) in zip(points, centres, labels, strict=True):
        told = f"{point['title']}: {point['domain']}, epsilon {point['epsilon']:g}, about {point['records']} records"
        name = text(label_x, label_y, point["title"].partition("@")[0], "label" if always else "label hidden", anchor)
        parts.append(tag("a", tag("title", told), mark(point["kind"], x, y), name, href=f"/releases/{point['id']}", aria_label=told))
    # A group, not an image: what is in an image is hidden from those who do not see it, and here are links.
    return tag("svg", *parts, class_="map", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="group", aria_label="Map of specifications")


def _labels(places: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, bool]]:
    """Return where each name stands, and whether it can be shown always: names near their marks that cover no other."""
    taken: list[tuple[float, float, float, float]] = [(x - 8, y - 8, x + 8, y + 8) for x, y, _ in places]
    found = []
    for x, y, name in places:
        length = CHARACTER * len(name)
        for right, down, anchor in NEAR:
            left, base = x + right - length * SHARE_BEFORE[anchor], y + down
            box = (left, base - 11, left + length, base + 3)
            inside = box[0] >= 2 and box[2] <= WIDTH - 2 and box[1] >= 2 and box[3] <= HEIGHT - 2
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                found.append((x + right, base, anchor, True))
                break
        else:  # shown while its mark is pointed at or has the focus
            way, anchor = (-10, "end") if x + 10 + length > WIDTH else (10, "start")
            found.append((x + way, y + 4, anchor, False))
    return found
