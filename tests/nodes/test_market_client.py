"""A client believes nothing unproven: each way in which a market can lie is refused, and leaves nothing on disk."""

import hashlib
import time
from dataclasses import replace

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.members import Members
from market_node.service import MarketService, answering, streaming
from nodes.learnwares import local_learnware, pull_learnware
from nodes.market_client import MarketClient, _write_entries, find_release_id
from nodes.membership import Membership
from protocol.admission import AdmissionPolicy
from protocol.catalogue import SCALARS_BYTES, scalars_of, tables_of
from protocol.certificates import proves
from protocol.channel import addresses_of, connect
from protocol.errors import (
    FormatError,
    IncompatibleSpecification,
    InvalidAdapter,
    InvalidProof,
    InvalidSignature,
    MarketUnreachable,
    NotAdmitted,
    NotFound,
    UsageError,
    VeilmartError,
)
from protocol.features import shipped_map
from protocol.privacy import Guarantee, PrivacyUnit
from protocol.processes import free_port
from protocol.release import AdapterReference, open_envelope
from protocol.wire import market_pb2 as pb
from tests.market_node.market import TakesAnything, running_market
from tests.protocol.worlds import adapter_bytes, envelope_of, small_map

MAP = small_map()
DATA = adapter_bytes(width=2500)
ADAPTER = AdapterReference(hashlib.sha256(DATA).digest(), len(DATA))


def publish_three(client: MarketClient) -> list[bytes]:
    envelopes = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=seed, adapter=ADAPTER) for seed in range(3)]
    client.upload_adapter(ADAPTER, DATA)
    for envelope in envelopes:
        client.publish(envelope)
    return envelopes


def test_an_honest_market_is_believed_and_only_news_is_fetched(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        envelopes = publish_three(client)
        catalogue, mirror = client.sync(MAP), client.mirror(MAP)
        assert catalogue.release_ids == mirror.catalogue.release_ids == [open_envelope(e).release_id for e in envelopes]
        before = client.traffic.received["catalogue"]
        assert client.sync(MAP).release_ids == catalogue.release_ids
        assert client.traffic.received["catalogue"] - before < 600  # a head and a checkpoint, no rows
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=9))
        assert len(client.sync(MAP).names) == len(client.mirror(MAP).releases) == 4
        assert client.download_adapter(ADAPTER) == DATA


