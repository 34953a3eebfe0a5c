"""The service over a real TLS channel: what is refused, with which status, and that others go on being served."""

import hashlib
import logging
import threading

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node import service as services
from market_node.service import STATUSES
from market_node.uploads import Uploads
from protocol.admission import AdmissionPolicy
from protocol.catalogue import EMPTY_HEAD, Head, open_cards, open_rows, split_cards
from protocol.channel import CHUNK_BYTES, CODE_KEY, RETRY_KEY, connect
from protocol.codec import canonical_json, domain_tag
from protocol.encryption import STD128, MatchPlan, QueryKey
from protocol.errors import VeilmartError
from protocol.privacy import Guarantee
from protocol.release import AdapterReference
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.protocol.worlds import DIMENSION, adapter_bytes, envelope_of, small_map

MAP, OWNER = small_map(), Ed25519PrivateKey.generate()
SIZE = 3


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    with running_market(tmp_path_factory.mktemp("market"), MAP) as (address, ca, store):
        channel = connect(address, ca)
        stub = MarketStub(channel)
        for number in range(SIZE):
            stub.Publish(pb.PublishRequest(envelope=envelope_of(MAP, OWNER, number=number + 1, seed=number)), timeout=10)
        yield stub, store
        channel.close()


@pytest.fixture
def stub(market):
    return market[0]


def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), dict(caught.value.trailing_metadata() or ()).get(CODE_KEY, "")


def publish(stub, envelope):
    return stub.Publish(pb.PublishRequest(envelope=envelope), timeout=10)


def described(stub):
    return stub.Describe(pb.DescribeRequest(), timeout=10)


def test_publishing_again_gives_the_same_place(stub):
    envelope = envelope_of(MAP, Ed25519PrivateKey.generate(), seed=77)
    first, size = publish(stub, envelope), described(stub).head.size
    assert publish(stub, envelope).index == first.index
    assert described(stub).head.size == size


def test_the_synced_catalogue_is_the_signed_one(stub):
    description = described(stub)
    chunks = list(stub.SyncCatalogue(pb.SyncRequest(form=pb.CATALOGUE_FORM_ROWS), timeout=10))
    rows, terms = b"".join(chunk.rows for chunk in chunks), [terms for chunk in chunks for terms in chunk.terms]
    head = head_of(chunks[-1].head)
    catalogue = open_rows(MAP, rows, terms, head, description.market_key)
    assert len(catalogue) == head.size >= SIZE
    assert len(rows) == 16 * head.size
    parts = list(stub.GetCards(pb.CardsRequest(catalogue_size=head.size, pages=[0]), timeout=10))
    cards = split_cards(b"".join(part.data for part in parts), head.size)
    assert open_cards(catalogue, [parts[0].digests], {0: cards}).names[:SIZE] == tuple(f"owner-{seed}" for seed in range(SIZE))


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ({"pages": [1]}, "format"),
        ({"pages": [0, 0]}, "format"),
        ({"pages": range(65)}, "format"),
        ({"catalogue_size": 99}, "catalogue.stale"),
    ],
)
def test_cards_that_are_not_there_are_refused(stub, how, code):
    request = pb.CardsRequest(**{"catalogue_size": SIZE, **how})
    assert refused(lambda: list(stub.GetCards(request, timeout=10)))[1] == code


def head_of(message) -> Head:
    chains = message.head, message.terms_size, message.terms, message.cards
    return Head(message.size, *chains, message.signature)


def tampered(envelope: bytes) -> bytes:
    return envelope[:-1] + bytes([envelope[-1] ^ 1])


