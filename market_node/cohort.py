"""The operator's side of a cohort's round: it carries messages, believes none, and gets the sum and nothing else.

What is here keeps honest members together: it drops what does not verify and goes on with whoever is left.  A dishonest operator runs
other code; what that cannot do is the members' to see to (protocol/cohort_round.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from protocol.cohort_round import Ask, Cohort, Roster, Step, Transcript, aggregate, boxes_in, heard
from protocol.errors import CampaignFailed, FormatError, VeilmartError
from protocol.release import open_envelope

log = logging.getLogger("veilmart.campaign")

Exchange = Callable[[Step, Mapping[bytes, bytes]], Mapping[bytes, bytes]]
"""Sends members, by their owner's keys, what they are asked; returns what came back in time, nothing of those who said nothing."""


def convene(cohort: Cohort, exchange: Exchange) -> bytes:
    """Return the envelope that a round over these members gives, published by one of its survivors and signed by all.

    Raises CampaignFailed where too few members are left, or their messages make no sum.
    """

    def all_say(step: Step, asks: Mapping[bytes, Sequence[bytes]], least: int) -> dict[bytes, bytes]:
        answers = exchange(step, {member: Ask(step, cohort, tuple(parts)).to_bytes() for member, parts in asks.items()})
        said = {member: answer for member, answer in answers.items() if _is_from(member, cohort, step, answer)}
        log.info("cohort=%s step=%s asked=%d said=%d", cohort.cohort_id.hex()[:16], step, len(asks), len(said))
        if len(said) < least:
            raise CampaignFailed(f"cohort: expected at least {least} members to {step}, got {len(said)}")
        return dict(sorted(said.items()))

    sizes = cohort.resilience
    adverts = all_say(Step.ADVERTISE, dict.fromkeys(cohort.members, ()), sizes.least_survivors)
    dealt = all_say(Step.SHARE, dict.fromkeys(adverts, tuple(adverts.values())), sizes.least_survivors)
    masked = all_say(Step.MASK, _boxes(Roster.of(cohort, list(adverts.values())), dealt), sizes.least_survivors)
    agreed = all_say(Step.AGREE, dict.fromkeys(masked, tuple(masked.values())), sizes.threshold)
    revealed = all_say(Step.REVEAL, dict.fromkeys(agreed, tuple(agreed.values())), sizes.threshold)
    transcript = Transcript(*(tuple(said.values()) for said in (adverts, masked, agreed, revealed)))
    try:
        survivors = aggregate(cohort, transcript).survivors
    except VeilmartError as error:  # a member's shares were wrong, say: nobody knows whose
        raise CampaignFailed(f"cohort: its messages make no sum ({error.code})") from None
    signed = all_say(Step.SIGN, dict.fromkeys(survivors, transcript.to_parts()), len(survivors))
    return _envelope(cohort, exchange, survivors, (*transcript.to_parts(), *signed.values()))


def _is_from(member: bytes, cohort: Cohort, step: Step, answer: bytes) -> bool:
    try:
        return heard(cohort, step, answer)[0] == member
    except VeilmartError as error:
        log.warning("cohort=%s step=%s member=%s code=%s", cohort.cohort_id.hex()[:16], step, member.hex()[:16], error.code)
        return False


def _boxes(roster: Roster, dealt: Mapping[bytes, bytes]) -> dict[bytes, list[bytes]]:
    """Return, for each member that dealt, the boxes for it, each behind its dealer's key; a dealer of something else has dropped out."""
    of_dealer = {}
    for dealer, message in dealt.items():
        with suppress(FormatError):
            of_dealer[dealer] = boxes_in(roster, message)[1]
    return {member: [dealer + boxes[member] for dealer, boxes in of_dealer.items() if dealer != member] for member in of_dealer}


def _envelope(cohort: Cohort, exchange: Exchange, survivors: Sequence[bytes], parts: tuple[bytes, ...]) -> bytes:
    """Return the envelope of the first survivor who makes one: each would be as good."""
    ask = Ask(Step.SEAL, cohort, parts).to_bytes()
    for survivor in survivors:
        envelope = exchange(Step.SEAL, {survivor: ask}).get(survivor, b"")
        try:
            release = open_envelope(envelope)
        except VeilmartError:
            continue
        if release.cohort is not None and release.cohort.cohort_id == cohort.cohort_id:
            return envelope
    raise CampaignFailed("cohort: no survivor published what all of them signed")
