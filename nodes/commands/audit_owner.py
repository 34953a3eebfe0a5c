"""The auditor's commands on an owner's machine: `audit training`, `audit node`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes.commands.audit import REFUTED
from nodes.commands.options import (
    Base,
    Home,
    Json,
    Map,
    MaybeAuthority,
    MaybeMarket,
    Population,
    population_name,
    read_bytes,
    show,
)
from nodes.home import open_model
from protocol.errors import RecordError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nodes.audit.specification import Check
    from nodes.audit.training import Membership, Power, TrainingAudit
    from nodes.base_model import Activations, BaseModel
    from nodes.records import Record

MOST_CANARIES = 32_000


def audit_training(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Your records; with --adapter, those it was trained on.")],
    epsilon: Annotated[str, typer.Option("--epsilon", metavar="E|none", help="The claim to test; none trains without a guarantee.")] = "3",
    delta: Annotated[float, typer.Option("--delta", help="Delta of the claim.")] = 1e-6,
    canaries: Annotated[int, typer.Option("--canaries", min=200, max=MOST_CANARIES, help="Plant so many; more show more.")] = 4_000,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Attack this adapter (safetensors) instead of a training.")] = None,
    strangers: Annotated[
        Path | None, typer.Option("--strangers", help="With --adapter: records of the same source that it was not trained on.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Take only so many records of each file.")] = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Attack the training that makes adapters, in one run of it, and say what epsilon that shows.  Exit code 4 if it refutes the claim.

    A fair coin each decides which records and which canaries are trained on.  The adapter of an audit is thrown away: nothing is
    published, sent or charged, and what is printed is for the owner's eyes.  An adapter without a guarantee makes no claim: it is flagged.

    Example: veilmart audit training --data notes.jsonl --epsilon 3
    """
    from nodes import console
    from nodes.records import read_records

    if (adapter is None) != (strangers is None):
        raise UsageError("audit training: --adapter and --strangers go together", hint="records that the adapter was not trained on")
    records, model = read_records(data, limit), open_model(home, base)
    progress = console.ProgressLine(not as_json)
    if adapter is not None and strangers is not None:
        _attack_file(model, adapter, records, read_records(strangers, limit), as_json, progress)
    elif epsilon == "none":
        _attack_unprotected(model, records, as_json, progress)
    else:
        _audit_private(model, records, epsilon, delta, canaries, as_json, progress)


def _audit_private(
    model: BaseModel, records: Sequence[Record], epsilon: str, delta: float, canaries: int, as_json: bool, progress: Any
) -> None:
    from nodes import console
    from nodes.audit.training import POWER, audit_training, canaries_needed, power_of
    from nodes.private_training import PrivateRecipe
    from protocol.privacy import Guarantee, PrivateTraining

    try:
        recipe = PrivateRecipe(Guarantee(float(epsilon), delta))
    except ValueError:
        raise UsageError("--epsilon: expected a number or 'none'", hint="3 is an example") from None
    claim = PrivateTraining(recipe.guarantee, recipe.event)
    power = power_of(claim, canaries)
    if not power.enough:
        needed = canaries_needed(claim, MOST_CANARIES)
        raise UsageError(
            f"audit training: {canaries} canaries would refute noise of half the size in {100 * power.against_half:.0f} of 100 audits, "
            f"expected at least {100 * POWER:.0f}",
            hint=f"--canaries {needed}" if needed else f"no number up to {MOST_CANARIES} is enough: audit a larger --epsilon",
        )
    if not as_json:
        console.say(_power_line(power, claim.guarantee.epsilon))
    audit = audit_training(model, _states(model, records, model.layers - recipe.layers, progress), recipe, power, on_progress=progress)
    progress.close()
    show(_result(audit), as_json, [*_lines(audit.checks), *_figures(audit)])
    if audit.refuted:
        raise typer.Exit(REFUTED)


def _attack_unprotected(model: BaseModel, records: Sequence[Record], as_json: bool, progress: Any) -> None:
    from nodes.audit.training import by_coin, check_of, membership
    from nodes.finetune import Recipe, finetune

    inside, outside = by_coin(_states(model, records, model.split, progress))
    adapter = finetune(model, inside, Recipe(), lambda done, of: progress("train", done, of))
    attack = _required(membership(adapter, model, inside, outside, on_progress=progress))
    progress.close()
    _show_attack(attack, check_of(attack, None), adapter.guarantee, False, as_json)


def _attack_file(
    model: BaseModel, path: Path, records: Sequence[Record], strangers: Sequence[Record], as_json: bool, progress: Any
) -> None:
    from nodes.adapter import Adapter
    from nodes.audit.training import check_of, claim_of, membership

    adapter = Adapter.from_bytes(read_bytes(path), base_model=model.model_id)
    claim = claim_of(adapter)
    states = _states(model, [*records, *strangers], adapter.first_layer, progress)
    attack = _required(membership(adapter, model, states[: len(records)], states[len(records) :], on_progress=progress))
    progress.close()
    check = check_of(attack, claim)
    _show_attack(attack, check, adapter.guarantee, claim is not None and not check.holds, as_json)


def _states(model: BaseModel, records: Sequence[Record], split: int, progress: Any) -> list[Activations]:
    return model.prefix_pass(records, split, on_progress=lambda done, of: progress("prefix", done, of))[1]


def _required(attack: Membership | None) -> Membership:
    from nodes.audit.training import FEWEST

    if attack is None:
        raise RecordError(f"audit training: expected at least {FEWEST} members and {FEWEST} strangers with a response")
    return attack


