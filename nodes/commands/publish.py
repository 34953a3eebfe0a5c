"""`node publish`: what would leave, what it costs, and the release itself."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nodes.commands.options import (
    Base,
    EpsilonAdapter,
    Home,
    Json,
    Map,
    MaybeAuthority,
    MaybeMarket,
    Population,
    Quiet,
    Unit,
    population_name,
    recipe_of,
    show,
    unit_in,
)
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.guard import Plan


def node_publish(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Your records: JSONL with prompt and response, or text.")],
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the learnware.", show_default="the data file's name")] = None,
    summary: Annotated[str, typer.Option("--summary", help="One public line on what it is good at.")] = "",
    licence: Annotated[str, typer.Option("--licence", help="Licence of the adapter.")] = "",
    epsilon: Annotated[float, typer.Option("--epsilon", help="Epsilon of this specification.")] = 1.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta of guarantee and budget.")] = 1e-6,
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life.")] = 4.0,
    largest_epsilon: Annotated[float, typer.Option("--largest-epsilon", help="Largest epsilon of one release.")] = 2.0,
    valid_days: Annotated[
        int, typer.Option("--valid-days", help="How long the release holds; publishing again extends it for nothing.")
    ] = 365,
    epsilon_adapter: EpsilonAdapter = "none",
    no_train: Annotated[bool, typer.Option("--no-train", help="Publish a specification alone.")] = False,
    population: Population = "default",
    unit: Unit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would leave and what it costs; nothing is drawn or sent.")] = False,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a private specification and a specialist from your records, and publish both.

    Example: veilmart node publish --data notes.jsonl --market 127.0.0.1:7443 --ca ca.crt --dry-run
    """
    from nodes import console
    from nodes.guard import Policy
    from nodes.ledger import Budget, epsilon_of, total_of
    from nodes.market import Market
    from nodes.owner import Owner
    from nodes.populations import folder_of
    from protocol.privacy import Guarantee

    guarantee = Guarantee(epsilon, delta, unit=unit_in(unit, folder_of(home, population_name(population))))
    if not dry_run and (market is None or ca is None):
        raise UsageError("node publish: expected --market and --ca", hint="`veilmart market up` prints both; --dry-run needs neither")
    progress = console.ProgressLine(not (as_json or quiet))
    owner = Owner(
        data, home=home, name=name, summary=summary, licence=licence, recipe=recipe_of(epsilon_adapter, no_train, delta),
        policy=Policy(Budget(budget, delta), largest_epsilon=largest_epsilon, population=population, unit=guarantee.unit,
                      valid_days=valid_days),
        feature_map=which_map, base=base, on_progress=progress,
    )  # fmt: skip
    if dry_run:
        plan = owner.plan(guarantee)
        _show_plan(plan, population, as_json)
        if not plan.stored:
            plan.price.require()
        return
    assert market is not None
    assert ca is not None
    # The warning goes to standard error, so neither --json nor --quiet hides what is about to be paid for.
    published = owner.publish(Market(market, ca, home), guarantee, on_warning=console.say)
    progress.close()
    release, price, kept = published.release, published.price, published.receipt_file
    envelope_bytes = len(published.receipt.envelope)
    result = {
        "schema": "veilmart.publish/1", "release_id": release.release_id.hex(), "title": release.title, "index": published.receipt.index,
        "epsilon_spec": epsilon, "delta": delta, "epsilon_adapter": epsilon_of(release.adapter),
        "epsilon_total": total_of(release), "release_bytes": envelope_bytes,
        "population": population, "unit": str(guarantee.unit), "spent": price.spent, "left": price.left, "budget": price.limit,
        "stored_bytes_sent_again": published.stored, **release.window.dates, "receipt": str(kept),
    }  # fmt: skip
    if quiet:
        console.print_lines(release.release_id.hex())
        return
    adapter = "no adapter"
    if release.adapter:
        adapter = (
            "adapter: none (trained without differential privacy), so the total is unbounded"
            if isinstance(release.adapter.guarantee, str)
            else f"adapter: {release.adapter.guarantee}; together epsilon {total_of(release):.2f}"
        )
    lines = [
        f"published {release.title}  position {published.receipt.index}, {envelope_bytes} bytes signed"
        + (" (paid before: nothing was charged)" if published.stored else ""),
        f"specification: epsilon {epsilon:g} at delta {delta:g}, unit {guarantee.unit}, add-or-remove-one; {adapter}",
        f"holds {release.window}",
        f"ledger of population {population}: spent {price.spent:.2f} of {price.limit:.2f}, left {price.left:.2f}",
        f"receipt: {kept}  (`veilmart verify release` checks it offline)",
    ]
    show(result, as_json, lines, then=f"node up --data {shlex.quote(str(data))}")


