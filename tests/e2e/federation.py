"""A whole deployment on loopback for end-to-end tests: a market with its SuperLink, and owners with their SuperNodes."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from market_node.superlink import register_supernode
from nodes.supernode import supernode_key
from tests.e2e.processes import environment

ROOT = Path(__file__).parent.parent.parent

NODE = """
import signal, sys, threading
from pathlib import Path
from nodes.supernode import AppUser, supernode
home, link, ca, guard, user, *hide = sys.argv[1:]
over = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: over.set())
app_user = AppUser.parse(user) if user else None
with supernode(Path(home), link, Path(ca), guard, app_user=app_user, hide=[Path(path) for path in hide]) as programs:
    print(*programs.pids().values(), flush=True)
    over.wait()
"""


def with_code(home: Path, **more: str) -> dict[str, str]:
    """Return the environment of a process that runs this tree's code in a home of its own."""
    return {**environment(home), "PYTHONPATH": str(ROOT), **more}


@contextmanager
def operator(home: Path, *options: str, nodes=(), **more: str):
    """Yield what `market up --flower` said; each of `nodes` is the home of an owner whose SuperNode is registered before."""
    for node in nodes:
        register_supernode(home / "market", supernode_key(node), node.name)
    home.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "nodes.command",
        "market",
        "up",
        "--open",
        "--port",
        "0",
        "--flower",
        "--flower-port",
        "0",
        "--no-page",
        "--json",
        *options,
    ]
    with (home / "market.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=with_code(home, **more))
        try:
            line = process.stdout.readline()
            assert line, (home / "market.log").read_text()
            yield json.loads(line)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=40)
            process.stdout.close()


@contextmanager
def node(home: Path, superlink: str, ca: Path, guard: str, *, user: str = "", hide=(), **more: str):
    """Yield (process, pids of its programs) of an owner's SuperNode; its output goes to home/node.log."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", NODE, str(home), superlink, str(ca), guard, user, *map(str, hide)]
    with (home / "node.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=with_code(home, **more))
        try:
            line = process.stdout.readline()
            yield process, [int(word) for word in line.split()]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=40)
            process.stdout.close()


def node_log(home: Path) -> str:
    """Return everything that an owner's processes said."""
    return "\n".join(path.read_text(errors="replace") for path in [home / "node.log", *(home / "flower").glob("*.log")] if path.exists())


def campaign(home: Path, said: dict, *words: str, code: int = 0, patience_s: float = 420) -> dict:
    """Run `campaign run --json`, expect its exit code, return the account (or the error)."""
    command = [sys.executable, "-m", "nodes.command", "campaign", "run", "--market", said["address"], "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=with_code(home), timeout=patience_s, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return json.JSONDecoder().raw_decode(done.stdout)[0]


def alive(pid: int) -> bool:
    """Return whether a process is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
