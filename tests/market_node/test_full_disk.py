"""A full disk: a clean error and no acknowledgement, reads go on, and once there is room everything goes through without a restart."""

import hashlib
import sqlite3
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import create_engine, event
from sqlalchemy.exc import OperationalError

from market_node import database, store
from market_node.quotas import Limits
from market_node.store import Store
from nodes.market_client import MarketClient
from protocol.catalogue import scalars_of
from protocol.errors import QuotaExceeded, UsageError, VeilmartError
from protocol.release import AdapterReference, open_envelope
from protocol.transparency import root_of_all
from tests.market_node.market import running_market
from tests.protocol.worlds import adapter_bytes, envelope_of, small_map

MAP = small_map()
ROOM = 1 << 30  # pages


class Disk:
    """How many pages a database may have; none free from `fill` to `clear`."""

    def __init__(self, monkeypatch) -> None:
        self.full = False
        monkeypatch.setattr(database, "begin", self._limited(database.begin))

    def _limited(self, begin):
        def limited(connection):
            begin(connection)
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar() if self.full else ROOM
            connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")

        return limited


def some(count: int) -> list[bytes]:
    return [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(count)]


def publish_on(client: MarketClient, envelopes: list[bytes]) -> list[bytes]:
    """Return what was acknowledged before the first refusal."""
    acknowledged = []
    for envelope in envelopes:
        try:
            client.publish(envelope)
        except VeilmartError:
            break
        acknowledged.append(envelope)
    return acknowledged


def test_a_full_disk_is_said_plainly_and_publishing_goes_on_without_a_restart(folder_in_memory, tmp_path, monkeypatch):
    disk, envelopes = Disk(monkeypatch), some(10)
    with (
        running_market(folder_in_memory / "m", MAP, limits=Limits()) as (address, ca, kept),
        MarketClient(address, ca, tmp_path / "h") as client,
    ):
        before = publish_on(client, envelopes[:2])
        disk.full = True
        acknowledged = publish_on(client, envelopes[2:])
        assert len(acknowledged) < 8, "the disk fills up somewhere on the way"
        refused = envelopes[2 + len(acknowledged)]
        with pytest.raises(QuotaExceeded, match="disk is full") as caught:
            client.publish(refused)
        assert caught.value.retry_after_s == 60
        held = client.envelopes(MAP)
        assert set(held) >= {*before, *acknowledged}
        assert client.mirror(MAP).releases
        assert kept.root(len(held)) == root_of_all(held)
        disk.full = False
        assert client.publish(refused).envelope == refused
        assert publish_on(client, envelopes[2:]) == envelopes[2:]
        assert sorted(client.envelopes(MAP)) == sorted(envelopes)
    with sqlite3.connect(folder_in_memory / "m" / "market.db") as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def test_an_adapter_that_finds_no_room_is_refused_so_too_and_taken_later(tmp_path, monkeypatch):
    data = adapter_bytes()
    adapter = AdapterReference(hashlib.sha256(data).digest(), len(data))
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "h") as client:
        with monkeypatch.context() as full:
            full.setattr(store.AdapterUpload, "finish", lambda self, admit: Path("/dev/full").write_bytes(b"x"))
            with pytest.raises(QuotaExceeded, match="disk is full"):
                client.upload_adapter(adapter, data)
        assert not list((tmp_path / "m" / "adapters").iterdir())
        client.upload_adapter(adapter, data)
        assert client.download_adapter(adapter) == data


def test_a_store_that_swallows_the_error_is_caught_by_that_test(tmp_path, monkeypatch):
    """Control: what it acknowledged is not there."""
    disk, append = Disk(monkeypatch), Store.append

    def swallowing(self, release, envelope, scalars):
        try:
            return append(self, release, envelope, scalars)
        except OperationalError:
            return None

    kept = Store.open(tmp_path)
    disk.full, acknowledged = True, []
    for envelope in some(10):
        release = open_envelope(envelope)
        swallowing(kept, release, envelope, scalars_of(release, MAP))
        acknowledged.append(envelope)
    assert not set(acknowledged) <= set(kept.envelopes(0, 10))
    kept.close()


def test_what_is_said_of_a_full_disk_is_said_of_nothing_else(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path / 'any.db'}")
    event.listen(engine, "connect", lambda connection, record: connection.execute("PRAGMA max_page_count=2"))
    with pytest.raises(OperationalError) as full, engine.begin() as db:  # noqa: PT012 - it fills up somewhere on the way
        for number in range(9):
            db.exec_driver_sql(f"CREATE TABLE t{number} (a)")
    with pytest.raises(OperationalError) as other, engine.begin() as db:
        db.exec_driver_sql("no statement")
    engine.dispose()
    try:
        try:
            raise full.value
        except OperationalError:
            raise UsageError("quotas.db: database or disk is full") from None
    except UsageError as error:
        said = error
    errors = {
        "full": full.value,
        "said of it": said,
        "other": other.value,
        "enospc": OSError(28, "x"),
        "eperm": OSError(1, "x"),
        "usage": UsageError("x"),
    }
    assert {name for name, error in errors.items() if database.disk_is_full(error)} == {"full", "said of it", "enospc"}
