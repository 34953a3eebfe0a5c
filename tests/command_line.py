"""The command line in the process of a test: parsed without being run, or run from its words to its exit code."""

import contextlib
import functools
import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click

from nodes import command
from nodes.configuration import commands_of

# The limit would be that of this process from then on, which could never raise it again.
_dumps = functools.partial(mock.patch.object, command, "dump_no_core")
_program = functools.cache(command.program)  # what it is made of does not change, and making it is most of what a small test costs
ROOT = _program(None)
COMMANDS = {" ".join(words): found for words, found in commands_of(ROOT)}


def accept(words: list[str]) -> click.Context:
    """Parse a command line as the program does, without running it; raise click's own error where it would."""
    assert "--install-completion" not in words, "parsing it changes the files of your shell"
    found, context = ROOT, None
    while isinstance(found, click.Group):
        context = found.make_context(found.name or "veilmart", list(words), parent=context)
        name, found, words = found.resolve_command(context, [*context._protected_args, *context.args])
        if not words and isinstance(found, click.Group):
            return context
    return found.make_context(name, list(words), parent=context)


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
    argv = mock.patch.object(sys, "argv", ["veilmart", *words])
    with mock.patch.dict(os.environ, given), mock.patch.object(command, "program", _program), _dumps(), argv:
        try:
            command.main()
        except SystemExit as ended:
            code = ended.code
    shown = capsys.readouterr()
    return Done(code, shown.out, shown.err)


def typed(words: list[str], folder: Path, environment: Mapping[str, str]) -> tuple[str, int]:
    """Run a command as `run` does, in a folder and an environment of its own; return what it prints, on either output, and how it ended."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        with mock.patch.dict(os.environ, environment, clear=True), mock.patch.object(sys, "argv", ["veilmart", *words]), _dumps():
            try:
                command.main()
            except SystemExit as ended:
                return out.getvalue(), int(ended.code or 0)
    raise AssertionError("the command line always exits")
