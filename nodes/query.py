"""The querier: a private task in, a ranking of specialists out.  The sketch of the task never leaves this process in clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nodes.copies import Copies
from nodes.market_client import Exchange, MarketClient, Mirror
from nodes.records import Prompt, Record
from protocol.catalogue import ROW, Catalogue, Terms, centred_means
from protocol.errors import StaleCatalogue, UsageError
from protocol.features import VIEWS, FeatureMap
from protocol.notices import Notice
from protocol.release import Release
from protocol.scoring import Match, Ranking, Scores, Sketch, Verdict, rank, score, sketch_of, verdict_of

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

STALE_RETRIES = 3
TYPICAL_ENVELOPE_BYTES = 1_300  # measured on releases of the default map with an adapter
TYPICAL_CARD_BYTES = 45


def views_of(records: Sequence[Record]) -> int:
    """Return how many views a task has: the response view counts only if every text has a response."""
    return 1 if any(isinstance(record, Prompt) for record in records) else len(VIEWS)


def sketch_task(
    records: Sequence[Record], model: BaseModel, feature_map: FeatureMap, on_progress: Callable[[int, int], None] | None = None
) -> Sketch:
    """Return the sketch of a task's texts under the market's map.

    Padded batches are allowed here: nothing of a query is released, so no record needs to be independent of its neighbours.
    """
    model.admit_map(feature_map)
    embeddings = model.embed_batched(records, layer=feature_map.layer, kind=feature_map.embedding, on_progress=on_progress)
    return sketch_of(feature_map(embeddings), feature_map, views_of(records))


@dataclass(frozen=True, slots=True)
class Filters:
    """What a querier asks of a release beyond its task.  Applied here, on the terms, so that the market sees nothing of it."""

    base_model: str = ""  # first hexadecimal digits
    licence: str | None = None
    largest_adapter: int | None = None  # bytes; an adapter counts as its size rounded up to a power of two
    largest_epsilon: float | None = None
    largest_adapter_epsilon: float | None = None  # of the adapter's guarantee; one without a guarantee, or none at all, is not wanted

    def __post_init__(self) -> None:
        if not set(self.base_model) <= set("0123456789abcdef") or len(self.base_model) > 64:
            raise UsageError("--base-model: expected the first lower-case hexadecimal digits of its identity")

    def admits(self, terms: Terms) -> bool:
        """Return whether releases under these terms are wanted."""
        return (
            terms.base_model.hex().startswith(self.base_model)
            and self.licence in (None, terms.licence)
            and (self.largest_adapter is None or terms.adapter_class <= self.largest_adapter)
            and (self.largest_epsilon is None or terms.guarantee.epsilon <= self.largest_epsilon)
            and (self.largest_adapter_epsilon is None or terms.adapter_epsilon <= self.largest_adapter_epsilon)
        )

    def positions(self, catalogue: Catalogue) -> NDArray[np.intp]:
        """Return the positions of the releases that are wanted and stand, ascending."""
        wanted = np.array([self.admits(terms) for terms in catalogue.terms], bool)
        return np.flatnonzero(wanted[catalogue.rows["terms"]] & catalogue.standing) if len(catalogue) else np.zeros(0, np.intp)


ANY = Filters()


@dataclass(frozen=True)
class Found:
    """A ranking with what it was made from: scores and catalogue of the releases that the filters left."""

    ranking: Ranking
    scores: Scores
    catalogue: Catalogue
    owners: NDArray[np.uint32]  # (N,), a number for each organisation, or owner without one: the market's word
    organisations: tuple[str, ...]  # the names of the numbers, empty for such an owner
    views: int  # of the query
    exchange: Exchange | None = None  # with the market, of an encrypted query
    releases: tuple[Release, ...] | None = None  # where they lie here in clear
    notices: tuple[Notice, ...] = ()  # the market's, with the releases

    @property
    def server_cpu_ms(self) -> float | None:
        """CPU time of the market's evaluation, as the market tells it."""
        return self.exchange.server_cpu_ms if self.exchange else None

    def position_of(self, match: Match) -> int:
        """Return where a match stands in the catalogue: by its id, since a ranking is not in the order of the scores alone."""
        return self._positions[match.release_id]

    @cached_property
    def _positions(self) -> dict[bytes, int]:
        return {release_id: position for position, release_id in enumerate(self.catalogue.release_ids)}

    def verdict_on(self, match: Match) -> Verdict:
        """Return the verdict that a match would have as the best one."""
        return verdict_of(self.scores, self.position_of(match), self.catalogue.feature_map, self.views)

    def owner_of(self, match: Match) -> int:
        """Return the number of the organisation that a match is of."""
        return int(self.owners[self.position_of(match)])

    def original_of(self, match: Match) -> str | None:
        """Return the title of what a match is a copy of; None where it is none, or where the releases are not here."""
        if self._copies is None or self.releases is None:
            return None
        original = self._copies.original_of(self.position_of(match))
        return self.releases[original].title if original is not None else None

    @cached_property
    def _copies(self) -> Copies | None:
        return Copies(self.releases, self.notices) if self.releases is not None else None

    def title_of(self, match: Match) -> str:
        """Return the title of a match, NAME@HEX."""
        return self.catalogue.card(self.position_of(match)).title

    def name_of(self, release_id: bytes) -> str:
        """Return the title of a release, NAME@HEX."""
        return next(card.title for card in self.catalogue.cards.values() if card.release_id == release_id)


