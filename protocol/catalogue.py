"""The catalogue: the public scalars of every release, in one order, bound by one signature (docs/protocol.md 6.2).

    rows    16 bytes a release: all that a ranking needs, and the number of its terms
    terms   what many releases share (noise, guarantee, base model, licence): each entry travels once
    cards   id and name of each release, in pages of PAGE_SIZE: a page is fetched whole, so that nobody shows which card was wanted

Every byte can be recomputed from the releases, so a market that publishes a wrong one has signed the proof.

    chain_0 = 0,  chain_k = SHA-256(chain_{k-1} || entry_k)         of the rows, of the terms, and of the cards of each page
    cards   = SHA-256(chain of page 0 || chain of page 1 || ...)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from protocol.codec import decode, domain_tag, encode, format_decimal, parse_decimal, take
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, NotFound, UsageError
from protocol.features import CENTRE_SCALE, VIEWS, FeatureMap
from protocol.privacy import GUARANTEE_TEXT, Guarantee, NeighbouringRelation, PrivacyUnit, noise_variance
from protocol.release import NAME, Release
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, Specification
from protocol.window import Window

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TAG = domain_tag("catalogue", 2)
TERMS = domain_tag("terms", 2)
ADAPTER_EPSILON = re.compile(r"epsilon (\d+(?:\.\d+)?(?:e-?\d+)?) at ")
NAMES = re.compile(rf"(?:{NAME.pattern}\n)*{NAME.pattern}")  # of many cards, a name a line: one search for all of them
EMPTY_HEAD = bytes(32)
PAGE_SIZE = 4096  # cards chained and fetched together
MAX_TERMS_BYTES = 4096
MAX_TERMS = 1 << 16  # of a catalogue: a market takes no more, since its clients would not
ROW = np.dtype(
    [
        ("count", "<f4"),  # n~, rounded before the mean is formed, so that everybody derives the same mean
        ("norms_squared", "<f4", (len(VIEWS),)),  # ||mu~ - g||^2 of each view
        ("terms", "<u4"),  # number of its entry among the terms, which stand in the order of their first use
    ]
)
SCALARS_BYTES = ROW.fields["terms"][1] if ROW.fields is not None else 0  # a row without the number of its terms


@dataclass(frozen=True, slots=True)
class Head:
    """A signed state of the catalogue."""

    size: int  # releases
    rows: bytes  # chain over the rows
    terms_size: int
    terms: bytes  # chain over the terms
    cards: bytes  # SHA-256 over the chains of all pages
    signature: bytes

    @property
    def signed_bytes(self) -> bytes:
        """What the market signs."""
        return TAG + self.size.to_bytes(8, "little") + self.terms_size.to_bytes(4, "little") + self.rows + self.terms + self.cards

    @property
    def digest(self) -> bytes:
        """The name of this state, SHA-256 of what is signed: it binds every release, since the cards hold their ids."""
        return hashlib.sha256(self.signed_bytes).digest()


EMPTY_CATALOGUE = Head(0, EMPTY_HEAD, 0, EMPTY_HEAD, hashlib.sha256().digest(), b"")


def sign_head(head: Head, market_key: Ed25519PrivateKey) -> Head:
    """Return the head with the market's signature."""
    return replace(head, signature=market_key.sign(head.signed_bytes))