def _rule_of_thumb(strength: float) -> str:
    if strength >= 200:
        return 'ranks nearly as without noise, and supports a trustworthy "none"'
    if strength >= 100:
        return 'ranks nearly as without noise; too little for a trustworthy "none" (200)'
    if strength >= 50:
        return "matches will be uncertain; 100 ranks nearly as without noise"
    return 'WARNING: the noise hides the task; 100 ranks nearly as without noise, 200 supports a trustworthy "none"'


def _would_send(plan: Plan) -> dict[str, Any]:
    """Return the public fields of the release as they would be sent; what is not known yet says so, and noise is never drawn for it."""
    from protocol.codec import decode
    from protocol.release import MAGIC

    release = plan.release
    metadata, _ = decode(MAGIC, release.body)
    ids = {
        "owner": release.owner, "previous": release.previous, "base_model": release.base_model, "map_id": release.specification.map_id,
    }  # fmt: skip
    fields: dict[str, Any] = {**{name: value.hex() for name, value in ids.items()}, **metadata}
    if plan.trains_adapter:
        fields["adapter"] = {"digest": "<32 bytes, not trained>", "guarantee": str(plan.adapter_guarantee), "size_bytes": "<not trained>"}
    return fields


def _show_plan(plan: Plan, population: str, as_json: bool) -> None:
    price, guarantee, card = plan.price, plan.release.specification.guarantee, plan.release.card
    strength = plan.units * guarantee.epsilon
    payload = f"<{plan.integers} integers, not drawn>"
    fields = _would_send(plan)
    result = {
        "schema": "veilmart.plan/1", "name": card.name, "records": plan.records, "units": plan.units, "population": population,
        "unit": str(guarantee.unit), "epsilon": guarantee.epsilon, "delta": guarantee.delta,
        "summary": card.summary, "licence": card.licence, "noise_std": plan.noise_std, "payload": payload,
        "adapter_guarantee": str(plan.adapter_guarantee) if plan.trains_adapter else None,
        "asked": price.asked, "spent": price.spent, "left": price.left, "total": price.total, "budget": price.limit,
        "composed_by": str(price.rule), "n_times_epsilon": strength, "advice": _rule_of_thumb(strength), "paid_before": plan.stored,
        "would_send": {"fields": fields, "release_bytes": plan.release_bytes, "sums_bytes": 4 * plan.integers, "signature_bytes": 64},
    }  # fmt: skip
    units = "" if guarantee.unit.field == "" else f" of {plan.units} units"
    weights = "; and the adapter's weights, made from your records" if plan.trains_adapter else ""
    adapter = "none"
    if plan.trains_adapter:
        private = plan.adapter_guarantee != "none"
        adapter = (
            f"by DP-SGD: {plan.adapter_guarantee}" if private else "trained without differential privacy: guarantee none, total unbounded"
        )
    spending = (
        f"budget         paid before: the stored bytes are sent again, nothing is charged; spent {price.spent:.2f} of {price.limit:.2f}"
        if plan.stored
        else f"budget         asked {price.asked:.2f}, spent {price.spent:.2f}, left {price.left:.2f}; "
        f"together {price.total:.2f} of {price.limit:.2f}"
    )
    lines = [
        f"population     {population}; unit {guarantee.unit}, for life",
        f"records        {plan.records}{units}   (stays here)",
        f"specification  epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}; noise sigma {plan.noise_std:,.0f} a coordinate",
        f"what leaves    {payload}, your public key, the card, signed{weights}",
        *(f"  {name:<17}{_shown(value)}" for name, value in fields.items()),
        f"  {'sums':<17}{payload}, {4 * plan.integers} bytes",
        f"  {'signature':<17}64 bytes; {plan.release_bytes} bytes in all",
        f"adapter        {adapter}",
        spending,
        f"n x epsilon    {strength:.0f}: {_rule_of_thumb(strength)}",
        "nothing was drawn, sent or spent",
    ]
    # The same command, as it was given: a line to paste must not lose an option that says what is paid.
    show(result, as_json, lines, then=shlex.join(word for word in sys.argv[1:] if word != "--dry-run"))


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or '-'}" for name, item in value.items()) or "-"
    return str(value) or "-"


COMMANDS = {"node publish": node_publish}
