"""Fine-tuning over cached states: LoRA on the layers above the split, nothing below is run again.

Training here is *not* private: an adapter made by `finetune` carries no guarantee and says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nodes.adapter import Adapter, attach, detach, with_lora
from nodes.base_model import Activations, BaseModel, single_threaded_workers
from protocol.errors import RecordError, UsageError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]  # steps done, all


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained.

    The defaults were chosen on the texts of the demo (120 records): small batches and a rate that falls to zero took the held-out loss
    of two owners from 0.19 and 0.46 (batches of 8 at 2e-3) to 0.04 and 0.09 nats per token for the same tokens and CPU time.
    """

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 4e-3  # of the first step; falls linearly to zero
    batch: int = 4
    epochs: int = 2
    max_steps: int = 96
    clip: float = 1.0  # largest L2 norm of a step's gradient; bounds nothing about one record
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.rank, self.alpha, self.batch, self.epochs, self.max_steps) < 1 or min(self.learning_rate, self.clip) <= 0:
            raise UsageError("recipe: expected positive numbers")


def finetune(
    model: BaseModel, activations: Sequence[Activations], recipe: Recipe, on_progress: Progress | None = None, *, workers: int = 2
) -> Adapter:
    """Return an adapter for the layers above the split, trained to predict the responses.

    Gives no privacy guarantee.  AdamW without weight decay; the loss is the mean over the response tokens of a batch.  The result
    depends on model, activations and recipe alone: not on `workers`, on torch's settings, or on any global seed.
    Raises RecordError if no record has a response.
    """
    import torch

    usable = [one for one in activations if one.encoded.has_response]
    split = _common_split(usable)
    # Frozen weights in bf16 where the processor has it, LoRA in fp32: a third less CPU than all in fp32, losses equal to within
    # 0.02 nats (measured).
    top = model.upper_layers(split, model.dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapted = with_lora(top, recipe.rank, recipe.alpha).train()
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    batches = _batches(len(usable), recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / len(batches))
    with single_threaded_workers(workers) as pool:
        for step, rows in enumerate(batches, start=1):
            chosen = [usable[i] for i in rows]
            tokens = sum(len(one.encoded.tokens) - one.encoded.response_start for one in chosen)

            def gradient(part: Sequence[Activations], tokens: int = tokens) -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(_nats(adapted, part) / tokens, weights)

            parts = list(pool.map(gradient, _parts(chosen)))
            for weight, *terms in zip(weights, *parts, strict=True):
                weight.grad = torch.stack(terms).sum(0)
            torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
            optimiser.step()
            schedule.step()
            if on_progress is not None:
                on_progress(step, len(batches))
    return detach(adapted, model.model_id, recipe.alpha, split)


def held_out_loss(model: BaseModel, adapter: Adapter | None, activations: Sequence[Activations], *, workers: int = 2) -> float:
    """Return the mean loss in nats per response token of the base model, or of the base model with an adapter.

    Raises InvalidAdapter if the adapter is for another model or reaches below the split; RecordError if no record has a response.
    """
    import torch

    usable = [one for one in activations if one.encoded.has_response]
    split = _common_split(usable)
    top = model.upper_layers(split, torch.float32)
    adapted = top if adapter is None else attach(top, model.admit(adapter), split)

    def nats(part: Sequence[Activations]) -> float:
        with torch.inference_mode():
            return float(_nats(adapted, part))

    with single_threaded_workers(workers) as pool:
        total = sum(pool.map(nats, _parts(usable)))
    return total / sum(len(one.encoded.tokens) - one.encoded.response_start for one in usable)


PART = 2  # records in one forward pass: fixed, so that sums come out the same for any number of workers


def _parts(chosen: Sequence[Activations]) -> list[list[Activations]]:
    """Return the records in groups of similar length, which need little padding."""
    ordered = sorted(chosen, key=lambda one: len(one.encoded.tokens), reverse=True)
    return [ordered[start : start + PART] for start in range(0, len(ordered), PART)]


def _batches(count: int, recipe: Recipe) -> list[list[int]]:
    """Return the rows of every step."""
    shuffle, batches = random.Random(recipe.seed), []
    for _ in range(recipe.epochs):
        order = shuffle.sample(range(count), count)
        batches += [order[start : start + recipe.batch] for start in range(0, count, recipe.batch)]
    return batches[: recipe.max_steps]


def _common_split(activations: Sequence[Activations]) -> int:
    splits = {one.split for one in activations}
    if not splits:
        raise RecordError("training: expected at least one record with a response")
    if len(splits) > 1:
        raise UsageError(f"activations: expected one split layer, got {sorted(splits)}")
    return splits.pop()


def _nats(top: Any, part: Sequence[Activations]) -> torch.Tensor:
    """Return the summed loss of all response tokens, a scalar; `top` is the module of the upper layers, plain or with LoRA."""
    import torch
    import torch.nn.functional as F

    lengths = [len(one.encoded.tokens) for one in part]
    hidden = torch.zeros(len(part), max(lengths), part[0].hidden.shape[1], dtype=top.lm_head.weight.dtype)
    for row, one in enumerate(part):
        hidden[row, : lengths[row]] = one.hidden
    # No mask: padding is on the right and attention looks to the left.
    states = top.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
    # Logits only where a response token is predicted: at 49,152 logits a token the head is the most expensive layer otherwise.
    wanted = torch.cat([states[row, one.encoded.response_start - 1 : lengths[row] - 1] for row, one in enumerate(part)])
    target = torch.tensor([token for one in part for token in one.encoded.tokens[one.encoded.response_start :]])
    return F.cross_entropy(top.lm_head(wanted).float(), target, reduction="sum")
