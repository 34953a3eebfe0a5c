"""Llama layers with LoRA over the tokens of many records at once, each record's results a function of that record alone.

A private gradient must not depend on who else is in the batch, not even in its last bits.  Records one after the other would do, but then
every record reads all weights of the layers once more.  Here tokens of many records lie one behind the other, and whatever works on
tokens one by one (norms, projections, MLP) takes blocks of one fixed number of rows, in which a row's result does not depend on the
others; attention works on each record apart.  Tokens that no response token follows are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.base_model import Activations

if TYPE_CHECKING:
    import torch

ROWS = 128  # tokens in one product, always: another shape would change the last bits of every row
TOKENS = 1024  # of the records that take one way together, or it is a single longer one
RESPONSE_ROWS = 32  # the same in the last layer, where only what predicts a response token is computed


Project = Callable[[Any, "torch.Tensor"], "torch.Tensor"]  # a linear module and a block of rows, to its results


def response_states(top: Any, records: Sequence[Activations]) -> torch.Tensor:
    """Return the final states (tokens, width) that predict the response tokens of some records, one record behind the other.

    top: the module of the upper layers, plain or with LoRA.
    """
    return packed_states(top, records) if can_pack(top) else _padded_states(top, records)


def parts_of(records: Sequence[Activations]) -> list[list[int]]:
    """Return the rows of records that take one way through the layers together, the longest first: a function of their lengths."""
    parts: list[list[int]] = []
    room = 0
    for row in sorted(range(len(records)), key=lambda i: len(records[i].encoded.tokens), reverse=True):
        length = len(records[row].encoded.tokens)
        if length > room:
            parts.append([])
            room = TOKENS
        parts[-1].append(row)
        room -= length
    return parts


def can_pack(top: Any) -> bool:
    """Return whether the layers of this module are taken apart here."""
    return bool(top.config.model_type == "llama")


def _padded_states(top: Any, records: Sequence[Activations]) -> torch.Tensor:
    import torch

    lengths = [len(one.encoded.tokens) for one in records]
    like = top.lm_head.weight
    hidden = torch.zeros(len(records), max(lengths), records[0].hidden.shape[1], dtype=like.dtype, device=like.device)
    for row, one in enumerate(records):
        hidden[row, : lengths[row]] = one.hidden
    # No mask: padding is on the right and attention looks to the left.
    whole = top.base_model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    return torch.cat([whole[row, one.encoded.response_start - 1 : lengths[row] - 1] for row, one in enumerate(records)])


def packed_states(top: Any, records: Sequence[Activations], project: Project = lambda module, rows: module(rows)) -> torch.Tensor:
    """Return the same for layers that are taken apart, with another way to work out the linear modules."""
    import torch

    places, begins = _places(records)
    like = top.lm_head.weight
    hidden = torch.cat([one.hidden[:-1] for one in records]).to(like.device, like.dtype)  # the last token predicts nothing
    longest = max(at.stop - at.start for at in places)
    turns = top.model.rotary_emb(hidden[None], torch.arange(longest, device=like.device)[None])
    cos, sin = (torch.cat([turn[0, : at.stop - at.start] for at in places]) for turn in turns)
    *lower, last = top.model.layers
    for layer in lower:
        hidden = _layer(layer, hidden, (cos, sin), places, [0] * len(places), ROWS, project)
    # Of the last layer, and later of the head with its 49,152 logits a token, only the positions that predict a response are computed.
    states: torch.Tensor = top.model.norm(_layer(last, hidden, (cos, sin), places, begins, RESPONSE_ROWS, project))
    return states


class PackedPass:
    """The way of some records with a response through the upper layers with LoRA, and back to the factors B of each record.

    states: as `response_states`.
    """

    def __init__(self, top: Any, records: Sequence[Activations]) -> None:
        self._lows: dict[int, list[torch.Tensor]] = {}
        self._outs: dict[int, list[torch.Tensor]] = {}
        self._places, begins = _places(records)
        self._wanted = _behind_each_other([at.stop - at.start - begin for at, begin in zip(self._places, begins, strict=True)])
        last = top.model.layers[-1]
        after_attention = (last.self_attn.o_proj, last.mlp.gate_proj, last.mlp.up_proj, last.mlp.down_proj)
        self._sees_wanted = {id(module.lora_B["default"].weight) for module in after_attention}
        self.states = packed_states(top, records, self._project)

    def _project(self, module: Any, rows: torch.Tensor) -> torch.Tensor:
        """Return what a linear module with LoRA makes of a block, and keep what the gradient of its B is made of."""
        factor = module.lora_B["default"]
        low = module.lora_A["default"](rows.to(factor.weight.dtype))
        out = factor(low)
        self._lows.setdefault(id(factor.weight), []).append(low.detach())
        self._outs.setdefault(id(factor.weight), []).append(out)
        whole = module.base_layer(rows) + out * module.scaling["default"]
        return whole.to(rows.dtype)  # frozen weights may be in bf16, the factors never are

    def gradients(self, weights: Sequence[torch.Tensor], slopes: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Yield for each record the gradients of the factors B, from those of its final states (tokens, width)."""
        import torch

        blocks = [self._outs[id(weight)] for weight in weights]
        found = iter(torch.autograd.grad(self.states, [out for outs in blocks for out in outs], slopes))
        behind = [torch.cat([next(found) for _ in outs]) for outs in blocks]
        before = [torch.cat(self._lows[id(weight)]) for weight in weights]
        where = [self._wanted if id(weight) in self._sees_wanted else self._places for weight in weights]
        for row in range(len(self._places)):
            yield [(low[at[row]].T @ out[at[row]]).T for low, out, at in zip(before, behind, where, strict=True)]


