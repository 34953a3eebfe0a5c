"""A federation on one machine: real guards, a real campaign, a real market process on loopback, real queries.

Only the wires between owners are short: Flower's messages travel inside this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nodes import simulation_engine
from nodes.base_model import SPLIT_LAYER
from nodes.crew import Crew, RunPlan, plan_run
from nodes.guard import Guard, Policy, Progress, ignore_progress, serve_in_process
from nodes.ledger import Budget, epsilon_of, specification_charge, total_of
from nodes.machine import Watch, cpu_s
from nodes.market_client import MarketClient
from nodes.mixes import Mix, Owner, deal, read_owners, records_of, write_owners
from nodes.private_training import PrivateRecipe
from nodes.query import Found, find_encrypted, find_in_mirror, views_of
from nodes.records import Record, digest_of, read_records
from protocol.codec import format_decimal
from protocol.errors import CampaignFailed, MarketUnreachable, UsageError
from protocol.features import EmbeddingKind, FeatureMap
from protocol.hazmat.noise import NoiseSource, operating_system
from protocol.keys import write_durably
from protocol.privacy import Guarantee, PrivateTraining, ledger_epsilon
from protocol.processes import dies_with_us
from protocol.release import Card, Release, open_envelope
from protocol.scoring import Verdict, sketch_of

if TYPE_CHECKING:
    from nodes.base_model import Activations, BaseModel, Embedding
    from nodes.finetune import Recipe

NO_GUARANTEE = "none: these adapters were trained without differential privacy and carry no privacy guarantee"
MARKET_START_S = 60.0
ENGINES = ("grid", "flower")  # threads of this process, or Flower's simulation engine
CAMPAIGN_TIMEOUT_S = 12 * 3600.0  # the longest that a campaign may take: no message of Flower lives longer
EVERY_LOSS_UP_TO = 30  # owners: with more of them, losses are those of the base model and of the chosen specialists alone


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
    recipe: Recipe | PrivateRecipe | None = None  # None = specifications alone
    test_records: int = 64  # test records a task on which losses are measured; 0 = none
    query_pool: int = 250  # test records a task from which queries are drawn
    mirror: bool = False  # rank on a local copy instead of by encrypted query
    seed: int | None = None  # None = noise and queries from the operating system
    nodes: int | None = None  # owners; None = one a task
    mix: Mix = field(default_factory=Mix)
    workers: int | None = None  # owners at a time; None = as cores and memory allow
    cache: Path | None = None  # folder of embeddings that later runs take up
    split: int = SPLIT_LAYER  # the adapters live above it
    other_base: int = 0  # so many of the owners have the other base model
    engine: str = "grid"  # what carries the campaign's messages, one of ENGINES


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


def wait_until_free(home: Path) -> None:
    """Wait for the market of a run that was killed on this folder: it ends with that run, but takes a moment to do so."""
    lock = home / "lock"
    deadline = time.monotonic() + MARKET_START_S
    while lock.exists() and time.monotonic() < deadline:
        with lock.open("r") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        time.sleep(0.05)


class MarketProcess:
    """A market of its own process on loopback, ended by its pid."""

    def __init__(self, home: Path, feature_map: FeatureMap) -> None:
        write_durably(home / "feature.map", feature_map.manifest, 0o644)
        wait_until_free(home / "market")
        self._log = (home / "market.log").open("wb")
        command = [
            *dies_with_us(), sys.executable, "-m", "nodes.command", "market", "up", "--home", str(home), "--map", str(home / "feature.map"),
            "--port", "0", "--simulation", "--no-page", "--json",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        timer = threading.Timer(MARKET_START_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        try:
            started = json.loads(line)
            self.address, self.ca = str(started["address"]), Path(started["ca"])
        except (ValueError, KeyError):  # nothing, or the first line of an error
            self.stop()
            raise MarketUnreachable("market: its process did not start", hint=f"see {home / 'market.log'}") from None
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
    """`embed_alone` that makes each data file's embeddings once: repeats draw fresh noise over the same features.

    cache: a folder in which later runs find them; files of numbers alone, named by the digest of what they were made from.
    """

    def __init__(self, model: BaseModel, cache: Path | None = None) -> None:
        self._model, self._cache = model, cache
        self._made: dict[bytes, Embedding] = {}

    def __call__(
        self, records: Sequence[Record], *, layer: int, kind: EmbeddingKind, on_progress: Callable[[int, int], None] | None = None
    ) -> Embedding:
        """Return the embeddings of the records."""
        key = hashlib.sha256(digest_of(records) + repr((self._model.model_id, layer, str(kind))).encode()).digest()
        if key not in self._made:
            file = None if self._cache is None else self._cache / f"{key.hex()}.npy"
            if file is not None and file.exists():
                self._made[key] = np.load(file, allow_pickle=False)
            else:
                self._made[key] = self._model.embed_alone(records, 1, layer=layer, kind=kind, on_progress=on_progress)
                if file is not None:
                    buffer = io.BytesIO()
                    np.save(buffer, self._made[key], allow_pickle=False)
                    write_durably(file, buffer.getvalue())
        return self._made[key]


@dataclass(frozen=True, slots=True)
class Learnware:
    """An owner's published release, with the adapter as a querier pulled it."""

    owner: Owner
    release: Release
    adapter: bytes | None

    @property
    def task(self) -> str:
        """The task that most of the owner's records are of."""
        return self.owner.task


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Test records of a task and their features, from which its queries are drawn."""

    task: str
    records: list[Record]
    features: NDArray[np.float64]
    views: int


def new_run_folder(out: Path | None, home: Path) -> Path:
    """Return the folder of a run, new or begun earlier; raise UsageError rather than mix a run with something else."""
    if out is None:
        return home / "runs" / time.strftime("%Y%m%d-%H%M%S")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / "run.json").exists())):
        raise UsageError(f"{out}: expected a new or empty folder, or that of an earlier run", hint="choose another --out")
    return out


def _begin(settings: Settings, model: BaseModel, feature_map: FeatureMap, other: BaseModel | None) -> None:
    """Note what a run is; raise UsageError if its folder is that of another one.  The same run goes on where it was."""
    same = replace(settings, out=Path(), workers=None, cache=None)
    said = {"schema": "veilmart.run/1", "settings": repr(same), "map_id": feature_map.map_id.hex(),
            "base_models": [one.model_id for one in (model, other) if one is not None]}  # fmt: skip
    path = settings.out / "run.json"
    if path.exists():
        if json.loads(path.read_text()) != said:
            raise UsageError(f"{settings.out}: a run with other settings began here", hint="choose another --out, or give the same options")
        return
    write_durably(path, json.dumps(said, indent=1).encode())


def adapter_path(out: Path, owner: str, result: dict[str, Any]) -> Path:
    """Return where the adapter of a run's owner lies."""
    digest = next(one["adapter_digest"] for one in result["owners"] if one["owner"] == owner)
    return out / "repeat-0" / "owners" / owner / "adapters" / f"{digest}.safetensors"


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


