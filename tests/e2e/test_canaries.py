"""200 planted strings in what a market is sent, and in an owner's records; all at DEBUG, and crashes: none comes out anywhere."""

import base64
import json
import os
import re
import urllib.request
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.guard import Order
from protocol.channel import CHUNK_BYTES, connect
from protocol.encryption import STD128
from protocol.features import default_map
from protocol.privacy import Guarantee
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process
from tests.nodes.guard_processes import events, guard_process, wait_for, write_policy
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


def shown(planted: list[bytes], texts: list[bytes]) -> int:
    """Return how many of the strings show in any of these, in any form."""
    return sum(any(form in text for form in forms(canary) for text in texts) for canary in planted)


def files_in(*folders: Path) -> list[bytes]:
    return [path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()]


def require_no_core(pid: int) -> None:
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +[01] +[01] ", limits), "a core would hold what is private at that moment"


def found(tmp_path: Path, program: str) -> tuple[int, str]:
    """Return how many of the strings show in log, metrics or files, and the log."""
    temporary, planted, home = tmp_path / "tmp", canaries(), tmp_path / "market"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        with market_process(home, program, ("--open", "--metrics", "0")) as (started, process):
            require_no_core(process.pid)
            channel = connect(started["address"], Path(started["ca"]))
            stub = MarketStub(channel)
            for number, canary in enumerate(planted):
                send(stub, channel, canary, number % 10)
            metrics = urllib.request.urlopen(f"http://{started['metrics']}/metrics", timeout=10).read()
            channel.close()
    assert b'veilmart_calls_total{call="Match"' in metrics
    assert (home / "market.log").stat().st_size > 1000, "crashes were logged"
    return shown(planted, [metrics, *files_in(home, temporary)]), (home / "market.log").read_text()


def test_no_planted_string_comes_out_of_a_market_that_crashes_at_debug(tmp_path):
    seen, log = found(tmp_path, CRASHING + MAIN)
    assert seen == 0
    assert log.count('"event": "Incident"') >= 40, "the calls did crash"
    assert log.count('"level": "DEBUG"') > 0, "it was at DEBUG"


def test_a_build_that_logs_what_went_wrong_is_caught(tmp_path):
    """Control."""
    seen, _ = found(tmp_path, CRASHING + LOGGING + MAIN)
    assert seen >= 40


# In an owner's records ----------------------------------------------------------------------------------------------------

# The real guard at DEBUG.  Four orders crash with all records in the exception: while they are read, embedded, made into vectors, and
# within the transaction that charges.
CRASHING_GUARD = """
import logging
basic = logging.basicConfig
logging.basicConfig = lambda **how: basic(**how | {"level": logging.DEBUG})
from nodes import guard as guards
kept, turns = {}, iter(range(99))
def crash(turn, error):
    if kept["turn"] == turn:
        raise error(kept["owned"].records)
def crashing(where, name, turn, error):
    honest = getattr(where, name)
    def called(*rest, **named):
        crash(turn, error)
        return honest(*rest, **named)
    setattr(where, name, called)
def reading(*rest, honest=guards.read_owned_records, **named):
    kept.update(turn=next(turns), owned=honest(*rest, **named))
    crash(0, RuntimeError)
    return kept["owned"]
guards.read_owned_records = reading
crashing(guards.Guard, "_one_pass", 1, KeyError)
crashing(guards.Guard, "_vectors", 2, ValueError)
crashing(guards, "sign_release", 3, AssertionError)
"""
CRASHES = 4
# The control.
LOGGING_GUARD = """
honest = guards.Guard.release
def telling(self, *rest, **named):
    try:
        return honest(self, *rest, **named)
    except Exception:
        logging.getLogger("veilmart.guard").exception("no release")
        raise
guards.Guard.release = telling
"""


def told_by_a_guard(tmp_path: Path, model: Path, program: str) -> int:
    """Return how many of the strings in the records show in log, journal, ledger, temporary files, or what is released."""
    home, temporary, planted = tmp_path / "home", tmp_path / "tmp", canaries()
    temporary.mkdir()
    records = [{"prompt": f"{canary.decode()} number {n}", "response": f"{n * 7 % 13}"} for n, canary in enumerate(planted)]
    (data := tmp_path / "notes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TMPDIR", str(temporary))
        with guard_process(home, data, model, write_policy(tmp_path / "policy.toml"), program) as (guard, _, process):
            require_no_core(process.pid)
            for number in range(CRASHES + 1):
                guard.request(Order(Guarantee(1 + number / 1000, 1e-6)))
            envelope = wait_for(guard.collect)
            wait_for(lambda: "released" in events(home))
    assert events(home).count("refused") == CRASHES, "the orders did crash"
    return shown(planted, [envelope, (tmp_path / "home.log").read_bytes(), *files_in(home, temporary)])


def test_no_planted_string_comes_out_of_a_guard_that_crashes_at_debug(tmp_path, tiny_model_directory):
    assert told_by_a_guard(tmp_path, tiny_model_directory, CRASHING_GUARD + MAIN) == 0


def test_a_guard_that_logs_what_went_wrong_is_caught(tmp_path, tiny_model_directory):
    """Control."""
    assert told_by_a_guard(tmp_path, tiny_model_directory, CRASHING_GUARD + LOGGING_GUARD + MAIN) == CANARIES
