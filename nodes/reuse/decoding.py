"""Next-token distributions and how to read them: one model, a mixture of several, or one steered by the difference of two.

A reader reads one text with a cache of its own and is thrown away with it: a cache that outlives its text is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from protocol.errors import UsageError

if TYPE_CHECKING:
    import torch

    from nodes.adapter import Adapter
    from nodes.base_model import BaseModel

AHEAD = 4  # tokens that a specialist drafts before the larger model looks at them


class Reader(Protocol):
    """Reads one text, piece by piece."""

    @property
    def length(self) -> int:
        """Number of tokens read."""

    def read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        """Return log-probabilities (keep, vocabulary) of what follows each of the last `keep` tokens, float32 on the processor."""

    def forget(self, length: int) -> None:
        """Go back to the first `length` tokens."""


class Source(Protocol):
    """What an answer is decoded from."""

    def reader(self) -> Reader:
        """Return a reader that has read nothing."""


class Voice:
    """A whole model, with an adapter or without.  It shares the base model's weights."""

    def __init__(self, model: BaseModel, adapter: Adapter | None = None) -> None:
        self.model, self._module = model, model.with_adapter(adapter)

    def reader(self) -> Reader:
        """Return a reader that has read nothing."""
        return _VoiceReader(self._module, self.model.vocabulary)


class _VoiceReader:
    def __init__(self, module: Any, vocabulary: int) -> None:
        self._module, self._vocabulary = module, vocabulary
        self._past: Any = None
        self.length = 0

    def read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        import torch

        ids = torch.tensor([list(tokens)], device=self._module.device)
        # Inference mode here and not around a whole answer: a generator would leave it switched on for whoever consumes it.
        with torch.inference_mode():
            out = self._module(input_ids=ids, past_key_values=self._past, use_cache=True, logits_to_keep=keep)
            self._past, self.length = out.past_key_values, self.length + len(tokens)
            # Logits beyond the tokenizer's tokens are padding of the weights: two models of one tokenizer may differ there.
            found: torch.Tensor = out.logits[0, :, : self._vocabulary].float().log_softmax(-1).cpu()
        return found

    def forget(self, length: int) -> None:
        if length < self.length:
            self._past.crop(length - self.length)  # a negative number: that many tokens fewer
            self.length = length


@dataclass(frozen=True)
class Mixture:
    """The mean of next-token probabilities: never worse than the best of them by more than -log of its weight, in nats a text."""

    sources: Sequence[Source]
    weights: Sequence[float]

    def reader(self) -> Reader:
        """Return a reader that has read nothing."""
        import torch

        logarithms = torch.tensor(self.weights, dtype=torch.float32).log()[:, None, None]
        return _Joint([source.reader() for source in self.sources], lambda parts: torch.logsumexp(parts + logarithms, 0))


@dataclass(frozen=True)
class Steered:
    """Proxy tuning (Liu et al. 2024): log p_larger + alpha (log p_specialist - log p_base), normalised.  alpha = 0: the larger model."""

    larger: Source
    specialist: Source
    base: Source
    alpha: float

    def reader(self) -> Reader:
        """Return a reader that has read nothing."""
        return _Joint([source.reader() for source in (self.larger, self.specialist, self.base)], self._steer)

    def _steer(self, parts: torch.Tensor) -> torch.Tensor:
        larger, specialist, base = parts
        return steer(larger, specialist, base, self.alpha)


