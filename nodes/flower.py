"""The Flower ClientApp: a shim.  Message in, one guard call, message out; it holds nothing private and decides nothing.

Whoever runs the SuperLink can push code to a SuperNode, so nothing that this process can reach may be worth stealing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from nodes.guard import Order, reach
from protocol.codec import parse_decimal
from protocol.privacy import Guarantee

client = ClientApp()

CLIENT_APP_RAISED = 2  # flwr's ErrorCode for an exception in a ClientApp
Handler = Callable[[Message, Context], Message]


def sanitised(handler: Handler) -> Handler:
    """Return the handler with every exception replaced by one constant.

    Flower sends str(exception) to the server, and with it whatever private text an exception holds.
    """

    @functools.wraps(handler)
    def run(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception:  # noqa: BLE001 - whatever it was, its text must not leave the node
            return Message(Error(CLIENT_APP_RAISED, "node failed; details are in the node's own log"), reply_to=message)

    return run


@client.train()  # type: ignore[untyped-decorator]
@sanitised
def train(message: Message, context: Context) -> Message:
    """Queue a request at the guard and acknowledge it; nothing is computed while the caller waits."""
    asked = message.content["request"]
    guarantee = Guarantee(parse_decimal(str(asked["epsilon"]), "epsilon"), parse_decimal(str(asked["delta"]), "delta"))
    reach(str(context.node_config["guard"])).request(Order(guarantee))
    return Message(RecordDict(), reply_to=message)


@client.query("specify")  # type: ignore[untyped-decorator]
@sanitised
def specify(message: Message, context: Context) -> Message:
    """Answer the stored envelope, or an empty one: the constant "not available"."""
    envelope = reach(str(context.node_config["guard"])).collect() or b""
    return Message(RecordDict({"release": ConfigRecord({"envelope": envelope})}), reply_to=message)
