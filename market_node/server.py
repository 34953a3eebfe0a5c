"""The market's process: one event loop, one TLS port, one store."""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from market_node.identity import market_identity
from market_node.service import MarketService
from market_node.store import Store
from protocol.admission import AdmissionPolicy
from protocol.errors import UsageError
from protocol.features import FeatureMap
from protocol.wire.market_pb2_grpc import add_MarketServicer_to_server

OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    # A compressed bomb would be unpacked before it is refused: take no compression at all.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Silent connections: gRPC's defaults keep 2,000 of them open for ever.  The handshake timeout closes those that never speak TLS.
    # Idle clients get minutes: at 5 s every client that computes between two calls finds gRPC's goaway line on its stderr (measured).
    ("grpc.server_handshake_timeout_ms", 3000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 300_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),  # a second market on the same port must fail, not share it
]
GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Started:
    """What a market says when it is ready."""

    address: str
    ca: Path
    market_key: bytes
    releases: int


@contextmanager
def only_market(home: Path) -> Iterator[None]:
    """Hold the folder's lock; raise UsageError if another market does."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{home}: another market is running on this folder") from None
        yield


async def serve(
    home: Path,
    host: str,
    port: int,
    feature_map: FeatureMap,
    policy: AdmissionPolicy,
    *,
    simulation: bool,
    names: tuple[str, ...],
    ready: Callable[[Started], None],
) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called once with the address when the port is open."""
    with only_market(home):
        identity = market_identity(home, (*names, *(() if host in ("0.0.0.0", "::") else (host,))), datetime.datetime.now(datetime.UTC))
        store = Store.open(home)
        service = MarketService(store, feature_map, identity.market_key, simulation=simulation, policy=policy)
        server = grpc.aio.server(options=OPTIONS)
        add_MarketServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        credentials = grpc.ssl_server_credentials([(identity.server_key, identity.server_certificate)])
        shown = f"[{host}]" if ":" in host else host
        try:
            try:
                bound = server.add_secure_port(f"{shown}:{port}", credentials)
            except RuntimeError:
                raise UsageError(f"{shown}:{port}: cannot listen there", hint="is the port in use?  --port 0 picks a free one") from None
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await server.start()
            public = identity.market_key.public_key().public_bytes_raw()
            ready(Started(f"{shown}:{bound}", identity.ca_file, public, store.head().size))
            await stop.wait()
        finally:
            await server.stop(GRACE_S)
            service.close()
            store.close()


def run(
    home: Path,
    host: str,
    port: int,
    feature_map: FeatureMap,
    policy: AdmissionPolicy,
    *,
    simulation: bool,
    names: tuple[str, ...],
    ready: Callable[[Started], None],
) -> None:
    """Serve in this process, with its log on stderr."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(message)s")
    asyncio.run(serve(home, host, port, feature_map, policy, simulation=simulation, names=names, ready=ready))
