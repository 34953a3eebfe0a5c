"""Base models on this machine: copied in whole, described without being loaded, fetched from a hub only when asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.base_model import BaseModel
from nodes.model_store import add_model, facts_of, fetch_model, list_models
from protocol.errors import MarketUnreachable, ModelError, UsageError
from tests.nodes.test_families import write_model


def test_a_model_is_copied_in_without_what_lies_beside_it(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "qwen2")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    target = add_model(tmp_path / "models", source, "mine")
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert BaseModel.open(target).model_id == BaseModel.open(source).model_id
    with pytest.raises(UsageError, match="already"):
        add_model(tmp_path / "models", source, "mine")


def test_facts_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    for family in ("gpt2", "qwen2"):
        directory = write_model(tmp_path / family, family, markers=family != "gpt2")
        facts, model = facts_of(directory), BaseModel.open(directory)
        assert (facts.model_id, facts.tokenizer_id, facts.family) == (model.model_id, model.tokenizer_id, model.family)
        assert (facts.layers, facts.width, facts.split, facts.context) == (model.layers, model.width, model.split, model.context)
        assert facts.turns == ("words" if family == "gpt2" else "markers")
    assert [facts.name for facts in list_models(tmp_path)] == ["gpt2", "qwen2"]


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 64])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        add_model(tmp_path, tmp_path, name)


def test_what_is_no_model_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        add_model(tmp_path / "models", source, "mine")
    assert not (tmp_path / "models").exists()


def veilmart(*words: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nodes.command", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "VEILMART_HOME": str(home), **environment}, check=False
    )


def test_a_hub_is_reached_only_when_the_network_is_asked_for(tmp_path: Path) -> None:
    refused = veilmart("model", "import", "--hub", "some/model", "--json", home=tmp_path)
    assert refused.returncode == 2
    assert "--allow-network" in json.loads(refused.stdout)["error"]["hint"]


def test_a_hub_that_does_not_answer_is_exit_code_6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="OWNER/NAME"):
        fetch_model(tmp_path, "../x", "mine")
    # Port 9 of loopback is closed: nothing else is reached.
    unreachable = veilmart("model", "import", "--hub", "some/model", "--allow-network", home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable.returncode == MarketUnreachable.exit_code, unreachable.stderr
    assert not any((tmp_path / "models").glob("*"))