def test_a_damaged_local_copy_is_fetched_again(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish_three(client)
        client.sync(MAP)
        (copy,) = (tmp_path / "home" / "catalogues").rglob("rows")
        damaged = bytearray(copy.read_bytes())
        damaged[50] ^= 1
        copy.write_bytes(damaged)
        assert len(client.sync(MAP).names) == 3


def test_a_local_copy_of_another_form_is_dropped(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish_three(client)
        folder = client._folder(client.describe())
        assert folder.name.endswith("-v3")
        for ask in (client.sync, client.mirror):
            _write_entries(folder / "rows", [b"x" * 57, b"y" * 60])  # one entry a row, as before catalogue v2
            found = ask(MAP)
            assert len(getattr(found, "catalogue", found)) == 3


def forget_checkpoint(home):
    for kept in (home / "catalogues").glob("*.checkpoint"):
        kept.unlink()


def lying(**methods):
    return type("Lying", (MarketService,), methods)


@answering
async def other_release(self, request, context):
    return pb.Release(envelope=envelope_of(MAP, Ed25519PrivateKey.generate(), seed=99))


@streaming
async def other_adapter(self, request, context):
    yield pb.AdapterChunk(data=b"x" * len(DATA[:65536]))


@streaming
async def endless_adapter(self, request, context):
    for _ in range(100_000):
        yield pb.AdapterChunk(data=bytes(65536))


@streaming
async def forged_rows(self, request, context):
    head = self._store.head()
    rows = bytearray(self._store.rows(0, head.size))
    rows[18] ^= 0x40  # another count: the second release would look larger
    yield pb.CatalogueChunk(rows=bytes(rows), terms=self._store.terms(0, 9), head=self._signed(head))


@streaming
async def forged_terms(self, request, context):
    head = self._store.head()
    terms = [body.replace(b'"1.0"', b'"0.1"') for body in self._store.terms(0, 9)]  # a smaller epsilon than was paid
    yield pb.CatalogueChunk(rows=self._store.rows(0, head.size), terms=terms, head=self._signed(head))


@streaming
async def forged_cards(self, request, context):
    cards = [card.replace(b"owner-1", b"owner-2") for card in self._store.cards(0, 3)]
    yield pb.CardsChunk(digests=b"".join(self._store.page_chains(3)), data=b"".join(cards))


@streaming
async def forged_digests(self, request, context):
    yield pb.CardsChunk(digests=bytes(32), data=b"".join(self._store.cards(0, 3)))


@streaming
async def no_head(self, request, context):
    yield pb.CatalogueChunk(rows=self._store.rows(0, 3), terms=self._store.terms(0, 9))


@streaming
async def gone_back(self, request, context):
    yield pb.CatalogueChunk(head=self._signed(replace(self._store.head(), size=1)))


LIES = {
    "another release": ({"GetRelease": other_release}, lambda c, e: c.release(open_envelope(e[0]).release_id), FormatError),
    "another adapter": ({"DownloadAdapter": other_adapter}, lambda c, e: c.download_adapter(ADAPTER), InvalidAdapter),
    "an endless adapter": ({"DownloadAdapter": endless_adapter}, lambda c, e: c.download_adapter(ADAPTER), InvalidAdapter),
    "a forged row": ({"SyncCatalogue": forged_rows}, lambda c, e: c.sync(MAP), FormatError),
    "rows for envelopes": ({"SyncCatalogue": forged_rows}, lambda c, e: c.mirror(MAP), FormatError),
    "forged terms": ({"SyncCatalogue": forged_terms}, lambda c, e: c.sync(MAP), FormatError),
    "forged cards": ({"GetCards": forged_cards}, lambda c, e: c.sync(MAP), FormatError),
    "forged digests of cards": ({"GetCards": forged_digests}, lambda c, e: c.sync(MAP), FormatError),
    "no signed head": ({"SyncCatalogue": no_head}, lambda c, e: c.sync(MAP), FormatError),
}


@pytest.mark.parametrize(("methods", "ask", "error"), LIES.values(), ids=LIES)
def test_a_lie_is_refused_and_nothing_is_stored(tmp_path, methods, ask, error):
    market = running_market(tmp_path / "m", MAP, service_type=lying(**methods))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        envelopes = publish_three(client)
        with pytest.raises(error):
            ask(client, envelopes)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix not in (".market-key", ".checkpoint")]


FLOODS = {
    "too many terms": ({"terms": [bytes([65]) * 64] * 40_000}, lambda c: c.sync(MAP), 3),
    "empty terms": ({"terms": [b""]}, lambda c: c.sync(MAP), 2),
    "oversized terms": ({"terms": [bytes(5000)]}, lambda c: c.sync(MAP), 2),
    "envelopes for rows": ({"entries": [bytes(100)]}, lambda c: c.sync(MAP), 2),
    "empty envelopes": ({"entries": [b""]}, lambda c: c.mirror(MAP), 2),
    "terms for envelopes": ({"terms": [bytes(100)]}, lambda c: c.mirror(MAP), 2),
}


@pytest.mark.parametrize(("content", "ask", "reads"), FLOODS.values(), ids=FLOODS)
def test_a_flood_is_refused_while_it_is_received(tmp_path, content, ask, reads):
    """Entries of no bytes cost a client eight times what they weigh: the limit on bytes alone bounds no memory."""
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        sent = []

        class Flooding:
            def __init__(self, stub):
                self._stub = stub

            def __getattr__(self, name):
                return getattr(self._stub, name)

            def SyncCatalogue(self, request, timeout):
                for _ in range(100):
                    sent.append(1)
                    yield pb.CatalogueChunk(**content)

        client._stub = Flooding(client._stub)
        with pytest.raises(FormatError, match="catalogue"):
            ask(client)
        assert len(sent) < reads


def test_a_market_that_forgets_what_it_showed_is_refused(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish_three(client)
        client.sync(MAP)
    with (
        running_market(tmp_path / "m", MAP, service_type=lying(SyncCatalogue=gone_back)) as (address, ca, _),
        MarketClient(address, ca, tmp_path / "home") as client,
        pytest.raises(InvalidSignature, match="back in time"),
    ):
        client.sync(MAP)


def test_a_market_that_changes_its_key_is_refused(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.describe()
    (tmp_path / "m" / "market.key").unlink()  # the same certificate, another signer: an emptied catalogue would look new
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        with pytest.raises(InvalidSignature, match="another than before"):
            client.describe()


def test_a_mirror_of_another_history_than_the_rows_is_refused(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        publish_three(client)
        client.sync(MAP)
    for name in ("market.db", "market.db-wal", "market.db-shm", "newest.checkpoint"):
        (tmp_path / "m" / name).unlink(missing_ok=True)  # the same key starts again with other releases
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        forget_checkpoint(tmp_path / "home")  # found out without it as well
        publish_three(client)
        with pytest.raises(InvalidProof, match="two histories"):
            client.mirror(MAP)
        with pytest.raises(FormatError):
            client.sync(MAP)


@answering
async def receipt_without_head(self, request, context):
    return pb.Receipt(release_id=open_envelope(request.envelope).release_id, index=987_654_321)


@answering
async def receipt_beyond_head(self, request, context):
    return pb.Receipt(release_id=open_envelope(request.envelope).release_id, index=9, head=self._signed(self._store.head()))


@pytest.mark.parametrize("lie", [receipt_without_head, receipt_beyond_head])
def test_a_receipt_that_proves_nothing_is_refused(tmp_path, lie):
    market = running_market(tmp_path / "m", MAP, service_type=lying(Publish=lie))
    with market as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(VeilmartError):
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate()))


def test_a_row_that_is_not_its_releases_own_is_noticed_at_the_pull(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        release = open_envelope(envelope := envelope_of(MAP, Ed25519PrivateKey.generate(), seed=3))
        larger = np.float32(1 << 20).tobytes() + scalars_of(release, MAP)[4:]  # a count that was never released
        store.append(release, envelope, larger)
        with pytest.raises(FormatError, match="not its own"):
            pull_learnware("owner-3", client, tmp_path / "home", MAP)


def test_text_of_a_market_cannot_drive_a_terminal(tmp_path):
    @answering
    async def describe(self, request, context):
        raise UsageError("\x1b[2Jhint: run this\n" + "x" * 3000)

    with running_market(tmp_path / "m", MAP, service_type=lying(Describe=describe)) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(UsageError) as caught:
            client.describe()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 500


def test_a_pull_with_a_bad_adapter_stores_nothing(tmp_path):
    """The digest is right, the content is no adapter: refused before anything is written."""
    rubbish = b"adapter" * 40_000
    reference = AdapterReference(hashlib.sha256(rubbish).digest(), len(rubbish))
    with (
        running_market(tmp_path / "m", MAP, service_type=TakesAnything) as (address, ca, _),
        MarketClient(address, ca, tmp_path / "home") as client,
    ):
        client.upload_adapter(reference, rubbish)
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=1, adapter=reference))
        with pytest.raises(InvalidAdapter):
            pull_learnware("owner-1", client, tmp_path / "home", MAP)
    assert local_learnware("owner-1", tmp_path / "home") is None
    assert not (tmp_path / "home" / "learnwares").exists()


def test_a_market_with_another_map_is_refused_with_both_ids(tmp_path):
    with running_market(tmp_path / "m", small_map("other", 5)) as (address, ca, _), MarketClient(address, ca, tmp_path) as client:
        with pytest.raises(IncompatibleSpecification, match=MAP.map_id.hex()[:16]):
            client.sync(MAP)


@pytest.mark.parametrize("name", ["kme-rff-256", ""], ids=["shipped", "a file"])
def test_the_hint_names_the_map_that_the_market_works_with(tmp_path, name):
    feature_map = shipped_map(name) if name else small_map("other", 5)
    with running_market(tmp_path / "m", feature_map) as (address, ca, _), MarketClient(address, ca, tmp_path) as client:
        with pytest.raises(IncompatibleSpecification) as caught:
            client.sync(MAP)
    assert (f"--map {name}" if name else "--map FILE") in caught.value.hint


def test_a_foreign_certificate_authority_is_no_market(tmp_path):
    with running_market(tmp_path / "a", MAP) as (address, _, _), running_market(tmp_path / "b", MAP) as (_, other_ca, _):
        with MarketClient(address, other_ca, tmp_path) as client, pytest.raises(MarketUnreachable):
            client.describe()


def test_releases_are_named_without_doubt_or_not_at_all(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        ids = [open_envelope(envelope).release_id for envelope in publish_three(client)]
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=1))  # a second "owner-1"
        catalogue = client.sync(MAP)
    assert find_release_id("owner-0", catalogue) == ids[0]
    assert find_release_id(f"owner-1@{ids[1].hex()[:8]}", catalogue) == ids[1]
    assert find_release_id(ids[2].hex(), catalogue) == ids[2]
    with pytest.raises(UsageError, match="names 2"):
        find_release_id("owner-1", catalogue)
    for unknown in ("owner-7", f"owner-2@{ids[1].hex()[:8]}", "@" + "0" * 8, ids[0].hex()[:4]):
        with pytest.raises(NotFound):
            find_release_id(unknown, catalogue)


