"""A real market process that strangers flood: others are served as before, and memory stays bounded."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protocol.channel import CHUNK_BYTES, CODE_KEY, OPTIONS, RETRY_KEY
from protocol.encryption import STD128
from protocol.features import default_map
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketServicer, MarketStub, add_MarketServicer_to_server
from tests.e2e.processes import market_process
from tests.e2e.test_load import MEGABYTE, forget_peak, memory

pytestmark = [pytest.mark.slow, pytest.mark.alone]
MAP = default_map()
HEADER_ONLY, SILENT, SLOW, SLOW_BYTES_S = 200, 2_000, 20, 1_000
HONEST_CALLS = 300
IN_FLIGHT, A_CONNECTION = 10_000, 64


@pytest.fixture
def market(tmp_path):
    with market_process(tmp_path / "home", options=("--open", "--metrics", "0")) as (started, process):
        yield started, process


def channel(started, number: int) -> grpc.aio.Channel:
    # Channels with equal options share one connection, and a connection carries 64 calls.
    credentials = grpc.ssl_channel_credentials(Path(started["ca"]).read_bytes())
    return grpc.aio.secure_channel(started["address"], credentials, options=[*OPTIONS, ("veilmart.channel", number)])


def settled(pid: int) -> int:
    """Return the memory of a market that has loaded its kernels, as it does beside serving."""
    before = 0
    while (now := memory(pid, "VmRSS")) != before:
        before = now
        time.sleep(3)
    return now


async def p99_of(stub: MarketStub) -> float:
    """Return the 99th percentile, in milliseconds, of calls one after the other."""
    taken = []
    for _ in range(HONEST_CALLS):
        before = time.perf_counter()
        await stub.Describe(pb.DescribeRequest(), timeout=20)
        taken.append(1e3 * (time.perf_counter() - before))
    return float(np.percentile(taken, 99))


async def never(chunk_after_s: float = 1000.0):
    await asyncio.sleep(chunk_after_s)
    yield pb.MatchChunk()


async def dribble(context: ssl.SSLContext, host: str, port: int) -> None:
    """Speak TLS, then send a kilobyte of HTTP/2 a second: the preface, and then frames that carry nothing."""
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    del reader
    with contextlib.suppress(OSError, asyncio.CancelledError):
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        while True:
            writer.write(bytes([0, 0, 100, 0xFA, 0, 0, 0, 0, 0]) + bytes(100))  # of an unknown type, which must be ignored
            await writer.drain()
            await asyncio.sleep(109 / SLOW_BYTES_S)
    writer.transport.abort()


async def all_closed(connections: list[socket.socket]) -> None:
    """Return when the other side has closed all of these."""
    loop = asyncio.get_running_loop()

    async def end(connection: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while await loop.sock_recv(connection, 4096):
                pass
        connection.close()

    await asyncio.gather(*map(end, connections))


async def idle_and_flooded(started) -> tuple[float, float, float]:
    """Return the honest p99 without and with strangers, medians of five rounds, and the seconds until silent connections were closed."""
    host, _, port = started["address"].rpartition(":")
    context = ssl.create_default_context(cafile=started["ca"])
    context.set_alpn_protocols(["h2"])
    honest = channel(started, 0)
    stub, loop = MarketStub(honest), asyncio.get_running_loop()
    await p99_of(stub)  # warm
    idle = [await p99_of(stub) for _ in range(3)]
    attackers = [channel(started, number) for number in range(1, 1 + HEADER_ONLY // 50)]
    calls = [MarketStub(attackers[number % len(attackers)]).Match(never(), timeout=100) for number in range(HEADER_ONLY)]
    slow = [asyncio.create_task(dribble(context, host, int(port))) for _ in range(SLOW)]
    silent = []
    for _ in range(SILENT):
        connection = socket.socket()
        connection.setblocking(False)
        await loop.sock_connect(connection, (host, int(port)))
        silent.append(connection)
    opened = time.monotonic()
    closing = asyncio.create_task(all_closed(silent))
    closing.add_done_callback(lambda _: took.append(time.monotonic() - opened))
    took: list[float] = []
    flooded = [await p99_of(stub) for _ in range(5)]
    assert not any(task.done() for task in slow), "the slow ones are still there"
    await asyncio.wait_for(closing, 30)
    for call in calls:
        call.cancel()
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)
    for one in attackers:
        await one.close()
    await asyncio.sleep(1)
    idle += [await p99_of(stub) for _ in range(2)]
    await honest.close()
    return float(np.median(idle)), float(np.median(flooded)), took[0]


def test_silent_slow_and_header_only_clients_do_not_slow_others_down(market):
    settled(market[1].pid)  # or idle would be slower than it is
    for _ in range(3):  # whatever else the machine does adds to some rounds; what a flood does would be in all of them
        idle, flooded, closed_s = asyncio.run(idle_and_flooded(market[0]))
        print(f"honest p99 idle {idle:.2f} ms, flooded {flooded:.2f} ms; silent connections closed after {closed_s:.1f} s")  # noqa: T201
        if flooded <= 2 * idle:
            break
    assert flooded <= 2 * idle
    assert closed_s <= 10


def test_a_server_of_threads_is_stopped_by_eight_header_only_streams():
    """Control: gRPC's other kind of server gives each call a thread, and a stream that says nothing keeps it."""

    class Threads(MarketServicer):
        def Describe(self, request, context):
            return pb.MarketDescription()

        def Match(self, request, context):
            yield from (pb.ScoresChunk() for _ in request)

    server = grpc.server(ThreadPoolExecutor(8))
    add_MarketServicer_to_server(Threads(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    silence = threading.Event()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as plain:
        stub = MarketStub(plain)
        stub.Describe(pb.DescribeRequest(), timeout=5)
        calls = [stub.Match(iter(lambda: silence.wait(30), True), timeout=30) for _ in range(8)]
        time.sleep(0.5)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Describe(pb.DescribeRequest(), timeout=2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        silence.set()
        for call in calls:
            call.cancel()
    server.stop(0).wait(5)


async def storm(started, *, eager: bool) -> tuple[Counter, int]:
    """Return how 10 000 queries at once ended, and how many were open at the same time.

    eager: whether clients send the whole query without a look at what the market says.  They are refused as the others are, but gRPC's
    asyncio client then reports its own failed write, INTERNAL, instead of the status that came; the market's side tells what that was.
    """
    channels = [channel(started, number) for number in range(IN_FLIGHT // A_CONNECTION + 1)]
    body = bytes(STD128.query_bytes)
    open_now = most = 0

    async def parts():
        if not eager:
            await asyncio.sleep(15)
        yield pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, catalogue_size=1, catalogue_head=bytes(32))
        for start in range(0, len(body), CHUNK_BYTES):
            yield pb.MatchChunk(data=body[start : start + CHUNK_BYTES])

    async def ask(number: int) -> str:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        try:
            async for _ in MarketStub(channels[number % len(channels)]).Match(parts(), timeout=100):
                pass
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            return f"{error.code().name} {trailing.get(CODE_KEY)} {trailing.get(RETRY_KEY)}"
        finally:
            open_now -= 1
        return "answered"

    outcomes = Counter(await asyncio.gather(*(ask(number) for number in range(IN_FLIGHT))))
    for one in channels:
        await one.close()
    return outcomes, most


def counted(started) -> dict[str, float]:
    """Return how Match calls ended, as the market counted them."""
    text = urllib.request.urlopen(f"http://{started['metrics']}/metrics", timeout=10).read().decode()
    families = text_string_to_metric_families(text)
    ended = [sample for family in families for sample in family.samples if sample.name == "veilmart_calls_total"]
    return {sample.labels["outcome"]: sample.value for sample in ended if sample.labels["call"] == "Match" and sample.value}


def storm_at(market, *, eager: bool) -> tuple[int, Counter, dict[str, float]]:
    """Return by how many bytes the market grew, how 10 000 queries ended at their clients, and how at the market."""
    started, process = market
    idle = settled(process.pid)
    forget_peak(process.pid)
    before = time.monotonic()
    outcomes, most = asyncio.run(storm(started, eager=eager))
    grown, ended = memory(process.pid, "VmHWM") - idle, counted(started)
    print(f"idle {idle >> 20} MB, peak +{grown >> 20} MB, {time.monotonic() - before:.0f} s; clients {dict(outcomes)}; market {ended}")  # noqa: T201
    assert most == IN_FLIGHT
    return grown, outcomes, ended


# The 32 that had a place; without a release, the market has no such state of its catalogue.
SERVED = "FAILED_PRECONDITION catalogue.stale None"


def test_ten_thousand_queries_at_once_meet_one_refusal(market):
    grown, outcomes, _ = storm_at(market, eager=False)
    assert set(outcomes) == {SERVED, "RESOURCE_EXHAUSTED quota 1"}
    assert grown <= 300 * MEGABYTE


def test_ten_thousand_whole_queries_at_once_take_bounded_memory(market):
    grown, _, ended = storm_at(market, eager=True)
    assert grown <= 300 * MEGABYTE
    assert set(ended) <= {"FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "CANCELLED"}


def test_a_market_with_the_limits_of_grpc_alone_resets_queries_without_a_word(tmp_path):
    """Control."""
    program = """
from market_node import server
server.OPTIONS = [option for option in server.OPTIONS if "max_pending" not in option[0]]
from nodes.command import main
main()
"""
    with market_process(tmp_path / "home", program, ("--open", "--metrics", "0")) as market:
        _, outcomes, _ = storm_at(market, eager=False)
    assert outcomes["CANCELLED None None"] > 0
