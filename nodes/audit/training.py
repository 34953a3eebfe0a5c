"""An attack on the training that makes adapters, in one run of it: how much privacy can be shown to be lost, against what is claimed.

White box: m canaries, each a unit whose gradient lies along one weight of its own and is far longer than the clip, are in the training
or out by a fair coin each.  The attacker sees every step's noisy sum, which is what the guarantee covers, and looks at one weight a
canary: its statistic is the likelihood ratio of the mechanism that is claimed.  Two bounds come of it.

* `epsilon_lower_bound`: the rates of the test against the exact trade-off of DP-SGD (nodes/audit/profile.py), as Nasr et al. 2023.  It
  takes the tests for independent, which they are as far as noise, coins and batches of different weights and units are.
* `one_run_epsilon`: Steinke, Nasr, Jagielski 2023, which assumes nothing of the kind, and shows far less.

Black box: the records are in or out by coins too, and the attacker compares each one's loss under the adapter with that under the base
model.  An adapter that was trained without a guarantee is told by that.

The training of an audit is done by `finetune_privately` itself and its adapter is thrown away.
"""

from __future__ import annotations

import math
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nodes.audit.bounds import CONFIDENCE, bounded_rates, one_run_epsilon
from nodes.audit.membership import rates
from nodes.audit.profile import LARGEST, largest_multiplier, losses, multiplier_for, profile_of
from nodes.audit.specification import Check
from nodes.private_noise import NormalSource, Sampler, normals, poisson_batch
from protocol.errors import RecordError
from protocol.privacy import NOT_PRIVATE, Guarantee, PoissonSampledGaussian, PrivacyUnit, PrivateTraining

if TYPE_CHECKING:
    from nodes.adapter import Adapter
    from nodes.base_model import Activations, BaseModel
    from nodes.private_training import PrivateRecipe

Progress = Callable[[str, int, int], None]
POWER = 0.9  # with less, an audit that refutes nothing says too little to be worth its time
TRIALS = 100  # trainings that are simulated to know the power
GUESSED = 0.05  # share of the canaries that is taken for present, and again for absent, in the one-run bound
LENGTH = 10.0  # of a canary's gradient in clips: a training that does not clip shows at once
STRONG = 4.0  # standard errors at which an AUC is more than chance: 3e-5 of honest adapters
ALIKE = 0.5  # correlation of two steps above which they have the same noise; gradients of records correlate by far less
FEWEST = 10  # members, and strangers, of a membership attack

# The noise of a training may depend on no seed: this program sets every seed there is and draws.
DRAW = """
import random, sys
{import_noise}
import numpy
random.seed(0)
numpy.random.seed(0)
if "torch" in sys.modules:
    sys.modules["torch"].manual_seed(0)
print(" ".join(repr(float(value)) for value in draw(16)))
"""
OURS = "from nodes.private_noise import normals as draw"


@dataclass(frozen=True, slots=True)
class Power:
    """What an audit of this size can do, said before it starts."""

    canaries: int
    against_half: float  # probability that noise of half the size is refuted
    expected: float  # lower bound on epsilon that an honest training will show, about

    @property
    def enough(self) -> bool:
        """Whether it is worth its time."""
        return self.against_half >= POWER


@dataclass(frozen=True, slots=True)
class Membership:
    """How well losses tell the records of an adapter's training from others."""

    members: int
    strangers: int
    auc: float
    error: float  # standard error of `auc` where there is nothing to tell

    @property
    def leaks(self) -> bool:
        """Whether members are told from strangers, beyond chance."""
        return self.auc > 0.5 + STRONG * self.error


@dataclass(frozen=True, slots=True)
class TrainingAudit:
    """What an audit of a training found; refuted if one check fails."""

    claim: PrivateTraining
    power: Power
    confidence: float
    false_positives: float  # at most
    true_positives: float  # at least
    epsilon_lower_bound: float
    one_run_epsilon: float
    largest_multiplier: float  # that allows these rates
    membership: Membership | None
    checks: tuple[Check, ...]

    @property
    def ratio(self) -> float:
        """Shown over claimed."""
        return self.epsilon_lower_bound / self.claim.guarantee.epsilon

    @property
    def refuted(self) -> bool:
        """Whether the claim is shown to be false."""
        return not all(check.holds for check in self.checks)


