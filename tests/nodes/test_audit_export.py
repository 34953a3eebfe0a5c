"""Evidence is gathered from a real market, and then verified and audited with every network call forbidden."""

import hashlib
import json
import socket
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.command import build
from nodes.market_client import MarketClient
from protocol.errors import FormatError, InvalidSignature, UsageError
from protocol.evidence import unpack, verify
from protocol.release import open_envelope
from protocol.wire import market_pb2 as pb
from protocol.witness import Witness, cosign
from tests.market_node.market import running_market
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()


def run(*words) -> int:
    return build(None)([str(word) for word in words], standalone_mode=False) or 0


@pytest.fixture
def offline(monkeypatch):
    """From here on, whoever opens a socket fails the test."""

    def forbidden(*_, **__):
        raise AssertionError("a socket was opened")

    def forbid() -> None:
        monkeypatch.setattr(socket, "socket", forbidden)
        monkeypatch.setattr("protocol.channel.connect", forbidden)
        monkeypatch.setattr("nodes.market_client.connect", forbidden)

    return forbid


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with a market's whole evidence, that of one release, receipts of two days, and what both home and market were called."""
    folder = tmp_path_factory.mktemp("exported")
    envelopes = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(4)]
    (folder / "small.map").write_bytes(MAP.manifest)
    flags = {"schema": "veilmart.audit-specification/1", "checks": [], "refuted": False, "membership": {"members": 4711}}
    (folder / "attack.json").write_text(json.dumps(flags))
    with running_market(folder / "m", MAP) as (address, ca, _), MarketClient(address, ca, folder / "home") as client:
        receipts = [client.publish(envelope) for envelope in envelopes]
        for number in (0, 3):
            (folder / f"{number}.receipt").write_bytes(receipts[number].to_bytes())
        there = ["--market", address, "--ca", ca, "--home", folder / "auditor", "--map", folder / "small.map"]
        run("audit", "export", "--out", folder / "whole.tar", *there, "--with", folder / "attack.json")
        wanted = open_envelope(envelopes[2]).release_id.hex()
        run("audit", "export", "--out", folder / "one.tar", *there, "--release", wanted[:12])
        run("audit", "export", "--out", folder / "days.tar", *there, "--receipt", folder / "0.receipt", "--receipt", folder / "3.receipt")
    return folder


def opened(file: Path):
    return verify(unpack(file.read_bytes()))


def test_evidence_of_a_whole_market_is_verified_and_audited_without_a_network(exported, offline, capsys):
    offline()
    assert run("verify", "bundle", exported / "whole.tar", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["complete"], shown["size"], shown["results"], shown["maps"]) == (True, 4, ["attack", "parts"], [MAP.map_id.hex()])
    assert run("audit", "release", exported / "whole.tar", "--json") == 0
    audit = json.loads(capsys.readouterr().out)
    assert (audit["refuted"], len(audit["releases"])) == (False, 4)
    assert all(check["holds"] for release in audit["releases"] for check in release["checks"] if check["name"] == "map"), (
        "the map comes with the evidence"
    )


def test_a_connection_would_be_noticed(offline, tmp_path):
    offline()
    (tmp_path / "ca.crt").write_bytes(b"x")
    with pytest.raises(AssertionError, match="socket"):
        MarketClient("127.0.0.1:1", tmp_path / "ca.crt", tmp_path)


def test_one_release_of_a_market_is_proven_alone(exported):
    found = opened(exported / "one.tar")
    assert (list(found.releases), found.complete, found.checkpoint.size) == ([2], False, 4)


def test_receipts_of_two_days_come_with_the_proof_that_they_are_of_one_log(exported):
    files = unpack((exported / "days.tar").read_bytes())
    assert "consistency/1.proof" in files
    assert sorted(verify(files).releases) == [0, 3]


def test_without_a_market_receipts_of_two_days_prove_no_single_log(exported, tmp_path):
    with pytest.raises(UsageError, match="one log"):
        run("audit", "export", "--out", tmp_path / "e.tar", "--receipt", exported / "0.receipt", "--receipt", exported / "3.receipt")


def test_one_receipt_is_evidence_without_a_market(exported, tmp_path, offline):
    offline()
    assert run("audit", "export", "--out", tmp_path / "e.tar", "--receipt", exported / "3.receipt", "--map", exported / "small.map") == 0
    assert list(opened(tmp_path / "e.tar").releases) == [3]


def test_what_an_attack_showed_about_private_records_stays_behind(exported):
    data = (exported / "whole.tar").read_bytes()
    assert b"4711" not in data
    assert b"4711" in (exported / "attack.json").read_bytes()


def test_evidence_names_the_parts_that_it_was_made_by(exported, tmp_path, capsys):
    assert run("audit", "parts", "--json", "--out", tmp_path / "bill.json") == 0
    told, found = json.loads(capsys.readouterr().out), json.loads(opened(exported / "one.tar").results["parts"])
    assert found == {name: told[name] for name in ("schema", "parts", "sha256")}
    assert found["sha256"] == hashlib.sha256((tmp_path / "bill.json").read_bytes()).hexdigest()
    (tmp_path / "parts.json").write_bytes((exported / "attack.json").read_bytes())
    with pytest.raises(UsageError, match="parts"):
        run("audit", "export", "--out", tmp_path / "e.tar", "--receipt", exported / "3.receipt", "--with", tmp_path / "parts.json")


def test_a_file_that_is_no_result_is_refused(exported, tmp_path):
    (tmp_path / "records.json").write_text('{"prompt": "secret"}')
    with pytest.raises(FormatError):
        run("audit", "export", "--out", tmp_path / "e.tar", "--receipt", exported / "3.receipt", "--with", tmp_path / "records.json")


def test_a_tampered_release_is_refused_by_verify_and_by_audit(exported, tmp_path):
    data = bytearray((exported / "whole.tar").read_bytes())
    data[data.index(b"receipts/00000002") + 700] ^= 1
    (tmp_path / "bad.tar").write_bytes(bytes(data))
    for command in (("verify", "bundle"), ("audit", "release")):
        with pytest.raises(FormatError):
            run(*command, tmp_path / "bad.tar")


def test_a_witness_that_signed_the_log_is_found_in_the_evidence_and_another_is_not(tmp_path, capsys):
    key, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    witness, other = (Witness("witness.example", one.public_key().public_bytes_raw()) for one in (key, stranger))
    with running_market(tmp_path / "m", MAP, witnesses=(witness,)) as (address, ca, _), MarketClient(address, ca, tmp_path / "h") as client:
        (tmp_path / "small.map").write_bytes(MAP.manifest)
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=1))
        note = cosign(client.checkpoint_note(), witness.name, key, 1_800_000_000)
        client._stub.Cosign(pb.CosignRequest(note=note), timeout=30)
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=2))
        there = ["--market", address, "--ca", ca, "--home", tmp_path / "auditor", "--map", tmp_path / "small.map"]
        run("audit", "export", "--out", tmp_path / "e.tar", *there)
    capsys.readouterr()
    run("verify", "bundle", tmp_path / "e.tar", "--witness", str(witness), "--json")
    assert json.loads(capsys.readouterr().out)["witnessed_at"] == 1_800_000_000
    assert "consistency/1.proof" in unpack((tmp_path / "e.tar").read_bytes()), "what it signed is proven to be a part of the log"
    with pytest.raises(InvalidSignature):
        run("verify", "bundle", tmp_path / "e.tar", "--witness", str(other))
