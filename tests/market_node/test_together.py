"""Releases that come together share a transaction; each is stored, refused and acknowledged as if it had come alone."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from market_node.quotas import Limits, Quota, Quotas
from market_node.service import MarketService
from market_node.store import Store
from nodes.market_client import MarketClient
from protocol.catalogue import scalars_of
from protocol.errors import AlreadyPublished, QuotaExceeded, VeilmartError
from protocol.release import open_envelope
from protocol.transparency import leaf_hash, root_of_all, verify_inclusion
from tests.market_node.market import running_market
from tests.protocol.worlds import ADAPTER, envelope_of, small_map

MAP, OWNER = small_map(), Ed25519PrivateKey.generate()
WAIT_S = 60.0


def offer_of(envelope: bytes):
    release = open_envelope(envelope)
    return release, envelope, scalars_of(release, MAP)


def strangers(count: int) -> list[bytes]:
    return [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed, adapter=ADAPTER if seed % 3 else None) for seed in range(count)]


FIRST, OTHER_BYTES = (envelope_of(MAP, OWNER, seed=seed) for seed in (50, 51))
MIXED = [*strangers(5), FIRST, OTHER_BYTES, FIRST, envelope_of(MAP, OWNER, number=2, seed=52)]


def test_together_or_one_by_one_comes_to_the_same_bytes(tmp_path):
    together, alone = Store.open(tmp_path / "together"), Store.open(tmp_path / "alone")
    for at in (0, 5):
        outcomes = together.append_all([offer_of(envelope) for envelope in MIXED[at : at + 5]])
        expected = []
        for envelope in MIXED[at : at + 5]:
            try:
                expected.append(alone.append(*offer_of(envelope)).position)
            except AlreadyPublished:
                expected.append(None)
        assert [None if isinstance(one, AlreadyPublished) else one.position for one in outcomes] == expected
        for one, envelope in zip(outcomes, MIXED[at : at + 5], strict=True):
            if not isinstance(one, AlreadyPublished):  # all are under the newest state
                assert one.head == together.head()
                verify_inclusion(leaf_hash(envelope), one.position, one.head.size, one.log.inclusion, one.log.root)
    held = together.envelopes(0, 99)
    assert held == alone.envelopes(0, 99) == [*MIXED[:6], MIXED[8]]
    assert together.root(len(held)) == alone.root(len(held)) == root_of_all(held)
    for size in range(1, len(held) + 1):
        assert together.head_at(size) == alone.head_at(size)
    together.close()
    alone.close()


def test_a_commit_that_fails_stores_none_of_them(tmp_path):
    store = Store.open(tmp_path)
    store.append(*offer_of(MIXED[0]))
    before = store.head()

    def full(connection) -> None:
        raise OperationalError("commit", {}, Exception("database or disk is full"))

    event.listen(store._engine, "commit", full)
    with pytest.raises(OperationalError):
        store.append_all([offer_of(envelope) for envelope in MIXED[1:4]])
    event.remove(store._engine, "commit", full)
    assert store.head() == before
    assert [one.position for one in store.append_all([offer_of(envelope) for envelope in MIXED[1:4]])] == [1, 2, 3]
    store.close()


class Gathers(MarketService):
    """Waits until all are there, so that they come together."""

    expected: int
    batches: list[int]

    def _append_waiting(self, loop):
        until = time.monotonic() + WAIT_S
        while not self.batches and len(self._offers) < self.expected and time.monotonic() < until:
            time.sleep(0.01)
        super()._append_waiting(loop)

    def _append(self, offers):
        self.batches.append(len(offers))
        return super()._append(offers)


def published(folder, envelopes: list[bytes], service_type=Gathers, limits=None) -> list[str]:
    """Publish releases at once, each from a home of its own, and return how each ended."""
    service_type.batches, service_type.expected = [], len(envelopes)
    how = {} if limits is None else {"limits": limits}
    with running_market(folder / "m", MAP, service_type=service_type, **how) as (address, ca, store):

        def publish(place: int) -> str:
            with MarketClient(address, ca, folder / f"home-{place}") as client:
                try:
                    receipt = client.publish(envelopes[place])  # verifies it
                except VeilmartError as error:
                    return error.code
                assert store.envelopes(receipt.index, receipt.index + 1) == [envelopes[place]]
                return "stored"

        with ThreadPoolExecutor(len(envelopes)) as pool:
            return list(pool.map(publish, range(len(envelopes))))


def test_each_of_many_gets_a_receipt_of_its_own_or_its_own_refusal(tmp_path):
    ended = published(tmp_path, MIXED)
    assert Gathers.batches == [len(MIXED)]
    assert Counter(ended) == {"stored": len(MIXED) - 1, "already-published": 1} or Counter(ended) == {
        "stored": len(MIXED) - 2,  # the other bytes came first, and the same bytes were refused twice
        "already-published": 2,
    }


class CannotStore(Gathers):
    """A market whose disk is full when several come."""

    def _append(self, offers):
        if len(offers) > 1:
            self.batches.append(len(offers))
            raise OSError(28, "No space left on device")
        return super()._append(offers)


def test_none_is_acknowledged_when_they_cannot_be_stored(tmp_path):
    envelopes = strangers(6)
    ended = published(tmp_path, envelopes, CannotStore)
    assert Counter(ended) == {"quota": 6}  # all are told to come again
    assert CannotStore.batches == [6]
    assert published(tmp_path, envelopes[:1], CannotStore) == ["stored"]
    store = Store.open(tmp_path / "m")
    assert store.envelopes(0, 9) == envelopes[:1]
    store.close()


def own(count: int) -> list[bytes]:
    key = Ed25519PrivateKey.generate()
    return [envelope_of(MAP, key, number=number, seed=number) for number in range(1, count + 1)]


def test_an_owner_cannot_pass_its_quota_by_sending_many_at_once(tmp_path, monkeypatch):
    three = Limits(releases=3)
    assert Counter(published(tmp_path / "a", own(6), limits=three)) == {"stored": 3, "quota": 3}
    # The control: a market that asks for each of them whether one more is allowed.
    require = Quotas.require
    monkeypatch.setattr(Quotas, "require", lambda self, owner, kind, amount, now: require(self, owner, kind, 1, now))
    assert Counter(published(tmp_path / "b", own(6), limits=three)) == {"stored": 6}


def test_the_same_bytes_many_times_at_once_are_one_release_and_cost_one(tmp_path):
    (envelope,) = own(1)
    assert Counter(published(tmp_path, [envelope] * 4, limits=Limits(releases=1))) == {"stored": 4}
    quotas = Quotas.open(tmp_path / "m", Limits(releases=1))
    with pytest.raises(QuotaExceeded):
        quotas.require(open_envelope(envelope).owner, Quota.RELEASES, 1, int(time.time()))
    quotas.close()
