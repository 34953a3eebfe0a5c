import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from nodes.base_model import BaseModel
from nodes.finetune import Recipe
from nodes.guard import Guard, Order, Policy, map_alone
from nodes.ledger import Budget
from nodes.private_training import PrivateRecipe
from nodes.simulate import seeded_noise
from protocol.errors import BudgetSpent, IncompatibleSpecification, PopulationConflict, RecordError, TrainingFailed, UsageError
from protocol.features import default_map
from protocol.hazmat.noise import NoiseSource
from protocol.privacy import Guarantee, PrivacyUnit
from protocol.release import Card, open_envelope
from protocol.window import Window
from tests.nodes.owners import MARKER, make_guard, tiny_map, write_records

ONE = Order(Guarantee(1.0, 1e-6))
FAST = Recipe(rank=2, max_steps=2)
PRIVATE = PrivateRecipe(Guarantee(8.0, 1e-6), rank=2, steps=2, rate=0.5)


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


def write_lines(path, lines) -> None:
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def of_persons(count: int, persons: int, **changed) -> list[dict]:
    return [{"text": f"{MARKER} visit {i} of somebody", "person": f"p{i % persons}"} | changed.get(f"r{i}", {}) for i in range(count)]


PERSONS = Policy(unit=PrivacyUnit("person"))
REFUSALS = {
    "too few records": (RecordError, lambda path: write_records(path, 5), Policy(), ONE),
    "one record": (RecordError, lambda path: write_records(path, 1), Policy(), ONE),
    "the same record again and again": (RecordError, lambda path: write_lines(path, [{"text": f"{MARKER} again"}] * 40), Policy(), ONE),
    "too few persons": (RecordError, lambda path: write_lines(path, of_persons(60, 5)), PERSONS, ONE),
    "a record without the field": (RecordError, lambda path: write_records(path), PERSONS, ONE),
    "one record of many without a person": (
        RecordError, lambda path: write_lines(path, of_persons(60, 30, r41={"person": " "})), PERSONS, ONE,
    ),
    "a person who is no text": (RecordError, lambda path: write_lines(path, of_persons(60, 30, r7={"person": [MARKER]})), PERSONS, ONE),
    "a delta of one by the number of records": (
        UsageError, lambda path: write_records(path, 120), Policy(budget=Budget(4.0, 1e-2)), Order(Guarantee(1.0, 1e-2)),
    ),
    "no file": (RecordError, lambda path: path.unlink(), Policy(), ONE),
    "an epsilon above the policy": (UsageError, lambda path: None, Policy(), Order(Guarantee(3.0, 1e-6))),
    "a delta above the policy": (UsageError, lambda path: None, Policy(), Order(Guarantee(1.0, 1e-3))),
    "a spent budget": (BudgetSpent, lambda path: None, Policy(budget=Budget(0.5, 1e-6)), ONE),
}  # fmt: skip


@pytest.mark.parametrize(("error", "spoil", "policy", "order"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_draws_nothing_and_charges_nothing(tmp_path, data, model, error, spoil, policy, order):
    spoil(data)
    guard = make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=policy)
    with pytest.raises(error) as caught:
        guard.release(order)
    assert MARKER not in str(caught.value)
    assert guard._ledger.entries() == []
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_embedding_that_is_not_finite_is_refused_before_anything_is_drawn(tmp_path, data, model, value):
    def embed(records, *, layer, kind, on_progress=None):
        made = model.embed_alone(records, layer=layer)
        made[17, 1, 3] = value
        return made

    guard = make_guard(tmp_path / "home", data, model, forbidden_noise(), embed=embed)
    with pytest.raises(RecordError, match=r"record 18.*not finite"):
        guard.release(ONE)
    assert guard._ledger.entries() == []


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 20.5, float("nan"), float("inf")])
def test_an_epsilon_that_means_nothing_cannot_be_ordered(epsilon):
    with pytest.raises(UsageError):
        Order(Guarantee(epsilon, 1e-6))


