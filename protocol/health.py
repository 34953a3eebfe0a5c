"""Asking a market whether it serves, by gRPC's health protocol, and what time it has."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from protocol.channel import CALL_TIMEOUT_S, addresses_of, connect, error_from_status
from protocol.errors import MarketUnreachable

SERVICE = "veilmart.v1.Market"
TIME_KEY = "veilmart-time"  # in the trailing metadata of Check: the market's clock, Unix time in milliseconds


@dataclass(frozen=True, slots=True)
class Serving:
    """What a market that serves answered."""

    seconds: float  # that the answer took, connecting included
    ahead_s: float | None  # how far its clock is ahead of ours, known to half of those seconds; None: it does not say


def require_serving(market: str, ca: Path, timeout_s: float = CALL_TIMEOUT_S) -> Serving:
    """Return what the market at an address answered, of several the first that serves.

    Raises MarketUnreachable if none answers, or says that it is stopping.
    """
    *others, last = addresses_of(market)
    for address in others:
        with suppress(MarketUnreachable):
            return _ask(address, ca, timeout_s)
    return _ask(last, ca, timeout_s)


def _ask(address: str, ca: Path, timeout_s: float) -> Serving:
    import grpc
    from grpc_health.v1 import health_pb2 as pb
    from grpc_health.v1.health_pb2_grpc import HealthStub

    channel = connect(address, ca)
    try:
        began, asked = time.perf_counter(), time.time()
        answer, call = HealthStub(channel).Check.with_call(pb.HealthCheckRequest(service=SERVICE), timeout=timeout_s)
        seconds = time.perf_counter() - began
        told = str(dict(call.trailing_metadata() or ()).get(TIME_KEY, ""))
    except grpc.RpcError as error:
        raise error_from_status(error) from None
    finally:
        channel.close()
    if answer.status != pb.HealthCheckResponse.SERVING:
        raise MarketUnreachable(f"market {address}: it is stopping", hint="ask again when it has been started")
    return Serving(seconds, int(told) / 1000 - asked - seconds / 2 if told[:15].isdecimal() and len(told) < 16 else None)
