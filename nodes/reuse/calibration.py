"""How strong the proxy steers, and how sure a specialist must be: both from records that are not scored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nodes.records import Pair, Record
from nodes.reuse.decoding import Source, nats_of, response_log_probabilities, steer
from nodes.reuse.strategies import Part, mean_log_probability
from protocol.errors import RecordError

if TYPE_CHECKING:
    from nodes.base_model import BaseModel

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
Progress = Callable[[str, int, int], None]  # what, done, all


def answered(records: Sequence[Record], name: str, minimum: int) -> list[Pair]:
    """Return the records; raise RecordError unless there are `minimum` and each has a prompt and a response.  `name` is the file's."""
    pairs = [record for record in records if isinstance(record, Pair)]
    if len(pairs) < len(records):
        raise RecordError(f"{name}: expected a prompt and a response in every record", hint="without responses there is nothing to score")
    if len(pairs) < minimum:
        raise RecordError(
            f"{name}: expected at least {minimum} records, got {len(pairs)}",
            hint="one half calibrates, the other half is scored" if minimum > 1 else "",
        )
    return pairs


def halves(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return the records that calibrate and those that are scored: every other one, equal records all on the side of the first."""
    place: dict[Pair, int] = {}
    for pair in pairs:
        place.setdefault(pair, len(place) % 2)
    return [pair for pair in pairs if place[pair] == 0], [pair for pair in pairs if place[pair] == 1]


def calibrate_alpha(
    pairs: Sequence[Pair], model: BaseModel, specialist: Source, base: Source, larger: Source, on_progress: Progress
) -> float:
    """Return the strength of ALPHAS under which the steered model loses least on the responses; the weakest of equals.

    Each model reads each record once, whatever the number of strengths.
    """
    totals = dict.fromkeys(ALPHAS, 0.0)
    for done, pair in enumerate(pairs, start=1):
        prompt, response = model.render([("user", pair.prompt)]), model.response_tokens(pair.response)
        rows = [response_log_probabilities(source, prompt, response) for source in (larger, specialist, base)]
        for alpha in ALPHAS:
            totals[alpha] += nats_of(steer(rows[0], rows[1], rows[2], alpha), response) / len(response)
        on_progress("calibrate alpha", done, len(pairs))
    return min(ALPHAS, key=lambda alpha: totals[alpha])


def calibrate_tau(pairs: Sequence[Pair], specialist: Part, larger: Part, limit: int, on_progress: Progress) -> float:
    """Return the confidence below which the larger model should answer, chosen for the least loss in nats per response token.

    Of equal choices the one that asks the larger model least often: where it never helps, a value below every confidence seen.
    """
    seen: list[tuple[float, float, float]] = []  # confidence, loss of the specialist, loss of the larger model
    for done, pair in enumerate(pairs, start=1):
        turns = [("user", pair.prompt)]
        losses = [nats / tokens for nats, tokens in (part.nats(turns, pair.response) for part in (specialist, larger))]
        seen.append((mean_log_probability(list(specialist.steps(turns, limit))), losses[0], losses[1]))
        on_progress("calibrate tau", done, len(pairs))
    return threshold(seen)


def threshold(seen: Sequence[tuple[float, float, float]]) -> float:
    """Return the best tau for (confidence, loss if kept, loss if passed on); 0 at most, as every confidence is."""
    ordered = sorted(seen)
    kept = sum(loss for _, loss, _ in ordered)
    best, tau = kept, ordered[0][0] - 1.0
    for place, (confidence, own, others) in enumerate(ordered):
        kept += others - own
        following = ordered[place + 1][0] if place + 1 < len(ordered) else 0.0
        if kept < best - 1e-9 and following > confidence:  # equal confidences cannot be told apart
            best, tau = kept, (confidence + following) / 2
    return min(tau, 0.0)
