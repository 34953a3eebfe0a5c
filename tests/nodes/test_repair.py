"""A ledger that was restored from an older copy, against a real market on loopback: noticed, refused, repaired."""

import json
import shutil
import sqlite3
import time
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.base_model import BaseModel
from nodes.guard import Order, Policy
from nodes.ledger import Budget, Ledger, Origin, restore
from nodes.market_client import MarketClient
from protocol.errors import AlreadyPublished, LedgerBehind, PopulationConflict, UsageError
from protocol.features import default_map
from protocol.privacy import Guarantee, PrivacyUnit
from protocol.release import open_envelope
from protocol.window import DAY_S
from tests.market_node.market import running_market
from tests.nodes.owners import make_guard, tiny_map, write_records
from tests.nodes.test_command import veilmart
from tests.nodes.test_guard import forbidden_noise
from tests.protocol.worlds import envelope_of

ONE = Order(Guarantee(1.0, 1e-6))
POLICY = Policy(budget=Budget(8.0, 1e-6))


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


class Owner:
    """An owner with a data file that grows, a home, and a connection to the market."""

    def __init__(self, tmp_path, model, client, name="home"):
        self.home, self.data, self.model, self.client = tmp_path / name, tmp_path / "notes.jsonl", model, client
        self.map = tiny_map(model)

    def guard(self, noise=None, days_ago: int = 0):
        now = time.time() - days_ago * DAY_S
        return make_guard(self.home, self.data, self.model, noise, policy=POLICY, now=lambda: now)

    def publish(self, count: int, noise=None, days_ago: int = 0) -> bytes:
        """As `veilmart node publish` does: compare, then draw, then send."""
        write_records(self.data, count)
        guard = self.guard(noise, days_ago)
        guard.require_current(self.client.releases_of(guard.owners, self.map))
        envelope = guard.release(ONE)
        self.client.publish(envelope)
        return envelope

    @property
    def ledger_file(self):
        return self.home / "ledger.db"


@pytest.fixture
def owner(tmp_path, model):
    feature_map = tiny_map(model)
    with running_market(tmp_path / "m", feature_map) as (address, ca, _), MarketClient(address, ca, tmp_path / "client") as client:
        # Somebody else is at the market too, and is never taken for this owner.
        client.publish(envelope_of(feature_map, Ed25519PrivateKey.generate(), seed=5))
        yield Owner(tmp_path, model, client)


def test_an_older_copy_of_the_ledger_is_noticed_and_nothing_is_drawn_until_it_is_repaired(owner):
    owner.publish(150)
    old = owner.ledger_file.read_bytes()
    published = [owner.publish(151), owner.publish(152)]
    spent = owner.guard().price(ONE.guarantee).spent
    owner.ledger_file.write_bytes(old)  # somebody restores last month's disk

    with pytest.raises(LedgerBehind, match="2 releases"):
        owner.publish(153, forbidden_noise())
    assert owner.guard().price(ONE.guarantee).spent < spent
    with pytest.raises(LedgerBehind):  # nor without asking the market first, and not after a restart
        owner.guard(forbidden_noise()).release(ONE)

    ledger = Ledger.open(owner.ledger_file, POLICY.budget)
    envelopes = owner.client.releases_of(owner.guard().owners, owner.map)
    assert ledger.absorb(envelopes) == 2
    assert ledger.absorb(envelopes) == 0
    assert [entry.origin for entry in ledger.entries()] == [Origin.DRAWN, Origin.MARKET, Origin.MARKET]
    assert ledger.entries()[2].envelope == published[1] == ledger.latest()
    assert owner.guard().price(ONE.guarantee).spent == pytest.approx(spent, rel=1e-9)
    release = open_envelope(owner.publish(153))
    assert (release.release_number, release.previous) == (4, open_envelope(published[1]).release_id)


