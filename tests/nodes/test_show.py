"""What is public about one release is shown without asking for that release."""

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.market_client import MarketClient, names_kept
from protocol.cohort_round import contribution
from protocol.hazmat.noise import operating_system
from protocol.release import sign_release
from protocol.specification import quantise
from protocol.witness import Witness, cosign
from tests.command_line import run
from tests.market_node.local import QuietService
from tests.market_node.market import running_market
from tests.protocol.cohorts import carrier_of, owners, public, release_from
from tests.protocol.worlds import features, release_of, small_map

MAP = small_map()


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    folder = tmp_path_factory.mktemp("market")
    (folder / "small.map").write_bytes(MAP.manifest)
    key = Ed25519PrivateKey.generate()
    releases = [release_of(MAP, key, number=number, seed=number) for number in (1, 2)]
    with running_market(folder / "m", MAP, service_type=QuietService) as (address, ca, _):
        with MarketClient(address, ca, folder / "owner") as client:
            for release in releases:
                client.publish(sign_release(release, key))
        yield ["--market", address, "--ca", str(ca), "--map", str(folder / "small.map")], releases


def test_a_release_is_shown_from_the_catalogue(market, tmp_path, capsys, monkeypatch):
    where, (_, release) = market
    monkeypatch.setattr(MarketClient, "release", lambda *_: pytest.fail("the market would learn which one is looked at"))
    shown = json.loads(run(capsys, "show", release.title, *where, "--json", home=tmp_path).out)
    guarantee = release.specification.guarantee
    assert (shown["schema"], shown["release_id"], shown["position"]) == ("veilmart.show/1", release.release_id.hex(), 1)
    assert (shown["epsilon"], shown["delta"], shown["unit"]) == (guarantee.epsilon, guarantee.delta, str(guarantee.unit))
    assert (shown["stands"], shown["pulled"], shown["adapter_guarantee"]) == (True, None, None)
    assert abs(shown["units_estimated"] - release.specification.count) < 4 * shown["units_std"]
    done = run(capsys, "show", release.title, *where, home=tmp_path)
    assert f"epsilon {guarantee.epsilon:g}" in done.out
    assert run(capsys, "show", "nobody@00000000", *where, home=tmp_path).code == 3


def test_who_signed_is_told_where_the_release_is_here(tmp_path, capsys):
    """A cohort's release names its owners, and the log the witness that this home trusts; the control is a home that trusts nobody."""
    keys, witness = owners(4), Ed25519PrivateKey.generate()
    of = [public(key).hex() for key in keys]
    carrier = carrier_of(
        keys, lambda member: contribution(quantise(features(100, 0)), carrier.cohort, operating_system()),
        map_id=MAP.map_id, base_model=bytes.fromhex(MAP.base_model), dimension=MAP.dimension,
    )  # fmt: skip
    release, publisher = release_from(carrier, keys)
    (tmp_path / "small.map").write_bytes(MAP.manifest)
    with running_market(tmp_path / "m", MAP, service_type=QuietService) as (address, ca, store):
        where = ["--market", address, "--ca", str(ca), "--map", str(tmp_path / "small.map")]

        def shown(command: str, home: str) -> dict:
            return json.loads(run(capsys, command, release.title, *where, "--json", home=tmp_path / home).out)

        with MarketClient(address, ca, tmp_path / "trusting") as client:
            client.publish(sign_release(release, publisher))
            client.describe()
            store.keep_cosigned("w.example", 1, cosign(client.checkpoint_note(), "w.example", witness, int(time.time())))
        (tmp_path / "trusting" / "witnesses").write_text(f"{Witness('w.example', public(witness))}\n")
        assert (shown("show", "trusting")["witnesses"], shown("show", "other")["witnesses"]) == (["w.example"], [])
        assert (shown("show", "trusting")["signers"], shown("show", "other")["signers"]) == (None, None), "nothing was asked for"
        with MarketClient(address, ca, tmp_path / "other") as client:
            client.mirror(MAP)
        assert shown("show", "other")["signers"] == shown("pull", "trusting")["signers"] == shown("show", "trusting")["signers"] == of
        said = run(capsys, "show", release.title, *where, home=tmp_path / "trusting").out
        assert "signed by      4 owners, who released it together" in said
        assert "witnessed by   w.example" in said


def test_what_was_synced_is_completed(market, tmp_path, capsys):
    where, releases = market
    assert list(names_kept(tmp_path)) == []
    run(capsys, "show", releases[0].title, *where, home=tmp_path)
    assert list(names_kept(tmp_path)) == [release.title for release in releases]
