"""The log of everything a market published: a Merkle tree after RFC 9162, and checkpoints as signed notes (docs/protocol.md 6.7).

    entry        the envelope of a release, as it was published; its index is its position in the catalogue
    checkpoint   size and root of the tree, the digest of the catalogue's head, size and root of the list of notices, signed by the
                 market (C2SP tlog-checkpoint, signed-note)
    receipt      an entry's index, a checkpoint, and the proof that the entry is under it

Whoever remembers one checkpoint can check that the next one only appends.  Nothing here reads a socket or a file.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.codec import decode, domain_tag, encode, take
from protocol.errors import FormatError, InvalidProof, InvalidSignature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256().digest()  # RFC 9162 2.1.1
MAX_SIZE = 1 << 53  # of a tree: every implementation's integers hold it
MAX_CHECKPOINT_BYTES = 4096
ED25519 = 1  # signature type of a signed note
DASH = "\u2014"  # begins each line of a signature
RECEIPT = domain_tag("receipt", 1)

Nodes = Callable[[int, int], bytes]
"""The hash of a full subtree: nodes(level, number) covers the 2^level entries from number * 2^level on."""


# The tree -----------------------------------------------------------------------------------------------------------------


def leaf_hash(entry: bytes) -> bytes:
    """Return the hash of an entry (RFC 9162 2.1.1)."""
    return hashlib.sha256(b"\0" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return the hash of two subtrees (RFC 9162 2.1.1); its prefix keeps it from standing for an entry's."""
    return hashlib.sha256(b"\1" + left + right).digest()


def appended(index: int, leaf: bytes, nodes: Nodes) -> list[tuple[int, int, bytes]]:
    """Return the full subtrees (level, number, hash) that an entry at the end, with this leaf hash, completes: two on average."""
    made = [(0, index, leaf)]
    while index & 1:
        level, number, right = made[-1]
        made.append((level + 1, number >> 1, node_hash(nodes(level, number - 1), right)))
        index >>= 1
    return made


def root_of(size: int, nodes: Nodes) -> bytes:
    """Return the root of the first `size` entries."""
    return _subtree(0, size, nodes) if size else EMPTY_ROOT


def root_of_all(entries: Iterable[bytes]) -> bytes:
    """Return the root of a log of which every entry is at hand."""
    known: dict[tuple[int, int], bytes] = {}
    size = 0
    for size, entry in enumerate(entries, start=1):
        known.update({(level, number): value for level, number, value in appended(size - 1, leaf_hash(entry), lambda *at: known[at])})
    return root_of(size, lambda *at: known[at])


def prove_inclusion(index: int, size: int, nodes: Nodes) -> list[bytes]:
    """Return the proof that the entry at `index` is under the root of `size` entries (PATH of RFC 9162 2.1.3.1)."""
    if not 0 <= index < size:
        raise FormatError(f"inclusion: expected an index below {size}, got {index}")
    proof: list[bytes] = []
    start, stop = 0, size
    while stop - start > 1:
        middle = start + _split(stop - start)
        if index < middle:
            proof.append(_subtree(middle, stop, nodes))
            stop = middle
        else:
            proof.append(_subtree(start, middle, nodes))
            start = middle
    return proof[::-1]


