"""The options that several of the market's commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def default_home() -> Path:
    """Return the folder of everything that veilmart keeps, where VEILMART_HOME does not say otherwise."""
    import platformdirs

    return platformdirs.user_data_path("veilmart")


Home = Annotated[
    Path,
    typer.Option("--home", envvar="VEILMART_HOME", default_factory=default_home, help="Folder.", show_default="the user's data folder"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print ids only, no progress.")]
MarketAddress = Annotated[str, typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address of the market.")]
Authority = Annotated[Path, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority (ca.crt).")]
DatabaseUrl = Annotated[
    str,
    typer.Option(
        "--database",
        metavar="URL",
        help="Keep records in PostgreSQL, for several processes; no password in it.",
        show_default="what this folder says: first a file in it",
    ),
]
