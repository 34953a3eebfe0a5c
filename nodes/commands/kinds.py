"""What all commands have in common, whichever side registers them: configuration, and options that may stand anywhere.

`veilmart --no-progress find ...` and `veilmart find ... --no-progress` are one; a command's own help does not list these.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from nodes.configuration import NEVER, defaults, key_of, variable_of
from protocol.console import NO_PROGRESS

FILE = "veilmart.config"  # in a context: the file that --config names


def silence_progress(wanted: bool) -> None:
    """Show no progress, here and in the processes that this one starts."""
    if wanted:
        os.environ[NO_PROGRESS] = "1"


class Group(TyperGroup):
    """Commands under one noun: without one it shows its help, and `ls` is `list`."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name or by the hidden alias."""
        return super().get_command(ctx, "list" if cmd_name == "ls" else cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what stands before the command."""
        if not args and not ctx.resilient_parsing:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


class Command(TyperCommand):
    """A command whose options take their defaults from environment and configuration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            TyperOption(param_decls=["--config"], hidden=True, expose_value=False),
            TyperOption(
                param_decls=["--no-progress"], is_flag=True, default=False, hidden=True, expose_value=False, envvar=NO_PROGRESS,
                callback=lambda ctx, param, value: silence_progress(value),
            ),
            TyperOption(param_decls=["--debug"], is_flag=True, default=False, hidden=True, expose_value=False),  # main() looks for it
        ]  # fmt: skip

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command's arguments, over the defaults that are configured."""
        if not ctx.resilient_parsing and ctx.parent is not None:  # completion reads no file, and neither does help
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            helping = self.get_help_option(ctx)
            if helping is None or helping.name not in given:
                self._configure(ctx, given)
        return super().parse_args(ctx, args)

    def _configure(self, ctx: click.Context, given: dict[str, Any]) -> None:
        root = ctx.find_root()
        words = words_of(ctx)
        options = {key_of(option): option for option in self.params if isinstance(option, click.Option)}
        for key, option in options.items():
            if key not in NEVER:
                option.envvar = variable_of(words, option)
        file = ctx.meta[FILE] = given.get("config") or root.params.get("config")
        found = defaults(root.command, words, self, given, Path(str(file)) if file else None)
        ctx.default_map = {options[key].name or key: setting.value for key, setting in found.items()}


def words_of(ctx: click.Context) -> tuple[str, ...]:
    """Return the words of the command that a context is for, by their names and not by an alias."""
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, ctx.command.name or "")
        ctx = ctx.parent
    return tuple(words)


def dress(app: typer.Typer) -> typer.Typer:
    """Return a program with all its commands of these kinds."""
    app.info.cls = Group
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        group.cls = Group
        if group.typer_instance is not None:
            dress(group.typer_instance)
    return app
