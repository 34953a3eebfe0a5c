"""A worker of the market: it has tiles, and answers for them.  On a Ray cluster `Tiles` is an actor, on this machine a process of its own.

The process gets frames over a socket pair, and memory as descriptors beside them: tiles, which it maps from the files that the market's
process maps too, so that each lies in memory once; and the room of a pass, in which the front writes steps and workers their answers.
What frames and room hold was parsed and checked by the front.  A worker has no network, no key, and nothing of a query but ciphertext.

    request = kind (1) || how many digests follow (4) || name (32) || nine numbers (8 each) || digests (32 each)
    reply   = outcome (1) || name (32) || nanoseconds of CPU (8)

Little endian; one frame is one packet of the socket.
"""

from __future__ import annotations

import math
import mmap
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol.adapter_check import leave_the_network
from protocol.encryption import PRESETS, Layout, MatchPlan

DIGEST_BYTES, NUMBERS = 32, 9
REQUEST, REPLY = struct.Struct(f"<BI{DIGEST_BYTES}s{NUMBERS}Q"), struct.Struct(f"<B{DIGEST_BYTES}sQ")
MOST_DIGESTS = 4096  # a socket's packet holds no more than about 200 kB
FRAME_BYTES = REQUEST.size + MOST_DIGESTS * DIGEST_BYTES
LAYOUTS = tuple(Layout)


class Kind(IntEnum):
    """What is asked, and what the numbers are."""

    TILE = 1  # of the digest that is its name: where it begins in the memory that comes along, and its shape
    FORGET = 2  # the tiles of these digests
    ROOM = 3  # size of the memory that comes along
    ANSWER = 4  # for these tiles of the version that is its name: the plan (six), queries, first tile, all tiles


class Outcome(IntEnum):
    """What became of it."""

    DONE = 0
    MISSING = 1  # a tile that was asked for


class Tiles:
    """Tiles by digest, and answers for any of them."""

    def __init__(self) -> None:
        self._tiles: dict[bytes, NDArray[np.uint64]] = {}

    def give(self, digest: bytes, diagonals: NDArray[np.uint64]) -> None:
        """Keep a tile; its array is read-only."""
        self._tiles[digest] = diagonals

    def forget(self, digests: Sequence[bytes]) -> None:
        """Drop tiles."""
        for digest in digests:
            self._tiles.pop(digest, None)

    def answer(
        self,
        plan: MatchPlan,
        digests: Sequence[bytes],
        baby: NDArray[np.uint64],
        giant_keys: NDArray[np.float64],
        answers: NDArray[np.uint8],
    ) -> int | None:
        """Write the answers of these tiles to `answers`, (queries, digests, tile_bytes), and return the nanoseconds of CPU they took.

        None if one of the tiles is not here; nothing is written then.
        """
        from protocol.evaluation import answer_tiles

        started = time.thread_time_ns()
        tiles = [self._tiles.get(digest) for digest in digests]
        here = [tile for tile in tiles if tile is not None]
        if len(here) < len(tiles):
            return None
        answer_tiles(plan, here, baby, giant_keys, answers)
        return time.thread_time_ns() - started


# --- memory that both sides map --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """The arrays of a pass, one after the other in one memory."""

    baby: NDArray[np.uint64]  # protocol.evaluation.steps_shape
    giant_keys: NDArray[np.float64]  # (queries, 2 polynomials, 2 limbs, degree)
    answers: NDArray[np.uint8]  # (queries, tiles, tile_bytes)


def _shapes(plan: MatchPlan, queries: int, tiles: int) -> list[tuple[Any, tuple[int, ...]]]:
    from protocol.evaluation import steps_shape

    keys, answers = (queries, 2, 2, plan.parameters.degree), (queries, tiles, plan.parameters.tile_bytes)
    return [(np.uint64, steps_shape(plan, queries)), (np.float64, keys), (np.uint8, answers)]


def room_bytes(plan: MatchPlan, queries: int, tiles: int) -> int:
    """Return how much memory a pass takes."""
    return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in _shapes(plan, queries, tiles))


