"""The audit of DP-SGD: what it can show, that it refutes what is broken, and that it does not refute what is honest."""

import json
import math
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes import private_training
from nodes.accountant import prv_epsilon
from nodes.audit.bounds import one_run_epsilon
from nodes.audit.profile import largest_multiplier, losses, multiplier_for, profile_of
from nodes.audit.training import Side, audit_training, by_coin, check_of, claim_of, independent, membership, power_of
from nodes.base_model import BaseModel
from nodes.command import build
from nodes.finetune import Recipe, finetune
from nodes.private_noise import normals, poisson_batch
from nodes.private_training import PrivateRecipe, _private_optimiser, finetune_privately
from nodes.records import Pair
from protocol.errors import RecordError, UsageError
from protocol.privacy import Guarantee, PoissonSampledGaussian, PrivateTraining, epsilon_at

SPLIT = 3
THREE = PrivateRecipe(Guarantee(3.0, 1e-6), rank=8, steps=40)  # as the product's, at a rank with a weight a canary on the tiny model
CLAIM = PrivateTraining(THREE.guarantee, THREE.event)
WORDS = random.Random(8)  # of nothing that is protected: answers that can be learnt by heart alone, in an order that tells nothing
RECORDS = [Pair(f"question {WORDS.randrange(1000)}", f"{WORDS.randrange(10**6)}") for _ in range(120)]


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory, torch.float32)


@pytest.fixture(scope="module")
def activations(model):
    return model.prefix_pass(RECORDS, split=SPLIT, layer=2)[1]


@pytest.fixture(scope="module")
def power():
    return power_of(CLAIM, 2_000)


def audit(model, activations, power, **how):
    return audit_training(model, activations[:8], THREE, power, **how)


def failed(found) -> set[str]:
    return {check.name for check in found.checks if not check.holds}


# The exact trade-off -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [THREE.event, PoissonSampledGaussian(0.9, 0.05, 200), PoissonSampledGaussian(4.0, 0.125, 40)])
def test_the_profile_agrees_with_the_prv_accountant(event):
    """Another implementation, of both directions; ours is of adding a unit, which is the worse one here, and rounds losses up."""
    found = profile_of(event).epsilon(1e-6)
    assert found == pytest.approx(prv_epsilon([event], 1e-6), abs=0.002 + event.steps * 5e-4)


@pytest.mark.parametrize("steps", [1, 40])
def test_the_profile_of_every_unit_in_every_step_is_the_exact_gaussian(steps):
    found = profile_of(PoissonSampledGaussian(6.0, 1.0, steps))
    exact = epsilon_at(1e-6, 6.0 / math.sqrt(steps))
    assert exact <= found.epsilon(1e-6) <= exact + 0.001 + steps * 5e-4
    assert found.auc == pytest.approx(0.5 * math.erfc(-math.sqrt(steps) / 6 / 2), abs=0.02)


def test_no_threshold_passes_the_trade_off_and_the_likelihood_ratio_reaches_it():
    """Simulated canaries of the claimed mechanism, at every level within five standard errors."""
    rng, event, count = np.random.default_rng(3), THREE.event, 60_000
    seen = rng.standard_normal((2, event.steps, count))
    seen[1] += (rng.random((event.steps, count)) < event.sampling_rate) / event.multiplier
    absent, present = (losses(side, event).sum(axis=0) for side in seen)
    for level in (0.05, 0.2, 0.5):
        found = float((present > np.quantile(absent, 1 - level)).mean())
        assert found == pytest.approx(profile_of(event).true_positives(level), abs=5 * math.sqrt(0.25 / count) + 0.01)


def test_the_multiplier_is_the_one_that_the_rates_come_from():
    event = THREE.event
    assert largest_multiplier(event, 0.2, profile_of(event).true_positives(0.2)) == pytest.approx(event.multiplier, rel=3e-3)
    assert largest_multiplier(event, 0.3, 0.3) == math.inf
    assert multiplier_for(event, 3.0, 1e-6) <= event.multiplier, "the ledger's accountant is not below the exact one"


