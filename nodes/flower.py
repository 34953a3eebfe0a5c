"""The Flower ClientApp: a shim.  Message in, one guard call, message out; it holds nothing private and decides nothing.

Whoever runs the SuperLink can push code to a SuperNode, so nothing that this process can reach may be worth stealing.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from nodes.guard import Order, Reachable, reach
from protocol.codec import parse_decimal, parse_limit
from protocol.errors import FormatError
from protocol.privacy import Guarantee

client = ClientApp()

SOCKETS = "VEILMART_GUARD_SOCKETS"
PATIENCE_S, LOOK_S = 5.0, 0.1  # for a guard's message in a cohort's round
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


def guard_of(context: Context) -> Reachable:
    """Return the guard of the node that a message is for: as its SuperNode was told, or by number in Flower's simulation engine.

    The simulation engine gives a node its number alone; whoever starts it names the folder of sockets in the environment.
    """
    if "guard" in context.node_config:
        return reach(str(context.node_config["guard"]))
    return reach(f"unix:{os.environ[SOCKETS]}/{int(context.node_config['partition-id'])}")


@client.train()  # type: ignore[untyped-decorator]
@sanitised
def train(message: Message, context: Context) -> Message:
    """Queue a request at the guard and acknowledge it; nothing is computed while the caller waits."""
    asked = message.content["request"]
    guarantee = Guarantee(parse_decimal(str(asked["epsilon"]), "epsilon"), parse_decimal(str(asked["delta"]), "delta"))
    map_id = asked.get("map-id", b"")  # absent: whichever map the guard has
    if not isinstance(map_id, bytes):
        raise FormatError("map-id: expected bytes")
    guard_of(context).request(
        Order(guarantee, map_id, epsilon_adapter=parse_limit(str(asked.get("epsilon-adapter", "")), "epsilon-adapter"))
    )
    return Message(RecordDict(), reply_to=message)


@client.query("cohort")  # type: ignore[untyped-decorator]
@sanitised
def cohort(message: Message, context: Context) -> Message:
    """Pass on a step of a cohort's round and answer this owner's message, or an empty one: not yet, or never.

    Another message costs the node a process, so this one looks a few times more before it answers that there is nothing yet.
    """
    ask = message.content["request"].get("ask")
    if not isinstance(ask, bytes):
        raise FormatError("ask: expected bytes")
    guard, until = guard_of(context), time.monotonic() + PATIENCE_S
    while not (answer := guard.take_part(ask)) and time.monotonic() < until:
        time.sleep(LOOK_S)
    return Message(RecordDict({"cohort": ConfigRecord({"answer": answer})}), reply_to=message)


@client.query("specify")  # type: ignore[untyped-decorator]
@sanitised
def specify(message: Message, context: Context) -> Message:
    """Answer the stored envelope, or an empty one: the constant "not available"."""
    envelope = guard_of(context).collect() or b""
    return Message(RecordDict({"release": ConfigRecord({"envelope": envelope})}), reply_to=message)
