"""Load a market with everything at once, in an open loop, and say whether it stays as it is: latencies, errors, memory, descriptors.

    python -m tests.bench.market_load [--minutes M] [--rates KIND=PER_S,...] [--releases N] [--json] [--out FILE] [--picture FILE]

The market is `veilmart market up` with its members' port (mutual TLS), page and metrics, in processes of their own on loopback.
Members register releases, queriers send encrypted queries and sync, others ask a guard through the relay, and visitors look at the page:
each role in a process of its own (tests/bench/load_clients.py), at arrival times that are drawn beforehand (Poisson), latencies counted
from them.  Every receipt, signature and answer is verified.

Three parts: it warms up; it grows, with registrations, for a third of the time; it stays, with members that send their last release again
instead.  What a release costs in memory is read off the growing part; what leaks, off the staying one, where nothing should grow at all.

    memory      Theil-Sen slope of the resident size in the staying part.  It breaks its bound when all of its 95 % interval lies above
                1 MB an hour, and in a run of less than twenty minutes what a process of that age still settles
    a release   growth of the growing part, divided by its registrations, where there were enough of them
    descriptors most that were open in the second half of the staying part against the first
    p99         of each kind, against that of its own first minute, or first sixth of a short run

Exit code 1 if a bound is broken.  A run of a minute finds what loses five kilobytes a call; 1 MB an hour takes half an hour to see, and a
machine that is quiet.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from market_node.members import Members
from nodes.market_client import MarketClient
from nodes.policy import RelayRules
from protocol.features import default_map
from protocol.release import Release, sign_release
from tests.bench.load_clients import DONE, ROLES, Outcome, Role, enrolled
from tests.bench.market import fill
from tests.bench.matching import machine
from tests.bench.relay import AtOnce
from tests.bench.watching import Watch, between, growth, thinned
from tests.e2e.processes import cpu_of, market_process, settle
from tests.e2e.test_page_process import PATIENCE_S, read
from tests.nodes.guard_processes import wait_for
from tests.nodes.relays import relayed
from tests.protocol.worlds import ADAPTER, release_of

SCHEMA = "veilmart.bench.market-load/1"
MAP = default_map()
RATES = {"register": 5.0, "query": 4.0, "sync": 0.2, "ask": 4.0, "page": 3.0}  # calls a second
OWNERS, WORKERS = 4, 4
OPTIONS = ("--members-port", "0", "--releases-a-day", "0", "--metrics", "0")
EVERY_S, MOST_SAMPLES, BINS = 0.5, 240, 30

LEAK_MB_AN_HOUR = 1.0
RELEASE_KB = 40.0
MORE_DESCRIPTORS = 4
P99_RATIO = 2.0
LONG_S = 11 * 60.0  # a staying part as long as this has settled
SETTLES_MB = 2.0  # in the minutes after a start: buffers that a pool or an allocator has not needed before
FEWEST_RELEASES = 500
FEWEST_SAMPLES = 12
FEWEST = 60  # calls in either part, for a 99th percentile to be compared


class Parts:
    """When the parts of a run begin and end, in seconds since its start."""

    def __init__(self, minutes: float) -> None:
        self.warm = max(8.0, 4.0 * minutes)
        self.end = 60.0 * minutes
        self.stays = self.end / 3
        self.settled = self.stays + (self.end - self.stays) / 8  # caches of the last registrations are written by then
        self.first = min(60.0, self.end / 6)  # what is called the first minute


def arrivals(rates: Mapping[str, float], parts: Parts, seed: int = 1) -> dict[str, list[tuple[float, str]]]:
    """Return when which call of each role is to be made: Poisson arrivals, fixed before the run begins."""
    rng = np.random.default_rng(seed)

    def poisson(rate: float) -> list[float]:
        gaps = rng.exponential(1 / rate, int(rate * (parts.end + parts.warm) * 1.5) + 50)
        times = np.cumsum(gaps) - parts.warm
        return [float(at) for at in times[times < parts.end]]

    planned: dict[str, list[tuple[float, str]]] = {}
    for role, (_, kinds) in ROLES.items():
        calls: list[tuple[float, str]] = []
        for kind in kinds:
            if kind == "re-send":
                continue
            for at in poisson(rates[kind]):
                calls.append((at, "re-send" if kind == "register" and at >= parts.stays else kind))
        planned[role] = sorted(calls)
    return planned


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return percentiles of latencies in milliseconds."""
    return {f"p{share}_ms": round(1e3 * float(np.percentile(seconds, share)), 2) for share in (50, 90, 99)} | {
        "max_ms": round(1e3 * max(seconds), 2)
    }


