"""What the learnware benchmark finds, computed from the files of a run alone: nothing is trained, and no model is opened."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from nodes.compare import SHORT_ANSWER_TOKENS
from nodes.guard import map_alone
from nodes.mixes import Owner
from protocol.features import FeatureMap
from protocol.release import SIGNATURE_BYTES, open_envelope
from protocol.scoring import Verdict, verdict_of
from tests.bench.learnware_policies import (
    NOT_ALONE,
    SCENARIOS,
    Fitted,
    LabelMarket,
    Look,
    World,
    best,
    candidates,
    fit,
    fitted_mixture,
    label_market,
    looks,
    market_under,
    mixture_loss,
    rankings,
    specifications,
    weights_of,
)
from tests.bench.learnware_run import BASE, POOLED, PUBLIC, Cell, Run, block_of
from tests.bench.learnware_world import kind_of
from tests.bench.rules import Array, Market, similarities

SCHEMA = "veilmart.bench.learnware/1"
Row = dict[str, Any]
MANY = 200  # records of an owner from which noise should cost nothing
ENOUGH = f"unseen, owners of {MANY} records or more"
VIEWS = {2: "full", 1: "prompt-only"}
# Policies that need a user's own texts or the adapters themselves, beside public specifications and encrypted queries.
OWN_TEXTS = "own texts"
MIXED_UNLESS = "LLR on a match, else mixture of 3"
MATCHES_MIXED = "matches mixed by records, else mixture of 3"
TRIED = ("LLR", "predicted gain", "predicted gain, public scores")


def gap_closed(chosen: Array, random: Array, oracle: Array) -> float:
    """Return the share of the way from a random pick to the best one, as a ratio of sums over tasks; 1 where all picks are the same."""
    way = float((random - oracle).sum())
    return float((random - chosen).sum()) / way if way > 0 else 1.0


def _over_tasks(went: Array, way: Array, nothing: float, draws: int = 2000) -> list[float]:
    """Return the 95 % interval of a ratio of sums, by bootstrap over tasks; `nothing` where there is no way to go."""
    rows = np.random.default_rng(0).integers(0, len(way), (draws, len(way)))
    above, below = went[rows].sum(axis=1), way[rows].sum(axis=1)
    return [float(value) for value in np.quantile(np.where(below > 0, above / np.where(below > 0, below, 1.0), nothing), [0.025, 0.975])]


def with_interval(chosen: Array, random: Array, oracle: Array) -> list[float]:
    """Return the gap closed and its 95 % interval."""
    return [round(value, 4) for value in (gap_closed(chosen, random, oracle), *_over_tasks(random - chosen, random - oracle, 1.0))]


def lost_to_noise(chosen: Array, quiet: Array, random: Array, oracle: Array) -> list[float]:
    """Return how much less of the gap is closed than by the picks without noise, and its 95 % interval over tasks: a paired difference."""
    lost = gap_closed(quiet, random, oracle) - gap_closed(chosen, random, oracle)
    return [round(value, 4) for value in (lost, *_over_tasks(chosen - quiet, random - oracle, 0.0))]


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """Losses of one block of specialists on one set of tasks."""

    loss: Array  # (N, T)
    exact: Array  # (N, T)


class Evidence:
    """The files of a run as arrays."""

    def __init__(self, run: Run) -> None:
        self.run, self.settings = run, run.settings

    def cells(self, block: str, name: str, task: str) -> tuple[Cell, Cell]:
        """Return the cells of the scored texts and of a user's own."""
        cell = Cell.read(self.run.cell_path(block, name, task))
        return cell.of(0, self.settings.texts), cell.of(self.settings.texts, len(cell.lengths))

    @cached_property
    def scored(self) -> list[Array]:
        """Of each task (N, tokens): nats of every scored response token under every specialist."""
        return [np.stack([self.cells("none", owner.name, task)[0].nats for owner in self.run.owners]) for task in self.run.tasks]

    @cached_property
    def own(self) -> list[Array]:
        """The same of a user's own texts."""
        return [np.stack([self.cells("none", owner.name, task)[1].nats for owner in self.run.owners]) for task in self.run.tasks]

    def matrix(self, block: str, owners: Sequence[Owner], tasks: Sequence[str]) -> Matrix:
        """Return the matrix of some specialists of a block on some of the evaluated tasks."""
        found = [[self.cells(block, owner.name, task)[0] for task in tasks] for owner in owners]
        return Matrix(np.array([[cell.loss for cell in row] for row in found]), np.array([[cell.exact for cell in row] for row in found]))

    def alone(self, name: str) -> tuple[Array, Array]:
        """Return losses and exact matches (T,) of the base model, or of the pooled adapter."""
        cells = [self.cells("none", name, task)[0] for task in self.run.tasks]
        return np.array([cell.loss for cell in cells]), np.array([cell.exact for cell in cells])

    @cached_property
    def short(self) -> Any:
        """Which tasks have short answers, whose exact matches count: (T,)."""
        return np.array([float(np.median(self.cells("none", BASE, task)[0].lengths)) <= SHORT_ANSWER_TOKENS for task in self.run.tasks])

    def world(self, public: bool) -> World:
        """Return the market, or the public tasks on which policies are fitted."""
        run = self.run
        tasks, owners = (run.public_tasks, run.public_owners) if public else (run.tasks, run.owners)
        block, what = (PUBLIC, PUBLIC) if public else ("none", "owners")
        maps = [run.map] if public else run.maps

        def array(feature_map: FeatureMap | None, group: str, name: str) -> Any:
            return np.load(run.features_path(feature_map, group, name), allow_pickle=False)

        def losses(who: Iterable[tuple[str, str]], on: Sequence[str]) -> Array:
            read = [[Cell.read(run.cell_path(block, name, task)) for task in on] for block, name in who]
            return np.array([[(cell if public or task in run.public_tasks else cell.of(0, self.settings.texts)).loss for task, cell in
                              zip(on, row, strict=True)] for row in read])  # fmt: skip

        own = [(block, owner.name) for owner in owners]
        public_base = losses([("none", BASE)], run.public_tasks)[0]
        gains = 1 - losses(own, run.public_tasks) / public_base
        if public:
            for row, owner in enumerate(owners):
                gains[row, [task in owner.records for task in run.public_tasks]] = np.nan
        return World(
            tuple(tasks), tuple(owners),
            {one.name: [map_alone(one, array(one, what, owner.name)) for owner in owners] for one in maps},
            [array(None, what, owner.name) for owner in owners],
            {one.name: {task: one(array(one, "queries", task)) for task in tasks} for one in maps},
            {task: array(None, "queries", task) for task in tasks},
            losses(own, tasks), losses([("none", BASE)], tasks)[0], gains,
            np.stack([run.map(array(run.map, "queries", task)).mean(axis=0) for task in run.public_tasks]),
        )  # fmt: skip


