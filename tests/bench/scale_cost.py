"""What a query costs at sizes that nobody has run: a model of measured steps, applied to the plan of each way of searching.

Every number comes from docs/results: CPU of encrypted matching from matching.json, what a call adds from market.json, what a release
occupies from market-load.json.  The model is checked against the cells that it was fitted on, and against one that it was not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from protocol.catalogue import ROW
from protocol.encryption import MAX_DIMENSION, MAX_ROWS, SEED_BYTES, STD128, MatchPlan

CARD_BYTES = 45  # of a catalogue, beside its row: as nodes/query.py counts them
HIDDEN_BABY, HIDDEN_GIANT = 128, STD128.slots // 128  # steps through a ciphertext that is full of coordinates
FILL = 0.8  # of a tile's places that balanced clusters use
MEGABYTE = 1e6


class Steps(NamedTuple):
    """What an evaluation does, and moves."""

    ciphertexts: int  # that come in
    rotations: int
    products: int
    tiles: int  # that go out
    up_bytes: int
    down_bytes: int
    index_bytes: int  # of the encoded rows that it reads

    def times(self, count: int) -> Steps:
        """Return so many of it, one after the other."""
        return Steps(*(count * number for number in self))


@dataclass(frozen=True)
class CostModel:
    """CPU milliseconds: of a query, a rotation, a product, a tile; and what transport and signature add."""

    query: float
    rotation: float
    product: float
    tile: float
    megabyte: float  # of what a market sends and receives
    worst: float  # relative error over the cells that it was fitted on

    def cpu_ms(self, steps: Steps) -> float:
        """Return the CPU of an evaluation."""
        return self.query * steps.ciphertexts + self.rotation * steps.rotations + self.product * steps.products + self.tile * steps.tiles

    def market_cpu_ms(self, steps: Steps) -> float:
        """Return the CPU of a call, transport included."""
        return self.cpu_ms(steps) + self.megabyte * (steps.up_bytes + steps.down_bytes) / MEGABYTE


def steps_of(plan: MatchPlan) -> Steps:
    """Return what a plan does."""
    memory = 8 * plan.parameters.degree * plan.products
    return Steps(1, plan.rotations, plan.products, plan.tiles, plan.parameters.query_bytes, plan.answer_bytes, memory)


def fit(matching: Mapping[str, Any], market: Mapping[str, Any]) -> tuple[CostModel, float]:
    """Return the model, by least squares of the relative error, and modelled over measured CPU of the market that it was not fitted on."""
    cells = [cell for cell in matching["cells"] if cell["preset"] == STD128.name]
    rows = [[1, cell["plan"]["rotations"], cell["plan"]["products"], cell["plan"]["tiles"]] for cell in cells]
    measured = np.array([cell["whole"]["cpu_ms"] for cell in cells])
    weights, _ = nnls(np.array(rows) / measured[:, None], np.ones(len(cells)))
    worst = float(np.abs(np.array(rows) @ weights / measured - 1).max())
    query = market["queries"]
    moved = (query["bytes_up"] + query["bytes_down"]) / MEGABYTE
    # All of it counted by the byte: the larger estimate for large answers.
    model = CostModel(*map(float, weights), (query["market_cpu_ms_each"] - query["evaluation_cpu_ms"]) / moved, worst)
    return model, model.cpu_ms(steps_of(MatchPlan.build(query["releases"], query["dimension"]))) / query["evaluation_cpu_ms"]


# Ways of searching ----------------------------------------------------------------------------------------------------------


def exact(releases: int, dimension: int) -> Steps:
    """Return an encrypted scan of everything; beyond MAX_ROWS in several indexes, each of which gets the same query."""
    parts = -(-releases // MAX_ROWS)
    one = steps_of(MatchPlan.build(-(-releases // parts), dimension))
    return one.times(parts)._replace(up_bytes=one.up_bytes)


def tile_rows(dimension: int) -> int:
    """Return how many rows a full tile holds."""
    return MatchPlan.build(MAX_ROWS, dimension).rows_per_tile


def tile_clusters(releases: int, dimension: int) -> int:
    """Return how many clusters of one tile each a catalogue needs: a smaller cluster would cost as much."""
    return max(-(-releases // int(FILL * tile_rows(dimension))), 1)


def in_clear(probed: int, dimension: int) -> Steps:
    """Return a scan of so many clusters of one tile, which the querier names."""
    return exact(probed * tile_rows(dimension), dimension)


def hidden(releases: int, clusters: int, dimension: int, probes: int = 1) -> Steps:
    """Return a scan of one cluster, whose number is hidden, for each of the probes.

    The querier encrypts a vector of clusters * dimension coordinates: its own in the place of its cluster, zero elsewhere.  The market
    multiplies every row with its cluster's part and adds over the clusters: an answer of one cluster's size, whichever it was.
    Source: Henzinger and others 2023 (Tiptoe), on the packing of docs/protocol.md 7.  All rows are read; only bytes are saved.
    Up to MAX_DIMENSION coordinates it is a plan of today; beyond, several ciphertexts with as many coordinates as slots.
    """
    rows = math.ceil(releases / clusters / FILL)
    if clusters * dimension <= MAX_DIMENSION and rows <= MAX_ROWS:
        today = steps_of(MatchPlan.build(rows, clusters * dimension))
        return today.times(probes)._replace(index_bytes=today.index_bytes)
    ciphertexts = -(-clusters * dimension // STD128.slots)
    tiles = -(-rows // (2 * STD128.slots))
    products = ciphertexts * HIDDEN_BABY * HIDDEN_GIANT * tiles
    rotations = ciphertexts * (HIDDEN_BABY - 1) + tiles * (HIDDEN_GIANT - 1)
    one_more = STD128.degree // 8 * STD128.data_bits + SEED_BYTES
    up = STD128.query_bytes + (ciphertexts - 1) * one_more
    one = Steps(ciphertexts, rotations, products, tiles, up, tiles * STD128.tile_bytes, 8 * STD128.degree * products)
    keys = STD128.query_bytes - one_more
    return one.times(probes)._replace(up_bytes=keys + probes * (up - keys), index_bytes=one.index_bytes)


def interleaved_rows(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a hidden probe is multiplied with, (R, K D), from clusters of R rows each, (K, R, D).

    Row r holds the r-th of every cluster, one beside the other: the index of today, of K D coordinates, answers hidden probes of it.
    """
    clusters, rows, dimension = means.shape
    return means.transpose(1, 0, 2).reshape(rows, clusters * dimension)


