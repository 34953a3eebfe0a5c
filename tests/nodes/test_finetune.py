"""Training over cached states, and what becomes of the adapter on the full model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes.adapter import Adapter, attach, detach, with_lora
from nodes.base_model import Activations, BaseModel
from nodes.finetune import Recipe, finetune, held_out_loss
from nodes.records import Pair, Prompt, Text
from protocol.errors import InvalidAdapter, RecordError, UsageError

SPLIT = 3
RECORDS = [Pair(f"question {i} of {i * 7}", "yes " * (1 + i % 4)) for i in range(12)] + [Text("some running text of two halves")]


@pytest.fixture(scope="module")
def model(tiny_model_directory: Path) -> BaseModel:
    """The tiny model in fp32, so that two ways to the same loss differ by little more than the order of sums."""
    model = BaseModel.open(tiny_model_directory)
    model._llama.float()
    return model


@pytest.fixture(scope="module")
def activations(model: BaseModel) -> list[Activations]:
    return model.prefix_pass(RECORDS, split=SPLIT, layer=2)[1]


@pytest.fixture(scope="module")
def random_adapter(model: BaseModel) -> Adapter:
    adapted = with_lora(model.upper_layers(SPLIT, torch.float32), 4, 8)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:  # both sides: what peft draws for A comes from the global generator and differs from run to run
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return detach(adapted, model.model_id, 8, SPLIT)


def full_model_loss(model: BaseModel, adapter: Adapter | None) -> float:
    """The same loss the slow way: whole model, one record at a time, all logits."""
    llama = model._llama if adapter is None else attach(model._llama, adapter)
    nats, count = 0.0, 0
    for record in RECORDS:
        encoded = model.encode(record)
        with torch.inference_mode():
            logits = llama(input_ids=torch.tensor([encoded.tokens])).logits[0].double().log_softmax(-1)
        for position in range(encoded.response_start, len(encoded.tokens)):
            nats -= float(logits[position - 1, encoded.tokens[position]])
            count += 1
    return nats / count


def test_the_cached_top_has_the_loss_of_the_full_model(model: BaseModel, activations: list[Activations], random_adapter: Adapter) -> None:
    plain, adapted = held_out_loss(model, None, activations), held_out_loss(model, random_adapter, activations)
    assert plain == pytest.approx(full_model_loss(model, None), abs=1e-4)
    assert adapted == pytest.approx(full_model_loss(model, random_adapter), abs=1e-4)
    assert abs(adapted - plain) > 0.01


def test_control_an_adapter_on_the_wrong_layers_has_another_loss(
    model: BaseModel, activations: list[Activations], random_adapter: Adapter
) -> None:
    moved = {name.replace("layers.3.", "layers.0.").replace("layers.4.", "layers.1."): a for name, a in random_adapter.tensors.items()}
    wrong = replace(random_adapter, tensors=moved, first_layer=0, last_layer=1)
    assert abs(held_out_loss(model, random_adapter, activations) - full_model_loss(model, wrong)) > 0.01
    with pytest.raises(InvalidAdapter, match="not all part of the model"):
        held_out_loss(model, wrong, activations)


def test_an_adapter_of_another_model_or_shape_is_refused(model: BaseModel, activations: list[Activations], random_adapter: Adapter) -> None:
    with pytest.raises(InvalidAdapter, match="base model"):
        held_out_loss(model, replace(random_adapter, base_model="0" * 64), activations)
    narrow = {}
    for name, array in random_adapter.tensors.items():
        if "mlp" in name and (("lora_B" in name) != ("down_proj" in name)):  # the inner width of the MLP, 48 in the model
            array = array[:40] if "lora_B" in name else array[:, :40]
        narrow[name] = array
    with pytest.raises(InvalidAdapter, match="expected shape"):
        held_out_loss(model, replace(random_adapter, tensors=narrow), activations)


def test_training_lowers_the_loss_and_leaves_the_base_model_alone(model: BaseModel, activations: list[Activations]) -> None:
    before = held_out_loss(model, None, activations)
    steps: list[tuple[int, int]] = []
    adapter = finetune(model, activations, Recipe(epochs=3, batch=4, learning_rate=1e-2), lambda done, of: steps.append((done, of)))
    assert held_out_loss(model, adapter, activations) < before - 0.5
    assert held_out_loss(model, None, activations) == before
    assert steps == [(i, 12) for i in range(1, 13)]
    assert (adapter.first_layer, adapter.last_layer, adapter.guarantee) == (3, 4, "none")


def test_the_adapter_depends_on_its_arguments_alone(model: BaseModel, activations: list[Activations]) -> None:
    recipe = Recipe(max_steps=2, rank=2)
    torch.manual_seed(1)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = finetune(model, activations, recipe, workers=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.manual_seed(2)
    assert finetune(model, activations, recipe, workers=2).digest == first.digest
    assert finetune(model, activations, replace(recipe, seed=1)).digest != first.digest


def test_the_adapter_survives_its_bytes(model: BaseModel, activations: list[Activations], random_adapter: Adapter) -> None:
    again = Adapter.from_bytes(random_adapter.to_bytes(), base_model=model.model_id)
    assert held_out_loss(model, again, activations) == held_out_loss(model, random_adapter, activations)


def test_answers_change_with_the_adapter_and_change_back(model: BaseModel, random_adapter: Adapter) -> None:
    plain = model.generate("hello", None, 8)
    assert model.generate("hello", random_adapter, 8) != plain
    assert model.generate("hello", None, 8) == plain


def test_there_is_nothing_to_learn_from_prompts_alone(model: BaseModel) -> None:
    prompts = model.prefix_pass([Prompt("one"), Prompt("two")], split=SPLIT, layer=2)[1]
    with pytest.raises(RecordError):
        finetune(model, prompts, Recipe())
    with pytest.raises(RecordError):
        held_out_loss(model, None, [])


def test_a_recipe_without_steps_is_refused() -> None:
    with pytest.raises(UsageError):
        Recipe(epochs=0)


def test_lora_starts_as_the_base_model(model: BaseModel, activations: list[Activations]) -> None:
    fresh = detach(with_lora(model.upper_layers(SPLIT, torch.float32), 4, 8), model.model_id, 8, SPLIT)
    assert all(np.abs(array).max() == 0 for name, array in fresh.tensors.items() if "lora_B" in name)
    assert held_out_loss(model, fresh, activations) == held_out_loss(model, None, activations)


def test_the_top_shares_the_models_weights_and_never_changes_their_type(tiny_model_directory: Path) -> None:
    model = BaseModel.open(tiny_model_directory, torch.bfloat16)
    shared, own = model.upper_layers(SPLIT, torch.bfloat16), model.upper_layers(SPLIT, torch.float32)
    assert shared.lm_head.weight is model._llama.lm_head.weight
    assert own.lm_head.weight is not model._llama.lm_head.weight
    assert {parameter.dtype for parameter in model._llama.parameters()} == {torch.bfloat16}
    assert model.upper_layers(SPLIT, torch.float32) is own
    assert model._llama.model.layers[SPLIT].self_attn.layer_idx == SPLIT