Key = tuple[str, str, str, str]  # scenario, view, epsilon, policy


def named(epsilon: float) -> str:
    """Return how an epsilon stands in a result."""
    return "none" if math.isinf(epsilon) else f"{epsilon:g}"


class Tally:
    """Losses of what was picked: of each key and task, one value a query and draw."""

    def __init__(self, tasks: int) -> None:
        self.tasks = tasks
        self.losses: dict[Key, list[list[float]]] = defaultdict(lambda: [[] for _ in range(tasks)])
        self.exact: dict[Key, list[list[float]]] = defaultdict(lambda: [[] for _ in range(tasks)])

    def add(self, key: Key, task: int, loss: float, exact: float = math.nan) -> None:
        """Note one pick."""
        self.losses[key][task].append(loss)
        self.exact[key][task].append(exact)

    def mean(self, key: Key) -> tuple[Array, Array]:
        """Return mean loss and exact match of each task: (T,), nan where the scenario does not exist."""
        nothing: list[list[float]] = [[] for _ in range(self.tasks)]
        return _means(self.losses.get(key, nothing)), _means(self.exact.get(key, nothing))


def _means(values: list[list[float]]) -> Array:
    return np.array([np.mean(some) if some else np.nan for some in values])


def kept_in(owners: Sequence[Owner], task: str, scenario: str) -> Any:
    """Return which owners are in the market of a scenario, those with many records alone in the last one: (N,)."""
    if scenario == ENOUGH:
        return candidates(owners, task, "unseen") & np.array([owner.count >= MANY for owner in owners])
    return candidates(owners, task, scenario)


