"""The audits find nothing on our mechanism, and refute each of the broken ones beside it."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy.stats import norm

from nodes.accountant import prv_epsilon, second_opinion
from nodes.audit.bounds import Ceiling, clopper_pearson, epsilon_of, expected_bound, mu_lower_bound, mu_of
from nodes.audit.membership import attack_ours, attack_reduced_set, ceiling, rates, reduced_set
from nodes.audit.release import audit_release
from nodes.audit.specification import audit_specification, our_mechanism
from nodes.command import build
from protocol import specification as specifications
from protocol.admission import LENIENT
from protocol.cohort import CohortSeal
from protocol.hazmat.noise import discrete_gaussian, operating_system
from protocol.privacy import Guarantee, PoissonSampledGaussian, PrivateTraining, noise_variance, renyi_epsilon
from protocol.release import AdapterReference, Release, sign_release
from protocol.specification import COUNT_STEP, FEATURE_SCALE, NORM_SQUARED, quantise
from tests.protocol.cohorts import cohort_of, owners
from tests.protocol.worlds import envelope_of, release_of, small_map

ONE, FOUR = Guarantee(1.0, 1e-6), Guarantee(4.0, 1e-6)
D = 96


# Bounds ------------------------------------------------------------------------------------------------------------------


def test_the_interval_holds_the_probability_as_often_as_it_says():
    rng, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        low, high = clopper_pearson(int(rng.binomial(300, 0.3)), 300, 0.95)
        missed += not low <= 0.3 <= high
    assert missed / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert clopper_pearson(0, 10, 0.95)[0] == 0.0
    assert clopper_pearson(10, 10, 0.95)[1] == 1.0


@pytest.mark.parametrize("mu", [0.1, 0.268, 1.0, 2.0])
def test_the_bound_is_below_the_truth_and_near_it(mu):
    rng = np.random.default_rng(int(100 * mu))
    bounds = [mu_lower_bound(rng.standard_normal(50_000), mu + rng.standard_normal(50_000)) for _ in range(50)]
    assert max(bounds) <= mu
    assert np.mean(bounds) == pytest.approx(expected_bound(mu, 50_000), abs=0.02)


def test_the_bound_of_a_single_threshold_is_not_chosen_on_what_it_counts():
    """Without a canary's effect a bound must stay at 0, though the best of six thresholds always looks like something."""
    rng = np.random.default_rng(3)
    positive = sum(mu_lower_bound(rng.standard_normal(1000), rng.standard_normal(1000), confidence=0.9) > 0 for _ in range(300))
    assert positive / 300 < 0.1 + 3 * math.sqrt(0.09 / 300)


def test_mu_and_epsilon_are_one_guarantee_in_two_units():
    for epsilon in (0.1, 1.0, 4.0, 8.0):
        assert epsilon_of(mu_of(epsilon, 1e-6), 1e-6) == pytest.approx(epsilon, rel=1e-6)


def test_the_ceiling_is_that_of_two_normal_distributions():
    mu = mu_of(1.0, 1e-6)
    assert Ceiling(mu).auc == pytest.approx(norm.cdf(mu / math.sqrt(2)))
    assert Ceiling(mu).auc == pytest.approx(0.566, abs=0.001)
    assert Ceiling(mu).true_positives(0.01) == pytest.approx(0.018, abs=0.001)


# The mechanism, and broken ones ------------------------------------------------------------------------------------------


def less_noise(features, guarantee, share=0.8):
    variance = round(noise_variance(guarantee, NORM_SQUARED) * share**2)
    source = operating_system()
    return np.array([int(value) + discrete_gaussian(variance, source) for value in quantise(features).rows.sum(axis=0)])


def no_bound(features, guarantee):
    units = np.trunc(FEATURE_SCALE * features).astype(np.int64)
    rows = np.column_stack([np.full(len(units), COUNT_STEP), units])
    source = operating_system()
    return np.array([int(value) + discrete_gaussian(noise_variance(guarantee, NORM_SQUARED), source) for value in rows.sum(axis=0)])


def float_noise(features, guarantee):
    return quantise(features).rows.sum(axis=0) + np.random.default_rng().normal(0, noise_variance(guarantee, NORM_SQUARED) ** 0.5, D + 1)


def seeded_noise(features, guarantee):
    deviation = noise_variance(guarantee, NORM_SQUARED) ** 0.5
    return np.array([int(value) + round(random.gauss(0, deviation)) for value in quantise(features).rows.sum(axis=0)])


