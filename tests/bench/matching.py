"""What an encrypted query costs, next to the same products in the clear and next to what others do on ciphertext.

    python tests/bench/matching.py [--quick] [--json] [--out FILE]

One process, numpy pinned to one thread, all ways of computing interleaved, medians of CPU time.  A query is whole: parsing, expansion of
its seeds, evaluation, truncation and packing.  "cold" is the first query after the index was built, kernels compiled; "warm" the median.
The SEAL evaluator makes the same rotations and products as the plan, on at most 64 different plaintexts, one tile after the other.
TenSEAL's `mm` has its own packing.  The peer's search (package `learnware`, plaintext RKME) is run where it is installed.
About 4 minutes and 12 GB at full size; cells that do not fit the free memory are left out and named.
"""

from __future__ import annotations

import os

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_variable] = "1"  # before numpy is loaded: its threads would flatter every ratio

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from protocol.encryption import PQ_STRICT, STD128, EncryptedQuery, MatchPlan, Parameters, QueryKey
from protocol.evaluation import EncodedIndex, evaluate, evaluate_many

ROWS, DIMENSIONS = (100, 1_000, 10_000, 100_000, 1_000_000), (64, 128, 512)
QUICK_ROWS, QUICK_DIMENSIONS = (100, 1_000, 10_000), (64, 512)
FLAGS = ("avx2", "fma", "avx512f", "avx512dq", "avx512ifma", "asimd")
TOGETHER = 4  # queries in one pass
# Memory of a cell in bytes for each coordinate of a catalogue: rows as float64 and float32, tiles, and a part of the rows again.
BYTES_A_COORDINATE = 26

