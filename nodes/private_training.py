"""Fine-tuning with a privacy guarantee: DP-SGD by Opacus over cached states (docs/privacy.md, P5).

Only the factors B of LoRA are trained; the factors A are public and frozen.  Everything that decides how much is learned (steps, rate,
clip, learning rate) is a constant of the recipe: none is chosen in view of the records, and none depends on how many there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nodes.adapter import Adapter, detach, load_factors, with_lora
from nodes.base_model import Activations, BaseModel, single_threaded_workers
from nodes.finetune import SEEDED, Progress, common_split, head_slopes, load_arrays, response_tokens, save_arrays
from nodes.packed import PackedPass, can_pack, parts_of, response_states
from nodes.private_noise import NormalSource, Sampler, normals, poisson_batch
from protocol.errors import RecordError, UsageError
from protocol.privacy import Guarantee, PoissonSampledGaussian, PrivateTraining, sampled_multiplier

if TYPE_CHECKING:
    import torch

# Clipped gradients are a little longer than the bound, by rounding in single precision; the noise is scaled up by more than that.
SLACK = 1 + 1e-3
GRID = 2.0**-16  # noisy sums are rounded to this share of the noise: post-processing, which leaves no low digits of it
UNITS_AT_ONCE = 32  # gradients kept in memory; a batch of any size is added up in such parts
CHECKPOINT_EVERY = 5  # steps
BETAS = 0.9, 0.999  # of Adam


@dataclass(frozen=True)
class PrivateRecipe:
    """How an adapter is trained under a guarantee; constants, none of them tuned on what it is used for."""

    guarantee: Guarantee
    layers: int = 2  # topmost layers that get an adapter
    rank: int = 4
    alpha: int = 8
    learning_rate: float = 5e-3  # of the first step; falls linearly to zero
    steps: int = 40
    rate: float = 0.125  # probability of a unit to be in a step's batch
    clip: float = 1.0  # largest L2 norm of one unit's gradient

    def __post_init__(self) -> None:
        if min(self.layers, self.rank, self.alpha, self.steps) < 1 or min(self.learning_rate, self.clip) <= 0:
            raise UsageError("recipe: expected positive numbers")
        if not 0 < self.rate <= 1:
            raise UsageError(f"recipe: expected a sampling rate in (0, 1], got {self.rate:g}")

    def seen(self, count: int) -> int:
        """Return how many records pass in training over so many, on average and each as often as it does."""
        return round(self.steps * self.rate * count)

    @cached_property
    def event(self) -> PoissonSampledGaussian:
        """What the whole training is charged as."""
        return PoissonSampledGaussian(sampled_multiplier(self.guarantee, self.rate, self.steps), self.rate, self.steps)


@dataclass(frozen=True, slots=True)
class Canaries:
    """What an audit plants in a training of its own and sees of it (nodes/audit/training.py); a training that is released has none.

    Each canary is one more unit: drawn into batches, clipped and noised as any other.  Its gradient lies along one weight of its own.
    """

    count: int
    length: float  # of each gradient before it is clipped, in clips
    observe: Callable[[NDArray[np.int64], NDArray[np.float32]], None]
    """Takes each step: the canaries' weights, and the noisy sum over all weights, one behind the other, in units of the noise."""
    present: tuple[int, ...]  # which of them are in; the others have their weights and no unit

    def places(self, weights: int) -> NDArray[np.int64]:
        """Return the weight of each canary, spread over all of them."""
        if self.count > weights:
            raise UsageError(f"canaries: expected at most one a weight, {weights}, got {self.count}", hint="fewer --canaries")
        return np.arange(self.count) * (weights // self.count)

    def gradients(self, weights: Sequence[torch.Tensor], clip: float, chosen: Sequence[int]) -> list[torch.Tensor]:
        """Return the gradients of some of those that are in: for each of the weights, all of them."""
        import torch

        sizes = [weight.numel() for weight in weights]
        places = self.places(sum(sizes))[[self.present[i] for i in chosen]]
        rows = torch.zeros(len(chosen), sum(sizes))
        rows[torch.arange(len(chosen)), torch.from_numpy(places)] = self.length * clip
        return [part.reshape(-1, *weight.shape) for part, weight in zip(torch.split(rows, sizes, dim=1), weights, strict=True)]


@cache
def _private_optimiser() -> Any:
    """Return the class; made in a function, since importing Opacus takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus and the packages under it warn at import
        from opacus.optimizers import DPOptimizer
    import torch

    class PrivateOptimiser(DPOptimizer):  # type: ignore[misc]
        """Opacus' optimiser with sums in double precision, and noise from the operating system instead of torch's generator."""

        draw: NormalSource = staticmethod(normals)

        def clip_and_accumulate(self) -> None:
            """Clip each unit's gradient and add it to the sum; one that is not finite counts as none, whatever made it so."""
            rows = [parameter.grad_sample.flatten(1).double() for parameter in self.params]
            lengths = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0) if len(rows[0]) else torch.zeros(0).double()
            factors = torch.where(lengths.isfinite(), (self.max_grad_norm / lengths.clamp(min=1e-12)).clamp(max=1.0), 0.0)
            for parameter, row in zip(self.params, rows, strict=True):
                total = (factors[:, None] * row.nan_to_num(0.0, 0.0, 0.0)).sum(0).view(parameter.shape)
                parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total

        def add_noise(self) -> None:
            """Set each gradient to the noisy sum in units of the noise, rounded to a coarse grid."""
            scale = self.noise_multiplier * self.max_grad_norm * SLACK
            for parameter in self.params:
                noise = torch.from_numpy(self.draw(parameter.numel())).view(parameter.shape)
                noisy = parameter.summed_grad / scale + noise
                parameter.grad = ((noisy / GRID).round() * GRID).float()

        def scale_grad(self) -> None:
            """Leave the unit as it is: dividing by a batch size would need one, and Adam's step does not depend on the unit."""

    return PrivateOptimiser


