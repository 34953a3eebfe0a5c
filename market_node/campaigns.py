"""What an operator keeps of its campaigns: a folder each, with the plan and one file a node.

A node's file holds its envelope from the moment it arrived, so a market that is down loses nothing and nobody is asked twice: a
campaign that is run again publishes what it kept and asks only the nodes that are still open.  Every write is durable before the
next step is taken.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from market_node.superlink import LINK, RegisteredNode, flwr
from protocol.claims import NAME
from protocol.codec import parse_decimal, parse_limit
from protocol.errors import CampaignFailed, FormatError, MarketUnreachable, NotFound, UsageError
from protocol.keys import write_durably
from protocol.release import open_envelope
from protocol.transparency import Receipt

if TYPE_CHECKING:
    from protocol.cohort_round import Cohort

ACCOUNT_SCHEMA = "veilmart.campaign/1"


class Outcome(StrEnum):
    """What became of one node in a campaign."""

    PUBLISHED = "published"
    JOINED = "joined"  # its records are in the cohort's release, which another node published
    KEPT = "kept"  # its envelope is here; the market did not answer yet
    NOT_AVAILABLE = "not available"
    BUSY = "busy"  # another campaign was asking it all the time
    FAILED = "failed"
    MISSING = "missing"
    REFUSED = "refused"


LOOK_S = 0.5  # at the campaign's folder
ASK_S = 10.0  # at Flower, which costs a process of two seconds
SLACK_S = 120.0  # for the start and the end of a run
TRIES = 3  # a run that Flower lost is submitted again

SETTLED = frozenset({Outcome.PUBLISHED, Outcome.JOINED, Outcome.REFUSED})  # a campaign that goes on does not touch these again


@dataclass(frozen=True, slots=True)
class Asked:
    """A node that a campaign asks: its key as Flower knows it, in hexadecimal, and the owner it is registered for ("" if unknown)."""

    key: str
    name: str = ""
    owner: str = ""


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """What a campaign asks its nodes to release together, instead of one specification each."""

    name: str  # of the learnware
    map_id: str  # hexadecimal, as the next
    base_model: str  # that the map was fitted with
    dimension: int
    dropouts: int
    colluders: int
    simulated: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError("cohort: expected a name of 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")

    def cohort(self, market_key: bytes, epsilon: str, delta: str, members: Sequence[bytes]) -> Cohort:
        """Return the parameters of a new round; raise FormatError or UsageError for members or numbers that make none."""
        from protocol.cohort_round import Cohort
        from protocol.privacy import Guarantee

        guarantee = Guarantee(parse_decimal(epsilon, "epsilon"), parse_decimal(delta, "delta"))
        return Cohort(
            market_key, secrets.token_bytes(32), bytes.fromhex(self.map_id), bytes.fromhex(self.base_model), self.dimension, guarantee,
            self.name, tuple(sorted(members)), self.dropouts, self.colluders, self.simulated,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """What a campaign asks for, and whom; it never changes."""

    market: str
    ca: str
    epsilon: str
    delta: str
    timeout_s: float
    nodes: tuple[Asked, ...] = ()  # none: every connected node
    market_key: str = ""  # the key that signs receipts, in hexadecimal; "": whichever the market names
    epsilon_adapter: str = ""  # the largest that an adapter may have; "": whatever each owner's policy makes
    cohort: CohortPlan | None = None  # None: each node releases its own

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta"):
            parse_decimal(getattr(self, name), name)
        parse_limit(self.epsilon_adapter, "epsilon of the adapter")
        if not 0 < self.timeout_s <= 12 * 3600:
            raise UsageError(f"timeout: expected more than 0 and at most 43200 seconds, got {self.timeout_s:g}")


@dataclass(frozen=True, slots=True)
class NodeResult:
    """One node's line in the account of a campaign."""

    node_id: int
    outcome: str
    release_id: str = ""
    reason: str = ""
    name: str = ""
    key: str = ""
    owner: str = ""
    index: int = -1  # where the market put the release
    envelope: str = field(default="", repr=False)  # hexadecimal; kept, never shown