COMPILE = """
import time, numpy as np
from protocol.encryption import EncryptedQuery, MatchPlan
from protocol.evaluation import EncodedIndex, evaluate
started = time.process_time()
plan = MatchPlan.build(2, 64)
evaluate(EncodedIndex.build(np.eye(64)[:2], plan), EncryptedQuery.from_bytes(bytes(plan.parameters.query_bytes), plan))
print(time.process_time() - started)
"""


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Return CPU and wall milliseconds of one call."""
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    work()
    return (time.process_time_ns() - cpu) / 1e6, (time.perf_counter_ns() - wall) / 1e6


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Return the median CPU and wall milliseconds of each way, taken in turns."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            seen[name].append(timed(work))
    return {
        name: {"cpu_ms": _short(statistics.median(c for c, _ in times)), "wall_ms": _short(statistics.median(w for _, w in times))}
        for name, times in seen.items()
    }


def _short(number: float) -> float:
    return float(f"{number:.3g}")


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo")


def unit_rows(rows: int, dimension: int, seed: int) -> np.ndarray:
    matrix = np.random.default_rng(seed).standard_normal((rows, dimension), dtype=np.float32).astype(np.float64)
    matrix /= np.sqrt(np.einsum("ij,ij->i", matrix, matrix))[:, None]
    return matrix


def split(plan: MatchPlan, index: EncodedIndex, data: bytes, repeats: int) -> dict[str, float]:
    """Return the CPU milliseconds of the parts of a query: parsing, seeds, baby steps, truncation and packing, and the rest."""
    from protocol.encryption import EncryptedScores
    from protocol.evaluation import baby_steps
    from protocol.hazmat.ring import field, truncate

    parameters = plan.parameters
    query = EncryptedQuery.from_bytes(data, plan)
    opened = query.opened()
    coefficients = EncryptedScores.from_bytes(evaluate(index, query).to_bytes(), plan).coefficients()
    coefficients >>= np.array(parameters.drops, np.uint64)[:, None]
    ciphertext, out = opened.ciphertext, np.empty((2, parameters.degree), np.uint64)
    tables = field(parameters.degree, parameters.data_prime)

    def truncate_all() -> None:
        for _ in range(plan.tiles):
            truncate(ciphertext, tables, parameters.drops, parameters.data_bits, out)
        EncryptedScores.pack(plan, coefficients)

    parts = interleaved(
        {
            "parsing": lambda: EncryptedQuery.from_bytes(data, plan),
            "seeds": query.opened,
            "baby steps": lambda: baby_steps(plan, [opened]),
            "truncation": truncate_all,
            "whole": lambda: evaluate(index, EncryptedQuery.from_bytes(data, plan)),
        },
        repeats,
    )
    cpu = {name: part["cpu_ms"] for name, part in parts.items()}
    rest = cpu["whole"] - cpu["parsing"] - cpu["seeds"] - cpu["baby steps"] - cpu["truncation"]
    return {**{name: cpu[name] for name in ("parsing", "seeds", "baby steps")}, "tiles": _short(rest), "truncation": cpu["truncation"]}


def seal_evaluator(plan: MatchPlan, slots: np.ndarray) -> Callable[[], None]:
    """Return SEAL's evaluation of one query under the plan, through tenseal.sealapi; the products' plaintexts are recycled."""
    from tenseal import sealapi

    from protocol.hazmat.seal import SealKey

    parameters = plan.parameters
    key = SealKey(parameters.degree, (parameters.data_prime, parameters.special_prime))
    keys, query, evaluator = sealapi.GaloisKeys(), sealapi.Ciphertext(), sealapi.Evaluator(key._context)
    key._generator.create_galois_keys(list(plan.galois_elements), keys)
    key._encryptor.encrypt_symmetric(key._encoded(slots, parameters.query_scale), query)
    rng = np.random.default_rng(0)
    plains = [key._encoded(rng.standard_normal(parameters.slots), parameters.row_scale) for _ in range(min(64, plan.diagonals))]

    def run() -> None:
        steps = [query]
        for _ in range(plan.baby - 1):
            rotated = sealapi.Ciphertext()
            evaluator.rotate_vector(steps[-1], 1, keys, rotated)
            steps.append(rotated)
        product = sealapi.Ciphertext()
        for _ in range(plan.tiles):
            total = None
            for g in range(plan.giant):
                part = sealapi.Ciphertext()
                for b, step in enumerate(steps):
                    target = part if b == 0 else product
                    evaluator.multiply_plain(step, plains[(g * plan.baby + b) % len(plains)], target)
                    if b:
                        evaluator.add_inplace(part, product)
                if total is None:
                    total = part
                else:
                    rotated = sealapi.Ciphertext()
                    evaluator.rotate_vector(total, plan.baby, keys, rotated)
                    evaluator.add_inplace(rotated, part)
                    total = rotated

    return run


def tenseal_products(matrix: np.ndarray, query: np.ndarray, degree: int, bits: list[int], scale: float) -> Callable[[], None]:
    """Return TenSEAL's `CKKSVector.mm` of the query with all rows."""
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, degree, -1, bits)
    context.global_scale = scale
    context.generate_galois_keys()
    encrypted, columns = tenseal.ckks_vector(context, query.tolist()), matrix.T.tolist()
    return lambda: encrypted.mm(columns)


