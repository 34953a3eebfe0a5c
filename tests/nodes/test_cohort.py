"""Guards in cohorts: what a policy joins, what is charged when, and that no SuperLink makes a guard spend twice."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from market_node.cohort import convene
from nodes import cohort as cohorts
from nodes.base_model import BaseModel
from nodes.cohort import CohortRules
from nodes.guard import Guard, Order, Policy
from nodes.ledger import Budget, Ledger, Origin, cohort_request
from protocol.cohort_round import Ask, Cohort, Step
from protocol.errors import (
    CampaignFailed,
    CohortAborted,
    IncompatibleSpecification,
    LedgerBehind,
    Unauthorised,
    UsageError,
    VeilmartError,
)
from protocol.keys import signing_key
from protocol.privacy import Guarantee, PrivacyUnit
from protocol.release import open_envelope
from tests.nodes.owners import DIMENSION, make_guard, tiny_map, write_records

ONE = Guarantee(1.0, 1e-6)
COUNT = 5


@dataclass
class World:
    """Five owners who named each other in their policies, and a SuperLink that is a function."""

    folder: Path
    model: BaseModel
    policy: Policy = field(default_factory=Policy)
    rounds: int = 1
    asked: list[tuple[Step, bytes]] = field(default_factory=list)

    def __post_init__(self):
        keys = {number: signing_key(self.home(number) / "owner.key").public_key().public_bytes_raw() for number in range(COUNT)}
        self.numbers = {key: number for number, key in keys.items()}
        self.guards = {key: self.guard(key) for key in sorted(self.numbers)}

    def home(self, number: int) -> Path:
        return self.folder / f"owner-{number}"

    def guard(self, key: bytes, **how) -> Guard:
        """Return the guard of an owner, as after a start."""
        number = self.numbers[key]
        data = self.folder / f"owner-{number}.jsonl"
        if not data.exists():
            write_records(data, 20, f"wool{number}")
        rules = CohortRules("joint", frozenset(self.numbers) - {key}, rounds=self.rounds)
        return make_guard(self.home(number), data, self.model, policy=self.policy, cohort=rules, **how)

    def cohort(self, **change) -> Cohort:
        feature_map = tiny_map(self.model)
        asked = {
            "market_key": bytes([1]) * 32, "round_id": bytes([2]) * 32, "map_id": feature_map.map_id, "guarantee": ONE, "name": "joint",
            "base_model": bytes.fromhex(self.model.model_id), "dimension": DIMENSION, "members": tuple(sorted(self.numbers)),
            "dropouts": 1, "colluders": 1, **change,
        }  # fmt: skip
        return Cohort(**asked)

    def exchange(self, step: Step, asks: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Ask each guard; one that refuses says nothing."""
        answers = {}
        for member, ask in asks.items():
            self.asked.append((step, member))
            try:
                answers[member] = self.guards[member].take_part(ask)
            except VeilmartError:
                continue
        return answers

    def charges(self, key: bytes) -> list[Origin]:
        return [entry.origin for entry in self.ledger(key).entries()]

    def ledger(self, key: bytes) -> Ledger:
        return Ledger.open(self.home(self.numbers[key]) / "ledger.db", self.policy.budget)


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


@pytest.fixture
def world(tmp_path, model):
    return World(tmp_path, model)


# A round ------------------------------------------------------------------------------------------------------------------


def test_guards_release_together_and_each_is_charged_once(world):
    release = open_envelope(convene(world.cohort(), world.exchange))
    assert release.signers == tuple(sorted(world.numbers))
    assert abs(release.specification.noisy_sums[0] / 1024 - 100) < 150  # a hundred records, and noise of 30 units
    for key in world.numbers:
        expected = [Origin.COHORT, Origin.DRAWN] if key == release.owner else [Origin.COHORT]
        assert world.charges(key) == expected
        assert world.ledger(key).price(cohorts.specification_charge(ONE)).spent == pytest.approx(1.0)
    # The one who published has it in its chain: the next release of its own comes after it.
    assert world.ledger(release.owner).next_release() == (2, release.release_id)
    assert all(world.ledger(key).next_release() == (1, b"") for key in world.numbers if key != release.owner)


def test_who_is_beyond_its_budget_drops_out_and_the_others_go_on(world):
    poor = sorted(world.numbers)[2]
    world.guards[poor] = dataclasses.replace(world, policy=Policy(Budget(0.5, 1e-6))).guard(poor)
    release = open_envelope(convene(world.cohort(), world.exchange))
    assert set(world.numbers) - set(release.signers) == {poor}
    assert world.charges(poor) == []


def test_too_few_who_are_left_end_a_round(world):
    keys = sorted(world.numbers)
    lost = {keys[0], keys[3]}
    with pytest.raises(CampaignFailed, match="at least 4 members to mask, got 3"):
        convene(world.cohort(), lambda step, asks: {} if not asks else world.exchange(step, {
            member: ask for member, ask in asks.items() if step is not Step.MASK or member not in lost
        }))  # fmt: skip
    assert {key: world.charges(key) for key in lost} == {key: [] for key in lost}, "who sent nothing paid nothing"
    assert all(world.charges(key) == [Origin.COHORT] for key in set(keys) - lost), "who sent its numbers paid, whatever became of them"


