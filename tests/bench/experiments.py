"""The experiments of the specification benchmark.  Each takes features and sizes and returns rows that JSON can hold.

Seeds choose records, owners and queries only; noise comes from the operating system, so two runs differ within their intervals.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from protocol.features import FeatureMap
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.scoring import Verdict, sketch_of, verdict_of
from protocol.specification import estimate, quantise
from protocol.window import ALWAYS
from tests.bench.embeddings import Task
from tests.bench.rules import (
    DELTA,
    KINDS,
    RULES,
    Array,
    Pools,
    area_under_curve,
    choose,
    excess,
    interval,
    mixture_weights,
    of_mixture,
    pools_of,
    publish,
    sample,
    similarities,
    total_variation,
)

Row = dict[str, Any]

# Declared in the data's README: the same source texts or the same collection, another task.
SAME_PROMPTS = frozenset({"health-pubmedqa", "health-pubmed-conclusion"})
SIBLINGS = (
    SAME_PROMPTS,
    frozenset({"legal-policyqa", "legal-clause-category"}),
    frozenset({"health-medquad-cancer", "health-medquad-rare", "health-medquad-genetics"}),
    frozenset({"travel-assistant", "service-kitchen", "service-work-home"}),
)
VIEWS = {2: "full", 1: "prompt-only"}


def siblings_of(task: str) -> frozenset[str]:
    """Return the declared siblings of a task."""
    return frozenset().union(*(group - {task} for group in SIBLINGS if task in group))


def pure_cells(
    tasks: Sequence[Task], feature_map: FeatureMap, n: int, epsilon: float, sizes: Iterable[int], repeats: int, per_task: bool = False
) -> list[Row]:
    """One owner a task: how often its own task's queries find it, and what is said when it is there and when it is left out.

    Releases are drawn once a repeat and serve one query of every task, size and view.
    """
    rng, noise = np.random.default_rng([n, int(1000 * min(epsilon, 1e6))]), operating_system()
    names = [task.name for task in tasks]
    related = [np.array([name in siblings_of(own) for name in names]) for own in names]
    pair = np.array([name in SAME_PROMPTS for name in names])
    sizes = list(sizes)
    seen: dict[tuple[int, int], list[list[Row]]] = {(size, views): [[] for _ in tasks] for size in sizes for views in VIEWS}
    for _ in range(repeats):
        market = publish([task.train[choose(rng, len(task.train), n)] for task in tasks], [epsilon] * len(tasks), feature_map, noise)
        for right, task in enumerate(tasks):
            for size in sizes:
                query = task.test[choose(rng, len(task.test), size)]
                for views in VIEWS:
                    scores = market.score(sketch_of(query, feature_map, views), feature_map)
                    order = np.argsort(-scores.llr, kind="stable")
                    best, other = int(order[0]), int(order[order != right][0])
                    seen[size, views][right].append(
                        {
                            "top1": best == right,
                            "top3": right in order[:3],
                            "top1_pair_as_one": best == right or bool(pair[right] and pair[best]),
                            "present": verdict_of(scores, best, feature_map, views),
                            "absent": verdict_of(scores, other, feature_map, views),
                            "best": names[best],
                            "other": names[other],
                            "other_related": bool(related[right][other]),
                        }
                    )
    short = [task.name for task in tasks if len(task.train) < n]
    rows = []
    for (size, views), by_task in seen.items():
        row: Row = {"map": feature_map.name, "n": n, "epsilon": str(epsilon) if math.isinf(epsilon) else epsilon, "query_size": size}
        row |= {"view": VIEWS[views], "queries": repeats * len(tasks), **_shares(by_task, [bool(some.any()) for some in related])}
        row |= {"owners_bootstrapped": short, "queries_bootstrapped": [task.name for task in tasks if len(task.test) < size]}
        if per_task:
            row["per_task"] = [_one_task(name, looks) for name, looks in zip(names, by_task, strict=True)]
        rows.append(row)
    return rows


def _shares(by_task: list[list[Row]], has_sibling: list[bool]) -> Row:
    """Return shares over queries, with intervals over tasks.

    found: the verdict is match and the best release is the right one.  wrong: match, but another release.  false: the right owner is
    left out and the verdict is match.  sibling: left out, a declared sibling is there, and the verdict is sibling; sibling_declared: and
    the release so named is a declared one.  sibling_of_none: left out, no declared sibling, and yet the verdict is sibling.
    """

    def rates(test: Any, kept: list[bool] | None = None) -> Array:
        chosen = [looks for i, looks in enumerate(by_task) if kept is None or kept[i]]
        return np.array([np.mean([test(look) for look in looks]) for looks in chosen])

    measures = {
        "top1": rates(lambda look: look["top1"]),
        "top3": rates(lambda look: look["top3"]),
        "top1_pair_as_one": rates(lambda look: look["top1_pair_as_one"]),
        "found": rates(lambda look: look["present"] is Verdict.MATCH and look["top1"]),
        "wrong": rates(lambda look: look["present"] is Verdict.MATCH and not look["top1"]),
        "false": rates(lambda look: look["absent"] is Verdict.MATCH),
        "sibling": rates(lambda look: look["absent"] is Verdict.SIBLING, has_sibling),
        "sibling_declared": rates(lambda look: look["absent"] is Verdict.SIBLING and look["other_related"], has_sibling),
        "sibling_of_none": rates(lambda look: look["absent"] is Verdict.SIBLING, [not some for some in has_sibling]),
    }
    shares: Row = {name: [round(float(values.mean()), 4), *interval(values)] for name, values in measures.items() if len(values)}
    looks = [look for some in by_task for look in some]
    for case in ("present", "absent"):
        said = Counter(look[case] for look in looks)
        shares[case] = {str(verdict): round(said[verdict] / len(looks), 4) for verdict in Verdict}
    return shares


def _one_task(name: str, looks: list[Row]) -> Row:
    """Return one line of the per-task table, and with whom the task is confused."""
    mistaken = Counter(look["best"] for look in looks if not look["top1"]).most_common(1)
    taken = Counter(look["other"] for look in looks if look["absent"] is Verdict.MATCH).most_common(1)
    nearest = Counter(look["other"] for look in looks).most_common(1)
    share = {
        "top1": np.mean([look["top1"] for look in looks]),
        "found": np.mean([look["present"] is Verdict.MATCH and look["top1"] for look in looks]),
        "false": np.mean([look["absent"] is Verdict.MATCH for look in looks]),
        "sibling": np.mean([look["absent"] is Verdict.SIBLING for look in looks]),
    }
    row: Row = {"task": name, "siblings": sorted(siblings_of(name)), **{key: round(float(value), 4) for key, value in share.items()}}
    return row | {
        "mistaken_for": mistaken[0][0] if mistaken else "",
        "falsely_matched": taken[0][0] if taken else "",
        "best_other": nearest[0][0],
    }


COUNTS, EPSILONS, OWNERS = (50, 100, 200, 500, 1000, 2000), (0.5, 1.0, 2.0, 4.0, 8.0), 100


def hundred_owners(tasks: Sequence[Task], feature_map: FeatureMap, markets: int, queries: int) -> Row:
    """A hundred owners a market, a quarter of each kind of composition, their sizes and epsilons mixed; users of the same kinds.

    The loss of a pick is the total variation distance between the user's and the owner's composition over the cells (task x label),
    minus that of the best owner of the market; `distance` is the same for the true squared distance of population means.
    `noisy_picks` is the share of picks that fall on the fifth of the owners with the noisiest means.
    """
    pools, rng, noise = pools_of(tasks), np.random.default_rng(3), operating_system()
    kinds = list(KINDS)
    losses = np.zeros((2, markets, queries, len(RULES) + 1))  # the last: a random pick
    best_possible = np.zeros((2, markets, queries))
    noisy = np.full((markets, queries, len(RULES) + 1), 0.2)
    users = [kinds[q % len(kinds)] for q in range(queries)]
    for m in range(markets):
        compositions = np.stack([KINDS[kinds[i % len(kinds)]](pools, rng) for i in range(OWNERS)])
        own = [sample(pools.train, composition, int(rng.choice(COUNTS)), rng) for composition in compositions]
        market = publish(own, rng.choice(EPSILONS, OWNERS).tolist(), feature_map, noise)
        noisiest = np.argsort(market.columns[2].noise_stds)[-OWNERS // 5 :]
        for q, kind in enumerate(users):
            user = KINDS[kind](pools, rng)
            sketch = sketch_of(sample(pools.test, user, 50, rng), feature_map, 2)
            costs = (total_variation(compositions, user), (((compositions - user) @ pools.means) ** 2).sum(axis=1))
            ranked = similarities(market, sketch, feature_map)
            noisy[m, q, :-1] = [int(np.argmax(ranked[rule])) in noisiest for rule in RULES]
            for k, cost in enumerate(costs):
                best_possible[k, m, q] = cost.min()
                losses[k, m, q, :-1] = [excess(cost, int(np.argmax(ranked[rule]))) for rule in RULES]
                losses[k, m, q, -1] = cost.mean() - cost.min()
    result: Row = {"owners": OWNERS, "markets": markets, "queries": markets * queries, "n": COUNTS, "epsilon": EPSILONS, "query_size": 50}
    names = (*RULES, "random pick")
    result["noisy_picks"] = {rule: [round(float(noisy[:, :, r].mean()), 4), *interval(noisy[:, :, r])] for r, rule in enumerate(names)}
    for k, measure in enumerate(("total_variation", "distance")):
        by_rule = {}
        for r, rule in enumerate(names):
            of_rule = losses[k, :, :, r]
            by_rule[rule] = {
                "loss": [round(float(of_rule.mean()), 4), *interval(of_rule)],
                "llr_minus_rule": [round(float((losses[k, :, :, 0] - of_rule).mean()), 4), *interval(losses[k, :, :, 0] - of_rule)],
                "by_kind": {kind: _by_kind(of_rule, users, kind) for kind in kinds},
            }
        result[measure] = {"best_possible": round(float(best_possible[k].mean()), 4), "rules": by_rule}
    return result


def _by_kind(of_rule: Array, users: list[str], kind: str) -> list[float]:
    chosen = of_rule[:, [user == kind for user in users]]
    return [round(float(chosen.mean()), 4), *interval(chosen)]


def heterogeneous(tasks: Sequence[Task], feature_map: FeatureMap, markets: int) -> list[Row]:
    """Pure owners of unequal size and epsilon, three a task, five tasks absent: top-1, and how well a score tells present from absent."""
    rng, noise = np.random.default_rng(4), operating_system()
    absent = min(5, len(tasks) // 4)
    right = np.zeros((markets, len(tasks) - absent, len(RULES)))
    best = {True: np.zeros((markets, len(tasks) - absent, len(RULES))), False: np.zeros((markets, absent, len(RULES)))}
    for m in range(markets):
        order = rng.permutation(len(tasks))
        owners = np.repeat(order[absent:], 3)
        own = [tasks[t].train[choose(rng, len(tasks[t].train), int(rng.choice((50, 100, 500, 2000))))] for t in owners]
        market = publish(own, rng.choice((0.5, 1.0, 2.0, 8.0), len(owners)).tolist(), feature_map, noise)
        for place, t in enumerate(order):
            here = place >= absent
            row = place - absent if here else place
            sketch = sketch_of(tasks[t].test[choose(rng, len(tasks[t].test), 50)], feature_map, 2)
            for r, values in enumerate(similarities(market, sketch, feature_map).values()):
                best[here][m, row, r] = values.max()
                if here:
                    right[m, row, r] = owners[int(np.argmax(values))] == t
    rows = []
    for r, rule in enumerate(RULES):
        scores = np.concatenate([best[True][:, :, r], best[False][:, :, r]], axis=1)

        def area(some: Array) -> float:
            return area_under_curve(some[:, :-absent].ravel(), some[:, -absent:].ravel())

        row: Row = {"rule": rule, "top1": [round(float(right[:, :, r].mean()), 4), *interval(right[:, :, r])]}
        rows.append(row | {"auc": [round(area(scores), 4), *interval(scores, area, draws=300)], "queries": scores.size})
    return rows


def mixtures(tasks: Sequence[Task], feature_map: FeatureMap, repeats: int) -> list[Row]:
    """Weights of a Dirichlet 0.1 mixture over the tasks, recovered from one release a task: total variation error."""
    rng, noise = np.random.default_rng(6), operating_system()
    pools = Pools(
        np.arange(len(tasks)), tuple(task.train for task in tasks), tuple(task.test for task in tasks), np.ones(len(tasks)), np.zeros(0)
    )
    rows = []
    for n, epsilon in ((120, 1.0), (500, 1.0), (500, math.inf)):
        for size in (50, 500):
            errors = np.zeros((repeats, 5, 2))
            for i in range(repeats):
                own = [task.train[choose(rng, len(task.train), n)] for task in tasks]
                market = publish(own, [epsilon] * len(tasks), feature_map, noise)
                length = feature_map.dimension * market.columns[2].noise_stds ** 2
                for j in range(errors.shape[1]):
                    truth = of_mixture(0.1)(pools, rng)
                    query = sample(pools.test, truth, size, rng).mean(axis=0) - feature_map.task_mean
                    for k, taken_off in enumerate((0.0, length)):
                        errors[i, j, k] = total_variation(mixture_weights(market.means, query, taken_off), truth)
            row: Row = {"n": n, "epsilon": str(epsilon) if math.isinf(epsilon) else epsilon, "query_size": size}
            for k, name in enumerate(("plain", "corrected")):
                row[name] = [round(float(errors[:, :, k].mean()), 4), *interval(errors[:, :, k])]
            rows.append(row | {"queries": errors.shape[0] * errors.shape[1]})
    return rows


def cost(feature_map: FeatureMap, records: int = 10_000, rounds: int = 5) -> Row:
    """CPU seconds from embeddings to a specification, the median of some rounds, and the bytes of what is published."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from protocol.release import AdapterReference, Card, Release, sign_release

    embeddings = np.random.default_rng(7).standard_normal((records, 2, feature_map.width)).astype(np.float32)
    noise, seconds = operating_system(), []
    for _ in range(rounds):
        started = time.process_time()
        specification = estimate(quantise(feature_map(embeddings)), feature_map.map_id, Guarantee(1.0, DELTA), noise)
        seconds.append(time.process_time() - started)
    key, adapter = Ed25519PrivateKey.generate(), AdapterReference(bytes(32), 1 << 20)
    base_model, card = bytes.fromhex(feature_map.base_model), Card("notes")
    release = Release(key.public_key().public_bytes_raw(), 1, b"", base_model, specification, adapter, card, False, ALWAYS)
    return {
        "records": records,
        "cpu_seconds": round(float(np.median(seconds)), 3),
        "bytes_of_sums": 4 * len(specification.noisy_sums),
        "bytes_of_envelope": len(sign_release(release, key)),
    }
