"""What Flower's deployment engine costs a message and a process, on this machine: TLS, node authentication, bundles in the sandbox.

    PYTHONPATH=. python tests/bench/deployment.py --nodes 3 --campaigns 2 -o deployment.json

Writes its part of docs/results/federation.json.  Guards are not in it: nothing answers on their sockets, so each message is the whole way
of a question and a refusal, without any work of ours.
"""

import argparse
import json
import os
import re
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from tests.e2e.federation import campaign, node, operator


def memory_mib(pid: int) -> float:
    """Return the proportional share of a process's memory."""
    return int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)[1]) / 1024


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found += [int(path.parent.name), *children_of(int(path.parent.name))]
    return found


def name_of(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    text = " ".join(words)
    for name in ("flower-superlink", "flower-supernode", "nodes.gate", "flower-superexec", "flwr-serverapp", "flwr-clientapp"):
        if name in text:
            return name
    return "market up" if "nodes.command market up" in text else "node up"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--campaigns", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        top = Path(folder)
        top.chmod(0o755)
        homes = [top / f"node-{number}" for number in range(asked.nodes)]
        began = time.monotonic()
        said = stack.enter_context(operator(top / "operator", nodes=homes))
        ready_s = time.monotonic() - began
        began = time.monotonic()
        for number, home in enumerate(homes):
            user = str(54360 + number) if os.geteuid() == 0 else ""
            stack.enter_context(node(home, said["superlink"], Path(said["ca"]), f"unix:{home}/guard/socket", user=user))
        nodes_s = time.monotonic() - began
        memory: dict[str, list[float]] = {}
        for pid in children_of(os.getpid()):
            memory.setdefault(name_of(pid), []).append(round(memory_mib(pid), 1))
        seconds, messages = [], []
        for _ in range(asked.campaigns):
            began = time.monotonic()
            account = campaign(top / "operator", said, "--timeout", "120", "--at-least", "0")
            seconds.append(round(time.monotonic() - began, 2))
            assert account["counts"]["failed"] == asked.nodes, account["counts"]
            here = top / "operator/market/campaigns" / account["campaign"]
            asked_at = json.loads((here / "run.json").read_text())["asked_at"]
            messages += [round(path.stat().st_mtime - asked_at, 2) for path in (here / "nodes").iterdir()]
    result = {
        "engine": "flower deployment", "nodes": asked.nodes, "tls": True, "node_authentication": True, "sandbox": os.geteuid() == 0,
        "cores": os.cpu_count(), "load_at_end": round(os.getloadavg()[0], 1), "market_and_superlink_ready_s": round(ready_s, 2),
        "nodes_ready_s": round(nodes_s, 2), "campaign_of_one_message_each_s": seconds,
        "message_s": sorted(messages), "pss_mib": dict(sorted(memory.items())),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if asked.out:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
