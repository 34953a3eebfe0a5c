"""A campaign's folder: envelopes are kept before they are published, nobody is asked twice, and a stranger's envelope is refused."""

import datetime
import json
import threading
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from market_node.campaigns import Asked, Campaign, Claims, NodeResult, Outcome, Plan, all_campaigns, drive
from market_node.certificates import courier
from market_node.flower import server
from market_node.members import Members
from nodes.grid import InProcessGrid
from protocol.errors import FormatError, MarketUnreachable, NotFound, UsageError
from protocol.keys import signing_key
from protocol.processes import free_port
from protocol.transparency import Receipt
from tests.market_node.market import running_market
from tests.protocol.worlds import envelope_of, small_map

MAP = small_map()


def key(place: int) -> str:
    return (b"key-%d" % (1000 + place)).hex()


class Owners:
    """A ClientApp whose nodes answer with these envelopes, and how often each was asked."""

    def __init__(self, *envelopes: bytes, delay: float = 0.0) -> None:
        self.app, self.asked, self.alone, self.at_once = ClientApp(), [0] * len(envelopes), True, 0

        @self.app.train()
        def train(message: Message, context: Context) -> Message:
            return Message(RecordDict(), reply_to=message)

        @self.app.query("specify")
        def specify(message: Message, context: Context) -> Message:
            place = context.node_id - 1000
            self.asked[place] += 1
            time.sleep(delay)
            return Message(RecordDict({"release": ConfigRecord({"envelope": envelopes[place]})}), reply_to=message)


class KeyedGrid(InProcessGrid):
    """Nodes with registered keys; some may be down."""

    down: frozenset[int] = frozenset()

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node - 1000 not in self.down]

    def get_nodes(self):
        return [NodeInfo(node_id=node, public_key=b"key-%d" % node) for node in self.get_node_ids()]


def run(campaign: Campaign, owners: Owners, down=(), grid_type=KeyedGrid) -> dict:
    grid = grid_type(owners.app, [{}] * len(owners.asked), workers=8)
    grid.down = frozenset(down)
    config = {"folder": str(campaign.folder)}
    try:
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))
    finally:
        grid.close()
    return campaign.account()


def planned(tmp_path, address, ca, nodes=(), timeout_s=30.0) -> Campaign:
    return Campaign.create(tmp_path / "campaigns", Plan(address, str(ca), "1.0", "1e-06", timeout_s, tuple(nodes)))


def outcomes(account: dict) -> list[tuple[str, str]]:
    return [(node["outcome"], node["reason"]) for node in account["nodes"]]


def envelopes(count: int) -> list[bytes]:
    return [envelope_of(MAP, Ed25519PrivateKey.generate(), seed=n) for n in range(count)]


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "market", MAP) as made:
        yield made


def test_envelopes_that_come_while_the_market_is_down_are_kept_and_published_without_asking_again(tmp_path, market):
    address, ca, store = market
    good = envelopes(3)
    owners = Owners(*good)
    nobody_listens = f"127.0.0.1:{free_port()}"
    campaign = planned(tmp_path, nobody_listens, ca, timeout_s=1.5)
    account = run(campaign, owners)
    assert outcomes(account) == [("kept", "market.unreachable")] * 3
    assert owners.asked == [1, 1, 1]
    plan = campaign.folder / "plan.json"
    plan.write_text(plan.read_text().replace(nobody_listens, address).replace('"timeout_s": 1.5', '"timeout_s": 30.0'))
    account = run(Campaign.open(campaign.folder), owners)
    assert outcomes(account) == [("published", "")] * 3
    assert owners.asked == [1, 1, 1], "a node was asked again for what was kept"
    assert set(store.envelopes(0, 9)) == set(good)


def test_a_published_release_has_a_receipt_that_verifies_offline(tmp_path, market):
    address, ca, _ = market
    (envelope,) = envelopes(1)
    campaign = planned(tmp_path, address, ca)
    (node,) = run(campaign, Owners(envelope))["nodes"]
    receipt = Receipt.from_bytes((campaign.folder / "receipts" / f"{node['release_id'][:16]}.receipt").read_bytes())
    assert receipt.envelope == envelope
    assert receipt.verify().size == node["index"] + 1 == 1


