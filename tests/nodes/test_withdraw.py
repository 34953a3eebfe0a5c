"""Releases that were taken back: they leave every ranking, nobody else can take them back, and a market cannot forget that they were."""

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import store as stores
from market_node.identity import market_identity
from market_node.service import MarketService, streaming
from market_node.store import Store
from nodes import market_client
from nodes.learnwares import pull_learnware
from nodes.market_client import MarketClient, find_release_id
from nodes.query import find_encrypted, find_in_mirror
from protocol import notices
from protocol.errors import InvalidProof, InvalidSignature, NotFound, Unauthorised
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import AdapterReference, open_envelope
from protocol.scoring import sketch_of
from protocol.transparency import root_of_all
from protocol.wire import market_pb2 as pb
from tests.market_node.market import NOW, running_market
from tests.protocol.worlds import DIMENSION, adapter_bytes, envelope_of, features, small_map

MAP = small_map()
DATA = adapter_bytes()
ADAPTER = AdapterReference(hashlib.sha256(DATA).digest(), len(DATA))


class World:
    """A market with a release of each of two owners, under one adapter, and a client."""

    def __init__(self, client: MarketClient, store: Store) -> None:
        self.client, self.store = client, store
        self.keys = [Ed25519PrivateKey.generate() for _ in range(2)]
        self.releases = []
        for seed, key in enumerate(self.keys):
            client.publish(envelope := envelope_of(MAP, key, seed=seed, adapter=ADAPTER))
            self.releases.append(open_envelope(envelope))
        client.upload_adapter(ADAPTER, DATA)
        self.market_key = client.describe().market_key

    def withdrawal(self, number: int, signer: int | None = None) -> bytes:
        key = self.keys[number if signer is None else signer]
        owner, release_id = key.public_key().public_bytes_raw(), self.releases[number].release_id
        return sign_notice(Notice(Kind.WITHDRAWAL, self.market_key, owner, (release_id,)), key)


@pytest.fixture
def world(tmp_path, request):
    service = getattr(request, "param", MarketService)
    with running_market(tmp_path / "market", MAP, service_type=service) as (address, ca, store):
        with MarketClient(address, ca, tmp_path / "home") as client:
            made = World(client, store)
            made.address, made.ca = address, ca
            yield made


def ids_found(found) -> set[bytes]:
    return {match.release_id for match in found.ranking.matches}


def test_a_withdrawn_release_leaves_every_ranking_and_stays_in_the_log(world, tmp_path):
    sketch = sketch_of(features(40, 0, DIMENSION), MAP, 2)
    first, second = (release.release_id for release in world.releases)
    for find in (find_encrypted, find_in_mirror):
        assert ids_found(find(sketch, world.client, MAP)) == {first, second}
    before = world.client.sync(MAP).head
    assert world.client.submit(world.withdrawal(0)) == 0
    assert world.client.submit(world.withdrawal(0)) == 0  # again it changes nothing
    for find in (find_encrypted, find_in_mirror):
        assert ids_found(find(sketch, world.client, MAP)) == {second}
    catalogue = world.client.sync(MAP)
    assert catalogue.head == before
    assert world.client.mirror(MAP).refused == ()
    with pytest.raises(NotFound, match="taken back"):
        find_release_id(f"owner-0@{first.hex()[:8]}", catalogue)
    assert find_release_id(f"owner-0@{first.hex()[:8]}", catalogue, standing_alone=False) == first
    assert world.client.receipt(first, 0).index == 0
    with pytest.raises(NotFound, match="taken back"):
        pull_learnware("owner-0", world.client, tmp_path / "pulled", MAP)


def test_an_adapter_goes_with_the_last_release_that_names_it(world):
    world.client.submit(world.withdrawal(0))
    assert world.client.download_adapter(ADAPTER) == DATA
    world.client.submit(world.withdrawal(1))
    with pytest.raises(NotFound):
        world.client.download_adapter(ADAPTER)


def test_nobody_withdraws_a_release_of_somebody_else(world, monkeypatch):
    stolen = world.withdrawal(0, signer=1)
    with pytest.raises(Unauthorised, match="another owner"):
        world.client.submit(stolen)
    assert world.client.notices() == ()
    # Control: a market that does not compare the owners lets it happen.
    release_of = stores._release

    def careless(db, release_id):
        release = release_of(db, release_id)
        object.__setattr__(release, "owner", world.keys[1].public_key().public_bytes_raw())
        return release

    monkeypatch.setattr(stores, "_release", careless)
    world.client.submit(stolen)
    assert world.releases[0].release_id in world.client.sync(MAP).gone