def named(mechanism):
    return {"mechanism": mechanism, "import_mechanism": f"from tests.nodes.test_audit import {mechanism.__name__} as mechanism"}


def failed(audit) -> list[str]:
    return [check.name for check in audit.checks if not check.holds]


def test_our_mechanism_is_the_guards():
    """The audit draws through the same two functions, looked up at the call: whoever breaks them breaks what is audited."""
    from nodes import guard
    from nodes.audit import specification

    assert specification.quantise is guard.quantise is specifications.quantise
    assert specification.estimate is guard.estimate is specifications.estimate


def test_an_honest_mechanism_is_not_refuted():
    rows = np.random.default_rng(1).standard_normal((30, D))
    # With 400 releases the bound was once at 0.47, by chance.
    audit = audit_specification(ONE, D, 2000, records=rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert failed(audit) == []
    assert 0.5 < audit.ratio <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("guarantee", "releases", "least"), [(ONE, 12_000, 0.85), (FOUR, 6_000, 0.92)], ids=["epsilon 1", "epsilon 4"])
def test_most_of_the_claim_is_shown(guarantee, releases, least):
    audit = audit_specification(guarantee, D, releases)
    assert failed(audit) == []
    assert least <= audit.ratio <= 1


@pytest.mark.slow
def test_a_hundred_audits_never_show_more_than_the_claim():
    assert max(audit_specification(ONE, D, 300).ratio for _ in range(100)) <= 1


@pytest.mark.nightly
def test_nearly_all_of_the_claim_is_shown():
    audit = audit_specification(ONE, D, 150_000)
    assert failed(audit) == []
    assert 0.93 <= audit.ratio <= 1


def test_less_noise_is_refuted():
    assert failed(audit_specification(ONE, D, 2_500, **named(less_noise))) == ["empirical epsilon"]


def test_a_missing_bound_is_refuted():
    assert "bounded" in failed(audit_specification(FOUR, D, 100, **named(no_bound)))


def test_float_noise_is_refuted():
    assert "integers" in failed(audit_specification(ONE, D, 100, **named(float_noise)))


def test_noise_of_a_seed_is_refuted():
    assert failed(audit_specification(ONE, D, 300, **named(seeded_noise))) == ["independent"]


def test_a_mechanism_that_cannot_be_run_elsewhere_is_not_taken_for_independent():
    assert "independent" in failed(audit_specification(ONE, D, 100, mechanism=our_mechanism, import_mechanism="raise SystemExit"))


# Membership --------------------------------------------------------------------------------------------------------------