def room_in(memory: mmap.mmap, plan: MatchPlan, queries: int, tiles: int) -> Room:
    """Return the arrays of a pass in memory that is large enough."""
    arrays: list[Any] = []
    offset = 0
    for kind, shape in _shapes(plan, queries, tiles):
        arrays.append(np.frombuffer(memory, kind, math.prod(shape), offset).reshape(shape))
        offset += arrays[-1].nbytes
    return Room(*arrays)


# --- frames ----------------------------------------------------------------------------------------------------------


def request(kind: Kind, name: bytes = bytes(DIGEST_BYTES), numbers: Sequence[int] = (), digests: Sequence[bytes] = ()) -> bytes:
    """Return the bytes of a request."""
    return REQUEST.pack(kind, len(digests), name, *numbers, *(0,) * (NUMBERS - len(numbers))) + b"".join(digests)


def plan_numbers(plan: MatchPlan) -> tuple[int, ...]:
    """Return a plan as six numbers."""
    return plan.rows, plan.dimension, LAYOUTS.index(plan.layout), plan.groups, plan.baby, PRESETS.index(plan.parameters)


def _plan_of(rows: int, dimension: int, layout: int, groups: int, baby: int, preset: int) -> MatchPlan:
    return MatchPlan(rows, dimension, LAYOUTS[layout], groups, baby, PRESETS[preset])


# --- the process -----------------------------------------------------------------------------------------------------


def _mapped(file: int, size: int, access: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, size, access=access)
    finally:
        os.close(file)


def serve(connection: socket.socket) -> None:
    """Do what frames ask, one after the other, until the front is gone."""
    tiles, memory = Tiles(), None
    while True:
        frame, files, _, _ = socket.recv_fds(connection, FRAME_BYTES, 1)
        if not frame:
            return
        kind, count, name, *numbers = REQUEST.unpack_from(frame)
        digests = [frame[at : at + DIGEST_BYTES] for at in range(REQUEST.size, REQUEST.size + count * DIGEST_BYTES, DIGEST_BYTES)]
        outcome, cpu_ns = Outcome.DONE, 0
        if kind == Kind.TILE:
            offset, *shape = numbers[:5]
            words = math.prod(shape)
            mapped = _mapped(files[0], offset + 8 * words, mmap.ACCESS_READ)
            tiles.give(name, np.frombuffer(mapped, np.uint64, words, offset).reshape(shape))
        elif kind == Kind.FORGET:
            tiles.forget(digests)
        elif kind == Kind.ROOM:
            memory = _mapped(files[0], numbers[0], mmap.ACCESS_WRITE)
        elif kind == Kind.ANSWER and memory is not None:
            plan, (queries, first, everything) = _plan_of(*numbers[:6]), numbers[6:9]
            room = room_in(memory, plan, queries, everything)
            answers = room.answers[:, first : first + count]
            spent = tiles.answer(plan, digests, room.baby, room.giant_keys, answers)
            outcome, cpu_ns = (Outcome.MISSING, 0) if spent is None else (Outcome.DONE, spent)
            del room, answers
        else:
            raise ValueError(f"request: expected a kind that is possible now, got {kind}")
        connection.sendall(REPLY.pack(outcome, name, cpu_ns))


def warm_up(dimension: int = 4) -> None:
    """Load or compile the kernels, on arrays as they come later."""
    from protocol.evaluation import EncodedIndex, answer_tiles, steps_shape

    plan = MatchPlan.build(1, dimension)
    tile = EncodedIndex.build(np.zeros((1, dimension)), plan).tiles[0]
    degree, answers = plan.parameters.degree, np.empty((1, 1, plan.parameters.tile_bytes), np.uint8)
    answer_tiles(plan, [tile.diagonals], np.zeros(steps_shape(plan, 1), np.uint64), np.zeros((1, 2, 2, degree)), answers)


def confine() -> None:
    """Give up what a worker has no use for: the network, other processes, a core of its memory."""
    leave_the_network()
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # Python keeps a descriptor for everything that it maps


def main() -> None:
    """Serve the connection whose descriptor is the last argument."""
    connection = socket.socket(fileno=int(sys.argv[-1]))
    warm_up()
    confine()
    connection.sendall(REPLY.pack(Outcome.DONE, bytes(DIGEST_BYTES), 0))
    serve(connection)


if __name__ == "__main__":
    main()