def verify_head(head: Head, market_key: bytes) -> None:
    """Raise InvalidSignature unless the market signed this head."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(market_key).verify(head.signature, head.signed_bytes)
    except (BadSignature, ValueError):
        raise InvalidSignature("catalogue: the market's signature does not verify") from None


def extend_head(head: bytes, entries: Iterable[bytes]) -> bytes:
    """Return the chain after appending these entries."""
    for entry in entries:
        head = hashlib.sha256(head + entry).digest()
    return head


def pages_of(size: int) -> int:
    """Return the number of pages of a catalogue of `size` releases."""
    return -(-size // PAGE_SIZE)


def root_of_pages(chains: Iterable[bytes]) -> bytes:
    """Return what binds all cards: SHA-256 over the chains of the pages in order."""
    return hashlib.sha256(b"".join(chains)).digest()


def name_of_map(map_id: bytes) -> str:
    """Return how a map is called for people: its name if it ships with veilmart, and the first digits of its id."""
    from protocol.features import shipped_map, shipped_maps

    names = [name for name in shipped_maps() if shipped_map(name).map_id == map_id]
    return f"{names[0]} ({map_id.hex()[:16]})" if names else map_id.hex()[:16]


# Entries ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """What many releases share, and what a querier may filter by without asking anybody."""

    noise_variance: int  # s^2
    guarantee: Guarantee
    base_model: bytes
    licence: str
    adapter_class: int  # bytes of the adapter rounded up to a power of two; 0 without one
    adapter_guarantee: str  # as people read it; empty without an adapter
    window: Window  # when its releases hold

    @classmethod
    def of(cls, release: Release) -> Terms:
        """Return the terms of a release."""
        specification, adapter = release.specification, release.adapter
        return cls(
            specification.noise_variance, specification.guarantee, release.base_model, release.card.licence,
            1 << (adapter.size_bytes - 1).bit_length() if adapter else 0, str(adapter.guarantee) if adapter else "",
            release.window,
        )  # fmt: skip

    @property
    def adapter_epsilon(self) -> float:
        """Epsilon of the adapter's guarantee; infinity without a guarantee, and without an adapter."""
        found = ADAPTER_EPSILON.match(self.adapter_guarantee)
        return float(found[1]) if found else math.inf

    @cached_property
    def body(self) -> bytes:
        """Canonical bytes (docs/protocol.md 1)."""
        metadata = {
            "adapter_class": self.adapter_class, "adapter_guarantee": self.adapter_guarantee, "delta": format_decimal(self.guarantee.delta),
            "epsilon": format_decimal(self.guarantee.epsilon), "licence": self.licence, "noise_variance": self.noise_variance,
            "relation": str(self.guarantee.relation), "unit": str(self.guarantee.unit), "valid_from": self.window.first,
            "valid_until": self.window.last,
        }  # fmt: skip
        return encode(TERMS, metadata, self.base_model)


def parse_terms(body: bytes) -> Terms:
    """Return the terms of their canonical bytes; raise FormatError for any other."""
    metadata, base_model = decode(TERMS, body)
    fields = {
        "adapter_class": int, "adapter_guarantee": str, "delta": str, "epsilon": str, "licence": str, "noise_variance": int,
        "relation": str, "unit": str, "valid_from": int, "valid_until": int,
    }  # fmt: skip
    adapter_class, adapter_guarantee, delta, epsilon, licence, variance, relation, unit, first, last = take(metadata, fields, "terms")
    if len(body) > MAX_TERMS_BYTES or len(base_model) != 32 or not 0 < variance < 1 << 62:
        raise FormatError(f"terms: expected at most {MAX_TERMS_BYTES} bytes, a base model of 32 and a plausible noise variance")
    if adapter_class < 0 or adapter_class & (adapter_class - 1) or bool(adapter_class) != bool(adapter_guarantee):
        raise FormatError("terms: expected a power of two and a guarantee for an adapter, 0 and nothing without one")
    if adapter_guarantee and not GUARANTEE_TEXT.fullmatch(adapter_guarantee):
        raise FormatError("terms.adapter_guarantee: expected 'none' or an epsilon with its delta and unit")
    try:
        numbers = parse_decimal(epsilon, "terms.epsilon"), parse_decimal(delta, "terms.delta")
        guarantee = Guarantee(*numbers, NeighbouringRelation(relation), PrivacyUnit.parse(unit))
    except (UsageError, ValueError):
        raise FormatError("terms: expected a guarantee that a release can have") from None
    if variance < (least := noise_variance(guarantee, NORM_SQUARED)):  # no release can have it, and its row would claim confidence
        raise FormatError(f"terms: expected a noise variance of at least {least} for this guarantee, got {variance}")
    terms = Terms(variance, guarantee, base_model, licence, adapter_class, adapter_guarantee, Window(first, last))
    if terms.body != body:
        raise FormatError("terms: not in canonical form")
    return terms