class Campaign:
    """One campaign's folder."""

    def __init__(self, folder: Path, plan: Plan, made: str) -> None:
        self.folder, self.plan, self.made = folder, plan, made

    @property
    def campaign_id(self) -> str:
        """Its name."""
        return self.folder.name

    @classmethod
    def create(cls, root: Path, plan: Plan) -> Campaign:
        """Make a campaign's folder below `root`; its id begins with the day, so a list is in order."""
        now = datetime.now(UTC)
        made = now.isoformat(timespec="seconds")
        folder = root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        text = json.dumps({"schema": "veilmart.campaign-plan/1", "made": made, **asdict(plan)}, indent=1)
        write_durably(folder / "plan.json", text.encode())
        return cls(folder, plan, made)

    @classmethod
    def open(cls, folder: Path) -> Campaign:
        """Return the campaign in a folder; raise NotFound or FormatError."""
        try:
            value = json.loads((folder / "plan.json").read_text())
        except FileNotFoundError:
            raise NotFound(f"campaign {folder.name}: there is none", hint="`veilmart campaign list` names them") from None
        except ValueError:
            raise FormatError(f"{folder}/plan.json: expected JSON") from None
        try:
            made, schema, nodes = value.pop("made"), value.pop("schema"), value.pop("nodes")
            cohort = value.pop("cohort", None)
            plan = Plan(**value, nodes=tuple(Asked(**node) for node in nodes), cohort=cohort and CohortPlan(**cohort))
        except (KeyError, TypeError):
            raise FormatError(f"{folder}/plan.json: expected the plan of a campaign") from None
        if schema != "veilmart.campaign-plan/1":
            raise FormatError(f"{folder}/plan.json: expected a plan of version 1, got {schema!r}")
        return cls(folder, plan, made)

    def record(self, result: NodeResult) -> None:
        """Keep what became of a node, durably."""
        name = hashlib.sha256((result.key or str(result.node_id)).encode()).hexdigest()[:32]
        write_durably(self.folder / "nodes" / f"{name}.json", json.dumps(asdict(result)).encode())

    def keep_receipt(self, receipt: Receipt) -> None:
        """Keep a verified receipt as a file that `verify receipt` reads."""
        release_id = open_envelope(receipt.envelope).release_id.hex()
        write_durably(self.folder / "receipts" / f"{release_id[:16]}.receipt", receipt.to_bytes(), 0o644)

    def results(self) -> list[NodeResult]:
        """Return what became of each node so far, by node id."""
        found = []
        for path in (self.folder / "nodes").glob("*.json"):
            try:
                found.append(NodeResult(**json.loads(path.read_text())))
            except (ValueError, TypeError):
                raise FormatError(f"{path}: expected what became of a node") from None
        return sorted(found, key=lambda result: (result.node_id, result.name))

    def note(self, **what: Any) -> None:
        """Keep facts about the latest run: its id at Flower, its state, the cause of its failure."""
        with (self.folder / "run.lock").open("w") as file:  # the command and the ServerApp both write here
            fcntl.flock(file, fcntl.LOCK_EX)
            write_durably(self.folder / "run.json", json.dumps({**self.noted(), **what}, indent=1).encode())

    def noted(self) -> dict[str, Any]:
        """Return the facts about the latest run."""
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}

    def account(self) -> dict[str, Any]:
        """Return what became of the campaign and of every node, without envelopes."""
        results = self.results()
        counts = {outcome.value: sum(result.outcome == outcome for result in results) for outcome in Outcome}
        return {
            "schema": ACCOUNT_SCHEMA, "campaign": self.campaign_id, "made": self.made, "epsilon": self.plan.epsilon,
            "delta": self.plan.delta, "epsilon_adapter": self.plan.epsilon_adapter,
            "cohort": self.plan.cohort.name if self.plan.cohort else "",
            "state": self.noted().get("state", "planned"), "cause": self.noted().get("cause", ""),
            "counts": counts, "nodes": [shown(result) for result in results],
        }  # fmt: skip

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the campaign; raise UsageError if it is being run already."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"campaign {self.campaign_id}: it is being run already") from None
            yield


def shown(result: NodeResult) -> dict[str, Any]:
    """Return a node's line as others see it."""
    value = asdict(replace(result, envelope=""))
    del value["envelope"]
    return value


def campaigns_of(market_home: Path) -> Path:
    """Return the folder of a market's campaigns."""
    return market_home / "campaigns"


def all_campaigns(root: Path) -> list[Campaign]:
    """Return every campaign, the oldest first."""
    return [Campaign.open(path.parent) for path in sorted(root.glob("*/plan.json"))]


