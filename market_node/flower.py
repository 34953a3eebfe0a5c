"""The Flower ServerApp: one finite campaign.  It asks the chosen nodes, collects their signed envelopes and publishes them as a client.

The market trusts a signature, never the path a release took; this app holds nothing secret but the courier's certificate, which opens a
market's port for members to what others signed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from market_node.authority import COURIER_FILE
from market_node.campaigns import SETTLED, Asked, Campaign, Claims, NodeResult, Outcome, Plan, market_home_of, shown
from market_node.cohort import convene
from protocol.channel import CALL_TIMEOUT_S, connect, error_from_status
from protocol.cohort_round import Step
from protocol.errors import FormatError, MarketUnreachable, QuotaExceeded, Unauthorised, UsageError, VeilmartError
from protocol.keys import read_secret
from protocol.release import Release, open_envelope
from protocol.transparency import Receipt
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub

server = ServerApp()
log = logging.getLogger("veilmart.campaign")

POLL_MIN_S, POLL_MAX_S = 0.002, 0.2  # between two looks for replies
AGAIN_MIN_S, AGAIN_MAX_S = 0.05, 2.0  # before a node without a release is asked again, or a market that is down
SLOW_AGAIN_S = 30.0  # at most, where an answer takes long: every question to a SuperNode costs it a process of three CPU-seconds
LOST = frozenset({3, 4, 5, 8})  # Flower's own errors: the message or reply, the node or its process was lost; asking again is harmless
EXCHANGE_S = 180.0  # a message that is not answered by then is sent anew; on a machine under load a process starts in a minute
SPECIFY = f"{MessageType.QUERY}.specify"
COHORT = f"{MessageType.QUERY}.cohort"


@dataclass(frozen=True, slots=True)
class Selection:
    """Whom a campaign asks: connected nodes by id, and those that no connected node's key matches."""

    nodes: dict[int, Asked]
    absent: tuple[Asked, ...] = ()


def selected_nodes(grid: Grid, wanted: Iterable[Asked]) -> Selection:
    """Return the connected nodes whose registered public key is wanted; every connected one if none is named.  Never by count."""
    wanted = list(wanted)
    node_of = {bytes(node.public_key).hex(): int(node.node_id) for node in grid.get_nodes()}
    if not wanted:
        key_of = {node: key for key, node in node_of.items()}
        return Selection({int(node): Asked(key_of.get(int(node), "")) for node in grid.get_node_ids()})
    return Selection(
        {node_of[asked.key]: asked for asked in wanted if asked.key in node_of},
        tuple(asked for asked in wanted if asked.key not in node_of),
    )


def asked_in(keys: str) -> tuple[Asked, ...]:
    """Return the nodes in a comma-separated list of hexadecimal public keys; raise UsageError for a key that is not hexadecimal."""
    try:
        parsed = [bytes.fromhex(key).hex() for key in keys.split(",") if key.strip()]
    except ValueError:
        raise UsageError("nodes: expected public keys in hexadecimal, separated by commas") from None
    return tuple(Asked(key) for key in dict.fromkeys(parsed))


def bytes_in(reply: Message, record: str, name: str) -> bytes:
    """Return the bytes in a node's answer, empty for "not available"; raise FormatError for any other answer.

    A stranger wrote it: the record may be missing, and bytes() of an integer would ask for that many zeros.
    """
    found = reply.content.get(record)
    value = found.get(name) if isinstance(found, ConfigRecord) else None
    if not isinstance(value, bytes):
        raise FormatError(f"answer: expected a record {record!r} with the bytes {name!r}")
    return value


@dataclass(slots=True)
class Course:
    """How far one node is."""

    asked: Asked
    requested: bool = False
    due: float = 0.0  # when it is to be asked, or its envelope to be published
    pause: float = AGAIN_MIN_S
    waiting: str = ""  # the id of the message that it has not answered
    sent: float = 0.0
    expires: float = 0.0
    ended: bool = False
    result: NodeResult = field(default_factory=lambda: NodeResult(0, Outcome.MISSING))

    def later(self, now: float, took: float = 0.0) -> None:
        """Try again after a pause that doubles, and that is three times as long as the answer took."""
        self.due, self.pause = now + max(self.pause, min(3 * took, SLOW_AGAIN_S)), min(2 * self.pause, AGAIN_MAX_S)


