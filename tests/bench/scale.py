"""What a market costs at the size of an internet, which step is needed when, and what each step shows and loses: docs/scale.md.

    python -m tests.bench.scale [--quick] [--json] [--out FILE] [PRICES]          about 3 minutes of CPU and 3 GB; --quick: 10 seconds
    python -m tests.bench.scale --costs [PRICES]            the costs alone, for what the last full run simulated
    python -m tests.bench.scale --shape                     the same, after measuring how the real tasks lie: a CPU minute more

1. `model`: CPU of the steps of an encrypted query, fitted on docs/results/matching.json, checked on market.json.
2. `recall`: synthetic catalogues of 10^4 to 10^6 releases (tests/bench/scale_world.py), in clusters: what a querier that probes a few of
   them finds of what the exact scan finds; and how many probes it takes to lose at most 5 % of the best matches.
3. `leak`: what a market learns of the task from the clusters that are probed, in the clear and with two kinds of cover.
4. `costs`: bytes, cores, memory and money at 10^4, 10^6 and 10^8 releases and 1, 100 and 10^4 queries a second, for each way of searching.
   10^8 is an extrapolation: of the cost model, and of the number of probes by the power law of the three sizes before.
5. `accelerators`: what a pass over the index would take where memory alone bounds it.  An estimate: there is no such kernel here.
6. `hidden_check`: a hidden probe of ten clusters, really encrypted and answered by the evaluator of today, against the model.
7. `publishing`: what releases cost that come in and are kept, from market.json and market-load.json.

A full run writes docs/results/scale.json, the picture beside it and the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from scipy.stats import binomtest

from protocol.features import FeatureMap, default_map
from tests.bench.scale_cost import (
    FILL,
    CostModel,
    Prices,
    Steps,
    catalogue_bytes,
    exact,
    fit,
    hidden,
    hidden_clusters,
    in_clear,
    interleaved_rows,
    on_accelerators,
    service,
    steps_of,
    tile_clusters,
)
from tests.bench.scale_report import picture, tables
from tests.bench.scale_world import Clusters, Kind, World, leak, recall, shape_of
from tests.bench.specification import to_text
from tests.bench.tables import fill

SCHEMA = "veilmart.bench.scale/1"
DOCS = Path(__file__).parents[2] / "docs"
RESULTS = DOCS / "results"
RELEASES, RATES = (10_000, 1_000_000, 100_000_000), (1, 100, 10_000)
SIMULATED, QUERIES = (10_000, 100_000, 1_000_000), 300
QUICK_SIMULATED, QUICK_QUERIES = (3_000, 10_000), 60
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
COARSE = 8  # super-clusters of a small catalogue; one more for every eight times as many releases doubles them
WANTED = 0.95  # of the best matches, to be found still, by the lower end of an interval of 95 %
GROUP, TIMES = 8, 10  # clusters in a group of cover; queries of one task that a market may put together
LEAK_RELEASES, LEAK_CLUSTERS = 100_000, 32
SHAPE_RECORDS = 100


def shape(data: Path, base: Path, feature_map: FeatureMap) -> dict[str, Any]:
    """Return how the means of the real tasks lie that the map was not fitted on."""
    from nodes.base_model import BaseModel
    from nodes.records import read_records

    model = BaseModel.open(base)
    model.admit_map(feature_map)
    folders = sorted(folder for folder in data.iterdir() if folder.is_dir() and folder.name not in feature_map.fitted_on)
    means = []
    for folder in folders:
        records = read_records(folder / "train.jsonl", SHAPE_RECORDS)
        embedding = model.embed_batched(records, layer=feature_map.layer, kind=feature_map.embedding)
        means.append(feature_map(embedding).mean(axis=0) - feature_map.task_mean)
    related, dimensions = shape_of(np.array(means))
    return {"tasks": len(folders), "records": SHAPE_RECORDS, "related": round(related, 4), "dimensions": round(dimensions, 2)}


def coarse_clusters(releases: int) -> int:
    """Return how many super-clusters a querier names in the clear, when the cluster inside stays hidden."""
    return 2 ** max(round(math.log2(COARSE) + math.log(releases / 10_000, 8)), 1)


def simulate(feature_map: FeatureMap, kind: Kind, sizes: Sequence[int], queries: int) -> list[dict[str, Any]]:
    """Return what is found at each size with the numbers of clusters that some way of searching would have."""
    rows = []
    for releases in sizes:
        rng = np.random.default_rng(releases)
        world = World.draw(feature_map, releases, kind, rng)
        dimension = feature_map.dimension
        uses = {
            "tile": tile_clusters(releases, dimension), "hidden": hidden_clusters(releases, dimension), "coarse": coarse_clusters(releases),
        }  # fmt: skip
        made = {count: Clusters.of(world, count, FILL, rng) for count in sorted(set(uses.values()))}
        found = recall(world, list(made.values()), PROBES, queries, rng)
        for use, count in uses.items():
            cells = [row for row in found if row["clusters"] == count]
            enough = min((row["probes"] for row in cells if surely(row["recall_at_1"], queries) >= WANTED), default=count)
            rows += [{"kind": kind.name, "releases": releases, "use": use, **row, "probes_needed": enough} for row in cells]
    return rows


def surely(share: float, queries: int) -> float:
    """Return the lower end of Wilson's interval of a share."""
    return float(binomtest(round(share * queries), queries).proportion_ci(method="wilson").low)


