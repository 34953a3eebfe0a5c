"""Aggregates as programs and people read them: what `veilmart browse` prints, and the market's page shows."""

from __future__ import annotations

from collections import Counter
from typing import Any

from protocol.aggregation import CENTRE_SCALE, WEIGHT_SCALE, Aggregates, Distance, Group
from protocol.features import FeatureMap


def described(aggregates: Aggregates, feature_map: FeatureMap, domain: str | None = None) -> dict[str, Any]:
    """Return the federation, its domains with their neighbours, and the tree, as a JSON value; of one domain alone where it is named."""

    def plain(group: Group) -> dict[str, Any]:
        exact = group.releases > 0
        return {
            "releases": group.releases, "records": group.units,
            "records_as_exact": group.effective_units(feature_map), "weight": group.weight / WEIGHT_SCALE,
            "noise_std": group.noise_variance**0.5 if exact else None, "std": group.variance**0.5 if exact else None,
            "mean": [round(coordinate, 6) for coordinate in group.mean.tolist()],
        }  # fmt: skip

    domains = [
        {
            "domain": group.name, **plain(group),
            "nearest": [
                {"domain": other.name, "separation": far, "std": std} for far, std, other in aggregates.nearest(group, feature_map)
            ],
        }
        for group in aggregates.domains if domain in (None, group.name)
    ]  # fmt: skip
    leaves = [
        {"number": number, "title": leaf.title, "releases": leaf.releases}
        for number, leaf in enumerate(aggregates.leaves)
        if domain in (None, leaf.domain)
    ]
    merges = [
        {"left": merge.left, "right": merge.right, "separation": separation}
        for merge, separation in zip(aggregates.merges, separations(aggregates, feature_map), strict=True)
    ]
    return {"federation": plain(aggregates.federation), "domains": domains, "tree": {"leaves": leaves, "merges": merges}}


def tree_lines(aggregates: Aggregates, feature_map: FeatureMap, domain: str | None = None) -> list[str]:
    """Return the tree as lines: branches with their separation, leaves with titles; of one domain those alone that hold some of it."""
    leaves, heights = aggregates.leaves, separations(aggregates, feature_map)
    inside: list[Counter[str]] = [Counter({leaf.domain: leaf.releases}) for leaf in leaves]
    for merge in aggregates.merges:
        inside.append(inside[merge.left] + inside[merge.right])
    lines: list[str] = []

    def draw(number: int, first: str, rest: str) -> None:
        if number < len(leaves):
            leaf = leaves[number]
            lines.append(first + leaf.title + (f" and {leaf.releases - 1} more" if leaf.releases > 1 else ""))
            return
        merge, parts = aggregates.merges[number - len(leaves)], inside[number].most_common(3)
        more = ", ..." if len(inside[number]) > len(parts) else ""
        words = ", ".join(f"{name} {count}" for name, count in parts)
        lines.append(f"{first}{heights[number - len(leaves)]:.2f}  {words}{more}")
        below = [part for part in (merge.left, merge.right) if domain is None or inside[part][domain]]
        for part in below:
            last = part == below[-1]
            draw(part, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    if inside:
        draw(len(inside) - 1, "", "")
    return lines


def separations(aggregates: Aggregates, feature_map: FeatureMap) -> list[float]:
    """Return the separation at which each merge of the tree joins its branches: 0 the same task, 1 unrelated ones."""
    return [Distance(merge.height / CENTRE_SCALE**2, 0.0).separation(feature_map)[0] for merge in aggregates.merges]
