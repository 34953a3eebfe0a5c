"""Where things lie: `paths`."""

from __future__ import annotations

from typing import Annotated

import typer

from nodes.commands.options import Home, Json, show


def paths(
    home: Home,
    bundle: Annotated[bool, typer.Option("--bundle", help="Print the folder of the Flower bundle alone, for `flwr run`.")] = False,
    as_json: Json = False,
) -> None:
    """Print where veilmart keeps things.

    Example: veilmart paths --bundle
    """
    from nodes.bundle import FOLDER
    from nodes.configuration import user_file

    if bundle:
        show({"schema": "veilmart.paths/1", "bundle": str(FOLDER)}, as_json, [str(FOLDER)])
        return
    places = {
        "home": home, "models": home / "models", "market": home / "market", "campaigns": home / "market" / "campaigns",
        "flower": home / "market" / "flower", "bundle": FOLDER, "config": user_file(),
    }  # fmt: skip
    result = {"schema": "veilmart.paths/1", **{name: str(place) for name, place in places.items()}}
    show(result, as_json, [f"{name:<10}{place}" for name, place in places.items()])


COMMANDS = {"paths": paths}
