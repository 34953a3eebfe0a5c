"""The market's process: one event loop, one store, a TLS port for everybody and one for members."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server

from market_node.certificates import Certificates, Gate
from market_node.database import is_shared, use
from market_node.doors import Doors
from market_node.events import SuperNodeNotRegistered, short, tell, write_events
from market_node.health import Health
from market_node.members import Member, Members
from market_node.neighbours import Neighbours, lock_folder
from market_node.quotas import UNLIMITED, Limits, Quotas
from market_node.service import MarketService
from market_node.shards import evaluator
from market_node.store import Store
from protocol.admission import AdmissionPolicy
from protocol.errors import MarketUnreachable, UsageError, VeilmartError
from protocol.features import FeatureMap
from protocol.keys import write_durably
from protocol.wire.market_pb2_grpc import add_MarketServicer_to_server
from protocol.witness import Witness

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
    # Calls that wait for the event loop.  Beyond gRPC's own limits, 1,000 to 3,000, it resets calls without a word (2,672 of 6,000 at once,
    # measured); here the service tells each of them when to come again.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),  # clients ask every 10 s whether the connection still carries anything
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),  # a second market on the same port must fail, not share it
]

GRACE_S = 5.0
ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Started:
    """What a market says when it is ready."""

    address: str
    ca: Path
    market_key: bytes
    releases: int
    superlink: str = ""  # where the SuperLink listens on loopback, if there is one
    members: str = ""  # where members' calls are taken, under certificates, if not at `address`
    metrics: str = ""  # where Prometheus reads, on loopback, if anybody wants it
    page: str = ""  # of the market's page, which a process of its own serves


async def serve(
    home: Path,
    host: str,
    port: int,
    feature_map: FeatureMap,
    policy: AdmissionPolicy,
    *,
    simulation: bool,
    names: tuple[str, ...],
    witnesses: tuple[Witness, ...],
    ready: Callable[[Started], None],
    beside: Callable[[], AbstractContextManager[str]] | None = None,
    everybody: bool = False,
    fleet: str = "",
    metrics: str = "",
    limits: Limits = UNLIMITED,
    members_port: int | None = None,
    page: str = "",
    page_map: str = "",
    database: str = "",
    workers: int | None = None,
    ray: str = "",
) -> None:
    """Serve until SIGTERM or SIGINT; `ready` is called once with the address when the port is open.

    beside: what runs as long as the market does, and the address it has: the SuperLink.  everybody: who is not enrolled may publish too.
    fleet: where SuperNodes connect, as enrolled owners are told; by default the SuperLink's own address.
    metrics: [HOST:]PORT of loopback where Prometheus reads; "" for nowhere.  limits: what one owner may hand in within a day.
    members_port: where members' calls are taken, under certificates; None: at the one port, on their signatures.
    page: [HOST:]PORT of the page, a process of its own; "" for none.  page_map: name or file of the map, for that process.
    database: URL of PostgreSQL, kept in the folder; "" for what the folder says.
    workers, ray: how many processes answer queries, and the Ray cluster that they are on, as in `market_node.shards.evaluator`.
    """
    if members_port is not None and everybody:
        raise UsageError("--members-port: this market takes releases of everybody", hint="leave out --open and --simulation, or the port")
    if metrics or page:
        from market_node.metrics import host_and_port, loopback

    if metrics:
        loopback(metrics)  # before there is a folder
    if page:
        host_and_port(page, "--page")
    if database:
        use(home, database)
    shared = is_shared(home)
    with lock_folder(home, shared=shared) as lock, ExitStack() as stack:
        doors = Doors(home, (*names, *(() if host in ("0.0.0.0", "::") else (host,))), shared=shared)
        identity = doors.identity
        store = Store.open(home, alone=lock.alone)
        if shared:
            lock.share()
        members = None if everybody else Members.open(home)
        if members is not None:
            stack.callback(members.close)
        quotas = Quotas.open(home, limits)
        stack.callback(quotas.close)
        answering = stack.enter_context(closing(evaluator(workers, ray)))
        gate = None
        if members_port is not None:
            certificates = Certificates.open(home)
            stack.callback(certificates.close)
            gate = Gate(certificates, home, members_port, doors.look)

        def register(member: Member) -> str:
            if not member.supernode_key:
                return ""
            from market_node.superlink import address, register_supernode

            if beside is None and not (shared and address(home)):  # beside another process of this market there may be one
                return ""

            try:
                register_supernode(home, member.supernode_key, member.node_name, member.owner)
            except UsageError:  # another owner's, who is asked through it: this member publishes without one
                tell(SuperNodeNotRegistered(short(member.owner), UsageError.code))
                return ""
            except MarketUnreachable as error:  # Flower's words may quote anything: the code alone is logged
                tell(SuperNodeNotRegistered(short(member.owner), error.code))
                again = "you are enrolled; the same command again registers the SuperNode"
                raise MarketUnreachable("market: its SuperLink does not answer", hint=again) from None
            return fleet or address(home)

        neighbours = Neighbours(home) if shared else None
        service = MarketService(
            store, feature_map, identity.market_key,
            simulation=simulation, policy=policy, witnesses=witnesses, members=members, register=register,
            quotas=quotas, gate=gate, neighbours=neighbours, evaluator=answering,
        )  # fmt: skip
        counted, scrape = None, ""
        if metrics or page:
            from market_node.metrics import Metrics

            counted = Metrics()
            counted.watch(service)
        server = grpc.aio.server(options=OPTIONS, interceptors=[counted] if counted else [])
        add_MarketServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        health = Health()
        add_HealthServicer_to_server(health, server)
        tasks: list[asyncio.Task[None]] = []
        shown = f"[{host}]" if ":" in host else host
        try:
            bound = _listen(server, f"{shown}:{port}", doors.credentials(members=False))
            if gate is not None:
                gate.port = _listen(server, f"{shown}:{gate.port}", doors.credentials(members=True))
            if counted is not None and metrics:
                from market_node.metrics import scraped

                scrape = stack.enter_context(scraped(counted, metrics))
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await server.start()
            tasks.append(asyncio.create_task(doors.keep_looking()))
            if neighbours is not None:
                tasks.append(asyncio.create_task(service.follow()))
                stack.enter_context(neighbours.announced(f"{shown}:{bound}"))
            service.warm.add_done_callback(keep_for_good)
            public = identity.market_key.public_key().public_bytes_raw()
            if members is not None:
                # Those who enrolled while no SuperLink ran; it reads the list when it starts.
                await asyncio.to_thread(register_members, members, register)
            where = await asyncio.to_thread(stack.enter_context, beside()) if beside is not None else ""
            write_durably(home / ADDRESS, f"{shown}:{bound}\n".encode(), 0o644)  # `market invite` puts it into invites
            at = f"{shown}:{gate.port}" if gate is not None else ""
            web = ""
            if page and counted is not None:
                from market_node.metrics import keep_written
                from market_node.page import serving

                tasks.append(asyncio.create_task(keep_written(counted, home)))
                web = stack.enter_context(serving.beside(home, page, page_map, public))
            ready(Started(f"{shown}:{bound}", identity.ca_file, public, store.head().size, where, at, scrape, web))
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            health.stop()  # before the port closes: who watches turns to another market while calls in flight still end here
            service.hang_up()
            await server.stop(GRACE_S)
            if neighbours is not None:
                await neighbours.close()
            service.close()
            store.close()


def _listen(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Return the port that was bound; raise UsageError where none was."""
    try:
        return int(server.add_secure_port(address, credentials))
    except RuntimeError:
        raise UsageError(f"{address}: cannot listen there", hint="is the port in use?  --port 0 picks a free one") from None


