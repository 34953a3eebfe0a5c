"""Whether a market serves: gRPC's health protocol on the market's own port; `protocol/health.py` asks.

The port is the market's own, since whoever reaches it may ask Describe, which says more.  Reflection is not served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthServicer

from market_node.service import check_deadline, refuse
from protocol.errors import UsageError
from protocol.health import SERVICE, TIME_KEY

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
        context.set_trailing_metadata(((TIME_KEY, str(round(1000 * time.time()))),))  # for whoever wonders whose clock is wrong
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