def test_the_row_of_a_release_is_what_the_market_serves(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        envelopes = publish_three(client)
        tables = tables_of([open_envelope(envelope) for envelope in envelopes], MAP)
        assert (store.rows(0, 3), tuple(store.terms(0, 9)), tuple(store.cards(0, 3))) == (tables.rows, tables.terms, tables.cards)
        assert tables.rows[:SCALARS_BYTES] == scalars_of(open_envelope(envelopes[0]), MAP)


def test_errors_keep_their_kind_over_the_wire(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        with pytest.raises(InvalidSignature):
            client.publish(envelope_of(MAP, Ed25519PrivateKey.generate())[:-1] + b"x")
        with pytest.raises(VeilmartError, match="not here"):
            client.release(bytes(32))


def add_unseen(store, **how) -> bytes:
    """Put a release into the store past the market's gate; return its id."""
    release = open_envelope(envelope := envelope_of(MAP, Ed25519PrivateKey.generate(), **how))
    store.append(release, envelope, scalars_of(release, MAP))
    return release.release_id


def test_a_release_against_the_markets_own_policy_has_no_place_in_the_mirror_and_is_not_pulled(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        honest = [open_envelope(envelope).release_id for envelope in publish_three(client)]
        bad = add_unseen(store, seed=7, guarantee=Guarantee(8.0, 1e-6))
        mirror = client.mirror(MAP)
        assert [release.release_id for release in mirror.releases] == mirror.catalogue.release_ids == honest
        assert len(mirror.catalogue.names) == len(mirror.catalogue.rows) == 3
        assert mirror.refused == (bad,)
        with pytest.raises(NotAdmitted):
            pull_learnware("owner-7", client, tmp_path / "home", MAP)


def test_a_market_that_says_it_takes_it_is_mirrored_whole(tmp_path):
    """The control of the test above."""
    market = running_market(tmp_path / "m", MAP, policy=AdmissionPolicy(8.0, None, None))
    with market as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        publish_three(client)
        add_unseen(store, seed=7, guarantee=Guarantee(8.0, 1e-6))
        assert len(client.mirror(MAP).releases) == 4


def test_the_privacy_unit_is_in_the_catalogue_and_at_the_pull(tmp_path):
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=1))
        client.publish(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=2, guarantee=Guarantee(1.0, 1e-6, unit=PrivacyUnit("person"))))
        catalogue = client.sync(MAP)
        assert [str(catalogue.unit_of(position)) for position in range(2)] == ["record", "field:person"]
        assert catalogue.names == ("owner-1", "owner-2")
        assert [str(client.mirror(MAP).catalogue.unit_of(position)) for position in range(2)] == ["record", "field:person"]
        pulled = pull_learnware("owner-2", client, tmp_path / "home", MAP)
        assert pulled.release.specification.guarantee.unit == PrivacyUnit("person")