def scenarios(owners: Sequence[Owner], tasks: Sequence[str]) -> dict[str, list[Any]]:
    """Return who is in the market, by scenario and task; a market of fewer than two owners is none."""
    return {name: [kept_in(owners, task, name) for task in tasks] for name in (*SCENARIOS, ENOUGH)}


def evaluate(found: Evidence) -> tuple[Tally, Row]:
    """Return the losses of every policy in every scenario, and what was fitted."""
    run, settings = found.run, found.settings
    world, public = found.world(False), found.world(True)
    matrix = found.matrix("none", run.owners, run.tasks)
    base, base_exact = found.alone(BASE)
    pooled, pooled_exact = found.alone(POOLED)
    kept = scenarios(world.owners, world.tasks)
    tally, fits = Tally(len(world.tasks)), {}
    # Of equal rank everywhere: the constants of a scenario.
    for scenario, masks in kept.items():
        for t, mask in enumerate(masks):
            if mask.sum() < 2:
                continue
            losses, exact = np.where(mask, matrix.loss[:, t], np.inf), matrix.exact[:, t]
            single = int(np.argmin(np.where(mask, matrix.loss.mean(axis=1), np.inf)))
            oracle = int(np.argmin(losses))
            for policy, loss, hit in (
                ("random", matrix.loss[mask, t].mean(), exact[mask].mean()), ("base", base[t], base_exact[t]),
                ("best single", matrix.loss[single, t], exact[single]), ("oracle", losses[oracle], exact[oracle]),
                ("pooled", pooled[t], pooled_exact[t]),
            ):  # fmt: skip
                tally.add((scenario, "-", "-", policy), t, float(loss), float(hit))
    for epsilon in sorted({*settings.epsilons, settings.epsilon_spec, math.inf}):
        main = epsilon == settings.epsilon_spec or math.isinf(epsilon)
        fitted = fit(public, run.map, epsilon, settings) if main else None
        if fitted is not None:
            fits[named(epsilon)] = {"views": fitted.views.tolist(), "labels": fitted.labels.tolist()}
        draws = 1 if math.isinf(epsilon) else settings.draws
        markets = [market_under(world, run.map, epsilon, draw, settings) for draw in range(draws)]
        with_labels = [label_market(world, run.map, epsilon, draw, settings) if main else None for draw in range(draws)]
        for look in looks(world, run.map, settings, draws):
            for views in VIEWS:
                _one_look(
                    tally, found, world, matrix, base, kept, look, views, named(epsilon), markets[look.draw], with_labels[look.draw], fitted
                )
        if main:
            for other in run.maps[1:]:
                _other_map(tally, world, matrix, kept, other, epsilon, found)
    return tally, fits


