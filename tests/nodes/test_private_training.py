"""DP-SGD: what its guarantee rests on, and that nothing but the operating system decides its noise and batches."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from nodes.adapter import with_lora
from nodes.base_model import Activations, BaseModel, single_threaded_workers
from nodes.finetune import Recipe, finetune, response_nats
from nodes.guard import Guard, Order, Policy
from nodes.ledger import Budget, Ledger, Origin, total_of
from nodes.private_noise import normals, poisson_batch
from nodes.private_training import PrivateRecipe, _private_optimiser, finetune_privately, load_factors, unit_gradients
from nodes.records import Pair
from protocol.errors import BudgetSpent, TrainingFailed, UsageError
from protocol.privacy import Guarantee, PrivacyUnit, PrivateTraining, renyi_epsilon
from protocol.release import open_envelope
from tests.nodes.owners import make_guard, write_records

SPLIT = 3
EIGHT = PrivateRecipe(Guarantee(8.0, 1e-6), rank=2, steps=4, rate=0.5)
RECORDS = [Pair(f"question {i} of {i * 7}", "yes " * (1 + i % 5)) for i in range(14)]
RICH = Policy(Budget(20.0, 1e-6))


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory, torch.float32)


@pytest.fixture(scope="module")
def activations(model):
    return model.prefix_pass(RECORDS, split=SPLIT, layer=2)[1]


@pytest.fixture(scope="module")
def adapted(model):
    return adapted_layers(model, SPLIT, torch.float32)


def adapted_layers(model, split, dtype):
    """The upper layers with LoRA whose factors B are not zero, so that every gradient takes part."""
    module = with_lora(model.upper_layers(split, dtype), 2, 4)
    generator = torch.Generator().manual_seed(7)
    for weight in load_factors(module, None, split):
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    return module


def factors(module):
    return [parameter for name, parameter in module.named_parameters() if "lora_B" in name]


def gradients(module, units: list[list[Activations]], workers: int = 2):
    with single_threaded_workers(workers) as pool:
        return unit_gradients(module, factors(module), units, pool)


# Noise and batches ---------------------------------------------------------------------------------------------------------


def seed_everything() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


def noise_of(make_optimiser) -> torch.Tensor:
    """What an owner with the common seed adds to a sum of zeros."""
    seed_everything()
    weight = torch.nn.Parameter(torch.zeros(50))
    optimiser = make_optimiser(
        torch.optim.SGD([weight], lr=1.0), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=None, loss_reduction="sum"
    )
    weight.grad_sample = torch.zeros(3, 50)
    optimiser.pre_step()
    return weight.grad


def test_two_owners_with_equal_seeds_draw_independent_noise():
    first, second = noise_of(_private_optimiser()), noise_of(_private_optimiser())
    assert len(set(first.tolist()) & set(second.tolist())) < 5  # on a grid of 2^-16 two of 2 500 pairs may meet


def test_control_stock_opacus_draws_equal_noise_from_equal_seeds():
    from opacus.optimizers import DPOptimizer

    assert torch.equal(noise_of(DPOptimizer), noise_of(DPOptimizer))


def test_seeds_do_not_choose_the_batches():
    seed_everything()
    first = poisson_batch(400, 0.5)
    seed_everything()
    assert not np.array_equal(first, poisson_batch(400, 0.5))


def test_the_noise_is_standard_normal():
    """Kolmogorov and Smirnov's distance, and the mean square; each at a false-alarm rate of about 1e-6."""
    count = 200_000
    drawn = np.sort(normals(count))
    expected = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in drawn])
    assert np.abs(expected - (np.arange(count) + 0.5) / count).max() < 2.7 / math.sqrt(count)
    assert abs((drawn**2).mean() - 1) < 4.9 * math.sqrt(2 / count)
    assert abs(np.corrcoef(drawn_pairs := normals(count).reshape(2, -1))[0, 1]) < 4.9 / math.sqrt(drawn_pairs.shape[1])


def test_each_unit_is_drawn_with_the_rate_on_its_own():
    draws = np.stack([poisson_batch(50, 0.3) for _ in range(4000)])
    assert abs(draws.mean() - 0.3) < 4.9 * math.sqrt(0.21 / draws.size)
    assert abs(draws.sum(1).var() / (50 * 0.21) - 1) < 0.12  # binomial: units are drawn neither together nor in turn
    assert poisson_batch(20, 1.0).all()


# Gradients -----------------------------------------------------------------------------------------------------------------


def one_by_one(module, record):
    tokens = len(record.encoded.tokens) - record.encoded.response_start
    return torch.autograd.grad(response_nats(module, [record]) / tokens, factors(module))