def test_more_releases_than_the_budget_are_refused_one_by_one(tmp_path, data, model):
    policy, released = Policy(budget=Budget(2.2, 1e-6)), 0
    for count in range(40, 50):  # ten snapshots of a file that grows
        write_records(data, count)
        noise = None if released < 4 else forbidden_noise()
        guard = make_guard(tmp_path / "home", data, model, noise, policy=policy)
        try:
            guard.release(ONE)
            released += 1
        except BudgetSpent:
            assert noise is not None
    assert released == len(guard._ledger.entries()) == 4  # epsilon 1 four times is 2.12


# Two populations -------------------------------------------------------------------------------------------------------


def population(tmp_path, name: str, data, model, noise=None, unit=None):
    policy = Policy(population=name, unit=unit or Policy().unit)
    return make_guard(tmp_path / name, data, model, noise, policy=policy, claims=tmp_path / "claims.db")


def test_two_populations_cannot_claim_one_file(tmp_path, data, model):
    population(tmp_path, "ward", data, model).release(ONE)
    other = population(tmp_path, "clinic", data, model, forbidden_noise())
    for ask in (other.release, other.plan):
        with pytest.raises(PopulationConflict, match="40 of its records or units are charged to population 'ward'"):
            ask(ONE)
    assert other._ledger.entries() == []


def test_one_common_record_is_a_conflict_and_a_file_of_other_records_is_not(tmp_path, data, model):
    population(tmp_path, "ward", data, model).release(ONE)
    mixed = write_records(tmp_path / "mixed.jsonl", word="linen")
    population(tmp_path, "clinic", mixed, model).release(ONE)  # the control
    mixed.write_text(mixed.read_text() + data.read_text().splitlines()[7] + "\n")
    with pytest.raises(PopulationConflict, match="1 of its records"):
        population(tmp_path, "clinic", mixed, model, forbidden_noise()).release(ONE)


def test_one_person_in_two_populations_is_a_conflict(tmp_path, model):
    unit, files = PrivacyUnit("person"), [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_lines(files[0], of_persons(60, 30))
    write_lines(files[1], [{"text": f"other {i}", "person": f"q{i}" if i else "p3"} for i in range(40)])
    population(tmp_path, "ward", files[0], model, unit=unit).release(ONE)
    with pytest.raises(PopulationConflict, match="1 of its records or units"):
        population(tmp_path, "clinic", files[1], model, forbidden_noise(), unit=unit).release(ONE)


def test_a_ledger_keeps_its_unit_for_life(tmp_path, model):
    data = tmp_path / "a.jsonl"
    write_lines(data, of_persons(60, 30))
    make_guard(tmp_path / "home", data, model).release(ONE)
    with pytest.raises(PopulationConflict, match="for life"):
        make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=PERSONS)


# Units -----------------------------------------------------------------------------------------------------------------


def test_with_a_field_the_count_counts_its_values_and_the_release_says_so(tmp_path, model):
    data = tmp_path / "a.jsonl"
    write_lines(data, of_persons(600, 300))
    policy = replace(PERSONS, budget=Budget(20.0, 1e-6), largest_epsilon=20.0)
    guard = make_guard(tmp_path / "home", data, model, policy=policy)
    loud = Order(Guarantee(20.0, 1e-6))  # the asker's unit is not asked for
    assert (guard.plan(loud).records, guard.plan(loud).units) == (600, 300)
    release = open_envelope(guard.release(loud))
    assert release.specification.guarantee.unit == PrivacyUnit("person")
    assert abs(release.specification.count - 300) < 12  # the noise of the count is below 1.4: eight standard deviations


def test_the_same_texts_of_other_persons_are_another_request(tmp_path, model):
    data = tmp_path / "a.jsonl"
    guard = make_guard(tmp_path / "home", data, model, policy=PERSONS)
    envelopes = []
    for persons in (30, 31, 30):
        write_lines(data, of_persons(60, persons))
        envelopes.append(guard.release(ONE))
    assert envelopes[0] == envelopes[2] != envelopes[1]


# Orders of others ------------------------------------------------------------------------------------------------------