def _one_look(
    tally: Tally,
    found: Evidence,
    world: World,
    matrix: Matrix,
    base: Array,
    kept: Mapping[str, list[Any]],
    look: Look,
    views: int,
    epsilon: str,
    market: Market,
    with_labels: LabelMarket | None,
    fitted: Fitted | None,
) -> None:
    feature_map, t = found.run.map, look.task
    ranked = rankings(world, look, views, market, feature_map, fitted, with_labels)
    sketch = look.sketches[views]
    scores = market.score(sketch, feature_map)
    own = found.own[t]
    for scenario, masks in kept.items():
        mask = masks[t]
        if mask.sum() < 2:
            continue

        def note(policy: str, loss: float, exact: float = math.nan, scenario: str = scenario) -> None:
            tally.add((scenario, VIEWS[views], epsilon, policy), t, loss, exact)

        for policy, values in ranked.items():
            pick = best(values, mask)[0]
            note(policy, matrix.loss[pick, t], matrix.exact[pick, t])
        pick = best(ranked["LLR"], mask)[0]
        verdict = verdict_of(scores, pick, feature_map, views)
        note("LLR, base where it abstains", matrix.loss[pick, t] if verdict in (Verdict.MATCH, Verdict.SIBLING) else base[t])
        if fitted is None or views == 1:
            continue
        several = best(ranked["LLR"], mask, NOT_ALONE)
        mixed = mixture_loss(found.scored[t][several], weights_of(market, several, sketch, feature_map))
        note("mixture of 3", mixed)
        note(MIXED_UNLESS, matrix.loss[pick, t] if verdict is Verdict.MATCH else mixed)
        matches = [one for one in several if verdict_of(scores, one, feature_map, views) is Verdict.MATCH]
        records = market.columns[views].counts[matches]
        note(MATCHES_MIXED, mixture_loss(found.scored[t][matches], records / records.sum()) if matches else mixed)
        if not own.shape[1]:
            continue
        for policy in TRIED:
            several = best(ranked[policy], mask, NOT_ALONE)
            tried = several[int(np.argmin(own[several].mean(axis=1)))]
            note(f"{policy}; {OWN_TEXTS} choose among 3", matrix.loss[tried, t], matrix.exact[tried, t])
            note(f"{policy}; {OWN_TEXTS} weigh 3", mixture_loss(found.scored[t][several], fitted_mixture(own[several])))


def _other_map(
    tally: Tally, world: World, matrix: Matrix, kept: Mapping[str, list[Any]], feature_map: FeatureMap, epsilon: float, found: Evidence
) -> None:
    draws = 1 if math.isinf(epsilon) else found.settings.draws
    markets = [market_under(world, feature_map, epsilon, draw, found.settings) for draw in range(draws)]
    for look in looks(world, feature_map, found.settings, draws):
        values = similarities(markets[look.draw], look.sketches[2], feature_map)["LLR"]
        for scenario, masks in kept.items():
            if masks[look.task].sum() >= 2:
                pick = best(values, masks[look.task])[0]
                key = (scenario, "full", named(epsilon), f"LLR, {feature_map.name}")
                tally.add(key, look.task, matrix.loss[pick, look.task], matrix.exact[pick, look.task])


# The result ------------------------------------------------------------------------------------------------------------------


def row_of(key: Key, tally: Tally, short: Any) -> Row:
    """Return one line of the table of policies."""
    scenario, view, epsilon, policy = key
    loss, exact = tally.mean(key)
    constants = {name: tally.mean((scenario, "-", "-", name))[0] for name in ("random", "oracle", "base")}
    there = np.isfinite(loss) & np.isfinite(constants["oracle"])
    chosen, random, oracle, base = (values[there] for values in (loss, constants["random"], constants["oracle"], constants["base"]))
    answers = exact[there & short]
    each = [gap_closed(*(one[[i]] for one in (chosen, random, oracle))) for i in range(len(chosen))]
    return {
        "scenario": scenario, "view": view, "epsilon": epsilon, "policy": policy, "tasks": int(there.sum()),
        "loss": _rounded(chosen.mean()), "gap": with_interval(chosen, random, oracle), "gap_median": _rounded(np.median(each)),
        "excess": _rounded((chosen / oracle - 1).mean()), "beats_base": int((chosen < base).sum()),
        "exact": _rounded(answers.mean()) if len(answers) and np.isfinite(answers).all() else None,
    }  # fmt: skip