def test_a_release_that_is_not_here_is_refused(world):
    key = world.keys[0]
    owner = key.public_key().public_bytes_raw()
    with pytest.raises(NotFound):
        world.client.submit(sign_notice(Notice(Kind.WITHDRAWAL, world.market_key, owner, (bytes(32),)), key))


class ForgetsNotices(MarketService):
    """Shows the list without its last entry, well signed and in every checkpoint, once it is told to."""

    forgetful = False

    def _checkpoint(self, head, logged):
        shown = self._notices()[0]
        return super()._checkpoint(head, replace(logged, notices=(len(shown), root_of_all(shown))))

    def _notices(self):
        entries = self._store.notices()
        entries = entries[:-1] if self.forgetful else entries
        return entries, self._signed_notices(entries)


@pytest.mark.parametrize("world", [ForgetsNotices], indirect=True)
def test_a_market_that_forgets_a_withdrawal_is_caught_by_whoever_saw_it(world, tmp_path, monkeypatch):
    world.client.submit(world.withdrawal(0))
    assert len(world.client.sync(MAP).gone) == 1
    monkeypatch.setattr(ForgetsNotices, "forgetful", True)
    with pytest.raises(InvalidProof, match="two histories"):
        world.client.sync(MAP)
    # Control: who never saw it, or keeps nothing, cannot know.
    with MarketClient(world.address, world.ca, tmp_path / "new") as stranger:
        assert stranger.sync(MAP).gone == frozenset()


class ExchangesNotices(ForgetsNotices):
    """Shows another withdrawal in the place of one that was seen."""

    def _notices(self):
        entries = self._store.notices()
        entries = [entries[1], entries[0]] if self.forgetful else entries[:1]
        return entries, self._signed_notices(entries)


@pytest.mark.parametrize("world", [ExchangesNotices], indirect=True)
def test_a_market_that_exchanges_notices_is_caught(world, monkeypatch):
    world.client.submit(world.withdrawal(0))
    assert len(world.client.sync(MAP).gone) == 1
    world.client.submit(world.withdrawal(1))
    monkeypatch.setattr(ExchangesNotices, "forgetful", True)
    with pytest.raises(InvalidProof, match="two histories"):
        world.client.sync(MAP)


class InventsNotices(MarketService):
    """Withdraws in an owner's name, with a signature of its own."""

    invented: bytes

    @streaming
    async def SyncNotices(self, request, context):
        del context
        yield pb.NoticesChunk(entries=[self.invented][request.from_index :], head=self._signed_notices([self.invented]))


@pytest.mark.parametrize("world", [InventsNotices], indirect=True)
def test_a_market_cannot_withdraw_in_an_owners_name(world, monkeypatch):
    owner, release = world.keys[0].public_key().public_bytes_raw(), world.releases[0].release_id
    body = Notice(Kind.WITHDRAWAL, world.market_key, owner, (release,))
    InventsNotices.invented = sign_notice(body, Ed25519PrivateKey.generate())
    with pytest.raises(InvalidSignature):
        world.client.sync(MAP)
    # Control: a client that does not verify believes it.
    monkeypatch.setattr(notices, "open_notice", lambda data, market_key: body)
    assert world.client.sync(MAP).gone == {release}


def test_a_revoked_owner_is_out_with_all_releases_and_stays_out(world):
    key = world.keys[0]
    owner = key.public_key().public_bytes_raw()
    second = envelope_of(MAP, key, number=2, seed=7)
    world.client.publish(second)
    market_key = market_identity(world.store.home, (), NOW, renew=False).market_key
    data = sign_notice(Notice(Kind.REVOCATION, world.market_key, owner, tuple(sorted(world.store.releases_of([owner])))), market_key)
    world.client.submit(data)
    assert world.client.sync(MAP).gone == {world.releases[0].release_id, open_envelope(second).release_id}
    with pytest.raises(Unauthorised):
        world.client.publish(envelope_of(MAP, key, number=3, seed=8))
    assert not world.client.describe(owner).may_publish


