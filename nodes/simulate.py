"""A federation on one machine: real guards, a real campaign, a real market process on loopback, real queries.

Only the wires between owners are short: Flower's messages travel inside this process.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nodes.guard import Guard, Order, Policy, Progress, ignore_progress, serve_in_process
from nodes.ledger import Budget
from nodes.market_client import MarketClient
from nodes.query import Found, find_encrypted, find_in_mirror, views_of
from nodes.records import Record, digest_of, read_records
from protocol.codec import format_decimal
from protocol.errors import CampaignFailed, MarketUnreachable, UsageError
from protocol.features import EmbeddingKind, FeatureMap
from protocol.hazmat.noise import NoiseSource, operating_system
from protocol.keys import write_durably
from protocol.release import Card, Release, open_envelope
from protocol.scoring import Verdict, sketch_of

if TYPE_CHECKING:
    from nodes.base_model import Activations, BaseModel, Embedding
    from nodes.finetune import Recipe

NO_GUARANTEE = "none: these adapters were trained without differential privacy and carry no privacy guarantee"
MARKET_START_S = 60.0
CAMPAIGN_TIMEOUT_S = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """What a simulation does; everything has a sensible default but the data."""

    data: Path
    out: Path
    tasks: tuple[str, ...] = ()  # owners; empty = every task that the map was not fitted on
    unseen: tuple[str, ...] = ()  # asked for, but owned by nobody
    records: int | None = None  # at most so many training records an owner
    query_size: int = 50
    queries: int = 4  # a task and repeat
    repeats: int = 1  # fresh noise and fresh queries
    epsilon_spec: float = 1.0
    delta: float = 1e-6
    recipe: Recipe | None = None  # None = specifications alone
    test_records: int = 64  # test records a task on which losses are measured
    query_pool: int = 250  # test records a task from which queries are drawn
    mirror: bool = False  # rank on a local copy instead of by encrypted query
    seed: int | None = None  # None = noise and queries from the operating system


@dataclass
class Meter:
    """CPU seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the CPU time of the block, all threads of this process, to a stage."""
        start = time.process_time()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def seeded_noise(seed: int, *purpose: str) -> NoiseSource:
    """Return a noise source that a seed repeats: for simulations only, and stamped on what it makes."""
    stream = hashlib.shake_256(repr((seed, *purpose)).encode())
    position = 0

    def read(count: int) -> bytes:
        nonlocal position
        # SHAKE gives a prefix only, so the stream is cut into blocks of their own instead of growing one quadratically.
        block = hashlib.shake_256(stream.digest(32) + position.to_bytes(8, "little")).digest(count)
        position += 1
        return block

    return NoiseSource(read, simulated=True)


class MarketProcess:
    """A market of its own process on loopback, ended by its pid."""

    def __init__(self, home: Path, feature_map: FeatureMap) -> None:
        write_durably(home / "feature.map", feature_map.manifest, 0o644)
        self._log = (home / "market.log").open("wb")
        command = [
            sys.executable, "-m", "nodes.command", "market", "up", "--home", str(home), "--map", str(home / "feature.map"),
            "--port", "0", "--simulation", "--json",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        timer = threading.Timer(MARKET_START_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            self.stop()
            raise MarketUnreachable("market: its process did not start", hint=f"see {home / 'market.log'}")
        started = json.loads(line)
        self.address, self.ca = str(started["address"]), Path(started["ca"])
        self.pid = self._process.pid

    def stop(self) -> None:
        """End the process and wait for it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> MarketProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class RememberedEmbeddings:
    """`embed_alone` that makes each data file's embeddings once: repeats draw fresh noise over the same features."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model
        self._made: dict[bytes, Embedding] = {}

    def __call__(
        self, records: Sequence[Record], *, layer: int, kind: EmbeddingKind, on_progress: Callable[[int, int], None] | None = None
    ) -> Embedding:
        """Return the embeddings of the records."""
        key = digest_of(records)
        if key not in self._made:
            self._made[key] = self._model.embed_alone(records, layer=layer, kind=kind, on_progress=on_progress)
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Learnware:
    """An owner's published release, with the adapter as a querier pulled it."""

    task: str
    release: Release
    adapter: bytes | None


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Test records of a task and their features, from which its queries are drawn."""

    task: str
    records: list[Record]
    features: NDArray[np.float64]
    views: int


def new_run_folder(out: Path | None, home: Path) -> Path:
    """Return the folder of a new run; raise UsageError rather than mix two runs."""
    if out is None:
        return home / "runs" / time.strftime("%Y%m%d-%H%M%S")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: expected a new or empty folder", hint="choose another --out")
    return out


def adapter_path(out: Path, task: str, result: dict[str, Any]) -> Path:
    """Return where the adapter of a run's owner lies."""
    digest = next(owner["adapter_digest"] for owner in result["owners"] if owner["task"] == task)
    return out / "repeat-0" / "owners" / task / "adapters" / f"{digest}.safetensors"