def steer(larger: torch.Tensor, specialist: torch.Tensor, base: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the steered log-probabilities; exactly those of `larger` at alpha = 0."""
    # Normalising once more would move the last digits.
    return larger if alpha == 0 else (larger + alpha * (specialist - base)).log_softmax(-1)


class _Joint:
    """Several readers of one text, each with its own cache, and one distribution from theirs."""

    def __init__(self, readers: list[Reader], joined: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._readers, self._joined = readers, joined

    @property
    def length(self) -> int:
        return self._readers[0].length

    def read(self, tokens: Sequence[int], keep: int) -> torch.Tensor:
        import torch

        return self._joined(torch.stack([reader.read(tokens, keep) for reader in self._readers]))

    def forget(self, length: int) -> None:
        for reader in self._readers:
            reader.forget(length)


@dataclass(frozen=True, slots=True)
class Step:
    """A token of an answer and its log-probability under what it was decoded from."""

    token: int
    log_probability: float


def greedy(source: Source, prompt: Sequence[int], limit: int, end: int) -> Iterator[Step]:
    """Yield the most probable answer token by token, the end token included; at most `limit` tokens."""
    reader, fresh = source.reader(), list(prompt)
    for _ in range(limit):
        scores = reader.read(fresh, 1)[0]
        token = int(scores.argmax())
        yield Step(token, float(scores[token]))
        if token == end:
            return
        fresh = [token]


@dataclass(slots=True)
class Drafts:
    """How many drafted tokens the larger model took."""

    made: int = 0
    taken: int = 0


def speculative(draft: Source, target: Source, prompt: Sequence[int], limit: int, end: int, drafts: Drafts) -> Iterator[Step]:
    """Yield what `greedy(target)` yields, and count how often the draft was right (Leviathan et al. 2023, greedy case).

    The target reads AHEAD drafted tokens in one pass and keeps them up to the first that is not its own choice.  Ours rather than
    the library's assisted generation, whose texts are governed by a model directory's generation_config.json and do not come as a stream.
    """
    drafter, judge, text = draft.reader(), target.reader(), list(prompt)
    start = len(prompt)
    while len(text) - start < limit:
        proposed: list[int] = []
        for _ in range(min(AHEAD, limit - (len(text) - start) - 1)):
            proposed.append(int(drafter.read([*text, *proposed][drafter.length :], 1)[0].argmax()))
            if proposed[-1] == end:
                break
        rows = judge.read([*text, *proposed][judge.length :], len(proposed) + 1)
        drafts.made += len(proposed)
        for place, row in enumerate(rows):
            token = int(row.argmax())
            text.append(token)
            yield Step(token, float(row[token]))
            if token == end:
                return
            if place == len(proposed) or proposed[place] != token:
                break
            drafts.taken += 1
        agreed = len(text) - 1  # the last token is the target's own: neither has read it
        drafter.forget(min(agreed, drafter.length))
        judge.forget(agreed)


def response_log_probabilities(source: Source, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Return log-probabilities (len(response), vocabulary) of what comes at each place of a response that is given."""
    return source.reader().read([*prompt, *response[:-1]], len(response))


def nats_of(rows: torch.Tensor, response: Sequence[int]) -> float:
    """Return the summed loss of a response under the rows of `response_log_probabilities`."""
    import torch

    return -float(rows.gather(1, torch.tensor(list(response))[:, None]).sum())


def check_length(model: BaseModel, prompt: int, limit: int) -> None:
    """Raise UsageError unless a prompt of so many tokens and its answer fit the model's context."""
    if prompt + limit > model.context:
        raise UsageError(
            f"prompt: expected at most {max(0, model.context - limit)} tokens beside an answer of {limit}, got {prompt}",
            hint="shorten it, or ask for a shorter answer",
        )


class TextStream:
    """Tokens in, text out: only what later tokens cannot change, without blanks at either end."""

    def __init__(self, model: BaseModel) -> None:
        self._model, self._sent = model, ""
        self.tokens: list[int] = []

    def add(self, token: int) -> str:
        """Return the text that a token adds."""
        self.tokens.append(token)
        text = self.text
        # A character may need several tokens; until the last of them it is decoded as U+FFFD.
        if text.endswith("\ufffd") or not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

    @property
    def text(self) -> str:
        """The whole text so far."""
        return self._model.text_of(self.tokens).strip()

    def rest(self) -> str:
        """Return what was held back."""
        text = self.text
        return text[len(self._sent) :] if text.startswith(self._sent) else ""