def test_without_the_comparison_the_older_copy_would_draw_again(owner):
    """The control: the noise is drawn and reaches the market, which can only say afterwards that the number is taken."""
    owner.publish(150)
    old = owner.ledger_file.read_bytes()
    owner.publish(151)
    owner.ledger_file.write_bytes(old)
    write_records(owner.data, 152)
    envelope = owner.guard().release(ONE)
    with pytest.raises(AlreadyPublished):
        owner.client.publish(envelope)


def test_a_ledger_that_is_current_is_not_refused(owner):
    owner.publish(150)
    assert owner.publish(150) == owner.publish(150), "the stored bytes, as often as one likes"
    write_records(owner.data, 151)
    unsent = owner.guard().release(ONE)  # charged but never sent: the ledger may know more than the market
    owner.publish(151)
    assert owner.guard().collect() == unsent


@pytest.fixture
def renewed(owner):
    """The ledger from before a release was renewed in the last third of its days, and what was spent: the market has the renewal."""
    first = owner.publish(150, days_ago=300)
    old, spent = owner.ledger_file.read_bytes(), owner.guard().price(ONE.guarantee).spent
    second = owner.publish(150, forbidden_noise())
    assert open_envelope(second).release_number == 2
    owner.ledger_file.write_bytes(old)
    with pytest.raises(LedgerBehind):
        owner.publish(150, forbidden_noise())
    return owner, [first, second], spent


@pytest.mark.parametrize("lost", [False, True], ids=["the renewal is missing", "everything is missing"])
def test_a_renewal_that_was_lost_costs_nothing_when_it_is_repaired(renewed, lost):
    owner, published, spent = renewed
    if lost:
        owner.ledger_file.unlink()
    ledger = Ledger.open(owner.ledger_file, POLICY.budget)
    assert ledger.absorb(owner.client.releases_of(owner.guard().owners, owner.map)) == 1 + lost
    assert [entry.envelope for entry in ledger.entries()] == published
    assert owner.guard().price(ONE.guarantee).spent == pytest.approx(spent, rel=1e-9)
    if not lost:  # and the owner goes on with what the market has, and signs no third
        assert owner.publish(150, forbidden_noise()) == published[1]


def test_a_ledger_that_knows_no_renewal_would_charge_one_twice(renewed, monkeypatch):
    """Control."""
    owner, _, spent = renewed
    monkeypatch.setattr("nodes.ledger._given_away", lambda release: release.release_id)
    Ledger.open(owner.ledger_file, POLICY.budget).absorb(owner.client.releases_of(owner.guard().owners, owner.map))
    assert owner.guard().price(ONE.guarantee).spent > 1.3 * spent


def test_a_clone_of_the_node_is_noticed(owner, tmp_path, model):
    owner.publish(150)
    clone = Owner(tmp_path, model, owner.client, "clone")
    clone.home.mkdir(mode=0o700)
    for name in ("ledger.db", "owner.key", "claims.db"):
        (clone.home / name).write_bytes((owner.home / name).read_bytes())
        (clone.home / name).chmod(0o600)
    owner.publish(151)
    with pytest.raises(LedgerBehind):
        clone.publish(152, forbidden_noise())


def test_a_release_drawn_from_the_old_copy_stays_charged_beside_the_markets(owner):
    owner.publish(150)
    old = owner.ledger_file.read_bytes()
    newer = owner.publish(151)
    owner.ledger_file.write_bytes(old)
    write_records(owner.data, 152)
    orphan = owner.guard().release(ONE)  # drawn before anybody compared
    ledger = Ledger.open(owner.ledger_file, POLICY.budget)
    ledger.absorb(owner.client.releases_of(owner.guard().owners, owner.map))
    assert [entry.envelope for entry in ledger.entries()[1:]] == [orphan, newer], "both numbers 2, both paid"
    assert ledger.latest() == newer
    assert open_envelope(owner.publish(153)).release_number == 3


