"""A guard as a real process over the tiny model, with a policy and a socket of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from nodes.base_model import BaseModel
from nodes.guard_service import SocketGuard
from tests.nodes.owners import tiny_map

POLICY = """\
[specification]
epsilon_for_life = 4.0
largest_epsilon = 1.5
minimum_units = {least}
[service]
slot_s = {slot}
orders_per_hour = {rate}
uids = {uids}
"""
# More of it, for a guard that answers through a market.
RELAY = """\
[adapter]
release = "relay"
[relay]
questions_per_hour = 100
longest_question = 80
most_tokens = 16
"""


def write_policy(path: Path, *, least: int = 20, slot: float = 0, rate: int = 60, uids: list[int] | None = None, more: str = "") -> Path:
    path.write_text(POLICY.format(least=least, slot=slot, rate=rate, uids=uids or []) + more)
    return path


def words_of(home: Path, data: Path, model: Path, policy: Path, which_map: str = "") -> list[str]:
    home.mkdir(parents=True, exist_ok=True)
    if not which_map:
        (home / "tiny.map").write_bytes(tiny_map(BaseModel.open(model)).manifest)
    return [
        "node", "up", "--data", str(data), "--home", str(home), "--socket", str(home / "door" / "socket"), "--policy", str(policy),
        "--base", str(model), "--map", which_map or str(home / "tiny.map"), "--json",
    ]  # fmt: skip


@contextmanager
def guard_process(home: Path, data: Path, model: Path, policy: Path, program: str | None = None, which_map: str = ""):
    """Yield (a guard that is reached over its socket, what it said when ready, its process)."""
    what = ["-c", program] if program else ["-m", "nodes.command"]
    with (home.parent / f"{home.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *what, *words_of(home, data, model, policy, which_map)], stdout=subprocess.PIPE, stderr=log
        )
        try:
            line = process.stdout.readline()
            assert line, (home.parent / f"{home.name}.log").read_text()[-3000:]
            assert line.strip() != b"{", process.stdout.read()  # an error, on several lines
            ready = json.loads(line)
            yield SocketGuard(f"unix:{ready['socket']}"), ready, process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
            process.stdout.close()


def run(home: Path, data: Path, model: Path, policy: Path) -> subprocess.CompletedProcess:
    """Return how `node up` ended that was expected not to start."""
    command = [sys.executable, "-m", "nodes.command", *words_of(home, data, model, policy)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def journal_of(home: Path) -> list[dict]:
    done = subprocess.run(
        [sys.executable, "-m", "nodes.command", "node", "log", "--home", str(home), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)["entries"]


def wait_for(condition, seconds: float = 60.0):
    """Return the first true value of a condition."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return found


def events(home: Path) -> list[str]:
    path = home / "node" / "journal.jsonl"
    return [json.loads(line)["event"] for line in path.read_bytes().splitlines()] if path.exists() else []


def worker_of(process: subprocess.Popen) -> int:
    """Return the process that holds the data: the only child."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def gone(pid: int) -> bool:
    """Return whether a process has ended with all its threads: as long as one is ending, files and locks are held."""
    try:
        ended = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        return ended and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True
