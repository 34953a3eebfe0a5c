"""A real market process of 10 000 releases under load: bounded memory, and nothing but answers and documented refusals."""

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.store import Store
from nodes.market_client import MarketClient
from nodes.query import find_encrypted, find_in_mirror
from protocol.catalogue import Head, scalars_of
from protocol.channel import CHUNK_BYTES, CODE_KEY, OPTIONS, RETRY_KEY, connect
from protocol.encryption import STD128, MatchPlan, QueryKey
from protocol.features import default_map
from protocol.release import Card, sign_release
from protocol.scoring import sketch_of
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process
from tests.protocol.worlds import features, release_of

pytestmark = [pytest.mark.slow, pytest.mark.alone]
MAP = default_map()
RELEASES, QUERIES, ABANDONED = 10_000, 200, 1_000
MEGABYTE = 1 << 20


def fill(home: Path, count: int) -> None:
    """Put synthetic signed releases into the store of a market that does not run yet."""
    key, rng = Ed25519PrivateKey.generate(), np.random.default_rng(1)
    made = release_of(MAP, key)
    store = Store.open(home)
    raw = store._engine.raw_connection()
    raw.cursor().execute("PRAGMA synchronous=OFF")  # of the connection that the pool hands out again: it lives as long as the filling
    raw.close()
    for number in range(1, count + 1):
        sums = made.specification.noisy_sums.copy()
        sums[1:] += rng.integers(-100_000, 100_000, MAP.dimension, dtype=np.int32)
        specification = replace(made.specification, noisy_sums=sums)
        previous = bytes([1]) * 32 if number > 1 else b""
        release = replace(made, release_number=number, previous=previous, specification=specification, card=Card(f"owner-{number}"))
        store.append(release, sign_release(release, key), scalars_of(release, MAP))
    store.close()


def memory(pid: int, line: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since `forget_peak`) in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(row.split()[1]) * 1024 for row in status.splitlines() if row.startswith(line))


def forget_peak(pid: int) -> None:
    try:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    except PermissionError:
        pytest.skip("needs permission to reset the peak of a child process")


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    root = tmp_path_factory.mktemp("load")
    fill(root / "home" / "market", RELEASES)
    with market_process(root / "home") as (started, process):
        with MarketClient(started["address"], Path(started["ca"]), root / "q") as client:
            head = client.sync(MAP).head
            plan = MatchPlan.build(RELEASES, MAP.dimension)
            query = QueryKey.fresh(plan).encrypt(np.full(MAP.dimension, 0.05)).to_bytes()
            client.match(MAP.map_id, head, query, plan.answer_bytes)  # the index is built, the kernels are compiled
        yield started, process, head, query, plan


def parts(head: Head, query: bytes):
    yield pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, catalogue_size=head.size, catalogue_head=head.digest)
    for start in range(0, len(query), CHUNK_BYTES):
        yield pb.MatchChunk(data=query[start : start + CHUNK_BYTES])


async def opened(started, count: int) -> list[grpc.aio.Channel]:
    credentials = grpc.ssl_channel_credentials(Path(started["ca"]).read_bytes())
    # Channels with equal options share one connection, and a connection carries 64 calls.
    return [grpc.aio.secure_channel(started["address"], credentials, options=[*OPTIONS, ("veilmart.channel", i)]) for i in range(count)]


