"""Whether a market serves is told by gRPC's health protocol, and it stops telling so before its port closes."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthStub, add_HealthServicer_to_server

from market_node.health import NOT_SERVING, SERVING, Health
from protocol.channel import connect
from protocol.health import SERVICE
from protocol.wire import market_pb2
from tests.e2e.processes import environment, market_process, veilmart


def test_the_service_has_the_name_of_the_protocol():
    assert market_pb2.DESCRIPTOR.services_by_name["Market"].full_name == SERVICE


async def watched(stop_first: bool) -> list[object]:
    """Return what one who watches sees of a server that stops: statuses, then how the call ended."""
    health, server = Health(), grpc.aio.server()
    add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    seen: list[object] = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = HealthStub(channel).Watch(pb.HealthCheckRequest(), timeout=20)
        seen.append((await call.read()).status)
        if stop_first:
            health.stop()
        stopping = asyncio.create_task(server.stop(1.0))
        try:
            while (answer := await call.read()) is not grpc.aio.EOF:
                seen.append(answer.status)
            seen.append(await call.code())
        except grpc.aio.AioRpcError as error:
            seen.append(error.code())
        await stopping
    return seen


def test_who_watches_is_told_before_the_port_closes():
    assert asyncio.run(watched(stop_first=True)) == [SERVING, NOT_SERVING, grpc.StatusCode.OK]


def test_a_server_that_only_stops_tells_nobody():
    """Control."""
    assert NOT_SERVING not in asyncio.run(watched(stop_first=False))


@pytest.mark.slow
def test_a_market_process_is_healthy_until_it_is_told_to_stop(tmp_path):
    with market_process(tmp_path) as (started, process):
        told = json.loads(veilmart("market", "health", "--json", home=tmp_path))
        assert told["schema"] == "veilmart.health/1"
        assert told["serving"] is True
        channel = connect(started["address"], Path(started["ca"]))
        stub = HealthStub(channel)
        assert stub.Check(pb.HealthCheckRequest(service=SERVICE), timeout=10).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(pb.HealthCheckRequest(service="veilmart.v1.Other"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(pb.HealthCheckRequest()))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, "whoever watches for ever holds a stream for ever"
        watching = stub.Watch(pb.HealthCheckRequest(), timeout=30)
        assert next(watching).status == SERVING
        process.send_signal(signal.SIGTERM)
        assert [answer.status for answer in watching] == [NOT_SERVING]
        channel.close()
        assert process.wait(timeout=60) == 0
    command = [sys.executable, "-m", "nodes.command", "market", "health", "--timeout", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path), timeout=60, check=False)
    assert done.returncode == 6
    assert "no answer" in done.stderr
