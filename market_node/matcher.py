"""Encrypted matching: the index of the current catalogue, and answers computed on ciphertext alone."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from market_node.store import Store
from protocol.catalogue import centred_means
from protocol.errors import StaleCatalogue
from protocol.features import FeatureMap
from protocol.release import open_envelope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from protocol.evaluation import EncodedIndex


@dataclass(frozen=True, slots=True)
class Answer:
    """Encrypted scores, and the CPU time they took."""

    data: bytes
    cpu_ns: int


class Matcher:
    """Answers encrypted queries against the newest catalogue; thread-safe.  It never holds a secret of a query."""

    def __init__(self, store: Store, feature_map: FeatureMap) -> None:
        self._store, self._map = store, feature_map
        self._lock = threading.Lock()
        self._rows: NDArray[np.float64] = np.zeros((0, feature_map.dimension))
        self._index: EncodedIndex | None = None
        self._head = b""

    def warm_up(self) -> None:
        """Compile the kernels now, seconds on a new machine, rather than while the first querier waits."""
        from protocol.encryption import EncryptedQuery, MatchPlan
        from protocol.evaluation import EncodedIndex, evaluate

        plan = MatchPlan.build(1, self._map.dimension)
        query = EncryptedQuery.from_bytes(bytes(plan.parameters.query_bytes), plan)
        evaluate(EncodedIndex.build(np.zeros((1, self._map.dimension)), plan), query)

    def answer(self, size: int, head: bytes, query: bytes) -> Answer:
        """Return the encrypted scores of all releases of the catalogue at (size, head).

        Raises StaleCatalogue for another state of the catalogue, FormatError for bytes that are no query.
        """
        from protocol.encryption import EncryptedQuery
        from protocol.evaluation import evaluate

        index = self._current(size, head)
        started = time.thread_time_ns()
        scores = evaluate(index, EncryptedQuery.from_bytes(query, index.plan))
        return Answer(scores.to_bytes(), time.thread_time_ns() - started)

    def _current(self, size: int, head: bytes) -> EncodedIndex:
        from protocol.encryption import MatchPlan
        from protocol.evaluation import EncodedIndex

        with self._lock:
            newest = self._store.head()
            if (size, head) != (newest.size, newest.digest) or not size:
                raise StaleCatalogue(
                    f"catalogue: the query was made for {size} releases, there are {newest.size}", hint="sync and ask again"
                )
            if self._head != newest.digest or self._index is None:
                known = len(self._rows)
                envelopes = self._store.envelopes(known, size)
                new = centred_means([open_envelope(envelope).specification for envelope in envelopes], self._map)
                self._rows = np.concatenate([self._rows, new])
                self._index = EncodedIndex.build(self._rows, MatchPlan.build(size, self._map.dimension), self._index)
                self._head = newest.digest
            return self._index
