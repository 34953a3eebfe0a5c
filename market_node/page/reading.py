"""What a market's database holds, followed as it grows: values that do not change, one for each state of the log."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from market_node.backup import NEWEST
from market_node.database import open_engine
from market_node.members import Members
from market_node.migrations import MARKET
from market_node.store import Store
from protocol.aggregation import domain_of
from protocol.catalogue import centred_means, columns_of, name_of_map
from protocol.codec import format_decimal
from protocol.errors import FormatError, InvalidSignature, NotFound, UsageError
from protocol.features import VIEWS, FeatureMap, open_map, shipped_map, shipped_maps
from protocol.notices import Kind, open_notice
from protocol.privacy import PrivateTraining
from protocol.release import SIGNATURE_BYTES, Release, open_envelope, parse_release
from protocol.transparency import Checkpoint, Receipt, open_checkpoint
from protocol.window import Window, day_of

READ_AT_ONCE = 1024
ORIGIN = "veilmart/"


@dataclass(frozen=True, slots=True)
class Entry:
    """One release as the catalogue lists it; hexadecimal ids, since that is what pages and addresses show."""

    position: int  # in the log
    release_id: str
    title: str  # NAME@first digits
    name: str
    domain: str
    summary: str
    owner: str
    release_number: int
    base_model: str
    licence: str
    epsilon: float
    delta: float
    unit: str
    records: float  # estimated number of privacy units, from the released integers
    noise: float  # standard deviation of each coordinate of the mean
    adapter: str  # its guarantee as people read it: "none" without one; "" without an adapter
    adapter_epsilon: float | None  # None without a guarantee, and without an adapter
    adapter_bytes: int  # 0 without one
    simulated: bool
    window: Window


def entry_of(position: int, release: Release, records: float, noise: float) -> Entry:
    """Return how the catalogue lists a release."""
    guarantee, adapter = release.specification.guarantee, release.adapter
    trained = adapter.guarantee if adapter is not None else None
    return Entry(
        position, release.release_id.hex(), release.title, release.card.name, domain_of(release.card.name), release.card.summary,
        release.owner.hex(), release.release_number, release.base_model.hex(), release.card.licence,
        guarantee.epsilon, guarantee.delta, str(guarantee.unit), records, noise,
        "" if trained is None else str(trained), trained.guarantee.epsilon if isinstance(trained, PrivateTraining) else None,
        0 if adapter is None else adapter.size_bytes, release.simulated, release.window,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class State:
    """All that was read, at one size of the log and of the notices."""

    entries: Sequence[Entry]  # in the order of the log; may be longer than `size`, since it only grows
    size: int
    means: NDArray[np.float64]  # (size, D): mean feature of each release, the map's task mean taken off
    gone: frozenset[str]  # ids of releases that were withdrawn or revoked
    notices: tuple[tuple[str, str, int], ...]  # kind, owner and number of releases taken back, in their order
    members: Mapping[str, str]  # organisation of each owner that joined by an invite
    removed: int  # members that were removed

    @property
    def version(self) -> str:
        """What changes whenever any of it does."""
        return f"{self.size}-{len(self.notices)}-{len(self.members)}-{self.removed}-{self.today}"

    @property
    def today(self) -> int:
        """The day by which it is said whether a release holds."""
        return day_of(time.time())

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        """All entries by their ids."""
        return {entry.release_id: entry for entry in self.entries[: self.size]}

    @cached_property
    def standing(self) -> list[Entry]:
        """The entries that were not taken back."""
        return [entry for entry in self.entries[: self.size] if entry.release_id not in self.gone]

    @cached_property
    def values(self) -> dict[str, list[str]]:
        """The values of each column that a filter offers, the most frequent first."""
        columns = ("domain", "base_model", "licence", "unit")
        return {name: [value for value, _ in Counter(getattr(entry, name) for entry in self.standing).most_common(100)] for name in columns}

    def find(self, digits: str) -> Entry:
        """Return the entry of an id or of its first digits, at least 8; raise NotFound."""
        hits = [digits] if digits in self.by_id else [key for key in self.by_id if len(digits) >= 8 and key.startswith(digits)]
        if len(hits) != 1:
            raise NotFound("There is no such release here", hint="the catalogue lists all releases; an id has 64 digits")
        return self.by_id[hits[0]]

    def history(self, entry: Entry) -> list[Entry]:
        """Return all releases of this owner, the newest first."""
        return sorted((other for other in self.by_id.values() if other.owner == entry.owner), key=lambda other: -other.release_number)


class Reading:
    """A market's database, opened so that nothing can be written, and the newest state that was read from it; for any thread."""

    def __init__(self, home: Path, which_map: str, market_key: bytes | None = None, fresh_s: float = 0.5) -> None:
        """Raise NotFound where there is no market, and UsageError where its releases are under a map that is not known here.

        which_map: name or file, of a market that has no release yet, or whose map does not ship.
        market_key: public; where it is not given it is read from the newest checkpoint, once there is one.
        fresh_s: the database is looked at no more often than this.
        """
        self.home, self.store = home, Store.reading(home)
        self.map = _map_of(self.store, which_map)
        self._given_key = market_key
        self._members = Members(open_engine(home, MARKET, reads_only=True), home)
        self._lock, self._fresh_s, self._looked = threading.Lock(), fresh_s, -math.inf
        self._entries: list[Entry] = []
        self._means = np.zeros((0, self.map.dimension))
        self._newest: State | None = None

    def close(self) -> None:
        """Close all connections."""
        self.store.close()
        self._members.close()

    @property
    def market_key(self) -> bytes | None:
        """The market's public key; None while nothing tells it."""
        if self._given_key is None and (self.home / NEWEST).exists():
            self._given_key = _key_in((self.home / NEWEST).read_bytes())
        return self._given_key

    def checkpoint(self) -> tuple[bytes, Checkpoint] | None:
        """Return the newest checkpoint that the market gave out, as a signed note and opened; None before the first."""
        path, key = self.home / NEWEST, self.market_key
        if key is None or not path.exists():
            return None
        note = path.read_bytes()
        return note, open_checkpoint(note, key)

    def receipt(self, entry: Entry) -> Receipt:
        """Return the receipt of a release under the newest checkpoint; raise NotFound while that does not hold it."""
        newest = self.checkpoint()
        if newest is None or newest[1].size <= entry.position or self.market_key is None:
            raise NotFound("This release is not under a checkpoint yet", hint="ask again in a moment")
        note, checkpoint = newest
        (envelope,) = self.store.envelopes(entry.position, entry.position + 1)
        return Receipt(envelope, self.market_key, entry.position, note, tuple(self.store.inclusion(entry.position, checkpoint.size)))

    def release(self, entry: Entry) -> Release:
        """Return the whole release of an entry."""
        (envelope,) = self.store.envelopes(entry.position, entry.position + 1)
        return parse_release(envelope[:-SIGNATURE_BYTES])  # its signature was verified before it was stored

    def state(self) -> State:
        """Return the newest state, read as far as the database has grown."""
        with self._lock:
            before, now = self._newest, time.monotonic()
            if before is not None and now - self._looked < self._fresh_s:
                return before
            self._looked = now
            size, notices = self.store.head().size, self.store.notices()
            everybody = self._members.all()
            members = {member.owner.hex(): member.organisation for member in everybody}
            removed = sum(member.removed is not None for member in everybody)
            if before is not None and (before.size, len(before.notices), before.members, before.removed) == (
                size, len(notices), members, removed,
            ):  # fmt: skip
                return before
            for start in range(len(self._entries), size, READ_AT_ONCE):
                self._read(start, min(start + READ_AT_ONCE, size))
            gone, told = self._taken_back(notices)
            self._newest = State(self._entries, size, self._means[:size], gone, told, members, removed)
            return self._newest

    def _read(self, start: int, stop: int) -> None:
        releases = [parse_release(envelope[:-SIGNATURE_BYTES]) for envelope in self.store.envelopes(start, stop)]
        specifications = [release.specification for release in releases]
        columns = columns_of(specifications, self.map, len(VIEWS))
        for at, release in enumerate(releases):
            self._entries.append(entry_of(start + at, release, float(columns.counts[at]), float(columns.noise_stds[at])))
        if stop > len(self._means):  # grown by half, so that every row is copied a few times in all
            grown = np.zeros((max(stop, 3 * start // 2), self.map.dimension))
            grown[:start] = self._means[:start]
            self._means = grown
        self._means[start:stop] = centred_means(specifications, self.map)

    def _taken_back(self, notices: Sequence[bytes]) -> tuple[frozenset[str], tuple[tuple[str, str, int], ...]]:
        key = self.market_key
        if key is None:  # notices are about releases, and the first of those made a checkpoint
            return frozenset(), ()
        opened = [open_notice(data, key) for data in notices]
        gone = frozenset(release_id.hex() for notice in opened for release_id in notice.taken_back)
        return gone, tuple((str(one.kind), one.owner.hex(), len(one.taken_back) if one.kind is not Kind.ROTATION else 0) for one in opened)


def _map_of(store: Store, which: str) -> FeatureMap:
    """Return the map of a store's releases: a shipped one, or the one that was named; raise UsageError where it is neither."""
    named, first = open_map(which), store.envelopes(0, 1)
    map_id = open_envelope(first[0]).specification.map_id if first else named.map_id
    for found in (named, *(shipped_map(name) for name in shipped_maps())):
        if found.map_id == map_id:
            return found
    raise UsageError(f"{store.home}: its releases are under the map {name_of_map(map_id)}", hint="--map names its file")


def _key_in(note: bytes) -> bytes | None:
    """Return the key that a market's own checkpoint is signed with."""
    try:
        key = bytes.fromhex(note.split(b"\n", 1)[0].decode("ascii").removeprefix(ORIGIN))
        open_checkpoint(note, key)
    except (ValueError, FormatError, InvalidSignature):
        return None
    return key


def plain(entry: Entry, state: State) -> dict[str, Any]:
    """Return an entry as a JSON value."""
    return {
        "position": entry.position, "id": entry.release_id, "title": entry.title, "name": entry.name, "domain": entry.domain,
        "summary": entry.summary, "owner": entry.owner, "organisation": state.members.get(entry.owner, ""),
        "release_number": entry.release_number, "base_model": entry.base_model, "licence": entry.licence,
        "epsilon": format_decimal(entry.epsilon), "delta": format_decimal(entry.delta), "unit": entry.unit,
        "records": round(entry.records, 1), "noise": round(entry.noise, 5), "adapter": entry.adapter,
        "adapter_epsilon": None if entry.adapter_epsilon is None else format_decimal(entry.adapter_epsilon),
        "adapter_bytes": entry.adapter_bytes, "simulated": entry.simulated, "stands": entry.release_id not in state.gone,
        **entry.window.dates, "holds": entry.window.holds(state.today),
    }  # fmt: skip
