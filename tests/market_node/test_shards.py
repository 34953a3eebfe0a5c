"""Answers of workers are those of one process, whatever becomes of the workers and of the index meanwhile."""

import functools
import importlib.util
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import shard_process, shard_worker, shards
from market_node.index import TileFolder, Version, open_tile
from market_node.service import MarketService
from market_node.shard_process import ProcessCrew, ProcessWorker, anonymous
from market_node.shards import InProcess, Shards, WorkerLost, evaluator
from protocol.catalogue import EMPTY_CATALOGUE, Head
from protocol.channel import CHUNK_BYTES, connect
from protocol.encryption import PRESETS, EncryptedQuery, MatchPlan, QueryKey
from protocol.errors import UsageError
from protocol.evaluation import EncodedIndex, evaluate
from protocol.features import FeatureMap
from protocol.proof import index_digest
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.market_node.test_index import MAP, add, from_scratch, small_tiles  # noqa: F401 - the fixture
from tests.nodes.guard_processes import wait_for
from tests.protocol.worlds import DIMENSION, envelope_of

needs_memory = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system shares no anonymous memory")
pytestmark = [needs_memory, pytest.mark.usefixtures("small_tiles")]


class ThreadWorker(ProcessWorker):
    """A worker whose other end is a thread of this process: the same frames and memory, in milliseconds."""

    def launch(self, theirs):
        end = theirs.dup()
        end.sendall(shard_worker.REPLY.pack(0, bytes(32), 0))
        threading.Thread(target=self.run, args=(end,), daemon=True).start()

    def run(self, end: socket.socket) -> None:
        with end, suppress(OSError):  # the front gave this one up
            shard_worker.serve(end)

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        self._connection.close()


class Silent(ThreadWorker):
    """Takes tiles and never answers for them."""

    def run(self, end) -> None:
        with end, suppress(OSError):
            while frame := socket.recv_fds(end, shard_worker.FRAME_BYTES, 1)[0]:
                kind, _, name, *_ = shard_worker.REQUEST.unpack_from(frame)
                if kind != shard_worker.Kind.ANSWER:
                    end.sendall(shard_worker.REPLY.pack(0, name, 0))


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """Workers load them before they are ready, and threads of this process beside its first query."""
    shard_worker.warm_up()


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """A machine that is busy with other tests is no worker that hangs."""
    monkeypatch.setattr(shards, "PATIENCE_S", 60.0)


def version_of(folder: Path, rows: int, seed: int = 0) -> Version:
    """Return an index of random rows, its full tiles in files."""
    matrix = np.random.default_rng(seed).standard_normal((rows, DIMENSION))
    index, files = EncodedIndex.build(matrix, MatchPlan.build(rows, DIMENSION)), TileFolder(folder)
    for tile in index.tiles[:-1]:
        files.keep(tile.digest.hex(), tile)
    paths = [files.path(tile.digest.hex()) for tile in index.tiles[:-1]]
    return Version(EMPTY_CATALOGUE, index, index_digest(index), (*paths, None))


def queries_for(version: Version, count: int = 1) -> list[EncryptedQuery]:
    return [QueryKey.fresh(version.index.plan).encrypt(np.full(DIMENSION, 0.1 * (q + 1))) for q in range(count)]


def expected(version: Version, queries: list[EncryptedQuery]) -> list[bytes]:
    return [evaluate(version.index, query).to_bytes() for query in queries]


def answers(front: Shards, version: Version, queries: list[EncryptedQuery]) -> list[bytes]:
    scores, cpu_ns = front.evaluate(version, queries)
    assert cpu_ns > 0
    return [one.to_bytes() for one in scores]


def ready(front: Shards, version: Version, workers: int) -> Shards:
    front.hold(version)
    wait_for(lambda: front.workers().answering == workers, 300)
    return front


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_answers_are_those_of_one_process_bit_for_bit(tmp_path, workers):
    versions = [version_of(tmp_path, rows, rows) for rows in (1, 8, 9, 23)]
    with closing(Shards(ProcessCrew(workers, ThreadWorker), 1)) as front:
        ready(front, versions[0], workers)
        for version in versions:
            for count in (1, 3, 2):  # the room grows, and is used again
                queries = queries_for(version, count)
                assert answers(front, version, queries) == expected(version, queries)
        assert front.workers() == (workers, 0)


