"""What the shell may complete beside words and files: learnwares and the market of this home.  Nobody is asked for them."""

from __future__ import annotations

import contextlib
from pathlib import Path

import typer

from nodes.known_market import market_of
from protocol.errors import VeilmartError

MOST = 100  # more would not fit a screen


def learnwares(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names, as NAME@HEX, of releases that were synced to this home."""
    from nodes.market_client import names_kept

    found: list[str] = []
    with contextlib.suppress(OSError, VeilmartError):  # a shell that completes says nothing of a damaged file
        for title in names_kept(_home(context)):
            if title.startswith(incomplete) and len(found) < MOST:
                found.append(title)
    return found


def markets(context: typer.Context, incomplete: str) -> list[str]:
    """Return the address of the market that this home knows."""
    known = market_of(_home(context))
    return [known.address] if known is not None and known.address.startswith(incomplete) else []


def _home(context: typer.Context) -> Path:
    from nodes.home import default_home

    return Path(context.params.get("home") or default_home())
