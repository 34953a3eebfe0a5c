"""The querier: a private task in, a ranking of specialists out.  The sketch of the task never leaves this process in clear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nodes.market_client import MarketClient, Mirror
from nodes.records import Prompt, Record
from protocol.catalogue import ROW, Catalogue, centred_means
from protocol.errors import StaleCatalogue
from protocol.features import VIEWS, FeatureMap
from protocol.scoring import Ranking, Scores, Sketch, rank, score, sketch_of

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

STALE_RETRIES = 3
TYPICAL_ENVELOPE_BYTES = 1_300  # measured on releases of the default map with an adapter


def views_of(records: Sequence[Record]) -> int:
    """Return how many views a task has: the response view counts only if every text has a response."""
    return 1 if any(isinstance(record, Prompt) for record in records) else len(VIEWS)


def sketch_task(records: Sequence[Record], model: BaseModel, feature_map: FeatureMap) -> Sketch:
    """Return the sketch of a task's texts under the market's map.

    Padded batches are allowed here: nothing of a query is released, so no record needs to be independent of its neighbours.
    """
    model.admit_map(feature_map)
    embeddings = model.embed_batched(records, layer=feature_map.layer, kind=feature_map.embedding)
    return sketch_of(feature_map(embeddings), feature_map, views_of(records))


@dataclass(frozen=True, slots=True)
class Found:
    """A ranking with what it was made from."""

    ranking: Ranking
    scores: Scores
    catalogue: Catalogue
    server_cpu_ms: float | None = None  # CPU time of the market's evaluation, as the market tells it

    def name_of(self, release_id: bytes) -> str:
        """Return the title of a release, NAME@HEX."""
        position = self.catalogue.release_ids.index(release_id)
        return f"{self.catalogue.names[position]}@{release_id.hex()[:8]}"


def mirrored_products(mirror: Mirror, sketch: Sketch) -> NDArray[np.float64]:
    """Return <q - g, mu_i - g> of every release, computed here: (N,)."""
    feature_map = mirror.catalogue.feature_map
    return centred_means([release.specification for release in mirror.releases], feature_map) @ sketch.centred_mean


def find_in_mirror(sketch: Sketch, client: MarketClient, feature_map: FeatureMap) -> Found:
    """Return the ranking computed on the local copy: perfectly private, and cheap below some two thousand releases."""
    mirror = client.mirror(feature_map)
    return _ranked(mirrored_products(mirror, sketch), mirror.catalogue, sketch)


def find_encrypted(sketch: Sketch, client: MarketClient, feature_map: FeatureMap) -> Found:
    """Return the ranking of an encrypted query: the market multiplies ciphertext, and only this process can decrypt.

    A release that is published between sync and query makes the catalogue stale; then both are done again.
    """
    from protocol.encryption import MatchPlan, QueryKey

    for _ in range(STALE_RETRIES):
        catalogue = client.sync(feature_map)
        if not catalogue.head.size:
            return _ranked(np.zeros(0), catalogue, sketch)
        plan = MatchPlan.build(catalogue.head.size, feature_map.dimension)
        key = QueryKey.fresh(plan)
        query = key.encrypt(sketch.centred_mean).to_bytes()
        try:
            answer, server_cpu_ms = client.match(feature_map.map_id, catalogue.head, query, plan.answer_bytes)
        except StaleCatalogue:
            continue
        # Rows hold both views whatever the query; its own zeros leave out the second.
        norms = np.sqrt(np.maximum(catalogue.columns(len(VIEWS)).norms_squared, 0.0))
        products = key.decrypt(answer, norms)
        return _ranked(products, catalogue, sketch, server_cpu_ms)
    raise StaleCatalogue("catalogue: it changed during each of several queries", hint="try again in a moment")


def prices(catalogue: Catalogue) -> dict[str, int]:
    """Return the bytes that either way of matching moves for a catalogue of this size, nothing known beforehand."""
    from protocol.encryption import STD128, MatchPlan

    size = catalogue.head.size
    rows = sum(ROW.itemsize + len(name) for name in catalogue.names)
    encrypted = STD128.query_bytes + MatchPlan.build(size, catalogue.feature_map.dimension).answer_bytes if size else 0
    return {"mirror": size * TYPICAL_ENVELOPE_BYTES, "encrypted": rows + encrypted}


def _ranked(products: NDArray[np.float64], catalogue: Catalogue, sketch: Sketch, server_cpu_ms: float | None = None) -> Found:
    scores = score(products, catalogue.columns(sketch.views), sketch, catalogue.feature_map)
    return Found(rank(scores, catalogue, sketch), scores, catalogue, server_cpu_ms)
