"""Adapters on their way in: a bounded number of bytes over all of them, a share of it for each sender, and nothing for who says nothing."""

import hashlib
import itertools
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import grpc
import pytest

from market_node import service as services
from market_node.service import MarketService, answering, host_of
from market_node.store import Store
from market_node.uploads import Uploads
from nodes import market_client
from nodes.market_client import MarketClient
from protocol.channel import CODE_KEY, RETRY_KEY, connect
from protocol.errors import QuotaExceeded
from protocol.release import MAX_ADAPTER_BYTES, AdapterReference
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.e2e.processes import market_process
from tests.market_node.market import running_market
from tests.protocol.worlds import adapter_bytes, small_map

MAP = small_map()
SMALL = 1 << 16
UNBOUNDED = Uploads(1 << 20, 1 << 60, 1 << 20)


@contextmanager
def held(uploads: Uploads, *tickets: tuple[str, int]):
    with ExitStack() as stack:
        for sender, size in tickets:
            stack.enter_context(uploads.ticket(sender, size))
        yield


def refused(uploads: Uploads, sender: str, size: int) -> bool:
    try:
        with uploads.ticket(sender, size):
            return False
    except QuotaExceeded:
        return True


def test_all_together_may_grow_to_so_many_bytes_and_no_more():
    uploads, full = Uploads(), [(f"owner-{number}", MAX_ADAPTER_BYTES) for number in range(4)]
    with held(uploads, *full):
        assert uploads.announced_bytes == uploads.most_bytes == 256 << 20
        assert refused(uploads, "another", 1)
    assert not refused(uploads, "another", MAX_ADAPTER_BYTES)
    assert (uploads.count, uploads.announced_bytes) == (0, 0)


def test_one_sender_leaves_places_for_others():
    uploads = Uploads()
    with held(uploads, ("owner", SMALL), ("owner", SMALL)):
        assert refused(uploads, "owner", SMALL)
        assert not refused(uploads, "another", SMALL)
    with held(uploads, *[(f"owner-{number}", SMALL) for number in range(8)]):
        assert refused(uploads, "another", SMALL)


def test_a_ticket_comes_back_whatever_ends_the_upload():
    uploads = Uploads()
    for _ in range(20):
        with pytest.raises(KeyError), uploads.ticket("owner", SMALL):
            raise KeyError
    assert (uploads.count, uploads.announced_bytes, dict(uploads._of)) == (0, 0, {})


@pytest.mark.parametrize(("peer", "host"), [("ipv4:127.0.0.1:50000", "ipv4:127.0.0.1"), ("ipv6:%5B::1%5D:50000", "ipv6:%5B::1%5D")])
def test_a_sender_is_known_by_its_host_and_not_by_its_port(peer, host):
    assert host_of(peer) == host


# At a market -------------------------------------------------------------------------------------------------------------


class Senders:
    """Uploads that announce a size, send a first part and then nothing, until the end."""

    def __init__(self, stub: MarketStub) -> None:
        self._stub, self._over = stub, threading.Event()
        self.calls: list = []

    def announce(self, size: int) -> None:
        def stream():
            yield pb.AdapterChunk(digest=bytes([len(self.calls)]) * 32, size_bytes=size, data=b"x")
            self._over.wait(300)

        self.calls.append(self._stub.UploadAdapter.future(stream(), timeout=60))

    def say_nothing(self) -> None:
        def stream():
            self._over.wait(300)
            yield pb.AdapterChunk()

        self.calls.append(self._stub.UploadAdapter.future(stream(), timeout=60))

    def end(self) -> None:
        for call in self.calls:
            call.cancel()
        self._over.set()


@contextmanager
def senders(address, ca):
    channel = connect(address, ca)
    one = Senders(MarketStub(channel))
    try:
        yield one
    finally:
        one.end()
        channel.close()


