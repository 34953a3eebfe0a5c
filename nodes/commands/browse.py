"""What a market offers as a whole: `browse`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes.commands.options import Authority, Home, Json, Map, MarketAddress, Quiet
from protocol.errors import NotFound

if TYPE_CHECKING:
    from protocol.aggregation import Aggregates, Group
    from protocol.features import FeatureMap

NEAREST_SHOWN = 2


def browse(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Show this domain alone, filtered here: what stands before the first '-' of names.")
    ] = None,
    tree: Annotated[bool, typer.Option("--tree", help="Draw the tree over all releases.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Fetch all releases and recompute what the market signed.")] = False,
    which_map: Map = "kme-lin-96",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show what a market offers as a whole: its domains, how exactly each is known, which are near each other.

    To find the specialist for a task use `find`: nothing here knows your task, and the market sends everybody the same bytes.
    Exit code 7 if --verify finds that the market signed other numbers than its releases give.

    Example: veilmart browse --market 127.0.0.1:7443 --ca ca.crt --tree
    """
    from nodes import console
    from nodes.market_client import MarketClient
    from protocol.features import open_map
    from protocol.overview import tree_lines

    feature_map = open_map(which_map)
    with MarketClient(market, ca, home) as client:
        aggregates = client.recomputed_aggregates(feature_map) if verify else client.aggregates(feature_map)
        newest = client.checkpoint(client.market_key or b"")
    size = max(newest.size if newest is not None else 0, aggregates.state.size)
    if domain is not None and all(group.name != domain for group in aggregates.domains):
        raise NotFound(f"{domain}: no domain of this market", hint="`veilmart browse` without --domain lists them")
    if as_json:
        console.print_json(result_of(aggregates, feature_map, domain, size, verify))
        return
    if quiet:
        console.print_lines(*(group.name for group in aggregates.domains if domain in (None, group.name)))
        return
    rows = []
    for group in aggregates.domains:
        if domain in (None, group.name):
            near = [f"{other.name} {far:.2f} ± {std:.2f}" for far, std, other in aggregates.nearest(group, feature_map)[:NEAREST_SHOWN]]
            rows.append([group.name, *_figures(group, feature_map), ", ".join(near)])
    if domain is None:
        rows.append(["all", *_figures(aggregates.federation, feature_map), ""])
    console.print_table(["domain", "releases", "records", "as exact as", "noise", "nearest (0 the same, 1 unrelated)"], rows)
    if tree:
        console.print_lines(*tree_lines(aggregates, feature_map, domain))
    recomputed = "recomputed from all releases" if verify else "signed by the market; --verify recomputes it"
    behind = f", of {size} by now" if aggregates.state.size < size else ""
    console.say(f"as of {aggregates.state.size} releases{behind} and {aggregates.state.notices_size} notices; {recomputed}")
    console.next_step("find FILE")


def result_of(aggregates: Aggregates, feature_map: FeatureMap, domain: str | None, size: int, verified: bool) -> dict[str, Any]:
    """Return what `browse --json` prints."""
    from protocol.overview import described

    return {
        "schema": "veilmart.browse/1", "size": aggregates.state.size, "newest_size": size, "notices": aggregates.state.notices_size,
        "root": aggregates.state.root.hex(), "verified": verified, **described(aggregates, feature_map, domain),
    }  # fmt: skip


def _figures(group: Group, feature_map: FeatureMap) -> Sequence[str]:
    noise = f"{group.noise_variance**0.5:.4f}" if group.releases else "-"
    return [str(group.releases), str(group.units), f"{group.effective_units(feature_map):.0f}", noise]


COMMANDS = {"browse": browse}
