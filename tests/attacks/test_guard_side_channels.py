"""What a caller can learn from a guard's answers and their timing about the number of records, or about why nothing comes.

The test: two guards are told apart if their trimmed mean times differ by more than half of DIFFERENCE_S.  Calls are made until the
standard error of that difference is at most DIFFERENCE_S / 6.6; then guards that differ by DIFFERENCE_S are told apart with a power above
0.99 (z = 3.3 for half of it; 2.33 would do), and equal ones with a chance below 0.001 (two-sided).  Smaller differences may be there: a
caller on the same machine sees in other ways that it is busy (docs/sharp-edges.md).
"""

import sys
import time

import grpc
import numpy as np
import pytest

from nodes.base_model import BaseModel
from nodes.guard import Order
from nodes.guard_service import OPTIONS, Desk, serving
from nodes.journal import Journal
from nodes.policy import Service
from protocol.privacy import Guarantee
from protocol.wire import guard_pb2 as pb
from protocol.wire.guard_pb2_grpc import GuardStub
from tests.nodes.guard_processes import guard_process, write_policy
from tests.nodes.owners import make_guard, write_records

DIFFERENCE_S = 0.005
LEAST, MOST = 60, 1000  # calls
NEVER = 3e8  # seconds between slots: none comes while we look
FEW, MANY = 60, 2000
ONE = Order(Guarantee(1.0, 1e-6))


def seconds_of(address: str, name: str, message, count: int, answers: list) -> np.ndarray:
    """Return how long each of some calls took; their answers are appended."""
    taken = []
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        call = getattr(GuardStub(channel), name)
        call(message, timeout=60)  # connects
        for _ in range(count):
            began = time.perf_counter()
            answers.append(call(message, timeout=60))
            taken.append(time.perf_counter() - began)
    return np.array(taken)


def trimmed(seconds: np.ndarray) -> tuple[float, float]:
    """Return the mean without the tenth at each end, and its standard error (winsorised variance)."""
    ordered = np.sort(seconds)
    cut = len(ordered) // 10
    winsorised = np.clip(ordered, ordered[cut], ordered[-cut - 1])
    return float(ordered[cut:-cut].mean()), float(winsorised.std(ddof=1) / (0.8 * len(ordered) ** 0.5))


def precise(address: str, name: str, message, answers: list) -> tuple[float, float]:
    """Call until the mean is known well enough for the stated power, and return mean and standard error."""
    seconds = seconds_of(address, name, message, LEAST, answers)
    while trimmed(seconds)[1] > DIFFERENCE_S / 6.6 / 2**0.5:
        assert len(seconds) < MOST, "this machine is too busy for the stated power"
        seconds = np.concatenate([seconds, seconds_of(address, name, message, LEAST, answers)])
    return trimmed(seconds)


def told_apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    assert np.hypot(one[1], other[1]) <= DIFFERENCE_S / 6.6  # the stated power
    return abs(one[0] - other[0]) > DIFFERENCE_S / 2


def seen_by_a_caller(folder, records: int, least: int, model):
    """Return (times by call, set of answers) of a real guard that just got an order and works on it, or refused it."""
    folder.mkdir()
    data = write_records(folder / "notes.jsonl", records)
    policy = write_policy(folder / "policy.toml", least=least, slot=NEVER, rate=100_000)
    with guard_process(folder / "home", data, model, policy) as (guard, ready, _):
        guard.request(ONE)
        address, answers = f"unix:{ready['socket']}", []
        times = {
            "Collect": precise(address, "Collect", pb.CollectRequest(), answers),
            "Status": precise(address, "Status", pb.StatusRequest(), answers),
            "Request": precise(address, "Request", pb.Order(epsilon="1.0", delta="1e-06"), answers),
        }
    return times, {answer.SerializeToString() for answer in answers}


def indistinguishable(folder, model):
    cases = {"few": (FEW, 20), "many": (MANY, 20), "few, refused": (FEW, 9999), "many, refused": (MANY, 9999)}
    seen = {name: seen_by_a_caller(folder / name.replace(", ", "-"), *case, model) for name, case in cases.items()}
    times, answers = seen["few"]
    told({name: {call: f"{1e3 * mean:.2f}+-{1e3 * error:.2f} ms" for call, (mean, error) in of.items()} for name, (of, _) in seen.items()})
    for name, (other_times, other_answers) in seen.items():
        assert other_answers == answers, name
        for call, figure in other_times.items():
            assert not told_apart(times[call], figure), f"{call}, {name}: {figure} against {times[call]}"


@pytest.mark.slow
@pytest.mark.alone
def test_answers_do_not_tell_how_many_records_there_are_nor_whether_the_order_was_refused(tmp_path, tiny_model_directory):
    indistinguishable(tmp_path, tiny_model_directory)


def told(figures) -> None:
    """Show what was measured, with pytest -s."""
    sys.stderr.write(f"{figures}\n")


class Computing(Desk):
    """A broken guard: it looks at its data while the caller waits."""

    def __init__(self, guard, *arguments):
        super().__init__(*arguments)
        self._guard = guard

    def collect(self):
        self._guard.release(ONE)
        return None


class Counting(Desk):
    """A broken guard: what it answers depends on the number of records."""

    def __init__(self, guard, *arguments):
        super().__init__(*arguments)
        self._many = guard.plan(ONE).records > 1000

    def collect(self):
        time.sleep(0.005 if self._many else 0.0)
        return None


async def at_once(work):
    """Answer when the answer is there."""
    return await work


@pytest.mark.parametrize("broken", [Computing, Counting])
def test_a_guard_that_computes_or_counts_within_a_call_is_caught(tmp_path, tiny_model_directory, broken):
    """The control."""
    model, figures = BaseModel.open(tiny_model_directory), []
    for records in (FEW, MANY):
        folder = tmp_path / str(records)
        guard = make_guard(folder / "home", write_records(folder / "notes.jsonl", records), model, embed=quick)
        guard.release(ONE)
        journal = Journal(folder / "journal.jsonl")
        desk = broken(guard, journal, Service(NEVER), lambda release: None, lambda number, order: None)
        with serving(desk, folder / "socket", Service(NEVER), padded=at_once):
            # As few calls as a comparison makes at least: a guard that is broken this way is caught without more.
            figures.append(trimmed(seconds_of(f"unix:{folder}/socket", "Collect", pb.CollectRequest(), LEAST // 3, [])))
        journal.close()
    assert abs(figures[0][0] - figures[1][0]) > DIFFERENCE_S / 2


def quick(records, *, layer, kind, on_progress=None):
    """Return embeddings of nothing in particular: the control is about what a call does after the release."""
    return np.ones((len(records), 2, 32), np.float32)


@pytest.mark.slow
@pytest.mark.alone
def test_the_same_with_the_real_model_at_work(tmp_path, slm_directory):
    times = {}
    for records in (FEW, MANY):
        folder = tmp_path / str(records)
        folder.mkdir()
        data = write_records(folder / "notes.jsonl", records)
        policy = write_policy(folder / "policy.toml", slot=NEVER)
        with guard_process(folder / "home", data, slm_directory, policy, which_map="kme-lin-96") as (guard, ready, _):
            guard.request(ONE)
            answers = []
            times[records] = precise(f"unix:{ready['socket']}", "Collect", pb.CollectRequest(), answers)
            assert {answer.envelope for answer in answers} == {b""}
    told({records: f"{1e3 * mean:.2f}+-{1e3 * error:.2f} ms" for records, (mean, error) in times.items()})
    assert not told_apart(times[FEW], times[MANY])