def scalars_of(release: Release, feature_map: FeatureMap) -> bytes:
    """Return a release's row without the number of its terms: n~ and ||mu~ - g||^2 of each view, float32.

    The norms are rational numbers of the integers and of the rounded n~, computed exactly and rounded once, so that every implementation
    gives the same bytes.  Raises IncompatibleSpecification for another map, FormatError for sums out of range.
    """
    specification = release.specification
    if specification.map_id != feature_map.map_id:
        raise IncompatibleSpecification(f"map: expected {feature_map.map_id.hex()[:16]}, got {specification.map_id.hex()[:16]}")
    if specification.dimension != feature_map.dimension:
        raise IncompatibleSpecification(f"dimension: expected {feature_map.dimension}, got {specification.dimension}")
    sums, centre = [int(s) for s in specification.noisy_sums[1:]], [int(g) for g in feature_map.centre]
    if sum(s * s for s in sums) >= 1 << 62 or specification.noise_variance >= 1 << 62:
        raise FormatError("specification: sums too large for any data set")
    row = np.zeros((), ROW)
    row["count"] = rounded_counts([specification], feature_map)[0]
    scale, step = FEATURE_SCALE * Fraction(float(row["count"])), feature_map.view_dimension
    for view in range(len(VIEWS)):
        own = range(view * step, (view + 1) * step)
        squares, products = sum(sums[j] ** 2 for j in own), sum(centre[j] * sums[j] for j in own)
        norm = (
            Fraction(squares) / scale**2
            - 2 * products / (CENTRE_SCALE * scale)
            + Fraction(sum(centre[j] ** 2 for j in own), CENTRE_SCALE**2)
        )
        row["norms_squared"][view] = float(norm)
    return row.tobytes()[:SCALARS_BYTES]


class CardEntry(NamedTuple):  # as `scoring.Match`
    """How a release is called."""

    release_id: bytes
    name: str

    @property
    def title(self) -> str:
        """NAME@HEX."""
        return f"{self.name}@{self.release_id.hex()[:8]}"

    @property
    def body(self) -> bytes:
        """id || u8 length || name in ASCII."""
        return self.release_id + bytes([len(self.name)]) + self.name.encode("ascii")


def card_of(release: Release) -> bytes:
    """Return the bytes of a release's card."""
    return CardEntry(release.release_id, release.card.name).body


def split_cards(data: bytes, count: int) -> list[bytes]:
    """Return exactly `count` cards that lie one after the other; raise FormatError for anything else."""
    cards: list[bytes] = []
    start = 0
    while start + 32 < len(data) and len(cards) < count:
        stop = start + 33 + data[start + 32]
        cards.append(data[start:stop])
        start = stop
    if start != len(data) or len(cards) != count:
        raise FormatError(f"cards: expected {count} of them, got {len(data)} bytes that hold another number")
    return cards


def parse_cards(bodies: Sequence[bytes]) -> list[CardEntry]:
    """Return the cards of their bytes; raise FormatError for a name that no release has."""
    if not bodies:
        return []
    lines = b"\n".join([body[33:] for body in bodies]).decode("ascii", "replace")
    names = lines.split("\n")
    whole = len(names) == len(bodies) and all(len(body) > 33 and len(body) == 33 + body[32] for body in bodies)
    if not (whole and NAMES.fullmatch(lines)):
        raise FormatError("card: expected an id of 32 bytes and a name")
    return [CardEntry(body[:32], name) for body, name in zip(bodies, names, strict=True)]


# Tables and catalogues ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """All entries of a catalogue, as anybody computes them from the releases."""

    rows: bytes
    terms: tuple[bytes, ...]
    cards: tuple[bytes, ...]

    def head(self) -> Head:
        """Return the head of exactly these entries, not signed."""
        rows = [self.rows[start : start + ROW.itemsize] for start in range(0, len(self.rows), ROW.itemsize)]
        pages = [extend_head(EMPTY_HEAD, self.cards[start : start + PAGE_SIZE]) for start in range(0, len(self.cards), PAGE_SIZE)]
        chain = extend_head(EMPTY_HEAD, self.terms)
        return Head(len(rows), extend_head(EMPTY_HEAD, rows), len(self.terms), chain, root_of_pages(pages), b"")


