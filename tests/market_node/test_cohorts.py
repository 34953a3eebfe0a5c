"""A cohort's round as a Flower campaign: the real ServerApp and ClientApp, guards' rounds over real ledgers, a real market."""

import json
import random
import time

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from market_node.campaigns import Asked, Campaign, CohortPlan, Plan
from market_node.flower import server
from market_node.members import Members
from nodes import guard as guards
from nodes.cohort import CohortRules, Rounds
from nodes.flower import client
from nodes.ledger import Budget, Ledger, Origin
from nodes.market_client import MarketClient
from protocol import cohort_round
from protocol.errors import CohortAborted, Unauthorised
from protocol.hazmat.noise import NoiseSource, operating_system
from protocol.processes import free_port
from protocol.release import open_envelope
from protocol.specification import quantise
from protocol.window import ALWAYS
from tests.market_node.market import running_market
from tests.market_node.test_campaigns import KeyedGrid, key
from tests.protocol.cohorts import owners, public
from tests.protocol.worlds import features, small_map

MAP = small_map()
BASE = bytes.fromhex(MAP.base_model)
KEYS = owners(5)
SEED = 11  # of the noise in the test that looks for it


class Owner:
    """A guard's part in rounds, with vectors in the place of records and model."""

    def __init__(self, folder, owner_key, noise=None, lost="") -> None:
        self.ledger = Ledger.open(folder / public(owner_key).hex()[:8] / "ledger.db", Budget(4.0, 1e-6))
        self.vectors, self.lost, self.asked = quantise(features(30, public(owner_key)[0])), lost, []
        rules = CohortRules("joint", frozenset(map(public, KEYS)))
        serves = MAP.map_id, BASE, MAP.dimension
        self.rounds = Rounds(
            rules,
            owner_key,
            self.ledger,
            noise or operating_system(),
            serves,
            lambda cohort: None,
            lambda minimum: self.vectors,
            lambda: ALWAYS,
        )

    def request(self, order):
        raise AssertionError("a cohort asks for nothing else")

    def collect(self):
        raise AssertionError("a cohort asks for nothing else")

    def take_part(self, ask: bytes) -> bytes:
        self.asked.append(ask)
        if self.lost and cohort_round.Ask.from_bytes(ask).step == self.lost:
            raise CohortAborted("this guard takes no further part")
        return self.rounds.answer(ask)


class Recording(KeyedGrid):
    """A SuperLink that writes down every byte of every message."""

    seen: list[bytes]

    def _deliver(self, message):
        reply = super()._deliver(message)
        for one in (message, reply):
            records = one.content.values() if one.has_content() else ()
            self.seen += [value for record in records for value in record.values() if isinstance(value, bytes)]
        return reply


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "market", MAP) as made:
        yield made


def planned(tmp_path, address, ca, *, timeout_s=120.0, dropouts=1, colluders=1, simulated=False) -> Campaign:
    nodes = tuple(Asked(key(place), f"n{place}", public(owner).hex()) for place, owner in enumerate(KEYS))
    together = CohortPlan("joint", MAP.map_id.hex(), BASE.hex(), MAP.dimension, dropouts, colluders, simulated)
    return Campaign.create(tmp_path / "campaigns", Plan(address, str(ca), "1.0", "1e-06", timeout_s, nodes, cohort=together))


def run(campaign: Campaign, there, down=()) -> tuple[dict, list[bytes]]:
    names = [f"cohort-{place}" for place in range(len(there))]
    for name, owner in zip(names, there, strict=True):
        guards.serve_in_process(name, owner)
    grid = Recording(client, [{"guard": f"local:{name}"} for name in names], workers=8)
    grid.down, grid.seen = frozenset(down), []
    try:
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={"folder": str(campaign.folder)}))
    finally:
        grid.close()
    return campaign.account(), grid.seen


def counts(account: dict) -> dict:
    return {outcome: count for outcome, count in account["counts"].items() if count}


def test_a_campaign_brings_one_release_that_all_signed(tmp_path, market):
    address, ca, store = market
    there = [Owner(tmp_path, owner) for owner in KEYS]
    account, _ = run(planned(tmp_path, address, ca), there)
    assert counts(account) == {"published": 1, "joined": 4}
    (envelope,) = store.envelopes(0, 9)
    release = open_envelope(envelope)
    assert release.signers == tuple(map(public, KEYS))
    assert {node["release_id"] for node in account["nodes"]} == {release.release_id.hex()}
    assert [[entry.origin for entry in owner.ledger.entries()].count(Origin.COHORT) for owner in there] == [1] * 5
    with MarketClient(address, ca, tmp_path / "asking") as asking:  # each of them is reminded of it, whoever published
        assert all(asking.releases_of([public(owner)], MAP) == [envelope] for owner in KEYS)
    plan = json.loads((tmp_path / "campaigns" / account["campaign"] / "plan.json").read_text())
    assert plan["cohort"]["name"] == account["cohort"] == "joint"


