"""What a specification that several owners release together must satisfy, read with the standard library alone (docs/protocol.md 3.7).

Owners with too few records for a specification of their own add them up by secure aggregation (protocol/cohort_round.py): nobody sees
more than the noisy sum.  Each of k members adds a discrete Gaussian of variance ceil(s^2/(k - d - c)), s^2 what the guarantee needs, so
that what is left after d members went missing and c told each other and the market their noise is still s^2.  What is published is the
variance that is really there: survivors times share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.codec import domain_tag, encode, format_decimal
from protocol.errors import FormatError, InvalidSignature
from protocol.privacy import MAX_UNITS, NORM_SQUARED, RECORD, Guarantee, noise_variance

SMALLEST_COHORT, LARGEST_COHORT = 3, 32
ID_BYTES, SIGNATURE_BYTES = 32, 64
STATEMENT = domain_tag("cohort-release", 1)


@dataclass(frozen=True, slots=True)
class Resilience:
    """How many of a cohort's members may go missing, and how many may collude, while the guarantee holds."""

    members: int  # k
    dropouts: int  # d
    colluders: int  # c, beside market and SuperLink

    def __post_init__(self) -> None:
        k, d, c = self.members, self.dropouts, self.colluders
        if not SMALLEST_COHORT <= k <= LARGEST_COHORT:
            raise FormatError(f"cohort: expected {SMALLEST_COHORT} to {LARGEST_COHORT} members, got {k}")
        if min(d, c) < 0 or k - d < SMALLEST_COHORT:
            raise FormatError(f"cohort: expected at least {SMALLEST_COHORT} members to be left, got {k} less {d}")
        if self.threshold > k - d:
            raise FormatError(f"cohort: expected more than 2 x dropouts + colluders = {2 * d + c} members, got {k}")

    @property
    def threshold(self) -> int:
        """Signatures under one survivor list, and shares of one secret, that are enough: more than (k + c)/2.

        Two lists of one round would need two quorums, which have more than c members in common; an honest one signs one list.
        """
        return (self.members + self.colluders) // 2 + 1

    @property
    def least_survivors(self) -> int:
        """Members whose numbers must be in the sum."""
        return self.members - self.dropouts

    def share_variance(self, guarantee: Guarantee) -> int:
        """Return the variance of the noise that each member adds to each coordinate."""
        honest = self.members - self.dropouts - self.colluders  # at least 1, since the threshold can be reached
        return -(-noise_variance(guarantee, NORM_SQUARED) // honest)

    @property
    def most_units(self) -> int:
        """Privacy units that one member may bring, so that the sum of all stays inside 32 bits."""
        return MAX_UNITS // self.members


@dataclass(frozen=True, slots=True)
class CohortSeal:
    """By whom a specification was released together, and their signatures under it."""

    cohort_id: bytes  # SHA-256 of the parameters that every member signed (protocol/cohort_round.py)
    resilience: Resilience
    survivors: tuple[bytes, ...]  # Ed25519 keys of the owners whose records are in the sum, in order
    signatures: tuple[bytes, ...] = ()  # one each, in the same order

    def __post_init__(self) -> None:
        if any(len(value) != ID_BYTES for value in (self.cohort_id, *self.survivors)):
            raise FormatError(f"cohort: expected an id and keys of {ID_BYTES} bytes")
        if not self.resilience.least_survivors <= len(self.survivors) <= self.resilience.members:
            raise FormatError(f"cohort: expected at least {self.resilience.least_survivors} survivors, got {len(self.survivors)}")
        if tuple(sorted(set(self.survivors))) != self.survivors:
            raise FormatError("cohort: expected its survivors in order and once each")
        if len(self.signatures) != len(self.survivors) or any(len(signature) != SIGNATURE_BYTES for signature in self.signatures):
            raise FormatError(f"cohort: expected the signatures of all {len(self.survivors)} survivors, got {len(self.signatures)}")

    def noise_variance(self, guarantee: Guarantee) -> int:
        """Return the variance of the noise that is in each coordinate of the sum."""
        return len(self.survivors) * self.resilience.share_variance(guarantee)

    def require(self, guarantee: Guarantee, variance: int) -> None:
        """Raise FormatError unless a specification under this guarantee has the noise of its survivors' shares."""
        if guarantee.unit != RECORD:  # a person at several members would be several units, each with its own vector
            raise FormatError(f"cohort: expected the unit 'record', got {str(guarantee.unit)!r}")
        if variance != (expected := self.noise_variance(guarantee)):
            raise FormatError(f"noise_variance: {len(self.survivors)} survivors' shares make {expected}, got {variance}")

    def verify(self, statement: bytes) -> None:
        """Raise InvalidSignature unless every survivor signed this statement."""
        for survivor, signature in zip(self.survivors, self.signatures, strict=True):
            verify_signature(survivor, signature, statement, "cohort: a survivor's signature does not verify")


def statement_of(
    cohort_id: bytes, resilience: Resilience, survivors: Sequence[bytes], name: str, base_model: bytes, map_id: bytes,
    guarantee: Guarantee, variance: int, simulated: bool, noisy_sums: Sequence[int],
) -> bytes:  # fmt: skip
    """Return what every survivor signs: all that the release says, but whose chain of releases it lies in."""
    metadata = {
        "colluders": resilience.colluders, "delta": format_decimal(guarantee.delta), "dropouts": resilience.dropouts,
        "epsilon": format_decimal(guarantee.epsilon), "members": resilience.members, "name": name, "noise_variance": variance,
        "relation": str(guarantee.relation), "simulated": int(simulated), "survivors": len(survivors), "unit": str(guarantee.unit),
    }  # fmt: skip
    sums = b"".join(value.to_bytes(4, "little", signed=True) for value in noisy_sums)
    return encode(STATEMENT, metadata, b"".join((cohort_id, base_model, map_id, *survivors)) + sums)


def verify_signature(key: bytes, signature: bytes, data: bytes, otherwise: str) -> None:
    """Raise InvalidSignature, in these words, unless an Ed25519 key signed the data."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, data)
    except (BadSignature, ValueError):
        raise InvalidSignature(otherwise) from None
