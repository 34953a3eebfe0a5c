"""The local page: `ui`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Base, Home, Json, Map, MaybeAuthority, MaybeMarket, show

OPENER = "ui-open.html"


def ui(
    home: Home,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8643,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in your browser.")] = False,
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life, for the page of the ledger.")] = 4.0,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    device: Annotated[str, typer.Option("--device", help="Where models compute: auto, cpu or cuda.")] = "auto",
    as_json: Json = False,
) -> None:
    """Serve your own page on this machine: matches, answers side by side, ledger, outlook and audits.

    It answers on 127.0.0.1 alone, to the browser that opens the printed address.  Nothing of it leaves that a command would not send.

    Example: veilmart ui --open
    """
    from nodes import console, loopback
    from nodes.market import Market
    from nodes.querier import Querier
    from nodes.ui.application import make_page_server
    from nodes.ui.door import Keys
    from nodes.ui.views import Views
    from nodes.ui.work import Worker

    named = Market(market, ca, home) if market is not None and ca is not None else None
    querier = Querier(named, home=home, feature_map=which_map, base=base, device=device)
    keys, bound = Keys(), loopback.bind(port)
    port = bound.getsockname()[1]
    with ExitStack() as stack:
        stack.enter_context(bound)
        worker = stack.enter_context(Worker())
        server = make_page_server(Views(querier, worker, budget), keys, port)
        url = f"http://{loopback.HOST}:{port}/?token={keys.token}"
        result = {"schema": "veilmart.ui/1", "url": url, "port": port, "market": market, "home": str(home), "pid": os.getpid()}
        show(result, as_json, [url, "your own page; whoever has this address has the page, until you stop it (Ctrl-C)"])
        sys.stdout.flush()
        if open_browser:
            stack.callback(open_in_browser(home, url))
        loopback.run(server, bound)
    console.say("stopped")


def open_in_browser(home: Path, url: str) -> Callable[[], None]:
    """Open the address in the user's browser, and return what removes the file that leads there."""
    import webbrowser

    from nodes import console

    # Through a file that only its owner reads: the arguments of a browser can be read by everybody on this machine.
    file = home / OPENER
    home.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(f'<!doctype html><title>veilmart</title><meta http-equiv="refresh" content="0; url={url}">\n')
    if not webbrowser.open(file.resolve().as_uri()):
        console.say("no browser could be opened: open the address yourself")
    return lambda: file.unlink(missing_ok=True)


COMMANDS = {"ui": ui}
