"""The index of encrypted matching: full tiles in files, mapped into memory; the last tile in memory alone.

A tile's file is named by the digest of its layout, its place and the state of the catalogue at its last row, which binds every row, so
that a market finds its tiles again without opening a release.

    file = SHA-256 of name and rest (32 bytes) || digest of layout and rows (32 bytes) || diagonals

The name, which holds the number of the encoder too, is hashed with the rest: a file under another's name is encoded again.

The last tile, which every registration changes, is the staging tile: it is encoded again from at most one tile of rows, outside the event
loop, and never written.  A full tile is encoded once in a layout.  Layouts change a few times in a catalogue's life, when the number of
tiles makes other baby steps cheaper: then all tiles are encoded again, while older versions go on answering.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from market_node.events import TileNotWritten, tell
from market_node.store import Store
from protocol.catalogue import Head, centred_means
from protocol.errors import NotFound, StaleCatalogue
from protocol.features import FeatureMap
from protocol.keys import write_durably
from protocol.proof import index_digest
from protocol.release import open_envelope

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from protocol.encryption import MatchPlan
    from protocol.evaluation import EncodedIndex, EncodedTile


DIGEST_BYTES = 32
HEADER_BYTES = 2 * DIGEST_BYTES
ENCODING = 1  # other words for the same rows, by a change of protocol/hazmat/embedding.py or of n~, need another number: files are old then
VERSIONS_KEPT = 4
RELEASES_BACK = 256  # a query for a state that is no older is answered, whatever was published since its sync


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """The index of one state of the catalogue; never changed, so that a query may use it while another is built."""

    head: Head
    index: EncodedIndex
    digest: bytes  # of plan and tiles, for the signature of an answer
    files: tuple[Path | None, ...]  # of the tiles, one each; None where a tile is in memory alone


def _checksum(name: str, rest: bytes | memoryview) -> bytes:
    checksum = hashlib.sha256(f"{name}\0".encode())
    checksum.update(rest)
    return checksum.digest()


class TileFolder:
    """Encoded tiles as files: content-checked, durable, mapped instead of read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for half_written in folder.glob(".*.tmp"):
            half_written.unlink(missing_ok=True)

    def load(self, name: str, shape: tuple[int, ...]) -> EncodedTile | None:
        """Return the tile of a name, or None if there is none or its file is torn, damaged, another's or of another shape."""
        from protocol.evaluation import EncodedTile

        path = self._folder / name
        size = HEADER_BYTES + 8 * int(np.prod(shape))
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        if _checksum(name, memoryview(mapped)[DIGEST_BYTES:]) != mapped[:DIGEST_BYTES]:
            return None
        diagonals = np.frombuffer(mapped, np.uint64, offset=HEADER_BYTES).reshape(shape)  # keeps the mapping, and cannot be written
        return EncodedTile(mapped[DIGEST_BYTES:HEADER_BYTES], diagonals)

    def keep(self, name: str, tile: EncodedTile) -> EncodedTile:
        """Write a tile durably and return it as mapped from its file; on a disk that takes it not, return it as it is in memory."""
        rest = tile.digest + tile.diagonals.tobytes()
        try:
            write_durably(self._folder / name, _checksum(name, rest) + rest)
        except OSError as error:  # a full disk costs memory and the next start time, and stops no query
            tell(TileNotWritten(error.errno or 0))
            return tile
        return self.load(name, tile.diagonals.shape) or tile

    def path(self, name: str) -> Path:
        """Return where the tile of a name lies, if it does."""
        return self._folder / name

    def sweep(self, names: set[str]) -> None:
        """Remove all other files; a version that still uses one keeps its mapping."""
        for path in self._folder.glob("[!.]*"):  # others are half written, perhaps by another process
            if path.name not in names:
                path.unlink(missing_ok=True)


def open_tile(file: Path, tile: EncodedTile) -> int | None:
    """Return a descriptor of a tile's file, its diagonals from HEADER_BYTES on, or None if the file is gone or another tile's.

    The rest of it is not hashed: this process did so when it loaded or wrote the tile.
    """
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    whole = os.fstat(opened).st_size == HEADER_BYTES + tile.diagonals.nbytes
    if whole and os.pread(opened, DIGEST_BYTES, DIGEST_BYTES) == tile.digest:
        return opened
    os.close(opened)
    return None


