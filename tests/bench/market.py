"""Measure a market in use: durable registrations, encrypted queries at 10 000 releases, the relay, and reading strangers' adapters.

    python -m tests.bench.market [--quick] [--json] [--out FILE]

The market is `veilmart market up` in a process of its own, over TLS on loopback, with its database fully synchronous and its quotas on.
Owners publish from two other processes, each owner one release, signed beforehand, several calls at a time; every receipt is verified.
CPU seconds are those of the market's process and of the clients', between the first call and the last answer.  All of it shares the cores
of one machine: a market that has them to itself takes less time, not less CPU.  About 3 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.store import Store
from nodes.market_client import MarketClient
from nodes.query import find_encrypted
from protocol.adapter_check import Checker
from protocol.catalogue import scalars_of
from protocol.channel import OPTIONS
from protocol.encryption import MatchPlan, QueryKey
from protocol.features import default_map
from protocol.release import Card, Release, sign_release
from protocol.scoring import sketch_of
from protocol.transparency import Receipt
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.bench.matching import machine
from tests.bench.relay import quantiles, relay
from tests.e2e.processes import cpu_of, market_process, settle
from tests.protocol.worlds import adapter_bytes, features, release_of

MAP = default_map()
CLIENTS, CALLS_AT_ONCE = 2, 16  # processes, and calls that each keeps open
ASKED = {"registrations_per_s": 300, "relay_p50_ms": 10}


def releases(count: int) -> list[tuple[Release, bytes]]:
    """Return releases of as many owners with their envelopes; their sums are noise, which costs a market the same."""
    made, rng = release_of(MAP, Ed25519PrivateKey.generate()), np.random.default_rng(1)
    found = []
    for number in range(count):
        key, sums = Ed25519PrivateKey.generate(), made.specification.noisy_sums.copy()
        sums[1:] += rng.integers(-100_000, 100_000, MAP.dimension, dtype=np.int32)
        specification, owner = replace(made.specification, noisy_sums=sums), key.public_key().public_bytes_raw()
        release = replace(made, owner=owner, specification=specification, card=Card(f"owner-{number}"))
        found.append((release, sign_release(release, key)))
    return found


# Registrations ------------------------------------------------------------------------------------------------------------


async def publish_all(address: str, authority: bytes, market_key: bytes, envelopes: list[bytes]) -> list[float]:
    """Publish every envelope, CALLS_AT_ONCE at a time, verify the receipts and return the seconds of each call."""
    credentials, waiting, seconds = grpc.ssl_channel_credentials(authority), iter(envelopes), []

    async def work(stub: Any) -> None:
        for envelope in waiting:
            began = time.perf_counter()
            answer = await stub.Publish(pb.PublishRequest(envelope=envelope), timeout=60)
            seconds.append(time.perf_counter() - began)
            inclusion = tuple(bytes(value) for value in answer.inclusion)
            Receipt(envelope, market_key, int(answer.index), bytes(answer.checkpoint), inclusion).verify()

    async with grpc.aio.secure_channel(address, credentials, options=OPTIONS) as channel:
        await asyncio.gather(*(work(MarketStub(channel)) for _ in range(CALLS_AT_ONCE)))
    return seconds


def one_client(folder: Path) -> None:
    """Be a process of owners: read what to publish, wait for the word on stdin, and print what it took."""
    asked = json.loads((folder / "asked.json").read_text())
    envelopes = [bytes.fromhex(line) for line in (folder / "envelopes").read_text().split()]
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    seconds = asyncio.run(publish_all(asked["address"], Path(asked["ca"]).read_bytes(), bytes.fromhex(asked["market_key"]), envelopes))
    result = {"began": began, "ended": time.perf_counter(), "cpu_s": time.process_time() - cpu, "seconds": seconds}
    sys.stdout.write(json.dumps(result) + "\n")


def registrations(folder: Path, count: int, program: str | None = None) -> dict[str, Any]:
    """Return what `count` registrations of as many owners take at a market that begins empty."""
    envelopes = [envelope for _, envelope in releases(count)]
    with market_process(folder / "home", program) as (started, process):
        with MarketClient(started["address"], Path(started["ca"]), folder / "q") as client:
            market_key = client.describe().market_key
        clients = []
        for number in range(CLIENTS):
            (part := folder / f"client-{number}").mkdir()
            (part / "asked.json").write_text(
                json.dumps({"address": started["address"], "ca": started["ca"], "market_key": market_key.hex()})
            )
            (part / "envelopes").write_text("\n".join(envelope.hex() for envelope in envelopes[number::CLIENTS]))
            words = [sys.executable, "-m", "tests.bench.market", "--client", str(part)]
            clients.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for one in clients:
            assert one.stdout is not None
            one.stdout.readline()
        settle(process.pid)
        cpu = cpu_of(process.pid)
        for one in clients:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        told = [json.loads(one.communicate()[0]) for one in clients]
        market_cpu = cpu_of(process.pid) - cpu
        with MarketClient(started["address"], Path(started["ca"]), folder / "q") as client:
            if client.describe().head.size != count:
                raise SystemExit(f"expected {count} releases at the market")
    wall = max(one["ended"] for one in told) - min(one["began"] for one in told)  # one clock for all processes
    return {
        "count": count, "owners": count, "client_processes": CLIENTS, "calls_at_once": CLIENTS * CALLS_AT_ONCE,
        "per_s": round(count / wall, 1), **quantiles([second for one in told for second in one["seconds"]]),
        "market_cpu_ms_each": round(1e3 * market_cpu / count, 2),
        "client_cpu_ms_each": round(1e3 * sum(one["cpu_s"] for one in told) / count, 2),
    }  # fmt: skip


# Queries ------------------------------------------------------------------------------------------------------------------


def fill(home: Path, count: int) -> None:
    """Put releases into the store of a market that does not run yet; only this filling is not synchronous."""
    store = Store.open(home)
    raw = store._engine.raw_connection()
    raw.cursor().execute("PRAGMA synchronous=OFF")  # of the connection that the pool hands out again
    raw.close()
    for release, envelope in releases(count):
        store.append(release, envelope, scalars_of(release, MAP))
    store.close()


def queries(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Return what encrypted queries take one after the other: the call alone, and all that a querier does for one."""
    fill(folder / "home" / "market", rows)
    sketch = sketch_of(features(40, 3, MAP.dimension), MAP, 2)
    with market_process(folder / "home") as (started, process):
        with MarketClient(started["address"], Path(started["ca"]), folder / "q") as client:
            head = client.sync(MAP).head
            plan = MatchPlan.build(rows, MAP.dimension)
            calls, whole, evaluated = [], [], []

            def call() -> None:
                query = QueryKey.fresh(plan).encrypt(sketch.centred_mean).to_bytes()
                began = time.perf_counter()
                exchange = client.match(MAP.map_id, head, query, plan.answer_bytes)
                calls.append(time.perf_counter() - began)
                evaluated.append(exchange.server_cpu_ms)

            def find() -> None:
                began = time.perf_counter()
                find_encrypted(sketch, client, MAP)
                whole.append(time.perf_counter() - began)

            for _ in range(5):  # the index is built and the kernels are compiled
                call()
                find()
            calls, whole, evaluated = [], [], []
            cpu = cpu_of(process.pid)
            for _ in range(count):
                call()
            cpu = cpu_of(process.pid) - cpu
            for _ in range(max(count // 4, 10)):
                find()
    return {
        "releases": rows, "dimension": MAP.dimension, "count": count, **quantiles(calls), "with_sync_and_ranking": quantiles(whole),
        "evaluation_cpu_ms": round(float(np.median(evaluated)), 2), "market_cpu_ms_each": round(1e3 * cpu / count, 2),
        "bytes_up": len(QueryKey.fresh(plan).encrypt(sketch.centred_mean).to_bytes()), "bytes_down": plan.answer_bytes,
    }  # fmt: skip


# Adapters -----------------------------------------------------------------------------------------------------------------


def adapter_checks(count: int) -> dict[str, Any]:
    """Return what reading a stranger's adapter takes: the first one of a process, later ones, and the largest."""
    checker = Checker()

    def check(data: bytes) -> float:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            began = time.perf_counter()
            checker.check(file.fileno())
            return time.perf_counter() - began

    small, largest = adapter_bytes(width=576, rank=8), adapter_bytes(width=18_700, rank=64)
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(small)
    checker.close()  # so that what it took is counted
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    first = ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime
    check(small)
    later, longest = [check(small) for _ in range(count)], check(largest)
    checker.close()
    return {
        "bytes": len(small), "first_cpu_s": round(first, 2), "later": quantiles(later),
        "largest_bytes": len(largest), "largest_ms": round(1e3 * longest, 1),
    }  # fmt: skip


def main() -> None:
    """Run the benchmark and print its table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer of everything, 1 000 releases")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    parser.add_argument("--client", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.client:
        one_client(asked.client)
        return
    registered, rows, queried, questions, read = (300, 1_000, 40, 100, 20) if asked.quick else (3_000, 10_000, 400, 1_000, 100)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        for name in ("registrations", "queries", "relay"):
            (home / name).mkdir()
        result = {
            "schema": "veilmart.bench.market/1", "command": "python -m tests.bench.market" + (" --quick" if asked.quick else ""),
            "machine": machine(), "asked": ASKED, "registrations": registrations(home / "registrations", registered),
            "queries": queries(home / "queries", rows, queried), "relay": relay(home / "relay", questions),
            "adapter_checks": adapter_checks(read),
        }  # fmt: skip
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")
    if asked.json:
        print(json.dumps(result, indent=1))
        return
    for part in ("registrations", "queries", "relay", "adapter_checks"):
        print(part, *(f"{name} {value}" for name, value in result[part].items()), sep="\n    ")


if __name__ == "__main__":
    main()