def unit_gradients(
    adapted: Any, weights: Sequence[torch.Tensor], units: Sequence[Sequence[Activations]], pool: Executor
) -> list[list[torch.Tensor]]:
    """Return the gradient of each unit: of the mean over its records of each record's mean loss over its response tokens.

    Every product has one fixed shape, or that of one record, so a gradient is a function of its unit.  A record without a response
    has a gradient of zeros.
    """
    import torch

    records = [(row, record) for row, unit in enumerate(units) for record in unit if record.encoded.has_response]
    gradients = [[torch.zeros_like(weight) for weight in weights] for _ in units]
    if not records:
        return gradients
    rows_of = parts_of([record for _, record in records]) if can_pack(adapted) else [[i] for i in range(len(records))]
    parts = [[records[i] for i in part] for part in rows_of]
    records = list(chain.from_iterable(parts))
    passes = list(pool.map(lambda part: forward_pass(adapted, [record for _, record in part]), parts))
    rows, targets = torch.cat([one.states.detach() for one in passes]), response_tokens([record for _, record in records])
    slopes = head_slopes(adapted.lm_head.weight, rows, targets.to(adapted.device), pool)

    def backward(one: PackedPass | SinglePass, slope: torch.Tensor) -> list[list[torch.Tensor]]:
        return list(one.gradients(weights, slope))

    each = torch.split(slopes, [len(one.states) for one in passes])
    found = chain.from_iterable(pool.map(backward, passes, each))
    for (row, record), terms in zip(records, found, strict=True):
        tokens = len(record.encoded.tokens) - record.encoded.response_start
        for whole, term in zip(gradients[row], terms, strict=True):
            whole += term / (tokens * len(units[row]))
    return gradients


def forward_pass(adapted: Any, records: Sequence[Activations]) -> PackedPass | SinglePass:
    """Return the way of some records through the upper layers; one record where the layers are not taken apart."""
    return PackedPass(adapted, records) if can_pack(adapted) else SinglePass(adapted, *records)


