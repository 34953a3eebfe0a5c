"""Workers on a Ray cluster: `market_node.shard_worker.Tiles` as actors, which Ray places, watches and ends.

What goes there is what anybody may know: encoded releases, ciphertexts and the public keys of queries; no key of the market's.  Ray
itself sends pickles and runs what it is told, for whoever reaches its ports: a cluster that strangers reach is theirs.
Only this module imports Ray, which the extra `sim` brings, and only with `--ray`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from market_node.index import Version
from market_node.shard_worker import Tiles, warm_up
from market_node.shards import MOST_WORKERS, Crew, Part, Steps, Worker, WorkerLost
from protocol.errors import UsageError

if TYPE_CHECKING:
    from protocol.encryption import MatchPlan
    from protocol.evaluation import EncodedTile

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
LOCAL = "local"  # as Ray calls a cluster that it starts here, and ends with this process
STARTS = 3  # of it: Ray waits 30 s for its own processes, and no option says otherwise: too short on a machine that is very busy
START_S = 120.0  # Ray may start a process, which may compile the kernels
GIVE_S = 60.0  # for a tile of 3 MB, over a network


class Shard:
    """The actor: what Ray's workers run."""

    def __init__(self) -> None:
        warm_up()
        self._tiles = Tiles()

    def ready(self) -> int:
        """Return the number of this process, now that the kernels are loaded."""
        return os.getpid()

    def give(self, digest: bytes, diagonals: NDArray[np.uint64]) -> None:
        """As `Tiles.give`; the array lies in Ray's store, once for all actors of a machine."""
        self._tiles.give(digest, diagonals)

    def forget(self, digests: Sequence[bytes]) -> None:
        """As `Tiles.forget`."""
        self._tiles.forget(digests)

    def answer(
        self, plan: MatchPlan, digests: Sequence[bytes], baby: NDArray[np.uint64], giant_keys: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], int] | None:
        """Return the answers, (queries, digests, tile_bytes), and nanoseconds of CPU; None if a tile is not here."""
        started, answers = time.thread_time_ns(), np.empty((len(baby), len(digests), plan.parameters.tile_bytes), np.uint8)
        # Ray's arrays are read-only, for which numba would compile every kernel a second time.
        if self._tiles.answer(plan, digests, baby.copy(), giant_keys.copy(), answers) is None:
            return None
        return answers, time.thread_time_ns() - started


class RayCrew(Crew):
    """Actors on a cluster, each with one core of it.  size: None for as many as it has cores."""

    def __init__(self, address: str, size: int | None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--ray: Ray is not installed", hint='pip install "veilmart[sim]", or --workers N on this machine')
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        import ray

        for left in reversed(range(STARTS if address == LOCAL else 1)):
            try:
                dashboard = False if address == LOCAL else None  # what already runs is not ours to choose
                ray.init(address, log_to_driver=False, configure_logging=False, include_dashboard=dashboard)
                break
            except Exception as error:  # noqa: BLE001 - Ray raises whatever fails on its way
                ray.shutdown()
                if not left:
                    kind = type(error).__name__
                    raise UsageError(f"--ray {address}: no cluster answers there ({kind})", hint="`ray status` says more") from None
        self._ray = ray
        self.size = size or min(max(int(ray.cluster_resources().get("CPU", 1)), 1), MOST_WORKERS)
        self._actor = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Shard)

    def start(self, place: int) -> Worker:
        """As `Crew.start`."""
        worker = RayWorker(self._ray, self._actor)
        try:
            worker.wait_until_ready()
        except WorkerLost:
            worker.close()  # or Ray would place it later, for nobody
            raise
        return worker

    def room(self, plan: MatchPlan, queries: int) -> Steps:
        """As `Crew.room`."""
        from protocol.evaluation import steps_shape

        keys = np.empty((queries, 2, 2, plan.parameters.degree))
        return Steps(np.empty(steps_shape(plan, queries), np.uint64), keys, None)

    def ship(self, steps: Steps) -> Steps:
        """As `Crew.ship`: into Ray's store, from which every machine fetches them once."""
        try:
            return Steps(steps.baby, steps.giant_keys, (self._ray.put(steps.baby), self._ray.put(steps.giant_keys)))
        except Exception:  # noqa: BLE001 - the store is full or gone: every worker says so, and the front answers
            return steps

    def close(self) -> None:
        """As `Crew.close`."""
        self._ray.shutdown()


class RayWorker(Worker):
    """One actor, from its start to its end."""

    def __init__(self, ray: Any, actor: Any) -> None:
        super().__init__()
        self._ray, self._actor = ray, actor.remote()
        self.pid = 0  # of its process, on whichever machine

    def wait_until_ready(self) -> None:
        """Return when it is placed and runs; raise WorkerLost if that takes too long."""
        self.pid = self._call("ready", START_S)

    def give(self, tile: EncodedTile, file: Path | None) -> None:
        """As `Worker.give`."""
        self._call("give", GIVE_S, tile.digest, tile.diagonals)

    def forget(self, digests: Sequence[bytes]) -> None:
        """As `Worker.forget`."""
        self._call("forget", GIVE_S, digests)

    def ask(self, steps: Steps, version: Version, places: range, patience_s: float) -> Part | None:
        """As `Worker.ask`."""
        if steps.shared is None:
            raise WorkerLost("the steps did not reach the cluster")
        digests = [tile.digest for tile in version.index.tiles[places.start : places.stop]]
        found = self._call("answer", patience_s, version.index.plan, digests, *steps.shared)
        return None if found is None else Part(*found)

    def close(self) -> None:
        """As `Worker.close`."""
        with contextlib.suppress(Exception):  # the cluster is gone
            self._ray.kill(self._actor)

    def _call(self, method: str, patience_s: float, *arguments: Any) -> Any:
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments), timeout=patience_s)
        except Exception:  # noqa: BLE001 - an actor, a machine or the cluster is gone, or the actor raised: all the same here
            raise WorkerLost("no result of an actor") from None
