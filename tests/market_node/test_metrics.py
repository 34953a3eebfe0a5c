"""What Prometheus reads of a market: right counts, and no label that says who called or what about."""

import urllib.request

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import Counter
from prometheus_client.parser import text_string_to_metric_families

from market_node.metrics import CALLS, OUTCOMES, SECONDS, Metrics, loopback, scraped
from protocol.channel import CHUNK_BYTES, connect
from protocol.encryption import STD128, MatchPlan, QueryKey
from protocol.errors import UsageError
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.nodes.guard_processes import wait_for
from tests.protocol.worlds import DIMENSION, envelope_of, small_map

MAP = small_map()
LABELS = {
    "call": set(CALLS),
    "outcome": set(OUTCOMES),
    "le": {*map(str, SECONDS), "+Inf"},
}
CANARY = "CANARY-7741"


def samples(metrics: Metrics) -> list:
    with scraped(metrics, "0") as address:
        assert address.startswith("127.0.0.1:")
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    assert CANARY not in text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def beyond(found: list) -> set[tuple[str, str]]:
    """Return the labels that are not of the fixed sets."""
    labels = {label for sample in found for label in sample.labels.items()}
    return {(name, value) for name, value in labels if value not in LABELS.get(name, ())}


def busy(address: str, ca) -> bytes:
    """Publish, ask and be refused; return the id of the release."""
    channel, owner = connect(address, ca), Ed25519PrivateKey.generate()
    stub = MarketStub(channel)
    receipt = stub.Publish(pb.PublishRequest(envelope=envelope_of(MAP, owner)), timeout=10)
    with pytest.raises(grpc.RpcError):
        stub.Publish(pb.PublishRequest(envelope=CANARY.encode()), timeout=10)
    with pytest.raises(grpc.RpcError):  # no such method: a name that a stranger chose
        channel.unary_unary(f"/veilmart.v1.Market/{CANARY}", bytes, bytes)(b"", timeout=10)
    with pytest.raises(grpc.RpcError):
        stub.Describe(pb.DescribeRequest(), timeout=1000, metadata=(("identity", CANARY),))
    query = QueryKey.fresh(MatchPlan.build(1, DIMENSION)).encrypt(np.full(DIMENSION, 0.1)).to_bytes()
    head = stub.Describe(pb.DescribeRequest(), timeout=10).head

    def chunks():
        yield pb.MatchChunk(profile=STD128.name, map_id=MAP.map_id, catalogue_size=head.size, catalogue_head=digest)
        for start in range(0, len(query), CHUNK_BYTES):
            yield pb.MatchChunk(data=query[start : start + CHUNK_BYTES])

    digest = bytes(32)
    with pytest.raises(grpc.RpcError):
        list(stub.Match(chunks(), timeout=60))
    channel.close()
    return receipt.release_id


def test_calls_are_counted_by_name_and_outcome_and_by_nothing_else(tmp_path):
    metrics = Metrics()
    with running_market(tmp_path, MAP, metrics=metrics) as (address, ca, _):
        busy(address, ca)
        wait_for(lambda: sum(sample.value for sample in samples(metrics) if sample.name == "veilmart_calls_total") >= 5)  # after its answer
        found = samples(metrics)
    assert not beyond(found)
    counts = {(s.labels["call"], s.labels["outcome"]): s.value for s in found if s.name == "veilmart_calls_total" and s.value}
    assert counts == {
        ("Publish", "OK"): 1, ("Publish", "INVALID_ARGUMENT"): 1, ("Describe", "INVALID_ARGUMENT"): 1, ("Describe", "OK"): 1,
        ("Match", "FAILED_PRECONDITION"): 1,
    }  # fmt: skip
    values = {s.name: s.value for s in found if not s.labels}
    assert values["veilmart_releases"] == 1
    assert values["veilmart_queries"] == values["veilmart_uploads"] == values["veilmart_unsent_bytes"] == 0
    assert values["process_resident_memory_bytes"] > 0
    assert all(s.value == 0 for s in found if s.name == "veilmart_calls_open"), "every call that began has ended"


def test_a_build_that_counts_by_release_is_caught(tmp_path):
    """Control."""
    metrics = Metrics()
    by_release = Counter("veilmart_published", "By release.", ("release",), registry=metrics.registry)
    with running_market(tmp_path, MAP, metrics=metrics) as (address, ca, _):
        by_release.labels(busy(address, ca).hex()).inc()
        assert {name for name, _ in beyond(samples(metrics))} == {"release"}


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9464", "[::]:9464", "192.0.2.7:9464", "market.example:9464", "x", "70000", "127.0.0.1:-1", ""]
)
def test_metrics_are_for_this_machine_alone(address):
    with pytest.raises(UsageError):
        loopback(address)


@pytest.mark.parametrize(
    ("address", "host"), [("9464", "127.0.0.1"), ("localhost:9464", "127.0.0.1"), ("127.0.0.2:9464", "127.0.0.2"), ("[::1]:9464", "::1")]
)
def test_loopback_has_several_names(address, host):
    assert loopback(address) == (host, 9464)


def test_a_port_in_use_is_one_clear_error():
    with scraped(Metrics(), "0") as address, pytest.raises(UsageError, match="--metrics"), scraped(Metrics(), address):
        pass
