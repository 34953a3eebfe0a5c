"""The Flower ServerApp: one finite campaign.  It asks the chosen nodes, collects their signed envelopes and publishes them as a client.

The market trusts a signature, never the path a release took; this app holds nothing secret.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from protocol.channel import CALL_TIMEOUT_S, connect, error_from_status
from protocol.errors import VeilmartError
from protocol.release import open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub

server = ServerApp()
log = logging.getLogger("veilmart.campaign")

POLL_MIN_S, POLL_MAX_S = 0.002, 0.2  # of one exchange of messages
ROUND_MIN_S, ROUND_MAX_S = 0.05, 2.0  # between two rounds of asking for releases
EXCHANGE_S = 60.0


class Outcome(StrEnum):
    """What became of one node in a campaign."""

    PUBLISHED = "published"
    NOT_AVAILABLE = "not available"
    FAILED = "failed"
    MISSING = "missing"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node's line in the account of a campaign."""

    node_id: int
    outcome: str
    release_id: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Replies:
    """What came back from one exchange, each node in exactly one of the three."""

    answered: Mapping[int, Message]
    failed: Mapping[int, str]
    missing: frozenset[int]


def exchange(grid: Grid, node_ids: Sequence[int], message_type: str, content: Mapping[str, Any], timeout_s: float, group: str) -> Replies:
    """Send one message to every node and return what became of each.

    Flower's own send_and_receive polls every 3 s and hides who is missing.  ttl = timeout: a reply that would come later is dropped
    instead of surprising the next exchange.  Nodes are told apart by the id of the message they answer, since the error
    "node unavailable" carries the SuperLink's id as its source.
    """
    messages = [
        Message(
            RecordDict({"request": ConfigRecord(dict(content))}), dst_node_id=node, message_type=message_type, ttl=timeout_s, group_id=group
        )
        for node in node_ids
    ]
    waiting = set(grid.push_messages(messages))
    node_of = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}  # ids exist only after the push
    answered: dict[int, Message] = {}
    failed: dict[int, str] = {}
    end, pause = time.monotonic() + timeout_s, POLL_MIN_S
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(waiting):
            asked = reply.metadata.reply_to_message_id
            waiting.discard(asked)
            if reply.has_error():
                failed[node_of[asked]] = f"error {reply.error.code}"
            else:
                answered[node_of[asked]] = reply
        if waiting:
            time.sleep(pause)
            pause = min(2 * pause, POLL_MAX_S)
    return Replies(answered, failed, frozenset(node_of[asked] for asked in waiting))


def selected_nodes(grid: Grid, wanted: str) -> list[int]:
    """Return the ids of the nodes with the given public keys (comma-separated, as Flower registered them), or of all nodes."""
    if not wanted:
        return list(grid.get_node_ids())
    keys = {key.strip() for key in wanted.split(",")}
    return [int(node.node_id) for node in grid.get_nodes() if str(node.public_key).strip() in keys]


def publish(stub: Any, envelope: bytes) -> NodeResult:
    """Publish one envelope; a refusal concerns its node alone and never ends the campaign."""
    import grpc

    try:
        release = open_envelope(envelope)
        stub.Publish(pb.PublishRequest(envelope=envelope), timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        return NodeResult(0, Outcome.REFUSED, reason=error_from_status(error).code)
    except VeilmartError as error:
        return NodeResult(0, Outcome.REFUSED, reason=error.code)
    return NodeResult(0, Outcome.PUBLISHED, release.release_id.hex())


def collect(grid: Grid, node_ids: Sequence[int], stub: Any, timeout_s: float) -> Iterator[NodeResult]:
    """Ask again and again until every node answered with an envelope, failed, or time is up; publish each as it comes."""
    open_nodes, pause, end = list(node_ids), ROUND_MIN_S, time.monotonic() + timeout_s
    last: dict[int, NodeResult] = {node: NodeResult(node, Outcome.MISSING) for node in node_ids}
    while open_nodes and time.monotonic() < end:
        replies = exchange(grid, open_nodes, f"{MessageType.QUERY}.specify", {}, min(EXCHANGE_S, timeout_s), "specify")
        last.update({node: NodeResult(node, Outcome.FAILED, reason=why) for node, why in replies.failed.items()})
        for node, reply in replies.answered.items():
            envelope = bytes(reply.content["release"]["envelope"])
            if not envelope:
                last[node] = NodeResult(node, Outcome.NOT_AVAILABLE)
                continue
            result = publish(stub, envelope)
            yield NodeResult(node, result.outcome, result.release_id, result.reason)
            open_nodes.remove(node)
        failed = [node for node in replies.failed if node in open_nodes]
        for node in failed:
            yield last[node]
            open_nodes.remove(node)
        if open_nodes:
            time.sleep(pause)
            pause = min(2 * pause, ROUND_MAX_S)
    for node in open_nodes:
        yield last[node]


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run one campaign: request, collect, publish, account for every node.

    Run config: market (HOST:PORT), ca (file), epsilon and delta (decimal strings), timeout-s, nodes (public keys or ""), out (file or "").
    """
    run = context.run_config
    timeout_s = float(run["timeout-s"])
    nodes = selected_nodes(grid, str(run["nodes"]))
    channel = connect(str(run["market"]), Path(str(run["ca"])))
    try:
        asked = exchange(
            grid,
            nodes,
            MessageType.TRAIN,
            {"epsilon": str(run["epsilon"]), "delta": str(run["delta"])},
            min(EXCHANGE_S, timeout_s),
            "train",
        )
        results = [NodeResult(node, Outcome.FAILED, reason=why) for node, why in asked.failed.items()]
        results += [NodeResult(node, Outcome.MISSING) for node in asked.missing]
        for result in collect(grid, list(asked.answered), MarketStub(channel), timeout_s):  # type: ignore[no-untyped-call]
            log.info("node=%s outcome=%s release=%s", result.node_id, result.outcome, result.release_id[:16])
            results.append(result)
    finally:
        channel.close()
    results.sort(key=lambda result: result.node_id)
    account = {"schema": "veilmart.campaign/1", "nodes": [asdict(result) for result in results]}
    if run.get("out"):
        Path(str(run["out"])).write_text(json.dumps(account, indent=1))