def test_the_one_run_bound_holds_for_randomised_response():
    """Its worst case: each guess is right with e^epsilon/(1 + e^epsilon); 400 audits at 99 %, at most 15 of them above (p = 1e-5)."""
    rng, epsilon, guesses = np.random.default_rng(5), 1.0, 500
    right = rng.binomial(guesses, 1 / (1 + math.exp(-epsilon)), 400)
    shown = np.array([one_run_epsilon(1_000, guesses, int(count), 0.0, 0.99) for count in right])
    assert (shown > epsilon).sum() <= 15
    assert np.median(shown) > 0.6, "and it is no empty bound"
    assert one_run_epsilon(1_000, guesses, 400, 1e-6) < one_run_epsilon(1_000, guesses, 400, 0.0)
    assert one_run_epsilon(1_000, guesses, guesses // 2, 0.0) == 0.0


# The audit -----------------------------------------------------------------------------------------------------------------


def test_the_power_is_known_beforehand_and_grows_with_the_canaries(power):
    assert power.enough
    assert not power_of(CLAIM, 400).enough
    assert 0 <= power.expected < 3.0


def test_honest_trainings_are_not_refuted(model, activations, power):
    """Three of them; one in three hundred would be, by chance.  Each shows something with a probability above 0.9."""
    found = [audit(model, activations, power) for _ in range(3)]
    for one in found:
        assert not one.refuted, one.checks
        assert one.one_run_epsilon <= 3.0
    assert max(one.epsilon_lower_bound for one in found) > 0


def test_noise_of_half_the_size_is_refuted(model, activations, power):
    found = audit(model, activations, power, draw=lambda count: normals(count) / 2)
    assert {"empirical epsilon", "noise multiplier", "noise"} <= failed(found)
    assert found.epsilon_lower_bound > 3.0


def test_a_training_that_does_not_clip_is_refuted(model, activations, power, monkeypatch):
    def add_up(self) -> None:
        for parameter in self.params:
            total = parameter.grad_sample.double().sum(0)
            parameter.summed_grad = total if parameter.summed_grad is None else parameter.summed_grad + total

    monkeypatch.setattr(_private_optimiser(), "clip_and_accumulate", add_up)
    assert {"bounded", "empirical epsilon"} <= failed(audit(model, activations, power))


def test_batches_that_are_twice_as_full_are_refuted(model, activations, power):
    found = audit(model, activations, power, sample=lambda count, rate: poisson_batch(count, 3 * rate))
    assert "empirical epsilon" in failed(found)


def test_the_same_noise_in_every_step_is_refuted(model, activations, power):
    kept = {}
    found = audit(model, activations, power, draw=lambda count: kept.setdefault(count, normals(count)))
    assert "noise" in failed(found)


def test_noise_of_a_seed_is_refuted():
    assert independent().holds
    assert not independent("import numpy\ndraw = lambda count: numpy.random.default_rng(7).standard_normal(count)").holds


def test_canaries_are_clipped_units_and_nothing_else_changes(model, activations):
    """Without noise, and every unit in every batch: what each step sees of a canary is the clip exactly, and of an absent one nothing."""
    from nodes.private_training import SLACK, Canaries

    seen = []
    canaries = Canaries(4, 10.0, lambda places, noisy: seen.append(noisy[places]), (0, 2))
    silent = [replace(activations[0], encoded=replace(activations[0].encoded, response_start=len(activations[0].encoded.tokens)))]
    finetune_privately(
        model, silent, THREE, canaries=canaries, draw=lambda count: np.zeros(count), sample=lambda count, rate: np.ones(count, bool)
    )
    expected = 1 / (THREE.event.multiplier * SLACK)
    assert np.allclose(seen, np.array([[expected, 0, expected, 0]] * THREE.steps), atol=1e-4)


def test_more_canaries_than_weights_are_refused(model, activations, power):
    with pytest.raises(UsageError, match="at most one a weight"):
        audit_training(model, activations, replace(THREE, rank=1), power)


# Membership ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unprotected(model, activations):
    return finetune(model, activations[::2], Recipe(epochs=20, max_steps=300, rank=8, learning_rate=1e-2))


def test_an_adapter_without_a_guarantee_is_flagged(model, activations, unprotected):
    attack = membership(unprotected, model, Side(activations[::2]), Side(activations[1::2]))
    assert attack.leaks
    assert claim_of(unprotected) is None
    assert not check_of(attack, None).holds


def test_control_a_private_adapter_is_not(model, activations):
    inside, outside = activations[::2], activations[1::2]
    adapter = finetune_privately(model, inside, PrivateRecipe(Guarantee(3.0, 1e-6)))
    attack = membership(adapter, model, Side(inside), Side(outside))
    assert not attack.leaks
    assert check_of(attack, claim_of(adapter)).holds


def test_an_adapter_without_a_guarantee_that_states_one_is_refuted(model, activations, unprotected):
    attack = membership(unprotected, model, Side(activations[::2]), Side(activations[1::2]))
    labelled = replace(unprotected, guarantee=str(CLAIM))
    claim = claim_of(labelled)
    assert claim is not None
    assert claim.guarantee.epsilon == 3.0
    assert not check_of(attack, claim).holds


def test_too_few_records_are_not_attacked(model, activations, unprotected):
    assert membership(unprotected, model, Side(activations[:9]), Side(activations[9:])) is None


def test_every_record_is_in_by_a_coin_of_its_own(activations):
    inside, outside = by_coin(activations)
    assert len(inside.records) + len(outside.records) == len(activations)
    assert inside.records
    assert outside.records
    assert {len(by_coin(activations)[0].records) for _ in range(40)} != {len(inside.records)}


def test_all_records_of_a_person_are_in_or_out_together(activations):
    whose = [f"person-{at // 3}" for at in range(len(activations))]
    inside, outside = by_coin(activations, whose)
    assert sorted([*inside.units, *outside.units]) == sorted(whose)
    assert not set(inside.units) & set(outside.units)
    apart = by_coin(activations)  # the control: a coin for each record tears persons apart
    at = {id(one): whose[place] for place, one in enumerate(activations)}
    assert {at[id(one)] for one in apart[0].records} & {at[id(one)] for one in apart[1].records}
    with pytest.raises(RecordError, match="2 records or persons"):
        by_coin(activations, ["one"] * len(activations))


def test_persons_are_told_by_the_mean_of_their_records(model, activations, unprotected):
    sides = [Side(activations[at::2], [f"{at}-{place // 2}" for place in range(len(activations[at::2]))]) for at in (0, 1)]
    attack = membership(unprotected, model, *sides)
    assert (attack.members, attack.strangers) == tuple(len(set(side.units)) for side in sides)
    assert attack.leaks
    few = Side(activations[:20], [str(place // 3) for place in range(20)])
    assert membership(unprotected, model, few, sides[1]) is None, "seven persons, whatever the number of records"


# The command ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, tiny_model_directory, capsys):
    """Run `audit training` over the tiny model, and return (exit code, its JSON)."""

    def run(*words: str):
        data = tmp_path / "notes.jsonl"
        lines = [{"prompt": one.prompt, "response": one.response, "person": f"p{at // 2}"} for at, one in enumerate(RECORDS)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        common = ("--data", str(data), "--base", str(tiny_model_directory), "--home", str(tmp_path), "--json")
        code = build()(["audit", "training", *common, *words], standalone_mode=False)
        return code or 0, json.loads(capsys.readouterr().out)

    return run


def test_a_training_is_audited_in_one_command(command):
    code, found = command("--epsilon", "8", "--canaries", "1500", "--limit", "40")
    assert (code, found["schema"], found["refuted"]) == (0, "veilmart.audit-training/1", False)
    assert found["power_against_half_the_noise"] >= 0.9
    assert 0 < found["epsilon_lower_bound"] <= 8.0


@pytest.mark.slow
def test_a_training_of_persons_is_audited_as_such(command, monkeypatch):
    seen, trained = [], private_training.finetune_privately
    monkeypatch.setattr(private_training, "finetune_privately", lambda *args, **how: seen.append(how["units"]) or trained(*args, **how))
    code, found = command("--epsilon", "8", "--canaries", "1500", "--limit", "60", "--unit", "person")
    assert (code, found["refuted"]) == (0, False)
    assert found["guarantee"].endswith("unit field:person")
    assert len(seen[0]) == 2 * len(set(seen[0])), "the training knows whose each record is"


def test_an_audit_without_power_is_refused_before_it_starts(command, monkeypatch):
    monkeypatch.setattr(BaseModel, "prefix_pass", lambda *args, **how: pytest.fail("computed"))
    with pytest.raises(UsageError, match="canaries would refute noise of half the size") as error:
        command("--epsilon", "3", "--canaries", "300")
    assert error.value.hint in ("--canaries 1000", "--canaries 2000", "--canaries 4000")
    with pytest.raises(UsageError, match="a number or 'none'"):
        command("--epsilon", "little")
    with pytest.raises(UsageError, match="go together"):
        command("--adapter", "x.safetensors")


def test_an_adapter_in_a_file_is_attacked_by_the_command(command, tmp_path, activations, unprotected):
    """Trained on every other record; with a false label it is refuted, without one it is flagged."""
    strangers, members = tmp_path / "strangers.jsonl", tmp_path / "members.jsonl"
    for path, part in ((members, RECORDS[::2]), (strangers, RECORDS[1::2])):
        path.write_text("".join(json.dumps({"prompt": one.prompt, "response": one.response}) + "\n" for one in part))
    file = tmp_path / "adapter.safetensors"
    for label, expected in (("none", (0, False)), (str(CLAIM), (4, True))):
        file.write_bytes(replace(unprotected, guarantee=label).to_bytes())
        code, found = command("--adapter", str(file), "--strangers", str(strangers), "--data", str(members))
        assert (code, found["refuted"]) == expected
        assert found["flagged"]
        assert found["guarantee"] == label


# On the real model ---------------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_on_the_default_slm_noise_of_half_the_size_is_refuted_and_honest_noise_is_not(slm_directory):
    """Three trainings at epsilon 3 and one without a guarantee, in 20 minutes of two cores each at most."""
    from tests.bench.audit import training

    folder = Path(os.environ.get("VEILMART_DATA", "../shared/data"))
    if not folder.is_dir():
        (pytest.fail if os.environ.get("VEILMART_REQUIRE_DATA") else pytest.skip)("no real task data: set VEILMART_DATA")
    found = training(folder, slm_directory)
    honest, _, half = found["rows"]
    assert found["power_against_half"] >= 0.9
    assert honest["failed"] == []
    assert {"empirical epsilon", "noise multiplier"} <= set(half["failed"])
    assert half["lower_bound"] > 3.0 >= honest["lower_bound"]
    assert found["unprotected"][1]["flagged"], "of answers in whole sentences; labels of one word are learnt by heart less"
    assert max(row["cpu_seconds"] for row in found["rows"]) < 2 * 20 * 60
