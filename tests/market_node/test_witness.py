"""Witnesses: what a market that shows two logs cannot get past, and what passes without them."""

import json
import shutil
import threading
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.service import MarketService
from market_node.witness import WitnessOf
from nodes import market_client
from nodes.command import build
from nodes.market_client import MarketClient
from protocol.channel import connect
from protocol.errors import InvalidProof, InvalidSignature, Unauthorised, UsageError
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from protocol.transparency import EMPTY_ROOT, Checkpoint, origin_of, root_of_all, sign_checkpoint
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from protocol.witness import Witness, cosign, cosigned_at, require_witnessed
from tests.market_node.market import running_market
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()
KEY, MARKET = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
PUBLIC = MARKET.public_key().public_bytes_raw()
ONE = Witness("witness.example", KEY.public_key().public_bytes_raw())
CHECKPOINT = Checkpoint(origin_of(PUBLIC), 3, b"\5" * 32, b"\6" * 32)
NOTE = sign_checkpoint(CHECKPOINT, MARKET)
NOW = 1_800_000_000


def new_envelope(seed: int) -> bytes:
    return envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed)


def test_a_verifier_key_has_one_spelling():
    assert Witness.parse(str(ONE)) == ONE
    text = str(ONE)
    for at in range(len(text)):
        with pytest.raises(UsageError):
            Witness.parse(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])


def test_every_flipped_bit_of_a_cosigned_note_is_caught():
    note = cosign(NOTE, ONE.name, KEY, NOW)
    assert cosigned_at(note, ONE) == NOW
    line = note.rindex(b"\n", 0, -1) + 1
    text = note.index(b"\n\n") + 1
    for at in [*range(text), *range(line, len(note))]:
        for bit in range(8):
            changed = bytearray(note)
            changed[at] ^= 1 << bit
            with pytest.raises((InvalidSignature, ValueError)):
                cosigned_at(bytes(changed), ONE)


def require(notes, witnesses, shown=CHECKPOINT, now=float(NOW)):
    return require_witnessed(notes, witnesses, PUBLIC, shown, lambda first, second: [], now)


def test_a_note_counts_for_a_day_and_not_before_its_time():
    note = cosign(NOTE, ONE.name, KEY, NOW)
    assert require([note], [ONE]) == [ONE.name]
    for now in (NOW + 24 * 3600 + 1, NOW - 301):
        with pytest.raises(InvalidProof, match="within 24 hours"):
            require([note], [ONE], now=float(now))


def test_a_note_of_a_stranger_or_of_another_market_does_not_count():
    stranger, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    foreign = Checkpoint(origin_of(other.public_key().public_bytes_raw()), 3, b"\5" * 32, b"\6" * 32)
    for note in (NOTE, cosign(NOTE, ONE.name, stranger, NOW), cosign(sign_checkpoint(foreign, other), ONE.name, KEY, NOW)):
        with pytest.raises(InvalidProof):
            require([note], [ONE])


def test_another_log_of_the_size_that_was_witnessed_is_refused():
    note = cosign(NOTE, ONE.name, KEY, NOW)
    for shown in (Checkpoint(CHECKPOINT.origin, 3, EMPTY_ROOT, b"\6" * 32), Checkpoint(CHECKPOINT.origin, 3, b"\5" * 32, b"\7" * 32)):
        with pytest.raises(InvalidProof):
            require([note], [ONE], shown=shown)


@pytest.fixture
def split(tmp_path):
    """A market that a witness watches, and its twin with the same keys for somebody else; both go on by themselves."""
    watched, twin = tmp_path / "m", tmp_path / "twin"
    with running_market(watched, MAP) as (address, ca, _):
        witness = WitnessOf(address, ca, tmp_path / "witness", "witness.example")
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
    shutil.copytree(watched, twin)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "witnesses").write_text(f"{witness.witness}\n")
    with running_market(watched, MAP, witnesses=(witness.witness,)) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(2))
        WitnessOf(address, ca, tmp_path / "witness", "witness.example").observe()
        with MarketClient(address, ca, tmp_path / "home") as client:
            client.describe()  # the honest view passes
    shutil.rmtree(tmp_path / "home" / "catalogues")  # as a client that comes for the first time
    with running_market(twin, MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "other") as client:
        client.publish(new_envelope(3))
        client.publish(new_envelope(4))
    return watched, twin, tmp_path / "home", witness.witness


def test_a_market_that_hides_its_log_from_the_witness_is_refused(split):
    _, twin, home, witness = split
    with running_market(twin, MAP, witnesses=(witness,)) as (address, ca, _), MarketClient(address, ca, home) as client:
        with pytest.raises(InvalidProof, match="none of the 1 witnesses"):
            client.describe()


