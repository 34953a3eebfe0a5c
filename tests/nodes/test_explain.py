"""What is explained is what is sent: the commands are run against a real market, and every message is compared with its explanation."""

import json
import os
import socket
import time

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import nodes.market_client
from market_node.identity import market_identity
from market_node.members import Members
from nodes.base_model import BaseModel
from nodes.command import build
from nodes.explain import COMMANDS, SAYS, Circumstances, explain
from nodes.market_client import MarketClient
from protocol.enrolment import Invite
from protocol.errors import UsageError
from protocol.features import default_map
from protocol.hazmat.noise import operating_system
from protocol.privacy import Guarantee
from protocol.specification import estimate, quantise
from protocol.window import Window
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import NOW, running_market
from tests.nodes.owners import tiny_map, write_records
from tests.protocol.worlds import envelope_of

CLIENTS_MESSAGES = {
    "DescribeRequest", "SyncRequest", "CardsRequest", "MatchChunk", "ReleaseRequest", "AdapterRequest", "AdapterChunk", "EnrolRequest",
    "ConsistencyRequest", "CertifyRequest", "NoticesRequest", "NoticeRequest", "IntroductionRequest", "SealedQuestion",
    "AggregatesRequest", "OrganisationsRequest",
}  # fmt: skip


def run(*words) -> int:
    return build(None)([str(word) for word in words], standalone_mode=False) or 0


@pytest.fixture
def sent(monkeypatch):
    """The calls of every client from here on: name, and the bytes of each field over all messages of the call."""
    calls: list[tuple[str, dict[str, int], int]] = []

    class Recorder:
        def __init__(self, channel) -> None:
            self._stub = MarketStub(channel)

        def __getattr__(self, name):
            def call(request, **how):
                messages = list(request) if not hasattr(request, "ByteSize") else [request]
                names = {field.name for message in messages for field, _ in message.ListFields()}
                calls.append((name, names, sum(message.ByteSize() for message in messages)))
                return getattr(self._stub, name)(iter(messages) if not hasattr(request, "ByteSize") else request, **how)

            return call

    monkeypatch.setattr(nodes.market_client, "MarketStub", Recorder)
    return calls


def explained(command: str, feature_map, **how) -> dict[str, list]:
    found: dict[str, list] = {}
    for call in explain(command, Circumstances(feature_map, **how)).calls:
        names = {field.name.partition(".")[0] for field in call.fields if field.size_bytes}
        found.setdefault(call.name, []).append((names, call.size_bytes))
    return found


def not_explained(sent: list, told: dict[str, list]) -> list:
    """Return the calls of which no explanation has the same fields and the same size."""
    return [(name, names, size) for name, names, size in sent if (names, size) not in told.get(name, [])]


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def test_publish_find_and_pull_send_what_is_explained(tmp_path, tiny_model_directory, model, sent, capsys):
    feature_map = tiny_map(model)
    (tmp_path / "tiny.map").write_bytes(feature_map.manifest)
    data = write_records(tmp_path / "wool.jsonl", 200)
    with running_market(tmp_path / "m", feature_map) as (address, ca, _):
        there = ["--market", address, "--ca", ca, "--map", tmp_path / "tiny.map"]
        base = ["--base", tiny_model_directory]
        run("node", "publish", "--data", data, "--no-train", "--home", tmp_path / "owner", *there, *base, "--json")
        release_id = json.loads(capsys.readouterr().out)["release_id"]
        assert not_explained(sent, told := explained("node publish", feature_map, releases=1, card_bytes=len("wool"))) == []
        assert {name for name, _, _ in sent} == set(told) - {"ProveConsistency"}
        assert explained("node publish", feature_map, releases=1, card_bytes=5)["Publish"] != told["Publish"], "sizes are compared"
        sent.clear()
        run("find", data, "--home", tmp_path / "querier", *there, *base, "--json")
        assert not_explained(sent, told := explained("find", feature_map, releases=1)) == []
        assert {name for name, _, _ in sent} == set(told) - {"ProveConsistency"}
        sent.clear()
        run("find", data, "--mirror", "--home", tmp_path / "mirror", *there, *base, "--json")
        assert not_explained(sent, told) == []
        sent.clear()
        run("pull", release_id, "--home", tmp_path / "puller", *there, "--json")
        assert not_explained(sent, explained("pull", feature_map, releases=1)) == []
        sent.clear()
        run("node", "withdraw", release_id, "--home", tmp_path / "owner", *there, "--json")
        assert not_explained(sent, explained("node withdraw", feature_map, releases=1)) == []
        assert "SubmitNotice" in {name for name, _, _ in sent}
        sent.clear()
        run("node", "rotate-key", "--home", tmp_path / "owner", *there[:4], "--json")
        assert not_explained(sent, explained("node rotate-key", feature_map, releases=1)) == []
        sent.clear()
        with MarketClient(address, ca, tmp_path / "other") as client:
            client.publish(envelope_of(feature_map, Ed25519PrivateKey.generate(), seed=1, window=Window(20_000, 30_000)))
        assert not_explained(sent, explained("pull", feature_map, releases=1)), "another command's message is not taken for explained"


def test_join_sends_what_is_explained(tmp_path, sent):
    feature_map = default_map()
    with running_market(tmp_path / "m", feature_map, enrolled_only=True, register=lambda member: "") as (address, ca, _):
        identity = market_identity(tmp_path / "m", (), NOW)
        members, expires = Members.open(tmp_path / "m"), int(time.time()) + 3600
        secret = members.invite("city", expires)
        invite = Invite(address, "city", expires, identity.market_key.public_key().public_bytes_raw(), secret, ca.read_bytes())
        (tmp_path / "city.invite").write_text(str(invite))
        os.chmod(tmp_path / "city.invite", 0o600)
        run("node", "join", address, "--invite", f"file:{tmp_path / 'city.invite'}", "--home", tmp_path / "home", "--json")
        members.close()
    assert [name for name, _, _ in sent] == ["Describe", "Enrol"]
    assert not_explained(sent, explained("node join", feature_map)) == []