REFUSED_RELEASES = {
    "a bad signature": (lambda: tampered(envelope_of(MAP, OWNER, seed=5)), "INVALID_ARGUMENT", "signature"),
    "garbage": (lambda: b"garbage" * 50, "INVALID_ARGUMENT", "format"),
    "nothing": (lambda: b"", "INVALID_ARGUMENT", "format"),
    "another map": (lambda: envelope_of(small_map("other", 9), OWNER, seed=5), "FAILED_PRECONDITION", "specification.incompatible"),
    "simulated noise": (lambda: envelope_of(MAP, OWNER, seed=5, simulated=True), "INVALID_ARGUMENT", "usage"),
    "an epsilon above the policy": (
        lambda: envelope_of(MAP, OWNER, number=8, guarantee=Guarantee(8.0, 1e-6)), "FAILED_PRECONDITION", "specification.not-admitted",
    ),
    "another delta": (
        lambda: envelope_of(MAP, OWNER, number=8, guarantee=Guarantee(1.0, 1e-5)), "FAILED_PRECONDITION", "specification.not-admitted",
    ),
    "hardly any record": (
        lambda: envelope_of(MAP, OWNER, number=8, guarantee=Guarantee(2.0, 1e-6), count=1), "FAILED_PRECONDITION",
        "specification.not-admitted",  # the noisy count reaches 50 with a chance of 1e-7
    ),
    "other bytes under the same number": (lambda: envelope_of(MAP, OWNER, number=1, seed=50), "ALREADY_EXISTS", "already-published"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "status", "code"), REFUSED_RELEASES.values(), ids=REFUSED_RELEASES)
def test_a_release_that_breaks_a_rule_is_refused_and_changes_nothing(stub, make, status, code):
    before = described(stub).head
    assert refused(lambda: publish(stub, make())) == (getattr(grpc.StatusCode, status), code)
    assert described(stub).head == before


def test_a_simulation_takes_simulated_releases(tmp_path):
    with running_market(tmp_path, MAP, simulation=True) as (address, ca, _):
        channel = connect(address, ca)
        assert publish(MarketStub(channel), envelope_of(MAP, OWNER, simulated=True)).index == 0
        channel.close()


def test_a_market_says_what_it_takes_and_takes_it(tmp_path):
    policy = AdmissionPolicy(8.0, None, 1, 4.0)
    with running_market(tmp_path, MAP, policy=policy) as (address, ca, _):
        channel = connect(address, ca)
        stub = MarketStub(channel)
        told = described(stub).admission
        assert (told.largest_epsilon, told.delta, told.smallest_count) == ("8.0", "", 1)
        assert told.largest_adapter_epsilon == "4.0"
        assert publish(stub, envelope_of(MAP, OWNER, guarantee=Guarantee(8.0, 1e-5), count=60)).index == 0
        channel.close()


def upload(stub, digest: bytes, size: int, *parts: bytes):
    chunks = [pb.AdapterChunk(digest=digest, size_bytes=size), *(pb.AdapterChunk(data=part) for part in parts)]
    return stub.UploadAdapter(iter(chunks), timeout=10)


def test_an_adapter_comes_back_as_it_went(stub):
    data = adapter_bytes(width=1200)
    digest = hashlib.sha256(data).digest()
    upload(stub, digest, len(data), *(data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)))
    assert b"".join(chunk.data for chunk in stub.DownloadAdapter(pb.AdapterRequest(digest=digest), timeout=10)) == data


BAD_UPLOADS = {
    "no adapter": (hashlib.sha256(b"abcd").digest(), 4, [b"abcd"], "adapter"),
    "another digest": (bytes(32), 4, [b"abcd"], "adapter"),
    "fewer bytes": (hashlib.sha256(b"abcd").digest(), 5, [b"abcd"], "adapter"),
    "more bytes": (hashlib.sha256(b"abcd").digest(), 3, [b"abcd"], "adapter"),
    "a short digest": (b"abc", 4, [b"abcd"], "format"),
    "a gigabyte": (bytes(32), 1 << 30, [b"x"], "format"),
    "a chunk too large": (bytes(32), 1 << 20, [bytes(CHUNK_BYTES + 1)], "format"),
}


@pytest.mark.parametrize(("digest", "size", "parts", "code"), BAD_UPLOADS.values(), ids=BAD_UPLOADS)
def test_a_wrong_upload_leaves_nothing_behind(market, digest, size, parts, code):
    stub, store = market
    before = set(store._adapters.iterdir())
    assert refused(lambda: upload(stub, digest, size, *parts)) == (grpc.StatusCode.INVALID_ARGUMENT, code)
    assert set(store._adapters.iterdir()) == before


@pytest.mark.parametrize("digest", [bytes(32), b"", b"../../etc/passwd"])
def test_an_unknown_adapter_is_not_found(stub, digest):
    assert refused(lambda: list(stub.DownloadAdapter(pb.AdapterRequest(digest=digest), timeout=10))) == (
        grpc.StatusCode.NOT_FOUND,
        "not-found",
    )