def simulate(
    settings: Settings,
    model: BaseModel,
    feature_map: FeatureMap,
    on_progress: Progress = ignore_progress,
    *,
    other: BaseModel | None = None,
    on_plan: Callable[[RunPlan], None] = lambda plan: None,
) -> dict[str, Any]:
    """Run a federation and return its result as one JSON object (schema veilmart.sim/2).

    other: the base model of the last `settings.other_base` owners, who run the map's encoder beside it.  A run that was killed goes on in
    its folder: guards that released before send the stored bytes again.
    """
    started, meter = time.monotonic(), Meter()
    tasks, left_out = plan_tasks(settings, feature_map)
    settings.out.mkdir(parents=True, exist_ok=True)
    _begin(settings, model, feature_map, other)
    choices = random.Random(settings.seed) if settings.seed is not None else random.SystemRandom()
    owners = _owners(settings, tasks, choices)
    plan = plan_for(settings, owners, model, other)
    on_plan(plan)
    asked = [*(task for task in tasks if any(owner.task == task for owner in owners)), *settings.unseen] if settings.queries else []
    with Watch() as watch, one_thread_each():
        with meter.stage("query_embedding"):
            pools = []
            for done, task in enumerate(asked):
                on_progress("embed queries", done, len(asked))
                pools.append(_pool(settings, task, model, feature_map, plan.workers))
        remembered = RememberedEmbeddings(model, settings.cache)
        queries: list[dict[str, Any]] = []
        learnwares: list[Learnware] = []
        campaigns: list[dict[str, Any]] = []
        digest = hashlib.sha256()
        sent: dict[str, int] = {}
        received: dict[str, int] = {}
        for repeat in range(settings.repeats):
            home = settings.out / f"repeat-{repeat}"
            with MarketProcess(home / "market", feature_map) as market, MarketClient(market.address, market.ca, home / "querier") as client:
                with meter.stage("owners"):
                    guards = _guards(settings, repeat, owners, model, other, feature_map, remembered)
                    campaigns.append(_campaign(settings, home, guards, market, plan.workers, on_progress))
                    published = _published(owners, guards, client)
                digest.update(digest_of_releases(published))
                if repeat == 0:
                    learnwares = published
                with meter.stage("matching"):
                    for done, pool in enumerate(pools):
                        on_progress(f"match (repeat {repeat + 1}/{settings.repeats})", done, len(pools))
                        for _ in range(settings.queries):
                            queries.append({"repeat": repeat, **_ask(settings, pool, choices, client, feature_map, published)})
                _add(sent, client.traffic.sent)
                _add(received, client.traffic.received)
                meter.seconds["market_process"] = meter.seconds.get("market_process", 0.0) + cpu_s(market.pid)
        losses: dict[str, dict[str, Any]] = {}
        if settings.recipe is not None and settings.test_records:
            with meter.stage("losses"):
                losses = _losses(settings, asked, model, learnwares, queries, plan.workers, on_progress)
        use = watch.use()
    result = _result(
        settings, owners, left_out, learnwares, queries, losses, meter, sent, received, time.monotonic() - started, feature_map
    )  # fmt: skip
    return {
        **result,
        "digest": digest.hexdigest(),
        "plan": plan.as_json(),
        "campaigns": campaigns,
        "peak_memory_bytes": use.peak_bytes,
        "peak_memory_bytes_each": use.peak_bytes_each,
        "cpu_seconds_all_processes": round(use.cpu_s, 2),
    }


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute with one thread a caller: sums are then split the same way on every machine, in every engine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def digest_of_releases(learnwares: Sequence[Learnware]) -> bytes:
    """Return SHA-256 over every owner's name, specification and adapter: equal for equal seeds, whatever the keys and the engine."""
    digest = hashlib.sha256()
    for lw in learnwares:
        specification, adapter = lw.release.specification, lw.release.adapter
        sums = specification.noisy_sums.astype("<i4").tobytes()
        for part in (lw.owner.name.encode(), specification.map_id, sums, str(specification.noise_variance).encode(),
                     adapter.digest if adapter else b""):  # fmt: skip
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _owners(settings: Settings, tasks: list[str], choices: random.Random) -> list[Owner]:
    """Return the owners, their records written; a run that goes on keeps those it had."""
    found = read_owners(settings.out)
    # Dealt again all the same: a seeded run must draw its queries from the same place of the sequence.
    dealt = deal(settings.data, tasks, settings.nodes, settings.mix, settings.records, Policy().minimum_records, choices)
    if found is not None:
        return found
    write_owners(settings.out, dealt)
    return [owner for owner, _ in dealt]


