"""One who may publish makes a market of no use to others: lists that every client has to keep grow for ever, numbers that nobody has."""

import hashlib
import os
from dataclasses import replace

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import store as stores
from market_node.quotas import UNLIMITED, Limits
from market_node.store import Store
from nodes import market_client
from nodes.market_client import MarketClient
from protocol.channel import connect
from protocol.errors import FormatError, NotAdmitted, NotFound, QuotaExceeded, Unauthorised
from protocol.notices import Kind, Notice, open_notice, sign_notice
from protocol.release import Card, sign_release
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.nodes.test_withdraw import rotation, world  # noqa: F401 - the fixture
from tests.protocol.worlds import envelope_of, release_of, small_map

MAP = small_map()
ORDER = (1 << 252) + 27742317777372353535851937790883648493  # of Ed25519's base point


def clamped(seed: bytes) -> int:
    data = bytearray(hashlib.sha512(seed).digest()[:32])
    data[0] &= 248
    data[31] = data[31] & 63 | 64
    return int.from_bytes(data, "little")


def signed_anew(key: Ed25519PrivateKey, message: bytes) -> bytes:
    """Return a valid signature that is another each time: RFC 8032 with a nonce that is drawn."""
    nonce, public = os.urandom(32), key.public_key().public_bytes_raw()
    commitment = Ed25519PrivateKey.from_private_bytes(nonce).public_key().public_bytes_raw()
    challenge = int.from_bytes(hashlib.sha512(commitment + public + message).digest(), "little") % ORDER
    secret = clamped(key.private_bytes(serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()))
    return commitment + ((clamped(nonce) + challenge * secret) % ORDER).to_bytes(32, "little")


def test_a_release_is_taken_back_once_however_often_its_owner_signs_that(world, monkeypatch):  # noqa: F811
    body = open_notice(world.withdrawal(0), world.market_key).body
    again = [body + signed_anew(world.keys[0], body) for _ in range(3)]
    world.client.submit(again[0])
    with pytest.raises(NotFound, match="already"):
        world.client.submit(again[1])
    assert world.client.submit(again[0]) == 0, "the same bytes are the same notice"
    assert len(world.client.notices()) == 1
    looks = iter([False, True])
    monkeypatch.setattr(stores, "_is_gone", lambda db, release_id: next(looks))
    assert world.client.submit(again[2]) == 1  # the control: without that look the list grows with each signature


def rotations_until_refused(tmp_path, limits: Limits) -> int:
    """Return how often an owner goes on under a new key before its market has enough of it, at most 12."""
    key = Ed25519PrivateKey.generate()
    with running_market(tmp_path / "m", MAP, limits=limits) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.publish(envelope_of(MAP, key))
        market_key = client.market_key
        for count in range(12):
            new = Ed25519PrivateKey.generate()
            owner, successor = (one.public_key().public_bytes_raw() for one in (key, new))
            notice = sign_notice(Notice(Kind.ROTATION, market_key, owner, (successor,)), key, new)
            try:
                client.submit(notice)
            except QuotaExceeded:
                client.publish(envelope_of(MAP, Ed25519PrivateKey.generate()))  # others go on
                return count
            assert client.submit(notice) == count, "again it is the same, and costs nothing"
            key = new
    return 12


def test_an_owner_has_so_many_keys_a_day(tmp_path):
    assert rotations_until_refused(tmp_path / "a", Limits()) == Limits().rotations == 10
    assert rotations_until_refused(tmp_path / "b", UNLIMITED) == 12  # the control


def test_a_key_that_nobody_knows_is_followed_by_none(world, monkeypatch):  # noqa: F811
    strangers = [Ed25519PrivateKey.generate() for _ in range(2)]
    with pytest.raises(Unauthorised, match="nothing here"):
        world.client.submit(rotation(world, *strangers))
    assert world.client.notices() == ()
    monkeypatch.setattr(Store, "knows", lambda self, key: True)
    world.client.submit(rotation(world, *strangers))  # the control: keys cost nothing, and each would be a notice for ever