def match(stub, data: bytes, *, head=None, profile=STD128.name, map_id=MAP.map_id, chunk=CHUNK_BYTES):
    head = head or described(stub).head
    first = pb.MatchChunk(profile=profile, map_id=map_id, catalogue_size=head.size, catalogue_head=head_of(head).digest)
    chunks = [first, *(pb.MatchChunk(data=data[i : i + chunk]) for i in range(0, len(data), chunk))]
    return b"".join(part.data for part in stub.Match(iter(chunks), timeout=120))


def honest_query(stub, vector=None) -> tuple[QueryKey, bytes]:
    key = QueryKey.fresh(MatchPlan.build(described(stub).head.size, DIMENSION))
    return key, key.encrypt(np.full(DIMENSION, 0.2) if vector is None else vector).to_bytes()


def test_an_all_zero_query_is_answered_like_any_other(stub):
    lengths = {len(match(stub, honest_query(stub, vector)[1])) for vector in (np.zeros(DIMENSION), np.full(DIMENSION, 0.3))}
    assert len(lengths) == 1


def above_the_prime(data: bytes) -> bytes:
    return STD128.data_prime.to_bytes(7, "little") + data[7:]  # the first word is 50 bits long


BAD_QUERIES = {
    "too short": (lambda data: data[:-8], {}, "INVALID_ARGUMENT", "format"),
    "too long": (lambda data: data + bytes(8), {}, "INVALID_ARGUMENT", "format"),
    "endless": (lambda data: data * 10, {}, "INVALID_ARGUMENT", "format"),
    "nothing": (lambda data: b"", {}, "INVALID_ARGUMENT", "format"),
    "a value at the prime": (above_the_prime, {}, "INVALID_ARGUMENT", "format"),
    "all bits set": (lambda data: b"\xff" * STD128.query_bytes, {}, "INVALID_ARGUMENT", "format"),
    "another profile": (lambda data: data, {"profile": "std64"}, "FAILED_PRECONDITION", "specification.incompatible"),
    "another map": (lambda data: data, {"map_id": bytes(32)}, "FAILED_PRECONDITION", "specification.incompatible"),
    "a stale catalogue": (lambda data: data, {"head": pb.SignedHead(size=1, head=EMPTY_HEAD)}, "FAILED_PRECONDITION", "catalogue.stale"),
    "chunks too large": (lambda data: data, {"chunk": CHUNK_BYTES * 2}, "INVALID_ARGUMENT", "format"),
}


@pytest.mark.parametrize(("spoil", "how", "status", "code"), BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_a_bad_query_gets_a_typed_error_and_others_are_served(stub, spoil, how, status, code):
    _, data = honest_query(stub)
    assert refused(lambda: match(stub, spoil(data), **how)) == (getattr(grpc.StatusCode, status), code)
    assert match(stub, data)


def test_a_querier_that_disconnects_mid_stream_leaves_the_market_serving(stub):
    head = described(stub).head
    _, data = honest_query(stub)

    def half():
        yield pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, catalogue_size=head.size, catalogue_head=head_of(head).digest)
        for _ in range(3):
            yield pb.MatchChunk(data=data[:CHUNK_BYTES])
        raise RuntimeError("the querier's process died")

    for _ in range(2 * services.QUERIES_AT_ONCE):  # more than there are places: each must be given back
        with pytest.raises(grpc.RpcError):
            list(stub.Match(half(), timeout=10))
    assert match(stub, data)


def test_an_upload_that_breaks_off_leaves_nothing(market):
    stub, store = market
    before = set(store._adapters.iterdir())

    def half():
        yield pb.AdapterChunk(digest=bytes(32), size_bytes=1 << 20, data=bytes(CHUNK_BYTES))
        raise RuntimeError("the owner's process died")

    for _ in range(2 * Uploads().most):  # more than there are places
        with pytest.raises(grpc.RpcError):
            stub.UploadAdapter(half(), timeout=10)
    after = adapter_bytes(alpha=7)
    upload(stub, hashlib.sha256(after).digest(), len(after), after)
    assert {path.name for path in set(store._adapters.iterdir()) - before} == {hashlib.sha256(after).hexdigest()}


