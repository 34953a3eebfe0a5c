"""Adapters of this node: put together, put on a model, taken off it.  Their bytes are read and written in protocol/adapter.py."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.adapter import GPT2, LLAMA, MAX_RANK
from protocol.adapter import MAX_BYTES as MAX_BYTES
from protocol.adapter import MAX_HEADER_BYTES as MAX_HEADER_BYTES
from protocol.adapter import MODULES as MODULES
from protocol.adapter import Adapter as Adapter
from protocol.adapter import Layout as Layout
from protocol.adapter import tensor_name as tensor_name
from protocol.codec import domain_tag
from protocol.errors import InvalidAdapter


def layout_of(module: Any) -> Layout:
    """Return the layout of a causal language model."""
    return GPT2 if hasattr(module, "transformer") else LLAMA


# Several as one ---------------------------------------------------------------------------------------------------------


def merge(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return the one adapter whose update is the weighted sum of the adapters' updates, exactly: ranks are put side by side.

    sum_i w_i alpha_i / r_i B_i A_i = [w_i alpha_i / r_i B_i]_i [A_i]_i.  Adapters without a layer that another has add nothing there.
    Raises InvalidAdapter if they are for different base models or their ranks add up to more than MAX_RANK.
    """
    first = adapters[0]
    if any((other.base_model, other.layout) != (first.base_model, first.layout) for other in adapters):
        raise InvalidAdapter("merge: expected adapters for one base model")
    rank = sum(adapter.rank for adapter in adapters)
    if rank > MAX_RANK:
        raise InvalidAdapter(f"merge: expected ranks that add up to at most {MAX_RANK}, got {rank}", hint="use fewer, or mix their outputs")
    layers = range(min(one.first_layer for one in adapters), max(one.last_layer for one in adapters) + 1)
    tensors: dict[str, NDArray[Any]] = {}
    for layer in layers:
        for module in first.layout.modules:
            a, b = (first.layout.tensor_name(layer, module, side) for side in "AB")
            factors = [
                (one.tensors[a].astype(np.float32), np.float32(weight * one.alpha / one.rank) * one.tensors[b])
                for one, weight in zip(adapters, weights, strict=True)
                if a in one.tensors
            ]
            if not factors:  # between two adapters that share no layer
                raise InvalidAdapter(f"merge: no adapter has layer {layer}, which lies between theirs")
            wide, tall = factors[0][0].shape[1], factors[0][1].shape[0]
            if any(f[0].shape[1] != wide or f[1].shape[0] != tall for f in factors):
                raise InvalidAdapter("merge: the adapters are not of one width")
            missing = rank - sum(f[0].shape[0] for f in factors)
            tensors[a] = np.concatenate([*(f[0] for f in factors), np.zeros((missing, wide), np.float32)])
            tensors[b] = np.concatenate([*(f[1] for f in factors), np.zeros((tall, missing), np.float32)], axis=1, dtype=np.float32)
    return Adapter(tensors, first.base_model, rank, rank, layers[0], layers[-1])


# On a model --------------------------------------------------------------------------------------------------------------


def sharing_weights(module: Any) -> Any:
    """Return a copy of a torch module that shares its weights: what is attached to the copy never has to be removed again."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def with_lora(module: Any, rank: int, alpha: int, layers: Sequence[int] | None = None) -> Any:
    """Return a copy of a causal language model, sharing its weights, with fresh LoRA on the linear modules of `layers` (default all).

    lora_A is drawn from torch's global generator, lora_B is zero.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layout = layout_of(module)
    # peft refuses layers_to_transform together with "all-linear", hence the list.
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0,
        target_modules=sorted({name.split(".")[1] for name in layout.modules}), fan_in_fan_out=layout.transposed,
        layers_to_transform=None if layers is None else list(layers),
    )  # fmt: skip
    adapted = inject_adapter_in_model(config, sharing_weights(module))
    for parameter in _places(adapted, 0).values():
        parameter.data = parameter.data.float()  # on a bf16 model too: small updates would be rounded away
    return adapted