def test_the_note_of_the_watched_log_does_not_help_the_hidden_one(split):
    watched, twin, home, witness = split
    with running_market(watched, MAP) as (_, _, store):
        (note,) = store.cosigned()
    with running_market(twin, MAP, witnesses=(witness,)) as (address, ca, store), MarketClient(address, ca, home) as client:
        store.keep_cosigned(witness.name, 2, note)
        with pytest.raises(InvalidProof, match="both roots"):
            client.describe()


def test_without_a_trusted_witness_the_hidden_log_passes(split):
    """Control."""
    _, twin, home, _ = split
    (home / "witnesses").unlink()
    with running_market(twin, MAP) as (address, ca, _), MarketClient(address, ca, home) as client:
        client.describe()


def test_a_witness_never_signs_two_histories(split, tmp_path):
    _, twin, _, witness = split
    with running_market(twin, MAP, witnesses=(witness,)) as (address, ca, store):
        with pytest.raises(InvalidProof):
            WitnessOf(address, ca, tmp_path / "witness", witness.name).observe()
        assert store.cosigned() == []


class HidesNotices(MarketService):
    """Shows the notices without the last one, well signed and in every checkpoint, once it is told to."""

    hides = binds = False

    def _notices(self):
        entries = self._store.notices()
        entries = entries[:-1] if self.hides else entries
        return entries, self._signed_notices(entries)

    def _checkpoint(self, head, logged):
        shown = self._notices()[0]
        return super()._checkpoint(head, replace(logged, notices=(len(shown), root_of_all(shown)) if self.binds else None))


@pytest.fixture
def withdrawn(tmp_path, monkeypatch):
    """A market that hides a withdrawal which its witness saw; yields its address, certificate and witness."""
    monkeypatch.setattr(HidesNotices, "hides", False)
    monkeypatch.setattr(HidesNotices, "binds", True)
    key = Ed25519PrivateKey.generate()
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        witness = WitnessOf(address, ca, tmp_path / "witness", "w").witness
    with running_market(tmp_path / "m", MAP, witnesses=(witness,), service_type=HidesNotices) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(envelope := envelope_of(MAP, key, seed=1))
            market, release = client.describe().market_key, open_envelope(envelope)
            client.submit(sign_notice(Notice(Kind.WITHDRAWAL, market, release.owner, (release.release_id,)), key))
        WitnessOf(address, ca, tmp_path / "witness", "w").observe()
        monkeypatch.setattr(HidesNotices, "hides", True)
        yield address, ca, witness


def newcomer(folder, withdrawn, trusts: bool) -> MarketClient:
    address, ca, witness = withdrawn
    folder.mkdir()
    if trusts:
        (folder / "witnesses").write_text(f"{witness}\n")
    return MarketClient(address, ca, folder)


@pytest.mark.parametrize("binds", [True, False])
def test_a_market_that_hides_a_withdrawal_from_one_client_is_refused_where_a_witness_saw_it(withdrawn, tmp_path, monkeypatch, binds):
    monkeypatch.setattr(HidesNotices, "binds", binds)  # with checkpoints that fit the lie, or with ones that bind no notices
    with newcomer(tmp_path / "home", withdrawn, trusts=True) as client:
        for ask in (lambda: client.sync(MAP), lambda: client.mirror(MAP), client.notices):
            with pytest.raises(InvalidProof, match="notices"):
                ask()
        # Control: a client that asks for the witness's word about the log alone believes that the release stands.
        monkeypatch.setattr(market_client, "require_witnessed_notices", lambda *_: None)
        assert client.sync(MAP).gone == frozenset()


def test_without_a_trusted_witness_the_withdrawal_stays_hidden(withdrawn, tmp_path):
    """Control."""
    with newcomer(tmp_path / "home", withdrawn, trusts=False) as client:
        assert client.sync(MAP).gone == frozenset()


def test_a_withdrawal_that_is_shown_to_all_passes(withdrawn, tmp_path, monkeypatch):
    monkeypatch.setattr(HidesNotices, "hides", False)
    with newcomer(tmp_path / "home", withdrawn, trusts=True) as client:
        assert len(client.sync(MAP).gone) == 1


@pytest.mark.parametrize("binds", [True, False])
def test_a_witness_signs_no_list_that_lost_a_notice(withdrawn, tmp_path, monkeypatch, binds):
    monkeypatch.setattr(HidesNotices, "binds", binds)
    address, ca, witness = withdrawn
    with pytest.raises(InvalidProof, match="less"):
        WitnessOf(address, ca, tmp_path / "witness", witness.name).observe()


def test_who_trusts_a_witness_wants_its_word_about_the_notices(withdrawn, tmp_path, monkeypatch):
    """A market that binds no notices, to the witness either, is refused."""
    address, ca, witness = withdrawn
    monkeypatch.setattr(HidesNotices, "binds", False)
    (tmp_path / "witness" / "signed.checkpoint").unlink()  # as a witness that never saw one
    WitnessOf(address, ca, tmp_path / "witness", witness.name).observe()
    with newcomer(tmp_path / "home", withdrawn, trusts=True) as client, pytest.raises(InvalidProof, match="signed them within 24 hours"):
        client.sync(MAP)