def hidden_clusters(releases: int, dimension: int) -> int:
    """Return the number of clusters at which a hidden probe moves the fewest bytes."""
    candidates = sorted({max(round(2 ** (exponent / 4)), 1) for exponent in range(4 * 16)})

    def moved(clusters: int) -> int:
        steps = hidden(releases, clusters, dimension)
        return steps.up_bytes + steps.down_bytes

    return min((clusters for clusters in candidates if clusters <= releases), key=moved)


def catalogue_bytes(releases: int) -> int:
    """Return what a querier that comes for the first time syncs before it can rank: public scalars and cards of everything."""
    return releases * (ROW.itemsize + CARD_BYTES)


# Money ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prices:
    """What things cost, as parameters: nobody's list, and no date's."""

    core_hour: float = 0.03
    gigabyte_of_memory_hour: float = 0.004
    gigabyte_out: float = 0.03
    busy: float = 0.6  # share of a core's time that a service can use before calls wait
    core_memory_gb: float = 4.0  # that comes with a core
    accelerator_hour: float = 2.5
    accelerator_memory_gb: float = 80.0
    accelerator_tb_a_second: float = 2.0  # of its memory that a kernel reads in practice

    def month(self, cores: float, memory_gb: float, out_bytes_a_query: float, queries_a_second: float) -> dict[str, float]:
        """Return what a month of 730 hours costs, and of what."""
        more = max(memory_gb - cores * self.core_memory_gb, 0.0)
        parts = {
            "cores": 730 * self.core_hour * cores,
            "memory": 730 * self.gigabyte_of_memory_hour * more,
            "bytes out": self.gigabyte_out * out_bytes_a_query * queries_a_second * 730 * 3600 / 1e9,
        }
        return {**parts, "whole": sum(parts.values())}


def service(model: CostModel, steps: Steps, index_bytes: float, queries_a_second: float, prices: Prices) -> dict[str, float]:
    """Return cores, memory, bytes and money of a service that answers so many queries a second."""
    milliseconds = model.market_cpu_ms(steps)
    cores = max(queries_a_second * milliseconds / 1e3 / prices.busy, 0.0)
    # One copy of the index in memory, however many cores read it: machines of its size, each with a part of the tiles.
    memory_gb = index_bytes / 1e9
    money = prices.month(cores, memory_gb, steps.down_bytes, queries_a_second)
    return {
        "cpu_ms": round(milliseconds, 2), "up_kb": round(steps.up_bytes / 1e3, 1), "down_kb": round(steps.down_bytes / 1e3, 1),
        "cores": round(cores, 2), "index_gb": round(memory_gb, 3),
        "gbit_a_second_out": round(8e-9 * steps.down_bytes * queries_a_second, 3),
        **{f"month_{name.replace(' ', '_')}": round(value, 2) for name, value in money.items()},
    }  # fmt: skip


def on_accelerators(steps: Steps, index_bytes: float, queries_a_second: float, prices: Prices) -> dict[str, float]:
    """Return what accelerators would take if a pass took as long as reading the index: a bound by memory, measured by nobody here.

    One query a pass; a kernel that answers several in one reads less for each.
    """
    pass_ms = steps.index_bytes / (prices.accelerator_tb_a_second * 1e12) * 1e3
    for_memory = math.ceil(index_bytes / 1e9 / prices.accelerator_memory_gb)
    count = max(for_memory, math.ceil(queries_a_second * pass_ms / 1e3 / prices.busy))
    return {"pass_ms": round(pass_ms, 3), "accelerators": count, "month": round(730 * prices.accelerator_hour * count, 2)}
