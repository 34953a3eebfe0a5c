"""A TCP proxy on loopback that does to connections what networks do: late, in pieces, half-open, reset, cut, and well again.

with FaultProxy("127.0.0.1", port) as proxy:
    proxy.latency_s = 0.2           # each piece of data is on its way so long
    proxy.slice_bytes = 1           # data arrive in pieces of so many bytes
    proxy.silence("down")           # half-open: of connections that are there, one direction carries nothing any more, for good
    proxy.hold = {"up", "down"}     # a partition: nothing passes, new connections neither, and all of it goes on after healing
    proxy.lose_answer()             # what goes up passes; the first bytes that come down reset the connection instead
    proxy.reset(); proxy.drop()     # RST or FIN to both ends of all connections
    proxy.refusing = True           # connections are closed as soon as they are there
    proxy.heal()
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field

UP, DOWN = "up", "down"  # to the server, to the client
LOOK_S = 0.01


@dataclass(eq=False)
class Link:
    """One connection through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    silent: set[str] = field(default_factory=set)

    def end(self, reset: bool) -> None:
        for writer in (self.client, self.server):
            if reset:
                with suppress(OSError):  # an end that closed by itself has no socket any more
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            else:
                writer.close()


class FaultProxy:
    """Its faults may be set from any thread; they hold until `heal`."""

    def __init__(self, host: str, port: int) -> None:
        self._target, self._links, self._loop = (host, port), set[Link](), asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.accepted, self.lost_answers = 0, 0
        self.heal()

    def heal(self) -> None:
        """Carry everything again; what was cut or silenced stays so, as after a router was exchanged."""
        self.latency_s, self.slice_bytes, self.refusing, self._losing = 0.0, 0, False, False
        self.hold: set[str] = set()

    def silence(self, *directions: str) -> None:
        """Carry nothing in these directions on the connections that are there, and tell neither end."""
        self._in_loop(lambda: [link.silent.update(directions) for link in self._links])

    def lose_answer(self) -> None:
        """Reset the connection that is the next to bring something down."""
        self._losing = True

    def reset(self) -> None:
        """End all connections by RST."""
        self._in_loop(lambda: [link.end(reset=True) for link in list(self._links)])

    def drop(self) -> None:
        """End all connections by FIN."""
        self._in_loop(lambda: [link.end(reset=False) for link in list(self._links)])

    def _in_loop(self, what) -> None:
        done = threading.Event()
        self._loop.call_soon_threadsafe(lambda: (what(), done.set()))
        assert done.wait(60)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(60)
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accepted, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self._ready.set()
        await self._stop.wait()
        server.close()
        for link in list(self._links):
            link.end(reset=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # asyncio logs of a server's task that was cancelled
            await self._through(reader, writer)

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        while self.hold and not self.refusing:
            await asyncio.sleep(LOOK_S)
        try:
            if self.refusing:
                raise ConnectionError
            from_server, to_server = await asyncio.open_connection(*self._target)
        except OSError:
            writer.close()
            return
        link = Link(writer, to_server)
        self._links.add(link)
        try:
            await asyncio.gather(self._carry(link, UP, reader, to_server), self._carry(link, DOWN, from_server, writer))
        finally:
            self._links.discard(link)
            link.end(reset=False)

    async def _carry(self, link: Link, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(64 << 10):
                if direction == DOWN and self._losing:
                    self._losing, self.lost_answers = False, self.lost_answers + 1
                    link.end(reset=True)
                    return
                if self.latency_s:
                    await asyncio.sleep(self.latency_s)
                size = self.slice_bytes or len(data)
                for start in range(0, len(data), size):
                    while direction in self.hold:
                        await asyncio.sleep(LOOK_S)
                    if direction in link.silent:
                        break
                    writer.write(data[start : start + size])
                    if size < len(data):
                        await writer.drain()
                        await asyncio.sleep(0)
                await writer.drain()
        except OSError:
            pass
        finally:
            if direction not in link.silent and not writer.is_closing():
                writer.close()