def keep_for_good(_: object) -> None:
    """Take what is loaded by now out of the collector's rounds.

    Nearly all of it is modules, which stay.  A full round over them took 100 ms of CPU (measured), in which no call is answered.
    """
    gc.collect()
    gc.freeze()


def register_members(members: Members, register: Callable[[Member], str]) -> None:
    """Register the SuperNodes of all members; one that is refused is logged and keeps neither the others nor the market from starting."""
    for member in members.all():
        if member.removed is not None:
            continue
        try:
            register(member)
        except VeilmartError as error:
            tell(SuperNodeNotRegistered(short(member.owner), error.code))


def run(
    home: Path,
    host: str,
    port: int,
    feature_map: FeatureMap,
    policy: AdmissionPolicy,
    *,
    simulation: bool,
    names: tuple[str, ...],
    witnesses: tuple[Witness, ...],
    ready: Callable[[Started], None],
    beside: Callable[[], AbstractContextManager[str]] | None = None,
    everybody: bool = False,
    fleet: str = "",
    metrics: str = "",
    limits: Limits = UNLIMITED,
    members_port: int | None = None,
    page: str = "",
    page_map: str = "",
    database: str = "",
    workers: int | None = None,
    ray: str = "",
) -> None:
    """Serve in this process, with its log on stderr."""
    write_events(sys.stderr)
    asyncio.run(
        serve(
            home,
            host,
            port,
            feature_map,
            policy,
            simulation=simulation,
            names=names,
            witnesses=witnesses,
            ready=ready,
            beside=beside,
            everybody=everybody,
            fleet=fleet,
            metrics=metrics,
            limits=limits,
            members_port=members_port,
            page=page,
            page_map=page_map,
            database=database,
            workers=workers,
            ray=ray,
        )
    )