def probes_needed(rows: Sequence[Mapping[str, Any]], releases: int) -> tuple[int, bool]:
    """Return how many probes find WANTED of the best matches at a size, and whether that is extrapolated.

    rows: of one kind and use.  Beyond the largest size that was simulated: the most of any size, times what a power law through all of
    them adds, where it adds anything.
    """
    of_size = {row["releases"]: row["probes_needed"] for row in rows}
    if releases in of_size:
        return of_size[releases], False
    sizes = sorted(of_size)
    needed = [of_size[size] for size in sizes]
    power = max(float(np.polyfit(np.log(sizes), np.log(needed), 1)[0]), 0.0)
    return math.ceil(round(max(needed) * (releases / sizes[-1]) ** power, 6)), True


def ways(rows: Sequence[Mapping[str, Any]], releases: int, dimension: int) -> list[tuple[str, Steps, bool, str]]:
    """Return each way of searching a catalogue: its name, what one query takes, whether that is extrapolated, and what shows.

    rows: recall of the kind of catalogue that is looked at.
    """

    def needed(use: str) -> tuple[int, bool]:
        return probes_needed([row for row in rows if row["use"] == use], releases)

    tiles, in_tiles = needed("tile")
    clusters, tiles_far = tile_clusters(releases, dimension), in_tiles
    probed = min(tiles, clusters)
    hidden_probes, hidden_far = needed("hidden")
    places = hidden_clusters(releases, dimension)
    coarse, coarse_far = needed("coarse")
    groups = coarse_clusters(releases)
    coarse = min(coarse, groups)
    inside = -(-releases // groups)
    within = hidden(inside, hidden_clusters(inside, dimension), dimension, min(hidden_probes, hidden_clusters(inside, dimension)))
    return [
        ("exact scan", exact(releases, dimension), False, "nothing"),
        (f"{probed} of {clusters} clusters, in the clear", in_clear(probed, dimension), tiles_far, "which clusters"),
        (
            f"the same in fixed groups of {GROUP}", in_clear(min(probed * GROUP, clusters), dimension), tiles_far, "which groups",
        ),
        (
            f"{min(hidden_probes, places)} of {places} clusters, numbers hidden",
            hidden(releases, places, dimension, min(hidden_probes, places)), hidden_far, "nothing",
        ),
        (
            f"{coarse} of {groups} super-clusters in the clear, clusters inside hidden", within.times(coarse),
            coarse_far or hidden_far, "which super-clusters",
        ),
    ]  # fmt: skip


def costs(recalls: Sequence[Mapping[str, Any]], kind: Kind, model: CostModel, prices: Prices, dimension: int) -> list[dict[str, Any]]:
    """Return what each way costs at each size and rate."""
    of_kind, found = [row for row in recalls if row["kind"] == kind.name], []
    for releases in RELEASES:
        whole = exact(releases, dimension).index_bytes
        for way, steps, extrapolated, shows in ways(of_kind, releases, dimension):
            # All clusters lie in memory, whichever are probed: FILL leaves places empty.
            index = whole if way == "exact scan" else whole / FILL
            for rate in RATES:
                found.append(
                    {"releases": releases, "way": way, "shows": shows, "extrapolated": extrapolated, "queries_a_second": rate}
                    | service(model, steps, index, rate, prices)
                )
    return found


def accelerators(
    recalls: Sequence[Mapping[str, Any]], kind: Kind, model: CostModel, prices: Prices, dimension: int
) -> list[dict[str, Any]]:
    """Return cores and accelerators for the ways that show nothing, at each size, at the highest rate."""
    of_kind, found = [row for row in recalls if row["kind"] == kind.name], []
    for releases in RELEASES:
        for way, steps, _, shows in ways(of_kind, releases, dimension):
            if shows == "nothing":
                whole = exact(releases, dimension).index_bytes
                on_cores = service(model, steps, whole, RATES[-1], prices)
                cores = {name: on_cores[name] for name in ("cpu_ms", "cores", "month_cores")}
                found.append({"releases": releases, "way": way} | cores | on_accelerators(steps, whole, RATES[-1], prices))
    return found


def hidden_check(model: CostModel, dimension: int, clusters: int = 10, rows: int = 2_000, repeats: int = 7) -> dict[str, Any]:
    """Return CPU and error of hidden probes at a size that the index of today has place for, against the model."""
    from protocol.encryption import EncryptedQuery, MatchPlan, QueryKey
    from protocol.evaluation import EncodedIndex, evaluate

    rng = np.random.default_rng(1)
    means = rng.standard_normal((clusters, rows, dimension)) / math.sqrt(dimension)
    beside = interleaved_rows(means)
    plan = MatchPlan.build(rows, clusters * dimension)
    index, query = EncodedIndex.build(beside, plan), rng.standard_normal(dimension) / math.sqrt(dimension)
    seconds, errors = [], []
    for number in range(repeats + 1):
        vector = np.zeros((clusters, dimension))
        vector[number % clusters] = query
        key = QueryKey.fresh(plan)
        data = key.encrypt(vector.ravel()).to_bytes()
        began = time.process_time()
        answer = evaluate(index, EncryptedQuery.from_bytes(data, plan)).to_bytes()
        seconds.append(time.process_time() - began)
        errors.append(key.decrypt(answer, np.linalg.norm(beside, axis=1)) - means[number % clusters] @ query)
    measured, modelled = 1e3 * float(np.median(seconds[1:])), model.cpu_ms(steps_of(plan))
    return {
        "clusters": clusters, "releases": clusters * rows, "cpu_ms": round(measured, 2), "modelled_cpu_ms": round(modelled, 2),
        "error_rms": float(f"{np.sqrt(np.mean(np.square(errors))):.2g}"),
        "exact_scan_modelled_cpu_ms": round(model.cpu_ms(exact(clusters * rows, dimension)), 2),
    }  # fmt: skip


def publishing(market: Mapping[str, Any], load: Mapping[str, Any], feature_map: FeatureMap) -> list[dict[str, Any]]:
    """Return what releases cost that come in within a year and are kept, at each size."""
    year = 365 * 86_400
    rows = []
    for releases in RELEASES:
        row: dict[str, Any] = {
            "releases": releases, "a_second_over_a_year": round(releases / year, 4),
            "cores_for_them": round(releases / year * market["registrations"]["market_cpu_ms_each"] / 1e3, 4),
            "catalogue_for_a_newcomer_mb": round(catalogue_bytes(releases) / 1e6, 1),
            "inclusion_proof_hashes": math.ceil(math.log2(releases)),
            "index_gb": round(exact(releases, feature_map.dimension).index_bytes / 1e9, 3),
        }  # fmt: skip
        before, after = load["database_mb"]
        row["database_gb"] = round(releases * (after - before) / load["releases"]["registered"] / 1e3, 2)
        for name, process in load["processes"].items():
            row[f"{name}_memory_gb"] = round(releases * max(process["kb_a_release"], 0.0) / 1e6, 2)
        rows.append(row)
    return rows


def kinds_of(real: Mapping[str, Any], feature_map: FeatureMap) -> tuple[Kind, Kind]:
    """Return the two kinds of catalogues: one like the real tasks, and one without any structure."""
    return Kind("like the real tasks", real["related"], real["dimensions"]), Kind("no structure", 1.0, float(feature_map.dimension))


def simulation(feature_map: FeatureMap, real: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """Return what clusters find, and what they show."""
    kinds = kinds_of(real, feature_map)
    sizes, queries = (QUICK_SIMULATED, QUICK_QUERIES) if quick else (SIMULATED, QUERIES)
    recalls = [row for kind in kinds for row in simulate(feature_map, kind, sizes, queries)]
    rng, leaks = np.random.default_rng(7), []
    for kind in kinds:
        world = World.draw(feature_map, sizes[0] if quick else LEAK_RELEASES, kind, rng)
        clusters = Clusters.of(world, LEAK_CLUSTERS, FILL, rng)
        leaks += [{"kind": kind.name, **row} for row in leak(world, clusters, GROUP, TIMES, rng)]
    return {"quick": quick, "map": feature_map.name, "shape": dict(real), "recall": recalls, "leak": leaks}


def priced(simulated: Mapping[str, Any], feature_map: FeatureMap, prices: Prices) -> dict[str, Any]:
    """Return the result: what was simulated, and what it costs by the measurements of today."""
    matching, market, load = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("matching", "market", "market-load"))
    model, held_out = fit(matching, market)
    recalls, kind, dimension = simulated["recall"], kinds_of(simulated["shape"], feature_map)[0], feature_map.dimension
    return {
        "schema": SCHEMA, **{name: simulated[name] for name in ("quick", "map", "shape")}, "prices": asdict(prices),
        "model": {name: float(f"{value:.4g}") for name, value in asdict(model).items()}, "held_out_ratio": round(held_out, 3),
        "recall": recalls, "leak": simulated["leak"], "costs": costs(recalls, kind, model, prices, dimension),
        "accelerators": accelerators(recalls, kind, model, prices, dimension), "hidden_check": hidden_check(model, dimension),
        "publishing": publishing(market, load, feature_map),
    }  # fmt: skip


def main() -> None:
    """Run the simulation and print its tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("VEILMART_HOME") or platformdirs.user_data_path("veilmart"))
    parser.add_argument("--quick", action="store_true", help="small catalogues")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="the JSON file; a full run writes docs/results/scale.json unless told otherwise")
    parser.add_argument("--costs", action="store_true", help="only costs anew, at other prices or measurements, for what was simulated")
    parser.add_argument("--shape", action="store_true", help="measure how the real tasks lie, which needs their data and the base model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=home / "models" / "smollm2-135m")
    for price in fields(Prices):
        parser.add_argument(f"--{price.name.replace('_', '-')}", type=float, default=price.default, metavar="X", help=f"{price.default:g}")
    asked = parser.parse_args()
    feature_map, kept = default_map(), RESULTS / "scale.json"
    prices = Prices(**{price.name: getattr(asked, price.name) for price in fields(Prices)})
    if asked.costs:
        simulated = json.loads(kept.read_text())
    else:
        real = shape(asked.data, asked.base, feature_map) if asked.shape else json.loads(kept.read_text())["shape"]
        simulated = simulation(feature_map, real, asked.quick)
    result = priced(simulated, feature_map, prices)
    out: Path | None = asked.out or (None if asked.quick else kept)
    if out:
        out.write_text(to_text(result))
        if out == kept:
            from tests.bench.pictures import save

            save(picture, result, RESULTS / "scale.svg")
            page = DOCS / "scale.md"
            page.write_text(fill(page.read_text(), tables(result)))
    print(to_text(result) if asked.json else "\n\n".join(f"{name}\n\n{table}" for name, table in tables(result).items()))


if __name__ == "__main__":
    main()
