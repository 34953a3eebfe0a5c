"""Write the locks of docs/deploy: what run-time needs, each package with the hashes of all its files.

    python -m tests.bench.lock --cpu sha256:DIGEST

Versions are those of constraints.txt.  torch stands apart: with what its CUDA build needs in one file, as its CPU build in another; so does
what a market over PostgreSQL needs.  The package index does not list CPU builds of torch:
`pip install --dry-run --no-deps --report - torch==VERSION+cpu` gives the hash of the one at hand.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ENTRY = re.compile(r"^[A-Za-z0-9].*(?:\n    --hash=.*)*", re.MULTILINE)
CUDA = re.compile(r"(nvidia|cuda)-|triton==|torch==")
HOW = "# Made by `python -m tests.bench.lock` from pyproject.toml and constraints.txt, for Linux on x86-64 and Python 3.11.\n"


def compiled(*options: str) -> list[str]:
    """Return the entries, each with its hashes."""
    command = [
        str(Path(sys.executable).parent / "uv"), "pip", "compile", "pyproject.toml", "-c", "constraints.txt", "--generate-hashes",
        "--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28", "--no-header", "--no-annotate", "--no-emit-index-url",
        *options,
    ]  # fmt: skip
    return ENTRY.findall(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cpu", required=True, action="append", metavar="sha256:DIGEST", help="of torch's CPU build; repeatable")
    cpu = sorted(parser.parse_args().cpu)
    entries = compiled()
    (torch,) = (entry.partition(" ")[0] for entry in entries if entry.startswith("torch=="))
    locks = {
        "requirements.lock": [entry for entry in entries if not CUDA.match(entry)],
        "requirements-cuda.lock": [entry for entry in entries if CUDA.match(entry)],
        "requirements-postgres.lock": [entry for entry in compiled("--extra", "postgres") if entry not in entries],
        "requirements-cpu.lock": [" \\\n".join([f"{torch}+cpu", *(f"    --hash={digest}" for digest in cpu)])],
    }
    for file, chosen in locks.items():
        (ROOT / "docs" / "deploy" / file).write_text(HOW + "\n".join(chosen) + "\n")
        print(f"{file}: {len(chosen)} packages")


if __name__ == "__main__":
    main()
