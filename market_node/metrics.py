"""What a market counts, for Prometheus, on loopback: calls by name and outcome, and how much is held.

No label tells who called or what about: a label's values are the calls of the protocol and the statuses of gRPC, fixed before the first
call.  What a stranger chooses (a method that does not exist, metadata, a field) becomes no label: it would fill memory, and be published.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest, start_http_server

from protocol.errors import UsageError
from protocol.health import SERVICE
from protocol.wire import market_pb2

if TYPE_CHECKING:
    from market_node.service import MarketService

CALLS = tuple(method.name for method in market_pb2.DESCRIPTOR.services_by_name["Market"].methods)
OUTCOMES = tuple(code.name for code in grpc.StatusCode)
COUNTS = "counts.prom"  # the newest counts, in a market's folder
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class Metrics(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts the calls of a server that it intercepts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, descriptors and CPU time of this process
        self._calls = Counter("veilmart_calls", "Calls that ended.", ("call", "outcome"), registry=self.registry)
        self._seconds = Histogram("veilmart_call_seconds", "How long calls took.", ("call",), registry=self.registry, buckets=SECONDS)
        self._open = Gauge("veilmart_calls_open", "Calls that have not ended.", ("call",), registry=self.registry)
        self._handlers: dict[str, Any] = {}
        for call in CALLS:
            self._calls.labels(call, "OK")
            self._seconds.labels(call)
            self._open.labels(call)

    def watch(self, service: MarketService) -> None:
        """Also tell what a service holds, as of each scrape."""
        for name, text, value in (
            ("veilmart_releases", "Releases under the newest checkpoint that was given out.", lambda: service.load().releases),
            ("veilmart_queries", "Queries that hold a place.", lambda: service.load().queries),
            ("veilmart_uploads", "Adapters that are being uploaded.", lambda: service.load().uploads),
            ("veilmart_upload_bytes", "Bytes announced for these.", lambda: service.load().upload_bytes),
            ("veilmart_unsent_bytes", "Answers that their queriers have not read yet.", lambda: service.load().unsent_bytes),
            ("veilmart_workers", "Workers that answer queries beside the market's process.", lambda: service.load().workers),
            ("veilmart_workers_lost", "Workers that ended or went silent.", lambda: service.load().workers_lost),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the handler of a call, counted if it is one of the protocol's."""
        handler = await continuation(details)
        service, _, call = details.method.lstrip("/").rpartition("/")
        if handler is None or service != SERVICE or call not in CALLS:
            return handler
        if call not in self._handlers:  # one for all calls: ten thousand at once would each hold their own
            self._handlers[call] = self._counting(call, handler)
        return self._handlers[call]

    def _counting(self, call: str, handler: Any) -> Any:
        answer = handler.stream_unary if handler.request_streaming else handler.unary_unary
        stream = handler.stream_stream if handler.request_streaming else handler.unary_stream

        async def answering(request: Any, context: Any) -> Any:
            with self._counted(call, context):
                return await answer(request, context)

        async def streaming(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._counted(call, context):
                async with aclosing(stream(request, context)) as messages:
                    async for message in messages:
                        yield message

        kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
        return getattr(grpc, f"{kind}_rpc_method_handler")(
            streaming if handler.response_streaming else answering, handler.request_deserializer, handler.response_serializer
        )

    @contextmanager
    def _counted(self, call: str, context: Any) -> Iterator[None]:
        started, outcome = time.perf_counter(), grpc.StatusCode.CANCELLED.name  # what it is unless it ends by itself
        self._open.labels(call).inc()
        try:
            yield
            outcome = grpc.StatusCode.OK.name
        except grpc.aio.AbortError:
            outcome = context.code().name
            raise
        except Exception:
            outcome = grpc.StatusCode.UNKNOWN.name
            raise
        finally:
            self._open.labels(call).dec()
            self._calls.labels(call, outcome).inc()
            self._seconds.labels(call).observe(time.perf_counter() - started)


async def keep_written(metrics: Metrics, home: Path, every_s: float = 10.0) -> None:
    """Write the counts beside the database for as long as this runs, for the page, which is a process of its own."""
    path, half = home / COUNTS, home / f".{COUNTS}"

    def write() -> None:
        with suppress(OSError):  # a full disk: the page says that it knows nothing new
            half.write_bytes(generate_latest(metrics.registry))
            half.replace(path)

    try:
        while True:
            await asyncio.to_thread(write)
            await asyncio.sleep(every_s)
    finally:
        path.unlink(missing_ok=True)  # a market that stopped counts nothing


def host_and_port(address: str, option: str) -> tuple[str, int]:
    """Return host and port of PORT or HOST:PORT, loopback where no host is named; raise UsageError for anything else."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise UsageError(f"{option}: expected PORT or HOST:PORT, got {address!r}")
    return "127.0.0.1" if host in ("", "localhost") else host, int(port)


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def loopback(address: str) -> tuple[str, int]:
    """Return host and port of PORT or HOST:PORT; raise UsageError unless the host is this machine alone.

    Metrics have no password, and tell whoever reads them every second which call came when.
    """
    host, port = host_and_port(address, "--metrics")
    if not is_loopback(host):
        raise UsageError(f"--metrics: expected an address of loopback, got {host}", hint="a collector on this machine reads 127.0.0.1")
    return host, port


@contextmanager
def scraped(metrics: Metrics, address: str) -> Iterator[str]:
    """Serve metrics over HTTP on loopback; yield the address."""
    host, port = loopback(address)
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise UsageError(f"--metrics {address}: {error.strerror}", hint="is the port in use?  --metrics 0 picks a free one") from None
    try:
        yield f"{f'[{host}]' if ':' in host else host}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