@pytest.fixture
def silence():
    """Yield a function that makes a stream of one message and then nothing, until the test is over."""
    over = threading.Event()

    def stream(first):
        yield first
        over.wait(20)

    yield stream
    over.set()


def test_a_query_that_stops_coming_is_ended_and_its_place_given_back(stub, silence, monkeypatch):
    _, data = honest_query(stub)
    monkeypatch.setattr(services, "UPLOAD_S", 0.1)
    first = pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, data=data[:CHUNK_BYTES])
    calls = [stub.Match(silence(first), timeout=10) for _ in range(services.QUERIES_AT_ONCE)]
    for call in calls:
        assert refused(lambda call=call: list(call))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    monkeypatch.undo()
    assert match(stub, data)


def test_a_query_beyond_the_last_place_is_refused_at_once(market, silence):
    stub, _ = market
    _, data = honest_query(stub)
    first = pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id)
    calls = [stub.Match(silence(first), timeout=10) for _ in range(services.QUERIES_AT_ONCE)]
    described(stub)  # the calls above went out first on this connection
    with pytest.raises(grpc.RpcError) as caught:
        match(stub, data)
    trailing = dict(caught.value.trailing_metadata())
    assert (caught.value.code(), trailing[CODE_KEY]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota")
    assert int(trailing[RETRY_KEY]) >= 1, "seconds after which it is worth asking again"
    for call in calls:
        call.cancel()


@pytest.mark.parametrize("timeout", [None, 3600])
def test_a_call_without_an_end_is_refused(stub, timeout):
    expected = (grpc.StatusCode.INVALID_ARGUMENT, "usage")
    assert refused(lambda: stub.Describe(pb.DescribeRequest(), timeout=timeout)) == expected
    assert refused(lambda: list(stub.SyncCatalogue(pb.SyncRequest(), timeout=timeout))) == expected


def test_an_error_keeps_its_own_code_and_its_text_stays_short(stub):
    later = domain_tag("release", 4) + bytes(200)
    assert refused(lambda: publish(stub, later)) == (grpc.StatusCode.INVALID_ARGUMENT, "format.version")
    text = canonical_json({"a" * 12_000: 1})
    long = domain_tag("release", 3) + len(text).to_bytes(4, "little") + text + bytes(72)
    assert refused(lambda: publish(stub, long)) == (grpc.StatusCode.INVALID_ARGUMENT, "format")


@pytest.mark.parametrize("sizes", [[], [10], [CHUNK_BYTES, 1, CHUNK_BYTES], [40_000] * 5, [100] * 2000])
def test_entries_travel_in_order_and_in_small_chunks(sizes):
    entries = [position.to_bytes(2, "little") * (size // 2) + b"x" * (size % 2) for position, size in enumerate(sizes)]
    chunks = list(services.in_chunks(entries))
    assert [entry for chunk in chunks for entry in chunk] == entries
    assert all(0 < sum(map(len, chunk)) <= CHUNK_BYTES for chunk in chunks)


def test_what_was_not_raised_on_purpose_tells_an_incident_and_no_more(tmp_path, caplog):
    secret = "PRIVATE-5519"

    class Broken(services.MarketService):
        def _signed(self, head):
            raise ZeroDivisionError(secret)

    with running_market(tmp_path, MAP, service_type=Broken) as (address, ca, _), caplog.at_level(logging.CRITICAL):
        channel = connect(address, ca)
        with pytest.raises(grpc.RpcError) as caught:
            described(MarketStub(channel))
        channel.close()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert secret not in caught.value.details()


def test_every_error_that_may_cross_the_wire_has_one_status():
    kinds = [kind for kind, _ in STATUSES]
    assert len(set(kinds)) == len(kinds)
    for position, kind in enumerate(kinds):
        assert not any(issubclass(kind, earlier) for earlier in kinds[:position]), f"{kind.__name__} is hidden by its parent"
    assert all(issubclass(kind, VeilmartError) for kind in kinds)


def test_an_unknown_release_is_not_found(stub):
    assert refused(lambda: stub.GetRelease(pb.ReleaseRequest(release_id=bytes(32)), timeout=10))[1] == "not-found"


def test_an_adapter_reference_has_a_bounded_size():
    with pytest.raises(VeilmartError):
        AdapterReference(bytes(32), 1 << 30)
