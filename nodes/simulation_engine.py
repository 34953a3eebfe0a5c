"""Flower's own simulation engine under a simulated federation: the same two apps in processes that Ray starts, the guards in ours.

A node of that engine knows its number and nothing else, so each guard has a unix socket of that number in a folder that the
environment names to the ClientApp (nodes/flower.py).  The SuperLink is our child and ends with us: left to itself `flwr run` would
start one that stays.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.bundle import FOLDER as BUNDLE
from protocol.errors import CampaignFailed, UsageError
from protocol.keys import write_durably
from protocol.processes import (
    Program,
    Supervisor,
    dies_with_us,
    flower_environment,
    flower_program,
    free_port,
    last_words,
    wait_for_port,
)

if TYPE_CHECKING:
    from nodes.guard import Reachable

LINK = "simulation"
SOCKETS = "VEILMART_GUARD_SOCKETS"  # as nodes/flower.py reads it
# A Ray of its own: Flower fails on one that runs here already, or on the file that a dead one left behind.
QUIET_RAY = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}
ASKING_THREADS = 8
STARTS = 3  # of Ray, which waits for its own processes for 30 s and no option says otherwise: too short on a machine that is very busy
STARTING_RAY = b"in init_ray\n"  # the line of Flower's traceback that says where it failed


class RayNotStarted(CampaignFailed):
    """Flower could not start Ray, hence no node either."""


def require_ray() -> None:
    """Raise UsageError without the package that Flower simulates with."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine flower: Flower's simulation engine needs Ray", hint='pip install "veilmart[sim]", or --engine grid')


@contextmanager
def sockets(places: Sequence[Reachable]) -> Iterator[Path]:
    """Serve guards of this process at unix sockets 0, 1, ... of a new folder of ours alone, and yield the folder.

    For a simulation: answers are not held back, and nobody's credentials are looked at.
    """
    import grpc

    from nodes.guard_service import order_from_wire
    from protocol.wire import guard_pb2 as pb
    from protocol.wire.guard_pb2_grpc import GuardServicer, add_GuardServicer_to_server

    class Answers(GuardServicer):
        def __init__(self, place: Reachable) -> None:
            self._place = place

        def Request(self, request: Any, context: Any) -> Any:  # the wire's name
            self._place.request(order_from_wire(request))
            return pb.Acknowledged()

        def Collect(self, request: Any, context: Any) -> Any:
            return pb.Collected(envelope=self._place.collect() or b"")

        def TakePart(self, request: Any, context: Any) -> Any:
            return pb.CohortAnswer(answer=self._place.take_part(bytes(request.ask)))

    folder = Path(tempfile.mkdtemp(prefix="veilmart-sim-"))  # short: a socket's path has at most 107 characters
    servers = []
    try:
        with ThreadPoolExecutor(ASKING_THREADS) as pool:
            for number, place in enumerate(places):
                server = grpc.server(pool)
                add_GuardServicer_to_server(Answers(place), server)  # type: ignore[no-untyped-call]
                server.add_insecure_port(f"unix:{folder / str(number)}")
                server.start()
                servers.append(server)
            yield folder
            for server in servers:
                server.stop(None).wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_campaign(
    home: Path, places: Sequence[Reachable], run_config: Mapping[str, str | int | float], workers: int, timeout_s: float
) -> None:
    """Run one campaign over guards of this process in Flower's simulation engine.

    Raises CampaignFailed, with the end of Flower's log, if the run did not come to its end.
    """
    require_ray()
    flower_home = home / "flower"
    flower_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    port = free_port()
    where = f"127.0.0.1:{port}"
    text = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\naddress = "{where}"\ninsecure = true\n'
    write_durably(flower_home / "config.toml", text.encode())
    with sockets(places) as folder:
        environment = {**flower_environment(flower_home), **QUIET_RAY, SOCKETS: str(folder)}
        link = Program(
            "flower-superlink",
            (
                *dies_with_us(), flower_program("flower-superlink"), "--simulation", "--insecure", "--host", "127.0.0.1",
                "--port", str(port), "--disable-runtime-dependency-installation",
            ),
            environment, flower_home / "superlink.log",
        )  # fmt: skip
        with Supervisor([link]) as supervisor:
            wait_for_port(supervisor, link, "127.0.0.1", port)
            for left in reversed(range(STARTS)):
                try:
                    return _run(environment, flower_home, len(places), run_config, workers, timeout_s)
                except RayNotStarted:  # nobody was asked anything yet
                    if not left:
                        raise


def _run(
    environment: Mapping[str, str],
    flower_home: Path,
    nodes: int,
    run_config: Mapping[str, str | int | float],
    workers: int,
    timeout_s: float,
) -> None:
    settings = " ".join(f"{key}={json.dumps(value)}" for key, value in run_config.items())
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 init-args-num-cpus={workers}"
    command = [
        flower_program("flwr"), "run", str(BUNDLE), LINK, "--stream", "--run-config", settings, "--federation-config", federation,
    ]  # fmt: skip
    log, started = flower_home / "run.log", time.monotonic()
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CampaignFailed(f"Flower's run did not end within {time.monotonic() - started:.0f} s", hint=f"see {log}") from None
    # `flwr run` ends well also where the ServerApp failed: its account is the sign of a campaign that came to its end.
    if done.returncode or not Path(str(run_config["out"])).is_file():
        if STARTING_RAY in log.read_bytes():
            raise RayNotStarted("Ray did not start in time", hint=f"see {log}; is the machine very busy, or its memory full?")
        raise CampaignFailed(f"Flower's run failed: {last_words(log)}", hint=f"see {log}")
