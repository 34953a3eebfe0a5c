"""The reverse proxy that docs/deploy ships lets a SuperNode in and nobody else anywhere, in a real nginx before a real SuperLink."""

import contextlib
import datetime
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from market_node.identity import market_identity
from market_node.superlink import superlink
from protocol.channel import connect
from protocol.processes import free_port
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.federation import ROOT, alive, node, node_log, operator

pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx)")

OUTSIDE = [
    "/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", "/health", "/",
    "/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes", "/v1/fleet/..%2fcontrol/list-nodes",
    "/v1/fleet//../../v1/control/list-nodes", "//v1/control/list-nodes", "/v1/fleet/.%2e/control/list-nodes", "/V1/control/list-nodes",
    "/v1/fleet/%252e%252e/control/list-nodes", "/v1/fleet", "/v1/fleetx/activate-node", "/v1/fleet/activate-node/../../control/list-nodes",
]  # fmt: skip


def shipped(folder: Path, port: int, superlink: str, identity: Path, *, open_paths: bool = False) -> Path:
    """Return the shipped configuration with this test's ports and folders; nothing else of it changes."""
    text = (ROOT / "docs/deploy/nginx.conf").read_text()
    for old, new in (
        ("pid /run/nginx-veilmart.pid", f"daemon off; pid {folder}/nginx.pid"), ("listen 443", f"listen 127.0.0.1:{port}"),
        ("/etc/veilmart", str(identity)), ("127.0.0.1:7444", superlink),
    ):  # fmt: skip
        assert text.count(old) >= 1
        text = text.replace(old, new)
    if open_paths:
        text = re.sub(r'location ~ "[^"]*"', "location /v1/", text)
    (folder / "nginx.conf").write_text(text)
    return folder / "nginx.conf"


@contextmanager
def nginx(configuration: Path, port: int):
    with (configuration.parent / "nginx.log").open("wb") as log:
        process = subprocess.Popen([NGINX, "-p", configuration.parent, "-c", configuration], stderr=log)
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def status(port: int, ca: Path, path: str, method: str = "POST") -> int:
    """Send one raw request, so that no client library tidies the path up; return the status."""
    context = ssl.create_default_context(cafile=str(ca))
    with socket.create_connection(("127.0.0.1", port), 10) as plain, context.wrap_socket(plain, server_hostname="localhost") as secure:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/protobuf\r\nContent-Length: 0\r\n"
        secure.sendall(f"{head}Connection: close\r\n\r\n".encode())
        return int(secure.recv(4096).split()[1])


@needs_nginx
def test_only_the_fleet_is_reached_through_the_proxy(tmp_path):
    owner, stranger = tmp_path / "clinic", tmp_path / "stranger"
    with operator(tmp_path / "operator", nodes=[owner]) as said:
        identity, ca = tmp_path / "operator/market", Path(said["ca"])
        inside = int(said["superlink"].rpartition(":")[2])
        assert status(inside, ca, "/v1/control/list-nodes") == 200, "the control API is as open as we say"
        port = free_port()
        with nginx(shipped(tmp_path, port, said["superlink"], identity), port):
            got = {path: status(port, ca, path) for path in OUTSIDE}
            assert set(got.values()) <= {400, 404}, got
            assert status(port, ca, "/v1/fleet/activate-node", "GET") == 403
            assert status(port, ca, "/v1/fleet/activate-node") in (401, 422, 400)  # Flower's own answer: no signature
            with node(owner, f"localhost:{port}", ca, f"unix:{tmp_path}/guard/socket") as (_, pids):
                assert len([pid for pid in pids if alive(pid)]) == 2, node_log(owner)
                assert "SuperNode ID:" in node_log(owner)
            with node(stranger, f"localhost:{port}", ca, f"unix:{tmp_path}/guard/socket") as (process, _):
                assert process.wait(timeout=60) != 0
            assert "does not know its key" in node_log(stranger)

        # The control: with a careless pattern the same request reaches the open API.
        careless = tmp_path / "careless"
        careless.mkdir()
        port = free_port()
        with nginx(shipped(careless, port, said["superlink"], identity, open_paths=True), port):
            assert status(port, ca, "/v1/control/list-nodes") == 200


def connect_proxy(listener: socket.socket, seen: list[str], route: dict[str, str]) -> None:
    """Serve CONNECT until the socket is closed; `route` says where names lead."""

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def serve(client: socket.socket) -> None:
        head = b""
        with client:
            while b"\r\n\r\n" not in head and (part := client.recv(4096)):
                head += part
            seen.append(head.split(b"\r\n")[0].decode())
            host, _, port = route.get(name := seen[-1].split()[1], name).rpartition(":")
            with socket.create_connection((host, int(port)), 10) as far:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=pump, args=(far, client), daemon=True)
                back.start()
                pump(client, far)
                back.join(20)

    with contextlib.suppress(OSError):
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


@contextmanager
def proxy(route: dict[str, str]):
    seen: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=connect_proxy, args=(listener, seen, route), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for connections
        listener.close()
        time.sleep(0.5)  # connections that ended with the processes are let go of


def test_a_supernode_dials_through_the_sites_proxy_and_its_own_loopback_does_not(tmp_path):
    owner = tmp_path / "clinic"
    with (
        operator(tmp_path / "operator", "--name", "market.test", nodes=[owner]) as said,
        proxy({"market.test:443": said["superlink"]}) as (url, seen),
    ):
        with node(owner, "market.test:443", Path(said["ca"]), "unix:/nowhere/x", HTTPS_PROXY=url, HTTP_PROXY=url, ALL_PROXY=url):
            assert "SuperNode ID:" in node_log(owner)
            time.sleep(2)  # the SuperExec asks its SuperNode for work twenty times a second
    assert set(seen) == {"CONNECT market.test:443 HTTP/1.1"}


def test_calls_of_the_market_go_through_the_sites_proxy_too(tmp_path, monkeypatch):
    """The name exists nowhere but at the proxy, so an answer came through it."""
    monkeypatch.setenv("https_proxy", "")
    with operator(tmp_path / "operator", "--name", "market.test") as said, proxy({"market.test:7443": said["address"]}) as (url, seen):
        monkeypatch.setenv("https_proxy", url)
        for address, through in ((said["address"], 0), ("market.test:7443", 1)):
            with connect(address, Path(said["ca"])) as channel:
                assert MarketStub(channel).Describe(pb.DescribeRequest(), timeout=20).market_key.hex() == said["market_key"]
            assert len(seen) == through


def test_a_supernode_refuses_an_expired_certificate_and_one_of_another_authority(tmp_path):
    now = datetime.datetime.now(datetime.UTC)
    market_identity(tmp_path / "good", (), now)
    other = market_identity(tmp_path / "other", (), now)
    expired = market_identity(tmp_path / "expired", (), now - datetime.timedelta(days=3 * 365))
    cases = (("good", other, "another"), ("expired", expired, "expired"))
    for server, trusted, name in cases:
        home = tmp_path / server
        with superlink(home, home / "ca.crt", home / "server.crt", home / "server.key") as where:
            with node(tmp_path / f"owner-{name}", where, trusted.ca_file, "unix:/nowhere/x") as (process, pids):
                assert process.wait(timeout=60) != 0
                assert pids == []
            assert "certificate is not of this authority, or has expired" in node_log(tmp_path / f"owner-{name}")