def plan_tasks(settings: Settings, feature_map: FeatureMap) -> tuple[list[str], list[str]]:
    """Return the owners' tasks and the public tasks that were left out."""
    if not settings.data.is_dir():
        raise UsageError(f"{settings.data}: no such folder", hint="--data expects a folder of TASK/train.jsonl and TASK/test.jsonl")
    present = sorted(
        folder.name for folder in settings.data.iterdir() if (folder / "train.jsonl").is_file() and (folder / "test.jsonl").is_file()
    )
    missing = [task for task in (*settings.tasks, *settings.unseen) if task not in present]
    if missing:
        raise UsageError(f"tasks: {', '.join(missing)} not in {settings.data}", hint=f"there are: {', '.join(present) or 'none'}")
    public = [task for task in present if task in feature_map.fitted_on]
    owners = [task for task in (settings.tasks or present) if task not in settings.unseen and (settings.tasks or task not in public)]
    if len(owners) < 2:
        raise UsageError(f"tasks: expected at least 2 owners, got {len(owners)}")
    return owners, [task for task in public if task not in owners]


def simulate(settings: Settings, model: BaseModel, feature_map: FeatureMap, on_progress: Progress = ignore_progress) -> dict[str, Any]:
    """Run a federation and return its result as one JSON object (schema veilmart.sim/1)."""
    started, meter = time.monotonic(), Meter()
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    owners, left_out = plan_tasks(settings, feature_map)
    asked = [*owners, *settings.unseen]
    settings.out.mkdir(parents=True, exist_ok=True)
    with meter.stage("query_embedding"):
        pools = [_pool(settings, task, model, feature_map, done, len(asked), on_progress) for done, task in enumerate(asked)]
    remembered = RememberedEmbeddings(model)
    choices = random.Random(settings.seed) if settings.seed is not None else random.SystemRandom()
    queries: list[dict[str, Any]] = []
    learnwares: list[Learnware] = []
    sent: dict[str, int] = {}
    received: dict[str, int] = {}
    for repeat in range(settings.repeats):
        home = settings.out / f"repeat-{repeat}"
        with MarketProcess(home / "market", feature_map) as market, MarketClient(market.address, market.ca, home / "querier") as client:
            with meter.stage("owners"):
                published = _run_owners(settings, repeat, owners, model, feature_map, remembered, market, client, on_progress)
            if repeat == 0:
                learnwares = published
            with meter.stage("matching"):
                for done, pool in enumerate(pools):
                    on_progress(f"match (repeat {repeat + 1}/{settings.repeats})", done, len(pools))
                    for _ in range(settings.queries):
                        queries.append({"repeat": repeat, **_ask(settings, pool, choices, client, feature_map, published)})
            _add(sent, client.traffic.sent)
            _add(received, client.traffic.received)
    losses: dict[str, dict[str, Any]] = {}
    if settings.recipe is not None:
        with meter.stage("losses"):
            losses = _losses(settings, asked, model, learnwares, queries, on_progress)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    meter.seconds["market_process"] = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    return _result(settings, owners, left_out, learnwares, queries, losses, meter, sent, received, time.monotonic() - started, feature_map)


def _pool(settings: Settings, task: str, model: BaseModel, feature_map: FeatureMap, done: int, total: int, on_progress: Progress) -> Pool:
    on_progress("embed queries", done, total)
    records = read_records(settings.data / task / "test.jsonl", settings.query_pool)
    embedding = model.embed_batched(records, layer=feature_map.layer, kind=feature_map.embedding)
    return Pool(task, records, feature_map(embedding), views_of(records))


