"""What one owner may hand in within a day, and that nobody can use up the quota of another."""

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import quotas as quota
from market_node.quotas import UNLIMITED, WINDOW_S, Limits, Quota, Quotas
from market_node.service import MarketService
from nodes.market_client import MarketClient
from protocol.channel import CODE_KEY, RETRY_KEY, connect
from protocol.errors import QuotaExceeded, UsageError
from protocol.features import default_map
from protocol.release import AdapterReference
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process, veilmart
from tests.market_node.market import running_market
from tests.protocol.worlds import adapter_bytes, envelope_of, small_map

MAP = small_map()
OWNER, OTHER = bytes([1]) * 32, bytes([2]) * 32
NOW = 1_800_000_000
THREE = Limits(releases=3)


@pytest.fixture
def opened(tmp_path):
    made = Quotas.open(tmp_path, THREE)
    yield made
    made.close()


def hand_in(quotas: Quotas, now: int, owner: bytes = OWNER) -> None:
    quotas.require(owner, Quota.RELEASES, 1, now)
    quotas.charge(owner, Quota.RELEASES, 1, now)


def wait_of(quotas: Quotas, now: int, owner: bytes = OWNER) -> int:
    with pytest.raises(QuotaExceeded) as caught:
        quotas.require(owner, Quota.RELEASES, 1, now)
    return caught.value.retry_after_s


def test_the_wait_that_is_told_is_the_shortest_that_helps(opened):
    for at in (0, 100, 500):
        hand_in(opened, NOW + at)
    wait = wait_of(opened, NOW + 600)
    assert wait == WINDOW_S - 600
    assert wait_of(opened, NOW + 600 + wait - 1) == 1, "one second before, it is too early"
    hand_in(opened, NOW + 600 + wait)
    assert wait_of(opened, NOW + 600 + wait) == 100


def test_an_owner_has_a_quota_of_its_own(opened):
    for _ in range(3):
        hand_in(opened, NOW)
    hand_in(opened, NOW, OTHER)
    wait_of(opened, NOW)


def test_a_restart_forgets_nothing(tmp_path, opened):
    for _ in range(3):
        hand_in(opened, NOW)
    opened.close()
    again = Quotas.open(tmp_path, THREE)
    assert wait_of(again, NOW + 5) == WINDOW_S - 5
    again.close()


def test_a_clock_that_was_years_ahead_costs_a_day_at_most(opened):
    for _ in range(3):
        hand_in(opened, NOW + 10 * 365 * 86_400)
    assert wait_of(opened, NOW) <= WINDOW_S
    opened.charge(OTHER, Quota.RELEASES, 1, NOW)
    opened.require(OWNER, Quota.RELEASES, 1, NOW + WINDOW_S)


def test_what_left_the_window_is_forgotten(opened):
    hand_in(opened, NOW)
    hand_in(opened, NOW + WINDOW_S + 1, OTHER)
    with opened._engine.connect() as db:
        assert [bytes(owner) for (owner,) in db.execute(quota.select(quota.HANDED_IN.c.owner))] == [OTHER]


def test_limits_that_refuse_every_large_adapter_are_refused():
    with pytest.raises(UsageError, match="64 MB"):
        Limits(adapter_bytes=1 << 20)
    with pytest.raises(UsageError):
        Limits(releases=-1)


