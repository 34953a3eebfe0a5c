"""Whether a market serves: gRPC's health protocol on the market's own port, and the question that `veilmart market health` asks.

The port is the market's own, since whoever reaches it may ask Describe, which says more.  Reflection is not served.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer, HealthStub

from market_node.service import check_deadline, refuse
from protocol.channel import CALL_TIMEOUT_S, connect, error_from_status
from protocol.errors import MarketUnreachable, UsageError

SERVICE = "veilmart.v1.Market"
SERVING, NOT_SERVING = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING


class Health(HealthServicer):  # type: ignore[misc]
    """SERVING from birth, NOT_SERVING once `stop` was called.

    gRPC's own servicer keeps a condition for every name that a stranger watches, and forgets those of others when one of them leaves.
    """

    def __init__(self) -> None:
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Say from now on, and to everyone who watches, that the market does not serve."""
        self._stopping.set()

    async def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """Answer whether the market serves."""
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return self._now()

    async def Watch(self, request: pb.HealthCheckRequest, context: Any) -> AsyncIterator[pb.HealthCheckResponse]:
        """Answer whether the market serves, and again when that changes.  Needs a deadline, as every call here."""
        try:
            check_deadline(context)
        except UsageError as error:
            await refuse(context, error)
        if request.service not in ("", SERVICE):
            yield pb.HealthCheckResponse(status=pb.HealthCheckResponse.SERVICE_UNKNOWN)
            return
        told = self._now()
        yield told
        if told.status == SERVING:  # what was told, not what is true by now: the market may have stopped while it was being told
            await self._stopping.wait()
            yield self._now()

    def _now(self) -> pb.HealthCheckResponse:
        return pb.HealthCheckResponse(status=NOT_SERVING if self._stopping.is_set() else SERVING)


def require_serving(address: str, ca: Path, timeout_s: float = CALL_TIMEOUT_S) -> None:
    """Return if the market at an address serves; raise MarketUnreachable if it does not answer, or says that it is stopping."""
    channel = connect(address, ca)
    try:
        answer = HealthStub(channel).Check(pb.HealthCheckRequest(service=SERVICE), timeout=timeout_s)
    except grpc.RpcError as error:
        raise error_from_status(error) from None
    finally:
        channel.close()
    if answer.status != SERVING:
        raise MarketUnreachable(f"market {address}: it is stopping", hint="ask again when it has been started")
