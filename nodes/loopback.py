"""What the servers on loopback have in common: where they listen, which names they answer to, how a secret is compared.

A server on 127.0.0.1 is reached by every program and every web page of this machine's browsers.  What keeps them out is a secret; what
keeps out a page whose own name was made to resolve to 127.0.0.1 (DNS rebinding) is the Host header, which names that page's site.
"""

from __future__ import annotations

import hmac
import signal
import socket
from typing import TYPE_CHECKING

from protocol.errors import UsageError

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

HOST = "127.0.0.1"
HOST_NAMES = (HOST, "localhost")


def bind(port: int) -> socket.socket:
    """Return a socket on loopback; raise UsageError if the port is taken.  Port 0 takes a free one."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
        bound.listen(64)
    except OSError as error:
        bound.close()
        raise UsageError(f"--port: {port} cannot be used ({error.strerror})", hint="--port 0 takes a free one") from None
    return bound


def hosts_of(port: int) -> frozenset[str]:
    """Return the Host headers that a server on this port answers to, in lower case; a browser leaves out port 80."""
    return frozenset({*(f"{name}:{port}" for name in HOST_NAMES), *(HOST_NAMES if port == 80 else ())})


def same_secret(given: str, secret: bytes) -> bool:
    """Return whether a secret that somebody gave is the right one; how long that takes tells nothing of it."""
    return hmac.compare_digest(given.encode(errors="surrogateescape"), secret)


def make_server(application: ASGIApp) -> uvicorn.Server:
    """Return the HTTP server of an application; it runs on a socket of `bind`."""
    import uvicorn

    # No access log: its lines are of no use to one user, and a query string may hold anything.  No websockets: nothing here speaks them.
    config = uvicorn.Config(
        application, ws="none", log_config=None, access_log=False, server_header=False, limit_concurrency=64, timeout_graceful_shutdown=5,
    )  # fmt: skip
    return uvicorn.Server(config)


def run(server: uvicorn.Server, bound: socket.socket) -> None:
    """Serve on a bound socket until the process is told to stop, then return: from the main thread only."""
    # uvicorn stops at either signal, and raises it once more for whoever handled it before: by default that would end the process here,
    # before anything could be put in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run(sockets=[bound])