def test_a_lost_ledger_is_rebuilt_from_the_market(owner):
    published = [owner.publish(150), owner.publish(151)]
    spent = owner.guard().price(ONE.guarantee).spent
    owner.ledger_file.unlink()
    with pytest.raises(LedgerBehind):
        owner.publish(152, forbidden_noise())
    ledger = Ledger.open(owner.ledger_file, POLICY.budget)
    assert ledger.absorb(owner.client.releases_of(owner.guard().owners, owner.map)) == 2
    assert [entry.envelope for entry in ledger.entries()] == published
    assert owner.guard().price(ONE.guarantee).spent == pytest.approx(spent)


@pytest.mark.parametrize("key", [None, bytes(32)], ids=["no key", "another key"])
def test_a_restored_ledger_draws_nothing_under_another_key(owner, tmp_path, key):
    owner.publish(150)
    Ledger.open(owner.ledger_file, POLICY.budget).backup(tmp_path / "backup")
    right = (owner.home / "owner.key").read_bytes()
    owner.publish(151)
    shutil.rmtree(owner.home)  # the disk is lost, and with it the key
    restore(tmp_path / "backup", owner.ledger_file, "default")
    place = owner.home / "owner.key"
    if key is not None:
        place.write_bytes(key)
        place.chmod(0o600)
    with pytest.raises(UsageError, match=r"owner\.key"):
        owner.publish(152, forbidden_noise())
    assert place.exists() == (key is not None), "no key is made beside releases of another"
    place.write_bytes(right)
    place.chmod(0o600)
    with pytest.raises(LedgerBehind):  # and with the right one, the comparison sees what is missing
        owner.publish(152, forbidden_noise())


def test_a_ledger_of_another_unit_absorbs_nothing(owner):
    owner.publish(150)
    ledger = Ledger.open(owner.home / "other.db", POLICY.budget, unit=PrivacyUnit("person"))
    with pytest.raises(PopulationConflict, match="unit"):
        ledger.absorb(owner.client.releases_of(owner.guard().owners, owner.map))
    assert ledger.entries() == []


def test_a_ledger_that_is_being_rebuilt_draws_nothing_until_it_absorbed(owner):
    envelope = owner.publish(150)
    owner.ledger_file.unlink()
    ledger = Ledger.open(owner.ledger_file, POLICY.budget, behind=True)  # and here the process dies
    write_records(owner.data, 151)
    with pytest.raises(LedgerBehind):
        owner.guard(forbidden_noise()).release(ONE)
    assert ledger.absorb([envelope]) == 1
    assert owner.guard().release(ONE) != envelope


def test_two_repairs_at_once_charge_a_release_once(owner):
    envelope = owner.publish(150)
    path = owner.home / "rebuilt.db"
    first, second = (Ledger.open(path, POLICY.budget) for _ in range(2))
    charged, transaction = [], first._transaction

    @contextmanager
    def another_comes_right_after():
        with transaction() as db:
            yield db
        charged.append(second.absorb([envelope]))

    first._transaction = another_comes_right_after
    charged.append(first.absorb([envelope]))
    assert sorted(charged) == [0, 1]


# The same by the command line -------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """A home whose owner published three releases of the shipped map, and the market that holds them."""
    key, feature_map = Ed25519PrivateKey.generate(), default_map()
    envelopes = [envelope_of(feature_map, key, number=number, seed=number) for number in (1, 2, 3)]
    with running_market(tmp_path / "m", feature_map) as (address, ca, _), MarketClient(address, ca, tmp_path / "client") as client:
        for envelope in envelopes:
            client.publish(envelope)
        folder = tmp_path / "home" / "node"
        folder.mkdir(parents=True)
        (folder / "owner.key").write_bytes(key.private_bytes_raw())
        (folder / "owner.key").chmod(0o600)
        Ledger.open(folder / "ledger.db", Budget(4.0, 1e-6)).absorb(envelopes[:1])
        yield tmp_path / "home", ("--market", address, "--ca", str(ca))


