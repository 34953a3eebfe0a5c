"""What is configured: `config show`, `config path`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes.commands.options import Json, show
from protocol.errors import UsageError

if TYPE_CHECKING:
    import click

DEFAULT = "default"


def config_show(
    context: typer.Context,
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Show what this command starts from.", show_default="all that is set")
    ] = None,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    as_json: Json = False,
) -> None:
    """Show what the environment and the files set, or every option that a command starts from.

    A file is TOML: [all] holds options for every command, [node] those for `veilmart node ...`, [node.publish] those for one command, as in

        [all]
        market = "market.example:7443"
        [find]
        top = 3

    Example: veilmart config show find --origin
    """
    from nodes import console
    from nodes.commands.kinds import FILE
    from nodes.configuration import files

    root, explicit = context.find_root(), context.meta.get(FILE)
    chosen = Path(str(explicit)) if explicit else None
    rows = _of_command(root.command, tuple(command), chosen) if command else _all(root.command, chosen)
    result = {
        "schema": "veilmart.config/1", "command": " ".join(command or ()) or None, "files": [str(path) for path in files(chosen)],
        "settings": [{"key": key, "value": value, "origin": where} for key, value, where in rows],
    }  # fmt: skip
    if as_json:
        console.print_json(result)
        return
    columns = ["key", "value", *(["origin"] if origin else [])]
    console.print_table(columns, [[key, _shown(value), where][: len(columns)] for key, value, where in rows])
    if not rows:
        console.say("nothing is set: every option has its own default")


def config_path(as_json: Json = False) -> None:
    """Print where your configuration lies, or would: it is read by every command, below ./veilmart.toml.

    Example: veilmart config path
    """
    from nodes.configuration import PROJECT_FILE, user_file

    path = user_file()
    result = {"schema": "veilmart.config-path/1", "user": str(path), "exists": path.is_file(), "project": PROJECT_FILE}
    show(result, as_json, [str(path)])


def _all(root: click.Command, explicit: Path | None) -> list[tuple[str, Any, str]]:
    """Return everything that is set: by its place in a file, or by the name of a variable; the highest for each command."""
    import os

    from nodes.configuration import commands_of, options_of, settings, variable_of

    rows: dict[str, tuple[str, Any, str]] = {}
    for words, command in commands_of(root):
        for option in options_of(command).values():
            if value := os.environ.get(name := variable_of(words, option)):
                rows[name] = (name, value, "environment")
    for found in settings(root, explicit).values():
        for setting in found.values():
            rows[f"{setting.origin}:{setting.place}"] = (setting.place, setting.value, setting.origin)
    return list(rows.values())


def _of_command(root: click.Command, words: tuple[str, ...], explicit: Path | None) -> list[tuple[str, Any, str]]:
    """Return every option of a command with the value that it starts from."""
    import os

    from nodes.configuration import commands_of, defaults, options_of, variable_of

    command = dict(commands_of(root)).get(words)
    if command is None:
        raise UsageError(f"config show: there is no command {' '.join(words)!r}", hint="`veilmart --help` lists them")
    found, rows = defaults(root, words, command, {}, explicit), []
    for key, option in options_of(command).items():
        if value := os.environ.get(name := variable_of(words, option)):
            rows.append((key, value, name))
        elif key in found:
            rows.append((key, found[key].value, found[key].origin))
        else:
            default = option.default() if callable(option.default) else option.default
            rows.append((key, _plain(default), DEFAULT))
    return rows


def _plain(value: Any) -> Any:
    """Return a default as JSON takes it; None where the option has none."""
    return value if isinstance(value, str | int | float | bool | list) or value is None else str(value) if isinstance(value, Path) else None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


COMMANDS = {"config show": config_show, "config path": config_path}
