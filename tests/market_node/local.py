"""The market's calls without a network: a stub whose calls are the service's own, in this process and thread."""

import asyncio
from collections.abc import Callable

import grpc

from market_node.service import MarketService


class Refused(grpc.RpcError):
    """What a service's abort becomes at the client."""

    def __init__(self, code, details, trailing) -> None:
        super().__init__(details)
        self.code, self.details, self.trailing_metadata = lambda: code, lambda: details, lambda: trailing


class Context:
    """Of a call without a network."""

    def time_remaining(self) -> float:
        return 30.0

    def peer(self) -> str:
        return "local:0"

    def auth_context(self) -> dict[str, list[bytes]]:
        return {}

    async def abort(self, code, details, trailing_metadata=()):
        raise Refused(code, details, trailing_metadata)


class LocalStub:
    """Calls a service; streams are read to their end."""

    def __init__(self, service: MarketService) -> None:
        self._service, self._loop = service, asyncio.new_event_loop()

    def __getattr__(self, name: str) -> Callable:
        method = getattr(self._service, name)
        return lambda request, timeout=None: self._loop.run_until_complete(_whole(method(_sent(request), Context())))

    def close(self) -> None:
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


def _sent(request):
    """Return a message as it is, and an iterator of messages as the service reads it."""
    if hasattr(request, "ListFields"):
        return request

    async def stream():
        for message in request:
            yield message

    return stream()


async def _whole(answer):
    return [part async for part in answer] if hasattr(answer, "__aiter__") else await answer


class QuietService(MarketService):
    """A market whose index is no part of the test: no kernels are compiled, nothing is encoded, and the store is read in this thread.

    Nor is the reading of adapters, which is a process for each market.
    """

    def __init__(self, *args, **how) -> None:
        super().__init__(*args, **how)
        self._checkers.check = lambda file: None

    async def _store_call(self, call, *args):
        return call(*args)

    async def _require_sound(self, release) -> None:
        pass

    def _first_index(self) -> None:
        pass

    def _refresh_soon(self) -> None:
        pass
