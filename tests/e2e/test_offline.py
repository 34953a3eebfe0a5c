"""Nothing connects beyond loopback: a simulation runs in an empty network namespace, and its attempts to connect are watched."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from nodes.demo_texts import demo_tasks, generate

pytestmark = pytest.mark.slow
# Loaded by every Python of the run before anything else: notes each name lookup and each connection from Python code.
WATCH = """
import os, sys
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        target = args[1] if event in ("socket.connect", "socket.sendto") else args[0]
        with open(os.environ["WATCHED"], "a") as log:
            log.write(f"{event} {target!r}\\n")
sys.addaudithook(watch)
"""


def run_watched(command, folder):
    (folder / "sitecustomize.py").write_text(WATCH)
    env = {**os.environ, "PYTHONPATH": str(folder), "WATCHED": str(folder / "watched.log")}
    words = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=280, check=False)
    seen = (folder / "watched.log").read_text().splitlines() if (folder / "watched.log").exists() else []
    return done, [line for line in seen if not any(local in line for local in ("127.0.0.1", "::1", "localhost", "'/", "None"))]


@pytest.fixture
def network_cut():
    """Skip, loudly, where no network namespace can be made."""
    probe = ["unshare", "-n", "sh", "-c", "ip link set lo up"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("the network cannot be cut here: needs root and unshare; that nothing connects beyond loopback was NOT checked")


def test_a_simulation_needs_no_network_and_asks_for_none(tmp_path, slm_directory, network_cut):
    for task in demo_tasks()[:2]:
        folder = tmp_path / "data" / task.name
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            records = generate(task.name, 30, split)
            (folder / f"{split}.jsonl").write_text(
                "".join(json.dumps({"prompt": r.prompt, "response": r.response}) + "\n" for r in records)
            )
    (tmp_path / "watch").mkdir()
    command = [
        sys.executable, "-m", "nodes.command", "sim", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--queries", "1",
        "--query-size", "20", "--test-records", "4", "--base", str(slm_directory), "--json",
    ]  # fmt: skip
    done, elsewhere = run_watched(command, tmp_path / "watch")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(json.loads(done.stdout)["queries"]) == 2  # whom they find is not the point: 30 records are too few for that
    assert elsewhere == []


def test_an_attempt_to_connect_is_seen(tmp_path, network_cut):
    """The control: a program that looks a host up and connects to it is noticed, and cannot reach it where the network is cut."""
    attempt = "import socket\ntry:\n    socket.create_connection(('telemetry.example', 443), 0.2)\nexcept OSError:\n    print('refused')\n"
    done, elsewhere = run_watched([sys.executable, "-c", attempt], tmp_path)
    assert any("telemetry.example" in line for line in elsewhere)
    assert done.stdout.strip() == "refused"
