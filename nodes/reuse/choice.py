"""Which specialists answer, with what weights, and what choosing them told the market."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nodes.learnwares import StoredLearnware, local_learnware, pull_learnware
from nodes.reuse.strategies import Specialist
from protocol.errors import FormatError, InvalidAdapter, NotFound, UsageError, VeilmartError

if TYPE_CHECKING:
    from nodes.base_model import BaseModel
    from nodes.market_client import MarketClient
    from nodes.records import Record
    from protocol.features import FeatureMap
    from protocol.scoring import Sketch
    from protocol.specification import Specification

SMALLEST_WEIGHT = 0.05  # a specialist below it costs a download and a pass a token, and changes little


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """Specialists with their weights in a mixture, why these, and what left the site for it."""

    specialists: tuple[Specialist, ...]
    weights: tuple[float, ...]
    why: str
    left_site: tuple[str, ...] = ()


def check_nothing_leaves(names: Sequence[str], home: Path, market: str | None) -> None:
    """Raise UsageError if using these learnwares would have to ask a market; nothing is loaded and nothing is sent."""
    if market is not None:
        raise UsageError("--nothing-leaves: a market would learn which learnware is fetched", hint="leave out --market, and pull before")
    if not names:
        raise UsageError("--nothing-leaves: name learnwares that were pulled before, searching asks the market", hint="-m ID")
    for name in names:
        if local_learnware(name, home) is None:
            raise UsageError(f"--nothing-leaves: {name} was not pulled before", hint="`veilmart pull` fetches it, visibly for the market")


def check_here(names: Sequence[str], home: Path) -> None:
    """Raise NotFound for a learnware that would have to be fetched where no market is named; before a model is loaded."""
    for name in names:
        if local_learnware(name, home) is None:
            raise NotFound(f"{name}: not pulled yet", hint="give --market and --ca, or `veilmart pull` it first")


def named(
    names: Sequence[str],
    model: BaseModel,
    home: Path,
    client: MarketClient | None,
    feature_map: FeatureMap,
    task: Sequence[Record],
    cover: int = 0,
) -> Choice:
    """Return the learnwares of these names, from this machine or the market; weighed by the task if there is one.

    cover: how many others are fetched with each, so that the market cannot tell which was wanted.
    """
    stored, left = [], []
    for name in names:
        one = local_learnware(name, home)
        if one is None:
            if client is None:
                check_here([name], home)
            assert client is not None
            one = pull_learnware(name, client, home, feature_map, cover=cover)
            left.append(_seen(one.release.title, cover))
        stored.append(one)
    if len(stored) == 1 or not task:
        weights = tuple(1 / len(stored) for _ in stored)
        return Choice(_specialists(stored, model), weights, "named by the user", tuple(left))
    weights = _weights(stored, _sketch(task, model, feature_map), feature_map)
    return Choice(_specialists(stored, model), weights, "named by the user, weighed by their specifications", tuple(left))


def matched(
    task: Sequence[Record],
    model: BaseModel,
    home: Path,
    client: MarketClient,
    feature_map: FeatureMap,
    several: int = 1,
    *,
    tries: int = 1,
    cover: int = 0,
) -> Choice:
    """Return the best match of a task, or the best `tries` to be tried (nodes/reuse/trial.py), or up to `several` weighed as a mixture.

    Matching is done on a mirror: the market sees that somebody fetched all specifications, and then which adapters are fetched.
    Raises NotFound where nothing suits; where the noise does not let it tell, a trial does.
    """
    from nodes.places import places
    from nodes.query import Filters, find_in_mirror
    from protocol.scoring import Verdict

    sketch = _sketch(task, model, feature_map)
    found = find_in_mirror(sketch, client, feature_map, Filters(base_model=model.model_id))
    releases = {release.release_id: release for release in found.releases or ()}
    # No copies, and at most two of one organisation, which would otherwise keep all others from being tried.
    given = places(found, several if several > 1 else max(tries, 1), wanted=lambda match: releases[match.release_id].adapter is not None)
    enough = {Verdict.MATCH, Verdict.SIBLING} | ({Verdict.CANNOT_TELL} if tries > 1 else set())
    # A mixture is for tasks that nobody has alone, so it does not need a match.
    if not found.ranking.matches or (several == 1 and given.matches and given.verdict not in enough):
        raise NotFound(
            f"no specialist for this task: {given.verdict}", hint="`veilmart find` shows scores and reasons; -m ID takes one anyway"
        )
    left = ["the market saw that somebody fetched all specifications"]
    chosen = [match.release_id for match in given.matches]
    if not chosen:
        raise NotFound("no specialist for this task: no owner published an adapter")
    weights, why = [1 / len(chosen)] * len(chosen), f"best of {len(found.ranking.matches)} by its specification ({given.verdict})"
    if several > 1:
        matching = [found.verdict_on(match) is Verdict.MATCH for match in given.matches]
        weights, why = _mixed([releases[one].specification for one in chosen], matching, sketch, feature_map)
    wanted = [(releases[one].title, weight) for one, weight in zip(chosen, weights, strict=True) if weight]
    pulled, told = _pulled([title for title, _ in wanted], home, client, feature_map, cover, several == 1)
    kept = [(one, weight) for one, (_, weight) in zip(pulled, wanted, strict=True) if one is not None]
    specialists = _specialists([one for one, _ in kept], model)
    return Choice(specialists, tuple(weight for _, weight in kept), why, (*left, *told))


def _pulled(
    titles: Sequence[str], home: Path, client: MarketClient, feature_map: FeatureMap, cover: int, any_will_do: bool
) -> tuple[list[StoredLearnware | None], list[str]]:
    """Return the learnwares of these titles, in their order, and what fetching them told the market.

    They are fetched in an order that says nothing.  any_will_do: one whose adapter is refused is left out, unless it is the only one: its
    owner would otherwise keep the others from being tried.
    """
    found: list[StoredLearnware | None] = [local_learnware(title, home) for title in titles]
    missing, told = [at for at, one in enumerate(found) if one is None], []
    secrets.SystemRandom().shuffle(missing)
    refused: list[VeilmartError] = []
    for at in missing:
        try:
            found[at] = pull_learnware(titles[at], client, home, feature_map, cover=cover)
        except (InvalidAdapter, NotFound, FormatError) as error:
            if not any_will_do:
                raise
            refused.append(error)
        told.append(_seen(titles[at], cover))
    if refused and not any(found):
        raise refused[0]
    return found, sorted(told)


def _seen(title: str, cover: int) -> str:
    return f"the market saw that {title} was fetched" + (f", or one of {cover} others" if cover else "")


def _sketch(task: Sequence[Record], model: BaseModel, feature_map: FeatureMap) -> Sketch:
    from nodes.query import sketch_task

    return sketch_task(task, model, feature_map)


def _mixed(
    specifications: Sequence[Specification], matching: Sequence[bool], sketch: Sketch, feature_map: FeatureMap
) -> tuple[list[float], str]:
    """Return the weights of releases in a mixture found for a task, and why these.

    Releases that match hold the task itself, and another task beside them only takes from it: they share by their records alone, as far
    as the noise lets these be known.  Where none matches, the nearest ones together stand for the task (docs/results/learnware.md).
    """
    from protocol.catalogue import columns_of
    from protocol.mixture import mixture_weights

    if not any(matching):
        return list(_without_crumbs(mixture_weights(specifications, sketch, feature_map).tolist())), "weighed by their specifications"
    records = np.where(matching, columns_of(specifications, feature_map, sketch.views).counts, 0.0)
    return list(_without_crumbs((records / records.sum()).tolist())), "all that match, weighed by their records"


def _weights(stored: Sequence[StoredLearnware], sketch: Sketch, feature_map: FeatureMap) -> tuple[float, ...]:
    from protocol.mixture import mixture_weights

    return _without_crumbs(mixture_weights([one.release.specification for one in stored], sketch, feature_map).tolist())


def _without_crumbs(weights: list[float]) -> tuple[float, ...]:
    kept = [weight if weight >= SMALLEST_WEIGHT else 0.0 for weight in weights]
    total = sum(kept)
    return tuple(weight / total for weight in kept) if total else tuple(1 / len(weights) for _ in weights)


def _specialists(stored: Sequence[StoredLearnware], model: BaseModel) -> tuple[Specialist, ...]:
    return tuple(specialist_of(one, model) for one in stored)


def specialist_of(stored: StoredLearnware, model: BaseModel) -> Specialist:
    """Return a pulled learnware as something that can answer; every byte is checked again."""
    release, adapter = stored.release, stored.load_adapter(model.model_id)
    return Specialist(release.title, adapter, release.specification.guarantee.epsilon, stored.size_bytes, release.window)
