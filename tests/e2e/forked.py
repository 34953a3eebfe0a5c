"""Market processes that start fast: forked from one that has imported what a market imports, which is most of a start."""

import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

IMPORTED = ["nodes.command", "market_node.command", "market_node.server", "market_node.database", "protocol.evaluation", "numba", "psycopg"]


class ForkedMarket:
    """`veilmart market up` on a fixed port, started and killed again and again.  harm: a function of a module, run before it."""

    def __init__(self, home: Path, *options: str, harm: Callable[[], None] | None = None) -> None:
        self.home, self.port, self._options, self._harm = home, 0, options, harm
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Return when it has said that it is ready."""
        words = ["market", "up", "--no-page", "--open", "--port", str(self.port), "--json", *self._options]
        ours, theirs = self._context.Pipe(duplex=False)
        self.process = self._context.Process(target=run, args=(words, str(self.home), theirs, self._harm), daemon=True)
        self.process.start()
        theirs.close()
        with io.TextIOWrapper(io.FileIO(ours.fileno(), closefd=False)) as said:
            line = said.readline()
        ours.close()
        assert line, (self.home / "market.log").read_text()[-2000:]
        told = json.loads(line)
        self.port, self.ca = int(told["address"].rpartition(":")[2]), Path(told["ca"])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        os.kill(self.process.pid, how)
        self.process.join(30)
        return self.process.exitcode


def run(words: list[str], home: str, told: Connection, harm: Callable[[], None] | None) -> None:
    """Be the command line, with its output on a pipe and its errors in a file."""
    if harm is not None:
        harm()
    os.environ["VEILMART_HOME"] = home
    with (Path(home) / "market.log").open("ab") as log:
        os.dup2(log.fileno(), 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(told.fileno(), "w", closefd=False))
    sys.argv = ["veilmart", *words]
    from nodes.command import main

    sys.exit(main())
