"""The Flower ServerApp: one finite campaign.  It asks the chosen nodes, collects their signed envelopes and publishes them as a client.

The market trusts a signature, never the path a release took; this app holds nothing secret.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from protocol.channel import CALL_TIMEOUT_S, connect, error_from_status
from protocol.errors import FormatError, UsageError, VeilmartError
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


def replies(
    grid: Grid, node_ids: Sequence[int], message_type: str, content: Mapping[str, Any], timeout_s: float, group: str
) -> Iterator[tuple[int, Message]]:
    """Send one message to every node and yield (node, reply) as replies come; a node that is not among them is missing.

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
    end, pause = time.monotonic() + timeout_s, POLL_MIN_S
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            asked = reply.metadata.reply_to_message_id
            if asked in waiting:
                waiting.discard(asked)
                yield node_of[asked], reply
        left = end - time.monotonic()
        if left <= 0:
            return
        if waiting:
            time.sleep(min(pause, left))
            pause = min(2 * pause, POLL_MAX_S)


def exchange(grid: Grid, node_ids: Sequence[int], message_type: str, content: Mapping[str, Any], timeout_s: float, group: str) -> Replies:
    """Send one message to every node and return what became of each."""
    answered: dict[int, Message] = {}
    failed: dict[int, str] = {}
    for node, reply in replies(grid, node_ids, message_type, content, timeout_s, group):
        if reply.has_error():
            failed[node] = f"error {reply.error.code}"
        else:
            answered[node] = reply
    return Replies(answered, failed, frozenset(node_ids) - answered.keys() - failed.keys())


@dataclass(frozen=True, slots=True)
class Selection:
    """Whom a campaign asks: ids of connected nodes, and the public keys (hex) that no connected node has."""

    node_ids: tuple[int, ...]
    absent: tuple[str, ...] = ()


def selected_nodes(grid: Grid, wanted: str) -> Selection:
    """Return the nodes whose public key, as Flower registered it, is in a comma-separated list of hexadecimal keys; all for "".

    Raises UsageError for a key that is not hexadecimal.
    """
    if not wanted.strip():
        return Selection(tuple(grid.get_node_ids()))
    try:
        keys = [bytes.fromhex(key) for key in wanted.split(",")]
    except ValueError:
        raise UsageError("nodes: expected public keys in hexadecimal, separated by commas") from None
    node_of = {bytes(node.public_key): int(node.node_id) for node in grid.get_nodes()}
    keys = list(dict.fromkeys(keys))
    return Selection(tuple(node_of[key] for key in keys if key in node_of), tuple(key.hex() for key in keys if key not in node_of))


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


def envelope_in(reply: Message) -> bytes:
    """Return the envelope in a node's answer, empty for "not available"; raise FormatError for any other answer.

    A stranger wrote it: the record may be missing, and bytes() of an integer would ask for that many zeros.
    """
    record = reply.content.get("release")
    envelope = record.get("envelope") if isinstance(record, ConfigRecord) else None
    if not isinstance(envelope, bytes):
        raise FormatError("answer: expected a record 'release' with the bytes 'envelope'")
    return envelope


def settle(node: int, reply: Message, stub: Any) -> NodeResult:
    """Return what one node's reply amounts to, its envelope published; no reply of a node ends the campaign of the others."""
    if reply.has_error():
        return NodeResult(node, Outcome.FAILED, reason=f"error {reply.error.code}")
    try:
        envelope = envelope_in(reply)
        result = publish(stub, envelope) if envelope else NodeResult(node, Outcome.NOT_AVAILABLE)
    except VeilmartError as error:
        return NodeResult(node, Outcome.REFUSED, reason=error.code)
    except Exception as error:  # noqa: BLE001 - bytes of one node that nobody thought of
        log.error("node=%s kind=%s", node, type(error).__name__)
        return NodeResult(node, Outcome.REFUSED, reason="unexpected")
    return replace(result, node_id=node)


def collect(grid: Grid, node_ids: Sequence[int], stub: Any, timeout_s: float) -> Iterator[NodeResult]:
    """Ask again and again until every node answered with an envelope, failed, or time is up; publish each as it comes."""
    last = {node: NodeResult(node, Outcome.MISSING) for node in node_ids}
    pause, end = ROUND_MIN_S, time.monotonic() + timeout_s
    while last and (left := end - time.monotonic()) > 0:
        for node, reply in replies(grid, list(last), f"{MessageType.QUERY}.specify", {}, min(EXCHANGE_S, left), "specify"):
            last[node] = settle(node, reply, stub)
            if last[node].outcome != Outcome.NOT_AVAILABLE:
                yield last.pop(node)
        if last:
            time.sleep(max(0.0, min(pause, end - time.monotonic())))
            pause = min(2 * pause, ROUND_MAX_S)
    yield from last.values()


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run one campaign: request, collect, publish, account for every node.

    Run config: market (HOST:PORT), ca (file), epsilon and delta (decimal strings), timeout-s, nodes (public keys or ""), out (file or "").
    """
    run = context.run_config
    timeout_s = float(run["timeout-s"])
    selection = selected_nodes(grid, str(run.get("nodes", "")))
    channel = connect(str(run["market"]), Path(str(run["ca"])))
    try:
        asked = exchange(
            grid,
            selection.node_ids,
            MessageType.TRAIN,
            {"epsilon": str(run["epsilon"]), "delta": str(run["delta"])},
            min(EXCHANGE_S, timeout_s),
            "train",
        )
        results = [NodeResult(node, Outcome.FAILED, reason=why) for node, why in asked.failed.items()]
        results += [NodeResult(node, Outcome.MISSING) for node in asked.missing]
        results += [NodeResult(0, Outcome.MISSING, reason=f"no connected node has the key {key}") for key in selection.absent]
        for result in collect(grid, list(asked.answered), MarketStub(channel), timeout_s):  # type: ignore[no-untyped-call]
            log.info("node=%s outcome=%s release=%s", result.node_id, result.outcome, result.release_id[:16])
            results.append(result)
    finally:
        channel.close()
    results.sort(key=lambda result: result.node_id)
    account = {"schema": "veilmart.campaign/1", "nodes": [asdict(result) for result in results]}
    if run.get("out"):
        Path(str(run["out"])).write_text(json.dumps(account, indent=1))
