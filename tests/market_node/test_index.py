"""The index on disk: found again, checked, never half there; and queries that go on while it is built."""

import asyncio
import errno
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import index as indices
from market_node import service
from market_node.index import HEADER_BYTES, MarketIndex, TileFolder
from market_node.service import MarketService
from market_node.store import Store
from protocol.catalogue import centred_means, scalars_of
from protocol.channel import CHUNK_BYTES, connect
from protocol.encryption import Layout, MatchPlan, QueryKey
from protocol.errors import StaleCatalogue
from protocol.evaluation import EncodedIndex, EncodedTile, evaluate
from protocol.proof import index_digest
from protocol.release import Card, open_envelope, sign_release
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.protocol.worlds import DIMENSION, envelope_of, release_of, small_map

MAP = small_map()
OWNER = Ed25519PrivateKey.generate()
MADE = [release_of(MAP, OWNER, seed=seed) for seed in range(8)]


def add(store: Store, count: int) -> None:
    """Put synthetic releases into the store: a few signed specifications under ever new names."""
    for number in range(store.head().size + 1, store.head().size + 1 + count):
        made = replace(MADE[number % len(MADE)], release_number=number, previous=bytes([1]) * 32 if number > 1 else b"")
        release = replace(made, card=Card(f"owner-{number}"))
        store.append(release, sign_release(release, OWNER), scalars_of(release, MAP))


@pytest.fixture
def small_tiles(monkeypatch):
    """A tile of the real layout holds thousands of rows; of these, each holds 4."""
    monkeypatch.setattr(MatchPlan, "capacity", property(lambda plan: 2))


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path / "market")
    yield store
    store.close()


def opened(store: Store) -> MarketIndex:
    return MarketIndex(store, MAP, store.home / "index")


def newest(index: MarketIndex, store: Store):
    head = store.head()
    return index.build(head.size, head.digest)


def from_scratch(store: Store, size: int) -> EncodedIndex:
    specifications = [open_envelope(envelope).specification for envelope in store.envelopes(0, size)]
    return EncodedIndex.build(centred_means(specifications, MAP), MatchPlan.build(size, DIMENSION))


def same(a: EncodedIndex, b: EncodedIndex) -> bool:
    tiles = zip(a.tiles, b.tiles, strict=True)
    return a.plan == b.plan and all(x.digest == y.digest and (x.diagonals == y.diagonals).all() for x, y in tiles)


def files(store: Store) -> list[Path]:
    return sorted((store.home / "index").iterdir())


def test_every_version_is_the_index_of_its_rows(store, small_tiles):
    index = opened(store)
    for count in (1, 2, 1, 1, 3, 9):
        add(store, count)
        version = newest(index, store)
        assert same(version.index, from_scratch(store, version.head.size))
        assert version.digest == index_digest(from_scratch(store, version.head.size))


def test_full_tiles_are_files_and_the_staging_tile_is_not(store, small_tiles):
    add(store, 11)
    index = opened(store)
    index.refresh()
    assert len(files(store)) == 2
    version = newest(index, store)
    assert all(not tile.diagonals.flags.writeable for tile in version.index.tiles)
    with pytest.raises(ValueError, match="read-only"):
        version.index.tiles[0].diagonals[0, 0, 0, 0] = 1


def test_a_registration_encodes_the_staging_tile_alone(store, small_tiles, monkeypatch):
    add(store, 9)
    index = opened(store)
    before = newest(index, store)
    encoded = []
    honest = EncodedIndex.build.__func__
    monkeypatch.setattr(EncodedIndex, "build", classmethod(lambda cls, rows, plan: (encoded.append(len(rows)), honest(cls, rows, plan))[1]))
    add(store, 1)
    after = newest(index, store)
    assert encoded == [2]
    assert after.index.tiles[:2] == before.index.tiles[:2]


def test_a_market_that_starts_again_opens_its_files_and_few_releases(store, small_tiles, monkeypatch):
    add(store, 10)
    version = newest(opened(store), store)
    read = []
    honest = Store.envelopes
    monkeypatch.setattr(Store, "envelopes", lambda self, start, stop: (read.append((start, stop)), honest(self, start, stop))[1])
    again = newest(opened(store), store)
    assert read == [(8, 10)], "the releases of the staging tile, and no others"
    assert same(again.index, version.index)


