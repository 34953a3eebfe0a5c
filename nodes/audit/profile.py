"""What a private training allows any test to see: its exact trade-off between false and true positives, by numerical composition.

A training of T steps is T times the pair P = (1-q) N(0,1) + q N(1/sigma,1), with a unit, and Q = N(0,1), without it.  The loss
L = log dP/dQ of one step is put on a grid, rounded up, and added up T times by a Fourier transform (Koskela, Jälkö, Honkela 2020).
Rounding up makes every figure here too favourable to the attacker, by about T times half a cell, so nothing honest is refuted by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from protocol.privacy import PoissonSampledGaussian

CELL = 5e-4  # of the grid of losses
LARGEST = 150.0  # loss of a whole training; with the smallest noise below none is larger that matters
SMALLEST = 0.25  # multiplier: with less the training of a unit shows at a glance
TAIL = 9.0  # standard deviations at which one step is cut: beyond them lies 1e-19


@dataclass(frozen=True, eq=False)
class Profile:
    """delta as a function of epsilon, on a grid that reaches below 0; of adding a unit, the direction in which a canary is seen."""

    epsilons: NDArray[np.float64]
    deltas: NDArray[np.float64]

    def true_positives(self, false_positives: float) -> float:
        """Return the largest share of canaries that any test finds which takes this share of absent ones for present."""
        return min(float((np.exp(self.epsilons) * false_positives + self.deltas).min()), 1.0)

    def epsilon(self, delta: float) -> float:
        """Return the smallest epsilon of the grid at this delta; infinity where there is none."""
        fits = np.flatnonzero((self.deltas <= delta) & (self.epsilons >= 0))
        return float(self.epsilons[fits[0]]) if len(fits) else math.inf

    @property
    def auc(self) -> float:
        """Largest area under the ROC curve of a test."""
        rates = np.linspace(0, 1, 201) ** 2  # finer where the curve is steep
        found = np.array([self.true_positives(float(rate)) for rate in rates])
        # A concave curve lies above its chords, so the area is taken with the larger end of each piece: never too small.
        return float((np.diff(rates) * np.maximum(found[1:], found[:-1])).sum())


def profile_of(event: PoissonSampledGaussian) -> Profile:
    """Return the profile of a training."""
    rate, shift = event.sampling_rate, 1 / event.multiplier
    least = math.log1p(-rate) if rate < 1 else -math.inf
    low = math.floor(max(least, loss(-TAIL, rate, shift)) / CELL)
    high = math.ceil(loss(TAIL + shift, rate, shift) / CELL)
    cells = np.arange(low, high + 1)
    mass = np.diff(_below(np.asarray(cells * CELL, np.float64), rate, shift), prepend=0.0)
    size = 1 << math.ceil(math.log2(max(LARGEST / CELL - event.steps * low, len(cells))))
    whole = np.fft.irfft(np.fft.rfft(mass, size) ** event.steps, size).clip(min=0.0)
    epsilons = np.asarray((event.steps * low + np.arange(size)) * CELL, np.float64)
    kept = (epsilons > -LARGEST) & (epsilons < LARGEST)
    epsilons, whole = epsilons[kept], whole[kept]
    above = np.cumsum(whole[::-1])[::-1] - whole
    weighted = np.exp(-epsilons) * whole
    above_weighted = np.cumsum(weighted[::-1])[::-1] - weighted
    return Profile(epsilons, np.clip(above - np.exp(epsilons) * above_weighted, 0.0, 1.0))


def loss(seen: float, rate: float, shift: float) -> float:
    """Return log dP/dQ of one step at what was seen of it, in units of the noise."""
    exponent = shift * seen - shift**2 / 2
    # log(1 - q + q e^x), without overflow for a large x
    return float(np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)) if rate < 1 else exponent


def losses(seen: NDArray[np.float64], event: PoissonSampledGaussian) -> NDArray[np.float64]:
    """Return log dP/dQ of each step at what was seen of it: their sum is the best statistic that there is."""
    exponent = seen / event.multiplier - 1 / (2 * event.multiplier**2)
    if event.sampling_rate == 1:
        return exponent
    found: NDArray[np.float64] = np.logaddexp(math.log1p(-event.sampling_rate), math.log(event.sampling_rate) + exponent)
    return found


def _below(values: NDArray[np.float64], rate: float, shift: float) -> NDArray[np.float64]:
    """Return the probability under P that the loss of one step is at most each value."""
    from scipy.special import ndtr

    inner = (np.exp(values) - (1 - rate)) / rate  # the factor of the shifted half, if the loss is that
    with np.errstate(divide="ignore", invalid="ignore"):
        seen = np.where(inner > 0, (np.log(inner.clip(min=0)) + shift**2 / 2) / shift, -math.inf)
    found: NDArray[np.float64] = (1 - rate) * ndtr(seen) + rate * ndtr(seen - shift)
    return found


def multiplier_for(event: PoissonSampledGaussian, epsilon: float, delta: float) -> float:
    """Return the smallest multiplier, to three digits, with which such a training keeps an epsilon, by its profile."""
    return _smallest(lambda multiplier: profile_of(replace(event, multiplier=multiplier)).epsilon(delta) <= epsilon, event.multiplier)


def largest_multiplier(event: PoissonSampledGaussian, false_positives: float, true_positives: float) -> float:
    """Return the largest multiplier, to three digits, with which a training allows these rates; infinity if every one does."""
    if true_positives <= false_positives:
        return math.inf
    return _smallest(
        lambda multiplier: profile_of(replace(event, multiplier=multiplier)).true_positives(false_positives) < true_positives,
        event.multiplier,
    )


def _smallest(holds: Callable[[float], bool], start: float) -> float:
    """Return where a condition on a multiplier that is false below some value and true above it becomes true."""
    low, high = max(start, SMALLEST), max(start, SMALLEST)
    while not holds(high):
        low, high = high, 2 * high
        if high > 1e3:
            return math.inf
    while low == high or holds(low):
        low, high = low / 2, low
        if low < SMALLEST:
            return SMALLEST
    while high - low > 1e-3 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