def test_a_kept_copy_that_was_damaged_is_fetched_again(world):
    world.client.submit(world.withdrawal(0))
    assert len(world.client.notices()) == 1
    path = world.client._folder(world.client.describe()) / "notices"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert len(world.client.notices()) == 1
    assert len(market_client._read_entries(path)) == 1


def revocation(world: World, *owners: bytes) -> bytes:
    market_key = market_identity(world.store.home, (), NOW, renew=False).market_key
    subjects = tuple(sorted(world.store.releases_of(owners)))
    return sign_notice(Notice(Kind.REVOCATION, world.market_key, owners[-1], subjects), market_key)


def rotation(world: World, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> bytes:
    keys = [key.public_key().public_bytes_raw() for key in (old, new)]
    return sign_notice(Notice(Kind.ROTATION, world.market_key, keys[0], (keys[1],)), old, new)


def test_after_a_rotation_the_old_key_is_worth_nothing_and_the_new_one_goes_on(world, monkeypatch):
    old, new, thief = world.keys[0], Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    assert world.client.submit(rotation(world, old, new)) == world.client.submit(rotation(world, old, new)) == 0
    with pytest.raises(Unauthorised):
        world.client.publish(envelope_of(MAP, old, number=2, seed=7))
    for noticed in (world.withdrawal(0), rotation(world, old, thief)):
        with pytest.raises(Unauthorised, match="rotated away"):
            world.client.submit(noticed)
    world.client.publish(envelope_of(MAP, new, number=2, seed=7))
    public = new.public_key().public_bytes_raw()
    taken = Notice(Kind.WITHDRAWAL, world.market_key, public, (world.releases[0].release_id,))
    world.client.submit(sign_notice(taken, new))  # a release under the old key is the new one's to take back
    assert world.releases[0].release_id in world.client.sync(MAP).gone
    assert len(world.client.mirror(MAP).releases) == 2
    # Control: a market that does not look at rotations takes what a thief of the old key sends.
    monkeypatch.setattr(Store, "may_own", lambda self, owner: True)
    world.client.publish(envelope_of(MAP, old, number=3, seed=8))


def test_nobody_rotates_to_a_key_that_is_known(world):
    with pytest.raises(Unauthorised, match="known"):
        world.client.submit(rotation(world, world.keys[0], world.keys[1]))


def test_a_revoked_owner_does_not_go_on_under_another_key(world, monkeypatch):
    key, new = world.keys[0], Ed25519PrivateKey.generate()
    world.client.submit(revocation(world, key.public_key().public_bytes_raw()))
    with pytest.raises(Unauthorised, match="revoked"):
        world.client.submit(rotation(world, key, new))
    # Control: without that look it would be back at once.
    monkeypatch.setattr(stores, "_is_revoked", lambda db, owner: False)
    world.client.submit(rotation(world, key, new))
    world.client.publish(envelope_of(MAP, new, number=2, seed=7))


def test_a_revocation_reaches_the_releases_under_earlier_keys(world):
    key, new = world.keys[0], Ed25519PrivateKey.generate()
    world.client.submit(rotation(world, key, new))
    world.client.publish(second := envelope_of(MAP, new, number=2, seed=7))
    line = world.store.line_of(new.public_key().public_bytes_raw())
    assert line == world.store.line_of(line[0])
    world.client.submit(revocation(world, *line))
    assert world.client.sync(MAP).gone == {world.releases[0].release_id, open_envelope(second).release_id}
    assert len(world.client.mirror(MAP).releases) == 1


class InventsOwners(InventsNotices):
    """Withdraws through an owner that it made up, who is not the release's."""


@pytest.mark.parametrize("world", [InventsOwners], indirect=True)
def test_a_market_that_lets_a_stranger_withdraw_is_caught_by_a_mirror(world, monkeypatch):
    stranger = Ed25519PrivateKey.generate()
    owner, release = stranger.public_key().public_bytes_raw(), world.releases[0].release_id
    InventsNotices.invented = sign_notice(Notice(Kind.WITHDRAWAL, world.market_key, owner, (release,)), stranger)
    with pytest.raises(InvalidProof, match="not its own"):
        world.client.mirror(MAP)
    # Control: a mirror that does not compare the owners lets it go.
    monkeypatch.setattr(market_client, "require_rightful", lambda *_: None)
    assert len(world.client.mirror(MAP).releases) == 1
