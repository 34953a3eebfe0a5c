"""Releases that are nearer to an earlier one of another owner than noise leaves them.

Certain copies.  The squared distance of an honest S_j from the line through S_i, in units of s_j^2, is chi-square with D - 1 degrees of
freedom at least, whatever S_i is, since the noise of S_j was drawn afterwards: what lies below any quantile of that is a copy, scaled or
not, with less than about half of its noise on top.  Nobody can publish what makes a later honest release look like one.
Suspicious pairs, for a person.  Of two honest ones, ||S_i - S_j||^2 / (s_i^2 + s_j^2) is chi-square with D degrees of freedom at least,
and S_i lies as far from the line through S_j as S_j from its own.  What is nearer is a copy with more noise on top, or scaled up before
noise was added; or it is honest, and the *earlier* one was made without the noise that it states, as bait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.notices import Notice, first_keys
from protocol.release import Release

FALSE_ALARM = 1e-6  # probability that a market of honest releases has a pair that is taken for a copy
PAIRS_AT_ONCE = 1024


class Copies:
    """The releases of one market, in the order of its log, ready to be compared.

    notices: its own; an owner that rotated its key is the same one, and renews its releases under the new key.
    """

    def __init__(self, releases: Sequence[Release], notices: Sequence[Notice] = ()) -> None:
        from scipy.stats import chi2

        sums = [release.specification.noisy_sums[1:] for release in releases]
        self._sums = np.array(sums, np.float64) if sums else np.zeros((0, 2))
        self._variances = np.array([float(release.specification.noise_variance) for release in releases])
        first = first_keys(notices)
        self._owners = np.unique([first.get(release.owner, release.owner).hex() for release in releases], return_inverse=True)[1]
        self._norms = (self._sums**2).sum(axis=1)
        level = FALSE_ALARM / (3 * max(len(releases) * (len(releases) - 1) / 2, 1))
        dimension = self._sums.shape[1]
        self._least, self._least_off_line = (float(chi2.ppf(level, degrees)) for degrees in (dimension, dimension - 1))

    def original_of(self, later: int) -> int | None:
        """Return the first release that one is certainly a copy of, or None."""
        _, off_line = self._off_lines(slice(later, later + 1), later)
        certain = off_line[0] < self._least_off_line * self._variances[later]
        found = np.flatnonzero(certain & (self._owners[:later] != self._owners[later]))
        return int(found[0]) if len(found) else None

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield (later, earlier) of each suspicious pair."""
        for start in range(0, len(self._sums), PAIRS_AT_ONCE):
            block = slice(start, start + PAIRS_AT_ONCE)
            products, off_line = self._off_lines(block, len(self._sums))
            own, variances = self._norms[block, None], self._variances[block, None]
            near = own + self._norms[None] - 2 * products < self._least * (variances + self._variances[None])
            near |= off_line < self._least_off_line * variances
            near |= self._norms[None] - products**2 / np.maximum(own, 1) < self._least_off_line * self._variances[None]
            near &= self._owners[block, None] != self._owners[None]
            for row, earlier in zip(*np.nonzero(near), strict=True):
                if earlier < row + start:
                    yield int(row) + start, int(earlier)

    def _off_lines(self, block: slice, before: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return inner products of a block with the first `before`, and squared distances from the lines through these: (block, before)."""
        products: NDArray[np.float64] = self._sums[block] @ self._sums[:before].T
        off_line: NDArray[np.float64] = self._norms[block, None] - products**2 / np.maximum(self._norms[:before], 1)[None]
        return products, off_line