def _run_owners(
    settings: Settings,
    repeat: int,
    owners: list[str],
    model: BaseModel,
    feature_map: FeatureMap,
    remembered: RememberedEmbeddings,
    market: MarketProcess,
    client: MarketClient,
    on_progress: Progress,
) -> list[Learnware]:
    """Let every owner's guard make its release through one Flower campaign; return what the market then holds."""
    home = settings.out / f"repeat-{repeat}"
    guards: dict[str, Guard] = {}
    for place, task in enumerate(owners):
        noise = operating_system() if settings.seed is None else seeded_noise(settings.seed, str(repeat), task)
        guards[task] = Guard(
            home / "owners" / task,
            settings.data / task / "train.jsonl",
            Card(task),
            model,
            feature_map,
            noise,
            policy=Policy(
                budget=Budget(settings.epsilon_spec * 1.001, settings.delta),
                largest_epsilon=settings.epsilon_spec,
                smallest_epsilon=settings.epsilon_spec / 2,
            ),
            recipe=settings.recipe if repeat == 0 else None,
            limit=settings.records,
            embed=remembered,
            on_progress=_owner_progress(on_progress, task, place, len(owners)),
        )
    outcome = _campaign(settings, home, guards, market)
    failures = {task: guard.failures for task, guard in guards.items() if guard.failures}
    if failures:
        task, errors = next(iter(failures.items()))
        raise CampaignFailed(f"{len(failures)} of {len(guards)} owners failed; first {task}: {errors[0]}", hint=errors[0].hint)
    by_owner = {node["node_id"]: node for node in outcome}
    not_published = [task for task, node in zip(guards, sorted(by_owner), strict=True) if by_owner[node]["outcome"] != "published"]
    if not_published:
        raise CampaignFailed(f"{len(not_published)} of {len(guards)} owners were not published: {', '.join(not_published[:3])}")
    learnwares = []
    for task, guard in guards.items():
        envelope = guard.collect()
        assert envelope is not None
        release = open_envelope(envelope)
        file, adapter = guard.adapter_file(release), None
        if file is not None and release.adapter is not None:
            client.upload_adapter(release.adapter, file.read_bytes())
            adapter = client.download_adapter(release.adapter)
        learnwares.append(Learnware(task, release, adapter))
    return learnwares


def _owner_progress(on_progress: Progress, task: str, place: int, total: int) -> Progress:
    return lambda stage, done, of: on_progress(f"owner {place + 1}/{total} {task}: {stage}", done, of)


class _Stopped:
    """Stands where a guard stood once an owner has failed: every question fails, so that the campaign ends instead of waiting."""

    def request(self, order: Order) -> None:
        raise CampaignFailed("an owner failed")

    def collect(self) -> bytes | None:
        raise CampaignFailed("an owner failed")


def _campaign(settings: Settings, home: Path, guards: dict[str, Guard], market: MarketProcess) -> list[dict[str, Any]]:
    """Run Flower's two apps over the guards while their owners' loops work; return the outcome of each node."""
    from nodes.grid import run_campaign

    # The two sides never import each other: the apps are named by entry points, as Flower's own bundle names them.
    apps = {point.name: point for point in entry_points(group="veilmart.flower")}
    configs = [{"guard": serve_in_process(f"{home}/{task}", guard)} for task, guard in guards.items()]
    out, ended = home / "campaign.json", threading.Event()

    def work() -> None:
        while not ended.is_set():
            for guard in guards.values():
                guard.work()
            if any(guard.failures for guard in guards.values()):
                for task in guards:
                    serve_in_process(f"{home}/{task}", _Stopped())
                return
            ended.wait(0.01)

    worker = threading.Thread(target=work, name="guards", daemon=True)
    worker.start()
    try:
        run_config: dict[str, str | int | float] = {
            "market": market.address, "ca": str(market.ca), "epsilon": format_decimal(settings.epsilon_spec),
            "delta": format_decimal(settings.delta), "timeout-s": CAMPAIGN_TIMEOUT_S, "nodes": "", "out": str(out),
        }  # fmt: skip
        run_campaign(apps["server"].load(), apps["client"].load(), configs, run_config)
    finally:
        ended.set()
        worker.join()
    outcome: list[dict[str, Any]] = json.loads(out.read_text())["nodes"]
    return outcome


def _ask(
    settings: Settings, pool: Pool, choices: random.Random, client: MarketClient, feature_map: FeatureMap, published: list[Learnware]
) -> dict[str, Any]:
    size = min(settings.query_size, len(pool.records))
    rows = choices.sample(range(len(pool.records)), size)
    sketch = sketch_of(pool.features[rows], feature_map, pool.views)
    found = (find_in_mirror if settings.mirror else find_encrypted)(sketch, client, feature_map)
    return {"task": pool.task, "size": size, **_described(found, pool.task, published)}


