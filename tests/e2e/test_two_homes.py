"""Owners, market and querier as separate processes with homes of their own, over TLS, with the real model."""

import json
import shutil

import pytest

from nodes.demo_texts import generate
from tests.e2e.processes import market_process, veilmart

pytestmark = pytest.mark.slow
OWNERS = ("bank-letters", "rail-desk")
# Verdicts are asserted here, so the noise must be small against the differences: at epsilon 1 these 110 records would leave them to chance.
EPSILON = ("--epsilon", "8", "--largest-epsilon", "8", "--budget", "16")


MARKET = ("--open", "--largest-epsilon", "8", "--smallest-count", "1")


def write_task(path, name, split, count):
    lines = [json.dumps({"prompt": record.prompt, "response": record.response}) for record in generate(name, count, split)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory, slm_directory):
    """Two owners publish to a market; yield its address, its certificate, and the querier's home."""
    root = tmp_path_factory.mktemp("two-homes")
    base = ("--base", str(slm_directory))
    with market_process(root / "market-home", options=MARKET) as (started, _):
        market = ("--market", started["address"], "--ca", started["ca"])
        for owner in OWNERS:
            data = write_task(root / f"{owner}.jsonl", owner, "train", 110)
            home = root / f"home-{owner}"
            plan = json.loads(veilmart("node", "publish", "--data", data, "--dry-run", "--json", *base, home=home))
            assert plan["spent"] == 0.0
            assert plan["payload"] == "<97 integers, not drawn>"
            done = json.loads(veilmart("node", "publish", "--data", data, *market, *EPSILON, "--json", *base, home=home))
            assert done["epsilon_adapter"] == "none"
            assert done["epsilon_total"] == "unbounded"
            again = json.loads(veilmart("node", "publish", "--data", data, *market, *EPSILON, "--json", *base, home=home))
            assert (again["release_id"], again["spent"]) == (done["release_id"], done["spent"])
        yield root, market, base


@pytest.mark.parametrize("how", [(), ("--mirror",)], ids=["encrypted", "mirror"])
def test_the_right_specialist_is_found(published, how):
    root, market, base = published
    for owner in OWNERS:
        task = write_task(root / f"{owner}-task.jsonl", owner, "test", 40)
        found = json.loads(veilmart("find", task, *market, *base, "--json", *how, home=root / "querier"))
        assert found["verdict"] == "match"
        assert found["matches"][0]["title"].startswith(owner)
        assert found["matching"] == ("mirror" if how else "encrypted")


def test_a_kept_proof_clears_the_market_from_files_alone(published):
    root, market, base = published
    task, home = write_task(root / "proof-task.jsonl", OWNERS[0], "test", 40), root / "querier"
    proof, releases = str(root / "find.proof"), str(root / "market.releases")
    assert json.loads(veilmart("find", task, *market, *base, "--keep-proof", proof, "--json", home=home))["proof"] == proof
    assert json.loads(veilmart("catalogue", "export", "-o", releases, *market, "--json", home=home))["releases"] >= len(OWNERS)
    judged = json.loads(veilmart("verify", "answer", proof, "--releases", releases, "--json", home=root / "auditor"))
    assert judged["finding"] == "honest"
    found = json.loads(veilmart("find", task, *market, *base, "--auto", "--licence", "nobody's", "--json", home=home, code=3))
    assert (found["matching"], found["matches"]) == ("mirror", [])


def test_a_task_that_nobody_has_gets_a_no_and_exit_code_3(published):
    root, market, base = published
    task = write_task(root / "other.jsonl", "shop-sums", "test", 40)
    assert "none" in json.loads(veilmart("find", task, *market, *base, "--json", home=root / "querier", code=3))["verdict"]


def test_a_pulled_specialist_answers_without_the_market(published):
    root, market, base = published
    task = write_task(root / "again.jsonl", OWNERS[0], "test", 40)
    home = root / "querier"
    learnware = json.loads(veilmart("find", task, *market, *base, "--json", home=home))["matches"][0]["title"]
    pulled = json.loads(veilmart("pull", learnware, *market, "--json", home=home))
    assert pulled["adapter_guarantee"] == "none"
    letter = generate(OWNERS[0], 1, "test")[0]
    answer = json.loads(veilmart("ask", "-m", learnware, letter.prompt, "--compare", "--json", *base, home=home))
    assert answer["answer"].startswith("queue=")
    assert not answer["base_answer"].startswith("queue=")


def test_an_adapter_changed_on_disk_is_refused(published):
    root, market, base = published
    home = root / "tampered"
    task = write_task(root / "third.jsonl", OWNERS[1], "test", 40)
    learnware = json.loads(veilmart("find", task, *market, *base, "--json", home=home))["matches"][0]["title"]
    adapter = json.loads(veilmart("pull", learnware, *market, "--json", home=home))["adapter"]
    with open(adapter, "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\xc0\x7f")  # NaN
    veilmart("ask", "-m", learnware, "hello", *base, home=home, code=7)


def test_a_budget_that_is_spent_is_exit_code_5_and_nothing_is_published(published):
    root, market, base = published
    data = write_task(root / "spender.jsonl", "kitchen-cards", "train", 60)
    home = root / "spender"
    words = ("node", "publish", "--data", data, "--no-train", *market, *base)
    veilmart(*words, "--epsilon", "1", "--budget", "1.2", home=home)
    veilmart(*words, "--epsilon", "1.1", "--budget", "1.2", "--json", home=home, code=5)


def test_another_market_with_the_same_address_is_not_believed(published):
    root, market, _ = published
    task = write_task(root / "fourth.jsonl", OWNERS[0], "test", 40)
    with market_process(root / "impostor") as (started, _):
        veilmart("find", task, "--market", started["address"], "--ca", market[3], home=root / "querier", code=7)
    shutil.rmtree(root / "impostor")
