"""Strategies: how specialists and a larger local model answer together, and which combinations do not work.

Everything that can be refused is refused by `Wish` or `check_models`, before a model runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from nodes.reuse.decoding import (
    Drafts,
    Mixture,
    Source,
    Steered,
    Step,
    TextStream,
    Voice,
    check_length,
    greedy,
    nats_of,
    response_log_probabilities,
    speculative,
)
from protocol.errors import UsageError
from protocol.window import ALWAYS, Window, day_of

if TYPE_CHECKING:
    from pathlib import Path

    from nodes.adapter import Adapter
    from nodes.base_model import BaseModel

Turns = Sequence[tuple[str, str]]  # (role, text), role one of "system", "user", "assistant"


class Strategy(StrEnum):
    """Who answers."""

    BASE = "base"  # the base model alone
    LARGER = "larger"  # the larger model alone
    SINGLE = "single"  # the best match
    MIXTURE = "mixture"  # several matches with convex weights
    CASCADE = "cascade"  # the specialist, or the larger model where the specialist is unsure
    PROXY = "proxy"  # the larger model, steered by what fine-tuning changed in the small one
    SPECULATIVE = "speculative"  # the larger model; the specialist drafts


class Mixing(StrEnum):
    """How a mixture is made."""

    MERGE = "merge"  # one adapter whose update is the weighted sum: one pass a token
    OUTPUTS = "outputs"  # the mean of next-token probabilities: one pass a token and specialist


WITH_LARGER = frozenset({Strategy.LARGER, Strategy.CASCADE, Strategy.PROXY, Strategy.SPECULATIVE})
WITH_SPECIALIST = frozenset(Strategy) - {Strategy.BASE, Strategy.LARGER}
SAME_TOKENIZER = frozenset({Strategy.PROXY, Strategy.SPECULATIVE})
MAX_ALPHA = 8.0
LARGER_HINT = "--larger DIR gives a local one"
TAU_HINT = "--validation FILE calibrates it, --tau gives it"
OTHER_TOKENIZER = "expected two models of one tokenizer, got two: probabilities of unrelated tokens would be joined"


def parse_strategy(text: str) -> Strategy:
    """Return the strategy of a name; raise UsageError with the reason for what cannot be combined."""
    names = [name.strip() for name in text.replace(",", "+").split("+")]
    unknown = [name for name in names if name not in list(Strategy)]
    if unknown:
        raise UsageError(f"--strategy: expected one of {', '.join(Strategy)}")
    if len(names) == 1:
        return Strategy(names[0])
    if {"proxy", "speculative"} <= set(names):
        raise UsageError(
            "--strategy: proxy and speculative cannot be combined: what is steered is not what the draft is checked against",
            hint="choose one of the two",
        )
    raise UsageError("--strategy: expected one strategy, they cannot be combined")


@dataclass(frozen=True, slots=True)
class Wish:
    """What a user asks for; refused at once if it cannot work whatever the models are."""

    strategy: Strategy
    larger: bool = False  # whether a larger model is given
    specialists: int = 1
    alpha: float | None = None  # strength of the proxy
    tau: float | None = None  # confidence below which the larger model answers, mean log-probability a token
    mixing: Mixing = Mixing.MERGE
    calibrated: bool = False  # whether alpha and tau will be calibrated before use

    def __post_init__(self) -> None:
        strategy = self.strategy
        if strategy in WITH_LARGER and not self.larger:
            raise UsageError(f"{strategy}: needs a larger model", hint=LARGER_HINT)
        if strategy in WITH_SPECIALIST and self.specialists < 1:
            raise UsageError(f"{strategy}: needs a specialist", hint="-m ID names one, as `veilmart find` prints it")
        if strategy is Strategy.MIXTURE and self.specialists < 2:
            raise UsageError("mixture: needs two specialists or more, got one", hint="-m names another, or --strategy single")
        if strategy in (Strategy.SINGLE, Strategy.CASCADE, Strategy.PROXY, Strategy.SPECULATIVE) and self.specialists > 1:
            raise UsageError(f"{strategy}: works with one specialist, got {self.specialists}", hint="--strategy mixture uses several")
        if self.alpha is not None and not 0 <= self.alpha <= MAX_ALPHA:
            raise UsageError(f"--alpha: expected 0 to {MAX_ALPHA:g}, got {self.alpha:g}")
        if self.tau is not None and not self.tau <= 0:  # NaN too
            raise UsageError("--tau: expected a mean log-probability, 0 or less")
        if strategy is Strategy.CASCADE and self.tau is None and not self.calibrated:
            raise UsageError("cascade: needs a confidence to compare with", hint=TAU_HINT)


def check_directories(strategy: Strategy, base: Path, larger: Path | None) -> None:
    """Raise UsageError unless the larger model is there and, where tokens are compared, has the base model's tokenizer.

    Reads two small files: nothing is loaded for a wish that cannot work.
    """
    from nodes.base_model import tokenizer_id

    if strategy not in WITH_LARGER or larger is None:
        return
    if not larger.is_dir():
        raise UsageError(f"--larger: {larger} is no directory", hint="larger models are local: a Hugging Face directory with safetensors")
    if strategy in SAME_TOKENIZER and tokenizer_id(base) != tokenizer_id(larger):
        raise UsageError(f"{strategy}: {OTHER_TOKENIZER}", hint="--strategy cascade works with any two models")


@dataclass(frozen=True, slots=True, eq=False)
class Specialist:
    """An adapter with what its answers are accounted for."""

    title: str
    adapter: Adapter
    epsilon: float | None = None  # of the specification that it was chosen by; the adapter's own guarantee is in the adapter
    fetched_bytes: int = 0  # release and adapter, as they come over the wire
    window: Window = ALWAYS  # of its release


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its provenance."""

    text: str
    strategy: Strategy
    answered_by: str  # title of the learnware, or "base", "larger"
    why: str
    tokens: int
    seconds: float
    confidence: float  # mean log-probability a token
    finished: bool  # False if it was cut at the limit
    escalated: bool = False
    left_site: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """Who answered, and why."""

    answered_by: str
    why: str
    escalated: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Something that answers are decoded from, and the model whose tokens they are made of."""

    source: Source
    model: BaseModel

    def steps(self, turns: Turns, limit: int) -> Iterator[Step]:
        """Yield the greedy answer."""
        return greedy(self.source, self.model.render(turns), limit, self.model.end)

    def nats(self, turns: Turns, response: str) -> tuple[float, int]:
        """Return the summed loss of a response in nats and its number of tokens; at most 40 of them, as in training."""
        prompt, tokens = self.model.render(turns), self.model.response_tokens(response)
        return nats_of(response_log_probabilities(self.source, prompt, tokens), tokens), len(tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Account:
    """What using the specialists of an assistant costs and tells."""

    specialists: tuple[Specialist, ...] = ()
    weights_bytes: int = 0  # held in memory
    left_site: tuple[str, ...] = ()  # what choosing and fetching told the market


@dataclass(frozen=True, slots=True, eq=False)
class Assistant:
    """Something that answers; made by `assemble`.  Holds no state of an answer, so several may be under way."""

    strategy: Strategy
    main: Part
    outcome: Outcome
    account: Account = Account()
    second: Part | None = None  # of a cascade: the larger model; of speculative decoding: the specialist that drafts
    tau: float = -math.inf
    settings: Mapping[str, object] = field(default_factory=dict)

    def stream(self, turns: Turns, limit: int) -> Generator[str, None, Answer]:
        """Yield the greedy answer as it is decoded; return it with its provenance.

        A piece may be empty: after every token there is one, so that who has heard enough can stop.  Raises UsageError for a prompt
        that is too long, and what `require_holding` raises.
        """
        self.require_holding()
        self.check_length(turns, limit)
        started, steps = time.perf_counter(), self._decode(turns, limit)
        text, logarithms, count, finished = None, 0.0, 0, False
        while True:
            try:
                model, step = next(steps)
            except StopIteration as stop:
                outcome: Outcome = stop.value
                break
            if step is None:
                yield ""
                continue
            text = text or TextStream(model)
            count, logarithms, finished = count + 1, logarithms + step.log_probability, step.token == model.end
            yield "" if finished else text.add(step.token)
        if text and (piece := text.rest()):
            yield piece
        return Answer(
            text.text if text else "", self.strategy, outcome.answered_by, outcome.why, count, time.perf_counter() - started,
            logarithms / max(count, 1), finished, outcome.escalated, self.account.left_site,
        )  # fmt: skip

    def answer(self, turns: Turns, limit: int) -> Answer:
        """Return the whole answer."""
        stream = self.stream(turns, limit)
        while True:
            try:
                next(stream)
            except StopIteration as stop:
                found: Answer = stop.value
                return found

    def require_holding(self) -> None:
        """Raise OutsideWindow unless the releases of all specialists hold today: an assistant may be kept longer than they do."""
        today = day_of(time.time())
        for specialist in self.account.specialists:
            specialist.window.require(today, specialist.title)

    def check_length(self, turns: Turns, limit: int) -> None:
        """Raise UsageError unless prompt and answer fit every model involved."""
        for part in (self.main, self.second):
            if part is not None:
                check_length(part.model, len(part.model.render(turns)), limit)

    def nats(self, turns: Turns, response: str, answer: Answer) -> tuple[float, int]:
        """Return the summed loss of a given response and its number of tokens, under what gave `answer` to the same prompt."""
        part = self.second if answer.escalated and self.second else self.main
        return part.nats(turns, response)

    def _decode(self, turns: Turns, limit: int) -> Generator[tuple[BaseModel, Step | None], None, Outcome]:
        main, second = self.main, self.second
        if second is None:
            for step in main.steps(turns, limit):
                yield main.model, step
            return self.outcome
        if self.strategy is Strategy.SPECULATIVE:
            drafts = Drafts()
            for step in speculative(second.source, main.source, main.model.render(turns), limit, main.model.end, drafts):
                yield main.model, step
            return replace(self.outcome, why=f"{self.outcome.why}; {drafts.taken} of {drafts.made} drafted tokens were its own choice")
        first = []
        for step in main.steps(turns, limit):
            first.append(step)
            yield main.model, None  # nothing is said before the confidence is known
        confidence = mean_log_probability(first)
        if confidence >= self.tau:
            for step in first:
                yield main.model, step
            return replace(self.outcome, why=f"{self.outcome.why}; confidence {confidence:.2f}, at least {self.tau:.2f}")
        for step in second.steps(turns, limit):
            yield second.model, step
        return Outcome("larger", f"the specialist's confidence was {confidence:.2f}, below {self.tau:.2f}", escalated=True)


def mean_log_probability(steps: Sequence[Step]) -> float:
    """Return the confidence of an answer."""
    return sum(step.log_probability for step in steps) / max(len(steps), 1)


def assemble(
    wish: Wish,
    model: BaseModel,
    specialists: Sequence[Specialist] = (),
    *,
    weights: Sequence[float] = (),
    larger: BaseModel | None = None,
    why: str = "it was named",
    left_site: tuple[str, ...] = (),
) -> Assistant:
    """Return an assistant for a wish.

    weights: of the specialists, not negative and of sum 1; equal ones if there are none.  why: how the specialists were chosen.
    Raises UsageError if the models cannot work together, InvalidAdapter for an adapter of another base model.
    """
    strategy, used = wish.strategy, tuple(specialists) if wish.strategy in WITH_SPECIALIST else ()
    for specialist in used:
        model.admit(specialist.adapter)
    small = [] if strategy is Strategy.LARGER else [model]
    account = Account(
        used,
        sum(one.size_bytes for one in small) + sum(one.adapter.size_bytes for one in used) + _size(larger, strategy),
        left_site if used else (),
    )
    if strategy is Strategy.BASE:
        return Assistant(strategy, Part(Voice(model), model), Outcome("base", "the base model was asked for"), account)
    if strategy is Strategy.MIXTURE:
        return _mixture(wish, model, account, list(weights) or [1 / len(used)] * len(used), why)
    if strategy is Strategy.SINGLE:
        return Assistant(strategy, Part(Voice(model, used[0].adapter), model), Outcome(used[0].title, why), account)
    if larger is None:
        raise UsageError(f"{strategy}: needs a larger model", hint=LARGER_HINT)
    large = Part(Voice(larger), larger)
    if strategy is Strategy.LARGER:
        return Assistant(strategy, large, Outcome("larger", "the larger model was asked for"), account)
    return _with_larger(wish, model, large, account, why)


def _size(larger: BaseModel | None, strategy: Strategy) -> int:
    return larger.size_bytes if larger is not None and strategy in WITH_LARGER else 0


def _with_larger(wish: Wish, model: BaseModel, large: Part, account: Account, why: str) -> Assistant:
    (specialist,), strategy = account.specialists, wish.strategy
    if strategy in SAME_TOKENIZER and model.tokenizer_id != large.model.tokenizer_id:
        raise UsageError(f"{strategy}: {OTHER_TOKENIZER}")
    voice = Part(Voice(model, specialist.adapter), model)
    match strategy:
        case Strategy.CASCADE:
            if wish.tau is None:
                raise UsageError("cascade: needs a confidence to compare with", hint=TAU_HINT)
            chosen = Outcome(specialist.title, why)
            return Assistant(strategy, voice, chosen, account, second=large, tau=wish.tau, settings={"tau": wish.tau})
        case Strategy.SPECULATIVE:
            return Assistant(strategy, large, Outcome("larger", f"{specialist.title} drafted; {why}"), account, second=voice)
    alpha = 1.0 if wish.alpha is None else wish.alpha
    steered = Steered(large.source, voice.source, Voice(model), alpha)
    outcome = Outcome("larger", f"steered by {specialist.title} with strength {alpha:g}; {why}")
    return Assistant(strategy, Part(steered, large.model), outcome, account, settings={"alpha": alpha})


def _mixture(wish: Wish, model: BaseModel, account: Account, weights: list[float], why: str) -> Assistant:
    from nodes.adapter import merge

    used = account.specialists
    if len(weights) != len(used) or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6:
        raise UsageError(f"weights: expected {len(used)} numbers of sum 1, none below 0")
    kept = [(specialist, weight) for specialist, weight in zip(used, weights, strict=True) if weight > 0]
    if wish.mixing is Mixing.MERGE:
        source: Source = Voice(model, merge([one.adapter for one, _ in kept], [weight for _, weight in kept]))
    else:
        source = Mixture([Voice(model, one.adapter) for one, _ in kept], [weight for _, weight in kept])
    shares = ", ".join(f"{one.title} {weight:.2f}" for one, weight in kept)
    outcome = Outcome(" + ".join(one.title for one, _ in kept), f"weights {shares}; {why}")
    settings = {"mixing": str(wish.mixing), "weights": weights}
    return Assistant(wish.strategy, Part(source, model), outcome, account, settings=settings)