def test_ten_thousand_releases_rank_alike_by_both_ways_and_the_encrypted_one_moves_a_tenth(market, tmp_path):
    started, *_ = market
    sketch = sketch_of(features(40, 3, MAP.dimension), MAP, 2)
    with MarketClient(started["address"], Path(started["ca"]), tmp_path / "thin") as client:
        encrypted = find_encrypted(sketch, client, MAP)
        thin = {**client.traffic.received, "sent": client.traffic.sent["query"]}
    with MarketClient(started["address"], Path(started["ca"]), tmp_path / "mirror") as client:
        mirrored = find_in_mirror(sketch, client, MAP)
        whole = client.traffic.received["catalogue"]
    print(f"encrypted {thin}, mirror {whole}")  # noqa: T201
    assert encrypted.title_of(encrypted.ranking.matches[0]) == mirrored.title_of(mirrored.ranking.matches[0])
    assert encrypted.ranking.verdict is mirrored.ranking.verdict
    for columns in ("counts", "count_stds", "noise_stds", "norms_squared"):
        assert (getattr(encrypted.catalogue.columns(2), columns) == getattr(mirrored.catalogue.columns(2), columns)).all()
    assert thin["catalogue"] <= 16 * RELEASES + 1000
    assert len(encrypted.catalogue.cards) % 4096 in (0, RELEASES % 4096), "whole pages"
    assert sum(thin.values()) < whole / 8


def test_two_hundred_queries_at_once_take_bounded_memory(market):
    started, process, head, query, plan = market
    idle = memory(process.pid, "VmRSS")
    forget_peak(process.pid)

    def ask(stub) -> str:
        try:
            data = b"".join([part.data for part in stub.Match(parts(head, query), timeout=100)])
        except grpc.RpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            return f"{error.code().name} {trailing.get(CODE_KEY)} retry-after {trailing.get(RETRY_KEY)}"
        assert len(data) == plan.answer_bytes
        return "answered"

    def storm() -> Counter:
        channels = [connect(started["address"], Path(started["ca"])) for _ in range(4)]
        stubs = [MarketStub(channel) for channel in channels]
        with ThreadPoolExecutor(QUERIES) as pool:
            outcomes = Counter(pool.map(lambda i: ask(stubs[i % 4]), range(QUERIES)))
        for channel in channels:
            channel.close()
        return outcomes

    before = time.perf_counter()
    outcomes = storm()
    grown = memory(process.pid, "VmHWM") - idle
    print(f"idle {idle >> 20} MB, peak +{grown >> 20} MB, {dict(outcomes)}, {time.perf_counter() - before:.1f} s")  # noqa: T201
    assert set(outcomes) <= {"answered", "RESOURCE_EXHAUSTED quota retry-after 1"}
    assert outcomes["answered"] >= 32
    assert grown <= 300 * MEGABYTE


def test_a_thousand_calls_opened_and_abandoned_leave_memory_bounded(market):
    """Half send a whole query and never read, half stop in the middle of it; then all connections go away."""
    started, process, head, query, plan = market
    idle = memory(process.pid, "VmRSS")
    forget_peak(process.pid)

    async def half(i: int):
        for number, part in enumerate(parts(head, query)):
            yield part
            if i % 2 and number == 1:
                await asyncio.sleep(100)

    async def abandon() -> None:
        channels = await opened(started, 20)
        calls = [MarketStub(channels[i % 20]).Match(half(i), timeout=100) for i in range(ABANDONED)]
        await asyncio.sleep(5)
        for call in calls[::2]:
            call.cancel()
        for channel in channels:
            await channel.close()

    asyncio.run(abandon())
    grown = memory(process.pid, "VmHWM") - idle
    print(f"idle {idle >> 20} MB, peak +{grown >> 20} MB")  # noqa: T201
    assert grown <= 300 * MEGABYTE

    async def once() -> bytes:
        channel = (await opened(started, 1))[0]
        stub, deadline = MarketStub(channel), time.monotonic() + 60
        while True:
            try:
                data = b"".join([part.data async for part in stub.Match(parts(head, query), timeout=60)])
                break
            except grpc.aio.AioRpcError:  # places of the abandoned are being given back
                assert time.monotonic() < deadline
                await asyncio.sleep(1)
        await channel.close()
        return data

    assert len(asyncio.run(once())) == plan.answer_bytes
    assert memory(process.pid, "VmRSS") - idle <= 150 * MEGABYTE
