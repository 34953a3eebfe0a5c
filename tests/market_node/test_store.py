import signal
import subprocess
import sys
import textwrap

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.service import MarketService
from market_node.store import Store
from protocol.catalogue import EMPTY_CATALOGUE, Head, Terms, name_of_map, scalars_of, tables_of
from protocol.errors import AlreadyPublished, NotFound, UsageError
from protocol.features import shipped_map
from protocol.notices import Kind, Notice, open_notice, sign_notice
from protocol.release import open_envelope
from tests.protocol.worlds import ADAPTER, envelope_of, small_map

MAP, OWNER = small_map(), Ed25519PrivateKey.generate()
MARKET_KEY = bytes(32)
ENVELOPES = [envelope_of(MAP, OWNER, number=n + 1, seed=n) for n in range(4)]


@pytest.fixture
def store(market_home):
    store = Store.open(market_home)
    yield store
    store.close()


def append(store: Store, envelope: bytes):
    release = open_envelope(envelope)
    return store.append(release, envelope, scalars_of(release, MAP))


def recomputed(store: Store) -> Head:
    """The head of what lies in the store, from the envelopes alone."""
    return tables_of([open_envelope(envelope) for envelope in store.envelopes(0, 1 << 30)], MAP).head()


def test_positions_count_up_and_the_head_chains_the_rows(store):
    stored = [append(store, envelope) for envelope in ENVELOPES]
    assert [one.position for one in stored] == [0, 1, 2, 3]
    assert store.head() == recomputed(store)
    assert store.envelopes(1, 3) == ENVELOPES[1:3]


def test_the_same_release_again_changes_nothing(store):
    append(store, ENVELOPES[0])
    before = store.head()
    assert append(store, ENVELOPES[0]).position == 0
    assert store.head() == before


def test_other_bytes_under_one_number_are_refused(store):
    append(store, ENVELOPES[0])
    with pytest.raises(AlreadyPublished):
        append(store, envelope_of(MAP, OWNER, number=1, seed=9))


def test_an_empty_store_has_the_empty_head(store):
    assert store.head() == EMPTY_CATALOGUE == recomputed(store)
    with pytest.raises(NotFound):
        store.envelope(bytes(32))


def test_every_connection_is_fully_synchronous(tmp_path):
    store = Store.open(tmp_path)
    connections = [store._engine.connect() for _ in range(3)]
    for connection in connections:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        connection.rollback()
        connection.close()
    store.close()


WRITER = """
    import sys
    from pathlib import Path
    from market_node.service import MarketService
from market_node.store import Store
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    sys.path.insert(0, ".")
    from protocol.catalogue import scalars_of
    from protocol.features import shipped_map
from protocol.release import open_envelope
    from tests.protocol.worlds import envelope_of, small_map
    store, feature_map, key = Store.open(Path(sys.argv[1])), small_map(), Ed25519PrivateKey.generate()
    for number in range(1, 10_000):
        envelope = envelope_of(feature_map, key, number=number, seed=number)
        release = open_envelope(envelope)
        store.append(release, envelope, scalars_of(release, feature_map))
        print(release.release_id.hex(), flush=True)
"""


