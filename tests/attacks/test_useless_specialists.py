"""A specification that wins the ranking, with an adapter that makes the model worse: who believes the score is worse off than before.

The forger has seen texts of the task, leaves the noise out and claims more records than it has: all of that passes admission
(test_forged_specifications.py).  Its adapter is the honest one turned round.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from nodes.adapter import Adapter
from nodes.base_model import BaseModel
from nodes.command import build
from nodes.finetune import Recipe, finetune
from nodes.learnwares import local_learnware
from nodes.market_client import MarketClient
from nodes.places import places
from nodes.query import find_in_mirror, sketch_task
from nodes.records import Pair, Prompt
from nodes.reuse.choice import Choice, _mixed, matched
from nodes.reuse.decoding import Voice
from nodes.reuse.strategies import Mixing, Part, Specialist, Strategy, Wish
from nodes.reuse.trial import MOST_RECORDS, triable, tried
from protocol.admission import AdmissionPolicy
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.release import AdapterReference, Card, Release, sign_release
from protocol.specification import COUNT_STEP, Specification, estimate, quantise
from protocol.window import ALWAYS
from tests.market_node.market import running_market
from tests.nodes.owners import LAYER, SPLIT, tiny_map

ONE = Guarantee(1.0, 1e-6)
COUNT = 60  # so few that the forged one comes first whatever the noise of the honest ones
ANY_COUNT = AdmissionPolicy(smallest_count=None)
OWNED = [Pair(f"question {i} of {i * 7}", "yes " * (1 + i % 4)) for i in range(24)]
TASK = [Pair(f"question {i} of {i * 5}", "yes " * (1 + i % 4)) for i in range(100, 108)]
UNSAID = [Pair(f"question {i} of {i * 3}", "yes " * (1 + i % 4)) for i in range(200, 208)]  # what the querier will ask afterwards


def wide_map(model: BaseModel):
    """Return the tiny map for a world whose tasks lie far apart, so that eight texts give a verdict with room to spare."""
    made = tiny_map(model)
    constants = replace(made.full, between=3.0)
    return replace(made, full=constants, prompt_only=constants)


def silent(what: str, done: int, of: int) -> None:
    pass


@dataclass
class World:
    model: BaseModel
    good: Adapter
    bad: Adapter
    features: np.ndarray

    def release(self, name: str, key: Ed25519PrivateKey, specification: Specification, adapter: Adapter) -> Release:
        reference = AdapterReference(bytes.fromhex(adapter.digest), len(adapter.to_bytes()))
        return Release(
            key.public_key().public_bytes_raw(), 1, b"", bytes.fromhex(self.model.model_id), specification, reference, Card(name), False,
            ALWAYS,
        )  # fmt: skip

    def honest(self) -> Specification:
        rows = np.repeat(self.features, -(-COUNT // len(self.features)), axis=0)[:COUNT]
        return estimate(quantise(rows), wide_map(self.model).map_id, ONE, operating_system())

    def forged(self, of: Specification) -> Specification:
        sums = np.rint(np.concatenate([[COUNT_STEP], 4096 * self.features.mean(axis=0)]) * 100 * COUNT).astype(np.int32)
        return replace(of, noisy_sums=sums)

    def loss(self, adapter: Adapter | None, pairs: list[Pair]) -> float:
        part = Part(Voice(self.model, adapter), self.model)
        return float(np.mean([nats / n for nats, n in (part.nats([("user", one.prompt)], one.response) for one in pairs)]))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny models: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tiny_model_directory) -> World:
    model = BaseModel.open(tiny_model_directory, torch.float32)
    embeddings, activations = model.prefix_pass(OWNED, split=SPLIT, layer=LAYER)
    good = finetune(model, activations, Recipe(epochs=3, batch=4, learning_rate=1e-2))
    turned = {name: -array if ".lora_B." in name else array for name, array in good.tensors.items()}
    return World(model, good, replace(good, tensors=turned), wide_map(model)(embeddings))


@pytest.fixture
def market(tmp_path, world):
    """A market with one honest owner, one forger who comes first in the ranking, and one whose adapter never arrives."""
    feature_map = wide_map(world.model)
    with (
        running_market(tmp_path / "market", feature_map, policy=ANY_COUNT) as (address, ca, _),
        MarketClient(address, ca, tmp_path / "querier") as client,
    ):

        def publish(name: str, specification: Specification, adapter: Adapter, upload: bool = True) -> None:
            key = Ed25519PrivateKey.generate()
            release = world.release(name, key, specification, adapter)
            client.publish(sign_release(release, key))
            if upload:
                client.upload_adapter(release.adapter, adapter.to_bytes())

        honest = world.honest()
        publish("honest", honest, world.good)
        publish("forged", world.forged(honest), world.bad)
        publish("absent", world.honest(), replace(world.bad, alpha=world.bad.alpha * 2), upload=False)
        yield tmp_path / "querier", client, feature_map, address, ca


def name_of(choice: Choice) -> list[str]:
    return [one.title.split("@")[0] for one in choice.specialists]


def choose(world: World, market, tries: int) -> Choice:
    home, client, feature_map, *_ = market
    choice = matched(TASK, world.model, home, client, feature_map, tries=tries)
    return tried(Wish(Strategy.SINGLE), world.model, choice, triable(TASK), silent) if tries > 1 else choice


def test_by_its_score_alone_the_forged_one_is_taken_and_does_worse_than_the_base_model(world, market):
    """Control: without a trial the lie pays."""
    choice = choose(world, market, tries=1)
    assert name_of(choice) == ["forged"]
    assert world.loss(choice.specialists[0].adapter, UNSAID) > world.loss(None, UNSAID) + 0.5


def test_tried_on_the_queriers_records_the_forged_one_is_left(world, market):
    choice = choose(world, market, tries=3)
    assert name_of(choice) == ["honest"]
    assert world.loss(choice.specialists[0].adapter, UNSAID) < world.loss(None, UNSAID) - 0.5
    assert f"on {len(TASK)} of your records" in choice.why


def test_a_mixture_is_of_what_matches_and_of_all_that_is_near_only_where_nothing_does(world):
    feature_map = wide_map(world.model)
    sketch = sketch_task(TASK, world.model, feature_map)
    few, many = world.honest(), estimate(quantise(np.tile(world.features, (20, 1))), feature_map.map_id, ONE, operating_system())
    weights, why = _mixed([few, many, world.honest()], [True, True, False], sketch, feature_map)
    assert weights[2] == 0
    assert weights[1] > 2 * weights[0] > 0, "480 records against 60, as far as the noise lets them be known"
    assert "match" in why
    nearest, why = _mixed([few, many, world.honest()], [False] * 3, sketch, feature_map)
    assert (len(nearest), sum(nearest)) == (3, pytest.approx(1))
    assert "match" not in why
    assert _mixed([few, many], [True, False], sketch, feature_map)[0] == [1, 0]


def test_an_adapter_that_never_arrives_keeps_nobody_from_being_tried(market, world):
    home, client, feature_map, *_ = market
    task = sketch_task(TASK, world.model, feature_map)
    ranking = find_in_mirror(task, client, feature_map).ranking
    assert len(ranking.matches) == len(places(find_in_mirror(task, client, feature_map), 9).matches) == 3
    assert name_of(matched(TASK, world.model, home, client, feature_map, tries=3)) == ["forged", "honest"]


def test_where_every_place_is_taken_by_liars_the_base_model_answers(world):
    bad = Specialist("bad@00000000", world.bad)
    for wish, several in ((Wish(Strategy.SINGLE), [bad]), (Wish(Strategy.MIXTURE, specialists=2, mixing=Mixing.OUTPUTS), [bad, bad])):
        shares = tuple(1 / len(several) for _ in several)
        choice = tried(wish, world.model, Choice(tuple(several), shares, "the best", ("told",)), TASK, silent)
        assert (choice.specialists, choice.left_site) == ((), ("told",))
        assert "the base model lost" in choice.why


def test_an_adapter_whose_loss_is_no_number_is_never_chosen(world):
    huge = {name: array * np.float32(1e30) for name, array in world.bad.tensors.items()}
    broken = Specialist("broken@00000000", replace(world.bad, tensors=huge))
    good = Specialist("good@00000001", world.good)
    for several in ([broken, good], [good, broken]):
        choice = tried(Wish(Strategy.SINGLE), world.model, Choice(tuple(several), (0.5, 0.5), "the best"), TASK, silent)
        assert name_of(choice) == ["good"]
    assert not tried(Wish(Strategy.SINGLE), world.model, Choice((broken,), (1.0,), "the best"), TASK, silent).specialists


def test_the_choice_never_does_worse_on_what_was_tried_than_the_base_model(world):
    """For any adapters: here random multiples of the honest one, some of which harm."""
    rng = np.random.default_rng(5)
    for _ in range(3):
        factors = rng.normal(0, 1.5, 3).astype(np.float32)
        several = [
            replace(world.good, tensors={name: array * f if ".lora_B." in name else array for name, array in world.good.tensors.items()})
            for f in factors
        ]
        choice = tried(
            Wish(Strategy.SINGLE), world.model,
            Choice(tuple(Specialist(f"a@{i}", one) for i, one in enumerate(several)), (1 / 3,) * 3, "the best"), TASK, silent,
        )  # fmt: skip
        losses = [world.loss(None, TASK), *(world.loss(one, TASK) for one in several)]
        taken = choice.specialists[0].adapter if choice.specialists else None
        assert world.loss(taken, TASK) == pytest.approx(min(losses), abs=1e-6)


def test_what_cannot_be_tried_says_so():
    assert triable([*TASK, Prompt("without a response")]) == []
    assert triable([]) == []
    many = [Pair(str(i % 50), "x") for i in range(200)]
    assert triable(many) == many[:MOST_RECORDS]


def test_the_command_tries_before_it_answers(world, market, tmp_path, tiny_model_directory):
    home, _, feature_map, address, ca = market
    (tmp_path / "tiny.map").write_bytes(feature_map.manifest)
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"prompt": one.prompt, "response": one.response}) + "\n" for one in TASK))

    def ask(*words: str) -> dict:
        words = ("ask", UNSAID[0].prompt, *words, "--map", str(tmp_path / "tiny.map"), "--base", str(tiny_model_directory))
        done = CliRunner().invoke(build(None), [*words, "--home", str(home), "--device", "cpu", "--tokens", "4", "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    found = ("--task", str(task), "--market", address, "--ca", str(ca))
    believed = ask(*found, "--try", "0")
    assert believed["answered_by"].startswith("forged")
    assert "not tried" in believed["why"]
    assert ask(*found)["answered_by"].startswith("honest")
    one = local_learnware("forged", Path(home))
    named = ask("-m", one.release.title, "--validation", str(task))
    assert (named["answered_by"], named["strategy"], named["learnware"]) == ("base", "base", [])