def cell(rows: int, dimension: int, parameters: Parameters, repeats: int, beside_seal: bool) -> dict[str, Any]:
    """Return everything measured for one size of catalogue."""
    plan = MatchPlan.build(rows, dimension, parameters)
    matrix, query = unit_rows(rows, dimension, 1), unit_rows(1, dimension, 2)[0]
    built: list[EncodedIndex] = []
    index_cpu, _ = timed(lambda: built.append(EncodedIndex.build(matrix, plan)))
    index = built[0]
    key = QueryKey.fresh(plan)
    data = key.encrypt(query).to_bytes()
    answers: list[bytes] = []

    def whole(threads: int = 1) -> None:
        answers[:] = [evaluate(index, EncryptedQuery.from_bytes(data, plan), threads).to_bytes()]

    cold_cpu, cold_wall = timed(whole)
    single, single_query = matrix.astype(np.float32), query.astype(np.float32)
    several = [
        EncryptedQuery.from_bytes(QueryKey.fresh(plan).encrypt(unit_rows(1, dimension, 3 + i)[0]).to_bytes(), plan) for i in range(TOGETHER)
    ]
    ways: dict[str, Callable[[], Any]] = {
        "whole": whole,
        "numpy float32": lambda: single @ single_query,
        "whole, 2 threads": lambda: whole(2),
        f"{TOGETHER} queries together": lambda: evaluate_many(index, several),
    }
    if beside_seal:
        ways["SEAL evaluator"] = seal_evaluator(plan, plan.spread(query))
    times = interleaved(ways, repeats)
    together = times.pop(f"{TOGETHER} queries together")
    exact, decrypt = matrix @ query, []
    decrypt_cpu, _ = timed(lambda: decrypt.append(key.decrypt(answers[0], np.ones(rows))))
    error = np.abs(decrypt[0] - exact)
    ratio = times["whole"]["cpu_ms"] / times["numpy float32"]["cpu_ms"]
    return {
        "rows": rows, "dimension": dimension, "preset": parameters.name,
        "plan": {"groups": plan.groups, "baby": plan.baby, "giant": plan.giant, "tiles": plan.tiles,
                 "rotations": plan.rotations, "products": plan.products},
        "cold": {"cpu_ms": _short(cold_cpu), "wall_ms": _short(cold_wall)},
        **{name.replace(" ", "_").replace(",", ""): value for name, value in times.items()},
        "together_cpu_ms_a_query": _short(together["cpu_ms"] / TOGETHER),
        "ratio_to_numpy": _short(ratio),
        "parts_cpu_ms": split(plan, index, data, repeats),
        "index_cpu_ms": _short(index_cpu), "decrypt_cpu_ms": _short(decrypt_cpu),
        "bytes_up": len(data), "bytes_down": len(answers[0]), "bytes_down_a_score": _short(len(answers[0]) / rows),
        "tiles_mb": _short(sum(tile.diagonals.nbytes for tile in index.tiles) / 1e6),
        "rss_mb": _short(_resident_mb()),
        "error": {"rms": _short(float(np.sqrt((error**2).mean()))), "max": _short(float(error.max())),
                  "top1_agrees": bool(decrypt[0].argmax() == exact.argmax())},
    }  # fmt: skip


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def against_tenseal(repeats: int) -> dict[str, Any]:
    """Return our whole query and TenSEAL's `mm` at 1 000 x 512, in turns."""
    plan = MatchPlan.build(1_000, 512)
    matrix, query = unit_rows(1_000, 512, 1), unit_rows(1, 512, 2)[0]
    index, data = EncodedIndex.build(matrix, plan), QueryKey.fresh(plan).encrypt(query).to_bytes()
    ways = {
        "whole": lambda: evaluate(index, EncryptedQuery.from_bytes(data, plan)),
        "tenseal mm 8192": tenseal_products(matrix, query, 8192, [60, 40, 60], 2.0**40),
        "tenseal mm 4096": tenseal_products(matrix, query, 4096, [40, 29, 40], 2.0**29),
    }
    evaluate(index, EncryptedQuery.from_bytes(data, plan))
    times = interleaved(ways, repeats)
    ours = times["whole"]["cpu_ms"]
    return {**times, "ratios": {name: _short(times[name]["cpu_ms"] / ours) for name in ways if name != "whole"}}


def against_peer(repeats: int) -> dict[str, Any] | str:
    """Return our whole query and the peer's plaintext search of 1 000 specifications, in turns; or why not."""
    try:
        importlib.metadata.version("learnware")
    except importlib.metadata.PackageNotFoundError:
        return "the package learnware is not installed"
    from learnware.specification import RKMETableSpecification, generate_stat_spec  # type: ignore[import-not-found]

    rng = np.random.default_rng(0)

    def search(width: int) -> Callable[[], Any]:
        def reduced_set() -> RKMETableSpecification:
            return generate_stat_spec("table", rng.standard_normal((300, width)), cuda_idx=-1)  # its defaults, on a CPU

        made, wanted = [reduced_set() for _ in range(10)], reduced_set()
        specifications = [made[i % len(made)] for i in range(1_000)]  # a search takes the same time for equal ones
        return lambda: [specification.dist(wanted) for specification in specifications]

    plan = MatchPlan.build(1_000, 64)
    index = EncodedIndex.build(unit_rows(1_000, 64, 1), plan)
    data = QueryKey.fresh(plan).encrypt(unit_rows(1, 64, 2)[0]).to_bytes()
    ways = {
        "whole": lambda: evaluate(index, EncryptedQuery.from_bytes(data, plan)),
        "peer, its text embeddings (384)": search(384),
        "peer, our 64 coordinates": search(64),
    }
    times = interleaved(ways, repeats)
    ratios = {name: _short(time["cpu_ms"] / times["whole"]["cpu_ms"]) for name, time in times.items() if name != "whole"}
    return {**times, "ratios": ratios}