def plan_for(settings: Settings, owners: Sequence[Owner], model: BaseModel, other: BaseModel | None) -> RunPlan:
    """Return how many owners work at a time and what the run takes."""
    recipe, records = settings.recipe, sum(owner.count for owner in owners)
    passes = 0.0
    if recipe is not None:
        seen = sum(recipe.seen(owner.count) for owner in owners)
        passes = seen / max(records, 1)
    size = model.size_bytes + (other.size_bytes if other is not None else 0)
    return plan_run(len(owners), records, passes, size, settings.workers)


def _promise(recipe: Recipe | PrivateRecipe | None) -> str:
    if recipe is None:
        return "no adapters were trained (--no-train)"
    return str(PrivateTraining(recipe.guarantee, recipe.event)) if isinstance(recipe, PrivateRecipe) else NO_GUARANTEE


def _needed(settings: Settings) -> float:
    """Return the budget that one release takes, with its adapter where that has a guarantee."""
    events = specification_charge(Guarantee(settings.epsilon_spec, settings.delta)).events
    if isinstance(settings.recipe, PrivateRecipe):
        events = (*events, settings.recipe.event)
    return 1.001 * ledger_epsilon(events, settings.delta)


def _pool(settings: Settings, task: str, model: BaseModel, feature_map: FeatureMap, workers: int) -> Pool:
    wanted = settings.queries * settings.repeats * settings.query_size  # embedding more than are ever asked with would be waste
    records = read_records(settings.data / task / "test.jsonl", min(settings.query_pool, wanted))
    embedding = model.embed_batched(records, workers=workers, layer=feature_map.layer, kind=feature_map.embedding)
    return Pool(task, records, feature_map(embedding), views_of(records))


