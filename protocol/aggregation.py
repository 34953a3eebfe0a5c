"""Aggregates: what all standing releases say together, for browsing (docs/protocol.md 6.21).

    share       what one release adds to a sum, in whole numbers
    group       the sum of some shares as people read it: the federation, a domain
    aggregates  all groups and the tree over the releases at one state of the log, as canonical bytes

The estimator.  By the model of the score (5.1) a release's noisy mean x_i = mu~_i - g lies around the mean of its group with variance
tau2 + t_i a coordinate, t_i = w2/n~_i + sigma_i^2 + (what an error in n~_i does to the mean)/D.  The mean of a group is weighted by the
inverse of that:  m = sum k_i x_i / sum k_i,  k_i = tau2/(tau2 + w2/n~_i + sigma_i^2),  the k_i of the score.  Noise and sampling leave in
each coordinate of m the variance  e = sum k_i^2 t_i / (sum k_i)^2.  No release weighs more than an exact one, whatever number of records
it claims.

Everything is made of released numbers, so it costs no budget (docs/privacy.md), and anybody recomputes it.  Sums are whole numbers, which
do not depend on the order of what came and went; what is divided is rounded at once.  Every machine gets the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from protocol.catalogue import centred_means, count_deviations, rounded_counts
from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidProof, InvalidSignature
from protocol.features import FeatureMap
from protocol.release import NAME, Release
from protocol.specification import FEATURE_SCALE, Specification
from protocol.transparency import HASH_BYTES

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TAG = domain_tag("aggregates", 1)
WEIGHT_SCALE = 1 << 24  # of k_i, and of k_i x_i
VARIANCE_SCALE = 1 << 40  # of k_i^2 t_i
CENTRE_SCALE = 1 << 20  # of a group's mean
LARGEST_CENTRE = (1 << 31) - 1
POINT_SCALE = 1 << 12  # of a release's mean where leaves are formed: products of 4096 coordinates below 2^15 are exact in doubles
LARGEST_SHARE = 1 << 27  # of a coordinate: |k_i x_i| up to 8, an honest one stays below 1
NUMBERS = 5  # of a share before its coordinates: releases, units, weight, noise, sampling
MAX_DOMAINS, MAX_LEAVES = 128, 256
ROUNDS = 8
BLOCK = 4096
OTHERS = "*"  # the domains that have no place of their own
TITLE = re.compile(NAME.pattern + "@[0-9a-f]{8}")
LARGEST = (1 << 53) - 1

Total = NDArray[np.int64]
"""A sum of shares, (NUMBERS + D,)."""


def domain_of(name: str) -> str:
    """Return the domain that a learnware's name states: what stands before the first '-', '.' or '_', or all of it."""
    return re.split(r"[-._]", name, maxsplit=1)[0]


# Shares and groups --------------------------------------------------------------------------------------------------------