def observed_at_once(folder) -> list[bytes]:
    """Return what two processes of one witness sign when a market shows them two logs that begin alike."""
    watched, twin = folder / "m", folder / "twin"
    with running_market(watched, MAP) as (address, ca, _):
        witness = WitnessOf(address, ca, folder / "witness", "w").witness
        with MarketClient(address, ca, folder / "owner") as client:
            client.publish(new_envelope(1))
    shutil.copytree(watched, twin)
    met = threading.Barrier(2, timeout=1.0)

    class Slow(WitnessOf):
        def _known(self, market_key):
            known = super()._known(market_key)
            with suppress(threading.BrokenBarrierError):
                time.sleep(0.5 * met.wait())  # both have read what was signed before, if they can; threads share names of temporary files
            return known

    with ExitStack() as stack:
        watchers, stores = [], []
        for place, home in enumerate((watched, twin)):
            address, ca, store = stack.enter_context(running_market(home, MAP, witnesses=(witness,)))
            with MarketClient(address, ca, folder / f"owner-{place}") as client:
                client.publish(new_envelope(2 + place))
            watchers.append(Slow(address, ca, folder / "witness", "w"))
            stores.append(store)

        def observe(watcher) -> None:
            with suppress(InvalidProof):
                watcher.observe()

        threads = [threading.Thread(target=observe, args=(watcher,)) for watcher in watchers]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
        return [note for store in stores for note in store.cosigned()]


def test_two_processes_of_one_witness_do_not_sign_two_histories(tmp_path):
    assert len(observed_at_once(tmp_path)) == 1


def test_without_the_lock_they_would(tmp_path, monkeypatch):
    """Control."""
    monkeypatch.setattr(WitnessOf, "_alone", lambda self: nullcontext())
    assert len(observed_at_once(tmp_path)) == 2


def test_an_old_note_that_somebody_sends_again_does_not_take_the_place_of_a_newer_one(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        witness = WitnessOf(address, ca, tmp_path / "witness", "w").witness
    with running_market(tmp_path / "m", MAP, witnesses=(witness,)) as (address, ca, store):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
        watcher = WitnessOf(address, ca, tmp_path / "witness", "w")
        watcher.observe(lambda: NOW)
        (old,) = store.cosigned()
        watcher.observe(lambda: NOW + 100)
        (new,) = store.cosigned()
        channel = connect(address, ca)
        MarketStub(channel).Cosign(pb.CosignRequest(note=old), timeout=30)
        channel.close()
        assert store.cosigned() == [new] != [old]


def test_a_market_takes_notes_of_its_own_witnesses_alone(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
        with pytest.raises(Unauthorised, match="none of this market's witnesses"):
            WitnessOf(address, ca, tmp_path / "witness", "uninvited").observe()
        assert store.cosigned() == []


def test_a_witness_goes_on_when_its_market_was_away(tmp_path):
    home, rounds, stop = tmp_path / "witness", [], threading.Event()
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        key = WitnessOf(address, ca, home, "w").witness
    watching = WitnessOf(address, ca, home, "w")
    thread = threading.Thread(target=watching.run, args=(0.05, stop, rounds.append), daemon=True)
    thread.start()
    while not rounds:
        time.sleep(0.05)
    assert isinstance(rounds[0], Exception)
    stop.set()
    thread.join(60)
    with running_market(tmp_path / "m", MAP, witnesses=(key,)) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
        assert WitnessOf(address, ca, home, "w").observe().news == 1
        assert WitnessOf(address, ca, home, "w").observe().news == 0


def test_commands(tmp_path, capsys):
    def run(*words):
        build(None)(list(words), standalone_mode=False)
        return capsys.readouterr().out

    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        where = ("--home", str(tmp_path / "w"), "--market", address, "--ca", str(ca), "--name", "w.example")
        key = run("market", "witness", *where, "--show-key").strip()
    home = ("--home", str(tmp_path / "home"))
    assert json.loads(run("catalogue", "trust", key, *home, "--json"))["witnesses"] == [key]
    with running_market(tmp_path / "m", MAP, witnesses=(Witness.parse(key),)) as (address, ca, _):
        where = (*where[:3], address, *where[4:])
        with MarketClient(address, ca, tmp_path / "owner") as client:
            client.publish(new_envelope(1))
        with MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(InvalidProof):
            client.describe()
        assert json.loads(run("market", "witness", *where, "--once", "--json"))["size"] == 1
        assert json.loads(run("catalogue", "checkpoint", *home, "--market", address, "--ca", str(ca), "--json"))["size"] == 1
    assert json.loads(run("catalogue", "trust", key, "--remove", *home, "--json"))["witnesses"] == []
