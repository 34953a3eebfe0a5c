"""A real market server on loopback, in a thread of the test's process."""

import asyncio
import datetime
import threading
from contextlib import contextmanager
from pathlib import Path

import grpc

from market_node.identity import market_identity
from market_node.server import OPTIONS
from market_node.service import MarketService
from market_node.store import Store
from protocol.admission import AdmissionPolicy
from protocol.features import FeatureMap
from protocol.wire.market_pb2_grpc import add_MarketServicer_to_server

NOW = datetime.datetime.now(datetime.UTC)


@contextmanager
def running_market(
    home: Path,
    feature_map: FeatureMap,
    *,
    simulation: bool = False,
    service_type: type[MarketService] = MarketService,
    policy: AdmissionPolicy | None = None,
):
    """Yield (address, certificate file, store)."""
    identity = market_identity(home, (), NOW)
    started, loop = threading.Event(), asyncio.new_event_loop()
    made = {}

    async def main() -> None:
        store = Store.open(home)
        service = service_type(store, feature_map, identity.market_key, simulation=simulation, policy=policy)
        server = grpc.aio.server(options=OPTIONS)
        add_MarketServicer_to_server(service, server)
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(identity.server_key, identity.server_certificate)]))
        await server.start()
        made.update(address=f"127.0.0.1:{port}", store=store, stop=asyncio.Event())
        started.set()
        await made["stop"].wait()
        await server.stop(1)
        service.close()
        store.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield made["address"], identity.ca_file, made["store"]
    finally:
        loop.call_soon_threadsafe(made["stop"].set)
        thread.join(120)  # the first start on a machine compiles the kernels
        loop.close()
