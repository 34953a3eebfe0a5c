"""The specification: a noisy integer sum of bounded feature vectors (docs/protocol.md 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.errors import FeatureNormError, FormatError
from protocol.hazmat.noise import NoiseSource, discrete_gaussian
from protocol.privacy import COUNT_STEP as COUNT_STEP
from protocol.privacy import FEATURE_SCALE as FEATURE_SCALE
from protocol.privacy import MAX_UNITS as MAX_UNITS
from protocol.privacy import NORM_SQUARED as NORM_SQUARED
from protocol.privacy import Guarantee, NeighbouringRelation, noise_variance


@dataclass(frozen=True, slots=True, eq=False)
class BoundedVectors:
    """Integer vectors, one row per privacy unit, with the norm bound that was checked on them."""

    rows: NDArray[np.int64]  # (n, D+1), column 0 the count step
    norm_squared: int = NORM_SQUARED

    def __post_init__(self) -> None:
        bound = math.isqrt(self.norm_squared)
        if ((self.rows > bound) | (self.rows < -bound)).any():  # its square could wrap around in 64 bits
            raise FeatureNormError("row: a coordinate is beyond the norm bound")
        longest = int((self.rows**2).sum(axis=1).max(initial=0))
        if longest > self.norm_squared:
            raise FeatureNormError(f"squared row norm: expected at most {self.norm_squared}, got {longest}")

    def sensitivity(self, relation: NeighbouringRelation) -> float:
        """Return the L2 sensitivity of the sum of the rows."""
        match relation:
            case NeighbouringRelation.ADD_OR_REMOVE_ONE:
                return math.sqrt(self.norm_squared)


def quantise(features: NDArray[np.float64]) -> BoundedVectors:
    """Return the integer vectors of unit features: (n, D) floats with norm <= 1 to (n, D+1) integers, count step first.

    Truncation toward zero: |c_j| <= 4096 |z_j|, so no vector grows and the sensitivity proof holds.  Rounding to nearest can
    lengthen a vector; the proof would be false.  Float error in z (a norm of 1 + 1e-16) is caught by the exact integer check here
    and shrunk away; anything larger is a broken feature map and refused by BoundedVectors.
    See test_no_vector_is_longer_than_its_bound.
    """
    if not (np.abs(features) <= 1 + 2**-20).all():  # so written, NaN is refused as well
        raise FeatureNormError("features: expected finite coordinates of at most 1")
    units = np.trunc(FEATURE_SCALE * features).astype(np.int64)
    too_long = (units**2).sum(axis=1) > FEATURE_SCALE**2
    if too_long.any():
        units[too_long] = np.trunc(FEATURE_SCALE * (1 - 2**-20) * features[too_long]).astype(np.int64)
    return BoundedVectors(np.column_stack([np.full(len(units), COUNT_STEP, np.int64), units]))


def quantise_units(features: NDArray[np.float64], units: Sequence[str]) -> BoundedVectors:
    """Return one integer vector a privacy unit, trunc(4096 * mean of the unit's features), count step first.

    features: (n, D) of norm <= 1; units: n names, equal where records belong to one unit.  Rows come in the order of first appearance.
    A mean of vectors of norm at most 1 has norm at most 1, so the bound of a record is the bound of a whole unit.
    Each mean is made of its unit's own rows in an array of their own: no other unit can change as much as its last bit.
    """
    if len(units) != len(features):
        raise FeatureNormError(f"units: expected one for each of {len(features)} records, got {len(units)}")
    rows: dict[str, list[int]] = {}
    for row, unit in enumerate(units):
        rows.setdefault(unit, []).append(row)
    means = [features[own].mean(axis=0) for own in rows.values()]
    return quantise(np.array(means).reshape(-1, features.shape[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Specification:
    """A noisy integer sum of the features of one data set; public once released."""

    map_id: bytes  # SHA-256 of the feature map's manifest
    noisy_sums: NDArray[np.int32]  # (D+1,), element 0 is the count coordinate
    noise_variance: int  # s^2 on the integer grid
    guarantee: Guarantee  # epsilon, delta, relation, unit: never one without the others

    def __post_init__(self) -> None:
        if len(self.map_id) != 32:
            raise FormatError(f"map_id: expected 32 bytes, got {len(self.map_id)}")
        if self.noisy_sums.dtype != np.int32 or self.noisy_sums.ndim != 1 or len(self.noisy_sums) < 2:
            raise FormatError(f"noisy_sums: expected int32 (D+1,), got {self.noisy_sums.dtype} {self.noisy_sums.shape}")
        # Everybody recomputes the noise from the claim: a release with less noise than its epsilon needs does not exist.
        least = noise_variance(self.guarantee, NORM_SQUARED)
        if self.noise_variance < least:
            raise FormatError(f"noise_variance: epsilon {self.guarantee.epsilon:g} needs at least {least}, got {self.noise_variance}")
        sums = self.noisy_sums.copy()
        sums.setflags(write=False)
        object.__setattr__(self, "noisy_sums", sums)

    @property
    def dimension(self) -> int:
        """Number of feature coordinates D."""
        return len(self.noisy_sums) - 1

    @property
    def count(self) -> float:
        """Noisy number of privacy units, at least 1."""
        return max(float(self.noisy_sums[0]) / COUNT_STEP, 1.0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Noisy mean feature, (D,)."""
        return self.noisy_sums[1:] / (FEATURE_SCALE * self.count)

    @property
    def noise_std(self) -> float:
        """Standard deviation of each coordinate of the mean, in units of the feature norm."""
        return math.sqrt(self.noise_variance) / (FEATURE_SCALE * self.count)


def estimate(vectors: BoundedVectors, map_id: bytes, guarantee: Guarantee, noise: NoiseSource) -> Specification:
    """Return the noisy sum of a data set's feature vectors.

    vectors: (n, D+1) integers, one row per privacy unit, column 0 the count step.
    Draws D+1 discrete Gaussians of variance ceil(multiplier^2 * NORM_SQUARED) + 4; call it only where the charge is made.
    Source: docs/protocol.md 3; Balle and Wang 2018 for the multiplier; Canonne, Kamath, Steinke 2020 for the sampler.
    """
    if len(vectors.rows) > MAX_UNITS:
        raise FeatureNormError(f"privacy units: expected at most {MAX_UNITS}, got more")
    variance = noise_variance(guarantee, vectors.norm_squared)
    exact = vectors.rows.sum(axis=0)
    noisy = [int(value) + discrete_gaussian(variance, noise) for value in exact]
    if max(map(abs, noisy)) >= 1 << 31:
        raise FeatureNormError("noisy sums: beyond 32 bits; epsilon and delta are too small together")
    return Specification(map_id, np.array(noisy, np.int32), variance, guarantee)