def test_a_worker_maps_files_and_is_handed_what_is_in_none(tmp_path, monkeypatch):
    version, handed = version_of(tmp_path, 23), []
    monkeypatch.setattr(shard_process, "anonymous", lambda size, data=None: (handed.append(data is not None), anonymous(size, data))[1])
    files = [file for file in version.files if file]
    files[1].unlink()  # swept: a version that is in use keeps its tiles
    files[2].write_bytes(files[0].read_bytes())
    assert open_tile(files[2], version.index.tiles[2]) is None, "another tile's"
    with closing(Shards(ProcessCrew(1, ThreadWorker), 1)) as front:
        ready(front, version, 1)
        queries = queries_for(version)
        assert answers(front, version, queries) == expected(version, queries)
    assert handed == [True] * 3 + [False], "two tiles without their files, the staging tile, and the room"


def test_shared_memory_keeps_its_size_and_tiles_their_words():
    room, tile = anonymous(4096), anonymous(4096, memoryview(bytes(4096)))
    unsealed = os.memfd_create("control")
    try:
        for sealed in (room, tile):
            with pytest.raises(PermissionError):
                os.ftruncate(sealed, 100)
        with pytest.raises(PermissionError):
            mmap.mmap(tile, 4096)
        with pytest.raises(PermissionError):
            os.pwrite(tile, b"x", 0)
        os.pwrite(room, b"x", 0)
        os.ftruncate(unsealed, 100)  # the control
    finally:
        for file in (room, tile, unsealed):
            os.close(file)


# --- states of the catalogue ---------------------------------------------------------------------------------------


def half_updated(folder: Path) -> tuple[bytes, bytes, bytes]:
    """Return the answer of two workers of which one has got a newer index already, and those of either index alone."""
    old, new = version_of(folder, 16, seed=1), version_of(folder, 16, seed=2)
    (query,) = queries_for(old)
    with closing(Shards(ProcessCrew(2, ThreadWorker), 1)) as front:
        ready(front, old, 2)
        answers(front, old, [query])
        front._workers[0].hold(new, range(2))
        (got,) = answers(front, old, [query])
    return got, *expected(old, [query]), *expected(new, [query])


def test_no_answer_mixes_two_states_of_the_catalogue(tmp_path):
    got, old, new = half_updated(tmp_path)
    assert got == old != new


def test_workers_that_answer_for_the_newest_tiles_they_have_would_mix(tmp_path, monkeypatch):
    """The control: a build that does not name the tiles that it asks for."""
    honest = shard_worker.Tiles.answer
    monkeypatch.setattr(
        shard_worker.Tiles, "answer", lambda self, plan, digests, *arrays: honest(self, plan, list(self._tiles)[-len(digests) :], *arrays)
    )
    got, old, new = half_updated(tmp_path)
    middle = len(got) // 2
    assert (got[:middle], got[middle:]) == (new[:middle], old[middle:])


def test_every_query_is_answered_from_its_own_state_while_the_index_changes(tmp_path):
    versions = [version_of(tmp_path, rows, rows) for rows in range(5, 25, 2)]
    asked = [(version, queries_for(version)) for version in versions]
    right = [expected(version, queries) for version, queries in asked]
    with closing(Shards(ProcessCrew(2, ThreadWorker), 1)) as front:
        ready(front, versions[0], 2)
        stop = threading.Event()

        def update() -> None:
            while not stop.is_set():
                for version in versions:
                    front.hold(version)

        updating = threading.Thread(target=update)
        updating.start()
        got = [answers(front, version, queries) for _ in range(5) for version, queries in asked]
        stop.set()
        updating.join()
        assert got == right * 5
        assert front.workers() == (2, 0)
        few = max(len(worker._held) for worker in front._workers)
    assert few <= shards.VERSIONS_KEPT


def test_a_worker_that_lacks_tiles_gets_them_again(tmp_path):
    version = version_of(tmp_path, 12)
    queries = queries_for(version)
    with closing(Shards(ProcessCrew(1, ThreadWorker), 1)) as front:
        ready(front, version, 1)
        front._workers[0].forget([tile.digest for tile in version.index.tiles])
        assert answers(front, version, queries) == expected(version, queries)
        assert front.workers() == (1, 0)


# --- workers that die or say nothing ---------------------------------------------------------------------------------


def test_what_a_lost_worker_leaves_is_answered_and_another_one_comes(tmp_path):
    version = version_of(tmp_path, 20)
    queries = queries_for(version, 2)
    with closing(Shards(ProcessCrew(2, ThreadWorker), 1)) as front:
        ready(front, version, 2)
        for _ in range(3):
            front._workers[1].close()
            assert answers(front, version, queries) == expected(version, queries)
            wait_for(lambda: front.workers().answering == 2)
        assert front.workers().lost == 3


