"""The port for members with real processes: an owner joins, its guard answers, is revoked and comes back; queriers notice nothing of it."""

import json
from pathlib import Path

import grpc
import pytest

from nodes.base_model import BaseModel
from nodes.guard import Order
from nodes.market_client import MarketClient
from nodes.membership import FILE, Membership
from protocol.channel import connect
from protocol.errors import GuardUnreachable, Unauthorised
from protocol.privacy import Guarantee
from protocol.release import open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process, veilmart
from tests.nodes.guard_processes import RELAY, guard_process, wait_for, write_policy
from tests.nodes.owners import tiny_map, write_records

pytestmark = pytest.mark.slow


def test_an_owner_joins_publishes_answers_is_revoked_and_comes_back(tmp_path, tiny_model_directory, monkeypatch):
    (tmp_path / "tiny.map").write_bytes(tiny_map(BaseModel.open(tiny_model_directory)).manifest)
    which_map, operator, owner, querier = str(tmp_path / "tiny.map"), tmp_path / "operator", tmp_path / "owner", tmp_path / "querier"
    options = ("--members-port", "0", "--map", which_map, "--smallest-count", "1")
    with market_process(operator, options=options) as (started, _):
        address, ca, invite = started["address"], started["ca"], str(tmp_path / "city.invite")
        assert started["members"].rpartition(":")[2] not in ("0", address.rpartition(":")[2])
        # A handshake that fails is no line of the log.
        with connect(started["members"], Path(ca)) as stranger, pytest.raises(grpc.RpcError):
            MarketStub(stranger).Describe(pb.DescribeRequest(), timeout=20)
        veilmart("market", "invite", "--org", "City", "-o", invite, home=operator)
        joined = json.loads(veilmart("node", "join", address, "--invite", f"file:{invite}", "--json", home=owner))
        assert joined["certificate"] == str(owner / "node" / FILE)
        (owner / "node" / FILE).unlink()  # lost: the guard's desk gets another, for which the worker signs
        monkeypatch.setenv("VEILMART_MARKET", address)
        monkeypatch.setenv("VEILMART_CA", str(owner / "market-ca.crt"))
        data, policy = write_records(tmp_path / "wool.jsonl"), write_policy(tmp_path / "policy.toml", more=RELAY)
        with guard_process(owner, data, tiny_model_directory, policy, which_map=which_map) as (guard, _, _):
            guard.request(Order(Guarantee(1.0, 1e-6)))
            envelope = wait_for(guard.collect, 120)
            release = open_envelope(envelope)
            wait_for((owner / "node" / FILE).exists, 120)
            with MarketClient(address, Path(ca), querier) as client:
                with pytest.raises(Unauthorised, match="alone, under a certificate"):
                    client.publish(envelope)
                with MarketClient(address, Path(ca), owner, Membership.of(owner / "node")) as member:
                    member.publish(envelope)

                def connected() -> bool:
                    try:
                        return bool(client.introduction(release.release_id))
                    except GuardUnreachable:
                        return False

                wait_for(connected, 120)
                words = ("ask", "what is wool?", "--relay", "-m", release.title, "--tokens", "4", "--map", which_map, "--json")
                assert json.loads(veilmart(*words, home=querier))["tokens"] == 4
                assert json.loads(veilmart("pki", "revoke", joined["owner"][:16], "--json", home=operator))["revoked"]
                assert not connected()
                log = tmp_path / "owner.log"
                wait_for(lambda: "relay not connected code=unauthorised" in log.read_text(), 120)
                veilmart("node", "certificate", "--renew", home=owner)
                wait_for(connected, 120)
    assert all(line.startswith("{") for line in (operator / "market.log").read_text().splitlines()), "events and nothing else"
