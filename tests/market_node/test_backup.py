"""A restored market serves what it signed, or nothing."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.backup import NEWEST, NEWEST_NOTICES, back_up, require_newest, require_newest_notices, restore
from market_node.campaigns import Campaign, NodeResult, Outcome, Plan, all_campaigns, campaigns_of
from market_node.identity import market_identity
from market_node.service import MarketService
from market_node.store import Store
from nodes.command import build
from nodes.market_client import MarketClient
from protocol.catalogue import scalars_of
from protocol.errors import FormatError, InvalidProof, NotFound, UsageError, VeilmartError
from protocol.keys import write_durably
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from tests.market_node.market import NOW, running_market
from tests.nodes.test_market_client import ADAPTER, DATA
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()
PLAN = Plan("127.0.0.1:7443", "ca.crt", "1.0", "1e-06", 60.0)


def publish(client: MarketClient, *seeds: int) -> None:
    for seed in seeds:
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))


@pytest.fixture
def saved(tmp_path):
    """A market with three releases, a backup of it, and one release more."""
    home, folder = tmp_path / "m", tmp_path / "backup"
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.upload_adapter(ADAPTER, DATA)
        publish(client, 1, 2, 3)
        found = back_up(home, folder, keys=True)
        assert (found.checkpoint.size, found.adapters, found.keys) == (3, 1, True)
    return home, folder


def test_a_restored_market_serves_the_same_log_to_the_same_clients(saved, tmp_path):
    home, folder = saved
    shutil.rmtree(home)
    restore(folder, home)
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        assert len(client.mirror(MAP).releases) == 3
        assert client.download_adapter(ADAPTER) == DATA
        publish(client, 4)


def test_a_database_that_forgot_a_withdrawal_is_not_served(saved, tmp_path):
    home, folder = saved
    key = Ed25519PrivateKey.generate()
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        release = open_envelope(client.publish(envelope_of(MAP, key, seed=4)).envelope)
        shutil.rmtree(folder)
        back_up(home, folder, keys=True)
        market_key, owner = client.describe().market_key, key.public_key().public_bytes_raw()
        client.submit(sign_notice(Notice(Kind.WITHDRAWAL, market_key, owner, (release.release_id,)), key))
    for name in ("market.db", "market.db-wal", "market.db-shm"):
        (home / name).unlink(missing_ok=True)
    restore(folder, home)
    store = Store.open(home)
    try:
        with pytest.raises(InvalidProof, match="0 notices, and 1 were signed"):
            require_newest_notices(store)
        (home / NEWEST_NOTICES).unlink()  # control: that file is what remembers
        require_newest_notices(store)
    finally:
        store.close()


def test_a_database_older_than_what_was_signed_is_not_served(saved, tmp_path):
    home, folder = saved
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish(client, 4)
    for name in ("market.db", "market.db-wal", "market.db-shm"):
        (home / name).unlink(missing_ok=True)
    restore(folder, home)
    store, identity = Store.open(home), market_identity(home, (), NOW)
    with pytest.raises(InvalidProof, match="it has 3 releases, and 4 were signed"):
        MarketService(store, MAP, identity.market_key, simulation=False)
    (home / NEWEST).unlink()  # control: that file is what tells
    require_newest(store, identity.market_key.public_key().public_bytes_raw())
    store.close()


def test_what_a_killed_market_left_beside_its_database_is_not_played_into_the_restored_one(saved, tmp_path):
    home, folder = saved
    killed, live = tmp_path / "killed", Store.open(home)
    envelope = envelope_of(MAP, Ed25519PrivateKey.generate(), seed=4)
    live.append(release := open_envelope(envelope), envelope, scalars_of(release, MAP))
    shutil.copytree(home, killed)
    live.close()
    (killed / "market.db").unlink()  # moved away; its write-ahead log stays
    with pytest.raises(UsageError, match="there is a market already") as caught:
        restore(folder, killed)
    assert "market.db-wal" in caught.value.hint
    write_durably(killed / "market.db", (folder / "market.db").read_bytes())  # the control: what would be served
    played = Store.open(killed)
    assert played.head().size != 3
    played.close()


def test_a_checkpoint_is_kept_before_it_is_given_out(tmp_path, monkeypatch):
    """A market that cannot keep it gives nothing out: else it could be restored to before what it signed."""
    from market_node import service

    def full(*args):
        raise OSError(28, "No space left on device")

    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.describe()
        monkeypatch.setattr(service, "keep_newest", full)
        with pytest.raises(VeilmartError):
            publish(client, 1)
        monkeypatch.undo()
        publish(client, 2)
        assert client.checkpoint(client.describe().market_key).size == 2


def test_a_backup_under_load_holds_what_was_acknowledged_before(tmp_path):
    home, acknowledged = tmp_path / "m", []
    with running_market(home, MAP) as (address, ca, _):

        def load() -> None:
            with MarketClient(address, ca, tmp_path / "load") as client:
                for seed in range(100, 140):
                    publish(client, seed)
                    acknowledged.append(seed)

        thread = threading.Thread(target=load)
        thread.start()
        while not acknowledged:
            thread.join(0.01)
        for number in range(5):
            before = len(acknowledged)
            found = back_up(home, tmp_path / f"backup{number}", keys=False)
            assert (found.checkpoint.size if found.checkpoint else 0) >= before
        thread.join()
        assert not (tmp_path / "backup0" / "market.key").exists()


def test_a_campaign_goes_on_in_the_restored_market_with_the_envelopes_that_it_kept(saved, tmp_path):
    """And it never says published of what the copied database lacks, though one is published while the backup is made."""
    home, _ = saved
    campaign = Campaign.create(campaigns_of(home), PLAN)
    campaign.note(state="stopped", cause="interrupted")
    envelopes = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in (7, 8)]
    kept = [
        NodeResult(n, Outcome.KEPT, open_envelope(e).release_id.hex(), key=f"{n:02x}", envelope=e.hex()) for n, e in enumerate(envelopes)
    ]
    for result in kept:
        campaign.record(result)
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:

        def publish_meanwhile(stage: str, done: int, of: int) -> None:
            if stage == "database" and done == of and campaign.results()[0].outcome == Outcome.KEPT:
                campaign.keep_receipt(receipt := client.publish(envelopes[0]))
                campaign.record(replace(kept[0], outcome=Outcome.PUBLISHED, index=receipt.index))

        found = back_up(home, tmp_path / "b", keys=True, on_progress=publish_meanwhile)
        assert (found.campaigns, campaign.results()[0].outcome) == (1, Outcome.PUBLISHED)
    assert not list(campaigns_of(tmp_path / "b").rglob("*.lock"))
    restore(tmp_path / "b", tmp_path / "new")
    (restored,) = all_campaigns(campaigns_of(tmp_path / "new"))
    assert (restored.plan, restored.noted(), restored.results()) == (PLAN, campaign.noted(), kept)
    assert published_and_lacking(tmp_path / "b", restored) == []
    assert published_and_lacking(tmp_path / "b", campaign) == kept[:1], "control: campaigns that are copied after the database"
    (next((campaigns_of(tmp_path / "b")).rglob("nodes/*.json"))).write_bytes(b"{")
    with pytest.raises(FormatError, match="what became of a node"):
        restore(tmp_path / "b", tmp_path / "newer")


def published_and_lacking(folder, campaign: Campaign) -> list[NodeResult]:
    """Return what a campaign calls published and a database does not hold, as it was when it was kept."""
    store = Store.open(folder)
    try:
        said = [result for result in campaign.results() if result.outcome == Outcome.PUBLISHED]
        return [replace(r, outcome=Outcome.KEPT, index=-1) for r in said if not store.holds(bytes.fromhex(r.release_id))]
    finally:
        store.close()


def test_a_damaged_backup_is_refused(saved, tmp_path):
    _, folder = saved
    (adapter,) = (folder / "adapters").iterdir()
    adapter.chmod(0o600)
    adapter.write_bytes(b"x" + DATA[1:])
    with pytest.raises(FormatError, match="digest"):
        restore(folder, tmp_path / "new")
    adapter.write_bytes(DATA)
    note = (folder / NEWEST).read_bytes()
    for changed in (b"", note[:-5], note.replace(b"\n3\n", b"\n4\n"), b"veilmart/zz\n1\n"):
        (folder / NEWEST).write_bytes(changed)
        with pytest.raises(VeilmartError):
            restore(folder, tmp_path / "new")
    assert not (tmp_path / "new" / "market.db").exists()


def test_nothing_is_overwritten(saved, tmp_path):
    home, folder = saved
    with pytest.raises(UsageError, match="new or empty"):
        back_up(home, folder, keys=False)
    with pytest.raises(UsageError, match="a market already"):
        restore(folder, home)
    with pytest.raises(NotFound):
        back_up(tmp_path / "nowhere", tmp_path / "b2", keys=False)


def test_commands(saved, tmp_path, capsys):
    home, _ = saved
    (tmp_path / "h").mkdir()
    home.rename(tmp_path / "h" / "market")
    Campaign.create(campaigns_of(tmp_path / "h" / "market"), PLAN)
    for words, schema in (
        (["market", "backup", str(tmp_path / "b2"), "--home", str(tmp_path / "h"), "--json"], "veilmart.market-backup/1"),
        (["market", "restore", str(tmp_path / "b2"), "--home", str(tmp_path / "h2"), "--json"], "veilmart.market-restore/1"),
    ):
        build(None)(words, standalone_mode=False)
        shown = json.loads(capsys.readouterr().out)
        assert (shown["schema"], shown["releases"], shown["adapters"], shown["keys"]) == (schema, 3, 1, False)
        assert shown["campaigns"] == 1
