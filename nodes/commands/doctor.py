"""What would not work on this machine, and why: `doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from nodes.commands.options import Base, Home, Json, Map, MaybeAuthority, MaybeMarket, Population, population_name
from protocol.errors import CheckFailed, UsageError


def doctor(
    home: Home,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    population: Population = "default",
    which_map: Map = "kme-lin-96",
    base: Base = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the names of failed checks only.")] = False,
    as_json: Json = False,
) -> None:
    """Look at this installation, this machine and the market for what would not work.  Exit code 4 if something would not.

    "unknown" means that there was nothing to look at.  Only the market is asked, and nothing is changed.

    Example: veilmart doctor --json
    """
    from nodes import console
    from nodes.doctor import Installation, examine
    from nodes.home import model_directory
    from nodes.populations import folder_of
    from protocol.features import open_map

    if (market is None) != (ca is None):
        raise UsageError("doctor: expected --market and --ca, or neither")
    progress = console.ProgressLine(not (as_json or quiet))
    here = Installation(
        home, model_directory(home, base), open_map(which_map).base_model, folder_of(home, population_name(population)), market, ca
    )
    findings = examine(here, progress)
    progress.close()
    failed = [finding for finding in findings if finding.holds is False]
    if as_json:
        console.print_json(
            {
                "schema": "veilmart.doctor/1", "ok": not failed,
                "checks": [{**asdict(finding), "advice": finding.advice if finding in failed else ""} for finding in findings],
            }
        )  # fmt: skip
    elif quiet:
        console.print_lines(*(finding.name for finding in failed))
    else:
        console.print_table(
            ["check", "result", "evidence"], [[finding.name, _WORDS[finding.holds], finding.evidence] for finding in findings]
        )
        for finding in failed:
            console.say(f"{finding.name}: {finding.advice}")
    if failed:
        raise typer.Exit(CheckFailed.exit_code)


_WORDS = {True: "ok", False: "FAILED", None: "unknown"}


COMMANDS = {"doctor": doctor}