def test_a_layout_that_changes_encodes_everything_again_and_old_files_go(store, small_tiles, monkeypatch):
    add(store, 9)
    index = opened(store)
    index.refresh()
    old = set(files(store))
    held = newest(index, store)
    real = MatchPlan.build.__func__
    monkeypatch.setattr(MatchPlan, "build", classmethod(lambda cls, *how: replace(real(cls, *how), layout=Layout.WINDOW)))
    add(store, 4)
    index.refresh()
    assert set(files(store)).isdisjoint(old)
    assert same(newest(index, store).index, from_scratch(store, 13))
    query = QueryKey.fresh(held.index.plan).encrypt(np.full(DIMENSION, 0.2))
    assert evaluate(held.index, query).to_bytes(), "a version in use keeps its mapping"


def torn(data: bytes) -> bytes:
    return data[: len(data) // 2]


DAMAGE = {
    "torn": torn,
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "a bit of a diagonal": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a bit of the digest of rows": lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    "a bit of the checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "zeros, as a file system leaves them": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_tile_is_encoded_again(store, small_tiles, damage):
    add(store, 9)
    newest(opened(store), store)
    whole = [path.read_bytes() for path in files(store)]
    files(store)[0].write_bytes(damage(whole[0]))
    assert same(newest(opened(store), store).index, from_scratch(store, 9))
    assert [path.read_bytes() for path in files(store)] == whole


def test_without_its_checksum_a_damaged_tile_would_be_used(store, small_tiles, monkeypatch):
    """The control: the same damage, with a check that always agrees, gives another index."""
    add(store, 9)
    newest(opened(store), store)
    path = files(store)[0]
    data = DAMAGE["a bit of a diagonal"](path.read_bytes())
    path.write_bytes(data)

    class Agreeable:
        def update(self, rest):
            pass

        def digest(self):
            return data[:32]

    monkeypatch.setattr(indices.hashlib, "sha256", lambda *_: Agreeable())
    tile = TileFolder(path.parent).load(path.name, from_scratch(store, 9).tiles[0].diagonals.shape)
    monkeypatch.undo()
    assert tile is not None
    assert len(data) > HEADER_BYTES


def test_a_tile_under_anothers_name_is_encoded_again(store, small_tiles, monkeypatch):
    add(store, 9)
    newest(opened(store), store)
    first, second = files(store)[:2]
    whole = first.read_bytes(), second.read_bytes()
    first.write_bytes(whole[1])
    second.write_bytes(whole[0])
    assert same(newest(opened(store), store).index, from_scratch(store, 9))
    assert (first.read_bytes(), second.read_bytes()) == whole
    monkeypatch.setattr(indices, "ENCODING", indices.ENCODING + 1)
    later = opened(store)
    newest(later, store)
    assert set(later._tiles).isdisjoint((first.name, second.name)), "a later encoder takes no tile of an earlier one"


def test_a_full_disk_stops_no_query(store, small_tiles, monkeypatch, caplog):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(indices, "write_durably", full)
    add(store, 9)
    index = opened(store)
    index.refresh()
    assert same(newest(index, store).index, from_scratch(store, 9))
    assert "TileNotWritten" in caplog.text


def test_a_refresh_that_fails_is_tried_again_at_the_next_release(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "REFRESH_S", 0.0)

    async def publish_twice(market) -> list[str]:
        tried = []
        market._matcher.index.refresh = lambda: tried.append("refresh") or {}["nothing"]
        for _ in range(2):
            market._refresh_soon()
            await market._refreshing
        return tried

    store = Store.open(tmp_path)
    market = MarketService(store, MAP, OWNER, simulation=False)
    assert asyncio.run(publish_twice(market)) == ["refresh", "refresh"]
    assert "IndexFailed kind=KeyError" in caplog.text
    market.close()
    store.close()


WRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    from market_node.index import TileFolder
    from protocol.evaluation import EncodedTile
    folder = TileFolder(Path(sys.argv[1]))
    for number in range(100_000):
        tile = EncodedTile(number.to_bytes(32, "little"), np.full((4, 4, 4, 4096), number, np.uint64))
        folder.keep(f"{number % 4}", tile)
        print(number, flush=True)
"""


def test_a_killed_market_leaves_whole_tiles_only(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    written = [int(process.stdout.readline()) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    folder = TileFolder(tmp_path)
    assert not list(tmp_path.glob(".*")), "what was half written is swept at the start"
    for name in range(4):
        tile = folder.load(str(name), (4, 4, 4, 4096))
        number = int.from_bytes(tile.digest, "little")
        assert number >= max(n for n in written if n % 4 == name)
        assert (tile.diagonals == number).all()


def test_a_tile_of_another_shape_is_not_opened(tmp_path):
    folder = TileFolder(tmp_path)
    folder.keep("x", EncodedTile(bytes(32), np.zeros((2, 3), np.uint64)))
    assert folder.load("x", (3, 2)) is not None, "the name holds the layout; only the size is told apart here"
    assert folder.load("x", (2, 4)) is None
    assert folder.load("y", (2, 3)) is None


def test_recent_states_are_answered_and_old_or_invented_ones_are_stale(store, small_tiles, monkeypatch):
    monkeypatch.setattr(indices, "RELEASES_BACK", 6)
    index = opened(store)
    add(store, 20)
    for size in (20, 14, 17, 15):
        version = index.build(size, store.head_at(size).digest)
        assert same(version.index, from_scratch(store, size))
    for size, head in (
        (13, store.head_at(13).digest),
        (20, bytes(32)),
        (21, bytes(32)),
        (0, store.head().digest),
        (19, store.head().digest),
    ):
        with pytest.raises(StaleCatalogue):
            index.build(size, head)


def test_the_rows_that_are_kept_do_not_grow_with_the_catalogue(store, small_tiles, monkeypatch):
    monkeypatch.setattr(indices, "RELEASES_BACK", 3)
    add(store, 42)
    index = opened(store)
    assert same(newest(index, store).index, from_scratch(store, 42))
    assert len(index._rows) <= 8
    assert same(index.build(39, store.head_at(39).digest).index, from_scratch(store, 39)), "a state before the staging tile began"
    add(store, 1)
    assert same(newest(index, store).index, from_scratch(store, 43))


def test_few_versions_are_held(store, small_tiles):
    index = opened(store)
    add(store, 10)
    heads = [store.head_at(size) for size in range(1, 11)]
    for head in heads:
        index.build(head.size, head.digest)
    held = [head.size for head in heads if index.held(head.size, head.digest)]
    assert held == list(range(11 - indices.VERSIONS_KEPT, 11))
    assert index.held(3, heads[9].digest) is None


SLOW_S = 0.3  # what building takes in the tests below: a large catalogue whose layout changes


class BuildsOnTheLoop(MarketService):
    """The control: a market that encodes where it answers."""

    def _refresh_soon(self) -> None:
        self._matcher.index.refresh()


def query_latencies(tmp_path, monkeypatch, service_type) -> list[float]:
    """Return seconds of queries for one state of the catalogue while 200 registrations run."""
    honest = MarketIndex._encoded
    with running_market(tmp_path / "m", MAP, service_type=service_type) as (address, ca, store):
        channel = connect(address, ca)
        stub = MarketStub(channel)
        add(store, 20)
        head = store.head()
        plan = MatchPlan.build(head.size, DIMENSION)
        data = QueryKey.fresh(plan).encrypt(np.full(DIMENSION, 0.2)).to_bytes()

        def ask() -> float:
            first = pb.MatchChunk(profile=plan.parameters.name, map_id=MAP.map_id, catalogue_size=head.size, catalogue_head=head.digest)
            parts = [pb.MatchChunk(data=data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]
            started = time.perf_counter()
            assert sum(len(part.data) for part in stub.Match(iter([first, *parts]), timeout=60)) == plan.answer_bytes
            return time.perf_counter() - started

        ask()  # kernels are compiled, the version is held
        envelopes = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(200)]
        monkeypatch.setattr(MarketIndex, "_encoded", lambda self, state: (time.sleep(SLOW_S), honest(self, state))[1])
        done, seconds = threading.Event(), []

        def register() -> None:
            for envelope in envelopes if service_type is MarketService else envelopes[:10]:
                stub.Publish(pb.PublishRequest(envelope=envelope), timeout=60)
            done.set()

        thread = threading.Thread(target=register)
        thread.start()
        while not done.is_set():
            seconds.append(ask())
        thread.join()
        channel.close()
    return seconds


def test_building_an_index_does_not_stop_queries(tmp_path, monkeypatch):
    """Half of what one build takes bounds the 99th percentile: generous on a loaded machine, and failed by the control."""
    seconds = query_latencies(tmp_path, monkeypatch, MarketService)
    assert len(seconds) >= 20
    assert np.quantile(seconds, 0.99) < SLOW_S / 2, f"median {np.median(seconds):.4f}, p99 {np.quantile(seconds, 0.99):.4f}"


def test_a_market_that_builds_where_it_answers_would_stop_them(tmp_path, monkeypatch):
    assert np.quantile(query_latencies(tmp_path, monkeypatch, BuildsOnTheLoop), 0.99) > SLOW_S / 2
