"""Fixtures shared by all tests."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from tests.postgres import market_home, postgres  # noqa: F401 - fixtures

TINY = {
    "vocab_size": 0, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def market_logs_events_alone() -> Iterator[None]:
    """Whatever else than an event a market logs, at any level, raises where it is logged."""
    from market_node.events import LOGGER, Event

    def only_events(record: logging.LogRecord) -> bool:
        if isinstance(record.msg, Event) and not record.args:
            return True
        raise TypeError(f"not an event: {record.msg!r}")

    LOGGER.addFilter(only_events)
    yield
    LOGGER.removeFilter(only_events)


@pytest.fixture(scope="session")
def slm_directory() -> Path:
    """The directory of the default SLM, as `veilmart model import` makes it."""
    home = os.environ.get("VEILMART_HOME")
    directory = (Path(home) if home else platformdirs.user_data_path("veilmart")) / "models" / "smollm2-135m"
    if not (directory / "model.safetensors").is_file():
        pytest.skip("the default SLM is not imported: make model")
    return directory


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of five layers with a tokenizer of single bytes and the two special tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-model")
    tokenizer = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        llama: Any = LlamaForCausalLM(LlamaConfig(**{**TINY, "vocab_size": tokenizer.get_vocab_size()}, initializer_range=0.2))
    llama.to(torch.bfloat16).save_pretrained(directory)
    return directory


def byte_tokenizer() -> Any:
    """Return a byte-level tokenizer without merges: every byte is a token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


@pytest.fixture
def folder_in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for tests that write much and say nothing about disks: in memory, where the machine has a file system there."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path
    yield folder
    shutil.rmtree(folder)