def invites(home: Path, count: int) -> list[bytes]:
    """Return the secrets of as many invites to a market that runs, each for a house of its own."""
    members = Members.open(home / "market")
    secrets = [members.invite(f"house {number}", int(time.time()) + 3600) for number in range(count)]
    members.close()
    return secrets


@contextmanager
def answering(folder: Path, address: str, ca: Path, secret: bytes) -> Iterator[Release]:
    """Keep a member's guard on its line while the block runs; yield the release that it answers for."""
    key, membership = enrolled(address, ca, folder, secret)
    release = release_of(MAP, key, adapter=ADAPTER)
    with MarketClient(address, ca, folder, membership) as client:
        client.publish(envelope := sign_release(release, key))
    rules = RelayRules(questions_per_hour=1_000_000)
    with relayed(envelope, AtOnce(release.release_id, key), address, ca, folder, rules, membership):
        yield release


@contextmanager
def clients_of(roles: Sequence[Role], planned: Mapping[str, list[tuple[float, str]]]) -> Iterator[list[subprocess.Popen[str]]]:
    """Start a process for each role and yield them when all are ready; whatever happens, none is left."""
    clients = []
    try:
        for role in roles:
            role.write()
            (role.folder / "arrivals.json").write_text(json.dumps(planned[role.name]))
            words = [sys.executable, "-m", "tests.bench.load_clients", str(role.folder)]
            clients.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for one in clients:
            if _pipe(one.stdout).readline() != "ready\n":
                raise SystemExit("clients: one did not get ready")
        yield clients
    finally:
        for one in clients:
            if one.poll() is None:
                one.kill()
            one.wait()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def load(folder: Path, minutes: float, rates: Mapping[str, float], releases: int, program: str | None = None) -> dict[str, Any]:
    """Return what became of the calls, and of the market's processes over the time.  program: of another market than ours."""
    parts, home = Parts(minutes), folder / "home"
    fill(home / "market", releases)
    with ExitStack() as stack:
        started, process = stack.enter_context(market_process(home, program, OPTIONS, page="0"))
        settle(process.pid)  # it compiles its kernels, the first time on a machine
        wait_for(lambda: read(started["page"] + "healthz")[0] == 200, PATIENCE_S)
        address, ca = started["address"], Path(started["ca"])
        secrets = invites(home, OWNERS + 1)
        release = stack.enter_context(answering(folder / "guard", address, ca, secrets.pop()))
        roles = []
        for name in ROLES:
            (part := folder / name).mkdir()
            roles.append(Role(name, part, address, ca, started["page"], tuple(secrets), release.release_id, release.owner, WORKERS))
        clients = stack.enter_context(clients_of(roles, arrivals(rates, parts)))
        start = time.monotonic() + parts.warm + 0.5
        for one in clients:
            _pipe(one.stdin).write(f"{start}\n")
            _pipe(one.stdin).flush()
        # Without what SQLite has not moved there yet, which is bounded: it moves a thousand pages at a time.
        watch, database, cpu = Watch(process.pid, start), [], cpu_of(process.pid)
        while time.monotonic() < start + parts.end:
            watch.look()
            database.append((round(time.monotonic() - start, 1), sum(file.stat().st_size for file in (home / "market").glob("*.db"))))
            time.sleep(EVERY_S)
        cpu = cpu_of(process.pid) - cpu
        for one in clients:
            one.communicate(timeout=120)
        outcomes = [Outcome(*call) for role in roles for call in json.loads((role.folder / "outcomes.json").read_text())]
    return report(outcomes, watch, database, parts) | {
        "releases": {"before": releases, "registered": sum(call.kind == "register" and call.code == DONE for call in outcomes)},
        "market_cores": round(cpu / (parts.end + parts.warm), 3), "minutes": minutes, "rates": dict(rates), "machine": machine(),
    }  # fmt: skip


