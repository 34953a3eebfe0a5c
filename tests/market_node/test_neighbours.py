"""Several processes over one folder: who is there, who tidies up, and what one of them did as the others see it."""

import asyncio
import subprocess
import sys
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import service
from market_node.backup import NEWEST, keep_newest, require_newest
from market_node.identity import market_identity, served_names
from market_node.neighbours import FOLDER, Neighbours, lock_folder
from market_node.store import Store
from nodes.market_client import MarketClient
from protocol.errors import InvalidProof, NotFound, UsageError, VeilmartError
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from protocol.transparency import EMPTY_ROOT, Checkpoint, open_checkpoint, origin_of, sign_checkpoint
from tests.market_node.local import QuietService
from tests.market_node.market import NOW, running_market
from tests.market_node.test_store import ENVELOPES, append
from tests.nodes.test_market_client import ADAPTER, DATA
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()


def test_processes_see_each_other_as_long_as_they_live(tmp_path):
    first, second = Neighbours(tmp_path), Neighbours(tmp_path)
    with first.announced("0.0.0.0:7443"):
        assert (first.addresses(), second.addresses()) == ([], ["127.0.0.1:7443"])
        with second.announced("[::1]:7446"):
            assert first.addresses() == ["[::1]:7446"]
        assert first.addresses() == []
    assert second.addresses() == []


def test_a_process_that_was_killed_is_gone_and_its_file_too(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from market_node.neighbours import Neighbours\n"
        "with Neighbours(Path(sys.argv[1])).announced('127.0.0.1:7446'): print(flush=True); time.sleep(100)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    process.stdout.readline()
    assert Neighbours(tmp_path).addresses() == ["127.0.0.1:7446"]
    process.kill()
    process.wait()
    process.stdout.close()
    assert Neighbours(tmp_path).addresses() == []
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_a_folder_with_its_own_database_is_for_one_process(tmp_path):
    with lock_folder(tmp_path, shared=False) as lock:
        assert lock.alone
        with pytest.raises(UsageError, match="another market is running"), lock_folder(tmp_path, shared=False):
            pass


def test_of_several_processes_the_first_one_alone_tidies_up(tmp_path):
    leftover = tmp_path / "adapters" / ".upload-of-another"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with lock_folder(tmp_path, shared=True) as first:
        assert first.alone
        first.share()
        with lock_folder(tmp_path, shared=True) as second:
            assert not second.alone
            Store.open(tmp_path, alone=second.alone).close()
            assert leftover.exists()
    with lock_folder(tmp_path, shared=True) as again:
        assert again.alone
    Store.open(tmp_path).close()
    assert not leftover.exists(), "the control"


def test_processes_of_several_names_share_a_certificate_for_all_of_them(tmp_path):
    names = [["a.example"], ["b.example"], ["a.example"]]
    shown = [market_identity(tmp_path, name, NOW, shared=True).server_certificate for name in names]
    assert shown[1] == shown[2] != shown[0]
    assert {"a.example", "b.example"} <= set(served_names(tmp_path))
    market_identity(tmp_path, ["a.example"], NOW)
    assert "b.example" not in served_names(tmp_path), "the control"


def test_the_newest_checkpoint_of_all_processes_is_kept(tmp_path):
    key = Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    notes = [sign_checkpoint(Checkpoint(origin_of(public), size, EMPTY_ROOT, bytes(32)), key) for size in range(4)]
    for size in (2, 3, 1):  # a slower process comes with an older one
        keep_newest(tmp_path, notes[size], size, public)
    assert open_checkpoint((tmp_path / NEWEST).read_bytes(), public).size == 3


class Refreshed(QuietService):
    """Counts how often the index is to be built anew."""

    times = 0

    def _refresh_soon(self) -> None:
        self.times += 1


def test_what_others_publish_is_noticed_once(tmp_path):
    store, key = Store.open(tmp_path), Ed25519PrivateKey.generate()
    service = Refreshed(store, MAP, key, simulation=False)

    async def look(seconds: float) -> int:
        with suppress(TimeoutError):
            await asyncio.wait_for(service.follow(every_s=0.01), seconds)
        return service.times

    assert asyncio.run(look(0.1)) == 0
    append(store, ENVELOPES[0])
    assert asyncio.run(look(0.2)) == 1
    service.close()
    store.close()


# Two processes over PostgreSQL ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_done_at_one_process_holds_at_the_others(market_home_of_two, tmp_path):
    home, key = market_home_of_two, Ed25519PrivateKey.generate()
    with running_market(home, MAP) as (first, ca, _), running_market(home, MAP) as (second, _, _):
        # One home: one memory of the log, which neither may contradict.
        with MarketClient(first, ca, tmp_path / "home") as here, MarketClient(second, ca, tmp_path / "home") as there:
            envelope = envelope_of(MAP, key, adapter=ADAPTER)
            release = open_envelope(envelope)
            here.publish(envelope)
            assert there.release(release.release_id) == envelope
            there.upload_adapter(ADAPTER, DATA)
            assert here.download_adapter(ADAPTER) == DATA
            notice = Notice(Kind.WITHDRAWAL, here.describe().market_key, release.owner, (release.release_id,))
            there.submit(sign_notice(notice, key))
            with pytest.raises(NotFound):
                here.download_adapter(ADAPTER)
            for seed in range(6):
                client, other = (here, there) if seed % 2 else (there, here)
                client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed))
                assert other.sync(MAP).head == client.sync(MAP).head
            assert release.release_id in here.sync(MAP).gone


GO_BACK = """
BEGIN; DELETE FROM market.release WHERE position >= 1; DELETE FROM market.log_node;
INSERT INTO market.log_node SELECT * FROM public.kept; COMMIT;
"""


def published_over_an_older_copy(home, postgres, tmp_path) -> Exception | None:
    """Return how it ends when others publish after the server forgot what was acknowledged, and its owner looks."""
    first, *others = (envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed) for seed in range(6))
    with running_market(home, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "owner") as owner:
        owner.publish(first)
        postgres.run("CREATE TABLE public.kept AS TABLE market.log_node")
        owner.publish(others[0])
        owner.publish(others[1])
        try:
            postgres.run(GO_BACK)
            with MarketClient(address, ca, tmp_path / "stranger") as stranger:
                for envelope in others[2:]:
                    stranger.publish(envelope)
            owner.describe()
        except VeilmartError as error:
            return error
        finally:
            postgres.run("DROP TABLE public.kept")
    return None


@pytest.mark.slow
def test_nothing_is_signed_over_a_server_that_went_back(market_home_of_two, postgres, tmp_path):
    error = published_over_an_older_copy(market_home_of_two, postgres, tmp_path)
    assert "incident" in str(error)
    store, key = Store.open(market_home_of_two), market_identity(market_home_of_two, (), NOW).market_key
    with pytest.raises(InvalidProof, match="older than what this market signed"):
        require_newest(store, key.public_key().public_bytes_raw())  # as the service does at its start
    store.close()


@pytest.mark.slow
def test_control_without_looking_at_what_was_given_out_it_would_sign_another_log(market_home_of_two, postgres, tmp_path, monkeypatch):
    monkeypatch.setattr(service, "require_newest", lambda store, key: None)
    error = published_over_an_older_copy(market_home_of_two, postgres, tmp_path)
    assert isinstance(error, InvalidProof)
    assert "two histories" in str(error), "who remembers finds out"


@pytest.fixture
def market_home_of_two(tmp_path, postgres):
    from market_node.database import use

    use(tmp_path / "m", postgres.url())
    return tmp_path / "m"