def test_a_receipt_under_another_key_is_no_receipt(tmp_path, market):
    address, ca, _ = market
    plan = Plan(address, str(ca), "1.0", "1e-06", 1.0, (), Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex())
    campaign = Campaign.create(tmp_path / "campaigns", plan)
    assert [outcome for outcome, _ in outcomes(run(campaign, Owners(*envelopes(1))))] == ["kept"]
    assert not (campaign.folder / "receipts").exists()


def test_without_a_folder_the_same_envelopes_would_be_lost(tmp_path, market):
    """The control: what makes them survive is the folder."""
    _, ca, _ = market
    owners = Owners(*envelopes(1))
    run_config = {"market": f"127.0.0.1:{free_port()}", "ca": str(ca), "epsilon": "1.0", "delta": "1e-06", "timeout-s": 1.0}
    for _ in range(2):
        grid = KeyedGrid(owners.app, [{}])
        server(grid, Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config))
        grid.close()
    assert owners.asked == [2]


def test_a_market_that_comes_back_in_time_gets_the_envelopes_in_the_same_run(tmp_path):
    good = envelopes(2)
    with running_market(tmp_path / "market", MAP) as (address, ca, _):
        pass  # its certificate is made; now nobody listens
    campaign = planned(tmp_path, address, ca, timeout_s=20.0)
    owners = Owners(*good)
    done: dict = {}
    thread = threading.Thread(target=lambda: done.update(run(campaign, owners)))
    thread.start()
    time.sleep(1.0)
    assert {result.outcome for result in campaign.results()} == {"kept"}
    with running_market(tmp_path / "market", MAP, port=int(address.rpartition(":")[2])) as (_, _, store):
        thread.join(30)
        assert outcomes(done) == [("published", "")] * 2
        assert set(store.envelopes(0, 9)) == set(good)
    assert owners.asked == [1, 1]


def test_a_campaign_publishes_through_the_port_for_members_as_its_markets_courier(tmp_path):
    good, home = Ed25519PrivateKey.generate(), tmp_path / "market"
    with running_market(home, MAP, enrolled_only=True, members_port=True) as (address, ca, store):
        owner, members = good.public_key().public_bytes_raw(), Members.open(home)
        members.enrol(members.invite("City", int(time.time()) + 60), owner, "", int(time.time()))
        members.close()
        envelope, market_key = envelope_of(MAP, good), signing_key(home / "market.key").public_key().public_bytes_raw()
        # Control: without the courier's certificate the campaign stands at the port for everybody, and is told so.
        assert outcomes(run(planned(home, address, ca), Owners(envelope))) == [("refused", "unauthorised")]
        courier(home, market_key, datetime.datetime.now(datetime.UTC))
        assert outcomes(run(planned(home, address, ca), Owners(envelope))) == [("published", "")]
        assert store.envelopes(0, 9) == [envelope]


def test_a_campaign_that_goes_on_asks_only_the_open_nodes(tmp_path, market):
    address, ca, _ = market
    owners = Owners(*envelopes(3))
    campaign = planned(tmp_path, address, ca, [Asked(key(place), f"n{place}") for place in range(3)], timeout_s=1.0)
    account = run(campaign, owners, down=[1])
    assert [node["outcome"] for node in account["nodes"]] == ["missing", "published", "published"]
    account = run(campaign, owners)
    assert [(node["name"], node["outcome"]) for node in account["nodes"]] == [(f"n{place}", "published") for place in range(3)]
    assert owners.asked == [1, 1, 1]


def test_a_node_whose_process_was_lost_is_asked_again(tmp_path, market):
    address, ca, _ = market
    owners, lost = Owners(*envelopes(2)), {1000: 2, 1001: 1}

    class LosingGrid(KeyedGrid):
        def _deliver(self, message):
            node = message.metadata.dst_node_id
            lost[node] -= 1
            code = 8 if node == 1000 else 2
            return Message(Error(code, "x"), reply_to=message) if lost[node] >= 0 else super()._deliver(message)

    account = run(planned(tmp_path, address, ca), owners, grid_type=LosingGrid)
    assert outcomes(account) == [("published", ""), ("failed", "error 2")], "what a node itself refuses is not asked again"


def test_half_of_a_hundred_nodes_may_be_missing(tmp_path, market):
    address, ca, store = market
    owners = Owners(*envelopes(100))
    nodes = [Asked(key(place), f"n{place:03}") for place in range(100)]
    campaign = planned(tmp_path, address, ca, nodes, timeout_s=20.0)
    account = run(campaign, owners, down=range(0, 100, 2))
    assert (account["counts"]["published"], account["counts"]["missing"]) == (50, 50)
    assert {node["name"] for node in account["nodes"] if node["outcome"] == "missing"} == {f"n{place:03}" for place in range(0, 100, 2)}
    assert store.head().size == 50