def report(outcomes: Sequence[Outcome], watch: Watch, database: Sequence[tuple[float, int]], parts: Parts) -> dict[str, Any]:
    """Return figures and verdicts of a run."""
    calls, checks = {}, []
    registered = sum(call.kind == "register" and call.code == DONE and call.planned_s >= 0 for call in outcomes)
    for kind in sorted({call.kind for call in outcomes}):
        of_kind = [call for call in outcomes if call.kind == kind and call.planned_s >= 0]
        begin, end = (parts.stays, parts.end) if kind == "re-send" else (0.0, parts.stays if kind == "register" else parts.end)
        codes = Counter(call.code for call in of_kind if call.code != DONE)
        first = [call.latency_s for call in of_kind if call.planned_s < begin + parts.first]
        later = [call.latency_s for call in of_kind if call.planned_s >= begin + parts.first]
        edges = np.linspace(begin, end, BINS + 1)
        over_time = []
        for low, high in pairwise(edges):
            inside = [call.latency_s for call in of_kind if low <= call.planned_s < high]
            if inside:
                over_time.append([round(float(low), 1), *(round(1e3 * float(np.percentile(inside, share)), 2) for share in (50, 99))])
        calls[kind] = {"calls": len(of_kind), "errors": dict(codes), **percentiles(first + later), "over_time_p50_p99": over_time}
        checks.append(check(f"{kind}: errors", 0, sum(codes.values())))
        # A catalogue that grows takes longer to sync, and a release more is the point of registering: that is no growth of the market.
        if kind != "sync" and min(len(first), len(later)) >= FEWEST:
            one, other = (1e3 * float(np.percentile(part, 99)) for part in (first, later))
            checks.append(check(f"{kind}: p99 in ms, {one:.1f} in the first minute", P99_RATIO * one, other))
    processes = {}
    for name, samples in watch.samples.items():
        staying, growing = between(samples, parts.settled, parts.end), between(samples, 0.0, parts.stays)
        if len(staying) < FEWEST_SAMPLES or not growing:
            continue  # a process that comes and goes
        processes[name] = memory_of(staying, growing, registered, parts)
        checks += memory_checks(name, processes[name], registered, parts)
        processes[name]["over_time"] = [list(one) for one in thinned(samples, MOST_SAMPLES)]
    sizes = [size for _, size in database]
    return {
        "schema": SCHEMA, "calls": calls, "processes": processes, "checks": checks,
        "broken": [one["what"] for one in checks if one["broken"]], "database_mb": [round(sizes[0] / 1e6, 2), round(sizes[-1] / 1e6, 2)],
    }  # fmt: skip


