"""A signed release that says other things of its adapter than the adapter does: another base model, a guarantee that was never kept."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes import learnwares
from nodes.learnwares import pull_learnware
from nodes.market_client import MarketClient
from protocol.adapter import FRAMES, LLAMA, Adapter
from protocol.errors import InvalidAdapter
from protocol.features import default_map
from protocol.privacy import NOT_PRIVATE
from protocol.release import AdapterReference, sign_release
from tests.market_node.market import TakesAnything, running_market
from tests.protocol.test_admission import promise
from tests.protocol.worlds import adapter_bytes, release_of, small_map

MAP = small_map()
DATA = adapter_bytes()  # for the map's base model, without a guarantee
TRUE = AdapterReference(hashlib.sha256(DATA).digest(), len(DATA), NOT_PRIVATE)
LIES = {
    "a guarantee that was never kept": {"adapter": replace(TRUE, guarantee=promise(2.0))},
    "another base model": {"base_model": b"\xcd" * 32},
}
ANOTHER_SIZE = {"adapter": replace(TRUE, size_bytes=len(DATA) + 1)}


def signed(**lie) -> bytes:
    key = Ed25519PrivateKey.generate()
    return sign_release(replace(release_of(MAP, key, adapter=TRUE), **lie), key)


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        yield client, store


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_adapter_is_taken_only_as_its_release_describes_it(market, lie):
    client, store = market
    client.publish(signed(**lie))
    with pytest.raises(InvalidAdapter, match="expected"):
        client.upload_adapter(TRUE, DATA)
    assert not list(store._adapters.iterdir())


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_release_is_taken_only_as_the_adapter_that_is_there_bears_it_out(market, lie):
    client, store = market
    client.upload_adapter(TRUE, DATA)
    with pytest.raises(InvalidAdapter, match="expected"):
        client.publish(signed(**lie))
    assert store.head().size == 0
    client.publish(signed())


def test_who_names_somebody_elses_adapter_keeps_nobody_from_handing_it_in(market):
    """Its digest is public where it was published first; at another market a stranger may say anything of it, and be there before."""
    client, store = market
    for lie in (*LIES.values(), ANOTHER_SIZE):
        client.publish(signed(**lie))
    client.publish(signed())
    client.upload_adapter(TRUE, DATA)
    assert store.has_adapter(TRUE.digest)
    for lie in (*LIES.values(), ANOTHER_SIZE):  # from now on the file tells
        with pytest.raises(InvalidAdapter, match="as its release says"):
            client.publish(signed(**lie))
    client.publish(signed())


def test_a_market_that_comes_up_again_looks_at_the_file_again(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.upload_adapter(TRUE, DATA)
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        with pytest.raises(InvalidAdapter, match="as its release says"):
            client.publish(signed(**LIES["another base model"]))
        client.publish(signed())


def test_bytes_of_another_size_than_the_release_says_are_refused_before_they_are_read(market):
    client, _ = market
    client.publish(signed(**ANOTHER_SIZE))
    with pytest.raises(InvalidAdapter, match=f"got {len(DATA)} bytes"):
        client.upload_adapter(TRUE, DATA)


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_market_that_compares_nothing_hands_them_on_and_a_client_keeps_none(tmp_path, monkeypatch, lie):
    """Control, and the client's own look: `pull` compares again."""
    with (
        running_market(tmp_path / "m", MAP, service_type=TakesAnything) as (address, ca, store),
        MarketClient(address, ca, tmp_path / "home") as client,
    ):
        client.publish(signed(**lie))
        client.upload_adapter(TRUE, DATA)
        assert store.has_adapter(TRUE.digest)
        with pytest.raises(InvalidAdapter, match="expected"):
            pull_learnware("owner-0", client, tmp_path / "home", MAP)
        assert not (tmp_path / "home" / "learnwares").exists()
        monkeypatch.setattr(learnwares, "check_adapter", lambda data, *said: None)  # a client that compares nothing either
        assert pull_learnware("owner-0", client, tmp_path / "home", MAP).adapter.read_bytes() == DATA


# Layers and widths -------------------------------------------------------------------------------------------------------


(IDENTITY,) = FRAMES
WIDTHS = FRAMES[IDENTITY].widths


def made_for(base_model: str, layer: int, widths: tuple[int, ...] = WIDTHS) -> bytes:
    width_of = {place: width for group, width in zip(LLAMA.same_width, widths, strict=True) for place in group}
    tensors = {
        LLAMA.tensor_name(layer, module, side): np.zeros((1, width) if side == "A" else (width, 1), np.float32)
        for (module, side), width in width_of.items()
    }
    return Adapter(tensors, base_model, 1, 1, layer, layer).to_bytes()


def test_the_frame_that_is_known_is_that_of_the_maps_base_model():
    assert default_map().base_model == IDENTITY


def test_the_frame_that_is_known_is_that_of_the_model(slm_directory):
    config = json.loads((slm_directory / "config.json").read_text())
    keys = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    assert FRAMES[IDENTITY].layers == config["num_hidden_layers"]
    assert (config["hidden_size"], config["intermediate_size"], config["hidden_size"], keys) == WIDTHS


@pytest.mark.parametrize(("layer", "widths"), [(30, WIDTHS), (0, (*WIDTHS[:3], 576)), (0, (4, *WIDTHS[1:]))])
def test_layers_and_widths_that_the_base_model_has_not_are_refused(monkeypatch, layer, widths):
    Adapter.from_bytes(made_for(IDENTITY, 29), base_model=IDENTITY)
    data = made_for("ab" * 32, layer, widths)  # nobody knows that one
    with pytest.raises(InvalidAdapter, match="base model has"):
        made_for(IDENTITY, layer, widths)
    monkeypatch.setitem(FRAMES, "ab" * 32, FRAMES[IDENTITY])
    with pytest.raises(InvalidAdapter, match="base model has"):
        Adapter.from_bytes(data, base_model="ab" * 32)
    monkeypatch.delitem(FRAMES, "ab" * 32)
    Adapter.from_bytes(data, base_model="ab" * 32)  # the control: without a frame they pass
