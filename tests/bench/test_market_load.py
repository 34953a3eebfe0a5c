"""A market under everything at once stays as it is; and a run finds what does not."""

import os
import time
from collections import Counter

import numpy as np
import pytest

from protocol.errors import QuotaExceeded
from tests.bench.load_clients import DONE, Outcome, open_loop
from tests.bench.market_load import RATES, Parts, arrivals, load, rates_in, report, summary
from tests.bench.watching import Held, Watch, between, family, growth, held_by

# What a market would lose if it kept the last queries, or a file of each.
LEAKING = """
import os
from market_node.matcher import Matcher
kept, answer = [], Matcher.answer
def keeping(self, version, queries):
    kept.extend((os.urandom(100_000), open(os.devnull)) for _ in queries)
    return answer(self, version, queries)
Matcher.answer = keeping
from nodes.command import main
main()
"""


# The clients ------------------------------------------------------------------------------------------------------------------


def test_a_market_that_stands_still_shows_in_all_calls_that_were_planned_meanwhile():
    pauses = iter([0.3])
    own: list[float] = []

    def call(kind: str) -> None:
        began = time.monotonic()
        time.sleep(next(pauses, 0.0))
        own.append(time.monotonic() - began)

    found = open_loop(time.monotonic(), [(0.01 * number, "query") for number in range(20)], [call])
    assert [outcome.code for outcome in found] == [DONE] * 20
    assert sum(outcome.latency_s > 0.1 for outcome in found) >= 15
    assert sum(seconds > 0.1 for seconds in own) == 1, "control: a clock that starts with the call sees one"


def test_how_calls_end_is_counted_by_code():
    def call(kind: str) -> None:
        if kind == "query":
            raise QuotaExceeded("too many")
        if kind == "page":
            raise OSError("gone")

    found = open_loop(time.monotonic(), [(0.0, "query"), (0.0, "page"), (0.0, "ask")], [call, call])
    assert Counter((outcome.kind, outcome.code) for outcome in found) == {("query", "quota"): 1, ("page", "OSError"): 1, ("ask", DONE): 1}


def test_arrivals_are_fixed_beforehand_at_the_rates_that_were_asked_for():
    parts = Parts(30)
    planned = arrivals(RATES, parts)
    assert planned == arrivals(RATES, parts)
    assert planned != arrivals(RATES, parts, seed=2)
    calls = [(at, kind) for role in planned.values() for at, kind in role]
    counted = Counter(kind for at, kind in calls if at >= 0)
    assert counted["query"] == pytest.approx(RATES["query"] * parts.end, rel=0.05)
    assert counted["register"] == pytest.approx(RATES["register"] * parts.stays, rel=0.05)
    assert max(at for at, kind in calls if kind == "register") < parts.stays <= min(at for at, kind in calls if kind == "re-send")
    assert min(at for at, _ in calls) < -parts.warm + 5
    assert all(role == sorted(role) for role in planned.values())


def test_rates_are_read_and_nonsense_is_not():
    assert rates_in("query=2,page=0.5") == RATES | {"query": 2.0, "page": 0.5}
    for wrong in ("query", "query=0", "ask=-1", "other=1"):
        with pytest.raises(Exception, match="expected KIND=PER_S"):
            rates_in(wrong)


# What is held -----------------------------------------------------------------------------------------------------------------


