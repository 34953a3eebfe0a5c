"""200 planted strings in what a market is sent, everything at DEBUG and calls that crash: none of them comes out anywhere."""

import base64
import os
import re
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.channel import CHUNK_BYTES, connect
from protocol.encryption import STD128
from protocol.features import default_map
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process
from tests.protocol.worlds import envelope_of

pytestmark = pytest.mark.slow
MAP = default_map()
CANARIES = 200

# The real market at DEBUG, where every call of three kinds crashes with the request in the exception, half of them in another thread.
CRASHING = """
import logging
from market_node import server
from market_node.service import MarketService

write = server.write_events
server.write_events = lambda stream: write(stream, logging.DEBUG)
async def crash(self, data, *rest, **named):
    raise RuntimeError(bytes(data))
def crash_in_a_thread(self, data, *rest, **named):
    raise KeyError(bytes(data))
MarketService._require_wanted = crash
MarketService._answer = lambda self, size, state, query: self._store_call(crash_in_a_thread, self, query)
from market_node.store import Store
Store.envelope = crash_in_a_thread
"""
MAIN = "from nodes.command import main\nmain()\n"
# The control: a build that logs the request in the plainest way, and one that keeps a query in a temporary file.
LOGGING = """
import sys, tempfile
from market_node import service
refuse = service.refuse
async def telling(context, error):
    sys.stderr.write(f"{error!r} {error.args}\\n")
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(repr(error.args).encode())
    await refuse(context, error)
service.refuse = telling
"""


def canaries() -> list[bytes]:
    return [f"canary-{os.urandom(8).hex()}".encode() for _ in range(CANARIES)]


def forms(canary: bytes) -> list[bytes]:
    """Return how a string shows: itself, in hexadecimal, and in base64 at each of its three alignments."""
    aligned = [base64.b64encode(bytes(shift) + canary)[4 if shift else 0 : -4] for shift in range(3)]
    return [canary, canary.hex().encode(), *aligned]


def send(stub: MarketStub, channel: grpc.Channel, canary: bytes, kind: int) -> None:
    """Put a string into one of the places that a stranger fills, and expect nothing of the answer."""
    text = canary.decode()
    with suppress(grpc.RpcError):
        match kind:
            case 0:
                body = canary * (STD128.query_bytes // len(canary) + 1)
                first = pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, catalogue_size=1, catalogue_head=bytes(32))
                parts = [body[start : min(start + CHUNK_BYTES, STD128.query_bytes)] for start in range(0, STD128.query_bytes, CHUNK_BYTES)]
                list(stub.Match(iter([first, *(pb.MatchChunk(data=part) for part in parts)]), timeout=30))
            case 1:
                list(stub.Match(iter([pb.MatchChunk(profile=text, map_id=canary, catalogue_head=canary)]), timeout=30))
            case 2:
                stub.Publish(pb.PublishRequest(envelope=envelope_of(MAP, Ed25519PrivateKey.generate())[:60] + canary), timeout=30)
            case 3:
                stub.UploadAdapter(iter([pb.AdapterChunk(digest=canary, size_bytes=99, data=canary)]), timeout=30)
            case 4:
                stub.GetRelease(pb.ReleaseRequest(release_id=canary), timeout=30)
            case 5:
                stub.Enrol(pb.EnrolRequest(secret=canary, owner=canary, supernode_key=text, signature=canary), timeout=30)
            case 6:
                stub.Cosign(pb.CosignRequest(note=canary), timeout=30)
            case 7:
                stub.Describe(pb.DescribeRequest(owner=canary), timeout=30, metadata=((text, text), ("identity", text)))
            case 8:
                channel.unary_unary(f"/veilmart.v1.Market/{text}", bytes, bytes)(canary, timeout=30)
            case 9:
                channel.unary_unary("/veilmart.v1.Market/Publish", bytes, bytes)(b"\xff" + canary, timeout=30)  # no message at all


def found(tmp_path: Path, program: str) -> tuple[int, str]:
    """Return how many of the strings show in log, metrics or files, and the log."""
    temporary, planted, home = tmp_path / "tmp", canaries(), tmp_path / "market"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        with market_process(home, program, ("--open", "--metrics", "0")) as (started, process):
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            channel = connect(started["address"], Path(started["ca"]))
            stub = MarketStub(channel)
            for number, canary in enumerate(planted):
                send(stub, channel, canary, number % 10)
            metrics = urllib.request.urlopen(f"http://{started['metrics']}/metrics", timeout=10).read()
            channel.close()
    assert re.search(r"Max core file size +[01] +[01] ", limits), "no core, which would hold the queries of that moment"
    assert b'veilmart_calls_total{call="Match"' in metrics
    assert (home / "market.log").stat().st_size > 1000, "crashes were logged"
    everything = [metrics, *(path.read_bytes() for folder in (home, temporary) for path in folder.rglob("*") if path.is_file())]
    seen = sum(any(form in text for form in forms(canary) for text in everything) for canary in planted)
    return seen, (home / "market.log").read_text()


def test_no_planted_string_comes_out_of_a_market_that_crashes_at_debug(tmp_path):
    seen, log = found(tmp_path, CRASHING + MAIN)
    assert seen == 0
    assert log.count('"event": "Incident"') >= 40, "the calls did crash"
    assert log.count('"level": "DEBUG"') > 0, "it was at DEBUG"


def test_a_build_that_logs_what_went_wrong_is_caught(tmp_path):
    """Control."""
    seen, _ = found(tmp_path, CRASHING + LOGGING + MAIN)
    assert seen >= 40