def test_without_the_front_behind_it_a_lost_worker_would_lose_the_query(tmp_path, monkeypatch):
    """The control."""
    version = version_of(tmp_path, 20)

    def nobody(*_):
        raise WorkerLost("nobody answers")

    monkeypatch.setattr(shards, "answer_part", nobody)
    with closing(Shards(ProcessCrew(2, ThreadWorker), 1)) as front:
        ready(front, version, 2)
        front._workers[1].close()
        with pytest.raises(WorkerLost):
            front.evaluate(version, queries_for(version))


def test_a_worker_that_says_nothing_is_given_up_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PATIENCE_S", 0.05)
    version = version_of(tmp_path, 20)
    queries = queries_for(version)
    right = expected(version, queries)
    with closing(Shards(ProcessCrew(1, Silent), 1)) as front:
        ready(front, version, 1)
        assert answers(front, version, queries) == right
        assert front.workers().lost == 1


def test_workers_that_do_not_come_up_cost_no_query(tmp_path, caplog):
    version = version_of(tmp_path, 8)
    queries = queries_for(version)

    class Stillborn(ThreadWorker):
        def wait_until_ready(self) -> None:
            raise WorkerLost("it ended at once")

    with closing(Shards(ProcessCrew(2, Stillborn), 1)) as front:
        front.hold(version)
        wait_for(lambda: "WorkerNotStarted place=1 kind=WorkerLost" in caplog.text)
        assert answers(front, version, queries) == expected(version, queries)
        assert front.workers() == (0, 0)


# --- which one ---------------------------------------------------------------------------------------------------------


def test_small_catalogues_start_no_worker(tmp_path):
    small, large = version_of(tmp_path, 8), version_of(tmp_path, 12)
    with closing(Shards(ProcessCrew(1, ThreadWorker), least_tiles=3)) as front:
        front.hold(small)
        assert front._keeper.ident is None
        ready(front, large, 1)
        queries = queries_for(small)
        assert answers(front, small, queries) == expected(small, queries)


