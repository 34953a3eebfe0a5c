"""The second figure: what a plan that was fixed beforehand costs by numerical composition of its privacy loss (PRV).

Tighter than the ledger's Renyi filter, and valid only where no event was chosen in view of an earlier release: so it is reported, and
never decides.  Source: Gopi, Lee, Wutschitz 2021, as implemented by Opacus.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from protocol.privacy import Event, Gaussian

PRV_ERROR = 0.001  # of the composition on a grid


def prv_epsilon(events: Sequence[Event], delta: float) -> float:
    """Return an upper bound, within 0.001, on the epsilon of a plan fixed beforehand; loads Opacus, which takes seconds."""
    if not events:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus and the packages under it warn at import
        from opacus.accountants import PRVAccountant

        accountant = PRVAccountant()
        for event in events:
            rate, steps = (1.0, 1) if isinstance(event, Gaussian) else (event.sampling_rate, event.steps)
            accountant.history.append((event.multiplier, rate, steps))
        return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


def second_opinion(events: Sequence[Event], delta: float) -> float | None:
    """Return what dp-accounting composes from the same events (add-or-remove-one, PLD), or None where it is not installed."""
    try:
        from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        return None
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in events:
        noise = GaussianDpEvent(event.multiplier)
        if isinstance(event, Gaussian):
            accountant.compose(noise)
        else:
            accountant.compose(SelfComposedDpEvent(PoissonSampledDpEvent(event.sampling_rate, noise), event.steps))
    return float(accountant.get_epsilon(delta))
