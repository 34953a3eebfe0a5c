"""Passes connections from one address to another: python -m nodes.gate FROM TO, each unix:PATH or HOST:PORT.

A unix socket is found by its path from every network namespace, so a pair of these is a door between two of them, and the only one.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal

CHUNK = 64 << 10
CONNECTIONS = 64  # at a time; a program in a sandbox has no claim to more


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()


async def _open(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("unix:"):
        return await asyncio.open_unix_connection(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def serve(source: str, target: str, ready: int | None, parent: int | None) -> None:
    """Pass connections on until the parent is another process than it was."""
    places = asyncio.Semaphore(CONNECTIONS)

    async def passed_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with places:
            try:
                far_reader, far_writer = await _open(target)
            except OSError:
                writer.close()
                return
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))
            far_writer.close()
            writer.close()

    if source.startswith("unix:"):
        path = source.removeprefix("unix:")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        server = await asyncio.start_unix_server(passed_on, path)
        os.chmod(path, 0o666)  # the folder that it lies in says who may
    else:
        host, _, port = source.rpartition(":")
        server = await asyncio.start_server(passed_on, host, int(port))
    if ready is not None:
        os.write(ready, b"1")
        os.close(ready)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    while not stop.is_set() and (parent is None or os.getppid() == parent):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), 1.0)
    server.close()


def main() -> None:
    """Serve from the command line."""
    parser = argparse.ArgumentParser(prog="nodes.gate")
    parser.add_argument("source")
    parser.add_argument("target")
    parser.add_argument("--ready", type=int, help="Write one byte to this descriptor when listening.")
    parser.add_argument("--parent", type=int, help="End when this is no longer the parent.")
    asked = parser.parse_args()
    asyncio.run(serve(asked.source, asked.target, asked.ready, asked.parent))


if __name__ == "__main__":
    main()
