"""Help texts in the documentation, between markers: `python -m tests.help_blocks` writes them anew, a test compares.

<!-- help: veilmart find -->
<!-- /help -->
"""

import re
from pathlib import Path

import click

from nodes.command import program

FOLDER = Path(__file__).parent.parent
PAGES = [FOLDER / "README.md", *sorted((FOLDER / "docs").rglob("*.md"))]
BLOCK = re.compile(r"<!-- help: veilmart(?P<command>[a-z -]*) -->\n.*?<!-- /help -->", re.DOTALL)
WIDTH = 120


def help_of(command: str) -> str:
    """Return the help of a command, as plain text of a fixed width."""
    found = program(None)
    for word in command.split():
        found = found.commands[word]
    context = click.Context(found, info_name=f"veilmart {command}".strip(), max_content_width=WIDTH, terminal_width=WIDTH)
    context.help_option_names = ["-h", "--help"]
    return "\n".join(line.rstrip() for line in found.get_help(context).splitlines())


def written(page: str) -> str:
    """Return a page with every help text as the program prints it now."""

    def block(found: re.Match[str]) -> str:
        command = found["command"].strip()
        return f"{found[0].splitlines()[0]}\n```\n{help_of(command)}\n```\n<!-- /help -->"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for path in PAGES:
        before = path.read_text()
        if (after := written(before)) != before:
            path.write_text(after)
            click.echo(path)