# Charges ------------------------------------------------------------------------------------------------------------------


def drawn_before_the_charge(world, monkeypatch) -> list[bool]:
    """Run a round; return, for each member, whether its ledger knew nothing when its noise was drawn."""
    kept, seen = cohorts.contribution, []

    def watched(vectors, cohort, noise):
        number = len(seen)
        key = [member for step, member in world.asked if step is Step.MASK][number]
        seen.append(not world.ledger(key).charged(cohort_request(cohort.cohort_id)))
        return kept(vectors, cohort, noise)

    monkeypatch.setattr(cohorts, "contribution", watched)
    convene(world.cohort(), world.exchange)
    return seen


def test_the_charge_is_on_the_disk_before_noise_is_drawn(world, monkeypatch):
    assert drawn_before_the_charge(world, monkeypatch) == [False] * COUNT


def test_control_a_guard_that_draws_first_is_caught(world, monkeypatch):
    def draws_first(self, cohort):
        numbers = cohorts.contribution(self._vectors(self._rules.minimum_units), cohort, self._noise)
        self._ledger.charge_cohort(cohort.cohort_id, cohorts.specification_charge(cohort.guarantee), self._rules.rounds)
        return numbers

    monkeypatch.setattr(cohorts.Rounds, "_contribution", draws_first)
    assert drawn_before_the_charge(world, monkeypatch) == [True] * COUNT


def broken_off(world) -> Cohort:
    """Let a SuperLink show half of the members one list of survivors, and the other half another one."""
    cohort, keys = world.cohort(), sorted(world.numbers)

    def two_lists(step, asks):
        if step is Step.AGREE:
            first, second = (Ask(step, cohort, tuple(parts)) for parts in (masked(asks)[:4], masked(asks)[1:]))
            asks = {member: (first if member in keys[:2] else second).to_bytes() for member in asks}
        return world.exchange(step, asks)

    def masked(asks):
        return Ask.from_bytes(next(iter(asks.values()))).parts

    with pytest.raises(CampaignFailed):
        convene(cohort, two_lists)
    return cohort


def test_a_superlink_that_shows_two_survivor_lists_gets_nothing_and_nobody_spends_twice(world):
    cohort = broken_off(world)
    assert [step for step, _ in world.asked if step is Step.SIGN] == []
    assert all(world.charges(key) == [Origin.COHORT] for key in world.numbers)
    with pytest.raises(CampaignFailed, match="to advertise, got 0"):  # the same round once more, guards started anew or not
        convene(cohort, dataclasses.replace(world).exchange)
    with pytest.raises(CampaignFailed, match="to mask, got 0"):  # another one: their policy allows no second
        convene(world.cohort(round_id=bytes([3]) * 32), world.exchange)
    assert all(world.charges(key) == [Origin.COHORT] for key in world.numbers)


def test_an_owner_whose_policy_allows_it_pays_for_a_second_round_once(tmp_path, model):
    world = World(tmp_path, model, rounds=2)
    broken_off(world)
    release = open_envelope(convene(world.cohort(round_id=bytes([3]) * 32), world.exchange))
    for key in world.numbers:
        assert world.charges(key).count(Origin.COHORT) == 2
    assert len(release.signers) == COUNT


def test_control_a_guard_that_knows_no_charge_would_join_again_and_again(world, monkeypatch):
    broken_off(world)
    monkeypatch.setattr(Ledger, "charged", lambda self, request: False)
    monkeypatch.setattr(Ledger, "charge_cohort", lambda *how: None)
    again = dataclasses.replace(world)
    masked = []
    with pytest.raises(CampaignFailed):
        convene(world.cohort(), lambda step, asks: masked.append(step) or (again.exchange(step, asks) if step is not Step.AGREE else {}))
    assert masked[-1] is Step.AGREE, "they sent their numbers under a fresh draw of noise"


def test_a_guard_that_was_started_anew_has_dropped_out_and_still_signs_what_it_is_in(world):
    cohort, keys = world.cohort(), sorted(world.numbers)
    restarts = {Step.AGREE: keys[1], Step.SIGN: keys[2]}

    def with_restarts(step, asks):
        if step in restarts:
            world.guards[restarts[step]] = world.guard(restarts[step])
        return world.exchange(step, asks)

    release = open_envelope(convene(cohort, with_restarts))
    assert release.signers == tuple(keys)
    assert (Step.AGREE, keys[1]) in world.asked
    assert (Step.REVEAL, keys[1]) not in world.asked
    assert all(world.charges(key).count(Origin.COHORT) == 1 for key in keys)


def test_nobody_signs_a_round_that_its_ledger_does_not_know(world):
    cohort, kept = world.cohort(), {}
    convene(cohort, lambda step, asks: kept.update({step: asks}) or world.exchange(step, asks))
    key = sorted(world.numbers)[1]
    (world.home(world.numbers[key]) / "ledger.db").unlink()
    with pytest.raises(CohortAborted, match="knows nothing of that round"):
        world.guard(key).take_part(kept[Step.SIGN][key])