class MarketIndex:
    """Versions of the index of one map; thread-safe.  `held` never waits; `build` is for a thread of its own."""

    def __init__(self, store: Store, feature_map: FeatureMap, folder: Path) -> None:
        self._store, self._map, self._files = store, feature_map, TileFolder(folder)
        self._building, self._lock = threading.Lock(), threading.Lock()
        self._versions: OrderedDict[bytes, Version] = OrderedDict()
        self._tiles: dict[str, EncodedTile] = {}  # full tiles by name
        self._start, self._rows = 0, np.zeros((0, feature_map.dimension))  # rows from position _start on: the staging tile, and some before

    def held(self, size: int, head: bytes) -> Version | None:
        """Return the version of a state if it is in memory."""
        with self._lock:
            version = self._versions.get(head)
            if version is None or version.head.size != size:
                return None
            self._versions.move_to_end(head)
            return version

    def build(self, size: int, head: bytes) -> Version:
        """Return the version of a state of the catalogue; raise StaleCatalogue for one that is too old or never was."""
        with self._building:
            version = self.held(size, head)
            if version is not None:
                return version
            newest = self._store.head()
            state = self._known_state(size, newest)
            if state is None or state.digest != head:
                raise StaleCatalogue(f"catalogue: the query names {size} releases, there are {newest.size}", hint="sync and ask again")
            version = self._encoded(state)
            with self._lock:
                self._versions[head] = version
                while len(self._versions) > VERSIONS_KEPT:
                    self._versions.popitem(last=False)
            return version

    def refresh(self) -> Version | None:
        """Build the version of the newest state and return it, None for an empty catalogue; remove files that it does not use."""
        newest = self._store.head()
        if not newest.size:
            return None
        version = self.build(newest.size, newest.digest)
        with self._building:
            names = {name for name, _, _ in self._full_tiles(version.index.plan)}
            self._files.sweep(names)
            self._tiles = {name: tile for name, tile in self._tiles.items() if name in names}
        return version

    def _known_state(self, size: int, newest: Head) -> Head | None:
        if not newest.size - RELEASES_BACK <= size <= newest.size or size < 1:
            return None
        try:
            return newest if size == newest.size else self._store.head_at(size)
        except NotFound:
            return None

    def _full_tiles(self, plan: MatchPlan) -> list[tuple[str, int, int]]:
        """Return name, first and last position of each full tile."""
        layout = f"{ENCODING} {plan.parameters.name} {plan.layout.value} {plan.dimension} {plan.groups} {plan.baby}"
        named = []
        for start in range(0, plan.rows - plan.rows_per_tile + 1, plan.rows_per_tile):
            stop = start + plan.rows_per_tile
            state = self._store.head_at(stop).digest
            named.append((hashlib.sha256(f"{layout} {start}\0".encode() + state).hexdigest(), start, stop))
        return named

    def _encoded(self, state: Head) -> Version:
        from protocol.encryption import MatchPlan
        from protocol.evaluation import EncodedIndex
        from protocol.hazmat.ring import BLOCK

        plan = MatchPlan.build(state.size, self._map.dimension)
        shape = plan.parameters.degree // BLOCK, plan.giant, plan.baby, BLOCK
        tiles, files, done = [], list[Path | None](), 0
        for name, start, stop in self._full_tiles(plan):
            tile = self._tiles.get(name) or self._files.load(name, shape)
            if tile is None:
                tile = self._files.keep(name, self._tile(plan, start, stop))
            self._tiles[name] = tile
            tiles.append(tile)
            files.append(self._files.path(name))
            done = stop
        if done < state.size:
            tiles.append(self._tile(plan, done, state.size))
            files.append(None)
        index = EncodedIndex(plan, tuple(tiles))
        return Version(state, index, index_digest(index), tuple(files))

    def _tile(self, plan: MatchPlan, start: int, stop: int) -> EncodedTile:
        from protocol.evaluation import EncodedIndex

        return EncodedIndex.build(self._means(plan, start, stop), replace(plan, rows=stop - start)).tiles[0]

    def _means(self, plan: MatchPlan, start: int, stop: int) -> NDArray[np.float64]:
        """Return the rows of these positions, (stop - start, D), and keep them, with as many before as an older state can need.

        Two tiles of rows at most are kept, however large the catalogue is.
        """
        if start < self._start:  # another layout: everything is encoded again
            return self._read(start, stop)
        end = self._start + len(self._rows)
        if start > end:
            self._start, self._rows, end = start, self._rows[:0], start
        if stop > end:
            self._rows = np.concatenate([self._rows, self._read(end, stop)])
        keep_from = max(start - RELEASES_BACK, 0) // plan.rows_per_tile * plan.rows_per_tile
        if keep_from > self._start:
            self._start, self._rows = keep_from, self._rows[keep_from - self._start :].copy()  # a view would keep what was before
        return self._rows[start - self._start : stop - self._start]

    def _read(self, start: int, stop: int) -> NDArray[np.float64]:
        specifications = [open_envelope(envelope).specification for envelope in self._store.envelopes(start, stop)]
        return centred_means(specifications, self._map)