def test_workers_are_as_many_as_cores_or_as_it_is_said(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    for asked, size, least in ((None, 4, shards.LEAST_TILES), (3, 3, 1)):
        with closing(evaluator(asked)) as chosen:
            assert (chosen._crew.size, chosen._least_tiles) == (size, least)
    assert isinstance(evaluator(0), InProcess)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert isinstance(evaluator(None), InProcess)
    monkeypatch.delattr(os, "memfd_create")
    assert isinstance(evaluator(None), InProcess)
    with pytest.raises(UsageError, match="no anonymous shared memory"):
        evaluator(2)


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Ray is not installed") as caught:
        evaluator(None, "127.0.0.1:6379")
    assert "veilmart[sim]" in caught.value.hint
    with pytest.raises(UsageError, match="--workers 0"):
        evaluator(0, "127.0.0.1:6379")


@pytest.mark.parametrize("parameters", PRESETS, ids=lambda parameters: parameters.name)
def test_a_plan_and_its_tiles_fit_into_frames(parameters):
    for dimension in (4, 65, 96, 1024):
        plan = MatchPlan.build(100_000, dimension, parameters)
        assert shard_worker._plan_of(*shard_worker.plan_numbers(plan)) == plan
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        frame = shard_worker.request(shard_worker.Kind.FORGET, digests=[bytes(32)] * shard_worker.MOST_DIGESTS)
        ours.settimeout(1)
        ours.sendall(frame)
        assert theirs.recv(shard_worker.FRAME_BYTES) == frame


def test_more_tiles_than_a_frame_names_are_asked_for_in_several(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_process, "MOST_DIGESTS", 2)
    version = version_of(tmp_path, 20)
    queries = queries_for(version)
    with closing(Shards(ProcessCrew(1, ThreadWorker), 1)) as front:
        assert answers(ready(front, version, 1), version, queries) == expected(version, queries)
        assert front.workers().lost == 0


# --- processes, and a market that answers by them ----------------------------------------------------------------------


class Asker:
    """Asks a market for one state of its catalogue, and knows the right answer."""

    def __init__(self, stub: MarketStub, feature_map: FeatureMap, head: Head, rows: EncodedIndex) -> None:
        self._stub, self._map, self._head, self._plan = stub, feature_map, head, rows.plan
        query = QueryKey.fresh(self._plan).encrypt(np.full(self._plan.dimension, 0.1))
        self._query, self.right = query.to_bytes(), evaluate(rows, query).to_bytes()

    def __call__(self, _: int = 0) -> bool:
        """Return whether a query was answered, and rightly."""
        first = pb.MatchChunk(
            profile=self._plan.parameters.name, map_id=self._map.map_id, catalogue_size=self._head.size, catalogue_head=self._head.digest
        )
        parts = [pb.MatchChunk(data=self._query[at : at + CHUNK_BYTES]) for at in range(0, len(self._query), CHUNK_BYTES)]
        try:
            return b"".join(part.data for part in self._stub.Match(iter([first, *parts]), timeout=100)) == self.right
        except grpc.RpcError:
            return False


def queries_under_fire(folder: Path, count: int) -> tuple[int, int]:
    """Return how many of `count` queries were answered rightly while workers were killed, and how many workers were lost."""
    front = Shards(ProcessCrew(2), 1)
    market = functools.partial(MarketService, evaluator=front)
    with closing(front), running_market(folder / "m", MAP, service_type=market) as (address, ca, store):
        channel = connect(address, ca)
        stub = MarketStub(channel)
        add(store, 30)
        ask = Asker(stub, MAP, store.head(), from_scratch(store, 30))
        assert ask()
        stub.Publish(pb.PublishRequest(envelope=envelope_of(MAP, Ed25519PrivateKey.generate())), timeout=60)  # lets workers be started
        wait_for(lambda: front.workers().answering == 2)
        ended, done = threading.Event(), 0

        def kill() -> None:
            for place in itertools.cycle((0, 1)):
                worker = front._workers[place]
                if worker is not None:
                    os.kill(worker.pid, signal.SIGKILL)
                if ended.wait(0.2):
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        with ThreadPoolExecutor(4) as pool:
            done = sum(pool.map(ask, range(count)))
        while front.workers().lost < 2:  # however fast they were
            done, count = done + ask(), count + 1
        ended.set()
        killer.join()
        channel.close()
    return count - done, front.workers().lost


@pytest.mark.slow
def test_killing_workers_during_a_hundred_queries_loses_none(tmp_path):
    failed, lost = queries_under_fire(tmp_path, 100)
    assert failed == 0
    assert lost >= 2


@pytest.mark.slow
def test_without_the_front_behind_them_killed_workers_lose_queries(tmp_path, monkeypatch):
    """The control."""

    def nobody(*_):
        raise WorkerLost("nobody answers")

    monkeypatch.setattr(shards, "answer_part", nobody)
    failed, _ = queries_under_fire(tmp_path, 100)
    assert failed > 0


@pytest.mark.slow
def test_a_worker_has_no_network_no_key_and_no_variable_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("VEILMART_CANARY", "7741")
    with closing(ProcessCrew(1)) as crew:
        worker = crew.start(0)
        process = Path(f"/proc/{worker.pid}")
        assert b"7741" not in (process / "environ").read_bytes()
        assert b"7741" in subprocess.run(["env"], capture_output=True, check=True).stdout, "the control"
        open_there = {os.readlink(link).partition(":")[0] for link in (process / "fd").iterdir()}
        assert open_there == {"/dev/null", "socket"}
        if (process / "ns" / "net").readlink() == Path("/proc/self/ns/net").readlink():
            pytest.skip("this machine lets nobody leave the network")
        assert {line.split(":")[0].strip() for line in (process / "net" / "dev").read_text().splitlines()[2:]} <= {"lo"}
        worker.close()
        assert not process.exists()


@pytest.mark.slow
def test_a_stopped_process_is_given_up_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PATIENCE_S", 1.0)
    version = version_of(tmp_path, 20)
    queries = queries_for(version)
    with closing(Shards(ProcessCrew(1), 1)) as front:
        ready(front, version, 1)
        worker = front._workers[0]
        os.kill(worker.pid, signal.SIGSTOP)
        assert answers(front, version, queries) == expected(version, queries)
        assert not worker.alive()
        wait_for(lambda: front.workers().answering == 1)


# --- Ray -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install '.[sim]'")
def test_actors_answer_bit_for_bit_and_are_replaced_when_they_are_killed(tmp_path):
    """In a process of its own: Ray leaves files and processes to the end of whoever started it, which is a warning here."""
    words = [sys.executable, "-m", "tests.market_node.actors", str(tmp_path)]
    done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5 answers of 3 queries, 1 worker lost, the same bytes\n"


def test_a_cluster_that_is_not_there_is_a_usage_error(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.init", lambda *_, **__: 1 / 0)
    with pytest.raises(UsageError, match=r"no cluster answers there \(ZeroDivisionError\)"):
        evaluator(2, "127.0.0.1:6379")
