"""`node train`: an adapter from the owner's records, for the owner to look at before anything is published."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import (
    Base,
    EpsilonAdapter,
    Home,
    Json,
    Map,
    Population,
    Quiet,
    Unit,
    population_name,
    recipe_of,
    show,
    unit_in,
)

if TYPE_CHECKING:
    from nodes.guard import Trained, TrainingPlan

HELD_OUT = 0.1  # share of the records on which training without a guarantee is checked


def node_train(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Your records: JSONL with prompt and response, or text.")],
    epsilon_adapter: EpsilonAdapter = "none",
    delta: Annotated[float, typer.Option("--delta", help="Delta of guarantee and budget.")] = 1e-6,
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life.")] = 4.0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Take only so many records.")] = None,
    population: Population = "default",
    unit: Unit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what it needs and costs; nothing is trained or charged.")] = False,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a specialist on your records; nothing leaves, and an interrupted training goes on where it stopped.

    With an epsilon it is charged to the ledger, once: `node publish` with the same records and epsilon takes the adapter from here.

    Example: veilmart node train --data notes.jsonl --epsilon-adapter 8 --budget 12 --dry-run
    """
    from nodes import console
    from nodes.guard import Policy
    from nodes.ledger import Budget
    from nodes.owner import Owner
    from nodes.populations import folder_of

    policy = Policy(
        Budget(budget, delta), minimum_records=1, population=population, unit=unit_in(unit, folder_of(home, population_name(population)))
    )
    progress = console.ProgressLine(not (as_json or quiet))
    owner = Owner(
        data, home=home, policy=policy, recipe=recipe_of(epsilon_adapter, False, delta, HELD_OUT), limit=limit,
        feature_map=which_map, base=base, on_progress=progress,
    )  # fmt: skip
    plan = owner.training_plan()
    if dry_run:
        _show_plan(plan, as_json)
        plan.price.require()
        return
    if not (as_json or quiet):
        console.say(_needs(plan))
    trained = owner.train()
    progress.close()
    _show(trained, plan, data, as_json, quiet)


def _needs(plan: TrainingPlan) -> str:
    return (
        f"plan: {plan.records} records, {plan.tokens} tokens, layers {plan.first_layer} to {plan.last_layer}, {plan.steps} steps; "
        f"about {plan.memory_bytes / 1e9:.1f} GB of memory, {plan.disk_bytes / 1e6:.0f} MB of disk while it runs"
    )


def _guarantee_line(plan: TrainingPlan) -> str:
    if isinstance(plan.guarantee, str):
        return "adapter: none (trained without differential privacy); a release with it has an unbounded total"
    event = plan.guarantee.event
    return f"adapter: {plan.guarantee}; noise {event.multiplier:g} of the clip, rate {event.sampling_rate:g}, {event.steps} steps"


def _show_plan(plan: TrainingPlan, as_json: bool) -> None:
    price = plan.price
    result = {
        "schema": "veilmart.training-plan/1", "records": plan.records, "units": plan.units, "tokens": plan.tokens, "steps": plan.steps,
        "memory_bytes": plan.memory_bytes, "disk_bytes": plan.disk_bytes, "adapter_guarantee": str(plan.guarantee),
        "asked": price.asked, "spent": price.spent, "total": price.total, "budget": price.limit, "composed_by": str(price.rule),
    }  # fmt: skip
    lines = [
        _needs(plan), _guarantee_line(plan),
        f"budget: asked {price.asked:.2f}, spent {price.spent:.2f}; together {price.total:.2f} of {price.limit:.2f} ({price.rule})",
        "nothing was trained or charged",
    ]  # fmt: skip
    show(result, as_json, lines)


def _show(trained: Trained, plan: TrainingPlan, data: Path, as_json: bool, quiet: bool) -> None:
    from nodes import console

    digest = trained.reference.digest.hex()
    if quiet:
        console.print_lines(digest)
        return
    losses = [{"step": loss.step, "nats_per_token": loss.nats} for loss in trained.losses]
    result = {
        "schema": "veilmart.train/1", "adapter": str(trained.file), "digest": digest, "bytes": trained.reference.size_bytes,
        "adapter_guarantee": str(trained.reference.guarantee), "held_out": losses,
    }  # fmt: skip
    lines = [f"trained {trained.file}  ({trained.reference.size_bytes} bytes)", _guarantee_line(plan)]
    if losses:
        best = min(trained.losses, key=lambda loss: loss.nats)
        lines.append(
            f"held-out loss: {trained.losses[0].nats:.3f} nats a token before, {best.nats:.3f} after step {best.step} (stays here)"
        )
    show(result, as_json, lines, then=f"node publish --data {shlex.quote(str(data))} --dry-run")


COMMANDS = {"node train": node_train}
