"""The catalogue: the public scalars of every release, in one order, bound by one signature (docs/protocol.md 6.2).

A row holds exact integers, the card's name and the privacy unit, all of which anyone can recompute from the release, so a market that
publishes a wrong row has signed the proof.  Name and unit are there so that a ranking can be read without fetching a release, which
would show the interest.

    row = scalars (dtype ROW) || name in ASCII || (a blank and the unit, unless it is "record")

Heads chain the rows:  head_0 = 0,  head_k = SHA-256(head_{k-1} || row_k).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.codec import domain_tag
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, UsageError
from protocol.features import CENTRE_SCALE, VIEWS, FeatureMap
from protocol.privacy import RECORD, PrivacyUnit
from protocol.release import NAME, Release
from protocol.specification import COUNT_STEP, FEATURE_SCALE, Specification

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TAG = domain_tag("catalogue", 1)
EMPTY_HEAD = bytes(32)
ROW = np.dtype(
    [
        ("release_id", "u1", (32,)),
        ("count", "<i4"),  # S_0
        ("noise_variance", "<u8"),  # s^2
        ("squares", "<u8", (len(VIEWS),)),  # sum of S_j^2 over the view's coordinates
        ("products", "<i8", (len(VIEWS),)),  # sum of G_j S_j, G the map's task mean on its integer grid
    ]
)


@dataclass(frozen=True, slots=True)
class Head:
    """A signed state of the catalogue."""

    size: int
    head: bytes
    signature: bytes

    @property
    def signed_bytes(self) -> bytes:
        """What the market signs."""
        return TAG + self.size.to_bytes(8, "little") + self.head


def sign_head(size: int, head: bytes, market_key: Ed25519PrivateKey) -> Head:
    """Return the signed head of a catalogue of `size` rows."""
    return Head(size, head, market_key.sign(Head(size, head, b"").signed_bytes))


def verify_head(head: Head, market_key: bytes) -> None:
    """Raise InvalidSignature unless the market signed this head."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(market_key).verify(head.signature, head.signed_bytes)
    except (BadSignature, ValueError):
        raise InvalidSignature("catalogue: the market's signature does not verify") from None


def extend_head(head: bytes, rows: Iterable[bytes]) -> bytes:
    """Return the head after appending these rows."""
    for row in rows:
        head = hashlib.sha256(head + row).digest()
    return head


def row_of(release: Release, feature_map: FeatureMap) -> bytes:
    """Return the catalogue row of a release; raise IncompatibleSpecification for another map, FormatError for sums out of range."""
    specification = release.specification
    if specification.map_id != feature_map.map_id:
        raise IncompatibleSpecification(f"map: expected {feature_map.map_id.hex()[:16]}, got {specification.map_id.hex()[:16]}")
    if specification.dimension != feature_map.dimension:
        raise IncompatibleSpecification(f"dimension: expected {feature_map.dimension}, got {specification.dimension}")
    sums = [int(s) for s in specification.noisy_sums[1:]]
    centre = [int(g) for g in feature_map.centre]
    step = feature_map.view_dimension
    views = [slice(start, start + step) for start in range(0, feature_map.dimension, step)]
    squares = [sum(s * s for s in sums[view]) for view in views]
    products = [sum(g * s for g, s in zip(centre[view], sums[view], strict=True)) for view in views]
    if max(squares) >= 1 << 62 or max(map(abs, products)) >= 1 << 62 or specification.noise_variance >= 1 << 62:
        raise FormatError("specification: sums too large for any data set")
    row = np.zeros((), ROW)
    row["release_id"] = np.frombuffer(release.release_id, np.uint8)
    row["count"], row["noise_variance"] = int(specification.noisy_sums[0]), specification.noise_variance
    row["squares"], row["products"] = squares, products
    return row.tobytes() + label_of(release.card.name, specification.guarantee.unit)


def label_of(name: str, unit: PrivacyUnit) -> bytes:
    """Return the text at the end of a row: the name, and the privacy unit unless that is the record."""
    return (name if unit == RECORD else f"{name} {unit}").encode("ascii")


