"""The shim and the in-process grid: one guard call a message, and no exception text leaves the node."""

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from nodes import guard as guards
from nodes.flower import client
from nodes.grid import InProcessGrid
from protocol.errors import RecordError

SECRET = "PRIVATE-7713"


class FakeGuard:
    """Records what the shim asks of it."""

    def __init__(self, envelope: bytes | None) -> None:
        self.envelope, self.orders = envelope, []

    def request(self, order):
        if order.guarantee.epsilon > 5:
            raise RecordError(SECRET)
        self.orders.append(order)

    def collect(self):
        return self.envelope


@pytest.fixture
def grid():
    addresses = []
    for name, envelope in (("a", b"envelope"), ("b", None)):
        guards._LOCAL_GUARDS[name] = FakeGuard(envelope)
        addresses.append({"guard": f"local:{name}"})
    grid = InProcessGrid(client, addresses)
    yield grid
    grid.close()
    guards._LOCAL_GUARDS.clear()


def ask(grid, message_type, **request):
    messages = [
        Message(RecordDict({"request": ConfigRecord(request)}), dst_node_id=node, message_type=message_type) for node in grid.get_node_ids()
    ]
    replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages, timeout=10)}
    return [replies[message.metadata.message_id] for message in messages]


def test_train_queues_one_order_and_answers_nothing(grid):
    replies = ask(grid, "train", epsilon="1.0", delta="1e-06")
    assert [dict(reply.content) for reply in replies] == [{}, {}]
    assert guards._LOCAL_GUARDS["a"].orders[0].guarantee.epsilon == 1.0


def test_specify_answers_the_stored_bytes_or_one_constant(grid):
    assert [bytes(reply.content["release"]["envelope"]) for reply in ask(grid, "query.specify")] == [b"envelope", b""]


def test_the_text_of_an_exception_stays_at_the_node(grid):
    for reply in ask(grid, "train", epsilon="6.0", delta="1e-06"):
        assert reply.has_error()
        assert SECRET not in repr(reply.error.reason)
        assert "RecordError" not in reply.error.reason


def test_without_the_wrapper_the_text_would_leave(grid):
    """The control: Flower itself lets an exception's text through."""
    from flwr.clientapp import ClientApp

    naked = ClientApp()

    @naked.train()
    def train(message: Message, context: Context) -> Message:
        raise RecordError(SECRET)

    bare = InProcessGrid(naked, [{}])
    with pytest.raises(RecordError, match=SECRET):
        ask(bare, "train")
    bare.close()


def test_an_unknown_node_is_unavailable_and_told_apart_by_the_message(grid):
    message = Message(RecordDict(), dst_node_id=4711, message_type="query.specify")
    (reply,) = grid.send_and_receive([message], timeout=5)
    assert reply.has_error()
    assert reply.error.code == 5
