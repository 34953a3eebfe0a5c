"""The relay as real processes: a market that keeps and logs all that passes, a guard that listens nowhere, a querier's command.

The control is a question that was not sealed: the same look at the market must find it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nodes.base_model import BaseModel
from nodes.guard import Order
from nodes.market_client import MarketClient
from protocol.errors import GuardUnreachable
from protocol.privacy import Guarantee
from protocol.release import open_envelope
from tests.e2e.processes import environment, market_process, memory_of, veilmart
from tests.nodes.guard_processes import RELAY, guard_process, wait_for, write_policy
from tests.nodes.owners import MARKER, tiny_map, write_records

pytestmark = pytest.mark.slow
CANARY = "CANARY-QUESTION-4417"

KEEPING_BUILD = """
import sys
from market_node import relay
kept = []
async def ask(self, release_id, sealed, patience_s, honest=relay.Switchboard.ask):
    kept.append(sealed)
    print("passed", sealed, file=sys.stderr, flush=True)
    answer = await honest(self, release_id, sealed, patience_s)
    kept.append(answer)
    print("passed", answer, file=sys.stderr, flush=True)
    return answer
relay.Switchboard.ask = ask
from nodes.command import main
main()
"""


def listening(pid: int) -> list[str]:
    """Return the TCP sockets on which a process, or one of its children, listens."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    inodes = {
        str(link.readlink()).removeprefix("socket:[").removesuffix("]")
        for one in pids
        for link in Path(f"/proc/{one}/fd").iterdir()
        if str(link.readlink()).startswith("socket:")
    }
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    return [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]


def test_a_question_goes_through_a_market_that_keeps_everything_and_shows_it_nothing(tmp_path, tiny_model_directory, monkeypatch):
    (tmp_path / "tiny.map").write_bytes(tiny_map(BaseModel.open(tiny_model_directory)).manifest)
    which_map, home = str(tmp_path / "tiny.map"), tmp_path / "querier"
    options = ("--open", "--map", which_map, "--smallest-count", "1")
    with market_process(tmp_path / "market", KEEPING_BUILD, options) as (started, market):
        address, ca = started["address"], started["ca"]
        monkeypatch.setenv("VEILMART_MARKET", address)
        monkeypatch.setenv("VEILMART_CA", ca)
        data, policy = write_records(tmp_path / "wool.jsonl", 200), write_policy(tmp_path / "policy.toml", more=RELAY)
        with guard_process(tmp_path / "owner", data, tiny_model_directory, policy, which_map=which_map) as (guard, ready, process):
            assert ready["relay"] == address
            guard.request(Order(Guarantee(1.0, 1e-6)))
            envelope = wait_for(guard.collect, 120)
            release = open_envelope(envelope)
            with MarketClient(address, Path(ca), home) as client:
                client.publish(envelope)

                def connected() -> bool:
                    try:
                        return bool(client.introduction(release.release_id))
                    except GuardUnreachable:
                        return False

                wait_for(connected, 120)
                words = ("ask", f"{CANARY} of a private person", "--relay", "-m", release.title, "--tokens", "8", "--map", which_map)
                told = json.loads(veilmart(*words, "--market", address, "--ca", ca, "--json", home=home))
                assert (told["tokens"], told["learnware"], told["adapter_guarantee"]) == (8, release.title, "none")
                assert any("sealed bytes" in line for line in told["left_site"])
                veilmart(*words, "--market", address, "--ca", ca, "--nothing-leaves", home=home, code=2)
                assert listening(process.pid) == []
                log = tmp_path / "market" / "market.log"
                assert log.read_text().count("passed") == 2
                assert not any(CANARY.encode() in data for data in memory_of(market.pid))
                # Control: what is not sealed is found by the same look.
                with pytest.raises(GuardUnreachable):
                    client.ask(release.release_id, bytes(32) + f"{CANARY} of a private person".encode(), 20)
                assert any(CANARY.encode() in data for data in memory_of(market.pid))
                assert CANARY in log.read_text()
        assert "Error" not in log.read_text()
        node_log = (tmp_path / "owner.log").read_text()
        assert "relay connected" in node_log
        assert CANARY not in node_log
        assert MARKER not in node_log
        with MarketClient(address, Path(ca), home) as client, pytest.raises(GuardUnreachable):
            client.introduction(release.release_id)  # the guard is away, and the market knows
        refused = subprocess.run(
            [sys.executable, "-m", "nodes.command", *words, "--market", address, "--ca", ca], capture_output=True, text=True,
            env=environment(home), check=False,
        )  # fmt: skip
        assert refused.returncode == GuardUnreachable.exit_code
        assert "veilmart pull" in refused.stderr
