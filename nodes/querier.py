"""A querier: a private task that stays here, and the specialist that suits it.

    from nodes import Market, Querier

    querier = Querier(Market("127.0.0.1:7443", "ca.crt"))
    search = querier.find("task.jsonl")                           # encrypted: the market sees one ciphertext, its size, the time
    if search.verdict == "match":
        querier.ask("pt c/o chest pain", learnwares=search.titles[:1]).text

`veilmart find`, `pull`, `ask`, `compare` and `serve` are this class and what they print.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.home import default_home, model_directory, open_model
from nodes.learnwares import StoredLearnware, pull_learnware
from nodes.market import Market
from nodes.market_client import Exchange, Traffic
from nodes.places import PLACES_PER_ORGANISATION, Places, places
from nodes.query import ANY, Filters, Found, find_encrypted, find_in_mirror, ignore_exchange, mirror_is_cheaper, prices, sketch_task
from nodes.records import Pair, Record, read_records
from nodes.reuse.calibration import Progress, answered, calibrate_alpha, calibrate_tau
from nodes.reuse.choice import Choice, check_here, check_nothing_leaves, matched, named
from nodes.reuse.decoding import Voice
from nodes.reuse.strategies import (
    WITH_LARGER,
    WITH_SPECIALIST,
    Answer,
    Assistant,
    Mixing,
    Part,
    Strategy,
    Wish,
    assemble,
    check_directories,
)
from nodes.reuse.trial import base_instead, triable, tried
from protocol.errors import NotFound, UsageError
from protocol.features import DEFAULT_MAP, FeatureMap, open_map
from protocol.scoring import FEW_TEXTS, Match, Sketch, Verdict

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

Task = Path | str | Sequence[Record]  # a file of records, or the records themselves


class Way(StrEnum):
    """How a task is matched."""

    ENCRYPTED = "encrypted"  # the market scores a ciphertext
    MIRROR = "mirror"  # all specifications are fetched and scored here
    CHEAPER = "cheaper"  # whichever moves fewer bytes, by the market's public size alone


@dataclass(frozen=True, slots=True)
class Search:
    """What a market has for a task: decrypted and ranked here."""

    places: Places  # the best matches, and what had to stand back
    found: Found  # the whole ranking, with catalogue and exchange
    sketch: Sketch  # of the task: private
    way: Way  # ENCRYPTED or MIRROR
    traffic: Traffic

    @property
    def verdict(self) -> Verdict:
        """Whether the best match is the same task, a sibling, another task, or the noise does not let it tell."""
        return self.places.verdict

    @property
    def titles(self) -> tuple[str, ...]:
        """NAME@HEX of the best matches, the best first."""
        return tuple(self.found.title_of(match) for match in self.places.matches)

    @property
    def price_bytes(self) -> dict[str, int]:
        """Bytes that either way moves, nothing known beforehand."""
        return prices(self.found.catalogue.head.size, self.found.catalogue.feature_map.dimension)

    @property
    def why_not(self) -> str:
        """Why nothing matches, in words; empty where something does."""
        return "" if self.verdict is Verdict.MATCH else _why_not(self)

    @property
    def words(self) -> str:
        """The verdict with its reason, in words."""
        return self.why_not or (
            f"a match: nothing tells the data of {self.titles[0]} from your task, and the test would have told a related task apart"
        )

    @property
    def seen(self) -> str:
        """What the market saw of it."""
        return "that somebody fetched the catalogue" if self.way is Way.MIRROR else "one ciphertext, its size, the time"


def ignore_progress(stage: str, done: int, of: int) -> None:
    """Report nothing."""


class Querier:
    """One who has a task, at a market or with the learnwares that were pulled before (market: None).

    home: folder of models and pulled learnwares (default: the market's).  feature_map: a name that ships with veilmart, or a file; the
    market's.  base: directory of the base model.  device: auto, cpu or cuda.
    """

    def __init__(
        self,
        market: Market | None = None,
        *,
        home: Path | None = None,
        feature_map: str = DEFAULT_MAP,
        base: Path | None = None,
        device: str = "cpu",
        on_progress: Progress = ignore_progress,
    ) -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise UsageError("--device: expected auto, cpu or cuda")
        self.market, self.device, self.on_progress = market, device, on_progress
        self.home = home or (market.home if market is not None else default_home())
        self._base, self._map = base, feature_map
        self._larger: dict[Path, BaseModel] = {}

    @cached_property
    def model(self) -> BaseModel:
        """The base model, loaded at its first use."""
        return open_model(self.home, self._base, self.device)

    @cached_property
    def feature_map(self) -> FeatureMap:
        """The map under which tasks are sketched."""
        return open_map(self._map)

    def larger_model(self, directory: Path) -> BaseModel:
        """Return the larger model of a directory, loaded at its first use."""
        if directory not in self._larger:
            self._larger[directory] = open_model(self.home, directory, self.device)
        return self._larger[directory]

    def find(
        self,
        task: Task,
        *,
        way: Way = Way.ENCRYPTED,
        filters: Filters = ANY,
        top: int = 5,
        places_per_organisation: int = PLACES_PER_ORGANISATION,
        on_exchange: Callable[[Exchange], None] = ignore_exchange,
    ) -> Search:
        """Return the specialists that suit a task best.

        The task, its sketch, the filters and the scores stay here.  on_exchange: given the signed answer of an encrypted query before
        anything of it is looked at.  Raises RecordError for records that cannot be read, MarketUnreachable, IncompatibleSpecification for
        a market with another map, and StaleCatalogue where the market changes faster than one can ask.
        """
        market, records, feature_map = self._require_market(), _records_of(task), self.feature_map
        with market.connect() as client:
            size = client.describe().head.size  # before the model is loaded: is the market there?
        if way is Way.CHEAPER:
            way = Way.MIRROR if mirror_is_cheaper(size, feature_map.dimension) else Way.ENCRYPTED
        # No call is open while the texts are read: the time that takes would tell how many there are.
        sketch = sketch_task(records, self.model, feature_map, lambda done, of: self.on_progress("embed", done, of))
        with market.connect() as client:
            if way is Way.MIRROR:
                found = find_in_mirror(sketch, client, feature_map, filters)
            else:
                found = find_encrypted(sketch, client, feature_map, filters, on_exchange=on_exchange)
        return Search(places(found, top, places_per_organisation), found, sketch, way, client.traffic)

    def pull(self, name: str, *, cover: int = 0) -> StoredLearnware:
        """Fetch a learnware, NAME@HEX or its id: release and adapter, every signature and digest checked, kept in the home.

        cover: how many others are fetched with it, so that the market cannot tell which was wanted.
        """
        with self._require_market().connect() as client:
            return pull_learnware(name, client, self.home, self.feature_map, lambda done, of: self.on_progress("pull", done, of), cover)

    def ask(self, question: str, *, learnwares: Sequence[str] = (), task: Task = (), tokens: int = 64) -> Answer:
        """Let the best specialist answer, here: of those that are named, or of a task.  `assistant` does more, and answers again."""
        return self.assistant(learnwares=learnwares, task=_records_of(task)).answer([("user", question)], tokens)

    def check(
        self,
        strategies: Sequence[Strategy],
        learnwares: Sequence[str],
        *,
        with_task: bool,
        larger: Path | None = None,
        nothing_leaves: bool = False,
    ) -> None:
        """Raise UsageError or NotFound for what cannot work, before a model is loaded or anything is sent."""
        needed = any(strategy in WITH_SPECIALIST for strategy in strategies)
        if nothing_leaves and needed:
            check_nothing_leaves(learnwares, self.home, self.market.address if self.market is not None else None)
        if needed and not learnwares and not (with_task and self.market is not None):
            raise UsageError("no specialist is named", hint="-m ID names one; --task FILE with --market and --ca finds one")
        if needed and self.market is None:
            check_here(learnwares, self.home)
        for strategy in strategies:
            check_directories(strategy, model_directory(self.home, self._base), larger)

    def choose(
        self, learnwares: Sequence[str] = (), task: Sequence[Record] = (), *, several: int = 1, tries: int = 1, cover: int = 0
    ) -> Choice:
        """Return the specialists of these names, or those that suit a task: the best `tries`, or up to `several` for a mixture.

        Matching is on a mirror.  Raises NotFound where there are none, and what pulling them raises.
        """
        with self.market.connect() if self.market is not None else nullcontext() as client:
            if learnwares:
                return named(learnwares, self.model, self.home, client, self.feature_map, task, cover)
            if client is None:
                raise UsageError("--task: needs a market to find a specialist at", hint="give --market and --ca")
            return matched(task, self.model, self.home, client, self.feature_map, several, tries=tries, cover=cover)

    def assistant(
        self,
        strategy: Strategy = Strategy.SINGLE,
        *,
        learnwares: Sequence[str] = (),
        task: Sequence[Record] = (),
        validation: Sequence[Record] = (),
        larger: Path | None = None,
        alpha: float | None = None,
        tau: float | None = None,
        mixing: Mixing = Mixing.MERGE,
        several: int = 3,
        tries: int = 3,
        cover: int = 0,
        nothing_leaves: bool = False,
        tokens: int = 64,
    ) -> Assistant:
        """Return what answers under a strategy (docs/reuse.md): chosen, tried on records with responses, calibrated.

        validation: the querier's records with responses: they try specialists, and calibrate `alpha` and `tau` (for answers of `tokens`
        tokens); without them those of the task try.  tries: of the best matches, 0 believes the specifications.  What wins nothing is
        left out: where the base model loses least, it answers.  Raises RecordError for a record of `validation` without a response, and
        what `check` and `choose` raise.
        """
        mixture, pairs = strategy is Strategy.MIXTURE, answered(validation, "validation", 1) if validation else []
        wish = Wish(
            strategy, larger is not None, len(learnwares) or (several if mixture else 1), alpha, tau, mixing, calibrated=bool(pairs)
        )
        self.check((strategy,), learnwares, with_task=bool(task), larger=larger, nothing_leaves=nothing_leaves)
        if strategy in WITH_SPECIALIST:
            trial = triable(pairs or task) if tries else []
            choice = self.choose(learnwares, task, several=several if mixture else 1, tries=tries if trial else 1, cover=cover)
            if mixture and len(choice.specialists) == 1:  # one has all the weight
                wish = replace(wish, strategy=Strategy.SINGLE, specialists=1)
            choice = self._tried(wish, choice, trial)
            if not choice.specialists:
                return base_instead(self.model, choice)
        else:
            choice = Choice((), (), "")
        large = self.larger_model(larger) if larger is not None and strategy in WITH_LARGER else None
        wish = replace(self._calibrated(wish, choice, large, pairs, tokens), specialists=len(choice.specialists))
        return assemble(
            wish, self.model, choice.specialists, weights=choice.weights, larger=large, why=choice.why, left_site=choice.left_site
        )

    def _require_market(self) -> Market:
        if self.market is None:
            raise UsageError("expected a market", hint="--market HOST:PORT and --ca FILE name one")
        return self.market

    def _tried(self, wish: Wish, choice: Choice, pairs: Sequence[Pair]) -> Choice:
        """Return what is left of a choice after a trial on these records, which may be nothing; all of it without records."""
        if not pairs:
            return replace(choice, why=f"{choice.why}; not tried on your records")
        kept = tried(wish, self.model, choice, pairs, self.on_progress)
        if not kept.specialists and wish.strategy in WITH_LARGER:
            raise NotFound(f"no specialist for this task: {kept.why}", hint="--try 0 takes the best match all the same")
        return kept

    def _calibrated(self, wish: Wish, choice: Choice, larger: BaseModel | None, pairs: Sequence[Pair], tokens: int) -> Wish:
        """Return the wish with what was not given calibrated on the querier's records."""
        if not pairs or larger is None or not choice.specialists:
            return wish
        model, progress = self.model, self.on_progress
        specialist, large = Voice(model, choice.specialists[0].adapter), Voice(larger)
        if wish.strategy is Strategy.CASCADE and wish.tau is None:
            return replace(wish, tau=calibrate_tau(pairs, Part(specialist, model), Part(large, larger), tokens, progress))
        if wish.strategy is Strategy.PROXY and wish.alpha is None:
            return replace(wish, alpha=calibrate_alpha(pairs, model, specialist, Voice(model), large, progress))
        return wish