def test_the_gradient_of_a_record_equals_one_backward_of_its_mean_loss(adapted, activations):
    for found, record in zip(gradients(adapted, [[one] for one in activations]), activations, strict=True):
        for one, two in zip(found, one_by_one(adapted, record), strict=True):
            assert torch.allclose(one, two, rtol=0, atol=1e-6 * max(1.0, float(two.abs().max())))


def test_opacus_own_per_sample_gradients_agree(model, activations):
    from opacus.grad_sample import GradSampleModule

    module = with_lora(model.upper_layers(SPLIT, torch.float32), 2, 4)
    load_factors(module, None, SPLIT)
    ours = gradients(module, [[one] for one in activations[:4]])
    wrapped = GradSampleModule(module.train(), loss_reduction="sum")
    for row, record in enumerate(activations[:4]):
        tokens = len(record.encoded.tokens) - record.encoded.response_start
        hidden = record.hidden[None].clone().requires_grad_()  # or torch warns about Opacus' hooks
        states = module.model(inputs_embeds=hidden, use_cache=False).last_hidden_state[0, record.encoded.response_start - 1 : -1]
        target = torch.tensor(record.encoded.tokens[record.encoded.response_start :])
        (torch.nn.functional.cross_entropy(module.lm_head(states), target, reduction="sum") / tokens).backward()
        for mine, parameter in zip(ours[row], factors(module), strict=True):
            assert torch.allclose(mine, parameter.grad_sample[0], rtol=1e-5, atol=1e-6 * max(1.0, float(mine.abs().max())))
            parameter.grad_sample = None
    del wrapped