def attach(module: Any, adapter: Adapter, below: int = 0) -> Any:
    """Return a copy of a causal language model, sharing its weights, with the adapter on it.

    below: how many layers of the full model `module` lacks at its bottom.  Raises InvalidAdapter unless every tensor has its place.
    """
    import torch

    layers = [layer - below for layer in range(adapter.first_layer, adapter.last_layer + 1)]
    if layers[0] < 0 or layers[-1] >= module.config.num_hidden_layers:
        raise InvalidAdapter(f"adapter: layers {adapter.first_layer} to {adapter.last_layer} are not all part of the model")
    with torch.random.fork_rng(devices=[]):  # peft draws first weights, which are overwritten below
        adapted = with_lora(module, adapter.rank, adapter.alpha, layers)
    places = _places(adapted, below)
    # Loaded by hand: peft's loader skips tensors that do not fit without a word.
    if set(places) != set(adapter.tensors):
        raise InvalidAdapter("adapter: its modules are not those of the model")
    for name, parameter in places.items():
        if tuple(parameter.shape) != adapter.tensors[name].shape:
            raise InvalidAdapter(f"adapter, {name}: expected shape {tuple(parameter.shape)}, got {adapter.tensors[name].shape}")
        parameter.data.copy_(torch.tensor(adapter.tensors[name]))
    return adapted.eval().requires_grad_(False)


def load_factors(adapted: Any, start: Adapter | None, below: int) -> list[Any]:
    """Set the LoRA factors of a module that `with_lora` made to public values, freeze every A and return the parameters of every B.

    Without `start` A is a fixed public matrix and B is zero.  Raises InvalidAdapter if `start` has other layers or another rank.
    """
    import torch

    factors = []
    for name, parameter in _places(adapted, below).items():
        side = name.removesuffix(".weight")[-1]
        if start is not None:
            value = start.tensors.get(name)
            if value is None or value.shape != tuple(parameter.shape):
                raise InvalidAdapter("adapter: the public start has other layers or another rank")
        else:
            value = public_factor(*parameter.shape) if side == "A" else np.zeros(tuple(parameter.shape), np.float32)
        parameter.data.copy_(torch.tensor(value))
        parameter.requires_grad_(side == "B")
        if side == "B":
            factors.append(parameter)
    return factors


def public_factor(rank: int, width: int) -> NDArray[np.float32]:
    """Return the fixed LoRA factor A (rank, width): signs from SHAKE-256, the same on every machine."""
    digest = hashlib.shake_256(domain_tag("lora-factor", 1)).digest(-(-rank * width // 8))
    signs = np.unpackbits(np.frombuffer(digest, np.uint8))[: rank * width].astype(np.float32) * 2 - 1
    return signs.reshape(rank, width) / np.float32(width) ** 0.5


def detach(adapted: Any, base_model: str, alpha: int, below: int = 0, guarantee: str = "none") -> Adapter:
    """Return the LoRA weights on a module that `with_lora` made for all its layers, numbered as in the full model."""
    tensors = {name: parameter.detach().float().cpu().numpy() for name, parameter in _places(adapted, below).items()}
    layout = layout_of(adapted)
    rank = tensors[layout.tensor_name(below, layout.modules[0], "A")].shape[0]
    return Adapter(tensors, base_model, rank, alpha, below, below + adapted.config.num_hidden_layers - 1, guarantee)


def _places(adapted: Any, below: int) -> dict[str, Any]:
    """Return the LoRA parameters of a module under their names in an adapter: layer k of the module is layer below + k."""

    def renumber(name: str) -> str:
        full = re.sub(r"\.(layers|h)\.(\d+)\.", lambda match: f".{match[1]}.{int(match[2]) + below}.", name)
        return "base_model.model." + full.replace(".default.", ".")  # as peft's own files have it

    return {renumber(name): parameter for name, parameter in adapted.named_parameters() if "lora_" in name}
