from dataclasses import replace

import pytest

from nodes.base_model import BaseModel
from nodes.finetune import Recipe
from nodes.guard import Guard, Order, Policy
from nodes.ledger import Budget
from nodes.simulate import seeded_noise
from protocol.errors import BudgetSpent, IncompatibleSpecification, RecordError, UsageError
from protocol.hazmat.noise import NoiseSource
from protocol.privacy import Guarantee
from protocol.release import Card, open_envelope
from tests.nodes.owners import MARKER, make_guard, tiny_map, write_records

ONE = Order(Guarantee(1.0, 1e-6))
FAST = Recipe(rank=2, max_steps=2)


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path / "notes.jsonl")


def forbidden_noise() -> NoiseSource:
    def read(count: int) -> bytes:
        raise AssertionError("noise was drawn")

    return NoiseSource(read, simulated=False)


def test_a_request_is_queued_and_the_owners_loop_makes_the_release(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model)
    guard.request(ONE)
    assert (guard.status().waiting, guard.status().available, guard.collect()) == (1, False, None)
    guard.work()
    assert guard.failures == []
    release = open_envelope(guard.collect())
    assert (release.release_number, release.card.name, release.simulated, release.adapter) == (1, "notes", False, None)


def test_the_same_data_gives_the_same_bytes_and_is_paid_once(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model)
    first, spent = guard.release(ONE), guard.price(ONE.guarantee).spent
    again = make_guard(tmp_path / "home", data, model)  # another process, say
    assert again.release(ONE) == first
    assert again.price(ONE.guarantee).spent == spent


def test_another_record_is_another_release_in_the_same_ledger(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model)
    first = open_envelope(guard.release(ONE))
    write_records(data, 41)
    second = open_envelope(guard.release(ONE))
    assert (second.release_number, second.previous) == (2, first.release_id)
    assert guard.price(ONE.guarantee).spent > 1.3


REFUSALS = {
    "too few records": (RecordError, lambda path: write_records(path, 5), Policy(), ONE),
    "no file": (RecordError, lambda path: path.unlink(), Policy(), ONE),
    "an epsilon above the policy": (UsageError, lambda path: None, Policy(), Order(Guarantee(3.0, 1e-6))),
    "a delta above the policy": (UsageError, lambda path: None, Policy(), Order(Guarantee(1.0, 1e-3))),
    "a spent budget": (BudgetSpent, lambda path: None, Policy(budget=Budget(0.5, 1e-6)), ONE),
}


@pytest.mark.parametrize(("error", "spoil", "policy", "order"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_draws_nothing_and_charges_nothing(tmp_path, data, model, error, spoil, policy, order):
    spoil(data)
    guard = make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=policy)
    with pytest.raises(error) as caught:
        guard.release(order)
    assert MARKER not in str(caught.value)
    assert guard.price(ONE.guarantee).spent == 0.0
    assert guard.collect() is None
    guard.request(order)
    guard.work()
    assert [type(failure) for failure in guard.failures] == [error]


def test_an_allowed_release_does_draw(tmp_path, data, model):
    """The control of the test above: its forbidden source is really asked when a release is allowed."""
    with pytest.raises(AssertionError, match="noise was drawn"):
        make_guard(tmp_path / "home", data, model, forbidden_noise()).release(ONE)


def test_a_plan_draws_nothing(tmp_path, data, model):
    plan = make_guard(tmp_path / "home", data, model, forbidden_noise()).plan(ONE)
    assert (plan.records, plan.integers, plan.price.spent) == (40, 9, 0.0)


def test_an_adapter_is_stored_before_the_release_that_names_it(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model, recipe=FAST)
    release = open_envelope(guard.release(ONE))
    file = guard.adapter_file(release)
    assert release.adapter.guarantee == "none"
    assert file.stat().st_size == release.adapter.size_bytes


def test_seeded_noise_is_stamped_and_repeats_while_real_noise_never_does(tmp_path, data, model):
    seeded = [open_envelope(make_guard(tmp_path / f"s{i}", data, model, seeded_noise(7, "x")).release(ONE)) for i in range(2)]
    real = [open_envelope(make_guard(tmp_path / f"r{i}", data, model).release(ONE)) for i in range(2)]
    assert seeded[0].simulated
    assert (seeded[0].specification.noisy_sums == seeded[1].specification.noisy_sums).all()
    assert not real[0].simulated
    assert (real[0].specification.noisy_sums != real[1].specification.noisy_sums).any()


def test_a_map_of_another_model_is_refused(tmp_path, data, model):
    other = replace(tiny_map(model), base_model="00" * 32)
    with pytest.raises(IncompatibleSpecification):
        Guard(tmp_path / "home", data, Card("x"), model, other, forbidden_noise())


def test_the_owners_key_is_for_the_owner_alone(tmp_path, data, model):
    make_guard(tmp_path / "home", data, model)
    key = tmp_path / "home" / "owner.key"
    assert key.stat().st_mode & 0o077 == 0
    key.chmod(0o644)
    with pytest.raises(UsageError, match="0600"):
        make_guard(tmp_path / "home", data, model)
