"""A whole market, looked at by a client that believes nothing: its log, every release, what it says of all, and some answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nodes.audit.specification import Check
from nodes.copies import Copies
from nodes.market_client import Exchange, MarketClient
from nodes.query import find_encrypted
from protocol.admission import AdmissionPolicy, admit_release
from protocol.errors import FormatError, InvalidProof, InvalidSignature, NotAdmitted, VeilmartError
from protocol.features import FeatureMap
from protocol.notices import Kind, Notice
from protocol.proof import Finding, judge
from protocol.release import Release, open_envelope
from protocol.scoring import sketch_of

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Flag:
    """A release that no honest owner would have made, as far as its public numbers tell."""

    title: str
    reason: str


@dataclass(frozen=True, slots=True)
class MarketAudit:
    """What was found."""

    market_key: bytes
    size: int
    root: bytes
    known_size: int  # of the log when this home saw it last
    checks: tuple[Check, ...]
    flags: tuple[Flag, ...]


def audit_market(
    client: MarketClient, feature_map: FeatureMap, answers: int = 3, on_progress: Progress = lambda stage, done, of: None
) -> MarketAudit:
    """Return what a market's log, releases and answers show.

    Raises InvalidProof or InvalidSignature where the market contradicts what this home has seen or what it signed itself: the evidence
    is kept, and there is nothing more to audit.
    """
    known = client.checkpoint(client.market_key) if client.market_key is not None else None
    description = client.describe()  # verifies that the log extends the known one
    envelopes = client.envelopes(feature_map)  # verifies every signature, every row, term and card, and the root of the log
    releases = [open_envelope(envelope) for envelope in envelopes]
    newest = client.checkpoint(description.market_key)
    assert newest is not None
    known_size = known.size if known is not None else 0
    from_ = f"extends the one of {known_size} releases seen here before" if known_size else "seen here for the first time"
    checks = [
        Check("log", True, f"{newest.size} releases under root {newest.root.hex()[:16]}, {from_}"),
        Check("releases", True, f"{len(releases)} signatures verified, all rows, terms and cards recomputed"),
    ]
    notices = client.notices()
    flags = [*implausible(releases, description.admission), *copies(releases, notices), *broken_chains(releases, notices)]
    if not description.simulation:
        flags += [Flag(release.title, "made with simulated noise") for release in releases if release.simulated]
    checks.append(Check("plausible", not flags, f"{len(flags)} releases flagged" if flags else "no release is implausible, none a copy"))
    checks.append(_aggregates(client, feature_map))
    checks.append(_answers(client, feature_map, answers if releases else 0, on_progress))
    return MarketAudit(description.market_key, newest.size, newest.root, known_size, tuple(checks), tuple(flags))


def implausible(releases: Sequence[Release], policy: AdmissionPolicy) -> list[Flag]:
    """Return the releases that the market should have refused by the policy that it states."""
    flags = []
    for release in releases:
        try:
            admit_release(release, policy)
        except NotAdmitted as error:
            flags.append(Flag(release.title, str(error)))
    return flags


def broken_chains(releases: Sequence[Release], notices: Sequence[Notice]) -> list[Flag]:
    """Return the releases that name another predecessor than the one here: their owner's key signed two of that number.

    Who copied a key, or drew again from an older ledger, leaves this trace, though each of both was shown to another market.
    """
    before = {notice.subjects[0]: notice.owner for notice in notices if notice.kind is Kind.ROTATION}
    numbered = {(release.owner, release.release_number): release for release in releases}
    flags = []
    for release in releases:
        owner, seen = release.owner, set[bytes]()
        while (found := numbered.get((owner, release.release_number - 1))) is None and owner in before and owner not in seen:
            seen.add(owner)
            owner = before[owner]  # numbers go on under the next key
        if found is not None and found.release_id != release.previous:
            flags.append(Flag(release.title, f"follows another release {found.release_number} than {found.title}: its key signed two"))
    return flags


def copies(releases: Sequence[Release], notices: Sequence[Notice] = ()) -> list[Flag]:
    """Return the releases that are nearer to an earlier one of another owner than two independent noises leave them."""
    reason = "nearer to {} than noise leaves two data sets"
    return [Flag(releases[later].title, reason.format(releases[earlier].title)) for later, earlier in Copies(releases, notices).pairs()]


def _aggregates(client: MarketClient, feature_map: FeatureMap) -> Check:
    """Return whether what the market signed about all its releases is what they give."""
    try:
        aggregates = client.recomputed_aggregates(feature_map)
    except (InvalidProof, InvalidSignature, FormatError) as error:
        return Check("aggregates", False, str(error))
    return Check("aggregates", True, f"of {aggregates.federation.releases} standing releases, recomputed bit for bit")


def _answers(client: MarketClient, feature_map: FeatureMap, count: int, on_progress: Progress) -> Check:
    """Return whether so many answers to encrypted queries, about nothing in particular, are those that the releases give."""
    if not count:
        return Check("answers", True, "none was asked for")
    releases: list[Release] = []
    for done in range(count):
        on_progress("answers", done, count)
        kept: list[Exchange] = []
        # A query that the market cannot tell from anybody's: fresh random features, encrypted as every other.
        rng = np.random.default_rng(secrets.randbits(128))
        rows = rng.standard_normal((20, feature_map.dimension))
        try:
            find_encrypted(
                sketch_of(rows / np.linalg.norm(rows, axis=1, keepdims=True), feature_map, 2), client, feature_map, on_exchange=kept.append
            )
        except VeilmartError as error:
            if not kept:
                return Check("answers", False, f"query {done + 1} was not answered: {error}")
        if not releases or len(releases) < kept[-1].proof.head.size:
            releases = [open_envelope(envelope) for envelope in client.envelopes(feature_map)]
        judgement = judge(kept[-1].proof, releases, feature_map)
        if judgement.finding is not Finding.HONEST:
            return Check("answers", False, f"query {done + 1}: {judgement.finding}: {judgement.reason}")
    return Check("answers", True, f"{count} answers evaluated again, all as signed")
