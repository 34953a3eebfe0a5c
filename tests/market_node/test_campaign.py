"""The campaign: one account a node, whatever a node answers."""

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from market_node.flower import server
from nodes.grid import InProcessGrid
from protocol.errors import UsageError
from tests.market_node.market import running_market
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()


class KeyedGrid(InProcessGrid):
    """An in-process grid whose nodes have registered keys, as in a deployment."""

    def get_nodes(self):
        return [NodeInfo(node_id=node, public_key=b"key-%d" % node) for node in self.get_node_ids()]


def nodes_that_answer(*contents, delays=None, train_fails=()):
    """Return a ClientApp whose nodes answer `query.specify` with these contents, in the order of their ids from 1000."""
    app, rounds = ClientApp(), {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id - 1000 in train_fails:
            return Message(Error(2, "x"), reply_to=message)
        return Message(RecordDict(), reply_to=message)

    @app.query("specify")
    def specify(message: Message, context: Context) -> Message:
        place = context.node_id - 1000
        rounds[place] = rounds.get(place, -1) + 1
        time.sleep((delays or {}).get(place, 0))
        content = contents[place]
        if callable(content):
            content = content(rounds[place])
        if isinstance(content, Error):
            return Message(content, reply_to=message)
        return Message(content, reply_to=message)

    return app, len(contents)


def release(envelope):
    return RecordDict({"release": ConfigRecord({"envelope": envelope})})


def campaign(tmp_path, market, app, count, **config):
    out = tmp_path / "campaign.json"
    grid = KeyedGrid(app, [{}] * count, workers=count)
    address, ca, store = market
    run = {"market": address, "ca": str(ca), "epsilon": "1.0", "delta": "1e-06", "timeout-s": 3, "out": str(out), **config}
    try:
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run))
    finally:
        grid.close()
    account = json.loads(out.read_text())
    assert account["schema"] == "veilmart.campaign/1"
    return [(node["node_id"], node["outcome"], node["reason"]) for node in account["nodes"]], store


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "market", MAP) as made:
        yield made


def test_no_answer_of_one_node_ends_the_campaign_of_the_others(tmp_path, market):
    good = [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=n) for n in range(2)]
    forged = good[0][:-1] + bytes([good[0][-1] ^ 1])
    surrogate = b'{"\\ud800":1}'
    odd = b"veilmart/release/v3\0" + len(surrogate).to_bytes(4, "little") + surrogate + bytes(72)
    app, count = nodes_that_answer(
        release(good[0]), RecordDict(), release(1 << 40), release("text"), RecordDict({"release": ConfigRecord({})}),
        release(forged), Error(8, "gone"), release(odd), release(b""), lambda n: release(good[1] if n > 1 else b""), release(b"x" * 100),
        train_fails=(10,),
    )  # fmt: skip
    account, store = campaign(tmp_path, market, app, count)
    assert account == [
        (1000, "published", ""), (1001, "refused", "format"), (1002, "refused", "format"), (1003, "refused", "format"),
        (1004, "refused", "format"), (1005, "refused", "signature"), (1006, "failed", "error 8"), (1007, "refused", "format"),
        (1008, "not available", ""), (1009, "published", ""), (1010, "failed", "error 2"),
    ]  # fmt: skip
    assert set(store.envelopes(0, 9)) == set(good)


def test_an_envelope_is_published_while_another_node_is_still_thinking(tmp_path, market):
    good = envelope_of(MAP, Ed25519PrivateKey.generate())
    seen = []

    def late(n):
        seen.append(market[2].head().size)
        return release(b"")

    app, count = nodes_that_answer(release(good), late, delays={1: 0.7})
    account, _ = campaign(tmp_path, market, app, count, **{"timeout-s": 2})
    assert seen[0] == 1
    assert [outcome for _, outcome, _ in account] == ["published", "not available"]


def test_a_campaign_ends_when_its_time_is_up_and_names_who_is_missing(tmp_path, market):
    app, count = nodes_that_answer(release(b""), release(b""), delays={1: 3})
    grid_started = time.monotonic()
    account, _ = campaign(tmp_path, market, app, count, **{"timeout-s": 1})
    assert time.monotonic() - grid_started < 5
    assert [outcome for _, outcome, _ in account] == ["not available", "missing"]


def test_nodes_are_chosen_by_key_and_an_absent_one_is_named(tmp_path, market):
    app, count = nodes_that_answer(*(release(envelope_of(MAP, Ed25519PrivateKey.generate(), seed=n)) for n in range(3)))
    absent = b"key-77".hex()
    account, _ = campaign(tmp_path, market, app, count, nodes=f"{b'key-1002'.hex()}, {absent}")
    assert account == [(0, "missing", f"no connected node has the key {absent}"), (1002, "published", "")]


def test_a_key_that_is_not_hexadecimal_is_refused(tmp_path, market):
    app, count = nodes_that_answer(release(b""))
    with pytest.raises(UsageError, match="hexadecimal"):
        campaign(tmp_path, market, app, count, nodes="node-1")
