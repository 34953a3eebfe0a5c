"""Evidence of two releases of one number: it proves exactly that, to anybody, without a network."""

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidSignature as BadSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.service import MarketService, answering
from nodes.command import build
from nodes.market_client import MarketClient
from protocol.conflict import Conflict, sign_conflict
from protocol.errors import AlreadyPublished, InvalidProof, InvalidSignature, VeilmartError
from protocol.transparency import Checkpoint, Receipt, origin_of, root_of_all, sign_checkpoint
from protocol.verify import main, verify_conflict
from protocol.wire import market_pb2 as pb
from tests.market_node.market import running_market
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()
MARKET, OWNER, OTHER = (Ed25519PrivateKey.generate() for _ in range(3))
PUBLIC = MARKET.public_key().public_bytes_raw()
FIRST, SECOND = (envelope_of(MAP, OWNER, seed=seed) for seed in (1, 2))


def receipt_of(envelope: bytes, market: Ed25519PrivateKey = MARKET) -> Receipt:
    key = market.public_key().public_bytes_raw()
    note = sign_checkpoint(Checkpoint(origin_of(key), 1, root_of_all([envelope]), bytes(32)), market)
    return Receipt(envelope, key, 0, note, ())


CONFLICT = sign_conflict(receipt_of(FIRST), SECOND, MARKET)
NO_EVIDENCE = {
    "one release twice": sign_conflict(receipt_of(FIRST), FIRST, MARKET),
    "releases of two owners": sign_conflict(receipt_of(FIRST), envelope_of(MAP, OTHER, seed=2), MARKET),
    "two numbers": sign_conflict(receipt_of(FIRST), envelope_of(MAP, OWNER, seed=2, number=2), MARKET),
    "a second one that nobody signed": sign_conflict(receipt_of(FIRST), SECOND[:-64] + bytes(64), MARKET),
    "a first one that nobody signed": sign_conflict(receipt_of(FIRST[:-64] + bytes(64)), SECOND, MARKET),
    "a first one that is not in the log": sign_conflict(replace(receipt_of(SECOND), envelope=FIRST), SECOND, MARKET),
    "no market's signature": replace(CONFLICT, signature=bytes(64)),
    "another market's signature": sign_conflict(receipt_of(FIRST), SECOND, OTHER),
}


def test_two_releases_of_one_number_are_evidence(tmp_path):
    first, second, checkpoint = CONFLICT.verify()
    assert (first.body, second.body, checkpoint.size) == (FIRST[:-64], SECOND[:-64], 1)
    (file := tmp_path / "c").write_bytes(CONFLICT.to_bytes())
    result, _ = verify_conflict(file, PUBLIC.hex()[:16])
    assert (result["logged"]["release_id"], result["refused"]["release_id"]) == (first.release_id.hex(), second.release_id.hex())
    with pytest.raises(InvalidSignature, match="another market"):
        verify_conflict(file, "00" * 8)


@pytest.mark.parametrize("forged", NO_EVIDENCE.values(), ids=NO_EVIDENCE)
def test_what_proves_no_conflict_is_refused(forged, tmp_path):
    (file := tmp_path / "c").write_bytes(forged.to_bytes())
    with pytest.raises((InvalidProof, InvalidSignature)):
        verify_conflict(file)
    assert main([str(file)]) == 7


def test_who_believes_the_market_alone_would_believe_these():
    """Control: a verifier that checks the market's signature and nothing else lets a market accuse anybody."""
    believed = []
    for name, forged in NO_EVIDENCE.items():
        with suppress(BadSignature):
            MARKET.public_key().verify(forged.signature, forged.signed_bytes)
            believed.append(name)
    assert set(NO_EVIDENCE) - set(believed) == {"no market's signature", "another market's signature"}


def test_every_flipped_bit_is_refused():
    data = CONFLICT.to_bytes()
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(VeilmartError):
            Conflict.from_bytes(bytes(changed)).verify()


def test_a_refused_publication_leaves_evidence_that_anybody_can_check(tmp_path, capsys):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.publish(envelope_of(MAP, OTHER, seed=0))
        client.publish(FIRST)
        for _ in range(2):
            with pytest.raises(AlreadyPublished) as refused:
                client.publish(SECOND)
        (file,) = (tmp_path / "home" / "conflicts").iterdir()
        assert str(file) in refused.value.hint
        client.publish(FIRST)  # the same bytes are no conflict
        with pytest.raises(VeilmartError, match="this very release"):
            client._call(lambda: client._stub.ProveConflict(pb.PublishRequest(envelope=FIRST), timeout=30))
    build(None)(["verify", "conflict", str(file), "--json"], standalone_mode=False)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["release_number"], shown["index"], shown["size"]) == (1, 1, 2)
    assert shown["owner"] == OWNER.public_key().public_bytes_raw().hex()
    assert main([str(file)]) == 0


class ProvesNothing(MarketService):
    """A market that says a number is taken, and shows evidence about others."""

    @answering
    async def Publish(self, request, context):
        raise AlreadyPublished("release 1 of this owner is published with other bytes")

    @answering
    async def ProveConflict(self, request, context):
        return pb.ConflictProof(evidence=CONFLICT.to_bytes())


def test_evidence_about_others_is_not_kept(tmp_path):
    with running_market(tmp_path / "m", MAP, service_type=ProvesNothing) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(AlreadyPublished) as refused:
            client.publish(SECOND)
    assert "did not prove it" in refused.value.hint
    assert not (tmp_path / "home" / "conflicts").exists()
