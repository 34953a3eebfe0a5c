"""How much the audits show, and what a specification without noise gives away: docs/results/audit.json and its picture.

    python -m tests.bench.audit [--data DIR] [--base DIR] [--only training]

About ten CPU minutes: real tasks, the default SLM, the product's own mechanisms and noise.  --only keeps the other figures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import platformdirs

from nodes.audit.bounds import epsilon_of
from nodes.audit.membership import attack_ours, attack_reduced_set, ceiling
from nodes.audit.profile import profile_of
from nodes.audit.specification import audit_specification
from nodes.audit.training import audit_training, by_coin, check_of, membership, power_of
from nodes.base_model import BaseModel
from nodes.finetune import Recipe, finetune
from nodes.guard import map_alone
from nodes.private_noise import normals
from nodes.private_training import PrivateRecipe
from nodes.records import read_records
from protocol.features import default_map
from protocol.privacy import Guarantee, PrivateTraining
from tests.bench.pictures import BLUE, GREY, RED, SETTINGS

TASKS = ("finance-banking77", "math-gsm8k", "health-medquad-rare", "legal-policyqa")
SIZES = (60, 120, 250)
CLAIMS = ((1.0, 500), (1.0, 2_000), (1.0, 12_000), (4.0, 500), (4.0, 6_000), (8.0, 6_000))
DELTA = 1e-6
CANARIES, AUDITED = 4_000, 300  # of the audit of a training: canaries, and records of which a coin each takes half


def shown() -> list[dict[str, float]]:
    rows = []
    for epsilon, releases in CLAIMS:
        start = time.process_time()
        audit = audit_specification(Guarantee(epsilon, DELTA), default_map().dimension, releases)
        rows.append(
            {
                "epsilon": epsilon, "releases": releases,
                "lower_bound": round(audit.epsilon_lower_bound, 4), "ratio": round(audit.ratio, 4),
                "expected": round(audit.expected_lower_bound, 4),
                "cpu_seconds": round(time.process_time() - start, 2),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def training(data: Path, base: Path) -> dict[str, object]:
    """Audit the training of adapters: honest, with less noise than claimed, and without a guarantee."""
    model, recipe = BaseModel.open(base), PrivateRecipe(Guarantee(3.0, DELTA))
    power = power_of(PrivateTraining(recipe.guarantee, recipe.event), CANARIES)
    records = read_records(data / TASKS[0] / "train.jsonl", AUDITED)
    states = model.prefix_pass(records, model.layers - recipe.layers)[1]
    rows = []
    for noise in (1.0, 0.8, 0.5):
        start, began = time.process_time(), time.monotonic()
        audit = audit_training(model, states, recipe, power, draw=lambda count, noise=noise: noise * normals(count))
        assert audit.membership is not None
        rows.append(
            {
                "noise": noise, "lower_bound": round(audit.epsilon_lower_bound, 4), "one_run_lower_bound": round(audit.one_run_epsilon, 4),
                "largest_multiplier": round(audit.largest_multiplier, 4), "false_positives": round(audit.false_positives, 4),
                "true_positives": round(audit.true_positives, 4), "auc": round(audit.membership.auc, 4),
                "auc_error": round(audit.membership.error, 4),
                "failed": [check.name for check in audit.checks if not check.holds],
                "cpu_seconds": round(time.process_time() - start, 1), "seconds": round(time.monotonic() - began, 1),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    return {
        "epsilon": 3.0, "delta": DELTA, "task": TASKS[0], "records": len(records), "canaries": CANARIES,
        "noise_multiplier": recipe.event.multiplier, "power_against_half": power.against_half, "expected": round(power.expected, 4),
        "rows": rows, "unprotected": [unprotected(model, data, task) for task in TASKS[:2]],
        "auc_allowed": round(profile_of(recipe.event).auc, 4),
    }  # fmt: skip


def unprotected(model: BaseModel, data: Path, task: str) -> dict[str, object]:
    """Train without a guarantee on the half that coins choose, and tell it from the other half by losses."""
    inside, outside = by_coin(model.prefix_pass(read_records(data / task / "train.jsonl", AUDITED), model.split)[1])
    attack = membership(finetune(model, inside.records, Recipe()), model, inside, outside)
    assert attack is not None
    row = {"task": task, **asdict(attack), "flagged": not check_of(attack, None).holds}
    print(row, flush=True)
    return row


def attacks(data: Path, base: Path) -> list[dict[str, object]]:
    model, feature_map, guarantee = BaseModel.open(base), default_map(), Guarantee(1.0, DELTA)
    rows: list[dict[str, object]] = []
    for task in TASKS:
        inside, outside = (
            map_alone(feature_map, model.embed_alone(read_records(data / task / name, limit), layer=feature_map.layer))
            for name, limit in (("train.jsonl", max(SIZES)), ("test.jsonl", 200))
        )
        for n in SIZES:
            if len(inside) < n:
                continue
            reduced, copies = attack_reduced_set(inside[:n], outside)
            ours = attack_ours(inside[:n], outside, guarantee, 4_000)
            rows.append({"task": task, "n": n, "reduced_set": asdict(reduced), "points_that_are_a_record": copies, "ours": asdict(ours)})
            print(rows[-1], flush=True)
    return rows


def draw(rows: list[dict], limit: float, path: Path) -> None:
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7, 4))
        for key, colour, marker, label in (("reduced_set", RED, "s", "reduced set, no noise"), ("ours", BLUE, "o", "ours, epsilon 1")):
            for at, n in enumerate(SIZES):
                values = [row[key]["auc"] for row in rows if row["n"] == n]
                axes.plot([at] * len(values), values, color=colour, marker=marker, linestyle="", label=label if at == 0 else None)
        axes.axhline(limit, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            "the most that epsilon 1 allows", (2.45, limit), color=GREY, ha="right", va="bottom", xytext=(0, 3), textcoords="offset points"
        )
        axes.set_xticks(range(len(SIZES)), [f"n = {n}" for n in SIZES])
        axes.set(ylim=(0.48, 1.02), xlim=(-0.5, 2.5), ylabel="AUC of the membership attack", title="Was this record in?  One point a task")
        axes.legend(loc="center right")
        figure.savefig(path, transparent=True, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=platformdirs.user_data_path("veilmart") / "models" / "smollm2-135m")
    parser.add_argument("--only", choices=("training",))
    arguments = parser.parse_args()
    folder = Path(__file__).parents[2] / "docs" / "results"
    if arguments.only == "training":
        kept = json.loads((folder / "audit.json").read_text())
        kept["training"] = training(arguments.data, arguments.base)
        (folder / "audit.json").write_text(json.dumps(kept, indent=1) + "\n")
        return
    limit = ceiling(Guarantee(1.0, DELTA))
    result = {
        "schema": "veilmart.bench-audit/1", "command": "python -m tests.bench.audit", "delta": DELTA, "confidence": 0.999,
        "map": default_map().name,
        "largest_ratio": round(epsilon_of(limit.mu * 4096 / 17_825_792**0.5, DELTA), 4), 
        "specification": shown(), "ceiling": {"auc": limit.auc, "true_positives": limit.true_positives(0.01)},
        "membership": attacks(arguments.data, arguments.base), "training": training(arguments.data, arguments.base),
    }  # fmt: skip
    (folder / "audit.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result["membership"], limit.auc, folder / "audit-membership.svg")


if __name__ == "__main__":
    main()