def test_a_killed_market_keeps_everything_it_acknowledged(market_home):
    """SIGKILL says nothing about power cuts; it does show a commit that is acknowledged too early."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(market_home)], stdout=subprocess.PIPE, text=True)
    acknowledged = [process.stdout.readline().strip() for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.stdout.close()
    process.wait()
    store = Store.open(market_home)
    kept = {open_envelope(envelope).release_id.hex() for envelope in store.envelopes(0, store.head().size)}
    assert {line for line in acknowledged if len(line) == 64} <= kept
    assert store.head() == recomputed(store)
    store.close()


def test_a_reader_does_not_stop_the_writer(store):
    append(store, ENVELOPES[0])
    with store._engine.connect() as reader:
        assert reader.exec_driver_sql("SELECT count(*) FROM release").scalar() == 1
        assert append(store, ENVELOPES[1]).position == 1
        assert reader.exec_driver_sql("SELECT count(*) FROM release").scalar() == 1  # one transaction sees one state


def test_an_upload_that_a_full_disk_stops_leaves_nothing(store):
    upload = store.receive_adapter(bytes(32), 1 << 20)
    upload._file.close()
    upload._file = open("/dev/full", "wb")  # noqa: SIM115 - the upload closes it
    upload.write(b"buffered, so that only close() meets the full disk")
    with pytest.raises(OSError, match="No space left"):
        upload.close()
    assert not list(store._adapters.iterdir())


def test_a_half_written_adapter_is_swept_at_the_start(tmp_path):
    Store.open(tmp_path).close()
    leftover = tmp_path / "adapters" / ".upload-dead"
    leftover.write_bytes(b"half")
    Store.open(tmp_path).close()
    assert not leftover.exists()


def test_a_full_disk_is_a_clean_error_and_reads_go_on(tmp_path):
    store = Store.open(tmp_path)
    append(store, ENVELOPES[0])
    with store._engine.connect() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
        db.exec_driver_sql(f"PRAGMA max_page_count={pages}")
        db.rollback()
    from sqlalchemy.exc import OperationalError

    key = Ed25519PrivateKey.generate()
    with pytest.raises(OperationalError, match="full"):  # noqa: PT012 - the disk fills up somewhere on the way
        for number in range(1, 200):
            append(store, envelope_of(MAP, key, number=number, seed=number))
    assert store.head() == recomputed(store)
    assert store.envelope(open_envelope(ENVELOPES[0]).release_id) == ENVELOPES[0]
    store.close()


def test_every_earlier_state_can_still_be_named_and_its_pages_too(store, monkeypatch):
    from market_node import store as stores
    from protocol import catalogue

    for module in (stores, catalogue):
        monkeypatch.setattr(module, "PAGE_SIZE", 3)  # the fourth release begins a page
    for count, envelope in enumerate(ENVELOPES, 1):
        append(store, envelope)
        tables = tables_of([open_envelope(e) for e in ENVELOPES[:count]], MAP)
        assert store.head() == store.head_at(count) == tables.head()
    assert store.head_at(2) == tables_of([open_envelope(e) for e in ENVELOPES[:2]], MAP).head()
    assert [len(store.page_chains(size)) for size in range(5)] == [0, 1, 1, 1, 2]
    assert store.page_chains(4)[0] == store.page_chains(3)[0] != store.page_chains(2)[0]
    with pytest.raises(NotFound):
        store.head_at(9)


def test_terms_that_many_releases_share_are_kept_once(store):
    for envelope in ENVELOPES:
        append(store, envelope)
    other = envelope_of(MAP, Ed25519PrivateKey.generate(), seed=9, adapter=ADAPTER)
    append(store, other)
    append(store, envelope_of(MAP, Ed25519PrivateKey.generate(), seed=10))
    assert store.terms(0, 9) == [Terms.of(open_envelope(e)).body for e in (ENVELOPES[0], other)]
    assert [store.rows(at, at + 1)[-4] for at in range(6)] == [0, 0, 0, 0, 1, 0]


def test_a_store_of_another_version_is_refused_and_left_as_it_is(tmp_path):
    import sqlite3

    with sqlite3.connect(tmp_path / "market.db") as db:
        db.execute("CREATE TABLE release (position INTEGER PRIMARY KEY, row BLOB, head BLOB)")
    db.close()
    with pytest.raises(UsageError, match="older one"):
        Store.open(tmp_path)
    with sqlite3.connect(tmp_path / "market.db") as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("release",)]
    db.close()


def test_a_market_does_not_start_under_another_map_than_its_releases(store):
    other = small_map("other", seed=9)
    store.require_map(other)  # an empty folder is anybody's
    append(store, ENVELOPES[0])
    with pytest.raises(UsageError, match=f"{MAP.map_id.hex()[:16]}, got {other.map_id.hex()[:16]}"):
        MarketService(store, other, OWNER, simulation=False)
    store.require_map(MAP)
    assert name_of_map(shipped_map("kme-rff-256").map_id).startswith("kme-rff-256 (")


def test_an_adapter_is_named_by_the_releases_that_stand(store):
    store.require_map(MAP)
    other = Ed25519PrivateKey.generate()
    for key in (OWNER, other):
        append(store, envelope_of(MAP, key, number=9, seed=9, adapter=ADAPTER))
    owners = [key.public_key().public_bytes_raw() for key in (OWNER, other)]
    assert store.names_adapter(ADAPTER.digest)
    assert not store.names_adapter(bytes(31) + b"x")
    assert not store.names_adapter(bytes(32)), "stands where there is none"
    assert [claims.owner for claims in store.naming(ADAPTER.digest)] == owners
    assert [claims.owner for claims in store.naming(ADAPTER.digest, owners[1])] == owners[1:]
    assert store.owns_adapter(owners[0], ADAPTER.digest)
    assert not store.owns_adapter(bytes(32), ADAPTER.digest)
    (mine,) = store.releases_of(owners[:1])
    data = sign_notice(Notice(Kind.WITHDRAWAL, MARKET_KEY, owners[0], (mine,)), OWNER)
    assert (
        store.append_notice(open_notice(data, MARKET_KEY), data) == store.append_notice(open_notice(data, MARKET_KEY), data) == (0, [data])
    )
    assert [claims.owner for claims in store.naming(ADAPTER.digest)] == owners[1:]
    assert not store.owns_adapter(owners[0], ADAPTER.digest)
    assert not store.stands(mine)


def test_what_a_market_counts_may_be_larger_than_32_bits(store):
    store.keep_cosigned("w", 1 << 39, b"a note")
    store.keep_cosigned("w", (1 << 39) - 1, b"an older one")
    append(store, envelope_of(MAP, OWNER, number=1 << 40, seed=1))
    assert store.cosigned() == [b"a note"]
    assert store.logged_under(OWNER.public_key().public_bytes_raw(), 1 << 40)[1] == 0
    with pytest.raises(NotFound):
        store.head_at(1 << 62)


def test_a_damaged_database_is_refused_by_its_path(tmp_path):
    (tmp_path / "market.db").write_bytes(b"no database at all" * 300)
    with pytest.raises(UsageError, match=r"market\.db: expected a market's database"):
        Store.open(tmp_path)
