"""The release: signed, content-addressed bytes of one learnware (docs/protocol.md 4), as a value to compute with.

Its bytes are read and written in protocol/claims.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from protocol.claims import MAGIC as MAGIC
from protocol.claims import MAX_ADAPTER_BYTES as MAX_ADAPTER_BYTES
from protocol.claims import MAX_ENVELOPE_BYTES as MAX_ENVELOPE_BYTES
from protocol.claims import NAME as NAME
from protocol.claims import NO_ID as NO_ID
from protocol.claims import SIGNATURE_BYTES as SIGNATURE_BYTES
from protocol.claims import AdapterReference as AdapterReference
from protocol.claims import Card as Card
from protocol.claims import Claims, Identified, open_claims, parse_claims
from protocol.cohort import CohortSeal as CohortSeal
from protocol.specification import Specification
from protocol.window import Window

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@dataclass(frozen=True, eq=False)
class Release(Identified):
    """One learnware as its owner publishes it."""

    owner: bytes  # Ed25519 public key
    release_number: int  # position in the owner's chain, from 1
    previous: bytes  # id of the owner's previous release, empty for the first
    base_model: bytes  # identity of the base model
    specification: Specification
    adapter: AdapterReference | None
    card: Card
    simulated: bool  # made with noise that is not secret; a real market refuses it
    window: Window  # when it holds
    cohort: CohortSeal | None = None  # where several owners released it together

    @cached_property
    def body(self) -> bytes:
        """The release bytes: what is signed, hashed and logged."""
        specification = self.specification
        return Claims(
            self.owner, self.release_number, self.previous, self.base_model, specification.map_id,
            tuple(specification.noisy_sums.tolist()), specification.noise_variance, specification.guarantee,
            self.adapter, self.card, self.simulated, self.window, self.cohort,
        ).body  # fmt: skip


def sign_release(release: Release, owner_key: Ed25519PrivateKey) -> bytes:
    """Return the envelope of a release: its bytes and the owner's signature."""
    return release.body + owner_key.sign(release.body)


def open_envelope(envelope: bytes) -> Release:
    """Return the release in an envelope; raise FormatError or InvalidSignature.  No IO."""
    return _release_of(open_claims(envelope))


def parse_release(body: bytes) -> Release:
    """Return the release of its canonical bytes; raise FormatError for any other encoding."""
    return _release_of(parse_claims(body))


def _release_of(claims: Claims) -> Release:
    sums = np.array(claims.noisy_sums, np.int32)
    release = Release(
        claims.owner, claims.release_number, claims.previous, claims.base_model,
        Specification(claims.map_id, sums, claims.noise_variance, claims.guarantee), claims.adapter, claims.card, claims.simulated,
        claims.window, claims.cohort,
    )  # fmt: skip
    release.__dict__["body"] = claims.body  # the canonical bytes are at hand: a market opens thousands of releases
    return release