def test_a_damaged_file_is_one_clear_error(tmp_path):
    (tmp_path / "quotas.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UsageError, match=r"quotas\.db"):
        Quotas.open(tmp_path, THREE)


def publish_many(tmp_path, limits: Limits) -> list[str]:
    """Return how four releases of one owner ended, then the second of them again, then one of another owner."""
    owner, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    envelopes = [envelope_of(MAP, owner, number=number, seed=number) for number in (1, 2, 3, 4)]
    outcomes = []
    with running_market(tmp_path, MAP, limits=limits) as (address, ca, _):
        channel = connect(address, ca)
        for envelope in (*envelopes, envelopes[1], envelope_of(MAP, other)):
            try:
                MarketStub(channel).Publish(pb.PublishRequest(envelope=envelope), timeout=10)
                outcomes.append("stored")
            except grpc.RpcError as error:
                trailing = dict(error.trailing_metadata())
                assert WINDOW_S - 60 <= int(trailing[RETRY_KEY]) <= WINDOW_S
                outcomes.append(f"{error.code().name} {trailing[CODE_KEY]}")
        channel.close()
    return outcomes


def test_the_fourth_release_of_a_day_is_refused_and_the_same_bytes_again_are_not(tmp_path):
    refused = "RESOURCE_EXHAUSTED quota"
    assert publish_many(tmp_path, THREE) == ["stored", "stored", "stored", refused, "stored", "stored"]


def test_a_market_without_limits_takes_all_of_them(tmp_path):
    """Control: it is the limit that refused the fourth."""
    assert publish_many(tmp_path, UNLIMITED) == ["stored"] * 6


def test_a_client_is_told_when_to_come_again(tmp_path):
    owner = Ed25519PrivateKey.generate()
    with (
        running_market(tmp_path / "market", MAP, limits=Limits(releases=1)) as (address, ca, _),
        MarketClient(address, ca, tmp_path / "client") as client,
    ):
        client.publish(envelope_of(MAP, owner))
        with pytest.raises(QuotaExceeded) as caught:
            client.publish(envelope_of(MAP, owner, number=2))
    assert (caught.value.exit_code, caught.value.hint) == (6, "try again in 24 h")
    assert caught.value.retry_after_s > WINDOW_S - 60


def uploaded_at_once(tmp_path, service_type) -> list[str]:
    """Return how two uploads of an owner end that both begin before either has come whole; one alone is allowed."""
    owner, adapters = Ed25519PrivateKey.generate(), [adapter_bytes(number, width=11_700, rank=64) for number in (1, 2)]
    begun = threading.Barrier(2, timeout=120)
    with running_market(tmp_path, MAP, limits=Limits(adapter_bytes=64 << 20), service_type=service_type) as (address, ca, _):
        channel = connect(address, ca)
        stub = MarketStub(channel)
        for number, data in enumerate(adapters, 1):
            adapter = AdapterReference(hashlib.sha256(data).digest(), len(data))
            envelope = envelope_of(MAP, owner, number=number, seed=number, adapter=adapter)
            stub.Publish(pb.PublishRequest(envelope=envelope), timeout=60)

        def chunks(data: bytes):
            yield pb.AdapterChunk(digest=hashlib.sha256(data).digest(), size_bytes=len(data))
            for at in range(0, len(data), 65536):
                if at == len(data) // 2 // 65536 * 65536:
                    begun.wait()  # the market has read enough of both to have compared their sizes
                yield pb.AdapterChunk(data=data[at : at + 65536])

        def upload(data: bytes) -> str:
            try:
                stub.UploadAdapter(chunks(data), timeout=120)
            except grpc.RpcError as error:
                return dict(error.trailing_metadata() or ()).get(CODE_KEY, error.code().name)
            return "stored"

        with ThreadPoolExecutor(2) as pool:
            ended = sorted(pool.map(upload, adapters))
        channel.close()
    return ended


class ComparesAtTheStartAlone(MarketService):
    """Charges without asking again."""

    def _charge_adapter(self, payer, digest, size):
        self._quotas.charge(payer, Quota.ADAPTER_BYTES, size, int(time.time()))


def test_uploads_that_begin_together_do_not_pass_the_quota_together(tmp_path):
    assert uploaded_at_once(tmp_path / "a", MarketService) == ["quota", "stored"]
    assert uploaded_at_once(tmp_path / "b", ComparesAtTheStartAlone) == ["stored", "stored"]  # the control


class ChargesAttempts(MarketService):
    """The control: a market that charges an upload when it begins, to whom its digest belongs."""

    def _payer(self, owner: bytes, digest: bytes, size: int) -> bytes | None:
        payer = super()._payer(owner, digest, size)
        if payer is not None:
            self._quotas.charge(payer, Quota.ADAPTER_BYTES, size, int(time.time()))
        return payer


def uploads_of(tmp_path, service_type) -> list[str]:
    """Return how an owner's uploads end, after a stranger announced the same adapters and sent rubbish."""
    owner, adapters = Ed25519PrivateKey.generate(), [adapter_bytes(number, width=11_700, rank=64) for number in (1, 2)]
    size = len(adapters[0])
    digests = [hashlib.sha256(data).digest() for data in adapters]
    with running_market(tmp_path, MAP, limits=Limits(adapter_bytes=64 << 20), service_type=service_type) as (address, ca, _):
        channel = connect(address, ca)
        stub = MarketStub(channel)

        def upload(digest: bytes, data: bytes) -> str:
            chunks = (pb.AdapterChunk(digest=digest, size_bytes=size, data=data[at : at + 65536]) for at in range(0, len(data), 65536))
            try:
                stub.UploadAdapter(chunks, timeout=60)
            except grpc.RpcError as error:
                return dict(error.trailing_metadata() or ()).get(CODE_KEY, error.code().name)
            return "stored"

        for number, digest in enumerate(digests, 1):
            adapter = AdapterReference(digest, size)
            envelope = envelope_of(MAP, owner, number=number, seed=number, adapter=adapter)
            stub.Publish(pb.PublishRequest(envelope=envelope), timeout=10)
        assert upload(digests[0], b"rubbish") == "adapter"
        outcomes = [upload(digests[0], adapters[0]), upload(digests[0], adapters[0]), upload(digests[1], adapters[1])]
        channel.close()
    return outcomes


def test_bytes_of_adapters_are_charged_to_their_owner_once_they_are_stored(tmp_path):
    # The same adapter again costs nothing, nor does a stranger's rubbish; the second adapter would make 80 of 64 MB.
    assert uploads_of(tmp_path, MarketService) == ["stored", "stored", "quota"]


def test_a_market_that_charges_attempts_lets_a_stranger_use_up_an_owners_quota(tmp_path):
    """Control."""
    assert uploads_of(tmp_path, ChargesAttempts) == ["quota"] * 3


@pytest.mark.slow
def test_a_market_process_has_the_quota_of_its_options(tmp_path):
    owner = Ed25519PrivateKey.generate()
    with (
        market_process(tmp_path / "home", options=("--open", "--map", "kme-lin-96", "--releases-a-day", "1")) as (started, _),
        MarketClient(started["address"], Path(started["ca"]), tmp_path / "client") as client,
    ):
        client.publish(envelope_of(default_map(), owner))
        with pytest.raises(QuotaExceeded):
            client.publish(envelope_of(default_map(), owner, number=2))
    veilmart("market", "up", "--port", "0", "--adapter-mb-a-day", "1", home=tmp_path / "other", code=2)
    veilmart("market", "up", "--port", "0", "--metrics", "0.0.0.0:9464", home=tmp_path / "other", code=2)