def _show_attack(attack: Membership, check: Check, guarantee: str, refuted: bool, as_json: bool) -> None:
    result = {
        "schema": "veilmart.audit-training/1", "kind": "adapter", "guarantee": guarantee, "membership": asdict(attack),
        "checks": [asdict(check)], "flagged": not check.holds, "refuted": refuted,
    }  # fmt: skip
    flagged = [] if check.holds else ["flagged: this adapter gives away what it was trained on"]
    show(result, as_json, [f"guarantee: {guarantee}", *_lines([check]), *flagged])
    if refuted:
        raise typer.Exit(REFUTED)


def _result(audit: TrainingAudit) -> dict[str, Any]:
    claim, power = audit.claim, audit.power
    return {
        "schema": "veilmart.audit-training/1", "kind": "training", "guarantee": str(claim), "epsilon": claim.guarantee.epsilon,
        "delta": claim.guarantee.delta, "noise_multiplier": claim.event.multiplier, "sampling_rate": claim.event.sampling_rate,
        "steps": claim.event.steps, "canaries": power.canaries, "power_against_half_the_noise": power.against_half,
        "expected_lower_bound": power.expected, "confidence": audit.confidence, "false_positives_at_most": audit.false_positives,
        "true_positives_at_least": audit.true_positives, "epsilon_lower_bound": audit.epsilon_lower_bound, "ratio": audit.ratio,
        "one_run_lower_bound": audit.one_run_epsilon, "membership": audit.membership and asdict(audit.membership),
        "checks": [asdict(check) for check in audit.checks], "flagged": audit.refuted, "refuted": audit.refuted,
    }  # fmt: skip


def _power_line(power: Power, epsilon: float) -> str:
    return (
        f"{power.canaries} canaries: noise of half the size would be refuted in {100 * power.against_half:.0f} of 100 audits; "
        f"an honest training will show an epsilon of about {power.expected:.2f} of {epsilon:g}"
    )


def _figures(audit: TrainingAudit) -> list[str]:
    return [
        f"shown over claimed: {audit.ratio:.3f}; of canaries found at least {100 * audit.true_positives:.1f} %, "
        f"where at most {100 * audit.false_positives:.1f} % of absent ones are taken for present",
        f"without any assumption (one-run bound): epsilon is at least {audit.one_run_epsilon:.3f}",
    ]


def _lines(checks: Sequence[Check]) -> list[str]:
    return [f"{'yes' if check.holds else 'NO':<4}{check.name:<19}{check.evidence}" for check in checks]


def audit_node(
    home: Home,
    population: Population = "default",
    data: Annotated[Path | None, typer.Option("--data", help="Also look at who may read this file of records.")] = None,
    policy_file: Annotated[
        Path | None, typer.Option("--policy", metavar="FILE", help="Your limits (TOML).", show_default="the running guard's")
    ] = None,
    socket: Annotated[
        Path | None, typer.Option("--socket", help="Where the guard listens.", show_default="guard/socket below --home")
    ] = None,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    software: Annotated[str, typer.Option("--software", metavar="SHA256", help="What is installed should have this digest.")] = "",
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Look at this machine for what would void a guarantee: each hazard yes, no or unknown, with evidence.  Exit code 4 if there is one.

    Run it as the user that runs the guard, while it runs.  Nothing is changed, charged or sent; with --market, its list is fetched.

    Example: veilmart audit node --policy policy.toml --data notes.jsonl
    """
    from nodes import console
    from nodes.audit.node import Deployment, audit_node, guard_process, policy_of
    from nodes.policy import read_policy
    from nodes.populations import folder_of
    from protocol.errors import ModelError

    if not home.is_dir():
        raise UsageError(f"{home}: no such folder", hint="--home names the owner's")
    folder, path = folder_of(home, population_name(population)), (socket or home / "guard" / "socket").resolve()
    named = policy_file or policy_of(guard_process(path))
    progress = console.ProgressLine(not as_json)
    model = None
    try:
        model = open_model(home, base)
    except ModelError:
        if base is not None:
            raise  # without one a check says that it had none
    deployment = Deployment(
        home, folder, path, data, read_policy(named) if named is not None else None, ca,
        _published(home, folder, market, ca, which_map), model, software,
    )  # fmt: skip
    looks = audit_node(deployment, progress)
    progress.close()
    found = [look for look in looks if look.holds is False]
    unknown = sum(look.holds is None for look in looks)
    result = {"schema": "veilmart.audit-node/1", "checks": [asdict(look) for look in looks], "refuted": bool(found)}
    lines = [f"{_WORDS[look.holds]:<9}{look.name:<23}{look.evidence}" for look in looks]
    show(result, as_json, [*lines, f"{len(found)} hazards of {len(looks)}, {unknown} unknown"])
    if found:
        raise typer.Exit(REFUTED)


_WORDS = {True: "yes", False: "NO", None: "unknown"}


def _published(home: Path, folder: Path, market: str | None, ca: Path | None, which_map: str) -> list[bytes] | None:
    """Return this owner's releases in the market's log; None without a market or a key."""
    from nodes.audit.node import owner_in
    from nodes.market_client import MarketClient
    from nodes.succession import keys_before
    from protocol.features import open_map

    owner = owner_in(folder)
    if market is None or ca is None or not owner:
        return None
    with MarketClient(market, ca, home) as client:
        return client.releases_of((owner, *keys_before(folder, owner)), open_map(which_map))


COMMANDS = {"audit training": audit_training, "audit node": audit_node}