@answering
async def no_policy(self, request, context):
    return pb.MarketDescription(
        market_key=self._public, map_ids=[self._map.map_id], head=self._signed(self._store.head()),
        checkpoint=self._checkpoint(*self._store.log()),
    )  # fmt: skip


def test_a_market_that_states_no_policy_is_refused(tmp_path):
    with running_market(tmp_path / "m", MAP, service_type=lying(Describe=no_policy)) as (address, ca, _):
        with MarketClient(address, ca, tmp_path / "home") as client, pytest.raises(FormatError, match="admission"):
            client.describe()


# Several processes of one market ------------------------------------------------------------------------------------------


def test_a_call_that_one_address_does_not_answer_is_made_at_the_next(tmp_path, monkeypatch):
    dead = f"127.0.0.1:{free_port()}"
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        monkeypatch.setattr("random.shuffle", lambda them: None)
        for place, order in enumerate((f"{dead}, {address}", f"{address},{dead}")):
            with MarketClient(order, ca, tmp_path / f"client{place}") as client:
                assert client.publish(envelope_of(MAP, Ed25519PrivateKey.generate())).index == place
                assert len(client.envelopes(MAP)) == place + 1
        with MarketClient(f"{dead},{dead}", ca, tmp_path / "nobody") as client, pytest.raises(MarketUnreachable):
            client.describe()
    with pytest.raises(UsageError, match="expected HOST:PORT"):
        connect(f"{dead},{address}", ca)
    assert addresses_of(" a:1 ,b:2") == ["a:1", "b:2"]


