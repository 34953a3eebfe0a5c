"""Fine-tuning over cached states: LoRA on the layers above the split, nothing below is run again.

Training here is *not* private: an adapter made by `finetune` carries no guarantee and says so.
"""

from __future__ import annotations

import io
import math
import random
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nodes.adapter import Adapter, attach, detach, with_lora
from nodes.base_model import Activations, BaseModel, single_threaded_workers
from nodes.packed import parts_of, response_states
from protocol.errors import RecordError, TrainingFailed, UsageError
from protocol.keys import write_durably

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]  # steps done, all
SEEDED = threading.Lock()


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
    # Share of the records that is not trained on: training keeps the weights with the smallest loss on them.  Not in the text of a recipe,
    # which stands in digests of requests that were paid for before there was such a share.
    held_out: float = field(default=0.0, repr=False)

    def __post_init__(self) -> None:
        if min(self.rank, self.alpha, self.batch, self.epochs, self.max_steps) < 1 or min(self.learning_rate, self.clip) <= 0:
            raise UsageError("recipe: expected positive numbers")
        if not 0 <= self.held_out <= 0.5:
            raise UsageError(f"recipe: expected a held-out share from 0 to 0.5, got {self.held_out:g}")

    def seen(self, count: int) -> int:
        """Return how many records pass in training over so many, each as often as it does."""
        return min(self.epochs * count, self.max_steps * self.batch)

    def steps_for(self, count: int) -> int:
        """Return the number of steps over so many records with a response, if it is not stopped early."""
        return min(self.max_steps, self.epochs * -(-max(1, count - int(count * self.held_out + 0.5)) // self.batch))


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The loss on held-out records after a step: for the owner alone."""

    step: int  # 0 is the base model
    nats: float  # per response token


CHECKS = 8  # of the held-out loss in one training
PATIENCE = 2  # checks without a better loss before training stops
CHECKPOINT_EVERY = 16  # steps


def finetune(
    model: BaseModel,
    activations: Sequence[Activations],
    recipe: Recipe,
    on_progress: Progress | None = None,
    *,
    workers: int = 2,
    checkpoint: Path | None = None,
    on_loss: Callable[[HeldOut], None] | None = None,
) -> Adapter:
    """Return an adapter for the layers above the split, trained to predict the responses.

    Gives no privacy guarantee.  AdamW without weight decay; the loss is the mean over the response tokens of a batch.  The result
    depends on model, activations and recipe alone: not on `workers`, on torch's settings, on any global seed, or on interruptions.
    checkpoint: a file for the state of an interrupted training, continued if it is there; private, and the caller's to remove.
    Raises RecordError if no record has a response, TrainingFailed if the loss is not a number.
    """
    import torch

    usable, tested = _set_apart([one for one in activations if one.encoded.has_response], recipe)
    split = common_split(usable)
    # Frozen weights in bf16 where the processor has it, LoRA in fp32: a third less CPU than all in fp32, losses equal to within
    # 0.02 nats (measured).
    top = model.upper_layers(split, model.dtype)
    # The seed is of torch's one global generator: two owners that train at once must not draw from it together.
    with SEEDED, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        adapted = with_lora(top, recipe.rank, recipe.alpha).train()
    weights = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    batches = batches_of(len(usable), recipe)
    best = Best(weights)
    done = _resume(checkpoint, weights, optimiser, best)
    every = max(1, -(-len(batches) // CHECKS))
    with single_threaded_workers(workers) as pool:

        def check(step: int) -> None:
            nats = sum(pool.map(_nats_of, repeat(adapted), _parts(tested)))
            found = HeldOut(step, nats / sum(len(one.encoded.tokens) - one.encoded.response_start for one in tested))
            best.offer(found, weights)
            if on_loss is not None:
                on_loss(found)

        if tested and not done:
            check(0)
        for step, rows in enumerate(batches[done:], start=done + 1):
            if best.worse >= PATIENCE:
                break
            for weight, total in zip(weights, _gradient(adapted, weights, [usable[i] for i in rows], pool), strict=True):
                weight.grad = total
            length = torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
            if not bool(torch.isfinite(length)):
                raise TrainingFailed(f"training: the loss of step {step} is not a number", hint="a smaller learning rate, or other records")
            for group in optimiser.param_groups:
                group["lr"] = recipe.learning_rate * (1 - (step - 1) / len(batches))
            optimiser.step()
            if tested and (step % every == 0 or step == len(batches)):
                check(step)
            if checkpoint is not None and step % CHECKPOINT_EVERY == 0:
                _save(checkpoint, step, weights, optimiser, best)
            if on_progress is not None:
                on_progress(step, len(batches))
    best.restore(weights)
    return detach(adapted, model.model_id, recipe.alpha, split)


class Best:
    """The weights with the smallest held-out loss so far."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.loss, self.worse = math.inf, 0  # checks since the best one
        self.weights = [weight.detach().clone() for weight in weights]

    def offer(self, found: HeldOut, weights: Sequence[torch.Tensor]) -> None:
        """Keep the weights if their loss is the smallest."""
        if found.nats < self.loss:
            self.loss, self.worse = found.nats, 0
            self.weights = [weight.detach().clone() for weight in weights]
        else:
            self.worse += 1

    def restore(self, weights: Sequence[torch.Tensor]) -> None:
        """Set the weights to the best ones, if any were offered."""
        if self.loss < math.inf:
            for weight, kept in zip(weights, self.weights, strict=True):
                weight.data.copy_(kept)


def _set_apart(usable: list[Activations], recipe: Recipe) -> tuple[list[Activations], list[Activations]]:
    """Return the records to train on and those to test on; of a single record there is nothing to set apart."""
    count = min(int(len(usable) * recipe.held_out + 0.5), len(usable) - 1) if recipe.held_out else 0
    if count <= 0:
        return usable, []
    apart = set(random.Random(recipe.seed).sample(range(len(usable)), count))
    return [one for i, one in enumerate(usable) if i not in apart], [one for i, one in enumerate(usable) if i in apart]


def _gradient(adapted: Any, weights: Sequence[torch.Tensor], chosen: Sequence[Activations], pool: Executor) -> list[torch.Tensor]:
    """Return the gradient of the mean loss over the response tokens of a batch."""
    import torch

    parts = _parts(chosen)
    # Detached between the layers and the head: the head's weights are read once for the whole batch and not once a part.
    states = list(pool.map(lambda part: response_states(adapted, part), parts))
    targets = response_tokens([one for part in parts for one in part]).to(adapted.device)
    slopes = head_slopes(adapted.lm_head.weight, torch.cat([one.detach() for one in states]), targets, pool) / len(targets)
    terms = pool.map(
        lambda state, slope: torch.autograd.grad(state, weights, slope), states, torch.split(slopes, [len(one) for one in states])
    )
    return [torch.stack(each).sum(0) for each in zip(*terms, strict=True)]


def save_arrays(path: Path, arrays: Sequence[torch.Tensor], numbers: Sequence[float]) -> None:
    """Write the state of a training where only its owner can read it, whole or not at all."""
    stream = io.BytesIO()
    np.savez(stream, *(array.detach().cpu().numpy() for array in arrays), numbers=np.array(numbers, np.float64))
    write_durably(path, stream.getvalue())


def load_arrays(path: Path, arrays: Sequence[torch.Tensor]) -> list[float] | None:
    """Fill the tensors from such a file and return its numbers; None, and nothing filled, if there is none or it is of other shapes."""
    import torch

    try:
        with np.load(path, allow_pickle=False) as found:
            values = [found[f"arr_{i}"] for i in range(len(arrays))]
            numbers: list[float] = found["numbers"].tolist()
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        return None  # written by another version, or not by us: training begins anew, under the same charge
    if any(value.shape != tuple(array.shape) for value, array in zip(values, arrays, strict=True)):
        return None
    for array, value in zip(arrays, values, strict=True):
        array.data.copy_(torch.from_numpy(value))
    return numbers


def _optimiser_arrays(weights: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimiser.state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq", "step")]


def _save(checkpoint: Path, step: int, weights: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer, best: Best) -> None:
    save_arrays(checkpoint, [*weights, *best.weights, *_optimiser_arrays(weights, optimiser)], [step, best.loss, best.worse])


def _resume(checkpoint: Path | None, weights: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer, best: Best) -> int:
    """Return the number of steps that were done before, their state restored."""
    import torch

    if checkpoint is None or not checkpoint.is_file():
        return 0
    state = {w: {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)} for w in weights}
    arrays = [state[weight][name] for weight in weights for name in ("exp_avg", "exp_avg_sq", "step")]
    numbers = load_arrays(checkpoint, [*weights, *best.weights, *arrays])
    if numbers is None:
        return 0
    for weight in weights:
        optimiser.state[weight] = state[weight]
    step, best.loss, worse = numbers
    best.worse = int(worse)
    return int(step)


def held_out_loss(model: BaseModel, adapter: Adapter | None, activations: Sequence[Activations], *, workers: int = 2) -> float:
    """Return the mean loss in nats per response token of the base model, or of the base model with an adapter.

    Raises InvalidAdapter if the adapter is for another model or reaches below the split; RecordError if no record has a response.
    """
    import torch

    usable = [one for one in activations if one.encoded.has_response]
    split = common_split(usable)
    top = model.upper_layers(split, torch.float32)
    adapted = top if adapter is None else attach(top, model.admit(adapter), split)

    with single_threaded_workers(workers) as pool:
        total = sum(pool.map(_nats_of, repeat(adapted), _parts(usable)))
    return total / sum(len(one.encoded.tokens) - one.encoded.response_start for one in usable)


def record_losses(
    model: BaseModel, adapter: Adapter | None, activations: Sequence[Activations], on_progress: Progress | None = None, *, workers: int = 2
) -> list[float]:
    """Return each record's own mean loss in nats per response token, of the base model or of it with an adapter; each has a response."""
    import torch

    top = model.upper_layers(common_split(activations), torch.float32)
    adapted = top if adapter is None else attach(top, model.admit(adapter), activations[0].split)
    losses = []
    with single_threaded_workers(workers) as pool:
        for record, nats in zip(activations, pool.map(lambda one: _nats_of(adapted, [one]), activations), strict=True):
            losses.append(nats / (len(record.encoded.tokens) - record.encoded.response_start))
            if on_progress is not None:
                on_progress(len(losses), len(activations))
    return losses


def _parts(chosen: Sequence[Activations]) -> list[list[Activations]]:
    """Return the records that pass together: never more for more workers, so that sums come out the same."""
    return [[chosen[row] for row in part] for part in parts_of(chosen)]


def batches_of(count: int, recipe: Recipe) -> list[list[int]]:
    """Return the rows of every step."""
    shuffle, batches = random.Random(recipe.seed), []
    for _ in range(recipe.epochs):
        order = shuffle.sample(range(count), count)
        batches += [order[start : start + recipe.batch] for start in range(0, count, recipe.batch)]
    return batches[: recipe.max_steps]


def common_split(activations: Sequence[Activations]) -> int:
    """Return the layer above which all of these are trained; raise RecordError for none, UsageError for several."""
    splits = {one.split for one in activations}
    if not splits:
        raise RecordError("training: expected at least one record with a response")
    if len(splits) > 1:
        raise UsageError(f"activations: expected one split layer, got {sorted(splits)}")
    return splits.pop()


def _nats_of(top: Any, part: Sequence[Activations]) -> float:
    import torch

    with torch.inference_mode():
        return float(response_nats(top, part))


def response_nats(top: Any, part: Sequence[Activations]) -> torch.Tensor:
    """Return the summed loss of all response tokens, a scalar; `top` is the module of the upper layers, plain or with LoRA."""
    import torch.nn.functional as F

    return F.cross_entropy(top.lm_head(response_states(top, part)).float(), response_tokens(part).to(top.device), reduction="sum")


def response_tokens(part: Sequence[Activations]) -> torch.Tensor:
    """Return the tokens of all responses, one behind the other."""
    import torch

    return torch.tensor([token for one in part for token in one.encoded.tokens[one.encoded.response_start :]])


HEAD_ROWS = 32  # tokens in one product with the head, always: another shape would change the last bits of every row


def head_slopes(head: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, pool: Executor) -> torch.Tensor:
    """Return the gradient of each token's loss with respect to its final state (tokens, width), each row a function of its own.

    The head is read once for many records: for a short response alone, reading its 113 MB is most of the work.
    """
    import torch

    def slopes(start: int) -> torch.Tensor:
        part = states[start : start + HEAD_ROWS]
        block = torch.zeros(HEAD_ROWS, states.shape[1], dtype=states.dtype, device=states.device)
        block[: len(part)] = part
        errors = torch.softmax((block @ head.T).float(), dim=1)
        errors[torch.arange(len(part)), targets[start : start + HEAD_ROWS]] -= 1
        return (errors.to(head.dtype) @ head)[: len(part)]

    return torch.cat(list(pool.map(slopes, range(0, len(states), HEAD_ROWS))))