def test_a_changed_file_never_causes_a_release_by_itself(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model)
    guard.request(ONE)
    guard.work()
    first = guard.collect()
    write_records(data, 41)
    for order in (ONE, Order(Guarantee(0.5, 1e-6))):  # nor do orders with other numbers spend the budget
        guard.request(order)
    guard.work()
    assert guard.collect() == first
    assert guard.failures == []
    assert len(guard._ledger.entries()) == 1
    assert guard.release(ONE) != first, "the control: the owner's own act does make a new snapshot"
    assert len(guard._ledger.entries()) == 2


def test_two_guards_of_one_home_release_once_for_two_orders(tmp_path, data, model):
    together = threading.Barrier(2)

    def embed(*what, **how):  # both have seen an empty ledger before either charges
        together.wait(20)
        return model.embed_alone(*what, **how)

    guards = [make_guard(tmp_path / "home", data, model, embed=embed) for _ in range(2)]
    for guard, epsilon in zip(guards, (1.0, 0.5), strict=True):
        guard.request(Order(Guarantee(epsilon, 1e-6)))
    threads = [threading.Thread(target=guard.work) for guard in guards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [guard.failures for guard in guards] == [[], []]
    assert len(guards[0]._ledger.entries()) == 1
    assert guards[0].collect() == guards[1].collect()


def test_an_order_that_says_nothing_does_not_take_the_place_of_one_that_does(tmp_path, data, model):
    guard = make_guard(tmp_path / "home", data, model)
    guard.request(Order(Guarantee(0.0001, 1e-6)))
    guard.request(ONE)
    guard.work()
    assert [type(error) for error in guard.failures] == [UsageError]
    assert open_envelope(guard.collect()).specification.guarantee.epsilon == 1.0


@pytest.mark.parametrize(("recipe", "most", "served"), [
    (Recipe(max_steps=1), None, True), (Recipe(max_steps=1), 8.0, False),
    (PRIVATE, None, True), (PRIVATE, 8.0, True), (PRIVATE, 3.0, False), (None, 3.0, True),
])  # fmt: skip
def test_an_order_may_decline_the_adapter_that_the_policy_makes_and_never_loosens_it(tmp_path, data, model, recipe, most, served):
    guard = make_guard(tmp_path / "home", data, model, recipe=recipe, policy=Policy(Budget(20.0, 1e-6)))
    guard.request(Order(ONE.guarantee, epsilon_adapter=most))
    guard.work()
    assert (guard.collect() is not None) is served
    assert [str(error)[:10] for error in guard.failures] == ([] if served else ["epsilon of"])
    if served and recipe is PRIVATE:
        assert "epsilon 8" in str(open_envelope(guard.collect()).adapter.guarantee)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("field", ["largest_epsilon", "smallest_epsilon"])
def test_a_limit_that_limits_nothing_is_no_policy(field, limit):
    with pytest.raises(UsageError, match="finite"):
        Policy(**{field: limit})


def test_an_order_cannot_measure_the_number_of_records_by_its_delta(tmp_path, data, model):
    """With a delta of its choice it would be refused exactly where delta is not below 1/n."""
    told = []
    for count in (99, 101):
        guard = make_guard(tmp_path / f"home{count}", write_records(data, count), model, policy=Policy(budget=Budget(4.0, 1e-2)))
        guard.request(Order(Guarantee(1.0, 1e-3)))
        guard.work()
        told.append((guard.status(), guard.collect()))
    assert told[0] == told[1]


@pytest.mark.parametrize("stage", ["_one_pass", "_train"])
def test_no_memory_is_one_error_after_which_the_same_command_goes_on_and_pays_once(tmp_path, data, model, monkeypatch, stage):
    """With the error of torch itself, which is a RuntimeError like any other."""
    import torch

    guard = make_guard(tmp_path / "home", data, model, recipe=PRIVATE, policy=Policy(Budget(20.0, 1e-6)))
    with monkeypatch.context() as patched:
        patched.setattr(guard, stage, lambda *_: torch.empty(1 << 50))
        with pytest.raises(TrainingFailed, match="out of memory") as caught:
            guard.release(ONE)
        assert "dry-run" in caught.value.hint
        patched.setattr(guard, stage, lambda *_: torch.empty(2).view(3))
        with pytest.raises(RuntimeError, match="invalid"):  # the control: other errors stay what they are
            guard.release(ONE)
    release = open_envelope(guard.release(ONE))
    assert release.adapter is not None
    assert len(guard._ledger.entries()) == 2, "one training, one specification"


# Features --------------------------------------------------------------------------------------------------------------


def embeddings(count: int, width: int) -> np.ndarray:
    return (np.random.default_rng(5).standard_normal((count, 2, width)) * 3).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 7, 31, 32, 33, 64, 193, 1000])