def changed_by_mates(module, activations, rows=(0, 5, 13)) -> int:
    """How many of the gradients of some records are other ones, in any bit, where all records are in the batch."""
    together = gradients(module, [[one] for one in activations])
    alone = [gradients(module, [[activations[row]]], workers=1)[0] for row in rows]
    return sum(not torch.equal(one, two) for row, own in zip(rows, alone, strict=True) for one, two in zip(own, together[row], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_mate_never_changes_a_gradient(model, activations, dtype):
    assert not changed_by_mates(adapted_layers(model, SPLIT, dtype), activations)


def test_control_in_products_as_long_as_the_batch_mates_change_it(model, activations, monkeypatch):
    monkeypatch.setattr("nodes.packed._in_blocks", lambda work, rows, size: work(rows))
    assert changed_by_mates(adapted_layers(model, SPLIT, torch.float32), activations)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nor_does_it_in_the_default_model(slm_directory, dtype):
    whole = BaseModel.open(slm_directory)
    split = whole.layers - 2
    records = whole.prefix_pass([Pair("word " * (i * i % 37), "word " * (1 + i % 7)) for i in range(24)], split=split, layer=2)[1]
    assert not changed_by_mates(adapted_layers(whole, split, dtype), records)


def test_control_the_token_mean_of_a_batch_lets_mates_change_it(adapted, activations):
    def share(mates):  # what a batch-wide mean over tokens gives the first record
        tokens = sum(len(one.encoded.tokens) - one.encoded.response_start for one in mates)
        return torch.autograd.grad(response_nats(adapted, mates[:1]) / tokens, factors(adapted))

    short, long = share([activations[0], activations[5]]), share([activations[0], activations[4]])
    assert not torch.allclose(short[0], long[0], rtol=0.1)


def test_a_unit_counts_once_however_many_records_it_has(adapted, activations):
    """Sixty copies of a record, one unit: the gradient of the record, clipped once.  Control: as units of their own they add up."""
    (single,) = gradients(adapted, [[activations[3]]])
    (whole,) = gradients(adapted, [[activations[3]] * 60])
    assert all(torch.allclose(one, two, rtol=1e-4, atol=1e-6) for one, two in zip(single, whole, strict=True))
    assert length(clipped_sum([single] * 60, 0.01)) == pytest.approx(0.6, rel=1e-4)
    assert length(clipped_sum([whole], 0.01)) <= 0.01 * (1 + 1e-6)


def clipped_sum(rows, clip: float):
    weights = [torch.nn.Parameter(torch.zeros_like(one)) for one in rows[0]]
    optimiser = _private_optimiser()(
        torch.optim.SGD(weights), noise_multiplier=1.0, max_grad_norm=clip, expected_batch_size=None, loss_reduction="sum"
    )
    for i, weight in enumerate(weights):
        weight.grad_sample = torch.stack([row[i] for row in rows])
    optimiser.clip_and_accumulate()
    return [weight.summed_grad for weight in weights]


def length(tensors) -> float:
    return math.sqrt(sum(float((one.double() ** 2).sum()) for one in tensors))


def test_one_unit_more_changes_the_sum_by_at_most_the_clip(adapted, activations):
    rows = gradients(adapted, [[one] for one in activations])
    for clip in (1e-3, 1.0, 100.0):
        with_it, without = clipped_sum(rows, clip), clipped_sum(rows[:-1], clip)
        assert length([a - b for a, b in zip(with_it, without, strict=True)]) <= clip * (1 + 1e-6)


def test_control_without_the_clip_it_changes_by_more(adapted, activations):
    rows = gradients(adapted, [[one] for one in activations])
    assert length(rows[-1]) > 1e-3 * (1 + 1e-6)


def test_a_gradient_that_is_not_finite_counts_as_none(adapted, activations):
    bad = [torch.full_like(one, math.nan) for one in factors(adapted)]
    good = gradients(adapted, [[activations[0]]])
    assert length([a - b for a, b in zip(clipped_sum([*good, bad], 1.0), clipped_sum(good, 1.0), strict=True)]) == 0


# Training ------------------------------------------------------------------------------------------------------------------


def steps_of(model, activations, **how) -> list[tuple[int, int]]:
    steps = []
    adapter = finetune_privately(model, activations, how.pop("recipe", EIGHT), lambda done, of: steps.append((done, of)), **how)
    assert adapter.guarantee == "epsilon 8.0 at delta 1e-06, unit record"
    return steps


def test_changing_the_data_never_changes_the_number_of_steps(model, activations):
    expected = [(i, 4) for i in range(1, 5)]
    assert steps_of(model, activations) == expected
    assert steps_of(model, activations[:1]) == expected
    assert steps_of(model, activations[:3] * 12) == expected


def test_an_empty_batch_is_a_step_of_noise_alone(model, activations):
    drawn = []

    def draw(count: int):
        drawn.append(count)
        return normals(count)

    nobody = lambda count, rate: np.zeros(count, bool)  # noqa: E731
    adapter = finetune_privately(model, activations, EIGHT, draw=draw, sample=nobody)
    assert len(drawn) == 4 * len([name for name in adapter.tensors if "lora_B" in name])
    assert all(np.abs(array).max() > 0 for name, array in adapter.tensors.items() if "lora_B" in name)


def test_a_record_without_response_is_a_unit_with_nothing_to_say(model, activations):
    silent = replace(activations[0], encoded=replace(activations[0].encoded, response_start=len(activations[0].encoded.tokens)))
    assert len(steps_of(model, [silent, *activations[1:3]], recipe=replace(EIGHT, rate=1.0))) == 4


def test_two_trainings_with_equal_seeds_differ_and_those_without_noise_do_not(model, activations):
    def train(**how):
        seed_everything()
        return finetune_privately(model, activations, EIGHT, **how).digest

    assert train() != train()
    fixed = {"draw": lambda count: np.zeros(count), "sample": lambda count, rate: np.ones(count, bool)}
    assert train(**fixed) == train(**fixed, workers=1)  # the control: noise and batches are all that differed


def test_the_multiplier_is_the_smallest_that_keeps_the_guarantee():
    event = EIGHT.event
    assert renyi_epsilon([event], 1e-6) <= 8.0 < renyi_epsilon([replace(event, multiplier=0.999 * event.multiplier)], 1e-6)


@pytest.mark.parametrize("wrong", [{"rate": 0.0}, {"rate": 1.5}, {"steps": 0}, {"clip": 0.0}, {"rank": 0}])
def test_a_recipe_that_trains_nothing_is_refused(wrong):
    with pytest.raises(UsageError):
        replace(EIGHT, **wrong)


# The guard -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path / "notes.jsonl")


def private_guard(tmp_path, data, model, **how) -> Guard:
    return make_guard(tmp_path / "home", data, model, policy=how.pop("policy", RICH), recipe=how.pop("recipe", EIGHT), **how)


def entries(tmp_path):
    return Ledger.open(tmp_path / "home" / "ledger.db", RICH.budget).entries()


def test_the_whole_run_is_charged_before_the_first_draw(tmp_path, data, model, monkeypatch):
    seen = []

    def watch(count, rate):
        seen.append([entry.origin for entry in entries(tmp_path)])
        return poisson_batch(count, rate)

    monkeypatch.setitem(finetune_privately.__kwdefaults__, "sample", watch)
    guard = private_guard(tmp_path, data, model)
    guard.train()
    assert seen == [[Origin.TRAINED]] * EIGHT.steps
    assert guard.price(Guarantee(1.0, 1e-6)).spent > 8.0  # the filter's figure is a little above the plan's


def test_an_interrupted_training_goes_on_and_is_charged_once(tmp_path, data, model):
    recipe = replace(EIGHT, steps=12)

    def interrupt(stage, done, of):
        if (stage, done) == ("train", 7):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        private_guard(tmp_path, data, model, recipe=recipe, on_progress=interrupt).train()
    (state,) = (tmp_path / "home" / "training").glob("*.state")
    assert state.stat().st_mode & 0o777 == 0o600
    steps = []
    guard = private_guard(
        tmp_path, data, model, recipe=recipe, on_progress=lambda stage, done, of: steps.append(done) if stage == "train" else None
    )
    trained = guard.train()
    assert steps == list(range(6, 13))  # from the last checkpoint on
    assert [entry.origin for entry in entries(tmp_path)] == [Origin.TRAINED]
    assert not list((tmp_path / "home" / "training").glob("*.state"))
    assert guard.train().reference == trained.reference  # and never a second adapter for the same charge


def test_a_lost_adapter_is_not_trained_again_for_the_same_charge(tmp_path, data, model):
    guard = private_guard(tmp_path, data, model)
    guard.train().file.unlink()
    with pytest.raises(UsageError, match="not there any more"):
        guard.train()


def test_a_training_beyond_the_budget_is_refused_before_anything_is_computed(tmp_path, data, model, monkeypatch):
    monkeypatch.setattr(BaseModel, "prefix_pass", lambda *args, **how: pytest.fail("computed"))
    guard = private_guard(tmp_path, data, model, policy=Policy(Budget(4.0, 1e-6)))
    with pytest.raises(BudgetSpent):
        guard.train()
    with pytest.raises(BudgetSpent):
        guard.release(Order(Guarantee(1.0, 1e-6)))
    assert entries(tmp_path) == []


def test_a_release_states_both_guarantees_and_a_lost_ledger_charges_both_again(tmp_path, data, model):
    guard = private_guard(tmp_path, data, model)
    trained = guard.train()
    envelope = guard.release(Order(Guarantee(1.0, 1e-6)))
    release = open_envelope(envelope)
    assert release.adapter == trained.reference
    assert isinstance(release.adapter.guarantee, PrivateTraining)
    assert release.adapter.guarantee.guarantee == Guarantee(8.0, 1e-6)
    spent = guard.price(Guarantee(1.0, 1e-6)).spent
    assert total_of(release) == spent
    lost = Ledger.open(tmp_path / "lost.db", RICH.budget)
    lost.absorb([envelope])
    assert lost.price(entries(tmp_path)[0].charge).spent == spent
    assert guard.collect() == envelope


def test_a_private_adapter_of_persons_protects_persons(tmp_path, model):
    path = tmp_path / "visits.jsonl"
    path.write_text("\n".join(f'{{"text": "visit {i} of somebody to {i % 7}", "person": "p{i % 25}"}}' for i in range(50)))
    unit = PrivacyUnit("person")
    release = open_envelope(
        private_guard(tmp_path, path, model, policy=replace(RICH, unit=unit)).release(Order(Guarantee(1.0, 1e-6, unit=unit)))
    )
    assert release.adapter.guarantee.guarantee.unit == unit


# Training without a guarantee ------------------------------------------------------------------------------------------------


def test_training_keeps_the_weights_with_the_smallest_held_out_loss(model, activations):
    losses = []
    finetune(model, activations, Recipe(epochs=4, learning_rate=2e-2, held_out=0.2), on_loss=losses.append)
    assert losses[0].step == 0
    assert min(losses, key=lambda loss: loss.nats).step > 0


def test_an_interrupted_training_without_a_guarantee_ends_as_an_uninterrupted_one(model, activations, tmp_path):
    recipe, state = Recipe(epochs=8, rank=2, held_out=0.2), tmp_path / "state"

    def interrupt(done, of):
        if done == 19:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, activations, recipe, interrupt, checkpoint=state)
    assert finetune(model, activations, recipe, checkpoint=state).digest == finetune(model, activations, recipe).digest


def test_one_record_is_trained_on_and_not_set_apart(model, activations):
    losses = []
    finetune(model, activations[:1], Recipe(held_out=0.5), on_loss=losses.append)
    assert losses == []


def test_a_loss_that_is_no_number_stops_training(model, activations):
    broken = [replace(one, hidden=one.hidden * math.nan) for one in activations]
    with pytest.raises(TrainingFailed):
        finetune(model, broken, Recipe(max_steps=2))