# What a policy joins ------------------------------------------------------------------------------------------------------

REFUSED = {
    "a stranger among the members": (lambda w: {"members": tuple(sorted([*list(w.numbers)[:4], bytes(32)]))}, Unauthorised),
    "another name": (lambda w: {"name": "other"}, Unauthorised),
    "fewer colluders than the owner expects": (lambda w: {"colluders": 0}, Unauthorised),
    "another map": (lambda w: {"map_id": bytes(32)}, IncompatibleSpecification),
    "another encoder": (lambda w: {"base_model": bytes(32)}, IncompatibleSpecification),
    "more coordinates": (lambda w: {"dimension": DIMENSION + 1}, IncompatibleSpecification),
    "a larger epsilon than the policy's": (lambda w: {"guarantee": Guarantee(2.5, 1e-6)}, UsageError),
    "an epsilon of no use": (lambda w: {"guarantee": Guarantee(0.01, 1e-6)}, UsageError),
    "another delta": (lambda w: {"guarantee": Guarantee(1.0, 1e-7)}, UsageError),
    "noise from a seed": (lambda w: {"simulated": True}, Unauthorised),
}


@pytest.mark.parametrize(("change", "error"), REFUSED.values(), ids=REFUSED)
def test_a_round_that_the_policy_does_not_join_is_refused_and_costs_nothing(world, change, error):
    own = next(iter(world.numbers))
    world.guards[own].take_part(Ask(Step.ADVERTISE, world.cohort()).to_bytes())
    with pytest.raises(error):
        world.guards[own].take_part(Ask(Step.ADVERTISE, world.cohort(**change(world))).to_bytes())
    assert world.charges(own) == []


def test_a_guard_without_a_table_of_cohorts_joins_none(tmp_path, model):
    guard = make_guard(tmp_path / "home", write_records(tmp_path / "notes.jsonl"), model)
    with pytest.raises(Unauthorised, match="joins none"):
        guard.take_part(b"")


def test_a_population_of_persons_joins_no_cohort(tmp_path, model):
    rules = CohortRules("joint", frozenset())
    with pytest.raises(UsageError, match="unit is the record"):
        make_guard(tmp_path / "home", tmp_path / "x", model, policy=Policy(unit=PrivacyUnit("person")), cohort=rules)


def test_ever_new_rounds_do_not_fill_the_memory(world):
    own = next(iter(world.numbers))
    for number in range(10):
        world.guards[own].take_part(Ask(Step.ADVERTISE, world.cohort(round_id=bytes([number]) * 32)).to_bytes())
    assert len(world.guards[own]._rounds._open) == cohorts.OPEN_ROUNDS


# An old ledger ------------------------------------------------------------------------------------------------------------


def forget(world, key: bytes) -> None:
    """Put the ledger back to before the round."""
    (world.home(world.numbers[key]) / "ledger.db").unlink()


def test_an_older_ledger_is_noticed_though_another_member_published(world):
    envelope = convene(world.cohort(), world.exchange)
    publisher = open_envelope(envelope).owner
    other = next(key for key in world.numbers if key != publisher)
    world.guard(other).require_current([envelope])
    forget(world, other)
    with pytest.raises(LedgerBehind):
        world.guard(other).require_current([envelope])
    ledger = world.ledger(other)
    ledger.require_owner(other)
    assert (ledger.absorb([envelope]), ledger.absorb([envelope])) == (1, 0)
    assert world.charges(other) == [Origin.COHORT]
    assert ledger.price(cohorts.specification_charge(ONE)).spent == pytest.approx(1.0), "the guarantee's, not that of all the noise"
    assert ledger.next_release() == (1, b"")
    guard = world.guard(other)
    guard.require_current([envelope])
    with pytest.raises(CohortAborted):
        guard.take_part(Ask(Step.ADVERTISE, world.cohort()).to_bytes())


def test_the_publishers_older_ledger_gets_charge_and_place_back(world):
    envelope = convene(world.cohort(), world.exchange)
    release = open_envelope(envelope)
    forget(world, release.owner)
    ledger = world.ledger(release.owner)
    ledger.require_owner(release.owner)
    assert ledger.absorb([envelope]) == 1
    assert world.charges(release.owner) == [Origin.COHORT, Origin.MARKET]
    assert ledger.price(cohorts.specification_charge(ONE)).spent == pytest.approx(1.0)
    assert ledger.next_release() == (2, release.release_id)


def test_control_a_comparison_with_ones_own_publications_alone_would_draw_again(world):
    envelope = convene(world.cohort(), world.exchange)
    release = open_envelope(envelope)
    other = next(key for key in world.numbers if key != release.owner)
    forget(world, other)
    guard = world.guard(other)
    guard._ledger.require_current([one for one in [release] if one.owner in guard.owners])
    assert guard.release(Order(ONE))