def compile_seconds() -> float:
    """Return the CPU seconds in which a fresh market compiles its kernels, nothing cached."""
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "NUMBA_CACHE_DIR": directory}
        done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=True)
    return _short(float(done.stdout))


def machine() -> dict[str, Any]:
    """Return what the figures depend on, without naming a machine."""
    cpuinfo = Path("/proc/cpuinfo")
    listed = cpuinfo.read_text().split() if cpuinfo.exists() else []
    packages = ("numpy", "numba", "llvmlite", "tenseal")
    return {
        "architecture": platform.machine(), "cores": os.cpu_count(), "flags": [flag for flag in FLAGS if flag in listed],
        "python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages},
    }  # fmt: skip


def main() -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 10 000 rows, few repeats")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    parser.add_argument("--peer", action="store_true", help="only the peer's row, into the file of --out: its package has other needs")
    arguments = parser.parse_args()
    if arguments.peer:
        if not arguments.out or not arguments.out.is_file():
            parser.error("--peer adds to a result: give its file with --out")
        known = json.loads(arguments.out.read_text()) | {"against_peer_1000": against_peer(5)}
        arguments.out.write_text(json.dumps(known, indent=1) + "\n")
        print(json.dumps(known["against_peer_1000"], indent=1))
        return
    sizes = [(n, d) for d in (QUICK_DIMENSIONS if arguments.quick else DIMENSIONS) for n in (QUICK_ROWS if arguments.quick else ROWS)]
    cells, left_out = [], []
    for rows, dimension in sizes:
        if rows * dimension * BYTES_A_COORDINATE > available_bytes():
            left_out.append([rows, dimension])
            continue
        repeats = 5 if arguments.quick else 25 if rows <= 10_000 else 9 if rows <= 100_000 else 5
        cells.append(cell(rows, dimension, STD128, repeats, beside_seal=rows * dimension <= 100_000 * 512))
        sys.stderr.write(f"{rows} x {dimension}: {cells[-1]['whole']['cpu_ms']} ms\n")
    cells += [
        cell(rows, 64, PQ_STRICT, 5, beside_seal=False) for rows in ((1_000, 10_000) if arguments.quick else (1_000, 10_000, 100_000))
    ]
    result = {
        "schema": "veilmart.bench.matching/1", "command": "python tests/bench/matching.py" + (" --quick" if arguments.quick else ""),
        "machine": machine(), "compile_cpu_s": compile_seconds(), "cells": cells, "left_out_for_memory": left_out,
        "against_tenseal_1000x512": against_tenseal(2 if arguments.quick else 5), "against_peer_1000": against_peer(3),
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print("preset\trows\tD\twhole ms\tcold\t2 threads wall\ttogether\tnumpy ms\tratio\tSEAL ms\trms\tmax")
    for c in cells:
        seal = c.get("SEAL_evaluator", {}).get("cpu_ms", "-")
        print(c["preset"], c["rows"], c["dimension"], c["whole"]["cpu_ms"], c["cold"]["cpu_ms"], c["whole_2_threads"]["wall_ms"],
              c["together_cpu_ms_a_query"], c["numpy_float32"]["cpu_ms"], c["ratio_to_numpy"], seal,
              c["error"]["rms"], c["error"]["max"], sep="\t")  # fmt: skip
    print("compile", result["compile_cpu_s"], "s;", "tenseal", result["against_tenseal_1000x512"], "; peer", result["against_peer_1000"])


if __name__ == "__main__":
    main()
