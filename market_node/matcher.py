"""Encrypted matching: answers computed on ciphertext alone, each signed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from market_node.index import MarketIndex, Version
from market_node.shards import Evaluator, InProcess
from market_node.store import Store
from protocol.errors import VeilmartError
from protocol.features import FeatureMap
from protocol.proof import sign_statement, statement_of


@dataclass(frozen=True, slots=True)
class Answer:
    """Encrypted scores, what the market says about them, and the CPU time they took."""

    data: bytes
    index: bytes  # digest
    signature: bytes
    cpu_ns: int


class Matcher:
    """Answers encrypted queries; thread-safe.  It never holds a secret of a query.  evaluator: what computes the answers."""

    def __init__(self, store: Store, feature_map: FeatureMap, market_key: Any, evaluator: Evaluator | None = None) -> None:
        self._map, self._key = feature_map, market_key
        self.evaluator = evaluator or InProcess()
        self.index = MarketIndex(store, feature_map, store.home / "index" / feature_map.map_id.hex()[:32])

    def warm_up(self) -> None:
        """Compile the kernels now, seconds on a new machine, rather than while the first querier waits."""
        from protocol.encryption import EncryptedQuery, MatchPlan
        from protocol.evaluation import EncodedIndex, evaluate

        plan = MatchPlan.build(1, self._map.dimension)
        query = EncryptedQuery.from_bytes(bytes(plan.parameters.query_bytes), plan)
        evaluate(EncodedIndex.build(np.zeros((1, self._map.dimension)), plan), query)

    def refresh(self) -> None:
        """Have the index of the newest state ready where it is answered."""
        version = self.index.refresh()
        if version is not None:
            self.evaluator.hold(version)

    def answer(self, version: Version, queries: Sequence[bytes]) -> list[Answer | VeilmartError]:
        """Return for each query the signed scores of all releases of a version, or FormatError for bytes that are no query.

        All share one pass over the tiles; what each is told to have cost is its share.
        """
        from protocol.encryption import EncryptedQuery

        started = time.thread_time_ns()
        results: list[Answer | VeilmartError] = []
        parsed: list[EncryptedQuery] = []
        places: list[int] = []
        for place, query in enumerate(queries):
            try:
                parsed.append(EncryptedQuery.from_bytes(query, version.index.plan))
                places.append(place)
                results.append(VeilmartError("not answered"))
            except VeilmartError as error:
                results.append(error)
        parsing_ns = time.thread_time_ns() - started
        scores, evaluating_ns = self.evaluator.evaluate(version, parsed)
        cpu_ns = (parsing_ns + evaluating_ns) // max(len(parsed), 1)
        for place, one in zip(places, scores, strict=True):
            data = one.to_bytes()
            statement = statement_of(queries[place], self._map.map_id, version.head, version.digest, data)
            results[place] = Answer(data, version.digest, sign_statement(statement, self._key), cpu_ns)
        return results
