"""The page as a process beside the market: it comes back whenever it can, goes when the market goes, and takes nothing with it."""

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from protocol.channel import connect
from protocol.features import default_map
from protocol.health import require_serving
from protocol.release import sign_release
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.bench.market import fill
from tests.e2e.processes import cpu_of, market_process, veilmart
from tests.market_node.pages import synthetic
from tests.nodes.guard_processes import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 300.0  # of a machine that is busy with other tests


def read(address: str) -> tuple[int, str]:
    """Return status and text of an answer; (0, "") where nobody answers."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def page_of(market: int) -> int:
    """Return the process of a market's page; 0 where there is none."""
    children = [int(pid) for file in Path(f"/proc/{market}/task").glob("*/children") for pid in file.read_text().split()]
    return next((pid for pid in children if b"market_node.page" in Path(f"/proc/{pid}/cmdline").read_bytes()), 0)


def test_a_page_that_cannot_start_or_is_killed_leaves_the_market_and_comes_back(tmp_path):
    home = tmp_path / "home"
    release, key = synthetic(default_map(), 1)[0]
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        port = somebody.getsockname()[1]
        with market_process(home, page=str(port)) as (started, process):
            ca = Path(started["ca"])
            assert started["page"] == f"http://127.0.0.1:{port}/"
            log = home / "market" / "page.log"
            wait_for(lambda: log.exists() and "in use" in log.read_text(), PATIENCE_S)
            wait_for(lambda: '"event": "ProgramEnded", "program": "page", "exit_code": 2' in (home / "market.log").read_text(), PATIENCE_S)
            require_serving(started["address"], ca, PATIENCE_S)
            somebody.close()
            wait_for(lambda: read(started["page"] + "healthz") == (200, "serving\n"), PATIENCE_S)

            channel = connect(started["address"], ca)
            MarketStub(channel).Publish(pb.PublishRequest(envelope=sign_release(release, key)), timeout=60)
            channel.close()
            wait_for(lambda: release.title in read(started["page"])[1], PATIENCE_S)
            card = json.loads(read(f"{started['page']}releases/{release.release_id.hex()}.json")[1])
            assert card["receipt"]
            assert card["market_key"] == started["market_key"]

            first = page_of(process.pid)
            assert os.getpriority(os.PRIO_PROCESS, first) > os.getpriority(os.PRIO_PROCESS, process.pid), "the market goes first"
            assert b"MALLOC_ARENA_MAX=2\0" in Path(f"/proc/{first}/environ").read_bytes(), "or every thread would keep a heap of its own"
            assert b"MALLOC_ARENA_MAX" not in Path(f"/proc/{process.pid}/environ").read_bytes()
            os.kill(first, signal.SIGKILL)
            require_serving(started["address"], ca, PATIENCE_S)
            wait_for(lambda: page_of(process.pid) not in (0, first) and read(started["page"] + "healthz")[0] == 200, PATIENCE_S)
            last = page_of(process.pid)
        assert process.returncode == 0
        assert not Path(f"/proc/{last}").exists()
        assert read(started["page"])[0] == 0
    assert "Traceback" not in log.read_text()


def test_the_commands_refuse_what_cannot_be(tmp_path):
    veilmart("market", "web", "--page", "0", home=tmp_path / "nowhere", code=3)
    veilmart("market", "up", "--port", "0", "--page", "host:many", home=tmp_path / "other", code=2)
    assert not (tmp_path / "other").exists() or not (tmp_path / "other" / "market").exists()


@pytest.fixture(scope="module")
def large_market(tmp_path_factory):
    """Yield the page's address of a market with 10 000 releases, and the market's process."""
    home = tmp_path_factory.mktemp("large")
    fill(home / "market", 10_000)
    with market_process(home, page="0") as (started, process):
        wait_for(lambda: read(started["page"] + "healthz")[0] == 200, PATIENCE_S)
        yield started["page"], process.pid


@pytest.mark.parametrize("path", ["", "?q=owner-1&sort=epsilon", "?sort=records&page=100", "map", "map?epsilon=1", "log"])
def test_the_first_screen_of_ten_thousand_releases_takes_less_than_300_ms_of_the_server(path, large_market):
    """CPU time of the page's process, the first time that anybody looks: a machine that is busy with something else makes it no longer."""
    base, market = large_market
    page = page_of(market)
    before = cpu_of(page)
    status, text = read(base + path)
    took = 1e3 * (cpu_of(page) - before)
    sys.stdout.write(f"/{path}: {took:.0f} ms of CPU, {len(text)} characters\n")
    assert status == 200
    assert took < 300