def shares_of(specifications: Sequence[Specification], feature_map: FeatureMap) -> NDArray[np.int64]:
    """Return the share of each specification, (N, NUMBERS + D): 1, n~, k, k^2 of its noise, k^2 of its sampling, then k x.

    Additions, products, quotients and square roots of doubles alone, so that every machine gives the same integers.
    """
    constants, dimension = feature_map.full, feature_map.dimension
    shares = np.zeros((len(specifications), NUMBERS + dimension), np.int64)
    if not specifications:
        return shares
    variances = np.array([float(specification.noise_variance) for specification in specifications])
    counts = rounded_counts(specifications, feature_map).astype(np.float64)
    sigma = variances / (FEATURE_SCALE * counts) ** 2
    sampling = constants.within / counts
    weights = np.maximum(np.rint(WEIGHT_SCALE * (constants.between / (constants.between + sampling + sigma))), 1.0)
    exact = weights / WEIGHT_SCALE
    stretch = constants.norm * (count_deviations(counts, variances, feature_map) / counts) ** 2 / dimension
    shares[:, 0], shares[:, 1], shares[:, 2] = 1, np.rint(counts), weights
    shares[:, 3] = np.rint(VARIANCE_SCALE * (exact**2 * (sigma + stretch)))
    shares[:, 4] = np.rint(VARIANCE_SCALE * (exact**2 * sampling))
    coordinates = np.rint(weights[:, None] * centred_means(specifications, feature_map))
    shares[:, NUMBERS:] = np.clip(coordinates, -LARGEST_SHARE, LARGEST_SHARE)
    return shares


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some releases together.  What a group of nothing says of its mean is zero, with a variance beyond all bounds."""

    name: str
    releases: int
    units: int  # sum of n~, rounded
    weight: int  # sum of k_i
    noise: int  # sum of k_i^2 of what noise does to x_i
    sampling: int  # sum of k_i^2 w2/n~_i
    centre: NDArray[np.int64]  # (D,), the mean m

    @classmethod
    def of(cls, name: str, total: Total) -> Group:
        """Return the group of a sum of shares."""
        releases, units, weight, noise, sampling = (int(number) for number in total[:NUMBERS])
        # Cut to what travels: a release that is nothing but noise, alone in its domain, must not keep a market from its statement.
        centre = np.clip(_rounded_mean(total, CENTRE_SCALE), -LARGEST_CENTRE, LARGEST_CENTRE)
        return cls(name, releases, units, weight, noise, sampling, centre)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """Releases, units, weight, noise, sampling."""
        return self.releases, self.units, self.weight, self.noise, self.sampling

    @property
    def mean(self) -> NDArray[np.float64]:
        """m, (D,), with the map's task mean g taken off."""
        return self.centre / CENTRE_SCALE

    @property
    def noise_variance(self) -> float:
        """What noise leaves in each coordinate of the mean."""
        return self._of_mean(self.noise)

    @property
    def variance(self) -> float:
        """What noise and sampling leave in each coordinate of the mean: e."""
        return self._of_mean(self.noise + self.sampling)

    def _of_mean(self, sum_of_squares: int) -> float:
        return (sum_of_squares / VARIANCE_SCALE) / (self.weight / WEIGHT_SCALE) ** 2 if self.weight else math.inf

    def effective_units(self, feature_map: FeatureMap) -> float:
        """Return how many units without noise would give as exact a mean: w2/e."""
        return feature_map.full.within / self.variance if self.releases else 0.0


def _rounded_mean(totals: NDArray[np.int64], scale: int) -> NDArray[np.int64]:
    """Return the means of sums of shares on the grid 1/scale, (..., D); zeros where nothing was summed."""
    weights = np.maximum(totals[..., 2:3], 1).astype(np.float64)
    return np.rint(totals[..., NUMBERS:] / weights * scale).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two means are apart, without what noise and sampling add."""

    squared: float  # may be negative: what is expected of equal means is zero
    std: float

    def separation(self, feature_map: FeatureMap) -> tuple[float, float]:
        """Return it, and its standard deviation, as a share of the mean squared distance of unrelated tasks: 0 the same, 1 unrelated."""
        unrelated = 2 * feature_map.dimension * feature_map.full.between
        return self.squared / unrelated, self.std / unrelated


def distance(one: Group, other: Group) -> Distance:
    """Return the debiased squared distance of two groups that share no release: ||m_1 - m_2||^2 - D (e_1 + e_2)."""
    apart = float(((one.mean - other.mean) ** 2).sum())
    error, dimension = one.variance + other.variance, len(one.centre)
    squared = apart - dimension * error
    return Distance(squared, math.sqrt(2 * dimension * error**2 + 4 * max(squared, 0.0) * error))


class Totals:
    """Sums of shares by domain, to which releases come and from which they go, in any order."""

    def __init__(self, dimension: int) -> None:
        self._everything: Total = np.zeros(NUMBERS + dimension, np.int64)
        self._sums: dict[str, Total] = {}

    def add(self, domain: str, share: Total) -> None:
        """Take a release in."""
        self._everything = self._everything + share
        self._sums[domain] = self._sums[domain] + share if domain in self._sums else share.copy()

    def remove(self, domain: str, share: Total) -> None:
        """Take a release out that was taken in."""
        self._everything = self._everything - share
        left = self._sums[domain] - share
        if left[0]:
            self._sums[domain] = left
        else:
            del self._sums[domain]

    def groups(self) -> tuple[Group, tuple[Group, ...]]:
        """Return the federation, and the domains by name; beyond MAX_DOMAINS those with the fewest releases are one group."""
        order = sorted(self._sums, key=lambda domain: (-int(self._sums[domain][0]), domain))
        shown, rest = order[:MAX_DOMAINS], order[MAX_DOMAINS:]
        if rest:
            shown, rest = order[: MAX_DOMAINS - 1], order[MAX_DOMAINS - 1 :]
        groups = [Group.of(domain, self._sums[domain]) for domain in sorted(shown)]
        if rest:
            groups.insert(0, Group.of(OTHERS, np.sum([self._sums[domain] for domain in rest], axis=0)))
        return Group.of("", self._everything), tuple(groups)


# The tree -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leaf:
    """Releases that the tree does not tell apart: one, where there are at most MAX_LEAVES."""

    title: str  # of the release nearest to the leaf's mean
    releases: int

    @property
    def domain(self) -> str:
        """The domain of the release that it is called after."""
        return domain_of(self.title.partition("@")[0])


@dataclass(frozen=True, slots=True)
class Merge:
    """Two branches become one.  Leaves have the numbers from 0 on, merges those after them, in order."""

    left: int
    right: int
    height: int  # mean debiased squared distance between their leaves, on the grid of CENTRE_SCALE^-2; at least 0, and never falling


def tree_of(shares: NDArray[np.int64], titles: Sequence[str], domains: Sequence[str]) -> tuple[tuple[Leaf, ...], tuple[Merge, ...]]:
    """Return the tree over releases in the order of the log: shares (N, NUMBERS + D), their titles and domains.

    At most MAX_LEAVES releases are a leaf each; more are gathered by k-means with the weights of the estimator, ROUNDS rounds from releases
    that are evenly spread over the domains.
    """
    if not len(shares):
        return (), ()
    members = np.arange(len(shares)) if len(shares) <= MAX_LEAVES else _gathered(shares, domains)
    totals = _totals(shares, members)
    nearest = np.arange(len(shares)) if len(shares) <= MAX_LEAVES else _nearest(shares, members, totals)
    leaves = tuple(Leaf(titles[at], int(total[0])) for at, total in zip(nearest, totals, strict=True))
    return leaves, _merged(_distances(totals), [int(total[2]) for total in totals])


def _totals(shares: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.int64]:
    totals = np.zeros((int(members.max()) + 1, shares.shape[1]), np.int64)
    np.add.at(totals, members, shares)
    return totals


def _points(shares: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return means on a coarse grid, whole numbers below 2^15, so that sums of products are exact in any order: a BLAS has its own."""
    return np.clip(_rounded_mean(shares, POINT_SCALE), -(1 << 15), 1 << 15).astype(np.float64)


