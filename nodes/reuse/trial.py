"""Trying what was chosen on the querier's own records: a specification is its owner's word, the loss on these records is not.

Whatever owners and markets said, what is left afterwards loses less on the records that were tried than the base model, or is the base
model.  Nothing leaves for it: the records, the losses and who won stay here.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nodes.records import Pair, Record
from nodes.reuse.calibration import Progress
from nodes.reuse.choice import Choice
from nodes.reuse.strategies import Assistant, Part, Strategy, Wish, assemble

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

MOST_RECORDS = 40  # tried; a record costs each candidate a pass of the model


def triable(records: Sequence[Record]) -> list[Pair]:
    """Return the records that a trial uses, the first of each that are equal: none unless every one has a response."""
    pairs = [record for record in records if isinstance(record, Pair)]
    return list(dict.fromkeys(pairs))[:MOST_RECORDS] if len(pairs) == len(records) else []


def tried(wish: Wish, model: BaseModel, choice: Choice, pairs: Sequence[Pair], on_progress: Progress) -> Choice:
    """Return what loses least on the pairs: one of the specialists, or all of them for a mixture; or none, where the base model does.

    The loss is in nats per response token, the mean over the pairs; of equals the base model, then the better match.
    """
    mixture = wish.strategy is Strategy.MIXTURE
    base = assemble(Wish(Strategy.BASE, specialists=0), model)
    candidates = (
        [assemble(wish, model, choice.specialists, weights=choice.weights)]
        if mixture
        else [assemble(Wish(Strategy.SINGLE), model, [specialist]) for specialist in choice.specialists]
    )
    losses = _losses([base, *candidates], pairs, on_progress)
    best = min(range(len(losses)), key=losses.__getitem__)
    what = "the mixture" if mixture else f"{len(candidates)} tried"
    if best == 0:
        why = f"on {len(pairs)} of your records the base model lost {losses[0]:.2f} nats a token, {what} {min(losses[1:]):.2f} or more"
        return Choice((), (), why, choice.left_site)
    why = f"{choice.why}; lost {losses[best]:.2f} nats a token on {len(pairs)} of your records, the base model {losses[0]:.2f}"
    if mixture:
        return replace(choice, why=why)
    return Choice((choice.specialists[best - 1],), (1.0,), f"{why}, best of {what}" if len(candidates) > 1 else why, choice.left_site)


def base_instead(model: BaseModel, choice: Choice) -> Assistant:
    """Return the base model as what answers after a trial, with what the trial told the market."""
    base = assemble(Wish(Strategy.BASE, specialists=0), model)
    outcome, account = replace(base.outcome, why=choice.why), replace(base.account, left_site=choice.left_site)
    return replace(base, outcome=outcome, account=account)


def _losses(assistants: Sequence[Assistant], pairs: Sequence[Pair], on_progress: Progress) -> list[float]:
    parts: list[Part] = [assistant.main for assistant in assistants]
    losses: list[list[float]] = [[] for _ in parts]
    for done, pair in enumerate(pairs, start=1):
        for part, found in zip(parts, losses, strict=True):
            nats, tokens = part.nats([("user", pair.prompt)], pair.response)
            found.append(nats / tokens)
        on_progress("try", done, len(pairs))
    return [statistics.fmean(found) for found in losses]
