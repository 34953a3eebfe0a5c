"""What this machine lacks for veilmart to work here: one finding a check, each with what to do.

`audit node` looks for what would void a guarantee; this looks for what would not run.  Nothing is changed, and only the market that is
configured is asked.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import VeilmartError

OLDEST_PYTHON = (3, 11)
PACKAGES = ("protocol", "nodes", "market_node")
LEAST_DISK_BYTES = 1 << 30  # the base model is 270 MB, and states of a training lie on the disk while it runs
LARGEST_SKEW_S = 300.0  # certificates are dated back by an hour, invites and witnesses count by the day: minutes hide a broken clock
HEALTH_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `holds` is True where all is well, False where something will not work, None where there is nothing to look at."""

    name: str
    holds: bool | None
    evidence: str
    advice: str = ""  # what to do, where it does not hold


@dataclass(frozen=True, slots=True)
class Installation:
    """What there is to look at."""

    home: Path
    model: Path  # of the base model
    base_model: str  # the identity that the feature map needs
    population: Path  # its folder
    market: str | None = None
    authority: Path | None = None


def examine(here: Installation, on_progress: Callable[[str, int, int], None] = lambda stage, done, of: None) -> tuple[Finding, ...]:
    """Return every finding."""
    checks: tuple[Callable[[], Sequence[Finding]], ...] = (
        lambda: [python()],
        lambda: [packages()],
        lambda: [origins()],
        lambda: [torch_build()],
        lambda: [disk(here.home)],
        lambda: [memory(here.model)],
        lambda: [model(here.model, here.base_model)],
        lambda: [keys(here.home)],
        lambda: [clock(here.population)],
        lambda: [authority(here.authority)],
        lambda: [sandbox()],  # it forks, so it comes before gRPC's threads
        lambda: market(here.market, here.authority),
    )
    found: list[Finding] = []
    for number, check in enumerate(checks, start=1):
        on_progress("checks", number, len(checks))
        found += check()
    return tuple(found)


# The installation ------------------------------------------------------------------------------------------------------------------------


def python() -> Finding:
    """Whether this Python is new enough."""
    oldest = ".".join(map(str, OLDEST_PYTHON))
    evidence = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    return Finding("python", sys.version_info >= OLDEST_PYTHON, evidence, f"install Python {oldest} or newer, and veilmart in it")


def packages() -> Finding:
    """Whether the packages that veilmart needs are there, in the versions that it asks for."""
    from nodes.audit.node import versions

    look = versions()
    return Finding("packages", look.holds, look.evidence, "`pip install --upgrade veilmart` in this environment")


def origins() -> Finding:
    """Whether all of our packages come from one place: another installation, or a folder of the same name, may shadow one of them."""
    places = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # of a package at the top: nothing is imported
        places[name] = str(Path(spec.origin).parent.parent) if spec is not None and spec.origin else "nowhere"
    said = ", ".join(f"{name} from {place}" for name, place in places.items())
    one = len(set(places.values())) == 1 and "nowhere" not in places.values()
    evidence = f"{', '.join(PACKAGES)} from {places['nodes']}" if one else said
    return Finding("loaded from", one, evidence, "remove the other installation, or the folder that shadows it, from PYTHONPATH")


def torch_build() -> Finding:
    """Which torch is installed and whether its build fits the machine; it is not loaded, which takes seconds."""
    spec = importlib.util.find_spec("torch")
    try:
        installed = importlib.metadata.version("torch")
        facts = runpy.run_path(str(Path(str(spec.origin if spec is not None else "")).with_name("version.py")))
    except (importlib.metadata.PackageNotFoundError, OSError):
        return Finding("torch", False, "torch is not installed", "`pip install torch`, or `make setup`")
    cuda, gpu = facts.get("cuda"), Path("/dev/nvidiactl").exists()
    if gpu and not cuda:
        return Finding("torch", True, f"torch {installed} for the CPU alone, although there is a GPU here")
    return Finding("torch", True, f"torch {installed}, {f'CUDA {cuda}' if cuda else 'for the CPU'}, {'a GPU' if gpu else 'no GPU'} here")


# The machine -----------------------------------------------------------------------------------------------------------------------------


def disk(home: Path) -> Finding:
    """Whether there is room for a model and for the states of a training, and the home can be written."""
    there = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("disk", False, f"{there} cannot be written", "--home or VEILMART_HOME names another folder")
    evidence = f"{free / 1e9:.1f} GB free at {there}, expected {LEAST_DISK_BYTES / 1e9:.1f} GB"
    return Finding("disk", free >= LEAST_DISK_BYTES, evidence, "free some, or let VEILMART_HOME name a folder on another disk")