def mirrored_products(mirror: Mirror, sketch: Sketch) -> NDArray[np.float64]:
    """Return <q - g, mu_i - g> of every release, computed here: (N,)."""
    feature_map = mirror.catalogue.feature_map
    return centred_means([release.specification for release in mirror.releases], feature_map) @ sketch.centred_mean


def find_in_mirror(sketch: Sketch, client: MarketClient, feature_map: FeatureMap, filters: Filters = ANY) -> Found:
    """Return the ranking computed on the local copy: perfectly private, and cheap below some two thousand releases."""
    mirror = client.mirror(feature_map)
    owners = client.organisations(mirror.catalogue.head)
    numbers = owners.numbers[list(mirror.positions)]
    return _ranked(mirrored_products(mirror, sketch), mirror.catalogue, sketch, filters, numbers, owners.names, mirror=mirror)


def ignore_exchange(exchange: Exchange) -> None:
    """Keep nothing."""


def find_encrypted(
    sketch: Sketch,
    client: MarketClient,
    feature_map: FeatureMap,
    filters: Filters = ANY,
    *,
    on_exchange: Callable[[Exchange], None] = ignore_exchange,
) -> Found:
    """Return the ranking of an encrypted query: the market multiplies ciphertext, and only this process can decrypt.

    Nothing is fetched after the answer: whatever it decrypts to, and whether it is refused, the market sees the same calls.
    `on_exchange` is given the signed answer before anything of it is looked at: one that turns out to be implausible is the one to keep.
    A release that is published between sync and query may make the catalogue stale; then both are done again.
    """
    from protocol.encryption import MatchPlan, QueryKey

    for _ in range(STALE_RETRIES):
        catalogue = client.sync(feature_map)
        owners = client.organisations(catalogue.head)  # before the query, and of all
        if not catalogue.head.size:
            return _ranked(np.zeros(0), catalogue, sketch, filters, owners.numbers, owners.names)
        plan = MatchPlan.build(catalogue.head.size, feature_map.dimension)
        key = QueryKey.fresh(plan)
        query = key.encrypt(sketch.centred_mean).to_bytes()
        try:
            exchange = client.match(feature_map.map_id, catalogue.head, query, plan.answer_bytes)
        except StaleCatalogue:
            continue
        on_exchange(exchange)
        # Rows hold both views whatever the query; its own zeros leave out the second.
        norms = np.sqrt(np.maximum(catalogue.columns(len(VIEWS)).norms_squared, 0.0))
        products = key.decrypt(exchange.proof.answer, norms)
        return _ranked(products, catalogue, sketch, filters, owners.numbers, owners.names, exchange)
    raise StaleCatalogue("catalogue: it changed during each of several queries", hint="try again in a moment")


def prices(size: int, dimension: int) -> dict[str, int]:
    """Return the bytes that either way of matching moves for a catalogue of so many releases, nothing known beforehand."""
    from protocol.encryption import STD128, MatchPlan

    if not size:
        return {"mirror": 0, "encrypted": 0}
    cards = TYPICAL_CARD_BYTES * size  # all of them: which are wanted must not show
    answer = MatchPlan.build(size, dimension).answer_bytes
    return {"mirror": size * TYPICAL_ENVELOPE_BYTES, "encrypted": size * ROW.itemsize + cards + STD128.query_bytes + answer}


def mirror_is_cheaper(size: int, dimension: int) -> bool:
    """Return whether a mirror moves no more bytes than an encrypted query; public numbers alone decide."""
    price = prices(size, dimension)
    return price["mirror"] <= price["encrypted"]


def _ranked(
    products: NDArray[np.float64],
    catalogue: Catalogue,
    sketch: Sketch,
    filters: Filters,
    owners: NDArray[np.uint32],
    organisations: tuple[str, ...],
    exchange: Exchange | None = None,
    mirror: Mirror | None = None,
) -> Found:
    kept = filters.positions(catalogue)
    if len(kept) < len(catalogue):
        catalogue = catalogue.only(kept.tolist())
    scores = score(products[kept], catalogue.columns(sketch.views), sketch, catalogue.feature_map)
    ranked = rank(scores, catalogue, sketch)
    found = Found(ranked, scores, catalogue, owners[kept], organisations, sketch.views, exchange)
    return found if mirror is None else replace(found, releases=tuple(mirror.releases[at] for at in kept), notices=mirror.notices)