def said(home, *words: str, code: int = 0) -> dict:
    done = veilmart("node", *words, "--json", home=home)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_the_commands_show_back_up_restore_and_repair_a_ledger(home, tmp_path):
    where, market = home
    shown = said(where, "ledger")
    assert (shown["chain"], shown["population"], shown["unit"], len(shown["entries"])) == ("verified", "default", "record", 1)
    assert shown["spent"] == pytest.approx(1.0, abs=1e-3)
    assert shown["left"] == pytest.approx(3.0, abs=1e-3)
    copy, key = tmp_path / "ledger.backup", tmp_path / "owner.key.backup"
    assert said(where, "backup", str(copy), "--key", str(key))["entries"] == 1
    assert (copy.stat().st_mode | key.stat().st_mode) & 0o077 == 0
    assert key.read_bytes() == (where / "node" / "owner.key").read_bytes()
    (where / "node" / "ledger.db").unlink()
    assert said(where, "restore", str(copy)) == {"schema": "veilmart.restore/1", "entries": 1, "compared": False}
    assert said(where, "ledger")["compared"] is False
    assert said(where, "repair", *market)["charged_again"] == 2
    after = said(where, "ledger")
    assert (after["compared"], [entry["origin"] for entry in after["entries"]]) == (True, ["market"] * 3)
    assert veilmart("node", "ledger", home=where).stdout.count("verified") == 1


def test_a_damaged_ledger_is_told_by_its_exit_code_and_rebuilt_on_request(home):
    where, market = home
    with sqlite3.connect(where / "node" / "ledger.db") as db:
        db.execute("UPDATE entry SET delta = '0.01'")
    db.close()
    assert said(where, "ledger", code=7)["error"]["code"] == "ledger.damaged"
    assert said(where, "repair", *market, code=7)["error"]["code"] == "ledger.damaged"
    rebuilt = said(where, "repair", *market, "--rebuild")
    assert (rebuilt["entries"], rebuilt["charged_again"]) == (3, 3)
    assert rebuilt["set_aside"]
    assert said(where, "repair", *market, "--rebuild", code=2)["error"]["code"] == "usage"


@pytest.mark.parametrize("asked", [(), ("--unit", "person")], ids=["unit of the releases", "unit asked for"])
def test_a_rebuilt_ledger_takes_its_unit_from_the_releases(tmp_path, asked):
    key, feature_map = Ed25519PrivateKey.generate(), default_map()
    person = Guarantee(1.0, 1e-6, unit=PrivacyUnit("person"))
    envelopes = [envelope_of(feature_map, key, number=number, seed=number, guarantee=person) for number in (1, 2)]
    with running_market(tmp_path / "m", feature_map) as (address, ca, _), MarketClient(address, ca, tmp_path / "client") as client:
        for envelope in envelopes:
            client.publish(envelope)
        node = tmp_path / "home" / "node"
        node.mkdir(parents=True)
        (node / "owner.key").write_bytes(key.private_bytes_raw())
        (node / "owner.key").chmod(0o600)
        (node / "ledger.db").write_bytes(b"damaged" * 1000)
        market = ("--market", address, "--ca", str(ca))
        wrong = said(tmp_path / "home", "repair", *market, "--rebuild", "--unit", "patient", code=2)
        assert "person" in wrong["error"]["message"]
        assert (node / "ledger.db").read_bytes() == b"damaged" * 1000, "what fails leaves the ledger where it is"
        assert said(tmp_path / "home", "repair", *market, "--rebuild", *asked)["charged_again"] == 2
        assert said(tmp_path / "home", "ledger")["unit"] == "field:person"


def test_repair_never_makes_a_key(home, tmp_path):
    _, market = home
    assert "signing key" in said(tmp_path / "fresh", "repair", *market, code=2)["error"]["message"]
    assert not (tmp_path / "fresh" / "node" / "owner.key").exists()


def test_a_home_without_a_ledger_says_so(tmp_path):
    assert said(tmp_path / "fresh", "ledger", code=3)["error"]["code"] == "not-found"
    assert said(tmp_path / "fresh", "ledger", "--population", "../x", code=2)["error"]["code"] == "usage"