class Run:
    """One run of a campaign over the nodes of a grid.

    One loop sends, looks for replies and publishes, so no slow node holds up another.  Asking twice is harmless: orders cause one
    release of a guard at most, and whoever is asked again for it sends the stored bytes.
    """

    def __init__(
        self, grid: Grid, plan: Plan, stub: Any, campaign: Campaign | None, record: Callable[[NodeResult], None],
        courier: Callable[[int], Any] | None = None,
    ) -> None:  # fmt: skip
        self.took: list[float] = []  # seconds from each message to its reply
        self._grid, self._plan, self._stub, self._record = grid, plan, stub, record
        self._claims = Claims(campaign.folder.parent / ".asked" if campaign is not None else None)
        self._market_key = bytes.fromhex(plan.market_key)
        self._end = time.monotonic() + plan.timeout_s
        self._node_of_owner: dict[bytes, int] = {}
        self._courses: dict[int, Course] = {}
        self._campaign = campaign
        # courier: what Publish goes through where the market has a port for members, given that port.
        self._courier = courier or (lambda port: stub)
        self._door: Any = None
        self._earlier = campaign.results() if campaign is not None else []

    def results(self) -> list[NodeResult]:
        """Ask every selected node until it has an end or time is up; return each node's line."""
        selection = selected_nodes(self._grid, self._plan.nodes)
        earlier = {result.key or str(result.node_id): result for result in self._earlier}
        done = [result for result in self._earlier if result.outcome in SETTLED]
        for result in done:
            if result.owner and result.outcome == Outcome.PUBLISHED:
                self._node_of_owner[bytes.fromhex(result.owner)] = result.node_id
        for node, asked in selection.nodes.items():
            before = earlier.get(asked.key or str(node))
            if before is not None and before.outcome in SETTLED:
                continue
            start = NodeResult(node, Outcome.MISSING, name=asked.name, key=asked.key)
            if before is not None and before.outcome == Outcome.KEPT:
                start = replace(before, node_id=node)
            self._courses[node] = Course(asked, result=start)
        for asked in selection.absent:
            before = earlier.get(asked.key)
            if before is None or before.outcome not in SETTLED:
                # An envelope that was kept is published whether or not its node is there today.
                if before is not None and before.outcome == Outcome.KEPT:
                    self._courses[before.node_id] = Course(asked, result=before)
                else:
                    absent = NodeResult(0, Outcome.MISSING, "", f"no connected node has the key {asked.key}", asked.name, asked.key)
                    self._record(absent)
                    done.append(absent)
        if self._campaign is not None:
            self._campaign.note(asked=len(self._courses) + len(done), asked_at=time.time())
        try:
            done += self._all_ends()
        finally:
            self._claims.close()
        return sorted(done, key=lambda result: (result.node_id, result.name))

    def _all_ends(self) -> list[NodeResult]:
        done, pause = [], POLL_MIN_S
        while self._courses and time.monotonic() < self._end:
            moved = self._publish_due() + self._send_due() + self._receive()
            for node in [node for node, course in self._courses.items() if self._has_end(course)]:
                course = self._courses.pop(node)
                self._claims.release(course.asked.key or str(node))
                done.append(course.result)
                log.info("node=%s outcome=%s release=%s", node, course.result.outcome, course.result.release_id[:16])
            if self._courses:
                pause = self._one_pass(pause, moved, self._end)
        for course in self._courses.values():
            self._record(course.result)
            done.append(course.result)
        return done

    def _one_pass(self, pause: float, moved: int, until: float) -> float:
        """Wait before the next look where nothing moved, a little longer each time; return that pause."""
        pause = POLL_MIN_S if moved else min(2 * pause, POLL_MAX_S)
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        return pause

    def _has_end(self, course: Course) -> bool:
        return course.ended or course.result.outcome in SETTLED

    def _settle(self, course: Course, outcome: Outcome, **what: Any) -> None:
        course.result = replace(course.result, outcome=outcome.value, **what)
        self._record(course.result)

    def _send_due(self) -> int:
        """Send each node that is due its next message, all in one call; return how many."""
        now = time.monotonic()
        messages = []
        for node, course in self._courses.items():
            if course.waiting and now >= course.expires:
                course.waiting = ""  # lost, or slower than its time: Flower drops a reply that comes now
            if course.waiting or now < course.due or course.result.outcome == Outcome.KEPT or self._has_end(course):
                continue
            if not self._claims.claim(course.asked.key or str(node)):
                course.result = replace(course.result, outcome=Outcome.BUSY.value)
                course.later(now)
                continue
            if course.result.outcome == Outcome.BUSY:
                course.result = replace(course.result, outcome=Outcome.MISSING.value)
            time_to_live = max(1.0, min(EXCHANGE_S, self._end - now))
            course.sent, course.expires = now, now + time_to_live
            messages.append(self._message(node, course, time_to_live))
        if messages:
            self._grid.push_messages(messages)
            for message in messages:  # ids exist only after the push
                self._courses[message.metadata.dst_node_id].waiting = message.metadata.message_id
        return len(messages)

    def _message(self, node: int, course: Course, time_to_live: float) -> Message:
        plan = self._plan
        content = {} if course.requested else {"epsilon": plan.epsilon, "delta": plan.delta, "epsilon-adapter": plan.epsilon_adapter}
        kind = SPECIFY if course.requested else MessageType.TRAIN
        record = RecordDict({"request": ConfigRecord(dict(content))})
        return Message(record, dst_node_id=node, message_type=kind, ttl=time_to_live, group_id="specify" if course.requested else "train")

    def _receive(self) -> int:
        """Take the replies that are there.

        Nodes are told apart by the id of the message they answer, since the error "node unavailable" has the SuperLink as its source.
        """
        node_of = {course.waiting: node for node, course in self._courses.items() if course.waiting}
        if not node_of:
            return 0
        replies = list(self._grid.pull_messages(list(node_of)))
        for reply in replies:
            node = node_of.get(reply.metadata.reply_to_message_id)
            if node is not None and self._courses[node].waiting:
                self._courses[node].waiting = ""
                self.took.append(time.monotonic() - self._courses[node].sent)
                self._take(node, self._courses[node], reply)
        return len(replies)

    def _take(self, node: int, course: Course, reply: Message) -> None:
        """Go on with one node after its reply; no reply of a node ends the campaign of the others."""
        if reply.has_error():
            course.ended = reply.error.code not in LOST
            self._settle(course, Outcome.FAILED, reason=f"error {reply.error.code}")
            course.later(time.monotonic(), time.monotonic() - course.sent)
            return
        if not course.requested:
            course.requested = True
            return
        try:
            envelope = bytes_in(reply, "release", "envelope")
            if not envelope:
                course.result = replace(course.result, outcome=Outcome.NOT_AVAILABLE.value, reason="")
                course.later(time.monotonic(), time.monotonic() - course.sent)
                return
            release = open_envelope(envelope)
            self._require_own(node, course, release)
        except VeilmartError as error:
            self._settle(course, Outcome.REFUSED, reason=error.code)
        except Exception as error:  # noqa: BLE001 - bytes of one node that nobody thought of
            log.error("node=%s kind=%s", node, type(error).__name__)
            self._settle(course, Outcome.REFUSED, reason="unexpected")
        else:
            self._node_of_owner[release.owner] = node
            course.due, course.pause = 0.0, AGAIN_MIN_S
            # Kept before it is sent: if the market is down, or we die here, the node is not asked again.
            self._settle(
                course, Outcome.KEPT, release_id=release.release_id.hex(), owner=release.owner.hex(), envelope=envelope.hex(), reason=""
            )

    def _require_own(self, node: int, course: Course, release: Release) -> None:
        """Raise Unauthorised for an envelope of another owner than the node is registered for, or than another node brought."""
        if course.asked.owner and course.asked.owner != release.owner.hex():
            raise Unauthorised("envelope: expected one of the owner that this node is registered for")
        if self._node_of_owner.get(release.owner, node) != node:
            raise Unauthorised("envelope: another node of this campaign brought a release of that owner")

    def _publish_due(self) -> int:
        """Publish what is kept; a market that is down is tried again, a refusal concerns its node alone."""
        import grpc

        tried = 0
        for course in self._courses.values():
            if course.result.outcome != Outcome.KEPT or time.monotonic() < course.due:
                continue
            tried += 1
            timeout = max(1.0, min(CALL_TIMEOUT_S, self._end - time.monotonic()))
            try:
                receipt = self._published(bytes.fromhex(course.result.envelope), timeout)
            except grpc.RpcError as raised:
                error = error_from_status(raised)
                if isinstance(error, MarketUnreachable):
                    self._door = None  # it may come back with another port for members
                if isinstance(error, MarketUnreachable | QuotaExceeded):
                    course.result = replace(course.result, reason=error.code)
                    course.later(time.monotonic())
                else:
                    self._settle(course, Outcome.REFUSED, reason=error.code)
            except VeilmartError as error:  # the market answered, but not with a promise that holds
                course.result = replace(course.result, reason=error.code)
                course.later(time.monotonic())
            else:
                self._settle(course, Outcome.PUBLISHED, index=receipt.index, reason="")
        return tried

    def _published(self, envelope: bytes, timeout: float) -> Receipt:
        """Publish an envelope and return the market's receipt, verified and kept."""
        if self._door is None:
            described = self._stub.Describe(pb.DescribeRequest(), timeout=timeout)
            self._market_key = self._market_key or bytes(described.market_key)
            self._door = self._courier(int(described.members_port)) if described.members_port else self._stub
        answer = self._door.Publish(pb.PublishRequest(envelope=envelope), timeout=timeout)
        inclusion = tuple(map(bytes, answer.inclusion))
        receipt = Receipt(envelope, self._market_key, int(answer.index), bytes(answer.checkpoint), inclusion)
        receipt.verify()
        if self._campaign is not None:
            self._campaign.keep_receipt(receipt)
        return receipt


