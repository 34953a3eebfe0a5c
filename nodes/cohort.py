"""A guard's part in cohorts: which rounds its owner joins, what it charges for them, and its answer to each step.

Whoever carries a round's messages decides nothing here: with whom, under which name and for how many rounds stands in the owner's policy.
The charge is durable before the masked numbers leave, and stays whatever becomes of the round (nodes/ledger.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nodes.ledger import Charge, Ledger, cohort_request, specification_charge
from protocol.claims import NAME
from protocol.codec import domain_tag
from protocol.cohort import LARGEST_COHORT
from protocol.cohort_round import Ask, Cohort, Member, Step, Transcript, aggregate, contribution, cosign, joint_release, sealed
from protocol.errors import CohortAborted, IncompatibleSpecification, Unauthorised, UsageError
from protocol.hazmat.noise import NoiseSource
from protocol.release import sign_release
from protocol.specification import BoundedVectors
from protocol.window import Window

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OPEN_ROUNDS = 4  # whose secrets are in memory at once: older ones are given up, so that nobody can fill it


@dataclass(frozen=True, slots=True)
class CohortRules:
    """With whom an owner releases a specification together, and how often others may begin a round."""

    name: str  # of the learnware
    members: frozenset[bytes]  # keys of the owners that it joins with; with none it joins no round
    colluders: int = 1  # the fewest that a round must be made for
    rounds: int = 1  # that may be charged for life; one that broke off is charged too
    minimum_units: int = 5

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError("cohort: expected a name of 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")
        if not 0 <= self.colluders < LARGEST_COHORT or self.rounds < 0 or self.minimum_units < 1:
            raise UsageError("cohort: expected colluders and rounds of 0 or more, and at least 1 unit")

    def require(self, cohort: Cohort, own: bytes) -> None:
        """Raise Unauthorised for a round that this owner does not join."""
        strangers = set(cohort.members) - self.members - {own}
        if strangers:
            raise Unauthorised(f"cohort: {len(strangers)} of its members are not in the owner's policy")
        if own not in cohort.members:
            raise Unauthorised("cohort: it is not for this owner")
        if cohort.name != self.name:
            raise Unauthorised("cohort: its name is not that of the owner's policy")
        if cohort.colluders < self.colluders:
            raise Unauthorised(f"cohort: the policy asks for at least {self.colluders} colluders, it is made for {cohort.colluders}")


class Rounds:
    """The rounds that one guard takes part in.  key, ledger, noise: the guard's.  vectors: the records' vectors, read when they are due.

    serves: ids of the map and of its encoder, and its dimension.  limits: raises for a guarantee that the policy does not allow.
    window: when a release that this guard publishes holds; its cosigners do not sign that.
    """

    def __init__(
        self, rules: CohortRules, key: Ed25519PrivateKey, ledger: Ledger, noise: NoiseSource, serves: tuple[bytes, bytes, int],
        limits: Callable[[Cohort], None], vectors: Callable[[int], BoundedVectors], window: Callable[[], Window],
    ) -> None:  # fmt: skip
        self._rules, self._key, self._ledger, self._noise = rules, key, ledger, noise
        self._serves, self._limits, self._vectors, self._window = serves, limits, vectors, window
        self._public = key.public_key().public_bytes_raw()
        self._open: OrderedDict[bytes, Member] = OrderedDict()
        self._lock = threading.Lock()

    def answer(self, data: bytes) -> bytes:
        """Return this member's message for a step; raise a VeilmartError where it takes no part, of which others learn nothing."""
        ask = Ask.from_bytes(data)
        self._require_wanted(ask.cohort)
        with self._lock:
            if ask.step in (Step.SIGN, Step.SEAL):
                return self._after(ask)
            return self._within(ask, self._member(ask))

    def _require_wanted(self, cohort: Cohort) -> None:
        self._rules.require(cohort, self._public)
        if (cohort.map_id, cohort.base_model, cohort.dimension) != self._serves:
            raise IncompatibleSpecification(f"map: expected {self._serves[0].hex()[:16]}, got {cohort.map_id.hex()[:16]}")
        if cohort.simulated != self._noise.simulated:
            raise Unauthorised("cohort: noise that is secret and noise from a seed do not go together")
        self._limits(cohort)

    def _member(self, ask: Ask) -> Member:
        cohort_id = ask.cohort.cohort_id
        if cohort_id not in self._open:
            if ask.step is not Step.ADVERTISE or self._ledger.charged(cohort_request(cohort_id)):
                raise CohortAborted("cohort: this guard is not in that round, or was started anew since")
            self._open[cohort_id] = Member(ask.cohort, self._key)
            while len(self._open) > OPEN_ROUNDS:
                self._open.popitem(last=False)
        return self._open[cohort_id]

    def _within(self, ask: Ask, member: Member) -> bytes:
        match ask.step:
            case Step.ADVERTISE:
                return member.advertise()
            case Step.SHARE:
                return member.share(ask.parts)
            case Step.MASK:
                return member.mask(ask.parts, lambda: self._contribution(ask.cohort))
            case Step.AGREE:
                return member.agree(ask.parts)
            case _:
                return member.reveal(ask.parts)

    def _contribution(self, cohort: Cohort) -> list[int]:
        """Charge, then draw: a crash in between costs a charge, and no crash gives numbers away that were not paid for."""
        charge = specification_charge(cohort.guarantee)
        self._ledger.price(charge).require()  # a refusal costs no work; `charge_cohort` decides again
        vectors = self._vectors(self._rules.minimum_units)
        self._ledger.charge_cohort(cohort.cohort_id, charge, self._rules.rounds)
        return contribution(vectors, cohort, self._noise)

    def _after(self, ask: Ask) -> bytes:
        """Sign, or publish, what the round's messages make.  Our signature among them says that we took part, whatever is in memory."""
        if not self._ledger.charged(cohort_request(ask.cohort.cohort_id)):
            raise CohortAborted("cohort: this owner's ledger knows nothing of that round")
        signed = [part for part in ask.parts if part.startswith(domain_tag(f"cohort-{Step.SIGN}", 1))]
        result = aggregate(ask.cohort, Transcript.from_parts([part for part in ask.parts if part not in signed]))
        if ask.step is Step.SIGN:
            return cosign(result, self._key)
        seal = sealed(result, signed)

        def make(number: int, previous: bytes) -> tuple[bytes, bytes]:
            release = joint_release(result, seal, self._public, number, previous, self._window())
            return release.release_id, sign_release(release, self._key)

        # It has a place in this owner's chain of releases; what it costs was charged with the round.
        return self._ledger.charge(_published(ask.cohort.cohort_id), Charge((), ask.cohort.guarantee.delta), make)


def _published(cohort_id: bytes) -> bytes:
    return cohort_request(domain_tag("cohort-published", 1) + cohort_id)
