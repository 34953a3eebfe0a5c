"""Half of a fresh ciphertext is uniform: SEAL sends the 64-byte seed it came from.  Here the market expands it, without SEAL.

The stream is Blake2Xb keyed by the seed, in buffers of 4096 bytes whose input is a little-endian counter.  Coefficients are drawn for one
prime after the other; a word in the last, incomplete multiple of its prime is replaced by the next word behind all first draws.
Bit-exact with SEAL, also where many words are rejected (tests/protocol/test_seeds.py).  A seed is public and may be hostile: any 64
bytes are a valid one, and the time does not depend on its value but for rejections (1 in 10**10 words at the primes of the presets).
Importing this module imports numba (about a second).
Source: Microsoft SEAL 4.x (randomgen.cpp, rlwe.cpp sample_poly_uniform); BLAKE2X, 2016, sections 2 and 5; RFC 7693 section 3.2.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import types
from numpy.typing import NDArray

from protocol.errors import FormatError
from protocol.hazmat.lanes import LANES, VECTOR, address, compiled, emitted, wide

SEED_BYTES: Final = 64
_BUFFER_BYTES: Final = 4096
_BUFFER_WORDS: Final = _BUFFER_BYTES // 8
_NODE_BYTES: Final = 64  # of output, and of input: a node hashes the root of its buffer
_NODES: Final = _BUFFER_BYTES // _NODE_BYTES

_IV: Final = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
_SIGMA: Final = (
    "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
)  # fmt: skip
_ROUNDS: Final = 12
_MIXED: Final = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15), (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _splat(builder: Any, word: Any) -> Any:
    first = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), word, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _words(values: Sequence[int] | int) -> Any:
    return ir.Constant(VECTOR, [values] * LANES if isinstance(values, int) else list(values))


@emitted
def _hash_nodes(typing: Any, root: Any, node: Any, out: Any) -> Any:
    """Write word w of the expansion nodes node, ..., node + 7 of the root hash (8,) to out[8 w : 8 w + 8]; out: (64,)."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words = context.make_array(signature.args[0])(context, builder, args[0]).data
        message = [_splat(builder, builder.load(builder.gep(words, [ir.Constant(ir.IntType(64), i)]))) for i in range(8)]
        # The parameter block of a node: digest 64, leaf 64, fanout and depth 0; offset and length of the buffer; inner length 64.
        offset = builder.add(_splat(builder, args[1]), _words(range(LANES)))
        state = [_words(iv) for iv in _IV]
        state[0] = _words(_IV[0] ^ (_NODE_BYTES | _NODE_BYTES << 32))
        state[1] = builder.xor(_words(_IV[1] ^ (_BUFFER_BYTES << 32)), offset)
        state[2] = _words(_IV[2] ^ (_NODE_BYTES << 8))
        v = [*state, *(_words(iv) for iv in _IV)]
        v[12], v[14] = _words(_IV[4] ^ _NODE_BYTES), _words(_IV[6] ^ (2**64 - 1))

        def rotated(x: Any, bits: int) -> Any:
            return builder.or_(builder.lshr(x, _words(bits)), builder.shl(x, _words(64 - bits)))

        def plus(x: Any, y: Any, word: int) -> Any:
            total = builder.add(x, y)
            return builder.add(total, message[word]) if word < len(message) else total  # the second half of the message is zero

        for r in range(_ROUNDS):
            order = [int(digit, 16) for digit in _SIGMA[r % len(_SIGMA)]]
            for i, (a, b, c, d) in enumerate(_MIXED):
                for word, first, second in ((order[2 * i], 32, 24), (order[2 * i + 1], 16, 63)):
                    v[a] = plus(v[a], v[b], word)
                    v[d] = rotated(builder.xor(v[d], v[a]), first)
                    v[c] = builder.add(v[c], v[d])
                    v[b] = rotated(builder.xor(v[b], v[c]), second)
        for w in range(8):
            word = builder.xor(builder.xor(state[w], v[w]), v[w + 8])
            index = ir.Constant(ir.IntType(64), LANES * w)
            builder.store(word, address(context, builder, signature.args[2], args[2], index)).align = 8
        return context.get_dummy_value()

    return types.void(root, types.uint64, out), emit


