"""The command `veilmart`: one program; each side registers its commands through the entry-point group `veilmart.commands`.

Only typer is imported at the top: `veilmart --help` answers in under half a second, so everything heavy waits inside the commands.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nodes.commands import (
    audit,
    audit_owner,
    browse,
    certificate,
    configuration,
    doctor,
    explain,
    find,
    guard,
    join,
    ledger,
    log,
    market,
    models,
    parts,
    paths,
    publish,
    reuse,
    show,
    simulation,
    train,
    ui,
    withdraw,
)
from nodes.commands.kinds import dress, silence_progress
from protocol.console import NO_PROGRESS
from protocol.errors import UsageError, VeilmartError

if TYPE_CHECKING:
    import click

GROUPS = {
    "config": "What is configured, and where.",
    "node": "Publish from your own data, and keep the ledger of what it cost.",
    "catalogue": "A market's releases and its log.",
    "audit": "Attack and recompute what is claimed about privacy.",
    "verify": "Check what a market signed, from files alone.",
    "model": "Base models.",
    "map": "Feature maps.",
}


def register(app: typer.Typer) -> None:
    """Add the commands of owner and querier: each module has a table from words to function."""
    # The market's side may have made a group of the same name already.
    groups = {group.name: group.typer_instance for group in app.registered_groups if group.name and group.typer_instance}
    modules = (
        simulation, find, browse, show, reuse, ui, explain, log, audit, audit_owner, parts, publish, withdraw, train, guard, join,
        certificate, ledger, models, market, configuration, doctor, paths,
    )  # fmt: skip
    for module in modules:
        for words, function in module.COMMANDS.items():
            *group, command = words.split()
            into = app
            if group:
                (name,) = group
                if name not in groups:
                    groups[name] = typer.Typer(help=GROUPS[name], no_args_is_help=True)
                    groups[name].callback()(_group)
                    app.add_typer(groups[name], name=name)
                into = groups[name]
            into.command(command)(function)


def _group() -> None:
    """Keep `veilmart node publish` two words even while the group has one command."""


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"veilmart {version('veilmart')}\n")
        raise typer.Exit


def build(markup: Literal["rich"] | None = "rich") -> typer.Typer:
    """Return the program with the commands of every side that is installed; markup: how help is drawn."""
    app = typer.Typer(
        name="veilmart", help="A private market of specialised small language models.",
        rich_markup_mode=markup,
        no_args_is_help=True, pretty_exceptions_enable=False,  # pretty tracebacks print local variables: private records
        context_settings={"help_option_names": ["-h", "--help"]}, suggest_commands=False,
    )  # fmt: skip

    def root(
        shown: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)] = False,
        # The variables stand in the texts: typer would load rich to show them, which is a third of the half second.
        config: Annotated[
            Path | None,
            typer.Option(
                "--config", envvar="VEILMART_CONFIG", show_envvar=False, metavar="FILE", help="Configuration (TOML), not ./veilmart.toml."
            ),
        ] = None,
        no_progress: Annotated[
            bool, typer.Option("--no-progress", envvar=NO_PROGRESS, show_envvar=False, help="Show no progress (VEILMART_NO_PROGRESS=1).")
        ] = False,
        debug: Annotated[
            bool, typer.Option("--debug", envvar="VEILMART_DEBUG", show_envvar=False, help="Show tracebacks (VEILMART_DEBUG=1).")
        ] = False,
    ) -> None:
        silence_progress(no_progress)
        del shown, config, debug  # the commands and main() look for these

    app.callback()(root)
    for point in sorted(entry_points(group="veilmart.commands"), key=lambda point: point.name):
        point.load()(app)
    return dress(app)


def program(markup: Literal["rich"] | None = "rich") -> click.Command:
    """Return the program as click runs it."""
    from typer.main import get_command

    return get_command(build(markup))


def dump_no_core() -> None:
    """Have a crash of this process, or of one that it starts, leave nothing: a core would hold records, queries and keys.

    One byte and not none: where a program takes the dumps, the kernel heeds no limit but this one (fs/coredump.c).
    """
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    least = 0 if most == 0 else 1
    resource.setrlimit(resource.RLIMIT_CORE, (least, least))


def main() -> None:
    """Run the command line and exit with the documented code."""
    # No command reaches any host but the configured market: what would telephone home by default is told not to.
    # gRPC would write a line of its own for every handshake that fails, beside our error.
    quiet = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "GRPC_VERBOSITY": "NONE"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    dump_no_core()
    logging.raiseExceptions = False  # a log that cannot be written would print the exception that was to be told of, with its message
    as_json, debug = "--json" in sys.argv, "--debug" in sys.argv or bool(os.environ.get("VEILMART_DEBUG"))
    import click

    from nodes.console import print_error

    # The overview of all commands is plain: loading rich for it would cost a third of its half second.
    overview = all(word.startswith("-") for word in sys.argv[1:])
    try:
        code = program(None if overview else "rich").main(prog_name="veilmart", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug and not isinstance(error, click.ClickException):
            raise
        told = _told(error)
        print_error(told, as_json)
        sys.exit(told.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _told(error: Exception) -> VeilmartError:
    """Return what a person is told of an error: nothing of what it may quote, unless it was written for people."""
    import click

    if isinstance(error, VeilmartError):
        return error
    if isinstance(error, click.ClickException):
        return _usage(error)
    if isinstance(error, OSError):  # a full disk, a folder that may not be written: the path is the user's own, no private text
        where = f"{error.filename}: " if error.filename else ""
        return UsageError(f"{where}{error.strerror or type(error).__name__}")
    # Its text may hold private records, so only its type is shown, and where it was raised.
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f" at {Path(last.tb_frame.f_code.co_filename).name}:{last.tb_lineno}" if last is not None else ""
    return VeilmartError(f"unexpected {type(error).__name__}{where}", hint="--debug shows more, which may hold private text")


def _usage(error: click.ClickException) -> UsageError:
    """Return click's error in our form.  What was given beyond the arguments is not repeated: it may be half of a question."""
    context = getattr(error, "ctx", None)
    command, message = context.command_path if context is not None else "veilmart", error.format_message().rstrip(".")
    if message.startswith("Got unexpected extra argument"):
        message = "more arguments than expected; a text with blanks needs quotes"
    return UsageError(f"{command}: {message[:1].lower()}{message[1:]}", hint=f"`{command} --help` has an example")


if __name__ == "__main__":
    main()