def tables_of(releases: Iterable[Release], feature_map: FeatureMap) -> Tables:
    """Return the tables of releases in this order."""
    rows, cards = bytearray(), []
    numbers: dict[bytes, int] = {}
    for release in releases:
        number = numbers.setdefault(Terms.of(release).body, len(numbers))
        rows += scalars_of(release, feature_map) + number.to_bytes(4, "little")
        cards.append(card_of(release))
    return Tables(bytes(rows), tuple(numbers), tuple(cards))


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The public scalars of N releases that a score is made of."""

    counts: NDArray[np.float64]  # estimated number of privacy units, at least 1
    count_stds: NDArray[np.float64]  # standard deviation of that estimate
    noise_stds: NDArray[np.float64]  # of each coordinate of the mean
    norms_squared: NDArray[np.float64]  # ||mu_i - g||^2 over the views in use


@dataclass(frozen=True, eq=False)
class Catalogue:
    """The public scalars of all releases of one map, as a querier holds them, and those cards that it has fetched."""

    feature_map: FeatureMap
    rows: NDArray[np.void]  # (N,), dtype ROW
    terms: tuple[Terms, ...]
    head: Head
    cards: Mapping[int, CardEntry] = field(default_factory=dict)  # by position
    gone: frozenset[bytes] = frozenset()  # ids of releases that were withdrawn or revoked: they keep their place and are never chosen
    today: int | None = None  # by the clock of whoever ranks; None: whether releases hold is not looked at

    def __len__(self) -> int:
        return len(self.rows)

    def terms_of(self, position: int) -> Terms:
        """Return the terms of the release at a position."""
        return self.terms[int(self.rows["terms"][position])]

    def unit_of(self, position: int) -> PrivacyUnit:
        """Return the privacy unit of the release at a position."""
        return self.terms_of(position).guarantee.unit

    def card(self, position: int) -> CardEntry:
        """Return the card of the release at a position; raise NotFound if its page was not fetched."""
        if position not in self.cards:
            raise NotFound(f"card {position}: its page of {PAGE_SIZE} was not fetched", hint="sync fetches all pages")
        return self.cards[position]

    @property
    def release_ids(self) -> list[bytes]:
        """Ids in catalogue order, empty where the card was not fetched."""
        return [self.cards[position].release_id if position in self.cards else b"" for position in range(len(self))]

    @property
    def names(self) -> tuple[str, ...]:
        """Names in catalogue order; raises NotFound unless all cards were fetched."""
        return tuple(self.card(position).name for position in range(len(self)))

    @property
    def standing(self) -> NDArray[np.bool_]:
        """Whether each release stands and holds today, (N,); where some were taken back, one without a card here does not."""
        holding: NDArray[np.bool_] = np.ones(len(self), bool)
        if self.today is not None:
            holding = np.array([terms.window.holds(self.today) for terms in self.terms], bool)[self.rows["terms"]]
        if self.gone:
            holding &= np.array([at in self.cards and self.cards[at].release_id not in self.gone for at in range(len(self))], bool)
        return holding

    def only(self, positions: Sequence[int]) -> Catalogue:
        """Return the catalogue of these positions alone, under the same head."""
        cards = {new: self.cards[old] for new, old in enumerate(positions) if old in self.cards}
        return replace(self, rows=self.rows[list(positions)], cards=cards)

    def columns(self, views: int) -> Columns:
        """Return what scoring needs of every release, for a query with this many views."""
        variances = np.array([terms.noise_variance for terms in self.terms], np.float64)[self.rows["terms"]]
        return _columns(self.rows, variances, self.feature_map, views)


def _columns(rows: NDArray[np.void], variances: NDArray[np.float64], feature_map: FeatureMap, views: int) -> Columns:
    counts = rows["count"].astype(np.float64)
    norms = rows["norms_squared"][:, :views].astype(np.float64).sum(axis=1)
    return Columns(counts, count_deviations(counts, variances, feature_map), np.sqrt(variances) / (FEATURE_SCALE * counts), norms)


def open_rows(feature_map: FeatureMap, rows: bytes, terms: Sequence[bytes], head: Head, market_key: bytes) -> Catalogue:
    """Return the catalogue of these rows and terms if the market signed exactly these; raise otherwise.  No IO."""
    verify_head(head, market_key)
    if len(rows) != ROW.itemsize * head.size:
        raise FormatError(f"catalogue: expected {head.size} rows of {ROW.itemsize} bytes under the signed head, got {len(rows)} bytes")
    chain = extend_head(EMPTY_HEAD, (rows[start : start + ROW.itemsize] for start in range(0, len(rows), ROW.itemsize)))
    if chain != head.rows:
        raise FormatError(f"catalogue: expected the {head.size} rows under the signed head, got rows that do not give it")
    if len(terms) != head.terms_size or extend_head(EMPTY_HEAD, terms) != head.terms:
        raise FormatError(f"catalogue: expected the {head.terms_size} terms under the signed head, got {len(terms)} that do not give it")
    table = np.frombuffer(rows, ROW)
    numbers = table["terms"].astype(np.int64)
    newest = np.maximum.accumulate(numbers) if len(numbers) else numbers
    # In the order of their first use, and each used: a market has one way only to number them.
    if (np.diff(newest, prepend=-1) > 1).any() or (newest[-1] + 1 if len(newest) else 0) != len(terms):
        raise FormatError("catalogue row: expected terms numbered in the order of their first use")
    counts, norms = table["count"], table["norms_squared"]
    if not ((counts >= 1) & np.isfinite(counts)).all() or not ((norms >= 0) & np.isfinite(norms)).all():
        raise FormatError("catalogue row: expected a finite count of at least 1 and finite norms")
    return Catalogue(feature_map, table, tuple(parse_terms(body) for body in terms), head)


def open_cards(catalogue: Catalogue, chains: Sequence[bytes], pages: Mapping[int, Sequence[bytes]]) -> Catalogue:
    """Return the catalogue with the cards of these pages if they are those under its signed head; raise otherwise.  No IO.

    chains: of all pages, 32 bytes each.  pages: all cards of a page, by its number.
    """
    size = catalogue.head.size
    if len(chains) != pages_of(size) or root_of_pages(chains) != catalogue.head.cards:
        raise FormatError(
            f"cards: expected the digests of {pages_of(size)} pages under the signed head, got {len(chains)} that do not give it"
        )
    cards = dict(catalogue.cards)
    for number, page in pages.items():
        if len(page) != min(PAGE_SIZE, size - number * PAGE_SIZE) or extend_head(EMPTY_HEAD, page) != chains[number]:
            raise FormatError(f"cards: page {number} is not the one under the signed head")
        cards.update(enumerate(parse_cards(page), number * PAGE_SIZE))
    return replace(catalogue, cards=cards)


def open_mirror(feature_map: FeatureMap, releases: Sequence[Release], head: Head, market_key: bytes) -> Catalogue:
    """Return the catalogue recomputed from all releases if the market signed exactly that; raise otherwise.  No IO."""
    tables = tables_of(releases, feature_map)
    catalogue = open_rows(feature_map, tables.rows, tables.terms, head, market_key)
    if tables.head().cards != head.cards:
        raise FormatError("catalogue: expected the cards of these releases under the signed head, got others")
    return replace(catalogue, cards=dict(enumerate(parse_cards(tables.cards))))


# Derived numbers ----------------------------------------------------------------------------------------------------------


def estimate_counts(
    noisy_counts: NDArray[np.float64], squares: NDArray[np.float64], variances: NDArray[np.float64], feature_map: FeatureMap
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the estimated numbers of privacy units (N,) and their standard deviations (N,): docs/protocol.md 3.4.

    noisy_counts: S_0.  squares: sum of S_j^2 over all coordinates.  variances: s^2.
    The noisy count alone has a deviation of 17 units at epsilon 1.  The length of the sums knows the number as well, since ||mu||^2
    differs little between tasks; both estimates are weighted by their inverse variances, which depend on the number: four rounds.
    Additions, products, quotients and square roots of doubles alone, so that every machine gives the same bits.
    """
    noise = variances / FEATURE_SCALE**2
    from_count, count_variance = noisy_counts / COUNT_STEP, variances / COUNT_STEP**2
    signal = squares / FEATURE_SCALE**2 - feature_map.dimension * noise
    from_length = np.sqrt(np.maximum(signal, 0.0) / feature_map.full.norm)
    number = np.maximum((from_count + from_length) / 2, 1.0)
    for _ in range(4):
        length_variance = _length_variances(number, noise, feature_map)
        weight = 1 / count_variance + 1 / length_variance
        number = np.maximum((from_count / count_variance + from_length / length_variance) / weight, 1.0)
    return number, count_deviations(number, variances, feature_map)