class Claims:
    """Which nodes this campaign asks now.  A SuperNode handles one message at a time, so no node is asked by two campaigns at once.

    A claim is a lock on a file: it ends with the process that holds it, however that ends.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def claim(self, key: str) -> bool:
        """Return whether the node is ours to ask."""
        if self._folder is None or key in self._held:
            return True
        path = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            return False
        self._held[key] = handle
        return True

    def release(self, key: str) -> None:
        """Let others ask the node."""
        handle = self._held.pop(key, None)
        if handle is not None:
            os.close(handle)

    def close(self) -> None:
        """Let go of every node."""
        for key in list(self._held):
            self.release(key)


def bundle_folder() -> Path:
    """Return the folder of the thin Flower bundle, which lies with the nodes' package; nothing is imported."""
    import importlib.util

    spec = importlib.util.find_spec("nodes")
    if spec is None or not spec.submodule_search_locations:
        raise NotFound("the Flower bundle is not installed", hint="`pip install veilmart` brings it")
    return Path(next(iter(spec.submodule_search_locations))) / "bundle"


def market_home_of(campaign: Campaign) -> Path:
    """Return the market's folder that a campaign lies in."""
    return campaign.folder.parent.parent


def asked_of(nodes: list[RegisteredNode]) -> tuple[Asked, ...]:
    """Return registered SuperNodes as a campaign knows them: Flower's form of a public key is PEM."""
    from cryptography.hazmat.primitives import serialization

    def pem(line: str) -> bytes:
        key = serialization.load_ssh_public_key(line.encode())
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    return tuple(Asked(pem(node.public_key).hex(), node.name, node.owner) for node in nodes)


def drive(market_home: Path, campaign: Campaign, on_progress: Callable[[int, int], None], limit_s: float | None = None) -> dict[str, Any]:
    """Run a campaign on the market's SuperLink until it ends; return its account, which stays in its folder.

    A run that Flower lost, as when the SuperLink was started anew, is submitted again: what nodes sent is kept and nothing is drawn
    twice.  Raises CampaignFailed with the cause if the ServerApp failed, and MarketUnreachable without a SuperLink.
    """
    until = time.monotonic() + (limit_s or campaign.plan.timeout_s + SLACK_S)
    for _ in range(TRIES):
        try:
            cause = _one_run(market_home, campaign, on_progress, until)
        except MarketUnreachable as error:
            campaign.note(state="failed", cause=str(error))
            raise
        if not cause:
            return campaign.account()
        if cause.startswith("ServerApp"):
            break
    campaign.note(state="failed", cause=cause)
    raise CampaignFailed(
        f"campaign {campaign.campaign_id} failed: {cause}", hint=f"`veilmart campaign run --resume {campaign.campaign_id}`"
    )


def _one_run(market_home: Path, campaign: Campaign, on_progress: Callable[[int, int], None], until: float) -> str:
    """Submit a run and wait for its end; return the cause of its failure, or nothing."""
    settings = campaign.folder / "run.toml"
    write_durably(settings, f"folder = {json.dumps(str(campaign.folder.resolve()))}\n".encode())
    campaign.note(state="running", cause="")
    run_id = flwr(market_home, "run", str(bundle_folder()), LINK, "--run-config", str(settings))["run-id"]
    campaign.note(run_id=run_id)
    ask = time.monotonic() + ASK_S
    try:
        while time.monotonic() < until:
            noted, results = campaign.noted(), campaign.results()
            on_progress(sum(result.outcome in SETTLED for result in results), int(noted.get("asked", 0)) or len(campaign.plan.nodes))
            if noted["state"] == "finished":
                return ""
            if time.monotonic() > ask:
                ask = time.monotonic() + ASK_S
                state, details = _state_of(market_home, run_id)
                if state == "finished:completed" and campaign.noted()["state"] != "finished":
                    return "the run ended without an account"
                if state.startswith("finished:") and state != "finished:completed":
                    return details
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        _stop(market_home, run_id)
        campaign.note(state="stopped", cause="interrupted")
        raise
    _stop(market_home, run_id)
    return "ServerApp did not end in time"


def _state_of(market_home: Path, run_id: str) -> tuple[str, str]:
    """Return the state of a run at Flower and its cause; a SuperLink that is being started again does not end the wait."""
    try:
        (run,) = flwr(market_home, "list", LINK, "--run-id", run_id)["runs"]
    except (MarketUnreachable, ValueError):
        return "unknown", ""
    details = "".join(character for character in str(run["status-details"]) if character.isprintable())[:500]
    return str(run["status"]), details or "no cause given"


def _stop(market_home: Path, run_id: str) -> None:
    try:
        flwr(market_home, "stop", run_id, LINK)
    except MarketUnreachable:
        return
