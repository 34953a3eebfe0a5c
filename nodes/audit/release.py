"""What anybody can recompute about a release from its bytes alone: does its noise give what it claims?"""

from __future__ import annotations

import math

from nodes.accountant import PRV_ERROR, prv_epsilon, second_opinion
from nodes.audit.specification import Check
from protocol.admission import AdmissionPolicy, admit
from protocol.catalogue import name_of_map
from protocol.errors import NotAdmitted
from protocol.features import FeatureMap
from protocol.privacy import effective_multiplier, epsilon_at, noise_variance, renyi_epsilon, specification_event
from protocol.release import AdapterReference, CohortSeal, Release
from protocol.specification import NORM_SQUARED, Specification


def audit_release(release: Release, feature_map: FeatureMap | None, policy: AdmissionPolicy) -> list[Check]:
    """Return what was looked at, each with its evidence; the signature was verified when the envelope was opened.

    feature_map: the map that the release names, if it is at hand.
    """
    specification, guarantee = release.specification, release.specification.guarantee
    variance, least = specification.noise_variance, noise_variance(guarantee, NORM_SQUARED)
    epsilon = epsilon_at(guarantee.delta, effective_multiplier(variance, NORM_SQUARED))
    event = specification_event(variance, NORM_SQUARED)
    checks = [
        Check("signature", True, f"the owner {release.owner.hex()[:16]} signed these bytes"),
        Check("noise", variance >= least, f"s^2 = {variance}; epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g} needs {least}"),
        Check(
            "epsilon",
            epsilon <= guarantee.epsilon * (1 + 1e-9),
            f"recomputed {epsilon:.6f} (exact), {renyi_epsilon([event], guarantee.delta):.4f} (Renyi)"
            f"{_other(second_opinion([event], guarantee.delta))}; claimed {guarantee.epsilon:g}",
        ),
        Check("not simulated", not release.simulated, "the noise is secret" if not release.simulated else "its noise came from a seed"),
    ]
    try:
        admit(specification, policy, release.cohort)
        checks.append(Check("admission", True, "an honest owner under the market's policy can have released these sums"))
    except NotAdmitted as error:
        checks.append(Check("admission", False, str(error)))
    checks.append(_residual(release))
    if release.cohort is not None:
        checks.append(_cohort(release.cohort, specification))
    known = feature_map is not None and feature_map.map_id == specification.map_id
    checks.append(Check("map", known, f"{name_of_map(specification.map_id)}" + ("" if known else ", which is not at hand")))
    if known and feature_map is not None:
        named = release.base_model.hex()[:16]
        own = feature_map.base_model == release.base_model.hex()
        # Another one is no fault: the owner ran the map's encoder beside it.
        checks.append(Check("base model", True, named if own else f"{named}, beside the map's encoder {feature_map.base_model[:16]}"))
    checks.append(_adapter(release.adapter))
    return checks


def _cohort(cohort: CohortSeal, specification: Specification) -> Check:
    """Return that all who took part signed, which was verified when the envelope was opened, and what their colluding would leave."""
    sizes, survivors = cohort.resilience, len(cohort.survivors)
    left = (survivors - sizes.colluders) * sizes.share_variance(specification.guarantee)
    least = noise_variance(specification.guarantee, NORM_SQUARED)
    return Check(
        "cohort",
        left >= least,
        f"{survivors} of {sizes.members} owners signed; without the noise of {sizes.colluders} of them s^2 = {left}, needed {least}",
    )


def _adapter(adapter: AdapterReference | None) -> Check:
    """Return whether an adapter's mechanism, as the release states it, keeps the epsilon that it claims; one without a guarantee fails."""
    if adapter is None:
        return Check("adapter", True, "none published")
    promise = adapter.guarantee
    if isinstance(promise, str):
        return Check("adapter", False, f"guarantee {promise}; the total is unbounded")
    event, delta, claimed = promise.event, promise.guarantee.delta, promise.guarantee.epsilon
    renyi, prv = renyi_epsilon([event], delta), prv_epsilon([event], delta)
    return Check(
        "adapter",
        renyi <= claimed * (1 + 1e-9) and prv <= claimed * (1 + 1e-9) + PRV_ERROR,
        f"guarantee {promise}; noise {event.multiplier:g} of the clip, rate {event.sampling_rate:g}, {event.steps} steps: recomputed "
        f"{renyi:.3f} (Renyi), {prv:.3f} (PRV){_other(second_opinion([event], delta))}",
    )


def _other(epsilon: float | None) -> str:
    return "" if epsilon is None else f", {epsilon:.3f} (dp-accounting)"


def _residual(release: Release) -> Check:
    """Return whether the sums are at least as long as the noise alone: chi-square, one-sided, with D degrees of freedom."""
    from scipy.stats import chi2

    specification = release.specification
    squares = math.fsum(float(value) ** 2 for value in specification.noisy_sums[1:]) / specification.noise_variance
    probability = float(chi2.cdf(squares, specification.dimension))
    return Check(
        "residual",
        probability > 1e-6,
        f"squared length {squares:.1f} s^2 over {specification.dimension} coordinates, P = {probability:.2g}",
    )
