"""The log through a real market: what a client remembers, and what a market that rewrites its history cannot do any more."""

import shutil
import sqlite3
import threading

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.service import MarketService, answering
from market_node.store import Store
from nodes.market_client import MarketClient
from protocol.catalogue import tables_of
from protocol.errors import InvalidProof, InvalidSignature, NotFound, VeilmartError
from protocol.release import open_envelope
from protocol.transparency import Receipt, leaf_hash, open_checkpoint
from protocol.wire import market_pb2 as pb
from tests.commands import run
from tests.market_node.market import running_market
from tests.protocol.test_transparency import tree_hash
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()


def new_envelope(seed: int) -> bytes:
    return envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed)


def test_a_receipt_proves_the_release_offline(tmp_path):
    envelopes = [new_envelope(seed) for seed in range(5)]
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        receipts = [client.publish(envelope) for envelope in envelopes]
        assert [receipt.index for receipt in receipts] == list(range(5))
        assert receipts[0] != client.publish(envelopes[0]), "the same promise under a later checkpoint"
        later = client.receipt(open_envelope(envelopes[1]).release_id, 1)
    for receipt in [*receipts, later]:
        again = Receipt.from_bytes(receipt.to_bytes())
        assert again == receipt
        assert again.verify().root == tree_hash(envelopes[: again.verify().size])
    head = tables_of([open_envelope(envelope) for envelope in envelopes], MAP).head()
    assert later.verify().catalogue == head.digest, "the checkpoint binds the catalogue that queries are answered from"