def prove_consistency(first: int, second: int, nodes: Nodes) -> list[bytes]:
    """Return the proof that the first `first` of `second` entries are unchanged (PROOF of RFC 9162 2.1.4.1)."""
    if not 1 <= first <= second:
        raise FormatError(f"consistency: expected sizes 1 <= first <= {second}, got {first}")
    proof: list[bytes] = []
    start, stop, whole = 0, second, True  # whole: the subtree at hand begins at entry 0 of the older tree
    while first != stop - start:
        half = _split(stop - start)
        if first <= half:
            proof.append(_subtree(start + half, stop, nodes))
            stop = start + half
        else:
            proof.append(_subtree(start, start + half, nodes))
            start, first, whole = start + half, first - half, False
    if not whole:
        proof.append(_subtree(start, stop, nodes))
    return proof[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Raise InvalidProof unless an entry with this leaf hash is at `index` under the root of `size` entries (RFC 9162 2.1.3.2)."""
    _require_hashes([leaf, root, *proof])
    if not 0 <= index < size <= MAX_SIZE:
        raise InvalidProof(f"inclusion: expected an index below the size {size}, got {index}")
    number, last, found = index, size - 1, leaf
    for part in proof:
        if not last:
            raise InvalidProof("inclusion: expected a shorter proof")
        if number & 1 or number == last:
            found = node_hash(part, found)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            found = node_hash(found, part)
        number, last = number >> 1, last >> 1
    if last or found != root:
        raise InvalidProof("inclusion: the proof does not lead to the root")


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]) -> None:
    """Raise InvalidProof unless the tree of `second` entries begins with the one of `first` (RFC 9162 2.1.4.2).

    The first size must be at least 1: of an empty tree there is nothing to prove, and the algorithm would accept anything.
    """
    _require_hashes([first_root, second_root, *proof])
    if not 1 <= first <= second <= MAX_SIZE:
        raise InvalidProof(f"consistency: expected sizes 1 <= first <= {second}, got {first}")
    if first == second:
        if proof or first_root != second_root:
            raise InvalidProof("consistency: two trees of one size have two roots")
        return
    path = [first_root, *proof] if first & (first - 1) == 0 else list(proof)
    if not path:
        raise InvalidProof("consistency: expected a longer proof")
    number, last = first - 1, second - 1
    while number & 1:
        number, last = number >> 1, last >> 1
    old = new = path[0]
    for part in path[1:]:
        if not last:
            raise InvalidProof("consistency: expected a shorter proof")
        if number & 1 or number == last:
            old, new = node_hash(part, old), node_hash(part, new)
            while not number & 1 and number:
                number, last = number >> 1, last >> 1
        else:
            new = node_hash(new, part)
        number, last = number >> 1, last >> 1
    if last or old != first_root or new != second_root:
        raise InvalidProof("consistency: the proof does not lead to both roots")


def _split(size: int) -> int:
    """Return the largest power of two below a size above 1."""
    return 1 << (size - 1).bit_length() - 1


def _subtree(start: int, stop: int, nodes: Nodes) -> bytes:
    """Return the hash over the entries [start, stop); start is a multiple of a power of two not below their number."""
    size = stop - start
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return nodes(level, start >> level)
    middle = start + _split(size)
    return node_hash(_subtree(start, middle, nodes), _subtree(middle, stop, nodes))


def _require_hashes(values: Sequence[bytes]) -> None:
    # A shorter or longer string would move the border between two hashes inside a node.
    if any(len(value) != HASH_BYTES for value in values):
        raise InvalidProof(f"proof: expected hashes of {HASH_BYTES} bytes")


# Checkpoints --------------------------------------------------------------------------------------------------------------


def origin_of(market_key: bytes) -> str:
    """Return the name of a market's log: it stands in every checkpoint, so that one market's cannot pass for another's."""
    return f"veilmart/{market_key.hex()}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log holds at one size."""

    origin: str
    size: int
    root: bytes
    catalogue: bytes  # digest of the catalogue's head at this size
    notices: tuple[int, bytes] | None = None  # size and root of the market's notices then; None: signed before checkpoints bound them

    def __post_init__(self) -> None:
        if not 0 <= self.size <= MAX_SIZE or len(self.root) != HASH_BYTES or len(self.catalogue) != HASH_BYTES:
            raise FormatError("checkpoint: expected a size below 2^53 and two digests of 32 bytes")
        if self.notices is not None and (not 0 <= self.notices[0] <= MAX_SIZE or len(self.notices[1]) != HASH_BYTES):
            raise FormatError("checkpoint: expected a number of notices below 2^53 and a root of 32 bytes")
        if not self.origin or any(not 32 < ord(c) < 127 for c in self.origin):
            raise FormatError("checkpoint: expected an origin of printable ASCII without spaces")

    @property
    def text(self) -> bytes:
        """What is signed: origin, size, root, and as extension lines the digest of the catalogue, and size and root of the notices."""
        lines = [self.origin, str(self.size), encode_base64(self.root), f"catalogue {encode_base64(self.catalogue)}"]
        if self.notices is not None:
            lines.append(f"notices {self.notices[0]} {encode_base64(self.notices[1])}")
        return "".join(f"{line}\n" for line in lines).encode("ascii")


def sign_checkpoint(checkpoint: Checkpoint, market_key: Ed25519PrivateKey) -> bytes:
    """Return the signed note of a checkpoint: its text, an empty line, one signature line."""
    key_id = _key_id(checkpoint.origin, market_key.public_key().public_bytes_raw())
    signature = encode_base64(key_id + market_key.sign(checkpoint.text))
    return checkpoint.text + f"\n{DASH} {checkpoint.origin} {signature}\n".encode()


def open_checkpoint(note: bytes, market_key: bytes) -> Checkpoint:
    """Return the checkpoint of a signed note if this market signed it; raise FormatError or InvalidSignature.

    Lines of others (witnesses) may follow and are not judged here.
    """
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(note) > MAX_CHECKPOINT_BYTES:
        raise FormatError(f"checkpoint: expected at most {MAX_CHECKPOINT_BYTES} bytes, got {len(note)}")
    text, divider, signatures = note.partition(b"\n\n")
    checkpoint = _parse(text + b"\n")
    if not divider or not signatures.endswith(b"\n"):
        raise FormatError("checkpoint: expected a text, an empty line and lines of signatures")
    if checkpoint.origin != origin_of(market_key):
        raise InvalidSignature("checkpoint: it names the log of another market")
    key_id = _key_id(checkpoint.origin, market_key)
    for line in signatures[:-1].split(b"\n"):
        words = line.split(b" ")
        if len(words) == 3 and words[0] == DASH.encode() and words[1] == checkpoint.origin.encode():
            signature = decode_base64(words[2])
            if signature[:4] == key_id:
                try:
                    Ed25519PublicKey.from_public_bytes(market_key).verify(signature[4:], checkpoint.text)
                except (BadSignature, ValueError):
                    break
                return checkpoint
    raise InvalidSignature("checkpoint: the market's signature does not verify")


def _parse(text: bytes) -> Checkpoint:
    try:
        origin, size, root, extension, *more = text.decode("ascii").removesuffix("\n").split("\n")
        notices = None
        if more:
            (_, number, listed) = " ".join(more).split(" ")
            notices = int(number), decode_base64(listed)
        checkpoint = Checkpoint(origin, int(size), decode_base64(root), decode_base64(extension.removeprefix("catalogue ")), notices)
    except ValueError:
        raise FormatError("checkpoint: expected the lines origin, size, root, catalogue, and notices or nothing") from None
    if checkpoint.text != text:  # only the canonical bytes are a checkpoint
        raise FormatError("checkpoint: not in canonical form")
    return checkpoint


def _key_id(name: str, key: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + bytes([ED25519]) + key).digest()[:4]


def encode_base64(data: bytes) -> str:
    """Return base64 as the notes have it."""
    return base64.b64encode(data).decode("ascii")


def decode_base64(text: str | bytes) -> bytes:
    """Return the bytes of canonical base64; raise FormatError."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise FormatError("checkpoint: expected base64") from None
    if base64.b64encode(data) != (text.encode() if isinstance(text, str) else text):
        raise FormatError("checkpoint: expected canonical base64")
    return data


# What a client decides ----------------------------------------------------------------------------------------------------


def accept(known: Checkpoint | None, new: Checkpoint, proof: Sequence[bytes]) -> Checkpoint:
    """Return the checkpoint to remember from now on; raise InvalidProof unless the new one only appends to what is known.

    A new one that is smaller is not a rollback if it is proven to be a part of what is known: two answers may overtake each other.
    """
    if known is None or known.size == 0:
        return new
    if new.origin != known.origin:
        raise InvalidProof("checkpoint: expected the log that is known, got another")
    older, newer = (known, new) if _order(known) <= _order(new) else (new, known)
    if older.size == 0:
        raise InvalidProof(f"checkpoint: expected at least {known.size} entries, got an empty log")
    verify_consistency(older.size, newer.size, older.root, newer.root, proof)
    if older.size == newer.size and older.catalogue != newer.catalogue:
        raise InvalidProof("checkpoint: two catalogues over one log")
    if older.notices is not None:
        if newer.notices is None or newer.notices[0] < older.notices[0]:
            raise InvalidProof(f"checkpoint: expected at least {older.notices[0]} notices, as in an older one")
        if newer.notices[0] == older.notices[0] and newer.notices != older.notices:
            raise InvalidProof("checkpoint: two lists of as many notices")
    return newer


def _order(checkpoint: Checkpoint) -> tuple[int, int]:
    # Both only grow, and are read together: of two checkpoints of a market one has no more of either.
    return checkpoint.size, -1 if checkpoint.notices is None else checkpoint.notices[0]


# Receipts -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Receipt:
    """A market's promise that an envelope is in its log, with all that is needed to check it offline."""

    envelope: bytes
    market_key: bytes
    index: int
    checkpoint: bytes  # signed note
    inclusion: tuple[bytes, ...]

    def verify(self) -> Checkpoint:
        """Return the checkpoint that the envelope is under; raise InvalidProof, InvalidSignature or FormatError."""
        checkpoint = open_checkpoint(self.checkpoint, self.market_key)
        verify_inclusion(leaf_hash(self.envelope), self.index, checkpoint.size, self.inclusion, checkpoint.root)
        return checkpoint

    def to_bytes(self) -> bytes:
        """Return the canonical bytes: kind `receipt`, index as metadata; market key, envelope and note with their lengths, hashes."""
        parts = b"".join(struct.pack("<I", len(part)) + part for part in (self.envelope, self.checkpoint))
        return encode(RECEIPT, {"index": self.index}, self.market_key + parts + b"".join(self.inclusion))

    @classmethod
    def from_bytes(cls, data: bytes) -> Receipt:
        """Return the receipt of its canonical bytes; raise FormatError for any others.  Nothing is verified yet."""
        metadata, payload = decode(RECEIPT, data)
        (index,) = take(metadata, {"index": int}, "receipt")
        market_key, rest, parts = payload[:HASH_BYTES], payload[HASH_BYTES:], []
        for _ in range(2):
            if len(rest) < 4 or len(rest) - 4 < (size := struct.unpack_from("<I", rest)[0]):
                raise FormatError("receipt: cut off")
            parts.append(rest[4 : 4 + size])
            rest = rest[4 + size :]
        hashes = tuple(rest[start : start + HASH_BYTES] for start in range(0, len(rest), HASH_BYTES))
        receipt = cls(parts[0], market_key, index, parts[1], hashes)
        if len(market_key) != HASH_BYTES or len(rest) % HASH_BYTES or receipt.to_bytes() != data:
            raise FormatError("receipt: not in canonical form")
        return receipt