def licensed(number: int) -> bytes:
    key = Ed25519PrivateKey.generate()
    return sign_release(replace(release_of(MAP, key, seed=number), card=Card(f"owner-{number}", licence=f"licence {number}")), key)


def test_a_market_takes_no_more_terms_than_its_clients_do(tmp_path, monkeypatch):
    monkeypatch.setattr(market_client, "MAX_TERMS", 3)
    monkeypatch.setattr(stores, "MAX_TERMS", 3)
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        for number in range(3):
            client.publish(licensed(number))
        with pytest.raises(NotAdmitted, match="terms"):
            client.publish(licensed(3))
        client.publish(licensed(0))
        assert len(client.sync(MAP)) == 4
        monkeypatch.setattr(stores, "MAX_TERMS", 4)
        client.publish(licensed(4))  # the control: one more, and no client reads the catalogue any more
        with MarketClient(address, ca, tmp_path / "new") as newcomer, pytest.raises(FormatError, match="at most 3 terms"):
            newcomer.sync(MAP)


LARGEST, BEYOND_SQLITE = (1 << 64) - 1, (1 << 63) + 1
NUMBERS = {
    "the consistency of logs": lambda stub, n: stub.ProveConsistency(pb.ConsistencyRequest(first=n, second=n), timeout=30),
    "inclusion": lambda stub, n: stub.ProveInclusion(pb.InclusionRequest(index=n - 1, size=n), timeout=30),
    "organisations": lambda stub, n: list(stub.GetOrganisations(pb.OrganisationsRequest(catalogue_size=n), timeout=30)),
    "cards": lambda stub, n: list(stub.GetCards(pb.CardsRequest(catalogue_size=n, from_index=n), timeout=30)),
    "cards from there": lambda stub, n: list(stub.GetCards(pb.CardsRequest(catalogue_size=1, pages=[0], from_index=n), timeout=30)),
    "pages": lambda stub, n: list(stub.GetCards(pb.CardsRequest(catalogue_size=1, pages=[(1 << 32) - 1]), timeout=30)),
    "rows": lambda stub, n: list(
        stub.SyncCatalogue(pb.SyncRequest(from_index=n, from_terms=(1 << 32) - 1, form=pb.CATALOGUE_FORM_ROWS), timeout=30)
    ),
    "envelopes": lambda stub, n: list(stub.SyncCatalogue(pb.SyncRequest(from_index=n), timeout=30)),
    "notices": lambda stub, n: list(stub.SyncNotices(pb.NoticesRequest(from_index=n), timeout=30)),
    "an adapter": lambda stub, n: stub.UploadAdapter(iter([pb.AdapterChunk(digest=bytes(32), size_bytes=n)]), timeout=30),
}


def incidents(tmp_path) -> list[str]:
    """Return which calls with numbers that nobody has end as an error of the market's own."""
    found = []
    with running_market(tmp_path, MAP) as (address, ca, _), connect(address, ca) as channel:
        stub = MarketStub(channel)
        stub.Publish(pb.PublishRequest(envelope=envelope_of(MAP, Ed25519PrivateKey.generate())), timeout=30)
        for (name, call), number in [(one, n) for one in NUMBERS.items() for n in (LARGEST, BEYOND_SQLITE)]:
            try:
                call(stub, number)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.INTERNAL:
                    found.append(name)
    return found


def test_numbers_that_nobody_has_are_refused_as_such(tmp_path, monkeypatch):
    assert incidents(tmp_path / "a") == []

    def asks_first(self, size):
        with self._engine.connect() as db:
            return stores._head(db, size)

    monkeypatch.setattr(Store, "head_at", asks_first)
    assert incidents(tmp_path / "b") == ["organisations"] * 2  # the control: a market that asks its database first
