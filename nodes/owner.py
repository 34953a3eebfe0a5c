"""A data owner: records that stay here, and what is released from them.

    from nodes import Market, Owner

    owner = Owner("notes.jsonl", summary="ward notes to codes")
    owner.plan().price.total                                      # epsilon with this release; nothing is drawn, sent or spent
    owner.publish(Market("127.0.0.1:7443", "ca.crt")).release.title

`veilmart node publish`, `node train` and `node up` are this class and what they print.  The work is the guard's (nodes/guard.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nodes.cohort import CohortRules
from nodes.finetune import Recipe
from nodes.guard import Guard, Order, Plan, Policy, Progress, Trained, TrainingPlan, ignore_progress
from nodes.home import default_home, open_model
from nodes.ledger import Price, in_use
from nodes.market import Market
from nodes.membership import Membership
from nodes.populations import claims_of, folder_of, unit_of
from nodes.private_training import PrivateRecipe
from protocol.admission import AdmissionPolicy, require_adapter, require_claim
from protocol.errors import Unauthorised
from protocol.features import DEFAULT_MAP, open_map
from protocol.hazmat.noise import operating_system
from protocol.keys import write_durably
from protocol.privacy import Guarantee
from protocol.release import Card, Release, open_envelope
from protocol.specification import COUNT_STEP
from protocol.transparency import Receipt

USUAL = Guarantee(1.0, 1e-6)
NOISE_DEVIATIONS = 3.1  # one count in a thousand falls farther below the true one


@dataclass(frozen=True, slots=True)
class Published:
    """A release that stands in a market's log."""

    release: Release
    receipt: Receipt  # the market's promise, verified
    receipt_file: Path  # where it is kept
    price: Price  # what another release under the same guarantee would cost now, and what is spent
    stored: bool  # paid before: the stored bytes were sent again, and nothing was charged


class Owner:
    """One file of records, the population that they are charged to, and how releases are made from them.

    data: JSONL with prompt and response, or text.  home: folder of model, keys and ledger.  name: of the learnware (default: made from
    the file's name); summary, licence: public too.  policy: the owner's limits, with population and unit (default: epsilon 4 for life,
    the ledger's unit, or the record if it is new).  recipe: how the adapter is trained: without a guarantee (`Recipe`), by DP-SGD
    (`PrivateRecipe`), or not at all (None).  feature_map: a name that ships with veilmart, or a file; the market's.  base: directory of
    the base model.  limit: take so many records.  cohort: with whom the guard takes part in rounds of secure aggregation.  Raises
    LedgerDamaged or PopulationConflict where the home holds another's ledger.
    """

    def __init__(
        self,
        data: Path | str,
        *,
        home: Path | None = None,
        name: str | None = None,
        summary: str = "",
        licence: str = "",
        policy: Policy | None = None,
        recipe: Recipe | PrivateRecipe | None = Recipe(),  # noqa: B008  # frozen
        feature_map: str = DEFAULT_MAP,
        base: Path | None = None,
        limit: int | None = None,
        cohort: CohortRules | None = None,
        on_progress: Progress = ignore_progress,
    ) -> None:
        self._data, self._home, self._base, self._limit = Path(data), home or default_home(), base, limit
        self._policy = policy or Policy(unit=unit_of(folder_of(self._home, Policy().population)))
        self._card = Card(name or name_from(self._data), summary, licence)
        self._recipe, self._map, self._cohort, self._on_progress = recipe, feature_map, cohort, on_progress

    @property
    def folder(self) -> Path:
        """Where ledger, key and adapters of the population lie."""
        return folder_of(self._home, self._policy.population)

    @cached_property
    def guard(self) -> Guard:
        """The guard over these records; opening it loads the base model and, the first time, makes ledger and key."""
        return Guard(
            self.folder, self._data, self._card, open_model(self._home, self._base), open_map(self._map), operating_system(),
            policy=self._policy, recipe=self._recipe, limit=self._limit, claims=claims_of(self._home),
            cohort=self._cohort, on_progress=self._on_progress,
        )  # fmt: skip

    def plan(self, guarantee: Guarantee = USUAL) -> Plan:
        """Return what a release would be and cost; nothing is drawn, trained, sent or charged."""
        return self.guard.plan(Order(guarantee))

    def training_plan(self) -> TrainingPlan:
        """Return what training would need and cost; nothing is computed or charged."""
        return self.guard.training_plan()

    def train(self) -> Trained:
        """Return the adapter of these records, trained now or before; nothing leaves, and a release takes it from here."""
        return self.guard.train()

    def publish(self, market: Market, guarantee: Guarantee = USUAL, *, on_warning: Callable[[str], None] = warnings.warn) -> Published:
        """Make a release under a guarantee (or take the stored bytes of one that was paid before), and publish it with its adapter.

        Whether it is the right market, whether it would take this, and whether it holds what the ledger forgot, is asked before
        anything is trained or charged.  on_warning: told where the market may refuse the noisy count after the charge.  Where it breaks
        off, the same call goes on: nothing is charged twice.
        Raises BudgetSpent, LedgerBehind, Unauthorised, NotAdmitted, MarketUnreachable, and what reading the records raises.
        """
        guard, plan = self.guard, self.plan(guarantee)
        membership = Membership.of(self.folder)
        with market.connect(membership) as client:
            description = client.describe(guard.owner)
            if not description.may_publish:
                raise Unauthorised("you are not enrolled at this market", hint="`veilmart node join` with an invite of its operator")
            client.knock()
            guard.require_current(client.releases_of(guard.owners, open_map(self._map)))
        if not plan.stored and (warning := require_welcome(plan, description.admission)):
            on_warning(warning)
        with in_use(self.folder):
            envelope = guard.release(Order(guarantee))
        release = open_envelope(envelope)
        file = guard.adapter_file(release)
        with market.connect(membership) as client:
            receipt = client.publish(envelope)
            write_durably(kept := self._home / "receipts" / f"{release.release_id.hex()}.receipt", receipt.to_bytes(), 0o644)
            # After its release: a market takes no other files.
            if file is not None and release.adapter is not None:
                client.upload_adapter(release.adapter, file.read_bytes())
        return Published(release, receipt, kept, guard.price(guarantee), plan.stored)


def name_from(data: Path) -> str:
    """Return what a learnware is called that is made from a file and given no name."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in data.stem.lower()).strip("-._")
    return name[:63] or "learnware"


def require_welcome(plan: Plan, policy: AdmissionPolicy) -> str:
    """Raise NotAdmitted for a guarantee that a market refuses; return a warning where it may refuse the count, or nothing.

    The number of units never decides here.  The market chose its smallest count and sees whether a release follows: with a few choices it
    would learn the exact number.  Its admission decides on the noisy count, after the charge, and only the owner reads this warning.
    """
    require_claim(plan.release.specification.guarantee, policy)
    if plan.trains_adapter:
        require_adapter(plan.adapter_guarantee, policy)
    least = policy.smallest_count or 0
    safe = least + NOISE_DEVIATIONS * plan.noise_std / COUNT_STEP
    if plan.units >= safe:
        return ""
    likely = "will probably" if plan.units < least else "may"
    return (
        f"warning: after noise the count {likely} be below this market's {least} and be refused, after the charge; "
        f"from {safe:.0f} units on it will not (several small owners can release one specification together)"
    )