class SinglePass:
    """The way of one record through the upper layers of any model, and back."""

    def __init__(self, top: Any, record: Activations) -> None:
        self.states = response_states(top, [record])

    def gradients(self, weights: Sequence[torch.Tensor], slopes: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """Yield the gradients of the weights, from those of the final states (tokens, width)."""
        import torch

        yield list(torch.autograd.grad(self.states, weights, slopes))


def finetune_privately(
    model: BaseModel,
    activations: Sequence[Activations],
    recipe: PrivateRecipe,
    on_progress: Progress | None = None,
    *,
    units: Sequence[str] | None = None,
    start: Adapter | None = None,
    checkpoint: Path | None = None,
    workers: int = 2,
    draw: NormalSource = normals,
    sample: Sampler = poisson_batch,
    canaries: Canaries | None = None,
) -> Adapter:
    """Return an adapter for the layers above the split under the recipe's guarantee; the charge must be durable before this is called.

    activations: from `BaseModel.prefix_pass`, each a function of its record alone.  units: whose each record is (default: each record is
    a unit of its own).  start: public weights to begin with.  checkpoint: a file for the state of an interrupted training, continued
    if it is there; private, and the caller's to remove.  draw, sample: the operating system's randomness; anything else is for tests.
    """
    import torch

    if not activations:
        raise RecordError("training: expected at least one record")
    split = common_split(activations)
    members = _members(units, len(activations))
    with SEEDED, torch.random.fork_rng(devices=[]):  # peft draws first weights, which are overwritten
        adapted = with_lora(model.upper_layers(split, model.dtype), recipe.rank, recipe.alpha)
    weights = load_factors(adapted, start, split)
    adam = Adam(weights)
    if checkpoint is not None:
        adam.load(checkpoint)
    optimiser = _private_optimiser()(
        torch.optim.SGD(weights), noise_multiplier=recipe.event.multiplier, max_grad_norm=recipe.clip, expected_batch_size=None,
        loss_reduction="sum",
    )  # fmt: skip
    optimiser.draw = draw
    with single_threaded_workers(workers) as pool:
        while adam.step < recipe.steps:
            batch = np.flatnonzero(sample(len(members) + (len(canaries.present) if canaries else 0), recipe.rate)).tolist()
            # An empty batch is a step as any other: noise alone.
            for begin in range(0, max(len(batch), 1), UNITS_AT_ONCE):
                part = batch[begin : begin + UNITS_AT_ONCE]
                units_of_part = [[activations[i] for i in members[unit]] for unit in part if unit < len(members)]
                rows = unit_gradients(adapted, weights, units_of_part, pool)
                for i, weight in enumerate(weights):
                    weight.grad_sample = torch.stack([row[i] for row in rows]) if rows else torch.zeros(0, *weight.shape)
                if canaries is not None:
                    planted = canaries.gradients(weights, recipe.clip, [unit - len(members) for unit in part if unit >= len(members)])
                    for weight, more in zip(weights, planted, strict=True):
                        weight.grad_sample = torch.cat([weight.grad_sample, more])
                optimiser.signal_skip_step(begin + UNITS_AT_ONCE < len(batch))
                optimiser.pre_step()  # clips, adds up and, after the last part, adds the noise
            if canaries is not None:
                noisy = torch.cat([weight.grad.flatten() for weight in weights]).numpy()
                canaries.observe(canaries.places(len(noisy)), noisy)
            adam.update(recipe.learning_rate * (1 - adam.step / recipe.steps))
            optimiser.zero_grad()
            if checkpoint is not None and adam.step % CHECKPOINT_EVERY == 0:
                adam.save(checkpoint)
            if on_progress is not None:
                on_progress(adam.step, recipe.steps)
    promise = PrivateTraining(recipe.guarantee, recipe.event)
    return detach(adapted, model.model_id, recipe.alpha, split, str(promise))


class Adam:
    """Adam's steps, bias-corrected, with a state that can be saved; everything here works on noisy sums alone.

    Its step does not depend on the unit of the gradients, so no batch size is needed: the exact one is private.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self._weights, self.step = list(weights), 0
        self._first, self._second = ([weight.detach().clone().zero_() for weight in weights] for _ in range(2))

    def update(self, learning_rate: float) -> None:
        """Take one step along the gradients of the weights."""
        self.step += 1
        for weight, first, second in zip(self._weights, self._first, self._second, strict=True):
            first.mul_(BETAS[0]).add_(weight.grad, alpha=1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(weight.grad, weight.grad, value=1 - BETAS[1])
            length = (second / (1 - BETAS[1] ** self.step)).sqrt() + 1e-8
            weight.data.addcdiv_(first / (1 - BETAS[0] ** self.step), length, value=-learning_rate)

    def save(self, path: Path) -> None:
        """Write weights and moments where only the owner can read them."""
        save_arrays(path, [*self._weights, *self._first, *self._second], [self.step])

    def load(self, path: Path) -> None:
        """Continue from a saved state, if there is one."""
        numbers = load_arrays(path, [*self._weights, *self._first, *self._second]) if path.is_file() else None
        self.step = int(numbers[0]) if numbers else 0


def _members(units: Sequence[str] | None, count: int) -> list[list[int]]:
    """Return the rows of each unit, in the order of the file."""
    if units is None:
        return [[i] for i in range(count)]
    rows: dict[str, list[int]] = {}
    for i, unit in enumerate(units):
        rows.setdefault(unit, []).append(i)
    return list(rows.values())