def _layer(
    layer: Any, hidden: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor], places: Sequence[slice], begins: Sequence[int], size: int,
    project: Project,
) -> torch.Tensor:  # fmt: skip
    """Return the outputs of a Llama layer for each record's positions from its begin on; keys and values come from all before."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, mlp, width = layer.self_attn, layer.mlp, hidden.shape[1]

    def projected(block: torch.Tensor) -> torch.Tensor:
        normed = layer.input_layernorm(block)
        return torch.cat([project(module, normed) for module in (attention.q_proj, attention.k_proj, attention.v_proj)], dim=1)

    def mixed_in(block: torch.Tensor) -> torch.Tensor:
        mixed, before = block.split([block.shape[1] - width, width], dim=1)
        after = before + project(attention.o_proj, mixed)
        normed = layer.post_attention_layernorm(after)
        inner = mlp.act_fn(project(mlp.gate_proj, normed)) * project(mlp.up_proj, normed)
        whole: torch.Tensor = after + project(mlp.down_proj, inner)
        return whole

    heads = _in_blocks(projected, hidden, ROWS).view(len(hidden), -1, attention.head_dim).transpose(0, 1)
    shared = attention.num_key_value_groups
    count = heads.shape[0] // (shared + 2)  # of keys, and of values
    queries, keys, values = heads.split([count * shared, count, count])
    queries, keys = (one[0] for one in apply_rotary_pos_emb(queries[None], keys[None], turns[0][None], turns[1][None]))
    mixed, before = [], []
    for at, begin in zip(places, begins, strict=True):
        mixed.append(_attend(queries[:, at], keys[:, at], values[:, at], begin))
        before.append(hidden[at][begin:])
    return _in_blocks(mixed_in, torch.cat([torch.cat(mixed), torch.cat(before)], dim=1), size)


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, begin: int) -> torch.Tensor:
    """Return what the positions from `begin` of one record see of it: (positions, heads x head width)."""
    import torch
    import torch.nn.functional as F

    length = queries.shape[1]
    sees = torch.ones(length, length, dtype=torch.bool, device=queries.device).tril()[begin:] if begin else None
    mixed = F.scaled_dot_product_attention(
        queries[None, :, begin:], keys[None], values[None], attn_mask=sees, is_causal=not begin, enable_gqa=True
    )
    return mixed[0].transpose(0, 1).reshape(length - begin, -1)


def _in_blocks(work: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return the work's results on rows, in blocks of `size`, the last one filled with zeros."""
    import torch
    import torch.nn.functional as F

    padded = F.pad(rows, (0, 0, 0, -len(rows) % size))
    return torch.cat([work(block) for block in padded.split(size)])[: len(rows)]


def _places(records: Sequence[Activations]) -> tuple[list[slice], list[int]]:
    """Return where each record's tokens lie, all but its last one, and which of its positions predicts the first of its response."""
    return _behind_each_other([len(one.encoded.tokens) - 1 for one in records]), [one.encoded.response_start - 1 for one in records]


def _behind_each_other(lengths: Sequence[int]) -> list[slice]:
    return [slice(begin, end) for begin, end in pairwise(np.cumsum([0, *lengths]).tolist())]
