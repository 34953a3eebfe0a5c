"""The ledger as its owner reads it: every charge, what was spent after each, what is left, and what another release would cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nodes.ledger import Budget, Ledger, Price, specification_charge
from nodes.populations import unit_of
from protocol.errors import NotFound
from protocol.privacy import Event, Guarantee, ledger_epsilon

DELTA = 1e-6


def open_ledger(folder: Path, population: str, budget: float = 4.0) -> Ledger:
    """Return the ledger in a population's folder, its chain verified; raise NotFound where there is none yet."""
    path = folder / "ledger.db"
    if not path.is_file():
        raise NotFound(f"{path}: no ledger yet", hint="the first `veilmart node publish` makes one")
    return Ledger.open(path, Budget(budget, DELTA), population, unit_of(folder))


def statement(ledger: Ledger, *, prv: bool = False) -> dict[str, Any]:
    """Return a ledger as `node ledger --json` prints it.

    prv: also compose by PRV, as if every charge had been planned before the first release; takes seconds.
    """
    entries, limit = ledger.entries(), ledger.budget.epsilon
    delta = min((entry.charge.delta for entry in entries), default=DELTA)
    events = [event for entry in entries for event in entry.charge.events]
    spent, figure = ledger_epsilon(events, delta), None
    if prv:
        from nodes.accountant import prv_epsilon

        figure = prv_epsilon(events, delta)
    rows, so_far = list[dict[str, Any]](), list[Event]()
    for entry in entries:
        so_far += entry.charge.events
        rows.append({
            "number": entry.number, "release_number": entry.release_number, "release_id": entry.release_id.hex(),
            "epsilon": ledger_epsilon(entry.charge.events, delta), "spent_after": ledger_epsilon(so_far, delta),
            "delta": entry.charge.delta, "origin": str(entry.origin), "events": [repr(event) for event in entry.charge.events],
            "release_bytes": len(entry.envelope), "hash": entry.hash.hex(),
        })  # fmt: skip
    return {
        "schema": "veilmart.ledger/1", "population": ledger.population, "unit": str(ledger.unit), "entries": rows, "chain": "verified",
        "compared": ledger.compared, "spent": spent, "left": max(limit - spent, 0.0), "budget": limit, "delta": delta,
        "epsilon_prv": figure,
    }  # fmt: skip


def price_of(ledger: Ledger, epsilon: float) -> Price:
    """Return what another specification at this epsilon would cost; nothing is drawn or charged."""
    return ledger.price(specification_charge(Guarantee(epsilon, DELTA, unit=ledger.unit)))