def wandering(count: int, slope_mb_an_hour: float, seed: int) -> list[float]:
    """Return a resident size as it is: pages come and go in steps that last for many samples."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.normal(0, 0.3, count // 20 + 1), 20)[:count]
    return list(300 + level + rng.normal(0, 0.05, count) + slope_mb_an_hour * np.arange(count) / 3600)


def test_growth_is_seen_and_wandering_is_not_taken_for_it():
    times = list(range(1200))
    found = growth(times, wandering(1200, 20.0, 1))
    assert found.low > 10.0
    assert found.an_hour == pytest.approx(20.0, abs=3.0)
    flat = [growth(times, wandering(1200, 0.0, seed)) for seed in range(40)]
    assert sum(one.low > 0 or one.high < 0 for one in flat) <= 5, "an interval of 95 % that is one"
    naive = [growth(times, wandering(1200, 0.0, seed), blocks=300) for seed in range(12)]
    assert sum(one.low > 0 or one.high < 0 for one in naive) > 4, "control: neighbouring samples counted as if each told something new"


def test_this_process_is_seen_with_its_memory_and_files(tmp_path):
    me = os.getpid()
    (tmp_path / "file").write_text("")
    before = held_by(me, 0.0)
    files = [(tmp_path / "file").open() for _ in range(5)]
    grown = np.ones(64 << 20, np.uint8)  # much more than what others free meanwhile
    after = held_by(me, 1.0)
    assert me in family(me)
    assert after.descriptors == before.descriptors + 5
    assert after.anonymous_mb >= before.anonymous_mb + 48
    assert grown.size
    for file in files:
        file.close()


# Verdicts ---------------------------------------------------------------------------------------------------------------------

PARTS = Parts(30)


def watched(*, leak: float = 0.0, a_release_kb: float = 2.0, descriptors: int = 0) -> Watch:
    """Return samples of a market of which 5 releases a second came in the growing part."""
    watch, rng = Watch(1, 0.0), np.random.default_rng(1)
    for at in range(-60, int(PARTS.end)):
        rss = 300 + leak * at / 3600 + a_release_kb * 5 * min(max(at, 0), PARTS.stays) / 1024 + rng.normal(0, 0.02)
        opened = 40 + (descriptors if at > 0.8 * PARTS.end else 0)
        watch.samples.setdefault("market", []).append(Held(at, rss, rss, opened, 20))
    return watch


def called(*, code: str = DONE, later_s: float = 0.01) -> list[Outcome]:
    found = [Outcome("register", at / 5, 0.01, DONE) for at in range(int(5 * PARTS.stays))]
    found += [Outcome("query", at / 4, 0.01 if at < 240 else later_s, DONE) for at in range(int(4 * PARTS.end))]
    return [*found, Outcome("query", 100.0, 0.01, code)]


def broken(outcomes: list[Outcome], watch: Watch) -> list[str]:
    return report(outcomes, watch, [(0.0, 1_000_000), (PARTS.end, 2_000_000)], PARTS)["broken"]


def test_a_market_that_stays_as_it_is_breaks_nothing():
    result = report(called(), watched(), [(0.0, 1_000_000), (PARTS.end, 2_000_000)], PARTS)
    assert result["broken"] == []
    assert result["processes"]["market"]["kb_a_release"] == pytest.approx(2.0, abs=0.2)
    assert "query" in summary(result | {"market_cores": 0.1, "releases": {}, "minutes": 30})


@pytest.mark.parametrize(
    ("outcomes", "watch", "what"),
    [
        (called(code="quota"), watched(), "query: errors"),
        (called(later_s=0.03), watched(), "query: p99"),
        (called(), watched(leak=3.0), "market: MB an hour"),
        (called(), watched(a_release_kb=100.0), "market: kB a release"),
        (called(), watched(descriptors=20), "market: descriptors"),
    ],
)
def test_each_thing_that_grows_breaks_its_own_bound(outcomes, watch, what):
    (one,) = broken(outcomes, watch)
    assert one.startswith(what)


def test_a_part_of_a_run_is_what_was_seen_in_it():
    assert [one.at_s for one in between(watched().samples["market"], 5.0, 8.0)] == [5, 6, 7]


# Real markets -----------------------------------------------------------------------------------------------------------------

EAGER = RATES | {"query": 8.0}


@pytest.mark.slow
@pytest.mark.alone
def test_a_minute_of_everything_leaves_no_error_and_no_growth_that_a_minute_can_show(tmp_path):
    """p99 is judged by the long run: the first seconds of a short one say little about the machine's worst ones."""
    result = load(tmp_path, 0.75, RATES, 1_000)
    print(summary(result))
    assert not [one for one in result["broken"] if "p99" not in one]
    assert set(result["processes"]) >= {"market", "page"}
    assert result["releases"]["registered"] >= 40


@pytest.mark.slow
@pytest.mark.alone
def test_a_market_that_keeps_its_queries_is_found(tmp_path):
    """Control: 100 kB and a file of each query."""
    result = load(tmp_path, 0.3, EAGER, 200, LEAKING)
    print(summary(result))
    assert {"market: MB an hour, lower end of the interval"} <= set(result["broken"])
    assert any(one.startswith("market: descriptors") for one in result["broken"])


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_half_an_hour_of_everything_leaves_the_market_as_it_was(tmp_path):
    result = load(tmp_path, 30.0, RATES, 2_000)
    print(summary(result))
    assert result["broken"] == []
