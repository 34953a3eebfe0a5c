"""A real market server on loopback, in a thread of the test's process."""

import asyncio
import datetime
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path

import grpc

from market_node.certificates import Certificates, Gate
from market_node.database import is_shared
from market_node.doors import Doors
from market_node.members import Member, Members
from market_node.metrics import Metrics
from market_node.neighbours import Neighbours
from market_node.quotas import UNLIMITED, Limits, Quotas
from market_node.server import OPTIONS
from market_node.service import MarketService
from market_node.store import Store
from protocol.admission import AdmissionPolicy
from protocol.features import FeatureMap
from protocol.wire.market_pb2_grpc import add_MarketServicer_to_server
from protocol.witness import Witness

NOW = datetime.datetime.now(datetime.UTC)


class TakesAnything(MarketService):
    """A market that stores what comes with the right digest, adapter or not, and compares it with nothing."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._checkers.check = lambda file: None

    async def _require_sound(self, release) -> None:
        pass


@contextmanager
def running_market(
    home: Path,
    feature_map: FeatureMap,
    *,
    simulation: bool = False,
    service_type: type[MarketService] = MarketService,
    policy: AdmissionPolicy | None = None,
    port: int = 0,
    witnesses: tuple[Witness, ...] = (),
    enrolled_only: bool = False,
    register: Callable[[Member], str] = lambda member: "",
    metrics: Metrics | None = None,
    limits: Limits = UNLIMITED,
    members_port: bool = False,
    gate_type: type[Gate] = Gate,
    look_s: float = 0.1,
):
    """Yield (address, certificate file, store).  gate_type: what guards the port for members, if there is one."""
    doors = Doors(home, ())
    identity = doors.identity
    started, loop = threading.Event(), asyncio.new_event_loop()
    made = {}

    async def main() -> None:
        store = Store.open(home)
        members = Members.open(home) if enrolled_only else None
        quotas = Quotas.open(home, limits)
        neighbours = Neighbours(home) if is_shared(home) else None
        certificates = Certificates.open(home) if members_port else None
        gate = gate_type(certificates, home, 0, doors.look) if certificates is not None else None
        service = service_type(
            store, feature_map, identity.market_key,
            simulation=simulation, policy=policy, witnesses=witnesses, members=members, register=register,
            quotas=quotas, **({"gate": gate} if gate is not None else {}), **({"neighbours": neighbours} if neighbours is not None else {}),
        )  # fmt: skip
        server = grpc.aio.server(options=OPTIONS, interceptors=[metrics] if metrics else [])
        if metrics:
            metrics.watch(service)
        add_MarketServicer_to_server(service, server)
        bound = server.add_secure_port(f"127.0.0.1:{port}", doors.credentials(members=False))
        if gate is not None:
            gate.port = server.add_secure_port("127.0.0.1:0", doors.credentials(members=True))
        await server.start()
        looking = asyncio.create_task(doors.keep_looking(look_s)) if gate is not None else None
        made.update(address=f"127.0.0.1:{bound}", store=store, stop=asyncio.Event())
        with neighbours.announced(made["address"]) if neighbours is not None else nullcontext():
            started.set()
            await made["stop"].wait()
            service.hang_up()
            await server.stop(1)
        if neighbours is not None:
            await neighbours.close()
        service.close()
        store.close()
        quotas.close()
        if looking is not None and certificates is not None:
            looking.cancel()
            certificates.close()
        if members is not None:
            members.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert started.wait(240)  # a machine may be busy
    try:
        yield made["address"], identity.ca_file, made["store"]
    finally:
        loop.call_soon_threadsafe(made["stop"].set)
        thread.join(120)  # the first start on a machine compiles the kernels
        loop.close()