def _guards(
    settings: Settings,
    repeat: int,
    owners: Sequence[Owner],
    model: BaseModel,
    other: BaseModel | None,
    feature_map: FeatureMap,
    remembered: RememberedEmbeddings,
) -> dict[str, Guard]:
    """Return every owner's guard, by name."""
    guards = {}
    for place, owner in enumerate(owners):
        foreign = other is not None and place >= len(owners) - settings.other_base
        base = other if other is not None and foreign else model
        guards[owner.name] = Guard(
            settings.out / f"repeat-{repeat}" / "owners" / owner.name,
            records_of(settings.out, owner),
            Card(owner.name),
            base,
            feature_map,
            operating_system() if settings.seed is None else seeded_noise(settings.seed, str(repeat), owner.name),
            policy=Policy(
                budget=Budget(_needed(settings), settings.delta),
                largest_epsilon=settings.epsilon_spec,
                smallest_epsilon=settings.epsilon_spec / 2,
            ),
            recipe=settings.recipe if repeat == 0 else None,
            embed=remembered,
            split=base.layers * 4 // 5 if foreign else settings.split,
            encoder=model,
            workers=1,
        )
    return guards


def _published(owners: Sequence[Owner], guards: Mapping[str, Guard], client: MarketClient) -> list[Learnware]:
    """Bring the adapters to the market, and return what it then holds, with the adapters as a querier pulls them."""
    learnwares = []
    for owner in owners:
        guard = guards[owner.name]
        envelope = guard.collect()
        assert envelope is not None
        release = open_envelope(envelope)
        file, adapter = guard.adapter_file(release), None
        if file is not None and release.adapter is not None:
            client.upload_adapter(release.adapter, file.read_bytes())
            adapter = client.download_adapter(release.adapter)
        learnwares.append(Learnware(owner, release, adapter))
    return learnwares


