"""Comparing strategies on a user's own validation records: what each is worth, costs and tells.

One half of the records calibrates, the other half is scored.  Strategies are interleaved record by record, so that a busy minute of
the machine slows all of them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.records import Pair, Record
from nodes.reuse.calibration import Progress, answered, calibrate_alpha, calibrate_tau, halves
from nodes.reuse.choice import Choice
from nodes.reuse.decoding import Voice
from nodes.reuse.strategies import WITH_SPECIALIST, Assistant, Mixing, Part, Strategy, Wish, assemble
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.base_model import BaseModel
    from nodes.querier import Querier

SHORT_ANSWER_TOKENS = 16  # a task whose responses are mostly no longer has an exact match to count


@dataclass(frozen=True, slots=True)
class Row:
    """One strategy."""

    name: str
    strategy: Strategy
    nats_per_token: float  # mean over records of the loss per response token
    nats_error: float  # its standard error
    exact_match: float | None  # share of answers that are the response up to case and blanks; None where responses are long
    seconds: float  # median a whole answer
    tokens_per_second: float
    fetched_bytes: int  # releases and adapters, over the wire, once
    weights_bytes: int  # in memory
    left_share: float  # of the prompts, to another machine
    escalated_share: float  # of the prompts, to the larger local model
    epsilon_specification: float | None  # largest of the specifications that it was chosen by
    guarantee_adapter: str | None  # "none": training gave no guarantee, so what the owners spent in total is unbounded
    settings: Mapping[str, object]


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Every strategy that could be made of what is there, and on how many records it was calibrated and scored."""

    rows: tuple[Row, ...]
    choice: Choice
    calibrated_on: int
    scored_on: int
    device: str


def compare_on(
    querier: Querier,
    records: Sequence[Record],
    name: str,
    learnwares: Sequence[str] = (),
    *,
    larger: Path | None = None,
    several: int = 3,
    tokens: int = 40,
    nothing_leaves: bool = False,
) -> Comparison:
    """Return the comparison on a querier's records; `name` is their file's.

    learnwares: those to use, else up to `several` that suit the calibrating half.  Raises RecordError for records that cannot be scored,
    and what `Querier.check` and `Querier.choose` raise.
    """
    calibration, scored = halves(answered(records, name, 2))
    if not scored:
        raise UsageError(f"{name}: expected at least two different records")
    wanted = [Strategy.SINGLE, *([Strategy.LARGER] if larger else [])]
    querier.check(wanted, learnwares, with_task=True, larger=larger, nothing_leaves=nothing_leaves)
    choice = querier.choose(learnwares, calibration, several=several)
    large = querier.larger_model(larger) if larger else None
    assistants = lineup(querier.model, choice, large, calibration, tokens, querier.on_progress)
    rows = compare(assistants, scored, tokens, querier.on_progress)
    return Comparison(tuple(rows), choice, len(calibration), len(scored), querier.model.device)


def comparison_to_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as `compare --json` prints it."""
    choice = found.choice
    return {
        "schema": "veilmart.compare/1", "calibrated_on": found.calibrated_on, "scored_on": found.scored_on, "device": found.device,
        "learnwares": [{"title": one.title, "weight": weight} for one, weight in zip(choice.specialists, choice.weights, strict=True)],
        "why": choice.why, "left_site": list(choice.left_site), "pareto_front": [row.name for row in pareto_front(found.rows)],
        "strategies": [asdict(row) for row in found.rows],
    }  # fmt: skip


def lineup(
    model: BaseModel, choice: Choice | None, larger: BaseModel | None, calibration: Sequence[Pair], limit: int, on_progress: Progress
) -> dict[str, Assistant]:
    """Return every assistant that can be made of what is there, calibrated on records that are not scored."""
    made = {"base": assemble(Wish(Strategy.BASE, specialists=0), model)}
    if larger is not None:
        made["larger"] = assemble(Wish(Strategy.LARGER, larger=True, specialists=0), model, larger=larger)
    if choice is None:
        return made
    why, left = choice.why, choice.left_site
    best = max(range(len(choice.specialists)), key=lambda place: choice.weights[place])
    specialist = choice.specialists[best]
    made["single"] = assemble(Wish(Strategy.SINGLE), model, [specialist], why=why, left_site=left)
    if len(choice.specialists) > 1:
        for mixing in Mixing:
            wish = Wish(Strategy.MIXTURE, specialists=len(choice.specialists), mixing=mixing)
            made[f"mixture ({mixing})"] = assemble(wish, model, choice.specialists, weights=choice.weights, why=why, left_site=left)
    if larger is None:
        return made
    voice, large = Voice(model, specialist.adapter), Voice(larger)
    tau = calibrate_tau(calibration, Part(voice, model), Part(large, larger), limit, on_progress)
    wishes = [Wish(Strategy.CASCADE, larger=True, tau=tau)]
    if model.tokenizer_id == larger.tokenizer_id:
        alpha = calibrate_alpha(calibration, model, voice, Voice(model), large, on_progress)
        wishes += [Wish(Strategy.PROXY, larger=True, alpha=alpha), Wish(Strategy.SPECULATIVE, larger=True)]
    for wish in wishes:
        made[str(wish.strategy)] = assemble(wish, model, [specialist], larger=larger, why=why, left_site=left)
    return made


def compare(assistants: Mapping[str, Assistant], scored: Sequence[Pair], limit: int, on_progress: Progress) -> list[Row]:
    """Return a row for every assistant, in their order; answers are of at most `limit` tokens."""
    losses: dict[str, list[float]] = {name: [] for name in assistants}
    answers: dict[str, list[Any]] = {name: [] for name in assistants}
    model = next(iter(assistants.values())).main.model
    short = statistics.median(len(model.response_tokens(pair.response)) for pair in scored) <= SHORT_ANSWER_TOKENS
    for done, pair in enumerate(scored, start=1):
        turns = [("user", pair.prompt)]
        for name, assistant in assistants.items():
            answer = assistant.answer(turns, limit)
            nats, tokens = assistant.nats(turns, pair.response, answer)
            losses[name].append(nats / tokens)
            answers[name].append((answer, _same(answer.text, pair.response)))
        on_progress("compare", done, len(scored))
    rows = []
    for name, assistant in assistants.items():
        given = [answer for answer, _ in answers[name]]
        specialists = assistant.account.specialists
        epsilons = [one.epsilon for one in specialists if one.epsilon is not None]
        rows.append(Row(
            name, assistant.strategy, statistics.fmean(losses[name]), _standard_error(losses[name]),
            statistics.fmean(same for _, same in answers[name]) if short else None,
            statistics.median(answer.seconds for answer in given),
            sum(answer.tokens for answer in given) / sum(answer.seconds for answer in given),
            sum(one.fetched_bytes for one in specialists), assistant.account.weights_bytes,
            0.0,  # every model that a strategy can use lies on this machine
            statistics.fmean(answer.escalated for answer in given),
            max(epsilons, default=None),
            _weakest(specialist.adapter.guarantee for specialist in specialists) if assistant.strategy in WITH_SPECIALIST else None,
            assistant.settings,
        ))  # fmt: skip
    return rows


def pareto_front(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that no other row beats in both loss and time, fastest first."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.seconds, row.nats_per_token)):
        if not front or row.nats_per_token < front[-1].nats_per_token:
            front.append(row)
    return front


def _weakest(guarantees: Any) -> str:
    found = sorted({str(guarantee) for guarantee in guarantees})
    return "none" if "none" in found else ", ".join(found)


def _same(one: str, other: str) -> bool:
    return " ".join(one.casefold().split()) == " ".join(other.casefold().split())


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