def count_deviations(counts: NDArray[np.float64], variances: NDArray[np.float64], feature_map: FeatureMap) -> NDArray[np.float64]:
    """Return the standard deviations of estimated numbers of units, (N,), evaluated at these estimates.  variances: s^2."""
    precision = 1 / (variances / COUNT_STEP**2) + 1 / _length_variances(counts, variances / FEATURE_SCALE**2, feature_map)
    deviations: NDArray[np.float64] = np.sqrt(1 / precision)
    return deviations


def _length_variances(number: NDArray[np.float64], noise: NDArray[np.float64], feature_map: FeatureMap) -> NDArray[np.float64]:
    norm, spread = feature_map.full.norm, feature_map.full.norm_std / (2 * feature_map.full.norm)
    of_signal = 2 * feature_map.dimension * noise**2 + 4 * noise * norm * number**2
    variances: NDArray[np.float64] = (spread * number) ** 2 + of_signal / (2 * norm * number) ** 2
    return variances


def rounded_counts(specifications: Sequence[Specification], feature_map: FeatureMap) -> NDArray[np.float32]:
    """Return n~ of each specification as its row holds it, (N,)."""
    counts = np.array([float(specification.noisy_sums[0]) for specification in specifications])
    squares = np.array([float(_square_sum(specification.noisy_sums[1:])) for specification in specifications])
    variances = np.array([float(specification.noise_variance) for specification in specifications])
    return estimate_counts(counts, squares, variances, feature_map)[0].astype(np.float32)


