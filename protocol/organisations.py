"""Whom the owners of releases belong to, as the market says it (docs/protocol.md 6.28).

A release names a key; that many keys are one organisation is known to the operator alone, who wrote the name on their invites.  So this
is the market's word: signed for a state of the catalogue, and provably false only where it says two things about one state.

    numbers   u32 a release, in the order of the catalogue; they count in the order of their first use
    names     u8 length || ASCII for each number; empty for an owner that nobody invited, who is alone under its number
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from protocol.codec import domain_tag
from protocol.enrolment import ORGANISATION
from protocol.errors import FormatError, InvalidSignature

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

TAG = domain_tag("organisations", 1)


@dataclass(frozen=True, slots=True, eq=False)
class Organisations:
    """A number for each release, and the name of each number; valid from birth, else FormatError."""

    numbers: NDArray[np.uint32]  # (N,)
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        numbers = np.array(self.numbers, np.uint32)
        highest = np.maximum.accumulate(numbers.astype(np.int64)) if len(numbers) else np.zeros(0, np.int64)
        if (np.diff(highest, prepend=-1) > 1).any() or len(self.names) != (highest[-1] + 1 if len(highest) else 0):
            raise FormatError("organisations: expected numbers in the order of their first use, and a name for each")
        given = [name for name in self.names if name]
        if len(set(given)) != len(given) or not all(ORGANISATION.fullmatch(name) for name in given):
            raise FormatError("organisations: expected names as invites have them, each once")
        numbers.setflags(write=False)
        object.__setattr__(self, "numbers", numbers)

    @property
    def body(self) -> bytes:
        """Numbers, then names."""
        return self.numbers.astype("<u4").tobytes() + b"".join(bytes([len(name)]) + name.encode("ascii") for name in self.names)

    def upto(self, size: int) -> Organisations:
        """Return what it says about the first `size` releases."""
        numbers = self.numbers[:size]
        return Organisations(numbers, self.names[: int(numbers.max()) + 1 if size else 0])

    def sign(self, state: bytes, market_key: Ed25519PrivateKey) -> bytes:
        """Return the market's signature of this for a state of the catalogue."""
        return market_key.sign(self._signed(state))

    def verify(self, signature: bytes, state: bytes, market_key: bytes) -> None:
        """Raise InvalidSignature unless the market signed this for that state."""
        from cryptography.exceptions import InvalidSignature as BadSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(market_key).verify(signature, self._signed(state))
        except (BadSignature, ValueError):
            raise InvalidSignature("organisations: the market did not sign them for this state of its catalogue") from None

    def _signed(self, state: bytes) -> bytes:
        return TAG + state + hashlib.sha256(self.body).digest()


def numbered(keys: Iterable[tuple[Hashable, str]]) -> Organisations:
    """Return the organisations of releases from (who is one, its name or nothing), in the order of the catalogue."""
    numbers: dict[Hashable, int] = {}
    names: list[str] = []
    found = []
    for key, name in keys:
        if key not in numbers:
            numbers[key] = len(names)
            names.append(name)
        found.append(numbers[key])
    return Organisations(np.array(found, np.uint32), tuple(names))


def open_organisations(numbers: bytes, names: Sequence[str], size: int) -> Organisations:
    """Return what a market says about `size` releases; raise FormatError for anything else."""
    if len(numbers) != 4 * size:
        raise FormatError(f"organisations: expected 4 bytes for each of {size} releases, got {len(numbers)}")
    return Organisations(np.frombuffer(numbers, "<u4"), tuple(names))
