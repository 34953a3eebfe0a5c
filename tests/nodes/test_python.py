"""Owner and querier in Python: the path that the command line takes, against a real market."""

import ast
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nodes
from nodes import Budget, Market, Owner, Policy, Published, Querier, Recipe, Strategy, Way, read_records
from nodes.base_model import BaseModel
from nodes.command import build
from nodes.known_market import remember
from protocol.admission import AdmissionPolicy
from protocol.errors import NotAdmitted, NotFound, UsageError
from protocol.privacy import Guarantee, PrivacyUnit
from tests.market_node.market import running_market
from tests.nodes.owners import tiny_map, write_records

ONE = Guarantee(1.0, 1e-6)
STEPS = Recipe(rank=2, max_steps=2)


@dataclass
class World:
    """A market where an owner has published `wool`."""

    root: Path
    market: Market
    owner: Owner
    published: Published
    tiny: dict[str, Any]  # what names the tiny model and its map


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_directory):
    root = tmp_path_factory.mktemp("python")
    feature_map = tiny_map(BaseModel.open(tiny_model_directory))
    (root / "tiny.map").write_bytes(feature_map.manifest)
    tiny = {"feature_map": str(root / "tiny.map"), "base": tiny_model_directory}
    with running_market(root / "market", feature_map) as (address, ca, _):
        market = Market(address, ca, root / "owner")
        owner = Owner(write_records(root / "wool.jsonl", 120), home=root / "owner", recipe=STEPS, **tiny)
        yield World(root, market, owner, owner.publish(market, ONE), tiny)


def test_a_plan_costs_nothing_and_a_release_what_was_planned(world):
    assert world.published.release.title.startswith("wool@")
    assert world.published.receipt_file.read_bytes() == world.published.receipt.to_bytes()
    assert world.published.price.spent == pytest.approx(1.0, abs=1e-3)
    again = world.owner.plan(ONE)
    assert (again.stored, again.price.spent) == (True, world.published.price.spent)
    fresh = Owner(world.root / "wool.jsonl", home=world.root / "another-home", recipe=None, **world.tiny)
    assert (fresh.plan(ONE).price.spent, fresh.plan(ONE).stored) == (0.0, False)


def test_the_command_line_sends_the_bytes_that_python_paid_for(world, capsys):
    words = ["--market", world.market.address, "--ca", str(world.market.ca)]
    words += ["--base", str(world.tiny["base"]), "--map", world.tiny["feature_map"]]
    bare = Owner(world.root / "wool.jsonl", home=world.root / "owner", recipe=None, **world.tiny).publish(world.market, ONE)
    build(None)(
        ["node", "publish", "--home", str(world.root / "owner"), "--data", str(world.root / "wool.jsonl"), "--no-train", "--json", *words],
        standalone_mode=False,
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["release_id"], shown["stored_bytes_sent_again"]) == (bare.release.release_id.hex(), True)
    assert shown["spent"] == pytest.approx(bare.price.spent)


def test_a_market_that_would_refuse_is_known_before_anything_is_charged(world, tmp_path, tiny_model_directory):
    feature_map = tiny_map(BaseModel.open(tiny_model_directory))
    owner = Owner(world.root / "wool.jsonl", home=tmp_path / "owner", recipe=None, **world.tiny)
    with running_market(tmp_path / "strict", feature_map, policy=AdmissionPolicy(largest_epsilon=0.5)) as (address, ca, _):
        with pytest.raises(NotAdmitted):
            owner.publish(Market(address, ca, tmp_path / "owner"), ONE)
    assert owner.plan(ONE).price.spent == 0.0
    warned = []
    with running_market(tmp_path / "large", feature_map, policy=AdmissionPolicy(smallest_count=110)) as (address, ca, _):
        with suppress(NotAdmitted):  # noise decides: of 120 records it leaves fewer than 110 in one of four releases
            owner.publish(Market(address, ca, tmp_path / "owner"), ONE, on_warning=warned.append)
    assert len(warned) == 1
    assert "may be below this market's 110" in warned[0]


def test_limits_and_unit_are_the_owners(world, tmp_path):
    data = tmp_path / "persons.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}", "response": "x", "person": f"p{i % 40}"}) + "\n" for i in range(80)))
    policy = Policy(Budget(2.0, 1e-6), population="ward-3", unit=PrivacyUnit("person"))
    plan = Owner(data, home=tmp_path, policy=policy, recipe=None, **world.tiny).plan(ONE)
    assert (plan.records, plan.units, plan.price.limit) == (80, 40, 2.0)
    assert plan.release.specification.guarantee.unit == PrivacyUnit("person")


def test_a_querier_finds_pulls_and_asks(world):
    querier = Querier(Market(world.market.address, world.market.ca, world.root / "querier"), **world.tiny)
    task = read_records(world.root / "wool.jsonl", 24)
    search = querier.find(task, way=Way.CHEAPER)
    assert search.way is Way.MIRROR  # of a handful of releases
    assert world.published.release.title in search.titles
    assert (search.why_not == "") == (search.verdict == "match")
    stored = querier.pull(world.published.release.title)
    assert stored.release.release_id == world.published.release.release_id
    answer = querier.ask("number 3 of wool", learnwares=[world.published.release.title], tokens=4)
    assert (answer.answered_by, answer.tokens <= 4) == (world.published.release.title, True)
    # What was pulled answers without a market, and says so.
    alone = Querier(home=world.root / "querier", **world.tiny).ask("number 3 of wool", learnwares=[world.published.release.title], tokens=4)
    assert (alone.text, alone.left_site) == (answer.text, ())


def test_where_one_specialist_is_left_of_a_mixture_it_answers_alone(world):
    querier = Querier(Market(world.market.address, world.market.ca, world.root / "querier"), **world.tiny)
    task = read_records(world.root / "wool.jsonl", 24)
    assistant = querier.assistant(Strategy.MIXTURE, task=task, tries=0)
    assert (assistant.strategy, assistant.outcome.answered_by) == (Strategy.SINGLE, world.published.release.title)


def test_the_market_of_a_home_needs_no_address(tmp_path):
    with pytest.raises(UsageError, match="knows no market"):
        Market.known(tmp_path)
    remember(tmp_path, "market.example:7443", bytes(32))
    assert Market.known(tmp_path) == Market("market.example:7443", tmp_path / "market-ca.crt", tmp_path)


def test_what_cannot_work_is_refused_before_a_model_is_loaded(tmp_path):
    nowhere = Querier(home=tmp_path, base=tmp_path / "no-model")
    with pytest.raises(UsageError, match="expected a market"):
        nowhere.find(tmp_path / "task.jsonl")
    with pytest.raises(UsageError, match="no specialist is named"):
        nowhere.ask("hello")
    with pytest.raises(NotFound, match="not pulled yet"):
        nowhere.ask("hello", learnwares=["wool@00112233"])
    with pytest.raises(UsageError, match="--device"):
        Querier(home=tmp_path, device="abacus")


def test_what_type_checkers_read_is_what_is_loaded():
    read = [node for node in ast.walk(ast.parse(Path(nodes.__file__).read_text())) if isinstance(node, ast.ImportFrom)]
    assert {one.names[0].name: one.module.removeprefix("nodes.") for one in read if one.module.startswith("nodes.")} == nodes._HOME


def test_every_public_name_is_there_and_explains_itself():
    for name in nodes.__all__:
        assert getattr(nodes, name).__doc__, name
    with pytest.raises(AttributeError):
        nodes.Frobnicator  # noqa: B018
