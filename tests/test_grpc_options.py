"""gRPC takes options that it does not know without a word: a name with a mistake in it limits nothing and allows nothing."""

from pathlib import Path

import grpc._cython.cygrpc as core
import pytest

from market_node.server import OPTIONS as OF_MARKETS
from nodes.guard_service import OPTIONS as OF_GUARDS
from protocol.channel import OPTIONS as OF_CLIENTS


@pytest.fixture(scope="module")
def known() -> bytes:
    """The library itself, which compares names as C strings."""
    return Path(core.__file__).read_bytes()


def unknown(names: set[str], known: bytes) -> set[str]:
    return {name for name in names if name.encode() + b"\0" not in known}


def test_grpc_knows_every_option_that_we_set(known):
    names = {name for name, _ in (*OF_MARKETS, *OF_GUARDS, *OF_CLIENTS)}
    assert len(names) > 15
    assert unknown(names, known) == set()


def test_a_name_that_it_does_not_know_would_be_found(known):
    """Control: this is how its constant is called, and stood here once."""
    wrong = "grpc.http2.min_recv_ping_interval_without_data_ms"
    assert unknown({wrong, "grpc.http2.max_ping_strikes"}, known) == {wrong}
