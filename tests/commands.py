"""A command in this process."""

import json

from nodes.command import build


def run(capsys, *words) -> dict:
    """Return the JSON that a command prints; raises what it raises."""
    build(None)([*map(str, words), "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)