@compiled
def _buffers(roots: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
    """Write the buffers of the root hashes (k, 8) to out (k, _NODES, 8)."""
    eight = np.empty(64, np.uint64)
    for k in range(roots.shape[0]):
        for node in range(0, _NODES, LANES):
            _hash_nodes(roots[k], np.uint64(node), eight)
            for lane in range(LANES):
                for w in range(8):
                    out[k, node + lane, w] = eight[LANES * w + lane]


@compiled
def _rejected(words: NDArray[np.uint64], limit: np.uint64) -> int:
    wide()
    count = 0
    for j in range(words.shape[0]):
        count += words[j] >= limit
    return count


@compiled
def _reduce(words: NDArray[np.uint64], prime: np.uint64, reciprocal: float) -> None:
    wide()
    for j in range(words.shape[0]):
        # The prime is above 2**40, so that the quotient is below 2**24 and its estimate off by one at most.
        rest = np.int64(words[j] - np.uint64(np.float64(words[j]) * reciprocal) * prime)  # wraps modulo 2**64 on purpose
        rest = rest + np.int64(prime) if rest < 0 else rest
        rest = rest - np.int64(prime) if rest >= np.int64(prime) else rest
        words[j] = np.uint64(rest)


def _stream(seed: bytes, first: int, count: int) -> NDArray[np.uint64]:
    """Return the words of `count` buffers from number `first` on."""
    digests = b"".join(
        # hashlib puts the length of the buffer into the upper half of the node offset, which is where BLAKE2X wants it.
        hashlib.blake2b(struct.pack("<Q", i), key=seed, digest_size=64, node_offset=_BUFFER_BYTES << 32).digest()
        for i in range(first, first + count)
    )
    out = np.empty((count, _NODES, 8), np.uint64)
    _buffers(np.frombuffer(digests, "<u8").astype(np.uint64).reshape(count, 8), out)
    return out.reshape(-1)


def expand(seed: bytes, primes: Sequence[int], degree: int) -> NDArray[np.uint64]:
    """Return the uniform polynomial of a seed modulo each prime, (primes, degree), as SEAL draws it.

    primes: between 2**40 and 2**62.  Raises FormatError unless the seed has SEED_BYTES bytes.
    """
    if len(seed) != SEED_BYTES:
        raise FormatError(f"seed: expected {SEED_BYTES} bytes, got {len(seed)}")
    count = len(primes) * degree
    buffers = -(-count // _BUFFER_WORDS)
    words = _stream(seed, 0, buffers)
    drawn, spare = words[:count].reshape(len(primes), degree), _Spare(seed, buffers, words[count:])
    for row, prime in zip(drawn, primes, strict=True):
        limit = (1 << 64) - 1 - ((1 << 64) - 1) % prime - 1  # SEAL's: a multiple of the prime, less one
        if _rejected(row, np.uint64(limit)):
            for j in np.flatnonzero(row >= np.uint64(limit)):
                row[j] = spare.below(limit)
        _reduce(row, np.uint64(prime), 1.0 / prime)
    return drawn


class _Spare:
    """The words behind the first draws, buffer after buffer."""

    def __init__(self, seed: bytes, next_buffer: int, words: NDArray[np.uint64]) -> None:
        self._seed, self._next, self._words = seed, next_buffer, words.tolist()[::-1]

    def below(self, limit: int) -> int:
        while True:
            if not self._words:
                self._words, self._next = _stream(self._seed, self._next, 1).tolist()[::-1], self._next + 1
            word: int = self._words.pop()
            if word < limit:
                return word
