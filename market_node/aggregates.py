"""The aggregates of a market's releases (protocol/aggregation.py), kept up as releases come and are taken back.

Sums by domain follow every release and notice; the tree is made anew from all shares, which lie in memory (0.8 kB a release of 96
coordinates).  Whoever asks gets the newest signed bytes.  They are made again only where releases or notices came since, and so seldom that
at most a twentieth of a core is spent on them, however often somebody asks and whatever is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from market_node.events import Aggregated, tell
from market_node.store import Store
from protocol import aggregation
from protocol.aggregation import NUMBERS, State, Totals, aggregate, domain_of, shares_of, sign_aggregates
from protocol.features import FeatureMap
from protocol.notices import open_notice
from protocol.release import SIGNATURE_BYTES, parse_release

READ_AT_ONCE = 1024
LEAST_PAUSE_S = 1.0
PAUSE_FACTOR = 20  # pauses are so many times as long as the work before them


@dataclass(frozen=True, slots=True)
class Signed:
    """Canonical bytes and the market's signature."""

    body: bytes
    signature: bytes


class Running:
    """The sums of all standing releases, at one state of a store; for one thread."""

    def __init__(self, store: Store, feature_map: FeatureMap, market_key: bytes) -> None:
        self._store, self._map, self._market = store, feature_map, market_key
        self._totals = Totals(feature_map.dimension)
        self._shares = np.zeros((0, NUMBERS + feature_map.dimension), np.int64)
        self._titles: list[str] = []
        self._domains: list[str] = []
        self._standing: list[bool] = []
        self._position: dict[bytes, int] = {}
        self._gone: set[bytes] = set()
        self._notices = 0

    def follow(self, size: int, notices: Sequence[bytes]) -> None:
        """Take in what came since: releases up to `size`, and what these notices, all of the market, take back."""
        for notice in notices[self._notices :]:
            for release_id in open_notice(notice, self._market).taken_back:
                self._take_back(release_id)
        self._notices = len(notices)
        for start in range(len(self._titles), size, READ_AT_ONCE):
            # Signatures were verified before anything was stored.
            envelopes = self._store.envelopes(start, min(start + READ_AT_ONCE, size))
            releases = [parse_release(envelope[:-SIGNATURE_BYTES]) for envelope in envelopes]
            shares = shares_of([release.specification for release in releases], self._map)
            self._hold(start, shares)
            for release, share in zip(releases, shares, strict=True):
                self._position[release.release_id] = len(self._titles)
                self._titles.append(release.title)
                self._domains.append(domain_of(release.card.name))
                self._standing.append(release.release_id not in self._gone)
                if self._standing[-1]:
                    self._totals.add(self._domains[-1], share)

    def _hold(self, start: int, shares: np.ndarray[Any, Any]) -> None:
        if start + len(shares) > len(self._shares):  # grown by half, so that every release is copied a few times in all
            grown = np.zeros((max(start + len(shares), start * 3 // 2), self._shares.shape[1]), np.int64)
            grown[:start] = self._shares[:start]
            self._shares = grown
        self._shares[start : start + len(shares)] = shares

    def _take_back(self, release_id: bytes) -> None:
        self._gone.add(release_id)
        position = self._position.get(release_id)
        if position is not None and self._standing[position]:
            self._standing[position] = False
            self._totals.remove(self._domains[position], self._shares[position])

    def made(self, state: State) -> aggregation.Aggregates:
        """Return the aggregates at the state that was followed to."""
        there = [position for position, stands in enumerate(self._standing) if stands]
        titles, domains = [self._titles[at] for at in there], [self._domains[at] for at in there]
        return aggregate(self._totals, self._shares[there], titles, domains, state)


class Aggregates:
    """The newest signed aggregates of a market.  `held` never waits; `build` is for a thread of its own."""

    def __init__(self, store: Store, feature_map: FeatureMap, market_key: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._map_id, self._key, self._clock = feature_map.map_id, market_key, clock
        self._running = Running(store, feature_map, market_key.public_key().public_bytes_raw())
        self._newest: tuple[State, Signed] | None = None
        self._rests_until = -np.inf

    def held(self, size: int, notices: int) -> Signed | None:
        """Return the signed bytes if they are of a state with so many releases and notices, or if it is too early for newer ones."""
        if self._newest is None:
            return None
        state, signed = self._newest
        up_to_date = state.size >= size and state.notices_size >= notices
        return signed if up_to_date or self._clock() < self._rests_until else None

    def build(self, size: int, root: bytes, notices: Sequence[bytes], notices_root: bytes) -> Signed:
        """Return the signed bytes of a state of the store, or what `held` gives: others may have waited for the same."""
        held = self.held(size, len(notices))
        if held is not None:
            return held
        started = self._clock()
        self._running.follow(size, notices)
        state = State(self._map_id, size, root, len(notices), notices_root)
        body = self._running.made(state).body
        signed = Signed(body, sign_aggregates(body, self._key))
        took = self._clock() - started
        self._rests_until = self._clock() + max(LEAST_PAUSE_S, PAUSE_FACTOR * took)
        self._newest = state, signed
        tell(Aggregated(size, round(1000 * took)))
        return signed
