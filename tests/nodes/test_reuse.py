"""Strategies: each is what it says, and what cannot work is refused before a model runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nodes.adapter import merge
from nodes.base_model import BaseModel
from nodes.records import Pair
from nodes.reuse import Mixing, Specialist, Strategy, Wish, assemble
from nodes.reuse.calibration import ALPHAS, answered, calibrate_alpha, calibrate_tau, halves, threshold
from nodes.reuse.choice import check_nothing_leaves
from nodes.reuse.decoding import Drafts, Mixture, Steered, Step, TextStream, Voice, greedy, response_log_probabilities, speculative
from nodes.reuse.strategies import Part, check_directories, parse_strategy
from protocol.errors import InvalidAdapter, RecordError, UsageError
from tests.nodes.test_families import random_adapter, write_model

PROMPTS = ("what is two and three", "name a colour", "x")
LIMIT = 12


def ask(text: str):
    return [("user", text)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    write_model(root / "base", "llama")
    write_model(root / "larger", "llama", layers=8, seed=9)
    write_model(root / "foreign", "gpt2", layers=3, markers=False)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> BaseModel:
    return BaseModel.open(folders["base"], torch.float32)


@pytest.fixture(scope="module")
def larger(folders: dict[str, Path]) -> BaseModel:
    return BaseModel.open(folders["larger"], torch.float32)


@pytest.fixture(scope="module")
def specialists(model: BaseModel) -> list[Specialist]:
    return [Specialist(f"notes{seed}@0000000{seed}", random_adapter(model, seed), 1.0, 2_000_000) for seed in (1, 2)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny models: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def silent(what: str, done: int, of: int) -> None:
    pass


# What each strategy is


def test_a_single_specialist_answers_as_the_library_would(model, specialists):
    assistant = assemble(Wish(Strategy.SINGLE), model, specialists[:1])
    for prompt in PROMPTS:
        answer = assistant.answer(ask(prompt), LIMIT)
        assert answer.text == model.generate(prompt, specialists[0].adapter, LIMIT)
        assert answer.answered_by == specialists[0].title
        assert answer.left_site == ()


def test_a_proxy_of_no_strength_is_the_larger_model(model, larger, specialists):
    proxy = assemble(Wish(Strategy.PROXY, larger=True, alpha=0.0), model, specialists[:1], larger=larger)
    for prompt in PROMPTS:
        rendered = larger.render(ask(prompt))
        assert list(greedy(proxy.main.source, rendered, LIMIT, larger.end)) == list(greedy(Voice(larger), rendered, LIMIT, larger.end))
    steered = assemble(Wish(Strategy.PROXY, larger=True, alpha=2.0), model, specialists[:1], larger=larger)
    assert [steered.answer(ask(p), LIMIT).text for p in PROMPTS] != [proxy.answer(ask(p), LIMIT).text for p in PROMPTS]


def test_steering_with_caches_is_steering_without(model, larger, specialists):
    parts = Voice(larger), Voice(model, specialists[0].adapter), Voice(model)
    source, text = Steered(*parts, 0.7), larger.render(ask(PROMPTS[0]))
    for step in greedy(source, text, LIMIT, larger.end):
        rows = [part.reader().read(text, 1)[0] for part in parts]
        expected = (rows[0] + 0.7 * (rows[1] - rows[2])).log_softmax(-1)
        assert step.log_probability == pytest.approx(float(expected[step.token]), abs=1e-4)
        assert float(expected.max() - expected[step.token]) < 1e-4
        text = [*text, step.token]


@pytest.mark.parametrize("own", [False, True], ids=["an unrelated draft", "a perfect draft"])
def test_a_drafted_answer_is_the_larger_models_own(model, larger, specialists, own):
    target = Voice(larger)
    draft = target if own else Voice(model, specialists[0].adapter)
    for prompt in PROMPTS:
        for limit in (1, 2, 5, LIMIT):
            rendered, drafts = larger.render(ask(prompt)), Drafts()
            drafted = [step.token for step in speculative(draft, target, rendered, limit, larger.end, drafts)]
            assert drafted == [step.token for step in greedy(target, rendered, limit, larger.end)]
            assert not own or drafts.taken == drafts.made


def test_a_drafted_answer_is_that_of_the_librarys_assisted_generation(model, larger, specialists):
    prompt = torch.tensor([larger.render(ask(PROMPTS[0]))])
    options = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": larger.end, "pad_token_id": larger.end}
    expected = larger._llama.generate(
        prompt, attention_mask=torch.ones_like(prompt), assistant_model=model.with_adapter(specialists[0].adapter), **options
    )[0, prompt.shape[1] :].tolist()
    found = speculative(Voice(model, specialists[0].adapter), Voice(larger), prompt[0].tolist(), LIMIT, larger.end, Drafts())
    assert [step.token for step in found] == expected


def test_a_draft_that_were_not_checked_would_be_noticed(model, larger, specialists):
    """Negative control of the two tests above: the draft alone gives other answers."""
    draft, target = Voice(model, specialists[0].adapter), Voice(larger)
    rendered = larger.render(ask(PROMPTS[0]))
    assert list(greedy(draft, rendered, LIMIT, larger.end)) != list(greedy(target, rendered, LIMIT, larger.end))


def test_a_merged_adapter_is_the_weighted_sum_of_the_updates(specialists):
    one, other = (specialist.adapter for specialist in specialists)
    merged = merge([one, other], [0.3, 0.7])
    assert merged.rank == one.rank + other.rank
    for name in (name for name in one.tensors if ".lora_A." in name):
        twin = name.replace(".lora_A.", ".lora_B.")
        expected = sum(w * a.alpha / a.rank * a.tensors[twin] @ a.tensors[name] for w, a in ((0.3, one), (0.7, other)))
        np.testing.assert_allclose(merged.tensors[twin] @ merged.tensors[name] * merged.alpha / merged.rank, expected, atol=1e-5)


def test_a_merged_adapter_of_weight_one_answers_as_the_specialist(model, specialists):
    mixture = assemble(Wish(Strategy.MIXTURE, specialists=2), model, specialists, weights=[1.0, 0.0])
    for prompt in PROMPTS:
        assert mixture.answer(ask(prompt), LIMIT).text == model.generate(prompt, specialists[0].adapter, LIMIT)


def test_adapters_for_two_models_or_of_too_high_rank_are_not_merged(model, larger, specialists):
    with pytest.raises(InvalidAdapter, match="one base model"):
        merge([specialists[0].adapter, random_adapter(larger)], [0.5, 0.5])
    with pytest.raises(InvalidAdapter, match="at most 64"):
        merge([specialists[0].adapter] * 22, [1 / 22] * 22)


def test_mixed_outputs_are_the_mean_of_probabilities(model, specialists):
    voices = [Voice(model, specialist.adapter) for specialist in specialists]
    prompt, response = model.render(ask("two")), model.response_tokens("three")
    rows = response_log_probabilities(Mixture(voices, [0.25, 0.75]), prompt, response)
    first, second = (response_log_probabilities(voice, prompt, response).exp() for voice in voices)
    torch.testing.assert_close(rows.exp(), 0.25 * first + 0.75 * second)
    assert rows.exp().sum(-1).tolist() == pytest.approx([1.0] * len(response), abs=1e-5)


def test_a_cascade_asks_the_larger_model_below_its_confidence_only(model, larger, specialists):
    cascade = assemble(Wish(Strategy.CASCADE, larger=True, tau=0.0), model, specialists[:1], larger=larger)
    single = assemble(Wish(Strategy.SINGLE), model, specialists[:1])
    for prompt in PROMPTS:
        own = single.answer(ask(prompt), LIMIT)
        passed_on = cascade.answer(ask(prompt), LIMIT)
        assert (passed_on.text, passed_on.escalated) == (larger.generate(prompt, None, LIMIT), True)
        kept = replace(cascade, tau=own.confidence).answer(ask(prompt), LIMIT)
        assert (kept.text, kept.escalated, kept.answered_by) == (own.text, False, specialists[0].title)


def test_a_cascade_needs_no_common_tokenizer(folders, model, specialists):
    foreign = BaseModel.open(folders["foreign"], torch.float32)
    cascade = assemble(Wish(Strategy.CASCADE, larger=True, tau=0.0), model, specialists[:1], larger=foreign)
    assert cascade.answer(ask("hello"), LIMIT).text == foreign.generate("hello", None, LIMIT)


def test_pieces_of_a_stream_are_the_answer(model, larger, specialists):
    for wish in (Wish(Strategy.SINGLE), Wish(Strategy.CASCADE, larger=True, tau=0.0), Wish(Strategy.SPECULATIVE, larger=True)):
        assistant = assemble(wish, model, specialists[:1], larger=larger)
        for prompt in PROMPTS:
            assert "".join(assistant.stream(ask(prompt), LIMIT)) == assistant.answer(ask(prompt), LIMIT).text


def test_half_a_character_is_held_back(model):
    stream = TextStream(model)
    pieces = [stream.add(token) for token in model._ids(" né😀 ")]
    assert "".join(pieces) + stream.rest() == "né😀"
    assert not any("\ufffd" in piece for piece in pieces)


def test_one_answer_does_not_touch_the_next(model, larger, specialists):
    """A cache that outlived its text would be silently wrong."""
    assistant = assemble(Wish(Strategy.PROXY, larger=True, alpha=1.0), model, specialists[:1], larger=larger)
    first = assistant.answer(ask(PROMPTS[0]), LIMIT).text
    assistant.answer(ask(PROMPTS[1]), LIMIT)
    assert assistant.answer(ask(PROMPTS[0]), LIMIT).text == first


def test_the_loss_is_that_of_the_librarys_forward_pass(model, specialists):
    part = Part(Voice(model, specialists[0].adapter), model)
    nats, count = part.nats(ask("two"), "three")
    prompt, response = model.render(ask("two")), model.response_tokens("three")
    with torch.inference_mode():
        logits = model.with_adapter(specialists[0].adapter)(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(response), reduction="sum")
    assert (nats, count) == (pytest.approx(float(expected), abs=1e-3), len(response))


# Refusals

REFUSED = {
    "no larger model": (lambda: Wish(Strategy.PROXY), "larger model"),
    "no specialist": (lambda: Wish(Strategy.SINGLE, specialists=0), "needs a specialist"),
    "a mixture of one": (lambda: Wish(Strategy.MIXTURE), "two specialists or more"),
    "a proxy of two": (lambda: Wish(Strategy.PROXY, larger=True, specialists=2), "one specialist"),
    "a cascade without a threshold": (lambda: Wish(Strategy.CASCADE, larger=True), "confidence"),
    "a threshold above zero": (lambda: Wish(Strategy.CASCADE, larger=True, tau=0.5), "0 or less"),
    "a threshold that is no number": (lambda: Wish(Strategy.CASCADE, larger=True, tau=float("nan")), "0 or less"),
    "a negative strength": (lambda: Wish(Strategy.PROXY, larger=True, alpha=-1.0), "--alpha"),
    "proxy and speculative": (lambda: parse_strategy("proxy+speculative"), "cannot be combined"),
    "two others": (lambda: parse_strategy("single,mixture"), "cannot be combined"),
    "a word": (lambda: parse_strategy("magic"), "expected one of"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(make, reason):
    with pytest.raises(UsageError, match=reason):
        make()


def test_two_tokenizers_are_refused_before_anything_is_loaded(folders, model, specialists, monkeypatch):
    for strategy in (Strategy.PROXY, Strategy.SPECULATIVE):
        foreign = BaseModel.open(folders["foreign"])
        with pytest.raises(UsageError, match="one tokenizer"):
            assemble(Wish(strategy, larger=True), model, specialists[:1], larger=foreign)
        with monkeypatch.context() as patch:
            patch.setattr(BaseModel, "open", None)
            with pytest.raises(UsageError, match="one tokenizer"):
                check_directories(strategy, folders["base"], folders["foreign"])
            check_directories(strategy, folders["base"], folders["larger"])
    check_directories(Strategy.CASCADE, folders["base"], folders["foreign"])


def test_a_larger_model_that_is_not_there_is_refused(folders, tmp_path):
    with pytest.raises(UsageError, match="no directory"):
        check_directories(Strategy.CASCADE, folders["base"], tmp_path / "missing")


def test_an_adapter_for_another_model_is_refused(larger, specialists):
    with pytest.raises(InvalidAdapter, match="expected one for base model"):
        assemble(Wish(Strategy.SINGLE), larger, specialists[:1])


def test_a_prompt_longer_than_the_context_is_refused(model, specialists):
    assistant = assemble(Wish(Strategy.SINGLE), model, specialists[:1])
    with pytest.raises(UsageError, match="prompt: expected at most"):
        assistant.answer(ask("x" * 300), LIMIT)


def test_nothing_leaves_refuses_a_market_and_what_was_not_pulled(tmp_path):
    for names, market in ((("notes",), "127.0.0.1:1"), ((), None), (("notes",), None)):
        with pytest.raises(UsageError, match="--nothing-leaves"):
            check_nothing_leaves(names, tmp_path, market)


# Calibration


def test_the_threshold_is_the_best_of_all(model):
    random = np.random.default_rng(5)
    for _ in range(50):
        seen = [(-float(c), float(a), float(b)) for c, a, b in random.random((9, 3))]

        def loss(tau: float, seen=seen) -> float:
            return sum(own if confidence >= tau else other for confidence, own, other in seen)

        found = threshold(seen)
        assert found <= 0
        assert loss(found) == pytest.approx(min(loss(tau) for tau in (-9.0, 0.0, *(c + 1e-9 for c, _, _ in seen))))


def test_a_larger_model_that_never_helps_is_never_asked():
    assert threshold([(-0.5, 1.0, 2.0), (-0.1, 1.0, 1.0)]) < -0.5


def test_the_strength_is_the_best_of_the_grid(model, larger, specialists):
    pairs = [Pair("two", "three"), Pair("name", "colour")]
    voices = Voice(model, specialists[0].adapter), Voice(model), Voice(larger)
    found = calibrate_alpha(pairs, model, *voices, silent)

    def loss(alpha: float) -> float:
        part = Part(Steered(voices[2], voices[0], voices[1], alpha), larger)
        return sum(nats / tokens for nats, tokens in (part.nats(ask(pair.prompt), pair.response) for pair in pairs))

    assert loss(found) == pytest.approx(min(loss(alpha) for alpha in ALPHAS), abs=1e-4)


def test_a_confidence_is_calibrated_on_the_specialists_own_answers(model, larger, specialists):
    part = Part(Voice(model, specialists[0].adapter), model)
    pairs = [Pair("two", part.model.text_of([s.token for s in part.steps(ask("two"), 8) if s.token != model.end]))]
    tau = calibrate_tau(pairs, part, Part(Voice(larger), larger), 8, silent)
    steps: list[Step] = list(part.steps(ask("two"), 8))
    assert sum(step.log_probability for step in steps) / len(steps) >= tau  # its own answer is its most probable one


def test_no_record_is_calibrated_on_and_scored():
    pairs = [Pair("a", "b"), Pair("c", "d"), Pair("a", "b"), Pair("e", "f"), Pair("c", "d")]
    calibration, scored = halves(pairs)
    assert not set(calibration) & set(scored)
    assert len(calibration) + len(scored) == len(pairs)


def test_a_validation_file_needs_responses_and_two_records():
    from nodes.records import Prompt

    with pytest.raises(RecordError, match="at least 2 records, got 1"):
        answered([Pair("a", "b")], "mine.jsonl", 2)
    with pytest.raises(RecordError, match="a prompt and a response"):
        answered([Pair("a", "b"), Prompt("c")], "mine.jsonl", 2)


def test_mixing_knows_two_ways():
    assert sorted(Mixing) == ["merge", "outputs"]