def test_a_member_sends_the_same_to_the_port_for_members_and_asks_for_its_certificate_besides(
    tmp_path, tiny_model_directory, model, sent, capsys
):
    feature_map = tiny_map(model)
    (tmp_path / "tiny.map").write_bytes(feature_map.manifest)
    data, home = write_records(tmp_path / "wool.jsonl", 200), tmp_path / "home"
    with running_market(tmp_path / "m", feature_map, enrolled_only=True, members_port=True) as (address, ca, _):
        identity = market_identity(tmp_path / "m", (), NOW)
        members, expires = Members.open(tmp_path / "m"), int(time.time()) + 3600
        secret = members.invite("city", expires)
        members.close()
        invite = Invite(address, "city", expires, identity.market_key.public_key().public_bytes_raw(), secret, ca.read_bytes())
        (tmp_path / "city.invite").write_text(str(invite))
        os.chmod(tmp_path / "city.invite", 0o600)
        run("node", "join", address, "--invite", f"file:{tmp_path / 'city.invite'}", "--home", home, "--json")
        assert [name for name, _, _ in sent] == ["Describe", "Enrol", "Certify"]
        capsys.readouterr()
        sent.clear()
        there = ["--market", address, "--ca", home / "market-ca.crt", "--home", home]
        maps = ["--map", tmp_path / "tiny.map"]
        run("node", "publish", "--data", data, "--no-train", *there, *maps, "--base", tiny_model_directory, "--json")
        release_id = json.loads(capsys.readouterr().out)["release_id"]
        assert not_explained(sent, explained("node publish", feature_map, releases=1, card_bytes=len("wool"))) == []
        run("node", "withdraw", release_id, *there, *maps, "--json")
        assert "Certify" not in {name for name, _, _ in sent}, "one for all of them"
        sent.clear()
        run("node", "rotate-key", *there, "--json")
        capsys.readouterr()
        run("node", "certificate", *there, "--renew", "--json")
        shown, owner = json.loads(capsys.readouterr().out)["name"], (home / "node" / "owner.key").read_bytes()
        assert shown.endswith(Ed25519PrivateKey.from_private_bytes(owner).public_key().public_bytes_raw().hex())


# Nothing is drawn or sent ------------------------------------------------------------------------------------------------


@pytest.fixture
def forbidden(monkeypatch):
    """From here on, noise, random bytes of the operating system, sockets and channels fail the test."""

    def refuse(*_, **__):
        raise AssertionError("drawn or sent")

    for target in (
        "protocol.hazmat.noise.discrete_gaussian", "protocol.specification.discrete_gaussian", "secrets.randbelow", "os.urandom",
        "secrets.token_bytes", "protocol.channel.connect", "nodes.market_client.connect",
    ):  # fmt: skip
        monkeypatch.setattr(target, refuse)
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(grpc, "secure_channel", refuse)


@pytest.mark.parametrize("command", COMMANDS)
def test_explaining_draws_nothing_and_sends_nothing(command, forbidden, capsys):
    assert run("explain", *command.split(), "--adapter-bytes", 100_000) == 0
    shown = capsys.readouterr().out
    assert "nothing was sent, drawn or charged" in shown


def test_drawing_or_sending_would_be_noticed(forbidden, tmp_path):
    with pytest.raises(AssertionError, match="drawn or sent"):
        estimate(quantise(np.zeros((1, 4))), bytes(32), Guarantee(1.0, 1e-6), operating_system())
    (tmp_path / "ca.crt").write_bytes(b"x")
    with pytest.raises(AssertionError, match="drawn or sent"):
        MarketClient("127.0.0.1:1", tmp_path / "ca.crt", tmp_path)
    with pytest.raises(AssertionError, match="drawn or sent"):
        socket.create_connection(("127.0.0.1", 1))


# Everything is explained -------------------------------------------------------------------------------------------------


def test_every_field_that_a_client_can_send_is_explained():
    for name in CLIENTS_MESSAGES:
        fields = {field.name for field in getattr(pb, name).DESCRIPTOR.fields}
        assert set(SAYS[name]) == fields, name


def test_no_call_of_the_service_was_forgotten():
    inputs = {method.input_type.name for method in pb.DESCRIPTOR.services_by_name["Market"].methods}
    # Explained by its parts; of auditors; of witnesses; of guards, which send sealed answers and nothing else.
    others = {"PublishRequest", "InclusionRequest", "CosignRequest", "FromGuard"}
    assert inputs == CLIENTS_MESSAGES | others


def test_a_query_is_as_long_as_any_other():
    sizes = {
        next(call.size_bytes for call in explain("find", Circumstances(default_map(), releases=count)).calls if call.name == "Match")
        for count in (200, 1_000, 16_000)
    }
    assert len(sizes) == 1


def test_the_result_for_programs_adds_up(capsys):
    run("explain", "node", "publish", "--adapter-bytes", 300_000, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert shown["schema"] == "veilmart.explain/1"
    for call in shown["calls"]:
        assert call["size_bytes"] == sum(field["size_bytes"] for field in call["fields"])
    upload = next(call for call in shown["calls"] if call["call"] == "UploadAdapter")
    assert 300_000 < upload["size_bytes"] < 300_100


@pytest.mark.parametrize("words", [["frobnicate"], ["node"], ["model", "list"]])
def test_what_sends_nothing_is_refused(words):
    with pytest.raises(UsageError, match="expected one of"):
        run("explain", *words)