def until(condition) -> None:
    """Return once the market has come so far; fail after five minutes, which a crowded machine may need."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcome(stub: MarketStub, data: bytes) -> str:
    """Return how a whole upload ends; a refusal says when to come again."""
    try:
        stub.UploadAdapter(iter([pb.AdapterChunk(digest=hashlib.sha256(data).digest(), size_bytes=len(data), data=data)]), timeout=60)
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata())
        assert 1 <= int(trailing[RETRY_KEY]) <= 60
        return trailing[CODE_KEY]
    return "stored"


def uploads_of(tmp_path, monkeypatch, uploads: Uploads, *, hosts: bool) -> tuple[int, str, str]:
    """Return how many of eight largest uploads are taken, how an honest one ends beside them, and how once they are gone.

    hosts: whether each comes from a host of its own.
    """
    monkeypatch.setattr(services, "Uploads", lambda: uploads)
    if hosts:
        numbers = itertools.count()
        monkeypatch.setattr(services, "host_of", lambda peer: f"host-{next(numbers)}")
    with running_market(tmp_path, MAP) as (address, ca, store), senders(address, ca) as many, senders(address, ca) as honest:
        for _ in range(8):
            many.announce(MAX_ADAPTER_BYTES)
        until(lambda: uploads.count + sum(call.done() for call in many.calls) == 8)
        until(lambda: len(list(store._adapters.glob(".upload-*"))) == uploads.count)
        taken, beside = uploads.count, outcome(honest._stub, adapter_bytes(1))
        many.end()
        until(lambda: not uploads.count)
        assert not list(store._adapters.glob(".upload-*")), "what broke off is gone"
        return taken, beside, outcome(honest._stub, adapter_bytes(2))


def test_the_largest_uploads_of_many_hosts_share_one_budget_of_bytes(tmp_path, monkeypatch):
    assert uploads_of(tmp_path / "a", monkeypatch, Uploads(), hosts=True) == (4, "quota", "stored")
    assert uploads_of(tmp_path / "b", monkeypatch, UNBOUNDED, hosts=True) == (8, "stored", "stored")  # the control


def test_one_host_cannot_hold_all_places(tmp_path, monkeypatch):
    assert uploads_of(tmp_path, monkeypatch, Uploads(), hosts=False) == (2, "quota", "stored")


class HoldsBeforeItHears(MarketService):
    """The control: a market that gives a place to a call, not to an announcement."""

    @answering
    async def UploadAdapter(self, request, context):
        with self._uploads.ticket(f"call {id(context)}", 1):
            return await super().UploadAdapter(request, context)


def beside_silent_ones(tmp_path, service_type) -> str:
    with (
        running_market(tmp_path, MAP, service_type=service_type) as (address, ca, _),
        senders(address, ca) as silent,
        senders(address, ca) as honest,
    ):
        for _ in range(12):
            silent.say_nothing()
        until(lambda: silent._stub.Describe(pb.DescribeRequest(), timeout=30).market_key)  # went out after them, on one connection
        return outcome(honest._stub, adapter_bytes())


def test_who_announces_nothing_holds_nothing(tmp_path):
    assert beside_silent_ones(tmp_path / "a", MarketService) == "stored"
    assert beside_silent_ones(tmp_path / "b", HoldsBeforeItHears) == "quota"


def test_an_upload_that_never_says_anything_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "ANNOUNCEMENT_S", 0.1)
    with running_market(tmp_path, MAP) as (address, ca, _), senders(address, ca) as silent:
        silent.say_nothing()
        assert silent.calls[0].exception(timeout=30).code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_client_waits_for_a_place_and_not_for_a_day(tmp_path, monkeypatch):
    uploads, waits, data = Uploads(), [], adapter_bytes()
    monkeypatch.setattr(services, "Uploads", lambda: uploads)
    adapter = AdapterReference(hashlib.sha256(data).digest(), len(data))
    with (
        running_market(tmp_path / "m", MAP) as (address, ca, store),
        senders(address, ca) as many,
        MarketClient(address, ca, tmp_path / "home") as client,
    ):
        for _ in range(uploads.most_of_one):
            many.announce(MAX_ADAPTER_BYTES)
        until(lambda: uploads.count == uploads.most_of_one)

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            many.end()
            until(lambda: not uploads.count)

        monkeypatch.setattr(market_client, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic, time=time.time))
        client.upload_adapter(adapter, data)
        assert store.has_adapter(adapter.digest)
        assert [5 <= seconds <= 10 for seconds in waits] == [True]
        monkeypatch.setattr(Uploads, "ticket", lambda *_: (_ for _ in ()).throw(QuotaExceeded("full", retry_after_s=3600)))
        with pytest.raises(QuotaExceeded):
            client.upload_adapter(AdapterReference(bytes([1]) * 32, 10), bytes(10))
        assert len(waits) == 1


def test_an_adapter_that_is_there_is_not_read_again(tmp_path):
    data, over = adapter_bytes(), threading.Event()

    def endless(digest: bytes):
        yield pb.AdapterChunk(digest=digest, size_bytes=len(data))
        over.wait(300)

    with running_market(tmp_path, MAP) as (address, ca, _), senders(address, ca) as one:
        assert outcome(one._stub, data) == "stored"
        assert one._stub.UploadAdapter(endless(hashlib.sha256(data).digest()), timeout=30).digest
        with pytest.raises(grpc.RpcError) as waited:  # the control: another one is waited for
            one._stub.UploadAdapter(endless(bytes([1]) * 32), timeout=1)
        assert waited.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        over.set()


@pytest.mark.slow
def test_what_a_killed_market_leaves_is_gone_when_it_comes_again(tmp_path):
    home, staged = tmp_path / "home", lambda: list((tmp_path / "home" / "market" / "adapters").glob(".upload-*"))
    with market_process(home) as (started, process), senders(started["address"], home / "market" / "ca.crt") as many:
        many.announce(MAX_ADAPTER_BYTES)
        until(staged)
        process.kill()
        process.wait()
    Store.beside(home / "market").close()
    assert staged(), "the control: who only looks on tidies up nothing, since the market may be running"
    Store.open(home / "market").close()
    assert not staged()