def test_an_envelope_of_another_owner_is_refused(tmp_path, market):
    address, ca, store = market
    mine, others = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    stolen = envelope_of(MAP, others, seed=1)
    owner = mine.public_key().public_bytes_raw().hex()
    owners = Owners(stolen)
    campaign = planned(tmp_path, address, ca, [Asked(key(0), "thief", owner)])
    assert outcomes(run(campaign, owners)) == [("refused", "unauthorised")]
    assert store.head().size == 0
    unbound = planned(tmp_path, address, ca, [Asked(key(0), "thief")])
    assert outcomes(run(unbound, owners)) == [("published", "")], "the control: without an owner on record nothing tells"


def test_two_nodes_cannot_bring_the_same_owners_release(tmp_path, market):
    address, ca, store = market
    envelope = envelopes(1)[0]
    campaign = planned(tmp_path, address, ca)
    assert sorted(outcomes(run(campaign, Owners(envelope, envelope)))) == [("published", ""), ("refused", "unauthorised")]
    assert store.head().size == 1


def test_two_campaigns_at_once_never_ask_a_node_at_the_same_time(tmp_path, market):
    address, ca, _ = market
    good = envelopes(2)
    first, second = planned(tmp_path, address, ca, timeout_s=10.0), planned(tmp_path, address, ca, timeout_s=10.0)
    slow, owners = Owners(*good, delay=1.0), Owners(*good)
    done: dict = {}
    thread = threading.Thread(target=lambda: done.update(run(first, slow)))
    thread.start()
    while sum(slow.asked) < 2:
        time.sleep(0.01)
    account = run(second, owners)
    thread.join(20)
    assert outcomes(done) == outcomes(account) == [("published", "")] * 2
    assert slow.asked == owners.asked == [1, 1]


def test_a_node_that_another_campaign_holds_all_the_time_is_busy(tmp_path, market):
    address, ca, _ = market
    held = Claims(tmp_path / "campaigns" / ".asked")
    assert held.claim(key(0))
    owners = Owners(*envelopes(1))
    assert outcomes(run(planned(tmp_path, address, ca, timeout_s=0.5), owners)) == [("busy", "")]
    assert owners.asked == [0]
    held.close()
    assert outcomes(run(planned(tmp_path, address, ca), owners)) == [("published", "")]


def test_a_campaign_is_run_once_at_a_time(tmp_path):
    campaign = planned(tmp_path, "127.0.0.1:1", "ca.crt")
    with campaign.alone(), pytest.raises(UsageError, match="being run already"), Campaign.open(campaign.folder).alone():
        pass


def test_an_account_never_holds_an_envelope(tmp_path):
    campaign = planned(tmp_path, "127.0.0.1:1", "ca.crt")
    campaign.record(NodeResult(7, Outcome.KEPT, envelope="feed" * 100))
    assert "feed" not in json.dumps(campaign.account())
    assert "feed" not in repr(campaign.results())
    assert campaign.results()[0].envelope == "feed" * 100


def test_a_folder_that_is_no_campaign_is_told_apart_from_a_damaged_one(tmp_path):
    with pytest.raises(NotFound, match="campaign nothing"):
        Campaign.open(tmp_path / "nothing")
    campaign = planned(tmp_path, "127.0.0.1:1", "ca.crt")
    assert [found.campaign_id for found in all_campaigns(tmp_path / "campaigns")] == [campaign.campaign_id]
    for damage in ("{", "{}", '{"schema": "x", "made": "", "nodes": []}'):
        (campaign.folder / "plan.json").write_text(damage)
        with pytest.raises(FormatError):
            Campaign.open(campaign.folder)


def test_a_campaign_that_no_superlink_took_is_seen_to_have_failed(tmp_path):
    campaign = planned(tmp_path, "127.0.0.1:1", "ca.crt")
    with pytest.raises(MarketUnreachable):
        drive(tmp_path / "market", campaign, lambda done, of: None)
    account = campaign.account()
    assert account["state"] == "failed"
    assert "SuperLink" in account["cause"]


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e6])
def test_a_campaign_ends_some_day(timeout_s):
    with pytest.raises(UsageError, match="timeout"):
        Plan("127.0.0.1:1", "ca", "1.0", "1e-06", timeout_s)
