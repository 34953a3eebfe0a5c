"""Decoders of other families: the prefix pass is the full model, and an adapter means the same on the whole model and on its top."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nodes.adapter import Adapter, detach, with_lora
from nodes.base_model import BaseModel, model_id
from nodes.finetune import Recipe, finetune, held_out_loss
from nodes.records import Pair
from protocol.errors import InvalidAdapter, ModelError
from tests.conftest import byte_tokenizer

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
RECORDS = [Pair("what is two and three", "five"), Pair("name a colour of the sky", "blue"), Pair("x" * 70, "y" * 50)]


def write_model(directory: Path, family: str, layers: int = 5, seed: int = 3, markers: bool = True, **more: Any) -> Path:
    """Write a random tiny model of a family with the byte tokenizer."""
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    if not markers:  # a tokenizer as GPT-2 has it: one end token
        value = json.loads(tokenizer.to_str())
        value["added_tokens"] = [one for one in value["added_tokens"] if one["content"] == "<|endoftext|>"]
        for token in ("<|im_start|>", "<|im_end|>"):
            value["model"]["vocab"][token.replace("|", "!")] = value["model"]["vocab"].pop(token)
        tokenizer = Tokenizer.from_str(json.dumps(value))
    sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 256} if family == "gpt2" else {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 256, "max_window_layers": layers,
    }  # fmt: skip
    window = {"sliding_window": None} if family == "mistral" else {}
    common = {"vocab_size": tokenizer.get_vocab_size(), "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **sizes, **window, **common, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any = AutoModelForCausalLM.from_config(config)
        for parameter in module.parameters():  # biases too: those of a fresh model are zero
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    module.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def random_adapter(model: BaseModel, seed: int = 1, rank: int = 3, size: float = 0.3) -> Adapter:
    """Return an adapter for the layers above the split whose B is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = with_lora(model.upper_layers(model.split, torch.float32), rank, 2 * rank)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, size)
    return detach(adapted, model.model_id, 2 * rank, model.split)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    directory = tmp_path_factory.mktemp(request.param)
    return BaseModel.open(write_model(directory, request.param), torch.float32)


def whole_loss(model: BaseModel, adapter: Adapter | None) -> float:
    """Return the loss of the responses by the library's own forward pass of the whole model."""
    nats, count = 0.0, 0
    module = model.with_adapter(adapter)
    for record in RECORDS:
        encoded = model.encode(record)
        tokens = torch.tensor([encoded.tokens])
        with torch.inference_mode():
            rows = module(input_ids=tokens).logits[0, encoded.response_start - 1 : -1].float()
        targets = tokens[0, encoded.response_start :]
        nats += float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum"))
        count += len(targets)
    return nats / count


def test_cached_states_and_the_layers_above_are_the_whole_model(model: BaseModel) -> None:
    assert model.split == 4
    activations = model.prefix_pass(RECORDS)[1]
    assert held_out_loss(model, None, activations) == pytest.approx(whole_loss(model, None), abs=1e-5)


def test_an_adapter_means_the_same_on_the_whole_model(model: BaseModel) -> None:
    adapter = random_adapter(model)
    again = Adapter.from_bytes(adapter.to_bytes(), base_model=model.model_id)
    activations = model.prefix_pass(RECORDS)[1]
    assert held_out_loss(model, again, activations) == pytest.approx(whole_loss(model, again), abs=1e-5)
    assert abs(whole_loss(model, again) - whole_loss(model, None)) > 1e-3  # or the two lines above would say nothing


def test_training_lowers_the_loss(model: BaseModel) -> None:
    activations = model.prefix_pass(RECORDS)[1]
    adapter = finetune(model, activations, Recipe(epochs=8, batch=2, learning_rate=1e-2))
    assert held_out_loss(model, adapter, activations) < held_out_loss(model, None, activations) - 0.2


def test_a_record_alone_has_the_same_views_in_any_company(model: BaseModel) -> None:
    assert model.embed_alone(RECORDS, layer=2)[1].tobytes() == model.embed_alone(RECORDS[1:2], layer=2)[0].tobytes()


def test_adapters_of_two_layouts_do_not_mix(tmp_path: Path) -> None:
    one = BaseModel.open(write_model(tmp_path / "a", "gpt2"))
    other = BaseModel.open(write_model(tmp_path / "b", "llama"))
    adapter = random_adapter(other)
    forged = Adapter(adapter.tensors, one.model_id, adapter.rank, adapter.alpha, adapter.first_layer, adapter.last_layer)
    with pytest.raises(InvalidAdapter, match="modules are not those"):
        one.with_adapter(forged)


def test_a_tokenizer_without_markers_writes_turns_in_words(tmp_path: Path) -> None:
    model = BaseModel.open(write_model(tmp_path, "gpt2", markers=False))
    assert model.text_of(model.render([("system", "be brief"), ("user", "hello")])) == "System: be brief\nUser: hello\nAssistant: "
    assert model.text_of(model.response_tokens("yes")) == "yes"
    assert model.response_tokens("yes")[-1] == model.end


def test_weights_in_several_files_are_one_identity(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = write_model(tmp_path / "whole", "llama")
    parts = tmp_path / "parts"
    AutoModelForCausalLM.from_pretrained(whole, dtype=torch.bfloat16).save_pretrained(parts, max_shard_size="20KB")
    (parts / "tokenizer.json").write_bytes((whole / "tokenizer.json").read_bytes())
    assert not (parts / "model.safetensors").exists()
    assert BaseModel.open(parts).generate("ab", max_new_tokens=5) == BaseModel.open(whole).generate("ab", max_new_tokens=5)
    before = model_id(parts)
    shard = sorted(parts.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes() + b" ")
    assert model_id(parts) != before


def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", "llama")
    (directory / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="beside it"):
        BaseModel.open(directory)


def test_weights_in_a_pickle_are_not_read(tmp_path: Path) -> None:
    directory = write_model(tmp_path, "llama")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        BaseModel.open(directory)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path, "llama")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "bloom"'))
    with pytest.raises(ModelError, match="another kind"):
        BaseModel.open(directory)
