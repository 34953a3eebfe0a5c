"""The command `veilmart`: one program; each side registers its commands through the entry-point group `veilmart.commands`.

Only typer is imported at the top: `veilmart --help` answers in under half a second, so everything heavy waits inside the commands.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points, version
from typing import Annotated, Literal

import typer

from nodes.commands import (
    audit,
    audit_owner,
    browse,
    certificate,
    explain,
    find,
    guard,
    join,
    ledger,
    log,
    models,
    parts,
    paths,
    publish,
    reuse,
    simulation,
    train,
    ui,
    withdraw,
)
from protocol.errors import UsageError, VeilmartError

GROUPS = {
    "node": "Publish from your own data, and keep the ledger of what it cost.",
    "catalogue": "A market's releases and its log.",
    "audit": "Attack and recompute what is claimed about privacy.",
    "verify": "Check what a market signed, from files alone.",
    "model": "Base models.",
    "map": "Feature maps.",
}


def register(app: typer.Typer) -> None:
    """Add the commands of owner and querier: each module has a table from words to function."""
    groups: dict[str, typer.Typer] = {}
    modules = (
        simulation, find, browse, reuse, ui, explain, log, audit, audit_owner, parts, publish, withdraw, train, guard, join, certificate,
        ledger, models,
        paths,
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
        debug: Annotated[bool, typer.Option("--debug", envvar="VEILMART_DEBUG", help="Show tracebacks.", show_envvar=False)] = False,
    ) -> None:
        del shown, debug

    app.callback()(root)
    for point in sorted(entry_points(group="veilmart.commands"), key=lambda point: point.name):
        point.load()(app)
    return app


def main() -> None:
    """Run the command line and exit with the documented code."""
    # No command reaches any host but the configured market: what would telephone home by default is told not to.
    for name, value in (("HF_HUB_OFFLINE", "1"), ("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
        os.environ.setdefault(name, value)
    join.adopt_market(sys.argv)
    as_json, debug = "--json" in sys.argv, "--debug" in sys.argv or bool(os.environ.get("VEILMART_DEBUG"))
    import click

    from nodes.console import print_error

    # The overview of all commands is plain: loading rich for it would cost a third of its half second.
    overview = all(word.startswith("-") for word in sys.argv[1:])
    try:
        code = build(None if overview else "rich")(standalone_mode=False)
    except VeilmartError as error:
        if debug:
            raise
        print_error(error, as_json)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written: the path is the user's own, no private text
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(UsageError(f"{where}{error.strerror or type(error).__name__}"), as_json)
        sys.exit(UsageError.exit_code)
    except Exception as error:  # its text may hold private records, so only its type is shown
        if debug:
            raise
        print_error(VeilmartError(f"unexpected {type(error).__name__}", hint="--debug shows where"), as_json)
        sys.exit(VeilmartError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