def _campaign(
    settings: Settings, home: Path, guards: dict[str, Guard], market: MarketProcess, workers: int, on_progress: Progress
) -> dict[str, Any]:
    """Run Flower's two apps over the guards while their owners' threads work; return the account, without what every node has in common.

    Raises CampaignFailed if an owner failed or was not published.
    """
    from nodes.grid import run_campaign

    messages: int | None
    message_s: float | None
    # The two sides never import each other: the apps are named by entry points, as Flower's own bundle names them.
    apps = {point.name: point for point in entry_points(group="veilmart.flower")}
    out, started = home / "campaign.json", time.monotonic()
    run_config: dict[str, str | int | float] = {
        "market": market.address, "ca": str(market.ca), "epsilon": format_decimal(settings.epsilon_spec),
        "delta": format_decimal(settings.delta), "timeout-s": CAMPAIGN_TIMEOUT_S, "nodes": "", "out": str(out),
    }  # fmt: skip
    with Crew(guards, workers, on_progress) as crew:
        if settings.engine == "flower":
            simulation_engine.run_campaign(home, list(crew.places.values()), run_config, workers, CAMPAIGN_TIMEOUT_S)
            messages, message_s = None, None  # Flower does not tell; the account has what each took to its reply
        else:
            configs = [{"guard": serve_in_process(f"{home}/{name}", place)} for name, place in crew.places.items()]
            traffic = run_campaign(apps["server"].load(), apps["client"].load(), configs, run_config)
            messages, message_s = traffic.messages, traffic.seconds
    if crew.failures:
        name, error = next(iter(crew.failures.items()))
        raise CampaignFailed(f"{len(crew.failures)} of {len(guards)} owners failed; first {name}: {error}", hint=error.hint)
    account = json.loads(out.read_text())
    nodes, replies = account["nodes"], sorted(account["message_s"])
    not_published = len(guards) - sum(node["outcome"] == "published" for node in nodes)
    if not_published:
        others = sorted({str(node["outcome"]) for node in nodes} - {"published"})
        raise CampaignFailed(f"{not_published} of {len(guards)} owners were not published: {', '.join(others)}")
    wall = round(time.monotonic() - started, 2)
    reply = {"count": len(replies), "median_s": replies[len(replies) // 2], "largest_s": replies[-1]}
    return {"engine": settings.engine, "messages": messages, "message_s": message_s, "replies": reply, "wall_s": wall}


def _ask(
    settings: Settings, pool: Pool, choices: random.Random, client: MarketClient, feature_map: FeatureMap, published: list[Learnware]
) -> dict[str, Any]:
    size = min(settings.query_size, len(pool.records))
    rows = choices.sample(range(len(pool.records)), size)
    sketch = sketch_of(pool.features[rows], feature_map, pool.views)
    found = (find_in_mirror if settings.mirror else find_encrypted)(sketch, client, feature_map)
    return {"task": pool.task, "size": size, **_described(found, pool.task, published)}


def _described(found: Found, task: str, published: list[Learnware]) -> dict[str, Any]:
    owners = {learnware.release.release_id: learnware.owner for learnware in published}
    ranked = [owners[match.release_id] for match in found.ranking.matches]
    best = found.ranking.matches[0]
    return {
        "chosen": ranked[0].name,
        # Any owner whose records are mostly of the task is a right one.
        "place_of_right_owner": next((place for place, owner in enumerate(ranked, start=1) if owner.task == task), None),
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
    workers: int,
    on_progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Return nats per response token on each task's test records: base, chosen, oracle (lowest), random (mean over owners).

    Of owners on the same base model alone: another tokenizer's nats are of other tokens.  With many owners the last two are left out.
    """
    from nodes.adapter import Adapter
    from nodes.finetune import held_out_loss

    adapters = {
        lw.owner.name: Adapter.from_bytes(lw.adapter, base_model=model.model_id)
        for lw in learnwares
        if lw.adapter is not None and lw.release.base_model.hex() == model.model_id
    }
    losses = {}
    for done, task in enumerate(asked):
        on_progress("losses", done, len(asked))
        records = read_records(settings.data / task / "test.jsonl", settings.test_records)
        activations: list[Activations] = model.prefix_pass_batched(records, settings.split, workers=workers)[1]
        picked = [query["chosen"] for query in queries if query["task"] == task and query["repeat"] == 0]
        every = len(learnwares) <= EVERY_LOSS_UP_TO
        own = {
            owner: held_out_loss(model, adapter, activations, workers=workers)
            for owner, adapter in adapters.items()
            if every or owner in picked
        }
        chosen = [own[owner] for owner in picked if owner in own]
        oracle = min(own, key=lambda owner: own[owner]) if every and own else None
        losses[task] = {
            "base": held_out_loss(model, None, activations, workers=workers),
            "chosen": float(np.mean(chosen)) if chosen else None,
            "oracle": None if oracle is None else own[oracle],
            "oracle_owner": oracle,
            "random": float(np.mean(list(own.values()))) if oracle is not None else None,
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
    owners: Sequence[Owner],
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
    owned = {owner.task for owner in owners}
    seen = [query for query in queries if query["task"] in owned]
    unseen = [query for query in queries if query["task"] not in owned]
    server_cpu = [query["server_cpu_ms"] for query in queries if query["server_cpu_ms"] is not None]
    return {
        "schema": "veilmart.sim/2",
        "map_id": feature_map.map_id.hex(),
        "public_tasks_left_out": left_out,
        "simulated_noise": settings.seed is not None,
        "adapter_guarantee": _promise(settings.recipe),
        "owners": [
            {
                "owner": lw.owner.name,
                "task": lw.task,
                "records": lw.owner.records,
                "base_model": lw.release.base_model.hex(),
                "release_id": lw.release.release_id.hex(),
                "epsilon_spec": lw.release.specification.guarantee.epsilon,
                "delta": lw.release.specification.guarantee.delta,
                "unit": str(lw.release.specification.guarantee.unit),
                "epsilon_adapter": epsilon_of(lw.release.adapter),
                "epsilon_total": total_of(lw.release),
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