def task(count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(99).standard_normal(D) + spread * rng.standard_normal((count, D))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_best_attack_on_ours_stays_below_the_theorem():
    attack, limit = attack_ours(task(60, 1), task(200, 2), ONE, 4000), ceiling(ONE)
    assert attack.auc - 3.3 * attack.error <= limit.auc
    assert attack.auc > 0.55, "the attack works: it reaches what is allowed"


def test_the_attack_passes_the_theorem_where_there_is_too_little_noise():
    """Control."""
    attack = attack_ours(task(60, 1), task(200, 2), ONE, 4000, lambda features, guarantee: less_noise(features, guarantee, 0.5))
    assert attack.auc - 3.3 * attack.error > ceiling(ONE).auc


def test_a_reduced_set_gives_its_members_away():
    attack, _ = attack_reduced_set(task(60, 1), task(200, 2))
    assert attack.auc >= 0.9


def test_a_reduced_set_is_near_the_kernel_mean_of_its_data():
    """Else the attack would be one on a straw man."""
    data = task(60, 1)
    points, weights = reduced_set(data)

    def kernel(left, right):
        return np.exp(-0.1 * ((left[:, None] - right[None]) ** 2).sum(axis=2))

    own = kernel(data, data).mean()
    distance = own - 2 * (kernel(data, points) @ weights).mean() + weights @ kernel(points, points) @ weights
    other = kernel(task(60, 7), task(60, 7)).mean() + own - 2 * kernel(data, task(60, 7)).mean()
    assert 0 <= distance < 0.01 * other
    assert len(points) == 40


def test_rates_count_ties_as_half():
    assert rates(np.array([1.0, 1.0]), np.array([1.0, 1.0])).auc == 0.5
    assert rates(np.array([2.0]), np.array([1.0])).auc == 1.0


# A release ----------------------------------------------------------------------------------------------------------------

MAP = small_map()


def checks_of(release: Release) -> dict[str, bool]:
    return {check.name: check.holds for check in audit_release(release, MAP, LENIENT)}


def test_an_honest_release_passes():
    assert all(checks_of(release_of(MAP, Ed25519PrivateKey.generate())).values())


def test_an_audit_says_what_colluders_would_leave_of_a_cohorts_noise():
    cohort = cohort_of(owners(10), dropouts=2, colluders=4)
    seal = CohortSeal(cohort.cohort_id, cohort.resilience, cohort.members[:9], (bytes(64),) * 9)
    alone = release_of(MAP, Ed25519PrivateKey.generate(), count=2000)
    specification = replace(alone.specification, noise_variance=seal.noise_variance(ONE))
    checks = {check.name: check for check in audit_release(replace(alone, specification=specification, cohort=seal), MAP, LENIENT)}
    assert all(check.holds for check in checks.values())
    # Nine of ten signed: five shares of a quarter are left where four collude.
    assert checks["cohort"].evidence.startswith("9 of 10 owners signed; without the noise of 4 of them")
    assert f"s^2 = {5 * cohort.resilience.share_variance(ONE)}, needed {noise_variance(ONE, NORM_SQUARED)}" in checks["cohort"].evidence
    # The control: the same noise, and nobody's shares to explain it.
    assert not checks_of(replace(alone, specification=specification))["admission"]


def test_what_is_wrong_with_a_release_is_named():
    release = release_of(MAP, Ed25519PrivateKey.generate(), count=2000)
    assert [name for name, holds in checks_of(replace(release, simulated=True)).items() if not holds] == ["not simulated"]
    other = replace(release, specification=replace(release.specification, map_id=bytes(32)))
    assert [name for name, holds in checks_of(other).items() if not holds] == ["map"]
    assert checks_of(replace(release, base_model=bytes(32)))["base model"], "an owner may run the map's encoder beside its own model"
    bare = release.specification.noisy_sums.copy()
    bare[1:] = 0
    empty = replace(release, specification=replace(release.specification, noisy_sums=bare))
    assert not checks_of(empty)["residual"], "a release shorter than its own noise"


def test_an_adapters_epsilon_is_recomputed_from_the_mechanism_that_it_states():
    event = PoissonSampledGaussian(1.0, 0.1, 30)
    promise = PrivateTraining(Guarantee(8.0, 1e-6), event)

    def check(promise):
        release = release_of(MAP, Ed25519PrivateKey.generate(), adapter=AdapterReference(bytes(32), 1000, promise))
        return next(check for check in audit_release(release, MAP, LENIENT) if check.name == "adapter")

    honest = check(promise)
    assert honest.holds
    assert f"{renyi_epsilon([event], 1e-6):.3f} (Renyi), {prv_epsilon([event], 1e-6):.3f} (PRV)" in honest.evidence
    assert ("dp-accounting" in honest.evidence) is (second_opinion([event], 1e-6) is not None)
    object.__setattr__(promise, "guarantee", Guarantee(3.0, 1e-6))  # a claim that no parser lets in
    assert not check(promise).holds
    assert not check("none").holds


def test_commands(tmp_path, capsys, monkeypatch):
    from nodes.audit import specification
    from nodes.commands import audit

    file = tmp_path / "one.release"
    file.write_bytes(envelope_of(MAP, Ed25519PrivateKey.generate()))
    (tmp_path / "small.map").write_bytes(MAP.manifest)

    def run(*words) -> tuple[int, dict]:
        code = build(None)([*words, "--json"], standalone_mode=False)
        return code or 0, json.loads(capsys.readouterr().out)

    code, shown = run("audit", "release", str(file), "--map", str(tmp_path / "small.map"))
    assert (code, shown["refuted"]) == (0, False)
    code, shown = run("audit", "release", str(file))  # the shipped map is another one
    assert (code, shown["refuted"], [check["holds"] for check in shown["checks"] if check["name"] == "map"]) == (0, False, [False])
    simulated = release_of(MAP, key := Ed25519PrivateKey.generate(), simulated=True)
    file.write_bytes(sign_release(simulated, key))
    code, shown = run("audit", "release", str(file), "--map", str(tmp_path / "small.map"))
    assert (code, shown["refuted"]) == (audit.REFUTED, True)
    code, shown = run("audit", "specification", "--releases", "150")
    assert (code, shown["refuted"], shown["membership"]) == (0, False, None)
    whole = specification.audit_specification
    monkeypatch.setattr(specification, "audit_specification", lambda *args, **how: whole(*args, **how, **named(no_bound)))
    code, shown = run("audit", "specification", "--releases", "150", "--epsilon", "4")
    assert (code, shown["refuted"]) == (audit.REFUTED, True)
