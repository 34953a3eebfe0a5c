"""T23: what decides about a budget, the order of releases and a log's history reads no clock, so none can be set wrong for it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
DECIDES = {
    "a budget": ("nodes/ledger.py", "nodes/accountant.py", "nodes/populations.py", "protocol/privacy.py"),
    "the order of releases": ("protocol/release.py", "protocol/catalogue.py"),
    "what a log held": ("protocol/transparency.py", "protocol/notices.py", "protocol/proof.py"),
}
CLOCKS = {"time", "datetime", "sched", "calendar"}


def clocks(source: str) -> set[str]:
    """Return the clocks that `source` could read: modules it imports, and those of SQL in its texts."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names} & CLOCKS
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0]} & CLOCKS
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {word for word in ("CURRENT_TIMESTAMP", "strftime(", "unixepoch(", "datetime('now") if word in node.value}
    return found


@pytest.mark.parametrize("path", [path for paths in DECIDES.values() for path in paths])
def test_what_decides_reads_no_clock(path):
    assert clocks((ROOT / path).read_text()) == set()


BROKEN = {
    "a budget of a day": "import time\n\ndef spent(entries):\n    return sum(e.cost for e in entries if e.at > time.time() - DAY)\n",
    "by a date": "def spent(entries):\n    from datetime import date\n    return sum(e.cost for e in entries if e.day == date.today())\n",
    "by the database": "SPENT = \"SELECT sum(cost) FROM entry WHERE at > datetime('now', '-30 days')\"\n",
}


@pytest.mark.parametrize("source", BROKEN.values(), ids=BROKEN)
def test_a_budget_that_comes_back_with_time_would_be_seen(source):
    assert clocks(source)


def readings(source: str) -> set[str]:
    """Return the calls in `source` that ask what time it is."""
    calls = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return {call.attr for call in calls if isinstance(call, ast.Attribute)} & {"now", "today", "utcnow", "time", "time_ns"}


def test_whether_a_release_holds_is_decided_by_the_day_that_is_given():
    assert readings((ROOT / "protocol" / "window.py").read_text()) == set()
    assert readings("def holds(window):\n    return window.first <= date.today().toordinal() <= window.last\n")
