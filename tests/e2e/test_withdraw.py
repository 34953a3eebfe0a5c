"""`node withdraw`, `node rotate-key` and `market revoke` as their users run them, against a market that takes members alone."""

import json
from pathlib import Path

import pytest

from nodes.market_client import MarketClient
from nodes.populations import folder_of
from protocol.errors import NotFound, Unauthorised
from protocol.keys import signing_key
from protocol.release import open_envelope
from tests.e2e.processes import market_process, veilmart
from tests.protocol.worlds import envelope_of, small_map

pytestmark = pytest.mark.slow
MAP = small_map()


def test_an_owner_withdraws_rotates_and_is_revoked(tmp_path):
    which_map, home, operator = tmp_path / "small.map", tmp_path / "owner", tmp_path / "operator"
    which_map.write_bytes(MAP.manifest)
    with market_process(operator, options=("--map", str(which_map))) as (started, _):
        address, ca = started["address"], Path(started["ca"])
        market = ("--market", address, "--ca", str(ca))
        invite = tmp_path / "city.invite"
        veilmart("market", "invite", "--org", "City", "-o", str(invite), home=operator)
        veilmart("node", "join", address, "--invite", f"file:{invite}", home=home)
        key_file = folder_of(home, "default") / "owner.key"
        old = signing_key(key_file)
        with MarketClient(address, ca, home) as client:
            first = open_envelope(client.publish(envelope_of(MAP, old, seed=1)).envelope)
            for _ in range(2):  # the second finds it done
                told = json.loads(veilmart("node", "withdraw", first.title, *market, "--map", str(which_map), "--json", home=home))
                assert (told["release_id"], told["index"]) == (first.release_id.hex(), 0)
            assert client.sync(MAP).gone == {first.release_id}
            assert (home / "receipts" / f"{first.release_id.hex()}.withdrawal").is_file()
            # A stranger, with a key of its own.
            signing_key(folder_of(tmp_path / "stranger", "default") / "owner.key")
            second = open_envelope(client.publish(envelope_of(MAP, old, number=2, seed=2)).envelope)
            words = ("node", "withdraw", second.title, *market, "--map", str(which_map))
            veilmart(*words, home=tmp_path / "stranger", code=Unauthorised.exit_code)
            veilmart(*words, home=tmp_path / "nobody", code=NotFound.exit_code)

            told = json.loads(veilmart("node", "rotate-key", *market, "--json", home=home))
            new = signing_key(key_file)
            assert new.public_key().public_bytes_raw().hex() == told["owner"]
            with pytest.raises(Unauthorised):
                client.publish(envelope_of(MAP, old, number=3, seed=3))
            client.publish(envelope_of(MAP, new, number=3, seed=3))
            members = json.loads(veilmart("market", "members", "--json", home=operator))["members"]
            assert [(member["owner"] == told["owner"], bool(member["removed"])) for member in members] == [(False, True), (True, False)]
            assert {member["organisation"] for member in members} == {"City"}

            told = json.loads(veilmart("market", "revoke", told["owner"][:16], "--json", home=operator))
            assert len(told["releases"]) == 3
            assert len(client.sync(MAP).gone) == 3
            assert client.mirror(MAP).releases == ()
            with pytest.raises(Unauthorised):
                client.publish(envelope_of(MAP, new, number=4, seed=4))
            veilmart("node", "rotate-key", *market, home=home, code=Unauthorised.exit_code)
            veilmart("market", "revoke", "0123456789", home=operator, code=NotFound.exit_code)