def test_a_members_call_goes_to_the_port_of_the_process_that_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("random.shuffle", lambda them: None)
    dead, key, now = f"127.0.0.1:{free_port()}", Ed25519PrivateKey.generate(), int(time.time())
    owner = key.public_key().public_bytes_raw()
    with running_market(tmp_path / "m", MAP, enrolled_only=True, members_port=True) as (address, ca, _):
        members = Members.open(tmp_path / "m")
        members.enrol(members.invite("City", now + 60), owner, "", now)
        members.close()
        membership = Membership(tmp_path / "node", owner, proves(key))
        with MarketClient(f"{dead},{address}", ca, tmp_path / "home", membership) as client:
            assert client.publish(envelope_of(MAP, key)).index == 0
            client._reach(dead)  # as after a call that this one did not answer; it knew the other's port
            client.knock()
            assert client.publish(envelope_of(MAP, key, number=2, seed=2)).index == 1


class BreaksOff(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return ""

    def trailing_metadata(self):
        return ()


def test_what_broke_off_half_way_is_fetched_from_its_start(tmp_path, monkeypatch):
    half = len(DATA) // 2

    def breaks_off(request, timeout):
        yield pb.AdapterChunk(data=DATA[:half])
        raise BreaksOff

    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(f"{address},{address}", ca, tmp_path / "c") as client:
        client.upload_adapter(ADAPTER, DATA)
        monkeypatch.setattr(client._stub, "DownloadAdapter", breaks_off)
        assert client.download_adapter(ADAPTER) == DATA
