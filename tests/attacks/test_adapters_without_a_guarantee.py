"""An adapter that says "none" tells who was in its data: a market may ask for a guarantee, and then takes none of them."""

import hashlib
from dataclasses import replace

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.adapter import Adapter
from nodes.audit.training import Side, membership
from nodes.base_model import BaseModel
from nodes.finetune import Recipe, finetune
from nodes.learnwares import fetch_release, pull_learnware
from nodes.market_client import MarketClient
from nodes.owner import require_welcome
from nodes.private_training import PrivateRecipe
from protocol.admission import AdmissionPolicy
from protocol.catalogue import scalars_of
from protocol.errors import NotAdmitted, UsageError
from protocol.hazmat.noise import operating_system
from protocol.privacy import NOT_PRIVATE, Guarantee
from protocol.release import AdapterReference, Card, Release, sign_release
from protocol.specification import estimate, quantise
from protocol.window import ALWAYS
from tests.market_node.market import running_market
from tests.nodes.owners import SPLIT, make_guard, tiny_map, write_records
from tests.nodes.test_audit_training import RECORDS
from tests.protocol.test_admission import promise
from tests.protocol.worlds import ADAPTER, features

PRIVATE_ONLY = AdmissionPolicy(largest_adapter_epsilon=8.0)


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory, torch.float32)


@pytest.fixture(scope="module")
def activations(model):
    return model.prefix_pass(RECORDS[:40], split=SPLIT, layer=2)[1]


@pytest.fixture(scope="module")
def learnt_by_heart(model, activations) -> Adapter:
    return finetune(model, activations[::2], Recipe(epochs=20, max_steps=100, rank=8, learning_rate=1e-2))


def signed(model: BaseModel, reference: AdapterReference) -> tuple[Release, bytes]:
    key, feature_map = Ed25519PrivateKey.generate(), tiny_map(model)
    sums = estimate(quantise(features(300, 1, feature_map.dimension)), feature_map.map_id, Guarantee(1.0, 1e-6), operating_system())
    owner = key.public_key().public_bytes_raw()
    release = Release(owner, 1, b"", bytes.fromhex(model.model_id), sums, reference, Card("notes"), False, ALWAYS)
    return release, sign_release(release, key)


def tells_members(adapter: Adapter, model: BaseModel, activations) -> bool:
    return membership(adapter, model, Side(activations[::2]), Side(activations[1::2])).leaks


def test_a_market_that_asks_for_a_guarantee_takes_no_adapter_without_one(tmp_path, model):
    feature_map = tiny_map(model)
    with (
        running_market(tmp_path / "market", feature_map, policy=PRIVATE_ONLY) as (address, ca, store),
        MarketClient(address, ca, tmp_path / "querier") as client,
    ):
        assert client.describe().admission == PRIVATE_ONLY
        for reference in (ADAPTER, replace(ADAPTER, guarantee=promise(9.0))):
            with pytest.raises(NotAdmitted, match="adapter"):
                client.publish(signed(model, reference)[1])
        assert store.head().size == 0
        client.publish(signed(model, replace(ADAPTER, guarantee=promise(8.0)))[1])
        client.publish(signed(model, None)[1])
        assert store.head().size == 2


def test_a_market_without_that_policy_hands_out_what_tells_members(tmp_path, model, activations, learnt_by_heart):
    """Control: the exploit, from publishing to telling who was in the data."""
    data, feature_map = learnt_by_heart.to_bytes(), tiny_map(model)
    release, envelope = signed(model, AdapterReference(hashlib.sha256(data).digest(), len(data)))
    with (
        running_market(tmp_path / "market", feature_map) as (address, ca, _),
        MarketClient(address, ca, tmp_path / "querier") as client,
    ):
        client.publish(envelope)
        client.upload_adapter(release.adapter, data)
        pulled = pull_learnware("notes", client, tmp_path / "querier", feature_map)
    assert tells_members(pulled.load_adapter(model.model_id), model, activations)


def test_what_a_market_holds_against_its_own_policy_is_neither_ranked_nor_pulled(tmp_path, model):
    feature_map = tiny_map(model)
    release, envelope = signed(model, ADAPTER)
    with (
        running_market(tmp_path / "market", feature_map, policy=PRIVATE_ONLY) as (address, ca, store),
        MarketClient(address, ca, tmp_path / "querier") as client,
    ):
        store.append(release, envelope, scalars_of(release, feature_map))
        mirror = client.mirror(feature_map)
        assert (mirror.releases, mirror.refused) == ((), (release.release_id,))
        with pytest.raises(NotAdmitted, match="adapter"):
            fetch_release("notes", client, feature_map)


def test_an_owner_is_told_before_anything_is_trained_or_charged(tmp_path, model):
    from nodes.guard import Order

    data = write_records(tmp_path / "notes.jsonl", 120)
    guard = make_guard(tmp_path / "home", data, model, recipe=Recipe(max_steps=2))
    plan = guard.plan(Order(Guarantee(1.0, 1e-6)))
    assert plan.adapter_guarantee == NOT_PRIVATE
    with pytest.raises(NotAdmitted, match="adapter") as caught:
        require_welcome(plan, PRIVATE_ONLY)
    assert "--epsilon-adapter" in caught.value.hint
    require_welcome(plan, AdmissionPolicy())


def test_an_owner_who_asks_for_a_guarantee_trains_nothing_without_one(tmp_path, model):
    from nodes.guard import Policy

    data, strict = write_records(tmp_path / "notes.jsonl", 40), Policy(largest_adapter_epsilon=8.0)
    for recipe in (Recipe(max_steps=2), PrivateRecipe(Guarantee(9.0, 1e-6))):
        with pytest.raises(UsageError, match="policy asks for a guarantee"):
            make_guard(tmp_path / "home", data, model, policy=strict, recipe=recipe)
    assert not (tmp_path / "home").exists(), "neither trained nor charged, and no ledger begun"
    make_guard(tmp_path / "kept", data, model, policy=strict, recipe=PrivateRecipe(Guarantee(8.0, 1e-6)))
    make_guard(tmp_path / "alone", data, model, policy=strict)
    make_guard(tmp_path / "any", data, model, policy=Policy(), recipe=Recipe(max_steps=2))  # the control
