"""`veilmart market up --workers`: a real market whose queries a process of its own answers."""

import os
import signal
import urllib.request
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.store import Store
from protocol.catalogue import centred_means
from protocol.channel import connect
from protocol.encryption import MatchPlan
from protocol.evaluation import EncodedIndex
from protocol.features import default_map
from protocol.release import open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process
from tests.market_node.test_shards import Asker, needs_memory
from tests.nodes.guard_processes import wait_for
from tests.protocol.worlds import envelope_of

pytestmark = [pytest.mark.slow, needs_memory]
MAP = default_map()


def workers_of(process) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if b"market_node.shard_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def counted(started: dict, name: str) -> float:
    text = urllib.request.urlopen(f"http://{started['metrics']}/metrics", timeout=30).read().decode()
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))


def test_a_market_answers_by_its_worker_loses_it_and_gets_another(tmp_path):
    with market_process(tmp_path, options=("--open", "--metrics", "0", "--workers", "1")) as (started, process):
        channel = connect(started["address"], Path(started["ca"]))
        stub = MarketStub(channel)
        envelope = envelope_of(MAP, Ed25519PrivateKey.generate())
        stub.Publish(pb.PublishRequest(envelope=envelope), timeout=60)
        wait_for(lambda: counted(started, "veilmart_workers") == 1)
        store = Store.beside(tmp_path / "market")
        head = store.head()
        store.close()
        rows = centred_means([open_envelope(envelope).specification], MAP)
        ask = Asker(stub, MAP, head, EncodedIndex.build(rows, MatchPlan.build(1, MAP.dimension)))
        assert ask()
        (worker,) = workers_of(process)
        os.kill(worker, signal.SIGKILL)
        assert ask()
        assert counted(started, "veilmart_workers_lost") == 1
        wait_for(lambda: counted(started, "veilmart_workers") == 1)
        assert ask()
        (another,) = workers_of(process)
        assert another != worker
        channel.close()
    wait_for(lambda: not Path(f"/proc/{another}").exists())
