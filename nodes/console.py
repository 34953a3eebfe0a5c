"""What people see: progress on stderr, results on stdout, errors in at most three lines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from protocol.errors import VeilmartError

QUIET_INTERVAL_S = 5.0  # off a terminal at most one line so often


class ProgressLine:
    """Progress of one stage at a time, as "stage done/all rate left"; call it, and `close` it at the end."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._terminal = sys.stderr.isatty()
        self._stage, self._started, self._printed = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, of: int) -> None:
        """Show how far a stage is."""
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started = stage, now
        if not self._enabled or (now - self._printed < (0.1 if self._terminal else QUIET_INTERVAL_S) and done < of):
            return
        if not self._terminal and now - self._printed < QUIET_INTERVAL_S:
            return
        self._printed = now
        seconds = now - self._started
        left = f"  {seconds / done * (of - done):.0f} s left" if done and seconds > 1 and done < of else ""
        text = f"{stage} {done}/{of}{left}"
        sys.stderr.write(f"\r\033[K{text}" if self._terminal else text + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line clean for what follows."""
        if self._enabled and self._terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def print_lines(*lines: str) -> None:
    """Print lines on stdout."""
    sys.stdout.write("\n".join(lines) + "\n")


def say(text: str) -> None:
    """Print a remark on stderr."""
    sys.stderr.write(text + "\n")


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
