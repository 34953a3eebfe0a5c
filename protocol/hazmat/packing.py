"""Words of a fixed number of bits, one after the other, little endian: how polynomials travel.

Nothing is checked here but by the caller: lengths before, ranges after.  Importing this module imports numba (about a second).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol.hazmat.lanes import compiled, wide


@compiled
def _pack(values: NDArray[np.uint64], bits: int, out: NDArray[np.uint64]) -> None:
    pending, fill, at = np.uint64(0), 0, 0
    for j in range(values.shape[0]):
        pending |= values[j] << np.uint64(fill)
        fill += bits
        if fill >= 64:
            out[at] = pending
            at, fill = at + 1, fill - 64
            pending = values[j] >> np.uint64(bits - fill) if fill > 0 else np.uint64(0)


@compiled
def _unpack(packed: NDArray[np.uint64], bits: int, out: NDArray[np.uint64]) -> None:
    wide()
    mask = (np.uint64(1) << np.uint64(bits)) - np.uint64(1)
    for j in range(out.shape[0]):
        at, shift = (j * bits) >> 6, np.uint64((j * bits) & 63)
        # Two shifts, since one by 64 is undefined; packed has one word more than the values fill.
        out[j] = ((packed[at] >> shift) | ((packed[at + 1] << np.uint64(1)) << (np.uint64(63) - shift))) & mask


def packed_bytes(count: int, bits: int) -> int:
    """Return the length of `count` packed words; count is a multiple of 64."""
    return count // 8 * bits


def pack(values: NDArray[np.uint64], bits: int) -> bytes:
    """Return values (n,), each below 2**bits, as packed_bytes(n, bits) bytes; n is a multiple of 64 and 1 <= bits <= 63."""
    out = np.empty(len(values) * bits // 64, np.uint64)
    _pack(values, bits, out)
    return out.astype("<u8").tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint64]:
    """Return the `count` words in packed_bytes(count, bits) bytes; every one is below 2**bits."""
    packed = np.zeros(count * bits // 64 + 1, np.uint64)
    packed[:-1] = np.frombuffer(data, "<u8")
    out = np.empty(count, np.uint64)
    _unpack(packed, bits, out)
    return out