def _rounded(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def analyse(run: Run) -> Row:
    """Return the result of a finished run, as one JSON object.  The same folder gives the same bytes."""
    found = Evidence(run)
    settings = run.settings
    tally, fits = evaluate(found)
    rows = [row_of(key, tally, found.short) for key in sorted(tally.losses)]
    world = found.world(False)
    result: Row = {
        "schema": SCHEMA,
        "simulated_noise": True,
        "adapter_guarantee": {block_of(epsilon): epsilon for epsilon in settings.adapters},
        "epsilon_spec": settings.epsilon_spec,
        "delta": settings.delta,
        "seed": settings.seed,
        "map": run.map.name,
        "maps": [one.name for one in run.maps],
        "tasks": list(world.tasks),
        "short": [task for task, short in zip(world.tasks, found.short, strict=True) if short],
        "owners": [{"owner": owner.name, "kind": kind_of(owner.name), "records": dict(owner.records)} for owner in world.owners],
        "public_owners": len(run.public_owners),
        "settings": {name: getattr(settings, name) for name in (
            "texts", "validation", "public_texts", "queries", "query_size", "query_pool", "draws", "smallest", "largest", "pooled_steps",
            "gradient_records",
        )},
        "fitted": fits,
        "policies": rows,
        "noise": noise(tally, named(settings.epsilon_spec)),
        "per_task": per_task(found, tally),
        "blocks": blocks(found),
        "scores": score_against_gain(found, world),
        "matching": matching(found, world),
        "cost": cost(found),
        "larger": _larger(run),
    }  # fmt: skip
    result["targets"] = judge(result)
    return result


def noise(tally: Tally, epsilon: str) -> list[Row]:
    """Return what the noise of the releases costs every policy in every scenario: gap closed at this epsilon, without noise, and lost."""
    rows = []
    for scenario, view, of, policy in sorted(tally.losses):
        quiet = (scenario, view, "none", policy)
        if of != epsilon or view != "full" or quiet not in tally.losses:
            continue
        losses = [
            tally.mean(key)[0]
            for key in ((scenario, view, of, policy), quiet, (scenario, "-", "-", "random"), (scenario, "-", "-", "oracle"))
        ]
        chosen, without, random, oracle = (one[np.isfinite(losses[-1])] for one in losses)
        rows.append({
            "scenario": scenario, "policy": policy, "gap": round(gap_closed(chosen, random, oracle), 4),
            "without_noise": round(gap_closed(without, random, oracle), 4), "lost": lost_to_noise(chosen, without, random, oracle),
        })  # fmt: skip
    return rows


def per_task(found: Evidence, tally: Tally) -> list[Row]:
    """Return each task's losses under the policies that matter, seen and unseen."""
    epsilon = named(found.settings.epsilon_spec)
    rows = []
    for t, task in enumerate(found.run.tasks):
        row: Row = {"task": task, "owners": sum(task in owner.records for owner in found.run.owners)}
        for scenario in SCENARIOS[:2]:
            for policy in ("base", "random", "best single", "oracle", "pooled"):
                row[f"{scenario}: {policy}"] = _rounded(tally.mean((scenario, "-", "-", policy))[0][t])
            for policy in ("LLR", "predicted gain", "predicted gain, public scores"):
                row[f"{scenario}: {policy}"] = _rounded(tally.mean((scenario, "full", epsilon, policy))[0][t])
        rows.append(row)
    return rows


def blocks(found: Evidence) -> list[Row]:
    """Return what specialists under each guarantee are worth: the owners' own tasks, and the pick of the LLR seen and unseen.

    The market of all blocks is that of the owners who have a specialist in each of them, on the tasks that these own.
    """
    run, settings, world, rows = found.run, found.settings, found.world(False), []
    strictest = max(settings.adapters, key=lambda epsilon: epsilon is not None)
    owners, tasks = run.owners_of(strictest), run.tasks_of(strictest)
    columns, places = [world.owners.index(owner) for owner in owners], [world.tasks.index(task) for task in tasks]
    base, kept = found.alone(BASE)[0][places], scenarios(owners, tasks)
    markets = [market_under(world, run.map, settings.epsilon_spec, draw, settings) for draw in range(settings.draws)]
    picks: dict[tuple[str, int], list[int]] = defaultdict(list)
    for look in looks(world, run.map, settings, settings.draws):
        if look.task not in places:
            continue
        t, values = places.index(look.task), similarities(markets[look.draw], look.sketches[2], run.map)["LLR"][columns]
        for scenario in SCENARIOS[:2]:
            if kept[scenario][t].sum() >= 2:
                picks[scenario, t].append(best(values, kept[scenario][t])[0])
    for epsilon in settings.adapters if owners else ():
        loss = found.matrix(block_of(epsilon), owners, tasks).loss
        own = [(loss[i, tasks.index(owner.task)], base[tasks.index(owner.task)]) for i, owner in enumerate(owners)]
        row: Row = {
            "epsilon_adapter": epsilon, "specialists": len(own), "own_task_base": _rounded(np.mean([b for _, b in own])),
            "own_task": _rounded(np.mean([a for a, _ in own])), "own_task_beats_base": int(sum(a < b for a, b in own)),
        }  # fmt: skip
        for scenario in SCENARIOS[:2]:
            on = [t for t in range(len(tasks)) if picks[scenario, t]]
            if not on:
                continue
            chosen = np.array([loss[picks[scenario, t], t].mean() for t in on])
            random = np.array([loss[kept[scenario][t], t].mean() for t in on])
            oracle = np.array([loss[kept[scenario][t], t].min() for t in on])
            row[scenario] = {
                "chosen": _rounded(chosen.mean()), "random": _rounded(random.mean()), "oracle": _rounded(oracle.mean()),
                "base": _rounded(base[on].mean()), "gap": with_interval(chosen, random, oracle),
            }  # fmt: skip
        rows.append(row)
    return rows


def score_against_gain(found: Evidence, world: World) -> Row:
    """Return how a match score predicts what the specialist saves: every owner for every task, one query each, the released noise."""
    run, settings = found.run, found.settings
    market = market_under(world, run.map, settings.epsilon_spec, 0, settings)
    points, correlations = [], []
    for look in looks(world, run.map, settings, 1):
        if look.query:
            continue
        scores, task = market.score(look.sketches[2], run.map), world.tasks[look.task]
        gains = world.gains[:, look.task]
        if len(gains) > 2:
            correlations.append(float(spearmanr(scores.llr, gains).statistic))
        for i, owner in enumerate(world.owners):
            said = str(verdict_of(scores, i, run.map, 2))
            points.append([task, owner.name, round(float(scores.llr[i]), 2), round(float(gains[i]), 4), said, task in owner.records])
    by_verdict = []
    for verdict in map(str, Verdict):
        of = np.array([point[3] for point in points if point[4] == verdict])
        if len(of):
            quartiles = [round(float(q), 4) for q in np.quantile(of, (0.25, 0.5, 0.75))]
            by_verdict.append({"verdict": verdict, "pairs": len(of), "gain_quartiles": quartiles, "harmful": _rounded((of < 0).mean())})
    return {
        "columns": ["task", "owner", "llr", "gain", "verdict", "has_records_of_task"], "points": points, "by_verdict": by_verdict,
        "spearman_within_task": _rounded(np.mean(correlations)) if correlations else None,
    }  # fmt: skip


def matching(found: Evidence, world: World) -> Row | None:
    """Return whether the market's answers to encrypted queries are the local scores, and what they cost; None if none was asked."""
    run, settings = found.run, found.settings
    path = run.out / "encrypted.json"
    if not path.exists():
        return None
    asked = json.loads(path.read_text())
    local = market_under(world, run.map, settings.epsilon_spec, 0, settings)
    released = [open_envelope(run.envelope_path(owner.name).read_bytes()) for owner in world.owners]
    drawn = specifications(world, run.map, settings.epsilon_spec, 0, settings)
    same = all(np.array_equal(one.specification.noisy_sums, other.noisy_sums) for one, other in zip(released, drawn, strict=True))
    by_look = {(world.tasks[look.task], look.query): look for look in looks(world, run.map, settings, 1)}
    largest, equal = 0.0, 0
    for query in asked["queries"]:
        scores = local.score(by_look[query["task"], query["query"]].sketches[2], run.map)
        llr = {owner.name: float(scores.llr[i]) for i, owner in enumerate(world.owners)}
        ranked = similarities(local, by_look[query["task"], query["query"]].sketches[2], run.map)["LLR"]
        largest = max(largest, *(abs(llr[name] - value) for name, value in query["ranking"]))
        equal += world.owners[best(ranked, np.ones(len(ranked), bool))[0]].name == query["ranking"][0][0]
    return {
        "queries": len(asked["queries"]), "same_choice": equal, "largest_llr_difference": float(f"{largest:.2g}"),
        "releases_are_the_seeded_draws": same, "release_bytes": round(np.mean([len(one.body) + SIGNATURE_BYTES for one in released])),
        "adapter_bytes": round(np.mean([one.adapter.size_bytes for one in released if one.adapter is not None])),
        "server_cpu_ms": round(float(np.mean([query["server_cpu_ms"] for query in asked["queries"]])), 2),
        "sent": asked["sent"], "received": asked["received"],
    }  # fmt: skip


def cost(found: Evidence) -> list[Row]:
    """Return the CPU seconds of every stage."""
    return found.run.costs()


def _larger(run: Run) -> list[Row]:
    return [json.loads(path.read_text()) for path in sorted((run.out / "larger").glob("*.json"))]


def find(result: Row, scenario: str, policy: str, epsilon: str = "", view: str = "full") -> Row:
    """Return the row of a policy; constants of a scenario have no epsilon and no view."""
    wanted = (scenario, view, epsilon, policy) if epsilon else (scenario, "-", "-", policy)
    (row,) = [row for row in result["policies"] if (row["scenario"], row["view"], row["epsilon"], row["policy"]) == wanted]
    return dict(row)


def public_and_encrypted(result: Row, scenario: str, epsilon: str) -> list[Row]:
    """Return the policies that use nothing but public objects and encrypted queries, best first: none that needs a user's own losses."""
    fixed = ("prompt view alone", "response view alone")
    rows = [
        row for row in result["policies"]
        if (row["scenario"], row["view"], row["epsilon"]) == (scenario, "full", epsilon)
        and OWN_TEXTS not in row["policy"] and row["policy"] not in fixed
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -row["gap"][0])


def judge(result: Row) -> list[Row]:
    """Return every target with what was measured."""
    epsilon = named(result["epsilon_spec"])
    seen, tasks = find(result, "seen", "LLR", epsilon), len(result["tasks"])
    over = seen["loss"] / find(result, "seen", "oracle")["loss"] - 1
    mixed = find(result, "seen", MATCHES_MIXED, epsilon)["excess"]
    rows: list[Row] = [
        _judged("seen: mean loss of the LLR's picks over the oracle's", "<= 1 %", round(over, 4), over <= 0.01, True),
        _judged("the same, mean of the tasks' own ratios", "<= 1 %", seen["excess"], seen["excess"] <= 0.01, True),
        _judged(f"the same of: {MATCHES_MIXED}", "<= 1 %", mixed, mixed <= 0.01, True),
        _judged(
            "seen: tasks on which the LLR's pick beats the base model",
            f"{tasks} of {tasks}",
            seen["beats_base"],
            seen["beats_base"] == tasks,
        ),
    ]
    unseen = public_and_encrypted(result, "unseen", epsilon)
    if unseen:
        top = unseen[0]
        rows.append(
            _judged(f"unseen: gap closed by the best public policy ({top['policy']})", ">= 90 %", top["gap"][0], top["gap"][0] >= 0.9, True)
        )
        llr = find(result, "unseen", "LLR", epsilon)["gap"][0]
        rows.append(_judged("unseen: gap closed by the LLR", "seed system 75 %", llr, llr >= 0.75, True))
    for policy in dict.fromkeys(["LLR", *(row["policy"] for row in unseen[:1])]):
        for row in result["noise"]:
            if (row["scenario"], row["policy"]) == (ENOUGH, policy):
                lost = row["lost"][0]
                rows.append(_judged(f"{ENOUGH}: gap lost to noise at epsilon {epsilon}, {policy}", "<= 2 points", lost, lost <= 0.02, True))
    if result["matching"] is not None:
        asked, same = result["matching"]["queries"], result["matching"]["same_choice"]
        rows.append(_judged("encrypted queries that choose as local scores do", f"{asked} of {asked}", same, same == asked))
    return rows


def _judged(what: str, target: str, measured: float, reached: bool, share: bool = False) -> Row:
    return {"what": what, "target": target, "measured": measured, "reached": bool(reached), "share": share}
