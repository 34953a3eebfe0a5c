"""Base models on this machine: copied in from a local directory, or from a hub when the user asks for the network."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from nodes.base_model import FAMILIES, SHARDS, BaseModel, model_id, rendering_of, tokenizer_id, weight_files
from protocol.errors import MarketUnreachable, ModelError, UsageError

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["config.json", "generation_config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model directory without loading its weights."""

    name: str
    directory: Path
    model_id: str
    tokenizer_id: str
    family: str
    layers: int
    width: int
    split: int  # adapters live above this layer
    context: int
    size_bytes: int  # of the weights on disk
    turns: str  # "markers" or "words": how a conversation is written


def add_model(models_dir: Path, source: Path, name: str) -> Path:
    """Return the directory of a model copied in under a name, whole or not at all; raise ModelError unless it can be opened.

    Only configuration, safetensors and tokenizer are copied: code and pickles that lie beside them are left behind.
    """
    if not NAME.fullmatch(name):
        raise UsageError("--name: expected 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")
    BaseModel.open(source)  # says what is wrong, if anything is
    target, partial = models_dir / name, models_dir / f".{name}.partial"
    if target.exists():
        raise UsageError(f"{target}: there is a model of this name already", hint="--name gives another")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        index = [source / SHARDS] if (source / SHARDS).is_file() else []
        for path in [source / "config.json", source / "tokenizer.json", *weight_files(source), *index]:
            with path.open("rb") as stream, (partial / path.name).open("wb") as copied:
                shutil.copyfileobj(stream, copied, 1 << 20)
                copied.flush()
                os.fsync(copied.fileno())
        partial.rename(target)
    except OSError as error:
        raise ModelError(f"{target}: {error.strerror or 'cannot be written'}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def fetch_model(models_dir: Path, hub_id: str, name: str) -> Path:
    """Return the directory of a model fetched from a Hugging Face hub: the one function here that reaches another host.

    Raises MarketUnreachable if the hub does not answer or does not have it.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise UsageError("--hub: expected OWNER/NAME")
    os.environ["HF_HUB_OFFLINE"] = "0"  # read when the library is imported; the command line sets it for everything else
    from huggingface_hub import constants, snapshot_download

    constants.HF_HUB_OFFLINE = False  # where something imported it before
    staged = models_dir / f".{name}.fetched"
    try:
        snapshot_download(hub_id, local_dir=staged, allow_patterns=HUB_FILES, token=False)
        return add_model(models_dir, staged, name)
    except (ModelError, UsageError):
        raise
    except Exception as error:  # noqa: BLE001  # the library's errors have no common root
        raise MarketUnreachable(f"hub: {hub_id} could not be fetched ({type(error).__name__})", hint="is the network there?") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def facts_of(directory: Path) -> ModelFacts:
    """Return what is known of a model directory; raise ModelError unless it is one."""
    from tokenizers import Tokenizer

    try:
        config = json.loads((directory / "config.json").read_bytes())
        family, layers = str(config["model_type"]), int(config.get("num_hidden_layers") or config["n_layer"])
        width = int(config.get("hidden_size") or config["n_embd"])
        context = int(config.get("max_position_embeddings") or config["n_positions"])
        rendering = rendering_of(Tokenizer.from_file(str(directory / "tokenizer.json")))
        size = sum(path.stat().st_size for path in weight_files(directory))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{directory}: not a model directory ({type(error).__name__})") from None
    except Exception as error:  # the tokenizers library raises bare Exception
        if type(error) is not Exception:
            raise
        raise ModelError(f"{directory}: tokenizer.json cannot be read") from None
    if family not in FAMILIES:
        raise ModelError(f"{directory}: expected a decoder of {', '.join(FAMILIES)}, got another kind")
    turns = "markers" if rendering and "<" in rendering.header else "words"
    identity, tokens = model_id(directory), tokenizer_id(directory)
    return ModelFacts(directory.name, directory, identity, tokens, family, layers, width, max(1, layers * 4 // 5), context, size, turns)


def list_models(models_dir: Path) -> list[ModelFacts]:
    """Return the models of a home, sorted by name."""
    return [facts_of(path) for path in sorted(models_dir.glob("[!.]*")) if (path / "config.json").is_file()]
