"""The page of threats is complete, and names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| T")]
MAY_STAND_UNPROTECTED = {"T13", "T16", "T17", "T20"}  # without memory; many fetches; timing; backdoors


def named_in(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)


def missing(text: str) -> list[str]:
    """Return the tests named in `text` that are not there."""
    named = named_in(text)
    sources = {file: (ROOT / "tests" / file).read_text() if (ROOT / "tests" / file).exists() else "" for file, _ in named}
    return [f"{file}::{name}" for file, name in named if f"\ndef {name}(" not in sources[file]]


def test_every_threat_has_one_row():
    assert [row[0] for row in ROWS] == [f"T{number}" for number in range(1, 28)]
    assert {len(row) for row in ROWS} == {6}


def test_every_test_that_is_named_exists():
    assert missing(PAGE) == []
    assert len(named_in(PAGE)) > 80


def test_a_name_that_does_not_exist_would_be_found():
    gone = "`protocol/test_noise.py::test_that_nobody_wrote`, `protocol/test_nothing.py::test_two_processes_never_draw_equal_noise`"
    assert len(missing(gone)) == 2


def test_what_is_held_has_a_test_and_a_control():
    for number, _, _, shown, control, state in ROWS:
        assert re.match(r"(held|in part|open|not protected)\b", state), f"{number}: {state}"
        if state.startswith("held"):
            assert named_in(shown), f"{number} names no test"
            assert named_in(control), f"{number} names no control"


def test_nothing_but_what_cannot_be_protected_is_left_unprotected():
    assert {row[0] for row in ROWS if "not protected" in row[5].lower()} <= MAY_STAND_UNPROTECTED