def memory_of(staying: Sequence[Any], growing: Sequence[Any], registered: int, parts: Parts) -> dict[str, Any]:
    """Return how a process grew: with releases, and without."""
    slope = growth([one.at_s for one in staying], [one.rss_mb for one in staying])
    tenth = max(len(growing) // 10, 1)
    before, after = (float(np.median([one.rss_mb for one in part])) for part in (growing[:tenth], growing[-tenth:]))
    grown = after - before  # in nine tenths of the time
    half = (parts.settled + parts.end) / 2
    halves = between(staying, 0.0, half), between(staying, half, parts.end)
    return {
        "rss_mb": [growing[0].rss_mb, staying[-1].rss_mb], "leak_mb_an_hour": [round(number, 3) for number in slope],
        "resolution_mb_an_hour": round((slope.high - slope.low) / 2, 3),
        "kb_a_release": round(1024 * grown / (0.9 * max(registered, 1)), 2),
        "descriptors": [max(one.descriptors for one in part) for part in halves],
        "threads": [max(one.threads for one in part) for part in halves],
    }  # fmt: skip


def memory_checks(name: str, memory: Mapping[str, Any], registered: int, parts: Parts) -> list[dict[str, Any]]:
    """Return the verdicts on one process; of a release only where so many came that one can be told from what settles.

    Memory breaks its bound where the whole interval lies above it: a burst of calls leaves buffers behind, once, which a slope alone would
    take for a leak.  In a short run the bound is 1 MB an hour and what a process of that age settles, spread over the time looked at.
    """
    looked_s = parts.end - parts.settled
    settles = 0.0 if looked_s >= LONG_S else SETTLES_MB * 3600 / looked_s
    bound, low = LEAK_MB_AN_HOUR + settles, memory["leak_mb_an_hour"][1]
    leak = check(f"{name}: MB an hour, lower end of the interval", round(bound, 1), low)
    first, second = memory["descriptors"]
    checks = [leak, check(f"{name}: descriptors, {first} in the first half", first + MORE_DESCRIPTORS, second)]
    if registered >= FEWEST_RELEASES:
        checks.append(check(f"{name}: kB a release", RELEASE_KB, memory["kb_a_release"]))
    return checks


def check(what: str, bound: float, measured: float) -> dict[str, Any]:
    """Return a verdict: broken if what was measured is above its bound."""
    return {"what": what, "bound": round(bound, 2), "measured": round(measured, 2), "broken": bool(measured > bound)}


def picture(result: Mapping[str, Any]) -> Any:
    """Draw latencies and memory over the time of a run."""
    import matplotlib.pyplot as plt

    from tests.bench.pictures import GREY, STYLES

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    end = 60 * result["minutes"]
    for kind, (colour, _, line) in zip(("register", "query", "ask", "page"), STYLES, strict=True):
        rows = result["calls"][kind]["over_time_p50_p99"]
        minutes = [at / 60 for at, _, _ in rows]
        left.plot(minutes, [p99 for _, _, p99 in rows], color=colour, linestyle=line, label=f"{kind}, p99")
        left.plot(minutes, [p50 for _, p50, _ in rows], color=colour, linestyle=line, linewidth=0.8, alpha=0.6)
    left.set(yscale="log", xlabel="minutes", ylabel="ms from the planned arrival", title="latencies (thin: median)", xlim=(0, end / 60))
    left.legend(loc="upper right", fontsize=9)
    for (name, process), (colour, _, line) in zip(result["processes"].items(), STYLES, strict=False):
        rows = [row for row in process["over_time"] if row[0] >= 0]
        slope = process["leak_mb_an_hour"]
        right.plot(
            [row[0] / 60 for row in rows], [row[1] for row in rows], color=colour, linestyle=line,
            label=f"{name}: {slope[0]:+.2f} MB an hour ({slope[1]:+.2f} to {slope[2]:+.2f})",
        )  # fmt: skip
    right.axvline(Parts(result["minutes"]).stays / 60, color=GREY, linewidth=0.8, linestyle=":")
    right.set(xlabel="minutes", ylabel="resident MB", title="memory (dotted: the last registration)", xlim=(0, end / 60), ylim=(0, None))
    right.legend(loc="lower right", fontsize=9)
    return figure


def rates_in(text: str) -> dict[str, float]:
    """Return the rates that an option gives, the others as they are."""
    given = {}
    for part in text.split(","):
        kind, _, rate = part.partition("=")
        if kind not in RATES or not rate or float(rate) <= 0:
            raise argparse.ArgumentTypeError(f"expected KIND=PER_S with KIND one of {', '.join(RATES)}, got {part!r}")
        given[kind] = float(rate)
    return RATES | given


def main() -> None:
    """Run the benchmark; exit code 1 if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="after it is warm")
    parser.add_argument(
        "--rates", type=rates_in, default=RATES, metavar="KIND=PER_S,...", help=", ".join(f"{k}={v:g}" for k, v in RATES.items())
    )
    parser.add_argument("--releases", type=int, default=2_000, help="that the market has before")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw it")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that who breaks it off leaves no process behind
    with tempfile.TemporaryDirectory() as folder:
        result = load(Path(folder), asked.minutes, asked.rates, asked.releases)
    if asked.out:
        asked.out.write_text(to_text(result))
    if asked.picture:
        from tests.bench.pictures import save

        save(picture, result, asked.picture)
    print(to_text(result) if asked.json else summary(result))
    sys.exit(1 if result["broken"] else 0)


def to_text(result: Mapping[str, Any]) -> str:
    """Return the result as JSON, samples one to a line."""
    return json.dumps(result, indent=1).replace("\n     ", " ").replace("\n    ]", " ]") + "\n"


def summary(result: Mapping[str, Any]) -> str:
    """Return what a person looks at."""
    lines = []
    for kind, of in result["calls"].items():
        lines.append(f"{kind:9s}" + " ".join(f"{name} {value}" for name, value in of.items() if name != "over_time_p50_p99"))
    for name, of in result["processes"].items():
        lines.append(f"{name}: " + " ".join(f"{what} {value}" for what, value in of.items() if what != "over_time"))
    lines += [
        f"{'BROKEN' if one['broken'] else 'kept  '} {one['what']}: {one['measured']} (at most {one['bound']})" for one in result["checks"]
    ]
    return "\n".join(
        [*lines, f"market: {result['market_cores']} cores, releases {result['releases']}, database MB {result['database_mb']}"]
    )


if __name__ == "__main__":
    main()
