"""One organisation with fifty keys, all of them invited, and a specification for each that comes first."""

import time
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.directory import Directory
from market_node.members import Members
from market_node.service import MarketService
from nodes.market_client import MarketClient
from nodes.places import places
from nodes.query import Filters, find_encrypted, find_in_mirror
from protocol.errors import FormatError, InvalidSignature, UsageError
from protocol.organisations import Organisations
from protocol.release import Card, sign_release
from protocol.scoring import sketch_of
from protocol.wire import market_pb2 as pb
from tests.market_node.market import running_market
from tests.protocol.worlds import features, release_of, small_map

MAP, SEED, LATER = small_map(), 3, int(time.time()) + 1000
SKETCH = sketch_of(features(40, SEED), MAP, 2)
FLOOD, HONEST, TOP = 50, ("City", "Village", "Town", "County"), 5


def enrol(members: Members, organisation: str) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    members.enrol(members.invite(organisation, LATER), key.public_key().public_bytes_raw(), "", 1)
    return key


def publish(client: MarketClient, key: Ed25519PrivateKey, name: str, count: int) -> None:
    """Publish what many records of the task really give: nothing about it is false but the number of those who hold them."""
    client.publish(sign_release(replace(release_of(MAP, key, seed=SEED, count=count), card=Card(name)), key))


@pytest.fixture(scope="module")
def flooded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flooded")
    members = Members.open(folder / "m")
    with running_market(folder / "m", MAP, enrolled_only=True) as (address, ca, _), MarketClient(address, ca, folder / "q") as client:
        for number in range(FLOOD):
            publish(client, enrol(members, "Flood Ltd"), f"flood-{number}", 9_000)
        for name in HONEST:
            publish(client, enrol(members, name), name.lower(), 400)
        yield client
    members.close()


FINDS = {"encrypted": find_encrypted, "mirror": find_in_mirror}


def names_of(found, given) -> list[str]:
    return [found.title_of(match).split("-")[0].split("@")[0] for match in given.matches]


@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS)
def test_fifty_keys_of_one_organisation_have_two_places(flooded, find):
    found = find(SKETCH, flooded, MAP)
    given = places(found, TOP)
    assert names_of(found, given).count("flood") == 2
    assert len(given.matches) == TOP
    assert set(given.folded) == {"Flood Ltd"}
    assert given.matches[0] == found.ranking.matches[0]


@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS)
def test_without_the_cap_they_have_all_of_them(flooded, find):
    """Control."""
    found = find(SKETCH, flooded, MAP)
    given = places(found, TOP, 0)
    assert names_of(found, given) == ["flood"] * TOP
    assert given.folded == {}


def test_a_filter_leaves_every_release_its_organisation(flooded):
    found = find_in_mirror(SKETCH, flooded, MAP, Filters(largest_epsilon=1.0))
    for match in found.ranking.matches:
        expected = "Flood Ltd" if found.title_of(match).startswith("flood") else found.title_of(match).split("@")[0].capitalize()
        assert found.organisations[found.owner_of(match)] == expected


def test_an_owner_that_nobody_invited_is_an_organisation_of_its_own(tmp_path):
    """At an open market the cap is on keys, and anybody has many: docs/sharp-edges.md."""
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "q") as client:
        one = Ed25519PrivateKey.generate()
        for number in range(1, 5):
            release = release_of(MAP, one, number=number, seed=SEED, count=9_000)
            client.publish(sign_release(replace(release, card=Card(f"one-{number}")), one))
        publish(client, Ed25519PrivateKey.generate(), "two", 400)
        found = find_encrypted(SKETCH, client, MAP)
        assert names_of(found, given := places(found, TOP)) == ["one", "one", "two"]
        assert given.folded == {"": 2}


def test_an_organisation_stays_one_through_rotation_and_removal(tmp_path):
    from market_node.store import Store
    from protocol.catalogue import scalars_of

    store, members = Store.open(tmp_path), Members.open(tmp_path)
    store.require_map(MAP)
    directory = Directory(store, members)
    keys = [enrol(members, name) for name in ("City", "Village", "City")]
    for key in keys:
        release = release_of(MAP, key)
        store.append(release, sign_release(release, key), scalars_of(release, MAP))
    assert directory.at(3).numbers.tolist() == [0, 1, 0]
    successor = Ed25519PrivateKey.generate()
    members.rotate(keys[1].public_key().public_bytes_raw(), successor.public_key().public_bytes_raw(), 5)
    members.remove(keys[0].public_key().public_bytes_raw().hex(), 6)
    release = release_of(MAP, successor, seed=8)
    store.append(release, sign_release(release, successor), scalars_of(release, MAP))
    assert (directory.at(4).numbers.tolist(), directory.at(4).names) == ([0, 1, 0, 1], ("City", "Village"))
    assert directory.at(1).names == ("City",)
    members.close()
    store.close()


class Splits(MarketService):
    """A market that gives every owner a name of its own, after it signed."""

    def _organisations(self, size):
        said, signature = super()._organisations(size)
        return Organisations(said.numbers, tuple(f"Org {i}" for i in range(len(said.names)))), signature


class SaysTooMuch(MarketService):
    async def GetOrganisations(self, request, context):
        while True:
            yield pb.OrganisationsChunk(numbers=bytes(60_000))


@pytest.mark.parametrize(("service", "error"), [(Splits, InvalidSignature), (SaysTooMuch, FormatError)])
@pytest.mark.parametrize("find", FINDS.values(), ids=FINDS)
def test_what_the_market_did_not_sign_is_not_believed(tmp_path, service, error, find):
    market = running_market(tmp_path / "m", MAP, service_type=service)
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "q") as client:
        publish(client, Ed25519PrivateKey.generate(), "one", 400)
        with pytest.raises(error, match="organisations"):
            find(SKETCH, client, MAP)


def test_an_operator_who_hands_out_many_invites_by_mistake_is_stopped(tmp_path):
    members = Members.open(tmp_path)
    for _ in range(2):
        enrol(members, "City")
    secret = members.invite("City", LATER, 4, 5)
    members.invite("City", LATER, 4, 5)
    with pytest.raises(UsageError, match="City has 4 members and open invites"):
        members.invite("City", LATER, 4, 5)
    members.invite("Village", LATER, 4, 5)  # another organisation's count is its own
    members.enrol(secret, bytes(32), "", 6)
    with pytest.raises(UsageError):
        members.invite("City", LATER, 4, 6)
    members.remove(bytes(32).hex(), 7)
    members.invite("City", LATER, 4, 8)
    members.invite("City", LATER, 4, LATER + 1)  # what nobody used is over
    members.invite("City", LATER)  # control: without a limit nothing is counted
    members.close()
