"""The other processes of one market: who serves beside this one, and questions to guards that dialled in there.

Each holds the lock of a file in the market's folder that says its address; a file that nobody holds is of a process that ended.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import grpc

from market_node.authority import CERTIFICATE
from protocol.channel import OPTIONS, error_from_status
from protocol.errors import GuardUnreachable, MarketUnreachable, UsageError
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub

FOLDER, LOCK = "processes", "lock"
PASSED_ON = ("veilmart-passed-on", "1")  # a question that another process of this market sent: it goes no further
INTRODUCE_S = 5.0
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


class FolderLock:
    """A market's folder, held as long as its file is open."""

    def __init__(self, file: IO[str], alone: bool) -> None:
        self._file, self.alone = file, alone

    def share(self) -> None:
        """Let other processes in; until then nobody else works on the folder, where this one came first."""
        fcntl.flock(self._file, fcntl.LOCK_SH)


@contextmanager
def lock_folder(home: Path, *, shared: bool) -> Iterator[FolderLock]:
    """Hold a market's folder, as the only process or, where it may be shared, as one of several.

    Raises UsageError where it may not be shared and another market holds it.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / LOCK).open("w") as file:
        lock = FolderLock(file, alone=True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not shared:
                raise UsageError(f"{home}: another market is running on this folder") from None
            lock.alone = False
            lock.share()
        yield lock


class Neighbours:
    """What one process knows of the others."""

    def __init__(self, home: Path) -> None:
        self._folder, self._ca = home / FOLDER, home / CERTIFICATE
        self._own = secrets.token_hex(8)
        self._channels: dict[tuple[str, bytes], grpc.aio.Channel] = {}

    @contextmanager
    def announced(self, address: str) -> Iterator[None]:
        """Tell the others where this process serves, as long as it does."""
        host, _, port = address.rpartition(":")
        self._folder.mkdir(exist_ok=True, mode=0o700)
        unseen, path = self._folder / f".{self._own}", self._folder / self._own
        with unseen.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # before it is seen: what nobody holds is removed
            file.write(f"{EVERYWHERE.get(host, host)}:{port}")
            file.flush()
            os.replace(unseen, path)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def addresses(self) -> list[str]:
        """Return where the others serve now."""
        found = []
        for path in sorted(self._folder.glob("[!.]*")):
            if path.name == self._own:
                continue
            try:
                with path.open() as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        found.append(file.read())
                    else:
                        path.unlink(missing_ok=True)
            except FileNotFoundError:  # it ended meanwhile
                continue
        return found

    async def introduction(self, release_id: bytes) -> bytes | None:
        """Return the introduction of a guard that dialled in at another process, or None."""
        found = await self._who_has(release_id)
        return found[1] if found else None

    async def ask(self, release_id: bytes, sealed: bytes, patience_s: float) -> bytes | None:
        """Return what a guard that dialled in at another process answers, or None where there is none; raise what that process says."""
        found = await self._who_has(release_id)
        if found is None:
            return None
        request = pb.SealedQuestion(release_id=release_id, sealed=sealed)
        try:
            return bytes((await found[0].Ask(request, timeout=patience_s, metadata=(PASSED_ON,))).sealed)
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error) from None

    async def close(self) -> None:
        """Close the connections to the others."""
        for channel in self._channels.values():
            await channel.close()

    async def _who_has(self, release_id: bytes) -> tuple[MarketStub, bytes] | None:
        async def ask(stub: Any) -> bytes:
            request = pb.IntroductionRequest(release_id=release_id)
            return bytes((await stub.GetIntroduction(request, timeout=INTRODUCE_S, metadata=(PASSED_ON,))).introduction)

        stubs = await self._stubs()
        for stub, answer in zip(stubs, await asyncio.gather(*map(ask, stubs), return_exceptions=True), strict=True):
            if isinstance(answer, bytes):
                return stub, answer
            if not isinstance(answer, grpc.aio.AioRpcError):
                raise answer
            if not isinstance(error := error_from_status(answer), (GuardUnreachable, MarketUnreachable)):
                raise error
        return None

    async def _stubs(self) -> list[MarketStub]:
        addresses, ca = await asyncio.to_thread(lambda: (self.addresses(), self._ca.read_bytes()))
        current = {(address, ca) for address in addresses}
        for gone in self._channels.keys() - current:
            await self._channels.pop(gone).close()
        for address, authority in current - self._channels.keys():
            credentials = grpc.ssl_channel_credentials(authority)
            self._channels[address, authority] = grpc.aio.secure_channel(
                address, credentials, options=[*OPTIONS, ("grpc.enable_http_proxy", 0)]
            )
        return [MarketStub(self._channels[key]) for key in sorted(current)]  # type: ignore[no-untyped-call]  # generated


def was_passed_on(context: grpc.aio.ServicerContext) -> bool:
    """Return whether a call comes from another process of this market, or says so: all it gets by that is a shorter search."""
    return PASSED_ON in tuple(context.invocation_metadata() or ())
