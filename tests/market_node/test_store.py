import signal
import subprocess
import sys
import textwrap

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.store import Store
from protocol.catalogue import EMPTY_HEAD, extend_head, row_of
from protocol.errors import AlreadyPublished, NotFound
from protocol.release import open_envelope
from tests.protocol.worlds import envelope_of, small_map

MAP, OWNER = small_map(), Ed25519PrivateKey.generate()
ENVELOPES = [envelope_of(MAP, OWNER, number=n + 1, seed=n) for n in range(4)]


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path)
    yield store
    store.close()


def append(store: Store, envelope: bytes):
    release = open_envelope(envelope)
    return store.append(release, envelope, row_of(release, MAP))


def test_positions_count_up_and_the_head_chains_the_rows(store):
    stored = [append(store, envelope) for envelope in ENVELOPES]
    assert [one.position for one in stored] == [0, 1, 2, 3]
    assert store.head() == (4, extend_head(EMPTY_HEAD, store.catalogue(0, 4, rows=True)))
    assert store.catalogue(1, 3, rows=False) == ENVELOPES[1:3]


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
    assert store.head() == (0, EMPTY_HEAD)
    with pytest.raises(NotFound):
        store.envelope(bytes(32))


def test_every_connection_is_fully_synchronous(store):
    connections = [store._engine.connect() for _ in range(3)]
    for connection in connections:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        connection.rollback()
        connection.close()


WRITER = """
    import sys
    from pathlib import Path
    from market_node.store import Store
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    sys.path.insert(0, ".")
    from protocol.catalogue import row_of
    from protocol.release import open_envelope
    from tests.protocol.worlds import envelope_of, small_map
    store, feature_map, key = Store.open(Path(sys.argv[1])), small_map(), Ed25519PrivateKey.generate()
    for number in range(1, 10_000):
        envelope = envelope_of(feature_map, key, number=number, seed=number)
        release = open_envelope(envelope)
        store.append(release, envelope, row_of(release, feature_map))
        print(release.release_id.hex(), flush=True)
"""


def test_a_killed_market_keeps_everything_it_acknowledged(tmp_path):
    """SIGKILL says nothing about power cuts; it does show a commit that is acknowledged too early."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    acknowledged = [process.stdout.readline().strip() for _ in range(50)]
    process.send_signal(signal.SIGKILL)
    acknowledged += process.stdout.read().split()
    process.stdout.close()
    process.wait()
    store = Store.open(tmp_path)
    size, head = store.head()
    kept = {open_envelope(envelope).release_id.hex() for envelope in store.catalogue(0, size, rows=False)}
    assert {line for line in acknowledged if len(line) == 64} <= kept
    assert head == extend_head(EMPTY_HEAD, store.catalogue(0, size, rows=True))
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


def test_a_full_disk_is_a_clean_error_and_reads_go_on(store):
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
    size, head = store.head()
    assert head == extend_head(EMPTY_HEAD, store.catalogue(0, size, rows=True))
    assert store.envelope(open_envelope(ENVELOPES[0]).release_id) == ENVELOPES[0]
