"""The page's process: `veilmart market web`, and what `veilmart market up` starts beside the market."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from market_node.events import tell_of_end
from market_node.metrics import host_and_port, is_loopback
from protocol.errors import UsageError
from protocol.processes import Program, Supervisor, dies_with_us, free_port

LOG = "page.log"
GENTLE = 10  # how much the page gives way to the market where both want the same core
CONNECTIONS = 256
# The map's axes come from small matrices: more threads gain nothing there, and spin on the cores that the market wants.
# Pages are drawn by whichever thread is free, and glibc gives each thread a heap of its own, which keeps the most that any page took there:
# maps of 2 000 releases cost 1.9 MB more when a thread changed, with two heaps nothing; 1 200 releases more 14 MB, with two 9 (measured).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def serve(home: Path, where: str, which_map: str, *, market_key: bytes | None, ready: Callable[[str], None]) -> None:
    """Serve a market's page in this process until it is told to stop; `ready` is called with its address.

    where: [HOST:]PORT.  Raises NotFound where there is no market, and UsageError for an address that cannot be had.
    """
    import uvicorn

    from market_node.events import write_events
    from market_node.page.application import application
    from market_node.page.condition import Condition
    from market_node.page.reading import Reading

    write_events(sys.stderr)
    host, port = host_and_port(where, "--page")
    reading = Reading(home, which_map, market_key)
    bound = _bind(host, port)
    os.nice(GENTLE)
    reading.state()  # before the first visitor, who would wait for all releases
    app = application(reading, Condition(home), show_counts=is_loopback(host))
    # No access log: who looked at what is nobody's business.  No websockets: nothing here speaks them.
    config = uvicorn.Config(
        app, ws="none", lifespan="off", log_config=None, log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        limit_concurrency=CONNECTIONS, timeout_keep_alive=5, timeout_graceful_shutdown=2,
    )  # fmt: skip
    ready(shown(host, bound.getsockname()[1]))
    try:
        uvicorn.Server(config).run(sockets=[bound])
    finally:
        reading.close()


def shown(host: str, port: int) -> str:
    """Return an address as a browser takes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


@contextmanager
def beside(home: Path, where: str, which_map: str, market_key: bytes) -> Iterator[str]:
    """Run the page as a process beside the market, started again whenever it ends; yield its address.

    It may fail as it likes: a port that is taken, a crash, a page that hangs when it should stop.  The market goes on.
    """
    host, port = host_and_port(where, "--page")
    port = port or free_port()
    words = (sys.executable, "-m", "market_node.page", str(home), f"{host}:{port}", which_map, market_key.hex())
    program = Program("page", (*dies_with_us(), *words), ENVIRONMENT | os.environ, home / LOG)
    with Supervisor([program], tell_of_end):
        yield shown(host, port)


def _bind(host: str, port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen(128)  # whoever is told of the address may connect at once
    except OSError as error:
        bound.close()
        raise UsageError(f"--page {host}:{port}: {error.strerror}", hint="is the port in use?  0 picks a free one") from None
    return bound