class CohortRun(Run):
    """One round of a cohort over the nodes of a grid, and the publication of what it gives.

    A campaign that goes on publishes what it kept; where nothing was kept it begins another round, which its members charge anew.
    """

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self._nodes: dict[bytes, int] = {}  # by the owner's key
        self._asked: dict[int, Asked] = {}
        self._asks: dict[int, bytes] = {}
        self._answers: dict[int, bytes] = {}

    def results(self) -> list[NodeResult]:
        """Run the round and return each node's line."""
        if any(result.outcome in (Outcome.KEPT, Outcome.PUBLISHED) for result in self._earlier):
            self._plan = replace(self._plan, nodes=tuple(asked for asked in self._plan.nodes if self._is_kept(asked)))
            return super().results()
        selection = selected_nodes(self._grid, self._plan.nodes)
        done = [NodeResult(0, Outcome.MISSING, "", "not connected", asked.name, asked.key) for asked in selection.absent]
        self._asked = selection.nodes
        self._nodes = {bytes.fromhex(asked.owner): node for node, asked in selection.nodes.items() if asked.owner}
        if self._campaign is not None:
            self._campaign.note(asked=len(selection.nodes) + len(done), asked_at=time.time())
        try:
            done += self._round()
        finally:
            self._claims.close()
        for result in done:
            self._record(result)
        return sorted(done, key=lambda result: (result.node_id, result.name))

    def _is_kept(self, asked: Asked) -> bool:
        return any(result.key == asked.key and result.outcome in (Outcome.KEPT, *SETTLED) for result in self._earlier)

    def _round(self) -> list[NodeResult]:
        import grpc

        assert self._plan.cohort is not None
        lines = {
            node: NodeResult(node, Outcome.MISSING, "", "" if asked.owner else "registered for no owner", asked.name, asked.key)
            for node, asked in self._asked.items()
        }
        try:
            market_key = self._market_key or bytes(self._stub.Describe(pb.DescribeRequest(), timeout=CALL_TIMEOUT_S).market_key)
            cohort = self._plan.cohort.cohort(market_key, self._plan.epsilon, self._plan.delta, list(self._nodes))
            envelope = convene(cohort, self._exchange)
        except (VeilmartError, grpc.RpcError) as raised:
            error = raised if isinstance(raised, VeilmartError) else error_from_status(raised)
            log.warning("cohort failed code=%s", error.code)
            return [replace(line, outcome=Outcome.FAILED.value, reason=str(error)[:200]) for line in lines.values()]
        release = open_envelope(envelope)
        for owner, node in self._nodes.items():
            if owner in release.signers:
                lines[node] = replace(lines[node], outcome=Outcome.JOINED.value, release_id=release.release_id.hex(), owner=owner.hex())
        publisher = self._nodes[release.owner]
        course = Course(self._asked[publisher], result=lines.pop(publisher))
        self._courses = {publisher: course}
        self._settle(course, Outcome.KEPT, envelope=envelope.hex())
        return [*lines.values(), *self._all_ends()]

    def _exchange(self, step: Step, asks: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
        """Ask members for a step until all answered, or its share of the time that is left is over; publishing has a share as well."""
        steps = list(Step)
        until = time.monotonic() + (self._end - time.monotonic()) / (1 + len(steps) - steps.index(step))
        self._asks = {self._nodes[member]: ask for member, ask in asks.items()}
        self._answers = {}
        self._courses = {node: Course(self._asked[node]) for node in self._asks}
        pause = POLL_MIN_S
        while time.monotonic() < until and not all(course.ended for course in self._courses.values()):
            pause = self._one_pass(pause, self._send_due() + self._receive(), until)
        return {member: self._answers[node] for member, node in self._nodes.items() if node in self._answers}

    def _message(self, node: int, course: Course, time_to_live: float) -> Message:
        record = RecordDict({"request": ConfigRecord({"ask": self._asks[node]})})
        return Message(record, dst_node_id=node, message_type=COHORT, ttl=time_to_live, group_id="cohort")

    def _take(self, node: int, course: Course, reply: Message) -> None:
        """Keep a member's message; whoever has none yet, or was lost, is asked again."""
        answer = b""
        if reply.has_error():
            course.ended = reply.error.code not in LOST
        else:
            try:
                answer = bytes_in(reply, "cohort", "answer")
            except FormatError:
                course.ended = True
        if answer:
            self._answers[node], course.ended = answer, True
        course.later(time.monotonic(), time.monotonic() - course.sent)


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run one campaign: request, collect, publish, account for every node.

    Run config: folder (of a planned campaign), or market (HOST:PORT), ca (file), epsilon, delta and epsilon-adapter (decimal strings;
    the last may be missing), timeout-s and nodes (public keys or ""); out (file for the account, or "").
    """
    run = context.run_config
    if run.get("folder"):
        campaign = Campaign.open(Path(str(run["folder"])))
        with campaign.alone():
            _run(grid, campaign.plan, campaign, campaign.record)
            campaign.note(state="finished")
        return
    plan = Plan(
        str(run["market"]), str(run["ca"]), str(run["epsilon"]), str(run["delta"]), float(run["timeout-s"]),
        asked_in(str(run.get("nodes", ""))), epsilon_adapter=str(run.get("epsilon-adapter", "")),
    )  # fmt: skip
    results, took = _run(grid, plan, None, lambda result: None)
    if run.get("out"):
        account = {
            "schema": "veilmart.campaign/1", "nodes": [shown(result) for result in results],
            "message_s": [round(seconds, 4) for seconds in took],
        }  # fmt: skip
        Path(str(run["out"])).write_text(json.dumps(account, indent=1))


def _run(grid: Grid, plan: Plan, campaign: Campaign | None, record: Callable[[NodeResult], None]) -> tuple[list[NodeResult], list[float]]:
    """Return the nodes' lines and the seconds that each message took to its reply."""
    file = market_home_of(campaign) / COURIER_FILE if campaign is not None else None

    def courier(port: int) -> Any:
        if file is None or not file.exists():
            return stub  # whose refusal says what is missing
        where = f"{plan.market.rpartition(':')[0]}:{port}"
        channel = connect(where, Path(plan.ca), read_secret(file))
        stack.callback(channel.close)
        return MarketStub(channel)  # type: ignore[no-untyped-call]

    with ExitStack() as stack:
        channel = connect(plan.market, Path(plan.ca))
        stack.callback(channel.close)
        stub = MarketStub(channel)  # type: ignore[no-untyped-call]
        run = (CohortRun if plan.cohort is not None else Run)(grid, plan, stub, campaign, record, courier)
        return run.results(), run.took
