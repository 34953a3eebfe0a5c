"""The command line in the process of a test: parsed without being run, or run from its words to its exit code."""

import os
import sys
from dataclasses import dataclass
from unittest import mock

import click
import typer

from nodes.command import build, main
from nodes.configuration import commands_of

ROOT = typer.main.get_command(build(None))
COMMANDS = {" ".join(words): command for words, command in commands_of(ROOT)}


def accept(words: list[str]) -> click.Context:
    """Parse a command line as the program does, without running it; raise click's own error where it would."""
    command, context = ROOT, None
    while isinstance(command, click.Group) or hasattr(command, "commands"):
        context = command.make_context(command.name or "veilmart", list(words), parent=context)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        if not words and hasattr(command, "commands"):
            return context
    return command.make_context(name, list(words), parent=context)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> str:
        return self.out + self.err


def run(capsys, *words: str, home=None, **environment: str) -> Done:
    """Run a command from its words to its exit code, as the program does, in this process."""
    given = {**environment, **({"VEILMART_HOME": str(home)} if home is not None else {})}
    capsys.readouterr()
    with mock.patch.dict(os.environ, given), mock.patch.object(sys, "argv", ["veilmart", *words]):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    shown = capsys.readouterr()
    return Done(code, shown.out, shown.err)