def _square_sum(sums: NDArray[np.int32]) -> int:
    wide = sums.astype(np.int64)
    if np.abs(wide).max() < 1 << 25:  # 4096 squares below 2^50 stay below 2^62
        return int(wide @ wide)
    return sum(int(s) ** 2 for s in sums)


def centred_means(specifications: Sequence[Specification], feature_map: FeatureMap) -> NDArray[np.float64]:
    """Return mu - g of each specification, (N, D): the rows that matching multiplies with a query."""
    if not specifications:
        return np.zeros((0, feature_map.dimension))
    sums = np.array([specification.noisy_sums[1:] for specification in specifications], np.float64)
    counts = rounded_counts(specifications, feature_map).astype(np.float64)
    means: NDArray[np.float64] = sums / (FEATURE_SCALE * counts[:, None]) - feature_map.task_mean
    return means


def columns_of(specifications: Sequence[Specification], feature_map: FeatureMap, views: int) -> Columns:
    """Return the public scalars of specifications without a catalogue; within rounding those of their rows."""
    variances = np.array([specification.noise_variance for specification in specifications], np.float64)
    rows = np.zeros(len(specifications), ROW)
    rows["count"] = rounded_counts(specifications, feature_map)
    means = centred_means(specifications, feature_map).reshape(len(specifications), len(VIEWS), -1)
    rows["norms_squared"] = (means**2).sum(axis=2)
    return _columns(rows, variances, feature_map, views)
