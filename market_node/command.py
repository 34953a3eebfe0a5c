"""The market's commands; only typer is imported at the top, so that `veilmart --help` stays fast."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from market_node.server import Started


def default_home() -> Path:
    """Return the folder of everything that veilmart keeps, where VEILMART_HOME does not say otherwise."""
    import platformdirs

    return platformdirs.user_data_path("veilmart")


def up(
    home: Annotated[
        Path,
        typer.Option("--home", envvar="VEILMART_HOME", default_factory=default_home, help="Folder.", show_default="the user's data folder"),
    ],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 picks a free one.")] = 7443,
    name: Annotated[list[str] | None, typer.Option("--name", help="Host name or address for the certificate; repeatable.")] = None,
    which_map: Annotated[
        str, typer.Option("--map", envvar="VEILMART_MAP", help="Feature map of this market: a name that ships with veilmart, or a file.")
    ] = "kme-lin-96",
    simulation: Annotated[bool, typer.Option("--simulation", help="Accept releases made with simulated noise.")] = False,
    largest_epsilon: Annotated[
        float | None, typer.Option("--largest-epsilon", help="Refuse specifications above it.", show_default="2; a simulation takes all")
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Take specifications at this delta only.", show_default="1e-6; a simulation takes all")
    ] = None,
    smallest_count: Annotated[
        int | None,
        typer.Option("--smallest-count", help="Refuse noisy counts of units below it.", show_default="50; a simulation takes all"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Run a market until it is interrupted.

    Example: veilmart market up --port 7443
    """
    from market_node.server import run
    from protocol.admission import LENIENT, AdmissionPolicy
    from protocol.features import open_map

    default = LENIENT if simulation else AdmissionPolicy()
    policy = AdmissionPolicy(
        default.largest_epsilon if largest_epsilon is None else largest_epsilon,
        default.delta if delta is None else delta,
        default.smallest_count if smallest_count is None else smallest_count,
    )

    def ready(started: Started) -> None:
        if as_json:
            value = {
                "schema": "veilmart.market/1", "address": started.address, "ca": str(started.ca), "market_key": started.market_key.hex(),
                "releases": started.releases, "simulation": simulation,
            }  # fmt: skip
            sys.stdout.write(json.dumps(value) + "\n")
        else:
            sys.stdout.write(
                f"market {started.address}  key {started.market_key.hex()[:16]}  {started.releases} releases\n"
                f"clients need  --market {started.address} --ca {started.ca}\n"
            )
        sys.stdout.flush()

    run(home / "market", host, port, open_map(which_map), policy, simulation=simulation, names=tuple(name or ()), ready=ready)


def register(app: typer.Typer) -> None:
    """Add the market's commands."""
    group = typer.Typer(help="Run a market.", no_args_is_help=True)
    group.callback()(_group)
    group.command("up")(up)
    app.add_typer(group, name="market")


def _group() -> None:
    """Keep `veilmart market up` two words even while the group has one command."""
