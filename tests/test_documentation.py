"""Documentation describes what is there: every command line shown is one that the program accepts, every file named exists."""

import ast
import contextlib
import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from tests.command_line import accept
from tests.help_blocks import written
from tests.transcripts import steps_in

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TYPED = re.compile(r"^```\w*\n\$ .*?^```", re.DOTALL | re.MULTILINE)  # a transcript: what is typed, and what is printed


def lines_of(page: str) -> list[str]:
    """Return the command lines that a page shows."""
    typed = [step.typed for step in steps_in(page) if step.typed.startswith("veilmart")]
    found = [*typed, *re.findall(r"(?:^(?:    \$ )?|`)(veilmart [^`\n]+)", TYPED.sub("", page), re.MULTILINE)]
    return [re.sub(r" &$|; echo \$\?$", "", line) for line in found]


LINES = [(page, line) for page in PAGES for line in lines_of(page.read_text())]


@pytest.mark.parametrize("line", [line for _, line in LINES], ids=[f"{page.name}: {line[:60]}" for page, line in LINES])
def test_a_command_shown_is_one_that_the_program_accepts(line, monkeypatch):
    for name in ("VEILMART_MARKET", "VEILMART_CA"):
        monkeypatch.setenv(name, "x")  # a page may leave out what another line of it sets
    words = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    # A sentence may name a command without what it works on; help and completion end where they are asked for.
    with contextlib.suppress(click.MissingParameter, click.exceptions.Exit):
        accept(words)


def test_a_command_that_does_not_exist_would_be_noticed():
    with pytest.raises(click.UsageError):
        accept(["find", "x.jsonl", "--market", "a:1", "--ca", "c", "--no-such-option"])
    with pytest.raises(click.UsageError):
        accept(["frobnicate", "now"])


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists() or target.startswith("http"), f"{page.name}: {target}"


def test_tests_named_in_the_documents_exist():
    everything = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in everything, f"{page.name} names {name}"


def test_help_texts_are_what_the_program_prints():
    """`python -m tests.help_blocks` writes them anew."""
    pages = [page for page in PAGES if "<!-- help: " in page.read_text()]
    assert pages
    for page in pages:
        assert written(page.read_text()) == page.read_text(), page.name


def test_an_old_help_text_would_be_noticed():
    page = "<!-- help: veilmart paths -->\n```\nold\n```\n<!-- /help -->"
    assert written(page) != page
    assert "--bundle" in written(page)
    assert written(written(page)) == written(page)


PYTHON = [(page, code) for page in PAGES for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)]


def unknown(code: str) -> list[str]:
    """Return what a piece of Python imports that is not there."""
    imported = [one for one in ast.walk(ast.parse(code)) if isinstance(one, ast.ImportFrom) and one.module]
    return [f"{one.module}.{name.name}" for one in imported for name in one.names if not hasattr(import_module(one.module), name.name)]


@pytest.mark.parametrize("code", [code for _, code in PYTHON], ids=[page.name for page, _ in PYTHON])
def test_python_that_is_shown_imports_what_is_there(code):
    assert unknown(code) == []


def test_python_that_imports_what_is_not_there_would_be_noticed():
    assert unknown("from protocol import Release, Frobnicator") == ["protocol.Frobnicator"]