def memory(directory: Path) -> Finding:
    """Whether there is memory for a node in training: this program with its libraries, the base model, and one owner's training."""
    from nodes.crew import FIXED_BYTES, WORKER_BYTES
    from nodes.machine import cores, free_bytes

    free = free_bytes()
    if free is None:
        return Finding("memory", None, "this system does not say how much is free")
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    need = FIXED_BYTES + 2 * weights + WORKER_BYTES  # without bf16 the weights are kept in fp32, twice as long
    evidence = f"{free / 1e9:.1f} GB free on {cores()} cores, a node in training takes about {need / 1e9:.1f} GB"
    return Finding("memory", free >= need, evidence, "end other programs; `--no-train` needs less")


def keys(home: Path) -> Finding:
    """Whether keys, ledger and journal are readable by their owner alone: commands refuse keys that are not."""
    from nodes.audit.node import permissions

    look = permissions(home)
    return Finding("key permissions", look.holds, look.evidence, f"chmod -R go= {home}")


def sandbox() -> Finding:
    """Whether bundles of Flower could run in the guard's sandbox (nodes/sandbox.py): namespaces, as root; no other command needs it."""
    if sys.platform != "linux":
        return Finding("sandbox", None, f"{platform.system()} has no namespaces: `node up --flower` cannot isolate bundles here")
    missing = [kind for kind in ("mnt", "ipc", "net") if not Path("/proc/self/ns", kind).exists()]
    landlock = _landlock_version()
    also = f"; Landlock {'version ' + str(landlock) if landlock else 'is not there'}, which it does not use"
    if missing:
        return Finding("sandbox", False, f"no {', '.join(missing)} namespaces{also}", "a kernel with namespaces, for `node up --flower`")
    if os.geteuid() != 0:
        return Finding("sandbox", None, f"namespaces are there, only root can use them for `node up --flower --app-user`{also}")
    allowed = _may_unshare()
    evidence = f"mount, IPC and network namespaces {'can' if allowed else 'cannot'} be made{also}"
    return Finding("sandbox", allowed, evidence, "`node up --flower` needs CAP_SYS_ADMIN, or the units of docs/deploy")


def _may_unshare() -> bool:
    """Return whether a child of ours may make the namespaces of the sandbox."""
    from nodes.sandbox import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS

    unshare = ctypes.CDLL(None, use_errno=True).unshare
    child = os.fork()
    if child == 0:
        os._exit(0 if unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _landlock_version() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none (landlock(7): asked with no rules and the flag 1)."""
    create_ruleset, version_flag = 444, 1
    try:
        return max(0, int(ctypes.CDLL(None).syscall(create_ruleset, None, 0, version_flag)))
    except (OSError, AttributeError):
        return 0


# Model and market ------------------------------------------------------------------------------------------------------------------------


def model(directory: Path, needed: str) -> Finding:
    """Whether the base model is there and is, byte for byte, the one that the feature map was fitted with."""
    from nodes.base_model import model_id

    advice = "`veilmart model import`"
    try:
        found = model_id(directory)
    except (OSError, VeilmartError):
        return Finding("model", False, f"no base model at {directory}", advice)
    evidence = f"{directory.name}, SHA-256 {found[:16]}"
    return Finding("model", found == needed, evidence if found == needed else f"{evidence}, expected {needed[:16]}", advice)


def clock(population: Path) -> Finding:
    """Whether nothing was written later than now, as far as one clock alone can tell."""
    from nodes.audit.node import clock as own_clock

    look = own_clock(population)
    return Finding("clock", look.holds, look.evidence, "set the clock, and let NTP keep it")


def authority(file: Path | None) -> Finding:
    """Whether the market's authority can be read and is valid now."""
    from nodes.audit.node import tls

    look = tls(file, None)
    return Finding("authority", look.holds, look.evidence, "ask the market's operator for its ca.crt: `veilmart market add`")


def market(address: str | None, ca: Path | None) -> tuple[Finding, ...]:
    """Whether the configured market answers and serves, and whether its clock and ours agree."""
    from protocol.health import require_serving

    if address is None or ca is None:
        return (Finding("market", None, "no market is configured: `veilmart market add`, or --market and --ca"),)
    try:
        serving = require_serving(address, ca, HEALTH_TIMEOUT_S)
    except VeilmartError as error:
        return (Finding("market", False, str(error), error.hint),)
    found = Finding("market", True, f"{address} serves, {1000 * serving.seconds:.0f} ms")
    if serving.ahead_s is None:
        return found, Finding("clock skew", None, "this market does not tell its time")
    evidence = f"the market's clock is {abs(serving.ahead_s):.1f} s {'ahead of' if serving.ahead_s > 0 else 'behind'} this one"
    return found, Finding("clock skew", abs(serving.ahead_s) <= LARGEST_SKEW_S, evidence, "set this clock, or tell the market's operator")
