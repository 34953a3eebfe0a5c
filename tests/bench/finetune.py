"""What training costs and reaches: one pass against LoRA on all layers, and with a guarantee against without.

    python -m tests.bench.finetune [--quick] [--json] [--data DIR] [--base DIR] [--parts NAME...] [--out FILE] [--resume]

1. `one_pass`: the product's training, specification pass included, against LoRA (peft) on all layers with the same recipe, tokens, dtype
   and logits of the response only.  Interleaved, one task after the other; CPU seconds and held-out loss.
2. `private`: held-out gain in nats a token at epsilon 8, 3, 1 and without a guarantee, from 1 500 records of each task.
3. `step`: CPU seconds of a DP-SGD step against one without clipping and noise over the same records, interleaved.
4. `tasks`: 250 records of every task there is, no guarantee: the specialist against the base model on its own task.

Held-out records are the first of test.jsonl.  Noise is the operating system's, so two runs differ.  Results of the parts that ran replace
those of the same parts in --out; docs/results/finetune.json is such a file.  --resume keeps the tasks that are there already.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import platformdirs

from nodes.activations import cached_pass
from nodes.adapter import sharing_weights
from nodes.base_model import SPLIT_LAYER, Activations, BaseModel, Encoded
from nodes.finetune import Recipe, batches_of, finetune, held_out_loss
from nodes.private_training import PrivateRecipe, finetune_privately
from nodes.records import read_records
from protocol.privacy import Guarantee

SCHEMA = "veilmart.bench.finetune/1"
# Labels, formulas and prose: what six layers can learn differs by kind.
ONE_PASS = (
    "health-medquad-rare", "science-tldr", "finance-banking77", "math-gsm8k", "code-sql-wikisql",
    "health-pubmed-conclusion", "legal-policyqa", "health-dialog-notes", "service-kitchen", "health-medquad-genetics",
    "health-medquad-cancer", "math-competition", "math-aqua",
)  # fmt: skip
PRIVATE = ("finance-news-sentiment", "science-scicite", "science-relations", "travel-restaurant")
EPSILONS = (8.0, 3.0, 1.0)
DELTA = 1e-6
# Of both ways.  Half the product's rate, which is better over three epochs of few records, for six layers (math-gsm8k: 1.32 against 1.38)
# and for all (two tasks that are not in the table).
ONE_PASS_RECIPE = Recipe(epochs=3, max_steps=1000, learning_rate=2e-3)
Row = dict[str, Any]


def say(what: str) -> None:
    """Tell a person how far the run is."""
    sys.stderr.write(f"{time.process_time():7.0f} CPU s  {what}\n")
    sys.stderr.flush()


class PlainLora:
    """LoRA as peft's own documentation has it: on every linear module of all layers, whole batches through the whole model.

    Tokens, dtype and loss are the product's; logits are computed where a response token is predicted and nowhere else.
    """

    def __init__(self, model: BaseModel, recipe: Recipe) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = get_peft_model(
            sharing_weights(model.upper_layers(0, model.dtype)),
            LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"),
        )

    def nats(self, part: Sequence[Encoded]) -> Any:
        """Return the summed loss over the response tokens of a batch, padded to its longest."""
        import torch
        import torch.nn.functional as F

        longest = max(len(one.tokens) for one in part)
        tokens = torch.tensor([[*one.tokens, *[0] * (longest - len(one.tokens))] for one in part])
        mask = torch.tensor([[1] * len(one.tokens) + [0] * (longest - len(one.tokens)) for one in part])
        causal = self.model.base_model.model
        states = causal.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = torch.cat([states[row, one.response_start - 1 : len(one.tokens) - 1] for row, one in enumerate(part)])
        targets = torch.tensor([token for one in part for token in one.tokens[one.response_start :]])
        return F.cross_entropy(causal.lm_head(wanted).float(), targets, reduction="sum")

    def train(self, records: Sequence[Encoded]) -> None:
        """Train on records as the recipe says."""
        import torch

        usable = [one for one in records if one.has_response]
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        optimiser = torch.optim.AdamW(weights, lr=self.recipe.learning_rate, weight_decay=0.0)
        batches = batches_of(len(usable), self.recipe)
        self.model.train()
        for step, rows in enumerate(batches):
            part = [usable[i] for i in rows]
            optimiser.zero_grad()
            (self.nats(part) / _responses(part)).backward()
            torch.nn.utils.clip_grad_norm_(weights, self.recipe.clip)
            optimiser.param_groups[0]["lr"] = self.recipe.learning_rate * (1 - step / len(batches))
            optimiser.step()
        self.model.eval()

    def loss(self, records: Sequence[Encoded]) -> float:
        """Return the mean loss in nats per response token."""
        import torch

        with torch.no_grad():
            return sum(float(self.nats([one])) for one in records) / _responses(records)

    def base_loss(self, records: Sequence[Encoded]) -> float:
        """Return the loss without the adapter."""
        with self.model.disable_adapter():
            return self.loss(records)


def _responses(records: Sequence[Encoded]) -> int:
    return sum(len(one.tokens) - one.response_start for one in records)


class Bench:
    """A base model and the folder of real tasks."""

    def __init__(self, model: BaseModel, data: Path) -> None:
        self.model, self.data = model, data

    def states(self, task: str, part: str, count: int, split: int) -> list[Activations]:
        """Return cached states of a task's records."""
        records = read_records(self.data / task / f"{part}.jsonl", count)
        return self.model.prefix_pass_batched(records, split, layer=min(6, split - 1) or 1)[1]

    def one_pass(self, task: str, records: int, tested: int, recipe: Recipe) -> Row:
        """Train both ways and compare."""
        test = self.states(task, "test", tested, SPLIT_LAYER)
        base = held_out_loss(self.model, None, test)
        own = read_records(self.data / task / "train.jsonl", records)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            _, activations = cached_pass(self.model, own, SPLIT_LAYER, 6, Path(folder))
        adapter = finetune(self.model, activations, recipe)
        one_pass = time.process_time() - began
        loss = held_out_loss(self.model, adapter, test)
        plain = PlainLora(self.model, recipe)
        began = time.process_time()
        plain.train([self.model.encode(record) for record in own])
        cpu_plain = time.process_time() - began
        encoded = [one.encoded for one in test]
        # Both ways of computing a loss agree on the base model, or the comparison means nothing.
        if abs(plain.base_loss(encoded) / base - 1) > 0.005:
            raise AssertionError("the two losses of the base model differ")
        other = plain.loss(encoded)
        return {
            "task": task, "records": len(own), "base": base, "one_pass": loss, "all_layers": other, "cpu_one_pass": one_pass,
            "cpu_all_layers": cpu_plain, "cpu_ratio": cpu_plain / one_pass, "loss_ratio": loss / other,
        }  # fmt: skip

    def private(self, task: str, records: int, tested: int, epsilons: tuple[float, ...]) -> list[Row]:
        """Train with and without a guarantee; the gain without is that of the same layers and of the default recipe, whichever is more."""
        recipe = PrivateRecipe(Guarantee(8.0, DELTA))
        split = self.model.layers - recipe.layers
        train, test = self.states(task, "train", records, split), self.states(task, "test", tested, split)
        base = held_out_loss(self.model, None, test)
        began = time.process_time()
        best = base - held_out_loss(self.model, finetune(self.model, train, Recipe(max_steps=192)), test)
        usual, usual_test = self.states(task, "train", records, SPLIT_LAYER), self.states(task, "test", tested, SPLIT_LAYER)
        best = max(best, base - held_out_loss(self.model, finetune(self.model, usual, Recipe()), usual_test))
        rows: list[Row] = [
            {"task": task, "records": len(train), "epsilon": None, "base": base, "gain": best, "cpu": time.process_time() - began}
        ]
        say(f"{task}, no guarantee: gain {best:.3f}")
        for epsilon in epsilons:
            private = replace(recipe, guarantee=Guarantee(epsilon, DELTA))
            began = time.process_time()
            gain = base - held_out_loss(self.model, finetune_privately(self.model, train, private), test)
            cpu = time.process_time() - began
            rows.append({
                "task": task, "records": len(train), "epsilon": epsilon, "base": base, "gain": gain, "share_of_gain": gain / best,
                "multiplier": private.event.multiplier, "rate": private.rate, "steps": private.steps, "cpu": cpu,
            })  # fmt: skip
            say(f"{task}, epsilon {epsilon:g}: {gain / best:.0%} of the gain")
        return rows

    def step(self, task: str, records: int, rounds: int) -> Row:
        """Time whole trainings of one step over the same records with the same trained weights, one way after the other."""
        recipe = replace(PrivateRecipe(Guarantee(8.0, DELTA)), rate=1.0, steps=1)
        train = self.states(task, "train", records, self.model.layers - recipe.layers)
        private, plain = [], []
        finetune_privately(self.model, train[:2], recipe)  # imports, and the multiplier
        for _ in range(rounds):
            began = time.process_time()
            finetune_privately(self.model, train, recipe)
            private.append(time.process_time() - began)
            began = time.process_time()
            finetune(self.model, train, Recipe(rank=recipe.rank, batch=len(train), epochs=1, max_steps=1))
            plain.append(time.process_time() - began)
        return {
            "task": task, "records": len(train), "cpu_private": private, "cpu_plain": plain,
            "ratio_of_medians": _middle(private) / _middle(plain),
        }  # fmt: skip

    def specialist(self, task: str, records: int, tested: int) -> Row:
        """Train without a guarantee as an owner would, and test on the task itself."""
        own = read_records(self.data / task / "train.jsonl", records)
        test = self.states(task, "test", tested, SPLIT_LAYER)
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            _, activations = cached_pass(self.model, own, SPLIT_LAYER, 6, Path(folder))
        adapter = finetune(self.model, activations, Recipe())
        cpu = time.process_time() - began
        return {
            "task": task, "records": len(own), "cpu": cpu, "base": held_out_loss(self.model, None, test),
            "specialist": held_out_loss(self.model, adapter, test),
        }  # fmt: skip


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(bench: Bench, parts: list[str], quick: bool, keep: Any, known: Callable[[str], list[Row]]) -> None:
    """Run the parts and hand on the result of each as soon as it is there; tasks of which `known` has rows are not run again."""
    records, tested = (24, 16) if quick else (96, 64)
    if "step" in parts:
        keep("step", bench.step(PRIVATE[0], 16 if quick else 64, 3 if quick else 7))
        say("step")
    if "one_pass" in parts:
        rows = known("one_pass")
        for task in _missing(rows, ONE_PASS[: 4 if quick else None]):
            rows.append(bench.one_pass(task, records, tested, ONE_PASS_RECIPE))
            keep("one_pass", rows)
            say(f"{task}: {rows[-1]['cpu_ratio']:.2f} times less CPU, loss {rows[-1]['loss_ratio']:.3f} of all layers'")
    if "private" in parts:
        rows = known("private")
        for task in _missing(rows, PRIVATE):
            rows += bench.private(task, 1500, 32 if quick else 64, EPSILONS[:1] if quick else EPSILONS)
            keep("private", rows)  # all of a task or nothing
    if "tasks" in parts:
        rows = known("tasks")
        for task in _missing(rows, sorted(path.name for path in bench.data.iterdir() if path.is_dir())):
            rows.append(bench.specialist(task, 50 if quick else 250, 16 if quick else 32))
            keep("tasks", rows)
            say(f"{task}: {rows[-1]['base']:.3f} to {rows[-1]['specialist']:.3f}, {rows[-1]['cpu']:.0f} CPU s")


def _missing(rows: list[Row], tasks: Sequence[str]) -> list[str]:
    there = {row["task"] for row in rows}
    return [task for task in tasks if task not in there]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("VEILMART_DATA", "../shared/data")))
    parser.add_argument("--base", type=Path, default=platformdirs.user_data_path("veilmart") / "models" / "smollm2-135m")
    parser.add_argument("--parts", nargs="+", default=["step", "one_pass", "private", "tasks"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.stderr.write(f"needs {options.data}: real task data not present\n")
        return 2
    result: Row = json.loads(options.out.read_text()) if options.out and options.out.is_file() else {"schema": SCHEMA}

    def keep(name: str, value: Any) -> None:
        result[name] = {"quick": options.quick, "rows": value}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    def known(name: str) -> list[Row]:
        part = result.get(name, {})
        return list(part["rows"]) if options.resume and part.get("quick") == options.quick else []

    measure(Bench(BaseModel.open(options.base), options.data), options.parts, options.quick, keep, known)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
