"""`explain`: what another command would send, before it is run."""

from __future__ import annotations

from typing import Annotated

import typer

from nodes.commands.options import Json, Map, show


def explain(
    command: Annotated[
        list[str],
        typer.Argument(metavar="COMMAND...", help="node publish, find, browse, ask, pull, node join, node withdraw or node rotate-key."),
    ],
    releases: Annotated[int, typer.Option("--releases", min=1, help="How many releases the market holds.")] = 1_000,
    adapter_bytes: Annotated[int, typer.Option("--adapter-bytes", min=0, help="Length of the adapter; 0: none is published.")] = 0,
    card_bytes: Annotated[
        int, typer.Option("--card-bytes", min=1, max=500, help="What you write on the card: name and summary together.")
    ] = 5,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Epsilon of the specification.")] = 1.0,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Say what a command would send, field by field with sizes, what stays here, and what the market sees.

    Sends nothing, draws nothing and reads none of your files: the messages are built with zeros of the right length.  Sizes are of the
    first run; later ones fetch less.

    Example: veilmart explain node publish --releases 200
    """
    from dataclasses import asdict

    from nodes.explain import Circumstances
    from nodes.explain import explain as explained
    from protocol.features import open_map

    told = explained(" ".join(command), Circumstances(open_map(which_map), releases, adapter_bytes, card_bytes, epsilon))
    result = {
        "schema": "veilmart.explain/1", "command": told.command, "stays": list(told.stays), "seen": list(told.seen),
        "calls": [
            {"call": call.name, "when": call.when, "size_bytes": call.size_bytes, "fields": [asdict(field) for field in call.fields]}
            for call in told.calls
        ],
    }  # fmt: skip
    lines = [f"veilmart {told.command} would send, to the market and to nobody else:"]
    for call in told.calls:
        lines += ["", f"{call.name}  {call.size_bytes} bytes: {call.when}"]
        lines += [f"  {field.name:<21}{field.size_bytes:>8}  {field.says}" for field in call.fields]
    lines += ["", "stays here"] + [f"  {line}" for line in told.stays] + ["the market also sees"] + [f"  {line}" for line in told.seen]
    show(result, as_json, [*lines, "nothing was sent, drawn or charged"])


COMMANDS = {"explain": explain}
