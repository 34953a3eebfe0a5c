"""A matched specialist, from a market to an OpenAI client: every step a process of its own, with the real model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from nodes.demo_texts import generate
from tests.e2e.processes import environment, market_process, veilmart
from tests.e2e.test_two_homes import EPSILON, MARKET, OWNERS, write_task

pytestmark = pytest.mark.slow


def write_larger(base: Path, out: Path) -> Path:
    """Write the base model with six more layers, faint copies of its last: larger, of one tokenizer, and no better at anything."""
    import copy

    import torch
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    extra = [copy.deepcopy(block) for block in llama.model.layers[-6:]]
    for block in extra:
        block.self_attn.o_proj.weight.data *= 0.2
        block.mlp.down_proj.weight.data *= 0.2
    llama.model.layers.extend(extra)
    for number, block in enumerate(llama.model.layers):
        block.self_attn.layer_idx = number
    llama.config.num_hidden_layers = len(llama.model.layers)
    if getattr(llama.config, "layer_types", None):
        llama.config.layer_types = ["full_attention"] * len(llama.model.layers)
    llama.save_pretrained(out)
    shutil.copy(base / "tokenizer.json", out)
    return out


@pytest.fixture(scope="module")
def pulled(tmp_path_factory, slm_directory):
    """Two owners publish; yield the querier's home with what it pulled, the market, the base model and a larger one."""
    root = tmp_path_factory.mktemp("serve")
    base = ("--base", str(slm_directory))
    home = root / "querier"
    with market_process(root / "market-home", options=MARKET) as (started, _):
        market = ("--market", started["address"], "--ca", started["ca"])
        for owner in OWNERS:
            data = write_task(root / f"{owner}.jsonl", owner, "train", 110)
            veilmart("node", "publish", "--data", data, *market, *EPSILON, "--json", *base, home=root / f"home-{owner}")
            veilmart("pull", owner, *market, "--json", home=home)
        yield root, home, market, base, str(write_larger(slm_directory, root / "larger"))


@contextmanager
def serving(home, *words):
    command = [sys.executable, "-m", "nodes.command", "serve", "--port", "0", "--json", *words]
    with (home / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment(home))
        try:
            lines = []
            while not lines or lines[-1] != b"}\n":
                lines.append(process.stdout.readline())
                assert lines[-1], (home / "serve.log").read_text()
            yield json.loads(b"".join(lines))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
            process.stdout.close()


def test_the_public_client_streams_an_answer_of_the_matched_specialist(pulled):
    root, home, market, base, _ = pulled
    task = write_task(root / "task.jsonl", OWNERS[0], "test", 40)
    question = generate(OWNERS[0], 1, "test")[0].prompt
    with serving(home, "--task", task, *market, *base) as told:
        assert told["learnware"].startswith(OWNERS[0])
        token = Path(told["token_file"]).read_text().strip()
        assert os.stat(told["token_file"]).st_mode & 0o077 == 0
        with openai.OpenAI(base_url=told["url"], api_key=token, http_client=httpx.Client(trust_env=False)) as client:
            messages = [{"role": "user", "content": question}]
            chunks = list(client.chat.completions.create(model="veilmart", messages=messages, max_tokens=40, stream=True))
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
        assert len(pieces) > 3
        assert "".join(pieces).startswith("queue=")
    asked = json.loads(veilmart("ask", "-m", OWNERS[0], question, "--tokens", "40", "--json", *base, home=home))
    assert asked["answer"] == "".join(pieces)
    assert question not in (home / "serve.log").read_text()


def test_every_strategy_answers(pulled):
    root, home, _, base, larger = pulled
    task = write_task(root / "validation.jsonl", OWNERS[0], "test", 8)
    question = generate(OWNERS[0], 12, "test")[11].prompt
    one, two = ("-m", OWNERS[0]), ("-m", OWNERS[0], "-m", OWNERS[1])
    both = ("--larger", larger)
    words = {
        "base": (), "larger": both, "single": one, "mixture": (*two, "--task", task), "cascade": (*one, *both, "--tau", "-0.5"),
        "proxy": (*one, *both, "--alpha", "0"), "speculative": (*one, *both),
    }  # fmt: skip
    said = {}
    for strategy, more in words.items():
        common = ("--strategy", strategy, "--tokens", "16", "--nothing-leaves", "--json", *base)
        said[strategy] = json.loads(veilmart("ask", question, *more, *common, home=home))
        assert said[strategy]["strategy"] == strategy
        assert said[strategy]["left_site"] == []
        assert said[strategy]["why"]
    assert said["proxy"]["answer"] == said["speculative"]["answer"] == said["larger"]["answer"]
    assert said["single"]["answer"].startswith("queue=")


def test_strategies_are_compared_and_drawn(pulled):
    root, home, _, base, larger = pulled
    task, html = write_task(root / "mine.jsonl", OWNERS[0], "test", 6), root / "compare.html"
    words = ("compare", "--validation", task, "-m", OWNERS[0], "-m", OWNERS[1], "--larger", larger, "--html", str(html), "--tokens", "16")
    found = json.loads(veilmart(*words, "--json", *base, home=home))
    rows = {row["name"]: row for row in found["strategies"]}
    assert len(rows) == 8
    assert rows["single"]["nats_per_token"] < rows["base"]["nats_per_token"] - 1
    assert rows["speculative"]["nats_per_token"] == pytest.approx(rows["larger"]["nats_per_token"])
    assert html.read_text().startswith("<!doctype html>")


def test_what_cannot_work_ends_with_its_exit_code(pulled, tmp_path):
    _, home, market, base, larger = pulled
    one = ("-m", OWNERS[0], "hello", *base)
    veilmart("ask", *one, "--strategy", "proxy", home=home, code=2)
    veilmart("ask", *one, "--strategy", "proxy+speculative", "--larger", larger, home=home, code=2)
    veilmart("ask", *one, "--strategy", "cascade", "--tau", "-1", "--larger", str(tmp_path / "missing"), home=home, code=2)
    veilmart("ask", *one, "--nothing-leaves", *market, home=home, code=2)
    veilmart("ask", "-m", OWNERS[0], "hello", "--base", larger, home=home, code=7)  # an adapter for another base model
    (tmp_path / "empty.jsonl").write_bytes(b"")
    veilmart("compare", "--validation", str(tmp_path / "empty.jsonl"), "-m", OWNERS[0], *base, home=home, code=2)
    with serving(home, "-m", OWNERS[0], *base) as told:
        port = told["url"].split(":")[2].split("/")[0]
        veilmart("serve", "-m", OWNERS[0], "--port", port, *base, home=home, code=2)