def _described(found: Found, task: str, published: list[Learnware]) -> dict[str, Any]:
    names = {learnware.release.release_id: learnware.task for learnware in published}
    ranked = [names[match.release_id] for match in found.ranking.matches]
    best = found.ranking.matches[0]
    return {
        "chosen": ranked[0],
        "place_of_right_owner": ranked.index(task) + 1 if task in ranked else None,
        "verdict": str(found.ranking.verdict),
        "llr": round(best.llr, 3),
        "std": round(best.std, 3),
        "gap_to_next": round(best.gap_to_next, 3),
        "tie": best.tie,
        "distance": round(best.distance, 3),
        "server_cpu_ms": found.server_cpu_ms,
    }


def _losses(
    settings: Settings,
    asked: list[str],
    model: BaseModel,
    learnwares: list[Learnware],
    queries: list[dict[str, Any]],
    on_progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Return nats per response token on each task's test records: base, chosen, oracle (lowest), random (mean over owners)."""
    from nodes.adapter import Adapter
    from nodes.finetune import held_out_loss

    adapters = {lw.task: Adapter.from_bytes(lw.adapter, base_model=model.model_id) for lw in learnwares if lw.adapter is not None}
    losses = {}
    for done, task in enumerate(asked):
        on_progress("losses", done, len(asked))
        records = read_records(settings.data / task / "test.jsonl", settings.test_records)
        activations: list[Activations] = model.prefix_pass_batched(records)[1]
        own = {owner: held_out_loss(model, adapter, activations) for owner, adapter in adapters.items()}
        chosen = [own[query["chosen"]] for query in queries if query["task"] == task]
        oracle = min(own, key=lambda owner: own[owner])
        losses[task] = {
            "base": held_out_loss(model, None, activations),
            "chosen": float(np.mean(chosen)),
            "oracle": own[oracle],
            "oracle_owner": oracle,
            "random": float(np.mean(list(own.values()))),
            "test_records": len(records),
        }
    on_progress("losses", len(asked), len(asked))
    return losses


def _add(total: dict[str, int], part: dict[str, int]) -> None:
    for kind, count in part.items():
        total[kind] = total.get(kind, 0) + count


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _result(
    settings: Settings,
    owners: list[str],
    left_out: list[str],
    learnwares: list[Learnware],
    queries: list[dict[str, Any]],
    losses: dict[str, dict[str, Any]],
    meter: Meter,
    sent: dict[str, int],
    received: dict[str, int],
    wall_s: float,
    feature_map: FeatureMap,
) -> dict[str, Any]:
    seen = [query for query in queries if query["task"] in owners]
    unseen = [query for query in queries if query["task"] not in owners]
    trained = settings.recipe is not None
    server_cpu = [query["server_cpu_ms"] for query in queries if query["server_cpu_ms"] is not None]
    return {
        "schema": "veilmart.sim/1",
        "map_id": feature_map.map_id.hex(),
        "public_tasks_left_out": left_out,
        "simulated_noise": settings.seed is not None,
        "adapter_guarantee": NO_GUARANTEE if trained else "no adapters were trained (--no-train)",
        "owners": [
            {
                "task": lw.task,
                "release_id": lw.release.release_id.hex(),
                "epsilon_spec": lw.release.specification.guarantee.epsilon,
                "delta": lw.release.specification.guarantee.delta,
                "unit": str(lw.release.specification.guarantee.unit),
                "epsilon_adapter": "none" if lw.release.adapter else None,
                "epsilon_total": "unbounded" if lw.release.adapter else lw.release.specification.guarantee.epsilon,
                "release_bytes": len(lw.release.body) + 64,
                "adapter_digest": lw.release.adapter.digest.hex() if lw.release.adapter else None,
                "adapter_bytes": lw.release.adapter.size_bytes if lw.release.adapter else None,
            }
            for lw in learnwares
        ],
        "matching": "mirror" if settings.mirror else "encrypted",
        "queries": queries,
        "top1": _share([query["place_of_right_owner"] == 1 for query in seen]),
        "top3": _share([query["place_of_right_owner"] <= 3 for query in seen]),
        "abstained": {
            "present": _share([query["verdict"] != Verdict.MATCH for query in seen]),
            "unseen": _share([query["verdict"] != Verdict.MATCH for query in unseen]),
        },
        "losses": losses,
        "cpu_seconds": {stage: round(seconds, 2) for stage, seconds in meter.seconds.items()},
        "cpu_seconds_total": round(sum(meter.seconds.values()), 2),
        "server_cpu_ms_per_query": round(float(np.mean(server_cpu)), 3) if server_cpu else None,
        "bytes": {"sent": sent, "received": received},
        "wall_seconds": round(wall_s, 1),
    }
