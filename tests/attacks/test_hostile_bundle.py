"""A bundle that a hostile SuperLink sends: what its code gets hold of on a node, in the sandbox that we ship and without it.

Denied in the sandbox: the records, the ledger, keys, other processes, every address but the SuperNode's Runtime API on loopback, and root.
Not denied, and asserted as such: the guard's four calls, which is what a bundle is for, and replacing packages inside its own process.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from market_node.superlink import LINK, flwr
from protocol.privacy import Guarantee, noise_variance
from protocol.release import Release, open_envelope
from protocol.specification import NORM_SQUARED
from protocol.wire import guard_pb2 as pb
from tests.e2e.federation import node_log, operator, with_code
from tests.e2e.processes import veilmart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(os.geteuid() != 0, reason="bundles run as another user: needs root"),
]

MARKER, CALLS = "PRIVATE-MARKER-4471", 100

PYPROJECT = """
[project]
name = "hostile"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "stranger"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
out = ""
targets = ""
"""

SERVER = """
import json
from pathlib import Path
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    targets = ConfigRecord({"targets": Path(str(context.run_config["targets"])).read_text()})
    asked = [Message(RecordDict({"t": targets}), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    found = [json.loads(reply.content["r"]["report"]) if reply.has_content() else {"error": repr(reply.error)}
             for reply in grid.send_and_receive(asked, timeout=120)]
    out = Path(str(context.run_config["out"]))
    out.with_suffix(".part").write_text(json.dumps(found))
    out.with_suffix(".part").rename(out)
"""

CLIENT = """
import ctypes, json, os, socket
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
import protocol
app = ClientApp()

def attempt(what):
    try:
        return what()
    except BaseException as error:
        return "denied: " + type(error).__name__

def read(path):
    with open(path, "rb") as file:
        return "got: " + file.read(1 << 20).decode("latin-1")[:400_000]

def connect(address):
    host, port = address
    with socket.create_connection((host, port), 3):
        return "got: connected"

def become_root():
    os.setuid(0)
    return "got: root"

def leave():
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(b"/proc", 2) and libc.umount2(os.fsencode(targets["home"]), 2) and libc.unshare(0x40000000):
        raise PermissionError
    return "got: another namespace"

def guard_calls(address):
    import grpc
    envelope, answers = b"", set()
    with grpc.insecure_channel(address) as channel:
        request = channel.unary_unary("/veilmart.v1.Guard/Request")
        collect = channel.unary_unary("/veilmart.v1.Guard/Collect")
        for number in range(CALLS):
            epsilon = f"{2 + number / 100:g}".encode() if number else b"1.0"
            answers.add(request(b"\\n" + bytes([len(epsilon)]) + epsilon + b"\\x12\\x051e-06", timeout=10).hex())
        import time
        until = time.monotonic() + 60
        while not envelope and time.monotonic() < until:
            envelope = collect(b"", timeout=10)
            time.sleep(0.2)
    return {"answers": sorted(answers), "envelope": envelope.hex()}

@app.train()
def train(message, context):
    global targets
    targets = json.loads(message.content["t"]["targets"])
    mine = str(context.node_config["guard"])
    home = next(place for place in targets["nodes"] if mine.startswith("unix:" + place["home"] + "/"))
    targets["home"] = home["home"]
    report = {"home": home["home"], "uid": os.getuid(), "protocol": protocol.WHOSE}
    for name, path in home["files"].items():
        report["read " + name] = attempt(lambda: read(path))
    report["list home"] = attempt(lambda: "got: " + " ".join(name for name in os.listdir(home["home"]) if name != "guard"))
    report["environment of guard"] = attempt(lambda: read(f"/proc/{home['pid']}/environ"))
    report["root of guard"] = attempt(lambda: read(f"/proc/{home['pid']}/root{home['files']['records']}"))
    report["signal guard"] = attempt(lambda: os.kill(home["pid"], 0) or "got: may kill")
    for name, address in targets["addresses"].items():
        report["connect " + name] = attempt(lambda: connect(address))
    report["become root"] = attempt(become_root)
    report["leave"] = attempt(leave) if os.getuid() else "got: is root already"
    report["secret"] = os.environ.get("OWNERS_PASSWORD", "denied: not set")
    report["guard"] = attempt(lambda: guard_calls(mine))
    return Message(RecordDict({"r": ConfigRecord({"report": json.dumps(report)})}), reply_to=message)
""".replace("CALLS", str(CALLS))


def write_bundle(folder: Path) -> Path:
    files = {"pyproject.toml": PYPROJECT, "server_app.py": SERVER, "client_app.py": CLIENT, "protocol/__init__.py": 'WHOSE = "stranger"\n'}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@contextmanager
def owner(home: Path, said: dict, base: Path, *how: str):
    """Yield (process, records file) of an owner with private records."""
    data = home / "data" / "records.jsonl"
    data.parent.mkdir(parents=True)
    records = [{"prompt": f"{MARKER} question {number}", "response": f"answer {number * 7 % 13}"} for number in range(40)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [
        sys.executable, "-m", "nodes.command", "node", "up", "--data", str(data), "--no-train", "--base", str(base), "--json",
        "--flower", said["superlink"], "--ca", said["ca"], *how,
    ]  # fmt: skip
    with (home / "node.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=with_code(home, OWNERS_PASSWORD=MARKER))
        try:
            assert process.stdout.readline(), node_log(home)
            yield process, data
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            process.stdout.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory, slm_directory):
    """What the same hostile bundle reports from a node in the sandbox and from one without."""
    folder = tmp_path_factory.mktemp("hostile")
    homes = {"sandboxed": folder / "sandboxed", "open": folder / "open"}
    with operator(folder / "operator", nodes=homes.values()) as said, socket.create_server(("127.0.0.1", 0)) as canary:
        with owner(homes["sandboxed"], said, slm_directory, "--app-user", "54331") as first:
            with owner(homes["open"], said, slm_directory, "--unisolated") as second:
                nodes = [
                    {
                        "home": str(home), "pid": process.pid,
                        "files": {
                            "records": str(data), "ledger": str(home / "node/ledger.db"), "owner's key": str(home / "node/owner.key"),
                            "supernode's key": str(home / "flower/supernode.key"),
                        },
                    }
                    for home, (process, data) in zip(homes.values(), (first, second), strict=True)
                ]  # fmt: skip
                address = {"market": said["address"], "superlink": said["superlink"]}
                addresses = {name: [where.split(":")[0], int(where.split(":")[1])] for name, where in address.items()}
                addresses["somebody"] = list(canary.getsockname())
                (folder / "targets.json").write_text(json.dumps({"nodes": nodes, "addresses": addresses}))
                out, settings = folder / "out.json", folder / "run.toml"
                settings.write_text(f'out = "{out}"\ntargets = "{folder / "targets.json"}"\n')
                market_home = folder / "operator" / "market"
                run = flwr(market_home, "run", str(write_bundle(folder / "bundle")), LINK, "--run-config", str(settings))["run-id"]
                until = time.monotonic() + 180
                while not out.exists():
                    assert time.monotonic() < until, flwr(market_home, "list", LINK, "--run-id", run)["runs"]
                    time.sleep(0.5)
                spent = {
                    name: json.loads(veilmart("node", "ledger", "--json", home=home))["spent"] for name, home in homes.items()
                }  # fmt: skip
    found = {report.get("home"): report for report in json.loads(out.read_text())}
    return {name: {**found[str(home)], "spent": spent[name]} for name, home in homes.items()}


def released(report: dict) -> Release:
    """Return the release that the bundle collected, as whoever gets it reads it."""
    return open_envelope(pb.Collected.FromString(bytes.fromhex(report["guard"]["envelope"])).envelope)


ATTEMPTS = [
    "read records", "read ledger", "read owner's key", "read supernode's key", "environment of guard", "root of guard", "signal guard",
    "connect market", "connect superlink", "connect somebody", "become root", "leave", "secret",
]  # fmt: skip


@pytest.mark.parametrize("name", ATTEMPTS)
def test_in_the_sandbox_a_hostile_bundle_is_denied(reports, name):
    assert reports["sandboxed"][name].startswith("denied: "), reports["sandboxed"][name][:200]


def test_in_the_sandbox_nothing_private_is_in_the_report_at_all(reports):
    report = {name: value for name, value in reports["sandboxed"].items() if name != "guard"}
    assert MARKER not in json.dumps(report)
    assert report["list home"] == "got: "
    assert report["uid"] == 54331


@pytest.mark.parametrize("name", [name for name in ATTEMPTS if name not in ("secret", "environment of guard")])
def test_without_the_sandbox_the_same_bundle_succeeds(reports, name):
    """The control: the attempts are real ones."""
    got = reports["open"][name]
    assert isinstance(got, str)
    assert not got.startswith("denied: "), got
    if name in ("read records", "root of guard"):
        assert MARKER in got


def test_a_hundred_orders_cause_one_release_within_the_policy(reports):
    for report in reports.values():
        assert report["guard"]["answers"] == [""], "every order got the same answer"
        release = released(report)
        assert report["spent"] == pytest.approx(1.0, abs=1e-6)
        assert release.specification.guarantee.epsilon == 1.0


def test_a_shadowed_protocol_changes_nothing_in_the_guard(reports):
    """Code in a bundle wins over installed code, in its own process; noise is drawn in the guard's."""
    for report in reports.values():
        assert report["protocol"] == "stranger"
        release = released(report)
        assert release.specification.noise_variance == noise_variance(Guarantee(1.0, 1e-6), NORM_SQUARED)
        assert not release.simulated
