"""What a token costs where the cores are free, and where other programs have them too: how long torch's threads spin decides it.

    python -m tests.bench.spinning [--base DIR] [--tokens N] [--rounds N]

A process of its own decodes with the base model under each setting of GOMP_SPINCOUNT, alone and beside as many busy processes as there are
cores, in turns; the median over rounds.  "-" is the library's own default, which spins for long.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from nodes.machine import cores
from tests.bench.tables import markdown

SETTINGS = ("-", "0", "1000", "100000")
PROMPT = "Write a long story about a ship that sails around the world, with every harbour it visits."


def decode(base: Path, tokens: int) -> float:
    """Return the seconds of a token, after some that are not counted."""
    from nodes.base_model import BaseModel
    from nodes.reuse.strategies import Strategy, Wish, assemble

    assistant = assemble(Wish(Strategy.BASE, specialists=0), BaseModel.open(base))

    def seconds(limit: int) -> float:
        started, stream = time.perf_counter(), assistant.stream([("user", PROMPT)], limit)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return (time.perf_counter() - started) / int(end.value.tokens)

    seconds(4)
    return seconds(tokens)


@contextmanager
def company(count: int) -> Iterator[None]:
    """Keep so many processes busy while the block runs."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in busy:
            one.kill()
            one.wait()


def main() -> None:
    """Print milliseconds a token."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VEILMART_HOME") or platformdirs.user_data_path("veilmart"))
    parser.add_argument("--base", type=Path, default=home / "models" / "smollm2-135m")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.once:
        print(decode(asked.base, asked.tokens))
        return
    words = [sys.executable, "-m", "tests.bench.spinning", "--once", "--base", str(asked.base), "--tokens", str(asked.tokens)]
    found: dict[tuple[str, int], list[float]] = {(setting, others): [] for setting in SETTINGS for others in (0, cores())}
    for _ in range(asked.rounds):
        for (setting, others), seconds in found.items():
            # An empty value is none to the library, and keeps the product from setting its own.
            environment = os.environ | {"GOMP_SPINCOUNT": "" if setting == "-" else setting}
            with company(others):
                shown = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
            seconds.append(float(shown))
            sys.stderr.write(f"{setting} beside {others}: {1e3 * seconds[-1]:.0f} ms a token\n")
    rows = [[setting, *(f"{1e3 * statistics.median(found[setting, others]):.0f}" for others in (0, cores()))] for setting in SETTINGS]
    print(markdown(["GOMP_SPINCOUNT", "ms a token alone", f"beside {cores()} busy processes"], rows))


if __name__ == "__main__":
    main()