def test_the_features_of_a_record_do_not_depend_on_the_others(count):
    """Bit for bit, for every number of records and place among them: the sensitivity proof needs it."""
    feature_map = default_map()
    made = embeddings(count, feature_map.width)
    whole = map_alone(feature_map, made)
    alone = np.concatenate([map_alone(feature_map, made[[k]]) for k in range(0, count, 7)])
    assert whole[::7].tobytes() == alone.tobytes()
    assert map_alone(feature_map, made[::-1].copy())[::-1].tobytes() == whole.tobytes()
    assert np.abs(whole - feature_map(made)).max() < 1e-12


def test_one_product_over_all_records_would_let_them_touch_each_other():
    """The control: the same rows among few and among many others come out with other last bits."""
    feature_map = default_map()
    made = embeddings(1000, feature_map.width)
    if feature_map(made)[:3].tobytes() == feature_map(made[:3]).tobytes():
        pytest.skip("the linear algebra of this machine computes every shape alike")


def test_a_window_is_renewed_for_nothing_and_the_specification_stays(tmp_path, data, model):
    day = [20_000]
    guard = make_guard(tmp_path / "home", data, model, policy=Policy(valid_days=90), now=lambda: day[0] * 86_400.0 + 5)
    first = guard.release(ONE)
    spent = guard.price(ONE.guarantee).spent
    assert open_envelope(first).window == Window(20_000, 20_089)
    day[0] += 59
    assert guard.release(ONE) == first
    day[0] += 1  # the last third
    again = make_guard(tmp_path / "home", data, model, forbidden_noise(), policy=Policy(valid_days=30), now=lambda: day[0] * 86_400.0)
    second = again.release(ONE)
    assert again.release(ONE) == second
    old, new = open_envelope(first), open_envelope(second)
    assert (new.release_number, new.previous, new.window) == (2, old.release_id, Window(20_060, 20_089))
    assert (new.specification.noisy_sums == old.specification.noisy_sums).all()
    assert (new.adapter, new.card) == (old.adapter, old.card)
    assert again.price(ONE.guarantee).spent == spent
    assert guard.collect() == second
    write_records(data, 41)  # control: other records are another draw, and cost
    with pytest.raises(AssertionError, match="noise was drawn"):
        again.release(ONE)
    guard.release(ONE)
    assert guard.price(ONE.guarantee).spent > spent


def test_a_window_of_a_clock_that_was_ten_years_ahead_is_put_right_for_nothing(tmp_path, data, model):
    now = [10 * 365 * 86_400.0 + 20_000 * 86_400]
    guard = make_guard(tmp_path / "home", data, model, now=lambda: now[0])
    guard.release(ONE)
    spent = guard.price(ONE.guarantee).spent
    now[0] = 20_000 * 86_400.0
    assert open_envelope(guard.release(ONE)).window == Window(20_000, 20_364)
    now[0] -= 10 * 365 * 86_400
    assert open_envelope(guard.release(ONE)).window.first == 20_000 - 3_650
    assert guard.price(ONE.guarantee).spent == spent


def test_orders_of_others_renew_nothing(tmp_path, data, model):
    day = [20_000]
    guard = make_guard(tmp_path / "home", data, model, now=lambda: day[0] * 86_400.0)
    first = guard.release(ONE)
    day[0] += 5000
    guard.request(ONE)
    guard.work()
    assert (guard.collect(), guard.failures) == (first, [])
    assert guard.release(ONE) != first  # control: the owner does