def test_every_flipped_bit_of_a_receipt_is_caught(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.publish(new_envelope(1))
        client.publish(new_envelope(2))
        data = client.publish(new_envelope(3)).to_bytes()
    caught = 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            try:
                receipt = Receipt.from_bytes(bytes(changed))
                receipt.verify()
                open_envelope(receipt.envelope)
                pytest.fail(f"bit {bit} of byte {at} changed nothing")
            except VeilmartError:
                caught += 1
    assert caught == 8 * len(data) > 7_000


def test_a_store_from_before_the_log_is_completed(tmp_path):
    envelopes = [new_envelope(seed) for seed in range(7)]
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        for envelope in envelopes:
            client.publish(envelope)
    with sqlite3.connect(tmp_path / "m" / "market.db") as db:
        db.execute("DROP TABLE log_node")
        db.execute("DROP TABLE alembic_version")  # there were no migrations either
    for _ in range(2):
        store = Store.open(tmp_path / "m")
        assert store.log()[1].root == tree_hash(envelopes)
        store.close()


def test_a_store_proves_only_sizes_that_it_had(tmp_path):
    store = Store.open(tmp_path / "m")
    with pytest.raises(NotFound, match="it has 0 entries"):
        store.consistency(1, 2)
    with pytest.raises(NotFound):
        store.inclusion(0, 1)
    with pytest.raises(VeilmartError):
        store.consistency(0, 0)
    store.close()


def test_publishing_at_once_keeps_one_log(tmp_path):
    envelopes = [new_envelope(seed) for seed in range(24)]
    with running_market(tmp_path / "m", MAP) as (address, ca, store):

        def publish(part: list[bytes], home) -> None:
            with MarketClient(address, ca, home) as client:
                for envelope in part:
                    client.publish(envelope).verify()

        threads = [threading.Thread(target=publish, args=(envelopes[n::4], tmp_path / f"home{n}")) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert store.log()[1].root == tree_hash(store.envelopes(0, 24))
        assert store.head().size == 24


# A market that lies ------------------------------------------------------------------------------------------------------


@pytest.fixture
def forked(tmp_path):
    """A market, and a twin with the same keys whose history differs from the third release on."""
    first, twin, home = tmp_path / "m", tmp_path / "twin", tmp_path / "home"
    shared = [new_envelope(seed) for seed in range(2)]
    with running_market(first, MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        for envelope in shared:
            client.publish(envelope)
    shutil.copytree(first, twin)
    with running_market(first, MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        client.publish(new_envelope(10))
    with running_market(twin, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "stranger") as client:
        for seed in range(20, 23):
            client.publish(new_envelope(seed))
    return first, twin, home


def test_another_history_is_refused_at_the_first_contact(forked):
    _, twin, home = forked
    with running_market(twin, MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        before = client.checkpoint_note()
        with pytest.raises(InvalidProof, match="both roots"):
            client.describe()
        assert client.checkpoint_note() == before, "what was seen before is kept: it is evidence"


def test_without_the_remembered_checkpoint_another_history_passes(forked, tmp_path):
    """Control: memory is what finds it out."""
    _, twin, _ = forked
    with running_market(twin, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "fresh") as client:
        client.describe()


def test_a_restored_older_market_is_the_same_log_and_what_is_known_stays(tmp_path):
    home = tmp_path / "home"
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        client.publish(new_envelope(1))
    shutil.copytree(tmp_path / "m", tmp_path / "older")
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        client.publish(new_envelope(2))
        known = client.checkpoint_note()
    with running_market(tmp_path / "older", MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        with pytest.raises(NotFound):  # it cannot prove anything about a log longer than its own
            client.describe()
        assert client.checkpoint_note() == known


@answering
async def receipt_of_another(self, request, context):
    stored = await MarketService.Publish.__wrapped__(self, request, context)
    other = await self._store_call(self._store.inclusion, 0, stored.head.size)
    return pb.Receipt(
        release_id=stored.release_id, index=stored.index, head=stored.head, checkpoint=stored.checkpoint, inclusion=[b"\1" * 32, *other]
    )


@answering
async def checkpoint_of_another_head(self, request, context):
    honest = await MarketService.Describe.__wrapped__(self, request, context)
    head, logged = await self._store_call(self._store.log)
    from dataclasses import replace

    honest.checkpoint = self._checkpoint(replace(head, rows=b"\7" * 32), logged)
    return honest


@pytest.mark.parametrize(
    ("method", "lie", "error"),
    [("Publish", receipt_of_another, InvalidProof), ("Describe", checkpoint_of_another_head, InvalidProof)],
)
def test_a_lie_about_the_log_is_refused(tmp_path, method, lie, error):
    lying = type("Lying", (MarketService,), {method: lie})
    with running_market(tmp_path / "m", MAP, service_type=lying) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(error):
            client.publish(new_envelope(1))


# Commands ----------------------------------------------------------------------------------------------------------------


def test_two_people_find_out_that_they_were_shown_two_logs(forked, tmp_path, capsys, monkeypatch):
    first, twin, home = forked
    mine, theirs = tmp_path / "mine.checkpoint", tmp_path / "theirs.checkpoint"
    with running_market(first, MAP) as (address, ca, _):
        shown = run(capsys, "catalogue", "checkpoint", "--home", str(home), "--market", address, "--ca", str(ca), "-o", str(mine))
        assert shown["size"] == 3
        again = run(capsys, "catalogue", "checkpoint", "--home", str(home), "--market", address, "--ca", str(ca), "--compare", str(mine))
        assert again["compared"] == str(mine)
    with running_market(twin, MAP) as (address, ca, _):
        words = ("catalogue", "checkpoint", "--home", str(tmp_path / "other"), "--market", address, "--ca", str(ca))
        run(capsys, *words, "-o", str(theirs))
        with pytest.raises(InvalidProof):
            run(capsys, *words, "--compare", str(mine))


def test_verify_release_says_what_was_proven_and_refuses_another_market(tmp_path, capsys):
    envelope = new_envelope(4)
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        receipt = client.publish(envelope)
    file, note = tmp_path / "r.receipt", tmp_path / "c"
    file.write_bytes(receipt.to_bytes())
    note.write_bytes(receipt.checkpoint)
    key = receipt.market_key.hex()
    shown = run(capsys, "verify", "release", str(file), "--market-key", key, "--checkpoint", str(note))
    assert shown["release_id"] == open_envelope(envelope).release_id.hex()
    assert (shown["index"], shown["size"], shown["root"]) == (0, 1, leaf_hash(envelope).hex())
    with pytest.raises(InvalidSignature, match="another market"):
        run(capsys, "verify", "release", str(file), "--market-key", "00" * 32)
    assert open_checkpoint(receipt.checkpoint, receipt.market_key).size == 1
