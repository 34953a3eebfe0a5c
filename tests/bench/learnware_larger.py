"""A larger frozen model beside the chosen specialists, alone and through the strategies of reuse, on a few texts a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nodes.base_model import BaseModel
from nodes.compare import compare, lineup
from nodes.records import Pair
from nodes.reuse.choice import Choice
from nodes.reuse.strategies import Specialist
from protocol.keys import write_durably
from tests.bench.learnware_measures import Evidence
from tests.bench.learnware_policies import best, candidates, looks, market_under
from tests.bench.learnware_run import Run, say
from tests.bench.rules import similarities

ANSWER_TOKENS = 40  # as many as a response has in training


def compare_with(run: Run, directory: Path) -> None:
    """Write, for each task seen and unseen, what every strategy loses; a task that is there is not done again.

    The specialist is the LLR's pick of the first query.  A user's own texts calibrate, others are scored.
    """
    settings, world = run.settings, Evidence(run).world(False)
    market = market_under(world, run.map, settings.epsilon_spec, 0, settings)
    larger: BaseModel | None = None
    for look in looks(world, run.map, settings, 1):
        if look.query:
            continue
        task = world.tasks[look.task]
        values = similarities(market, look.sketches[2], run.map)["LLR"]
        records = [record for record in run.test_records(task)[0] if isinstance(record, Pair)]
        scored, calibration = records[: settings.larger_texts], records[settings.texts :]
        for scenario in ("seen", "unseen"):
            path, mask = run.out / "larger" / f"{task}.{scenario}.json", candidates(world.owners, task, scenario)
            if path.exists() or not mask.any():
                continue
            larger = larger or BaseModel.open(directory, device=run.model.device)
            owner = world.owners[best(values, mask)[0]].name
            adapter = run.adapter_of("none", owner)
            assert adapter is not None
            choice = Choice((Specialist(owner, adapter, settings.epsilon_spec),), (1.0,), "best by its specification")
            found = compare(lineup(run.model, choice, larger, calibration, ANSWER_TOKENS, _quiet), scored, ANSWER_TOKENS, _quiet)
            rows: list[dict[str, Any]] = [
                {"strategy": row.name, "nats": round(row.nats_per_token, 4), "exact": row.exact_match, "seconds": round(row.seconds, 3),
                 "escalated": row.escalated_share} for row in found
            ]  # fmt: skip
            same = larger.tokenizer_id == run.model.tokenizer_id
            result = {"task": task, "scenario": scenario, "owner": owner, "texts": len(scored), "same_tokenizer": same, "rows": rows}
            write_durably(path, json.dumps(result).encode())
            say(f"larger model: {task}, {scenario}")


def _quiet(what: str, done: int, of: int) -> None:
    """Tell nobody."""