def search_to_json(search: Search, proof: Path | None = None) -> dict[str, Any]:
    """Return a search as `find --json` prints it.  proof: where the signed answer was kept."""
    found, given = search.found, search.places
    return {
        "schema": "veilmart.find/1", "verdict": str(search.verdict), "matching": str(search.way),
        "releases": len(found.ranking.matches), "query_size": search.sketch.size,
        "matches": [_match_to_json(found, match) for match in given.matches],
        "folded": [{"organisation": name or None, "matches": count} for name, count in given.folded.items()],
        "copies": [{"title": title, "of": original} for title, original in given.copies.items()],
        "price_bytes": search.price_bytes,
        "proof": str(proof) if proof and found.exchange else None,
        "bytes": {"sent": search.traffic.sent, "received": search.traffic.received},
    }  # fmt: skip


def _match_to_json(found: Found, match: Match) -> dict[str, Any]:
    terms = found.catalogue.terms_of(found.position_of(match))
    guarantee = terms.guarantee
    return {
        "id": match.release_id.hex(), "title": found.title_of(match), "rank": match.rank, "score": match.llr,
        "std": match.std, "gap_to_next": match.gap_to_next if match.rank < len(found.ranking.matches) else None, "tie": match.tie,
        "distance": match.distance, "separation": match.separation, "resolution": match.resolution,
        "verdict": str(found.verdict_on(match)), "organisation": found.organisations[found.owner_of(match)] or None,
        "unit": str(guarantee.unit), "epsilon": guarantee.epsilon, "delta": guarantee.delta, "licence": terms.licence,
        "base_model": terms.base_model.hex(), "adapter_size_class": terms.adapter_class,
        "adapter_guarantee": terms.adapter_guarantee or None, **terms.window.dates,
    }  # fmt: skip


