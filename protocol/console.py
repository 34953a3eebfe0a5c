"""What people see, on either side: progress and hints on stderr, results on stdout, errors in at most three lines.

Tables are drawn on a terminal and tab-separated when piped.  `NO_COLOR` and `VEILMART_NO_PROGRESS` (`--no-progress`) are heeded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from protocol.errors import VeilmartError

NO_PROGRESS = "VEILMART_NO_PROGRESS"  # an environment variable, so that the processes of a simulation keep silent too
QUIET_INTERVAL_S = 5.0  # off a terminal at most one line so often
TERMINAL_INTERVAL_S = 0.1


class ProgressLine:
    """Progress of one stage at a time, as "stage done/all, rate, time left"; call it, and `close` it at the end."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled and not os.environ.get(NO_PROGRESS)
        self._terminal = sys.stderr.isatty()
        self._stage, self._started, self._printed = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, of: int) -> None:
        """Show how far a stage is."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started = stage, now
        if not self._enabled or (now - self._printed < (TERMINAL_INTERVAL_S if self._terminal else QUIET_INTERVAL_S) and done < of):
            return
        if not self._terminal and now - self._printed < QUIET_INTERVAL_S:
            return
        self._printed = now
        text = f"{stage} {done}/{of}{_pace(done, of, now - self._started)}"
        sys.stderr.write(f"\r\033[K{text}" if self._terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line clean for what follows."""
        if self._enabled and self._terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _pace(done: int, of: int, seconds: float) -> str:
    """Return rate and time left; nothing before there is anything to judge by."""
    if not done or seconds <= 1:
        return ""
    rate = done / seconds
    left = f"  {duration((of - done) / rate)} left" if done < of else ""
    return f"  {rate:.3g}/s{left}"


def duration(seconds: float) -> str:
    """Return a duration as 42 s, 3:20 min or 2:05 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    large, small = divmod(whole if whole < 6000 else whole // 60, 60)
    return f"{large}:{small:02d} {'min' if whole < 6000 else 'h'}"


def print_json(value: dict[str, Any], indent: int | None = 1) -> None:
    """Print one JSON object on stdout; indent None: on one line, as a program expects that reads lines."""
    sys.stdout.write(json.dumps(value, indent=indent, allow_nan=False) + "\n")
    sys.stdout.flush()


def print_lines(*lines: str) -> None:
    """Print lines on stdout."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a remark on stderr."""
    sys.stderr.write(text + "\n")


def next_step(command: str) -> None:
    """Name the command that usually follows, on stderr: at most once a command, never with --json or --quiet."""
    say(f"next: veilmart {command}")


def show(result: dict[str, Any], as_json: bool, lines: Sequence[str], then: str = "") -> None:
    """Print the result as JSON, or as lines for people; then: the command that usually follows, without `veilmart`."""
    if as_json:
        print_json(result)
        return
    print_lines(*lines)
    if then:
        next_step(then)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Print a table: drawn on a terminal, tab-separated when piped."""
    if not sys.stdout.isatty():
        print_lines("\t".join(columns), *("\t".join(row) for row in rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title or None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: names from a market are data, never markup
    Console().print(table)


def print_error(error: VeilmartError, as_json: bool) -> None:
    """Print what went wrong, and what to do, on stderr; as one JSON object on stdout when the caller asked for JSON."""
    if as_json:
        numbers = {name: value for name, value in vars(error).items() if name != "hint" and isinstance(value, int | float)}
        print_json({"error": {"code": error.code, "message": str(error), "hint": error.hint, **numbers}})
        return
    sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
