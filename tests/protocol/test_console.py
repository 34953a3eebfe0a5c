"""What is shown, where, and what is not shown to whom did not ask for it."""

import json
import sys

import pytest

from protocol import console
from protocol.console import NO_PROGRESS, ProgressLine, duration, print_table, show


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    monkeypatch.delenv(NO_PROGRESS, raising=False)
    return now


def worked(clock, enabled=True) -> None:
    """A stage of 100 records at two records a second."""
    progress = ProgressLine(enabled)
    for done in range(1, 101):
        clock[0] += 0.5
        progress("embed", done, 100)
    progress.close()


def test_off_a_terminal_a_stage_says_something_every_five_seconds(clock, capsys):
    worked(clock)
    lines = capsys.readouterr().err.splitlines()
    assert 9 <= len(lines) <= 11
    assert lines[5].startswith("embed ")
    assert "/s" in lines[5]
    assert lines[5].endswith(" s left")


def test_on_a_terminal_the_last_line_is_cleared(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    worked(clock)
    shown = capsys.readouterr().err
    assert "\r\033[Kembed 50/100  2.04/s  24 s left" in shown
    assert shown.endswith("\r\033[K")


def test_progress_is_silent_where_it_is_not_wanted(clock, capsys, monkeypatch):
    worked(clock, enabled=False)
    monkeypatch.setenv(NO_PROGRESS, "1")
    worked(clock)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (200, "3:20 min"), (7500, "2:05 h")])
def test_a_duration_is_said_as_a_person_does(seconds, said):
    assert duration(seconds) == said


def test_a_table_is_tab_separated_when_piped_and_drawn_on_a_terminal(capsys, monkeypatch):
    print_table(["id", "name"], [["1", "[red]a[/red]"]])
    assert capsys.readouterr().out == "id\tname\n1\t[red]a[/red]\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    print_table(["id", "name"], [["1", "[red]a[/red]"]])
    drawn = capsys.readouterr().out
    assert "\t" not in drawn
    assert "[red]a[/red]" in drawn, "a name is no markup"
    assert "\033[3" not in drawn, "no colour"


def test_the_next_step_is_no_part_of_the_result(capsys):
    show({"schema": "veilmart.x/1"}, False, ["done"], then="find FILE")
    assert capsys.readouterr() == ("done\n", "next: veilmart find FILE\n")
    show({"schema": "veilmart.x/1"}, True, ["done"], then="find FILE")
    shown = capsys.readouterr()
    assert (json.loads(shown.out), shown.err) == ({"schema": "veilmart.x/1"}, "")