def _parse_label(text: bytes) -> tuple[str, PrivacyUnit]:
    name, blank, unit = text.decode("ascii", "replace").partition(" ")
    if not NAME.fullmatch(name):
        raise FormatError("catalogue row: expected a name after the scalars")
    try:
        parsed = PrivacyUnit.parse(unit) if blank else RECORD
    except UsageError as error:
        raise FormatError(f"catalogue row: {error}") from None
    if blank and parsed == RECORD:
        raise FormatError("catalogue row: the unit 'record' is not written")
    return name, parsed


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The public scalars of N releases that a score is made of."""

    counts: NDArray[np.float64]  # estimated number of privacy units, at least 1
    count_stds: NDArray[np.float64]  # standard deviation of that estimate
    noise_stds: NDArray[np.float64]  # of each coordinate of the mean
    norms_squared: NDArray[np.float64]  # ||mu_i - g||^2 over the views in use


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The public scalars of all releases of one map, as a querier holds them."""

    feature_map: FeatureMap
    rows: NDArray[np.void]  # (N,), dtype ROW
    names: tuple[str, ...]
    head: Head
    units: tuple[PrivacyUnit, ...] = ()  # as many as names; empty where every one is the record

    def unit_of(self, position: int) -> PrivacyUnit:
        """Return the privacy unit of the release at a position."""
        return self.units[position] if self.units else RECORD

    @property
    def release_ids(self) -> list[bytes]:
        """Ids in catalogue order."""
        return [bytes(row) for row in self.rows["release_id"]]

    def columns(self, views: int) -> Columns:
        """Return what scoring needs of every release, for a query with this many views."""
        squares, products = self.rows["squares"].astype(np.float64), self.rows["products"].astype(np.float64)
        variances = self.rows["noise_variance"].astype(np.float64)
        counts, stds = estimate_counts(self.rows["count"].astype(np.float64), squares.sum(axis=1), variances, self.feature_map)
        scale = FEATURE_SCALE * counts
        centre = self.feature_map.task_mean[: views * self.feature_map.view_dimension]
        squared, product = squares[:, :views].sum(axis=1), products[:, :views].sum(axis=1)
        norms = squared / scale**2 - 2 * product / (CENTRE_SCALE * scale) + float(centre @ centre)
        return Columns(counts, stds, np.sqrt(variances) / scale, norms)


def open_rows(feature_map: FeatureMap, known: Sequence[bytes], new: Sequence[bytes], head: Head, market_key: bytes) -> Catalogue:
    """Return the catalogue of `known` followed by `new` rows if the market signed exactly these; raise otherwise.  No IO."""
    verify_head(head, market_key)
    rows = [*known, *new]
    if not all(ROW.itemsize < len(row) for row in rows):
        raise FormatError(f"catalogue row: expected {ROW.itemsize} bytes of scalars and a name")
    labels = [_parse_label(row[ROW.itemsize :]) for row in rows]
    if head.size != len(rows) or extend_head(EMPTY_HEAD, rows) != head.head:
        raise FormatError(f"catalogue: expected {head.size} rows under the signed head, got {len(rows)} that do not give it")
    scalars = np.frombuffer(b"".join(row[: ROW.itemsize] for row in rows), ROW)
    return Catalogue(feature_map, scalars, tuple(name for name, _ in labels), head, tuple(unit for _, unit in labels))


def estimate_counts(
    noisy_counts: NDArray[np.float64], squares: NDArray[np.float64], variances: NDArray[np.float64], feature_map: FeatureMap
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the estimated numbers of privacy units (N,) and their standard deviations (N,): docs/protocol.md 3.4.

    noisy_counts: S_0.  squares: sum of S_j^2 over all coordinates.  variances: s^2.
    The noisy count alone has a deviation of 17 units at epsilon 1.  The length of the sums knows the number as well, since ||mu||^2
    differs little between tasks; both estimates are weighted by their inverse variances, which depend on the number: four rounds.
    """
    norm, spread = feature_map.full.norm, feature_map.full.norm_std / (2 * feature_map.full.norm)
    noise = variances / FEATURE_SCALE**2
    from_count, count_variance = noisy_counts / COUNT_STEP, variances / COUNT_STEP**2
    signal = squares / FEATURE_SCALE**2 - feature_map.dimension * noise
    from_length = np.sqrt(np.maximum(signal, 0.0) / norm)
    number = np.maximum((from_count + from_length) / 2, 1.0)
    for _ in range(4):
        of_signal = 2 * feature_map.dimension * noise**2 + 4 * noise * norm * number**2
        length_variance = (spread * number) ** 2 + of_signal / (2 * norm * number) ** 2
        weight = 1 / count_variance + 1 / length_variance
        number = np.maximum((from_count / count_variance + from_length / length_variance) / weight, 1.0)
    return number, np.sqrt(1 / weight)


def centred_means(specifications: Sequence[Specification], feature_map: FeatureMap) -> NDArray[np.float64]:
    """Return mu - g of each specification, (N, D): the rows that matching multiplies with a query."""
    if not specifications:
        return np.zeros((0, feature_map.dimension))
    sums = np.array([specification.noisy_sums for specification in specifications], np.float64)
    variances = np.array([specification.noise_variance for specification in specifications], np.float64)
    counts, _ = estimate_counts(sums[:, 0], (sums[:, 1:] ** 2).sum(axis=1), variances, feature_map)
    means: NDArray[np.float64] = sums[:, 1:] / (FEATURE_SCALE * counts[:, None]) - feature_map.task_mean
    return means


def columns_of(specifications: Sequence[Specification], feature_map: FeatureMap, views: int) -> Columns:
    """Return the public scalars of specifications without a catalogue; within rounding those of their rows."""
    sums = np.array([specification.noisy_sums for specification in specifications], np.float64)
    variances = np.array([specification.noise_variance for specification in specifications], np.float64)
    counts, stds = estimate_counts(sums[:, 0], (sums[:, 1:] ** 2).sum(axis=1), variances, feature_map)
    used = centred_means(specifications, feature_map)[:, : views * feature_map.view_dimension]
    return Columns(counts, stds, np.sqrt(variances) / (FEATURE_SCALE * counts), (used**2).sum(axis=1))