def _records_of(task: Task) -> Sequence[Record]:
    return read_records(Path(task)) if isinstance(task, Path | str) else task


def _why_not(search: Search) -> str:
    found, given, views = search.found, search.places, search.sketch.views
    if not given.matches:
        return "no suitable learnware: this market has none" + (" that the filters let pass" if found.catalogue.head.size else "")
    if given.verdict is Verdict.NONE:
        return "no suitable learnware: the best one is another task than yours; the base model is likely as good"
    best = given.matches[0]
    if given.verdict is Verdict.SIBLING:
        return (
            "a sibling: the best one is related to your task but another task "
            f"({100 * best.separation:.0f} % of the distance between unrelated tasks); "
            "try it, or the nearest together (`ask --strategy mixture`), against the base model"
        )
    if views == 1:
        return "cannot tell: prompts alone do not tell tasks apart that share their prompts; add responses to the texts"
    if search.sketch.size < FEW_TEXTS:
        return f"cannot tell: {search.sketch.size} texts say too little about your task; give at least {FEW_TEXTS}"
    count = found.catalogue.columns(1).counts[found.position_of(best)]
    # The test's resolution is governed by the noise variance of the mean, which falls with the square of the number of records.
    return (
        f"cannot tell: from about {count:.0f} records at this epsilon the noise hides the difference between related tasks; "
        f"about {count * best.resolution**0.5:.0f} records, or an epsilon {best.resolution**0.5:.1f} times as large, would do"
    )