def _to_centres(shares: NDArray[np.int64], totals: NDArray[np.int64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield ||x - m||^2 of blocks of releases to all centres, (BLOCK, K); whole numbers."""
    centres = _points(totals)
    norms = (centres**2).sum(axis=1)
    for start in range(0, len(shares), BLOCK):
        block = slice(start, start + BLOCK)
        points = _points(shares[block])
        yield block, (points**2).sum(axis=1)[:, None] + norms - 2 * (points @ centres.T)


def _gathered(shares: NDArray[np.int64], domains: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of the leaf of each release, (N,); leaves are numbered by their first release."""
    order = sorted(range(len(shares)), key=lambda at: (domains[at], at))
    totals = shares[[order[place * len(order) // MAX_LEAVES] for place in range(MAX_LEAVES)]]
    members = np.full(len(shares), -1)
    for _ in range(ROUNDS):
        before, members = members, np.empty(len(shares), np.int64)
        for block, squares in _to_centres(shares, totals):
            members[block] = squares.argmin(axis=1)  # the first of equals
        _, firsts, numbers = np.unique(members, return_index=True, return_inverse=True)  # a leaf that nobody is in is dropped
        members = np.argsort(np.argsort(firsts))[numbers]
        if (members == before).all():
            break
        totals = _totals(shares, members)
    return members


def _nearest(shares: NDArray[np.int64], members: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return which release of each leaf is nearest to its mean; the first of equals."""
    own = np.empty(len(shares))
    for block, squares in _to_centres(shares, totals):
        own[block] = np.take_along_axis(squares, members[block, None], axis=1)[:, 0]
    order = np.lexsort((own, members))
    return order[np.searchsorted(members[order], np.arange(len(totals)))]


def _distances(totals: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the debiased squared distances of sums of shares, (K, K), on the grid of CENTRE_SCALE^-2."""
    centres = np.clip(_rounded_mean(totals, CENTRE_SCALE), -8 * CENTRE_SCALE, 8 * CENTRE_SCALE)
    dimension = centres.shape[1]
    variances = (totals[:, 3] + totals[:, 4]) / VARIANCE_SCALE / (np.maximum(totals[:, 2], 1) / WEIGHT_SCALE) ** 2
    errors = np.rint(np.minimum(dimension * variances, 1 << 10) * CENTRE_SCALE**2).astype(np.int64)  # 2^50 at most
    distances = np.empty((len(totals), len(totals)), np.int64)
    for row, centre in enumerate(centres):
        distances[row] = ((centres - centre) ** 2).sum(axis=1) - errors - errors[row]
    return distances


def _merged(distances: NDArray[np.int64], weights: list[int]) -> tuple[Merge, ...]:
    """Return the merges of agglomerative clustering with average linkage (UPGMA), the average weighted by the leaves' weights.

    Sums are exact and each average is rounded once, so ties fall alike everywhere: to the first pair.  A library's linkage (scipy) rounds
    averages of averages, in an order that its build chooses; what is signed and recomputed by others must not depend on that.
    """
    count = len(weights)
    sums = distances.astype(object) * np.outer(np.array(weights, object), np.array(weights, object))
    averages = distances.astype(np.float64)
    averages[np.tril_indices(count)] = np.inf
    names, merges = list(range(count)), list[Merge]()
    for step in range(count - 1):
        into, gone = (int(at) for at in np.unravel_index(int(averages.argmin()), averages.shape))
        # Never below the merge before: averages grow, but of two that round to one double the first pair goes first.
        height = max(int(sums[into, gone]) // (weights[into] * weights[gone]), merges[-1].height if merges else 0)
        merges.append(Merge(min(names[into], names[gone]), max(names[into], names[gone]), height))
        names[into] = count + step
        weights[into] += weights[gone]
        sums[into] = sums[into] + sums[gone]
        sums[:, into] = sums[into]
        averages[gone, :] = averages[:, gone] = np.inf
        for other in range(count):
            pair = (into, other) if into < other else (other, into)
            if other != into and np.isfinite(averages[pair]):
                averages[pair] = int(sums[into, other]) / (weights[into] * weights[other])  # Python rounds the quotient of integers once
    return tuple(merges)


# The statement ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class State:
    """What aggregates are made of: so many releases of the log, without those that so many notices took back."""

    map_id: bytes
    size: int
    root: bytes
    notices_size: int
    notices_root: bytes


@dataclass(frozen=True, eq=False)
class Aggregates:
    """What all standing releases say together, at one state of a market."""

    state: State
    federation: Group
    domains: tuple[Group, ...]  # by name, OTHERS first
    leaves: tuple[Leaf, ...]
    merges: tuple[Merge, ...]

    @cached_property
    def body(self) -> bytes:
        """Canonical bytes (docs/protocol.md 1): what a market signs."""
        state = self.state
        metadata = {
            "domains": [[group.name, *group.numbers] for group in self.domains],
            "leaves": [[leaf.title, leaf.releases] for leaf in self.leaves],
            "merges": [[merge.left, merge.right, merge.height] for merge in self.merges],
            "notices": state.notices_size,
            "size": state.size,
        }
        centres = np.array([self.federation.centre, *(group.centre for group in self.domains)])
        return encode(TAG, metadata, state.map_id + state.root + state.notices_root + centres.astype("<i4").tobytes())

    def nearest(self, group: Group, feature_map: FeatureMap) -> list[tuple[float, float, Group]]:
        """Return the other domains by their separation from this one, each with separation and its standard deviation."""
        others = [other for other in self.domains if other is not group]
        return sorted(((*distance(group, other).separation(feature_map), other) for other in others), key=lambda entry: entry[0])


def aggregate(totals: Totals, shares: NDArray[np.int64], titles: Sequence[str], domains: Sequence[str], state: State) -> Aggregates:
    """Return the aggregates of the releases that stand, which are those of `totals`, in the order of the log."""
    return Aggregates(state, *totals.groups(), *tree_of(shares, titles, domains))


def aggregates_of(releases: Sequence[Release], gone: Collection[bytes], feature_map: FeatureMap, state: State) -> Aggregates:
    """Return the aggregates of all releases of a log but those taken back, from scratch: what an auditor does."""
    standing = [release for release in releases if release.release_id not in gone]
    shares = shares_of([release.specification for release in standing], feature_map)
    domains = [domain_of(release.card.name) for release in standing]
    totals = Totals(feature_map.dimension)
    for domain, share in zip(domains, shares, strict=True):
        totals.add(domain, share)
    return aggregate(totals, shares, [release.title for release in standing], domains, state)


def sign_aggregates(body: bytes, market_key: Ed25519PrivateKey) -> bytes:
    """Return the market's signature, 64 bytes."""
    return market_key.sign(body)


def open_aggregates(body: bytes, signature: bytes, market_key: bytes) -> Aggregates:
    """Return the aggregates if the market signed exactly these; raise InvalidSignature or FormatError.  Nothing is recomputed here."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(market_key).verify(signature, body)
    except (BadSignature, ValueError):
        raise InvalidSignature("aggregates: the market's signature does not verify") from None
    return parse_aggregates(body)


def parse_aggregates(body: bytes) -> Aggregates:
    """Return the aggregates of their canonical bytes; raise FormatError for any others."""
    metadata, payload = decode(TAG, body)
    fields = {"domains": list, "leaves": list, "merges": list, "notices": int, "size": int}
    rows, leaf_rows, merge_rows, notices_size, size = take(metadata, fields, "aggregates")
    ids = [payload[start : start + HASH_BYTES] for start in range(0, 3 * HASH_BYTES, HASH_BYTES)]
    centres = payload[3 * HASH_BYTES :]
    if len(rows) > MAX_DOMAINS or not centres or len(centres) % (4 * (len(rows) + 1)):
        raise FormatError(f"aggregates: expected three digests, and a mean of the federation and each of at most {MAX_DOMAINS} domains")
    means = np.frombuffer(centres, "<i4").astype(np.int64).reshape(len(rows) + 1, -1)
    if not (0 <= size <= LARGEST and 0 <= notices_size <= LARGEST):
        raise FormatError("aggregates: expected sizes that are not negative")
    named = [_entry(row, str, NUMBERS, "domain") for row in rows]
    domains = tuple(Group(a, b, c, d, e, f, centre) for (a, b, c, d, e, f), centre in zip(named, means[1:], strict=True))
    names = [group.name for group in domains]
    if names != sorted(set(names)) or any(name != OTHERS and not NAME.fullmatch(name) for name in names):
        raise FormatError("aggregates: expected domains in order and once each")
    leaves = tuple(Leaf(*_entry(row, str, 1, "leaf")) for row in leaf_rows)
    if len(leaves) > MAX_LEAVES or any(not TITLE.fullmatch(leaf.title) for leaf in leaves):
        raise FormatError(f"aggregates: expected at most {MAX_LEAVES} leaves with titles of releases")
    merges = tuple(Merge(*_entry(row, int, 2, "merge")) for row in merge_rows)
    _require_tree(len(leaves), merges)
    together = np.array([group.numbers for group in domains], np.int64).reshape(-1, NUMBERS).sum(axis=0)
    releases, units, weight, noise, sampling = (int(number) for number in together)
    everything = Group("", releases, units, weight, noise, sampling, means[0])
    if not everything.releases == sum(leaf.releases for leaf in leaves) <= size:
        raise FormatError("aggregates: expected every standing release in one domain and one leaf")
    aggregates = Aggregates(State(ids[0], size, ids[1], notices_size, ids[2]), everything, domains, leaves, merges)
    if aggregates.body != body:
        raise FormatError("aggregates: not in canonical form")
    return aggregates


def _entry(row: object, first: type, more: int, what: str) -> list[Any]:
    """Return an entry of one value and so many whole numbers, none negative; raise FormatError for anything else."""
    if not isinstance(row, list) or len(row) != more + 1 or not isinstance(row[0], first):
        raise FormatError(f"aggregates.{what}: expected {more + 1} values")
    numbers = row[1:] if first is str else row
    if any(not isinstance(number, int) or not 0 <= number <= LARGEST for number in numbers):
        raise FormatError(f"aggregates.{what}: expected whole numbers that are not negative")
    return row


def _require_tree(leaves: int, merges: Sequence[Merge]) -> None:
    """Raise FormatError unless all leaves come together, each branch taken once, at heights that do not fall."""
    parts = [part for merge in merges for part in (merge.left, merge.right)]
    whole = len(merges) == max(leaves - 1, 0) and len(set(parts)) == len(parts)
    if not whole or any(not merge.left < merge.right < leaves + step for step, merge in enumerate(merges)):
        raise FormatError("aggregates: expected merges of earlier branches, each once")
    heights = [merge.height for merge in merges]
    if heights != sorted(heights):
        raise FormatError("aggregates: expected merges in the order of their heights")


def require_honest(signed: Aggregates, releases: Sequence[Release], gone: Collection[bytes], feature_map: FeatureMap) -> None:
    """Raise InvalidProof unless these are the aggregates of the releases of the log at their state, recomputed.

    The caller has verified that the releases, and what is gone, are those under the roots that the state names.
    """
    if aggregates_of(releases, gone, feature_map, signed.state).body != signed.body:
        raise InvalidProof(
            "aggregates: the market signed other numbers than its own releases give",
            hint="the statement and the releases prove it: keep the folder `catalogues` and ask the market's operator",
        )
