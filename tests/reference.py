"""The API reference of the three packages, as pages: `python -m tests.reference DIR`."""

import sys
from importlib import import_module
from pathlib import Path

import pdoc

PACKAGES = ("protocol", "nodes", "market_node")
GENERATED = ("protocol.wire", "market_node.migrations")
NO_LIBRARY = ("nodes.bundle",)  # what Flower loads: importing it starts an app


def write(folder: Path) -> None:
    """Write a page for every module."""
    for package in map(import_module, PACKAGES):
        for name in getattr(package, "__all__", ()):
            getattr(package, name)  # loaded at its first use, and pdoc shows what is loaded
    pdoc.pdoc(*PACKAGES, *(f"!{name}" for name in (*GENERATED, *NO_LIBRARY)), output_directory=folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