def test_a_node_that_is_lost_before_its_numbers_are_there_is_missing_and_uncharged(tmp_path, market):
    address, ca, store = market
    there = [Owner(tmp_path, owner, lost="mask" if place == 2 else "") for place, owner in enumerate(KEYS)]
    account, _ = run(planned(tmp_path, address, ca), there)
    assert counts(account) == {"published": 1, "joined": 3, "missing": 1}
    assert public(KEYS[2]) not in open_envelope(store.envelopes(0, 9)[0]).signers
    assert there[2].ledger.entries() == []


def test_too_few_connected_nodes_begin_nothing(tmp_path, market):
    address, ca, store = market
    there = [Owner(tmp_path, owner) for owner in KEYS]
    account, _ = run(planned(tmp_path, address, ca), there, down=(0, 1))
    assert counts(account) == {"failed": 3, "missing": 2}
    assert "cohort: expected" in {node["reason"][:16] for node in account["nodes"]}
    assert [owner.asked for owner in there] == [[]] * 5
    assert store.head().size == 0


@pytest.mark.slow  # nine seconds, of which eight are the campaign's patience with a market that is down
def test_what_was_kept_is_published_later_without_another_round(tmp_path, market):
    address, ca, store = market
    nobody = f"127.0.0.1:{free_port()}"
    there = [Owner(tmp_path, owner) for owner in KEYS]
    campaign = planned(tmp_path, nobody, ca, timeout_s=8.0)
    plan = campaign.folder / "plan.json"
    plan.write_text(plan.read_text().replace('"market_key": ""', f'"market_key": "{"ab" * 32}"'))
    account, _ = run(Campaign.open(campaign.folder), there)
    assert counts(account) == {"kept": 1, "joined": 4}
    asked = [len(owner.asked) for owner in there]
    text = plan.read_text().replace(nobody, address).replace("ab" * 32, "").replace('"timeout_s": 8.0', '"timeout_s": 120.0')
    plan.write_text(text)
    account, _ = run(Campaign.open(campaign.folder), there)
    assert counts(account) == {"published": 1, "joined": 4}
    assert [len(owner.asked) for owner in there] == asked
    assert store.head().size == 1


def numbers_on_the_wire(seen: list[bytes], there: list[Owner]) -> list[bytes]:
    """Return what of the members' noisy sums, or of their exact ones, went over the wire: any two numbers that lie together."""
    found = []
    for place, owner in enumerate(there):
        exact = owner.vectors.rows.sum(axis=0)
        noise = seeded(place)
        drawn = cohort_round.contribution(owner.vectors, cohort_like(), noise)
        for numbers in (exact, np.array(drawn)):
            data = numbers.astype("<i4").tobytes()
            found += [data[at : at + 8] for at in range(0, len(data) - 8, 4) if any(data[at : at + 8] in message for message in seen)]
    return found


def cohort_like() -> cohort_round.Cohort:
    plan = CohortPlan("joint", MAP.map_id.hex(), BASE.hex(), MAP.dimension, 1, 1, True)
    return plan.cohort(bytes(32), "1.0", "1e-06", list(map(public, KEYS)))


def seeded(place: int) -> NoiseSource:
    return NoiseSource(random.Random(SEED + place).randbytes, simulated=True)


def recorded(tmp_path) -> list[bytes]:
    """Run a campaign whose members' noise is known here; return what is on the wire of it and should not be."""
    with running_market(tmp_path / "simulated", MAP, simulation=True) as (address, ca, _):
        there = [Owner(tmp_path, owner, noise=seeded(place)) for place, owner in enumerate(KEYS)]
        account, seen = run(planned(tmp_path, address, ca, simulated=True), there)
        assert counts(account) == {"published": 1, "joined": 4}
        assert len(seen) > 60
        return numbers_on_the_wire(seen, there)


def test_no_number_of_a_member_goes_over_the_wire(tmp_path):
    assert recorded(tmp_path) == []


def test_control_numbers_without_masks_are_found_on_the_wire(tmp_path, monkeypatch):
    monkeypatch.setattr(cohort_round, "stream", lambda key, count: np.zeros(count, np.uint32))
    assert len(recorded(tmp_path)) == 5 * (MAP.dimension - 1)


def test_a_market_of_members_takes_a_cohort_of_members_alone(tmp_path):
    home = tmp_path / "market"
    with running_market(home, MAP, enrolled_only=True) as (address, ca, store):
        members = Members.open(home)
        for owner in KEYS[:4]:
            members.enrol(members.invite("City", int(time.time()) + 60), public(owner), "", int(time.time()))
        account, _ = run(planned(tmp_path, address, ca), [Owner(tmp_path / "a", owner) for owner in KEYS])
        assert account["counts"]["refused"] == 1
        assert Unauthorised.code in {node["reason"] for node in account["nodes"]}
        assert store.head().size == 0
        # The control: with the fifth a member too, the same is taken.
        members.enrol(members.invite("City", int(time.time()) + 60), public(KEYS[4]), "", int(time.time()))
        account, _ = run(planned(tmp_path / "b", address, ca), [Owner(tmp_path / "b", owner) for owner in KEYS])
        assert counts(account) == {"published": 1, "joined": 4}
        members.close()