def power_of(claim: PrivateTraining, canaries: int, confidence: float = CONFIDENCE) -> Power:
    """Return what an audit with so many canaries can do, from simulated trainings; raises UsageError where there are too few."""
    event, guarantee = claim.event, claim.guarantee
    kept = profile_of(replace(event, multiplier=multiplier_for(event, guarantee.epsilon, guarantee.delta)))

    def refuted() -> bool:
        false, true = bounded_rates(*_simulated(event, canaries, 0.5), confidence)
        return true > kept.true_positives(false)

    shown = [_epsilon_of(event, *bounded_rates(*_simulated(event, canaries, 1.0), confidence), guarantee.delta)[0] for _ in range(5)]
    return Power(canaries, sum(refuted() for _ in range(TRIALS)) / TRIALS, float(np.median(shown)))


def canaries_needed(claim: PrivateTraining, most: int) -> int | None:
    """Return a number of canaries with which the power is enough, of 500 doubled and doubled; None where it would be above `most`."""
    count = 500
    while count <= most:
        if power_of(claim, count).enough:
            return count
        count *= 2
    return None


def _simulated(event: PoissonSampledGaussian, canaries: int, noise: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return statistics of canaries that were out, and in, of a training whose noise is this share of the claimed one."""
    draws = np.random.default_rng(secrets.randbits(128))  # protects nobody: no record is in it
    here = draws.random(canaries) < 0.5
    seen = noise * draws.standard_normal((event.steps, canaries))
    seen += (draws.random((event.steps, canaries)) < event.sampling_rate) * here / event.multiplier
    found = losses(seen, event).sum(axis=0)
    return found[~here], found[here]


def audit_training(
    model: BaseModel,
    activations: Sequence[Activations],
    recipe: PrivateRecipe,
    power: Power,
    *,
    units: Sequence[str] | None = None,
    confidence: float = CONFIDENCE,
    workers: int = 2,
    on_progress: Progress = lambda stage, done, of: None,
    draw: NormalSource = normals,
    sample: Sampler = poisson_batch,
    import_noise: str = OURS,
) -> TrainingAudit:
    """Return what one training under this recipe shows about its claim.

    activations: of the owner's records.  units: whose each record is (default: each record is a unit of its own); a fair coin for each
    unit decides which are trained on.  draw, sample: the training's randomness; anything but the operating system's is for tests.
    import_noise: a line that names `draw` for another process.
    """
    from nodes.private_training import Canaries, finetune_privately

    claim = PrivateTraining(recipe.guarantee, recipe.event)
    inside, outside = by_coin(activations, units)
    here, watch = coins(power.canaries), _Watch(recipe.event, power.canaries)
    order = np.flatnonzero(here)  # only canaries that are in are units of the training; every one has its weight
    canaries = Canaries(power.canaries, LENGTH, watch.see, tuple(order.tolist()))
    adapter = finetune_privately(
        model, inside.records, recipe, lambda done, of: on_progress("train", done, of),
        units=inside.units, workers=workers, draw=draw, sample=sample, canaries=canaries,
    )  # fmt: skip
    false, true = bounded_rates(watch.statistics[~here], watch.statistics[here], confidence)
    epsilon, multiplier = _epsilon_of(recipe.event, false, true, claim.guarantee.delta)
    attack = membership(adapter, model, inside, outside, workers=workers, on_progress=on_progress)
    shown = f"epsilon is at least {epsilon:.3f} with confidence {confidence:g}; claimed {claim.guarantee.epsilon:g}"
    allowed = f"at most {multiplier:.3f} of the clip" if multiplier < math.inf else "not bounded"
    noise = f"{allowed} with confidence {confidence:g}; claimed {recipe.event.multiplier:g}"
    checks = [
        watch.noise(),
        watch.bounded(here),
        Check("empirical epsilon", epsilon <= claim.guarantee.epsilon, shown),
        Check("noise multiplier", multiplier >= recipe.event.multiplier, noise),
        independent(import_noise),
    ]
    if attack is not None:
        checks.append(check_of(attack, claim))
    one_run = _one_run(watch.statistics, here, claim.guarantee.delta, confidence)
    return TrainingAudit(claim, power, confidence, false, true, epsilon, one_run, multiplier, attack, tuple(checks))


class _Watch:
    """What the attacker takes from every step."""

    def __init__(self, event: PoissonSampledGaussian, canaries: int) -> None:
        self._event, self._canaries = event, canaries
        self.statistics, self._sums = np.zeros(canaries), np.zeros(canaries)
        self._squares, self._draws, self._alike = 0.0, 0, 0.0
        self._before: NDArray[np.float64] | None = None

    def see(self, places: NDArray[np.int64], noisy: NDArray[np.float32]) -> None:
        """Take a step's noisy sum, in units of the noise."""
        at_canaries, free = noisy[places].astype(np.float64), np.delete(noisy, places).astype(np.float64)
        self.statistics += losses(at_canaries, self._event)
        self._sums += at_canaries
        self._squares, self._draws = self._squares + float(free @ free), self._draws + len(free)
        if self._before is not None and len(free) > 1:
            self._alike = max(self._alike, float(np.corrcoef(free, self._before)[0, 1]))
        self._before = free

    def noise(self) -> Check:
        """Return whether the weights without a canary vary as much as the noise alone does, and not the same way twice."""
        if self._draws < 100:
            return Check("noise", True, "every weight has a canary: there is nothing to measure it on")
        variance = self._squares / self._draws
        least = 1 - 5 * math.sqrt(2 / self._draws)  # gradients of records only add to it
        if self._alike > ALIKE:
            return Check("noise", False, f"two steps have the same noise: they correlate by {self._alike:.2f}")
        return Check("noise", variance >= least, f"variance {variance:.4f} of the claimed one over {self._draws} draws, least {least:.4f}")

    def bounded(self, here: NDArray[np.bool_]) -> Check:
        """Return whether a gradient of many times the clip adds no more than the clip."""
        event, present, absent = self._event, self._sums[here], self._sums[~here]
        expected = event.steps * event.sampling_rate / event.multiplier
        # Against absent ones, so that what records add to every weight falls out.
        length = float(present.mean() - absent.mean()) / expected
        error = math.sqrt(present.var() / len(present) + absent.var() / len(absent)) / expected
        seen = f"a gradient of {LENGTH:g} clips adds {length:.2f} +- {error:.2f} of the clip"
        return Check("bounded", length <= 1 + STRONG * error, seen)


def coins(count: int) -> NDArray[np.bool_]:
    """Return so many fair coins of the operating system."""
    return (np.frombuffer(secrets.token_bytes(count), np.uint8) & 1).astype(bool)


@dataclass(frozen=True, slots=True)
class Side:
    """Records that were trained on, or were not, and whose each is."""

    records: list[Activations]
    units: list[str] | None = None  # None: each record is a unit of its own


def by_coin(activations: Sequence[Activations], units: Sequence[str] | None = None) -> tuple[Side, Side]:
    """Return the records that fair coins put into the training, and the others: one coin for each unit, so that none is torn apart."""
    whose = list(range(len(activations))) if units is None else list(np.unique(list(units), return_inverse=True)[1])
    count = len(set(whose))
    if count < 2:
        raise RecordError(f"audit training: expected at least 2 records or persons, got {count}")
    while True:
        here = coins(count)
        if 0 < here.sum() < len(here):
            break
    chosen = [[at for at, unit in enumerate(whose) if here[unit] == side] for side in (True, False)]
    inside, outside = (
        Side([activations[at] for at in side], None if units is None else [units[at] for at in side]) for side in chosen
    )  # fmt: skip
    return inside, outside


def membership(
    adapter: Adapter, model: BaseModel, members: Side, strangers: Side, *,
    workers: int = 2, on_progress: Progress = lambda stage, done, of: None,
) -> Membership | None:  # fmt: skip
    """Return how the loss of an adapter, less that of the base model, tells members from strangers; None with fewer than 10 of either.

    members, strangers: from the same source, or what is told is the source.  Of a unit with several records their mean is taken.
    """
    from nodes.finetune import record_losses

    sides = [
        [(one, str(at) if side.units is None else side.units[at]) for at, one in enumerate(side.records) if one.encoded.has_response]
        for side in (members, strangers)
    ]
    counts = [len({unit for _, unit in side}) for side in sides]
    if min(counts) < FEWEST:
        return None
    both = [one for side in sides for one, _ in side]

    def count(done: int, _: int) -> None:
        on_progress("losses", done, len(both))

    with_it, without = (record_losses(model, of, both, count, workers=workers) for of in (adapter, None))
    gained = np.array(without) - np.array(with_it)
    inside, outside = _mean_of_units(gained[: len(sides[0])], sides[0]), _mean_of_units(gained[len(sides[0]) :], sides[1])
    found = rates(inside, outside)
    error = math.sqrt((sum(counts) + 1) / (12 * counts[0] * counts[1]))  # Mann and Whitney 1947
    return Membership(counts[0], counts[1], found.auc, error)


def _mean_of_units(gained: NDArray[np.float64], side: Sequence[tuple[Activations, str]]) -> NDArray[np.float64]:
    _, which = np.unique([unit for _, unit in side], return_inverse=True)
    means: NDArray[np.float64] = np.bincount(which, gained) / np.bincount(which)
    return means


def check_of(attack: Membership, claim: PrivateTraining | None) -> Check:
    """Return whether an adapter stands the attack: within what its claim allows or, without one, without telling members at all."""
    shown = f"losses tell {attack.members} members from {attack.strangers} others by AUC {attack.auc:.3f} +- {attack.error:.3f}"
    if claim is None:
        return Check("membership", not attack.leaks, f"{shown}; the adapter states no guarantee")
    limit = profile_of(claim.event).auc
    return Check("membership", attack.auc <= limit + STRONG * attack.error, f"{shown}; at most {limit:.3f} is allowed")


def claim_of(adapter: Adapter) -> PrivateTraining | None:
    """Return what an adapter states, kept by the mechanism that this program trains with; None where it states nothing."""
    from nodes.private_training import PrivateRecipe

    if adapter.guarantee == NOT_PRIVATE:
        return None
    _, epsilon, _, _, delta, _, unit = adapter.guarantee.replace(",", "").split(" ")
    guarantee = Guarantee(float(epsilon), float(delta), unit=PrivacyUnit.parse(unit))
    return PrivateTraining(guarantee, PrivateRecipe(guarantee).event)


def independent(import_noise: str = OURS) -> Check:
    """Return whether two processes that set every seed there is draw different noise."""
    command = [sys.executable, "-c", DRAW.format(import_noise=import_noise)]
    drawn = [subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout for _ in range(2)]
    if not all(drawn):
        return Check("independent", False, "the noise cannot be drawn in a process of its own")
    same = drawn[0] == drawn[1]
    return Check("independent", not same, "two processes with equal seeds draw " + ("the same noise" if same else "other noise"))


def _epsilon_of(event: PoissonSampledGaussian, false: float, true: float, delta: float) -> tuple[float, float]:
    """Return the epsilon that these rates show, and the largest multiplier that allows them."""
    multiplier = largest_multiplier(event, false, true)
    if multiplier == math.inf:
        return 0.0, multiplier
    return min(profile_of(replace(event, multiplier=multiplier)).epsilon(delta), LARGEST), multiplier


def _one_run(statistics: NDArray[np.float64], here: NDArray[np.bool_], delta: float, confidence: float) -> float:
    """Return the bound without any assumption: the largest statistics are taken for present, as many of the smallest for absent."""
    guessed = max(int(GUESSED * len(here)), 1)
    order = np.argsort(statistics)
    right = int(here[order[-guessed:]].sum() + (~here[order[:guessed]]).sum())
    return one_run_epsilon(len(here), 2 * guessed, right, delta, confidence)
