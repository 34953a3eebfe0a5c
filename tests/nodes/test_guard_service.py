"""The guard as a process: what callers on its socket can and cannot make it do, and what survives its death."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta

import pytest

from market_node.cohort import convene
from nodes.base_model import BaseModel
from nodes.guard import Order, reach
from nodes.guard_service import OPTIONS, Desk, SocketGuard, _fields, order_from_wire, order_of, serving
from nodes.journal import Journal, read
from nodes.ledger import Budget, Ledger, in_use
from nodes.policy import Schedule, Service
from protocol.cohort_round import Ask, Cohort, Step
from protocol.errors import FormatError, GuardUnreachable, UsageError
from protocol.keys import signing_key
from protocol.privacy import Guarantee
from protocol.release import open_envelope
from protocol.wire import guard_pb2 as pb
from protocol.wire.guard_pb2_grpc import GuardStub
from tests.nodes.guard_processes import events, gone, guard_process, journal_of, run, wait_for, worker_of, write_policy
from tests.nodes.owners import MARKER, tiny_map, write_records
from tests.protocol.cohorts import cohort_of, owners

ONE = Order(Guarantee(1.0, 1e-6))


def ledger_of(home):
    return Ledger.open(home / "node" / "ledger.db", Budget(4.0, 1e-6))


def send(address, name, message):
    import grpc

    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        return getattr(GuardStub(channel), name)(message, timeout=20)


@pytest.fixture
def data(tmp_path):
    return write_records(tmp_path / "notes.jsonl")


# A real process -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_orders_cause_one_release_within_the_policy_and_a_journal_tells_them_all(tmp_path, data, tiny_model_directory):
    home = tmp_path / "home"
    policy = write_policy(tmp_path / "policy.toml", rate=30)
    with guard_process(home, data, tiny_model_directory, policy) as (guard, ready, process):
        address = f"unix:{ready['socket']}"
        assert os.stat(ready["socket"]).st_mode & 0o777 == 0o660
        assert guard.collect() is None
        for epsilon in ("nan", "-1", "1e400", "", "x" * 9000, "1.0 "):  # no orders: acknowledged like any other
            assert send(address, "Request", pb.Order(epsilon=epsilon, delta="1e-06")) == pb.Acknowledged()
        assert send(address, "Request", pb.Order(epsilon="1.0", delta="1e-06", map_id=b"short")) == pb.Acknowledged()
        assert send(address, "Request", pb.Order(epsilon="1.0", delta="1e-06", map_id=bytes(32))) == pb.Acknowledged()
        for number in range(100):
            reach(address).request(Order(Guarantee(1.0 + number / 1000, 1e-6)))
        envelope = wait_for(guard.collect)
        wait_for(lambda: events(home).count("released") >= 10)
        assert len(ledger_of(home).entries()) == 1
        assert open_envelope(envelope).specification.guarantee.epsilon < 1.5
        busy = run(home, data, tiny_model_directory, policy)
        assert (busy.returncode, "another guard" in busy.stdout) == (2, True)
        with pytest.raises(UsageError, match="a guard is using this ledger"), in_use(home / "node", alone=True):
            pass
    told = [entry["event"] for entry in journal_of(home)]
    assert (told.count("malformed"), told.count("limited")) == (7, 1)
    assert 23 <= told.count("asked") <= 24  # thirty an hour, and what an hour's rate gives back meanwhile
    assert MARKER not in (home / "node" / "journal.jsonl").read_text() + (tmp_path / "home.log").read_text()
    assert gone(process.pid)


PAUSES = """
import os, sys, time
from pathlib import Path
from nodes import guard as guards
from nodes.command import main
kept, moment = guards.sign_release, {moment!r}
flag = Path({flag!r})
def charge(self, *args, **how):
    if moment == "before":
        flag.touch(); time.sleep(60)
    envelope = real(self, *args, **how)
    if moment == "after":
        flag.touch(); time.sleep(60)
    return envelope
def signed(release, key):
    if moment == "within":
        flag.touch(); time.sleep(60)
    return kept(release, key)
real = guards.Ledger.charge
guards.Ledger.charge, guards.sign_release = charge, signed
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "within", "after"])
def test_a_guard_killed_around_the_charge_neither_loses_an_order_nor_charges_twice(tmp_path, data, tiny_model_directory, moment):
    home, policy, flag = tmp_path / "home", write_policy(tmp_path / "policy.toml"), tmp_path / "flag"
    with guard_process(home, data, tiny_model_directory, policy, PAUSES.format(moment=moment, flag=str(flag))) as (guard, _, process):
        guard.request(ONE)
        wait_for(flag.exists)
        worker = worker_of(process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for(lambda: gone(worker))  # it does not outlive the one that answers
    drawn = [entry.envelope for entry in ledger_of(home).entries()]
    assert len(drawn) == (1 if moment == "after" else 0)
    with guard_process(home, data, tiny_model_directory, policy) as (guard, _, _):
        envelope = wait_for(guard.collect)
        wait_for(lambda: "released" in events(home))
    assert [entry.envelope for entry in ledger_of(home).entries()] == [envelope]
    assert drawn in ([], [envelope])


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_guard_with_an_error_and_the_order_is_served_after_the_next_start(tmp_path, data, tiny_model_directory):
    home, policy, flag = tmp_path / "home", write_policy(tmp_path / "policy.toml"), tmp_path / "flag"
    with guard_process(home, data, tiny_model_directory, policy, PAUSES.format(moment="before", flag=str(flag))) as (guard, _, process):
        guard.request(ONE)
        wait_for(flag.exists)
        os.kill(worker_of(process), signal.SIGKILL)
        assert process.wait(20) == 1
        with pytest.raises(GuardUnreachable):
            guard.collect()
    with guard_process(home, data, tiny_model_directory, policy) as (guard, _, _):
        assert wait_for(guard.collect)


# The desk, in this process ----------------------------------------------------------------------------------------------


class FakeLedger:
    """Releases as a ledger would hold them."""

    def __init__(self):
        self.releases = []

    def released(self, release_id=None):
        there = [one for one in self.releases if release_id in (None, one[0])]
        return there[-1] if there else None


def make_desk(folder, ledger=None, service=None, **how):
    handed = []
    journal = Journal(folder / "journal.jsonl")
    desk = Desk(journal, service or Service(slot_s=60), (ledger or FakeLedger()).released, lambda n, o: handed.append((n, o)), **how)
    return desk, handed, journal


def test_a_release_shows_at_the_slot_and_not_before_and_a_start_in_between_changes_nothing(tmp_path):
    ledger = FakeLedger()
    desk, handed, journal = make_desk(tmp_path, ledger)
    desk.request(ONE)
    assert (handed[0][1], desk.status().waiting) == (ONE, 1)
    ledger.releases.append(("ab" * 32, b"envelope"))
    desk.outcome({"order": handed[0][0], "release": "ab" * 32, "code": ""})
    assert (desk.collect(), desk.status().waiting, desk.status().available) == (None, 1, False)  # served, and nobody can tell
    journal.close()
    desk, handed, journal = make_desk(tmp_path, ledger)
    desk.resume()
    assert (handed, desk.collect()) == ([], None)
    desk.slot()
    assert (desk.collect(), desk.status().waiting) == (b"envelope", 0)
    journal.close()
    desk, _, journal = make_desk(tmp_path, ledger)
    assert desk.collect() == b"envelope"
    journal.close()


@pytest.mark.parametrize("most", [None, 8.0, 0.5])
def test_an_order_is_the_same_on_the_wire_and_in_the_journal(tmp_path, most):
    journal, order = Journal(tmp_path / "journal.jsonl"), Order(Guarantee(1.0, 1e-6), bytes(range(32)), epsilon_adapter=most)
    wire = pb.Order(epsilon="1.0", delta="1e-06", map_id=order.map_id, epsilon_adapter="" if most is None else repr(most))
    assert order_from_wire(wire) == order
    assert order_of(journal.append("asked", **_fields(order))) == order
    for bad in ("nan", "0.0", "-1.0", "inf", "8", "none"):
        with pytest.raises(FormatError):
            order_from_wire(pb.Order(epsilon="1.0", delta="1e-06", epsilon_adapter=bad))


def step_of(step, **how):
    return Ask(step, cohort_of(owners(3), **how)).to_bytes()


def test_a_step_of_a_cohort_is_handed_over_once_and_masked_numbers_show_at_a_slot(tmp_path):
    futures = []

    def take_part(ask):
        futures.append(Future())
        return futures[-1]

    desk, _, journal = make_desk(tmp_path, take_part=take_part)
    assert [desk.take_part(step_of(Step.ADVERTISE)) for _ in range(3)] == [b""] * 3
    assert desk.take_part(step_of(Step.MASK)) == b""
    assert len(futures) == 2
    for future, answer in zip(futures, (b"keys", b"numbers"), strict=True):
        future.set_result([answer])
    # Keys take a time that tells nothing; how long the numbers take depends on how many records there are.
    assert desk.take_part(step_of(Step.ADVERTISE)) == b"keys"
    assert desk.take_part(step_of(Step.MASK)) == b""
    desk.slot()
    assert desk.take_part(step_of(Step.MASK)) == b"numbers"
    noted = [(entry.event, entry.fields.get("step")) for entry in read(tmp_path / "journal.jsonl")]
    assert noted == [("cohort", "advertise"), ("cohort", "mask")]
    journal.close()


def test_a_refused_step_looks_like_one_that_is_being_taken(tmp_path):
    refused, waits = Future(), Future()
    refused.set_result([b""])
    answers = iter([refused, waits])
    desk, _, journal = make_desk(tmp_path, take_part=lambda ask: next(answers))
    assert {desk.take_part(step_of(Step.ADVERTISE, round_id=bytes([n]) * 32)) for n in (1, 2) for _ in range(2)} == {b""}
    assert desk.take_part(b"no step") == b""
    assert [entry.event for entry in read(tmp_path / "journal.jsonl")] == ["cohort", "cohort", "malformed"]
    journal.close()
    (tmp_path / "none").mkdir()
    desk, _, journal = make_desk(tmp_path / "none")
    assert desk.take_part(step_of(Step.ADVERTISE)) == b""
    assert read(tmp_path / "none" / "journal.jsonl") == []
    journal.close()


def test_steps_of_cohorts_count_as_orders_do(tmp_path):
    asked = []
    desk, _, journal = make_desk(
        tmp_path, service=Service(orders_per_hour=5), take_part=lambda ask: asked.append(ask) or Future(), clock=lambda: 0.0
    )
    for number in range(9):
        assert desk.take_part(step_of(Step.ADVERTISE, round_id=bytes([number]) * 32)) == b""
    assert len(asked) == 5
    journal.close()


@pytest.mark.slow
def test_three_guards_as_processes_release_together_and_their_sockets_carry_no_number_of_theirs(tmp_path, tiny_model_directory):
    homes = [tmp_path / f"home-{number}" for number in range(3)]
    keys = [signing_key(home / "node" / "owner.key").public_key().public_bytes_raw() for home in homes]
    feature_map, guards, carried = tiny_map(BaseModel.open(tiny_model_directory)), {}, []
    with contextlib.ExitStack() as stack:
        for number, (home, own) in enumerate(zip(homes, keys, strict=True)):
            others = [key.hex() for key in keys if key != own]
            table = f'[cohort]\nname = "joint"\nmembers = {json.dumps(others)}\ncolluders = 0\n'
            policy = write_policy(tmp_path / f"policy-{number}.toml", more=table)
            records = write_records(tmp_path / f"notes-{number}.jsonl", 20, f"wool{number}")
            guards[own], _, _ = stack.enter_context(guard_process(home, records, tiny_model_directory, policy))

        def exchange(step, asks):
            answers = {member: wait_for(lambda member=member, ask=ask: guards[member].take_part(ask)) for member, ask in asks.items()}
            carried.extend([*asks.values(), *answers.values()])
            return answers

        cohort = Cohort(
            bytes(32), os.urandom(32), feature_map.map_id, bytes.fromhex(feature_map.base_model), feature_map.dimension,
            Guarantee(1.0, 1e-6), "joint", tuple(sorted(keys)), 0, 0,
        )  # fmt: skip
        release = open_envelope(convene(cohort, exchange))
    assert release.signers == tuple(sorted(keys))
    for home in homes:
        origins = [str(entry.origin) for entry in ledger_of(home).entries()]
        assert origins.count("cohort") == 1
        assert [entry["step"] for entry in journal_of(home) if entry["event"] == "cohort"][:6] == [str(step) for step in list(Step)[:6]]
    assert not any(MARKER.encode() in message for message in carried)
    assert MARKER not in "".join((tmp_path / f"{home.name}.log").read_text() for home in homes)


def test_a_refused_order_looks_like_one_that_is_being_served(tmp_path):
    answers = []
    for code in ("", "records"):
        (tmp_path / f"of{code}").mkdir()
        desk, handed, journal = make_desk(tmp_path / f"of{code}")
        desk.request(ONE)
        if code:
            desk.outcome({"order": handed[0][0], "release": "", "code": code})
        answers.append((desk.collect(), desk.status()))
        journal.close()
    assert answers[0] == answers[1]


def test_an_accepted_order_without_an_outcome_is_served_after_a_start(tmp_path):
    desk, handed, journal = make_desk(tmp_path)
    desk.request(ONE)
    journal.close()
    again, served, journal = make_desk(tmp_path)
    again.resume()
    assert served == handed
    journal.close()


def test_orders_beyond_the_rate_are_dropped_and_the_rate_comes_back_with_time(tmp_path):
    clock = [0.0]
    desk, handed, journal = make_desk(tmp_path, service=Service(60, orders_per_hour=3), clock=lambda: clock[0])
    for _ in range(100):
        desk.request(ONE)
    assert (len(handed), len(read(tmp_path / "journal.jsonl"))) == (3, 4)  # and one line that says so
    clock[0] += 1200
    desk.request(ONE)
    assert len(handed) == 4
    journal.close()


def orders_of_starts(folder, starts: int, orders: int, hours=lambda start: 0.0) -> list[int]:
    """Return how many orders each of so many guards, one after the other, took of a flood; `hours`: by how much its clock is off."""
    from datetime import UTC, datetime, timedelta

    taken = []
    for start in range(starts):
        now = datetime.now(UTC) + timedelta(hours=hours(start))
        desk, handed, journal = make_desk(folder, service=Service(60, orders_per_hour=5), clock=lambda: 0.0, now=lambda now=now: now)
        for _ in range(orders):
            desk.request(ONE)
        desk.malformed()
        taken.append(len(handed))
        journal.close()
    return taken


def test_a_start_gives_nobody_more_orders_and_writes_no_more_lines_about_it(tmp_path):
    assert orders_of_starts(tmp_path, 8, 4)[1:] == [0] * 7  # four orders and one that was none
    told = [entry.event for entry in read(tmp_path / "journal.jsonl")]
    assert (told.count("asked"), told.count("malformed"), told.count("limited")) == (4, 1, 1)


def test_an_hour_later_a_start_finds_the_whole_rate_and_a_clock_that_was_ahead_does_not_keep_it(tmp_path):
    assert orders_of_starts(tmp_path, 2, 9, hours=lambda start: 1.01 * start) == [5, 5]
    assert orders_of_starts(tmp_path / "behind", 3, 9, hours=lambda start: (0, -24, 1.01)[start]) == [5, 0, 5]


def test_a_guard_that_begins_with_a_full_rate_is_caught_by_that_test(tmp_path, monkeypatch):
    """Control."""
    from nodes import guard_service

    monkeypatch.setattr(guard_service, "_rate_left", lambda found, orders_per_hour, now: (float(orders_per_hour), float("inf")))
    assert orders_of_starts(tmp_path, 8, 4) == [4] * 8


def test_a_schedule_makes_one_order_an_occasion_and_a_clock_ten_years_off_makes_one_at_most(tmp_path):
    from datetime import UTC, datetime, timedelta

    now = [datetime(2027, 1, 31, 12, tzinfo=UTC)]
    schedule = Schedule(datetime(2027, 1, 1, tzinfo=UTC), timedelta(days=30), 0.5)
    desk, handed, journal = make_desk(tmp_path, schedule=schedule, now=lambda: now[0])
    for days in (0, 1, 3650, -3650, 0, 1):
        now[0] = datetime(2027, 1, 31, 12, tzinfo=UTC) + timedelta(days=days)
        desk.slot()
    assert [order.occasion for _, order in handed] == [2, 123]
    journal.close()
    desk, handed, journal = make_desk(tmp_path, schedule=schedule, now=lambda: now[0])
    desk.slot()
    assert handed == []
    journal.close()


def test_an_occasion_is_ordered_once_though_clock_and_worker_come_to_a_slot_at_the_same_time(tmp_path):
    met = threading.Barrier(2, timeout=0.5)

    class Meeting(FakeLedger):
        def released(self, release_id=None):
            with contextlib.suppress(threading.BrokenBarrierError):
                met.wait()
            return super().released(release_id)

    schedule = Schedule(datetime(2026, 1, 1, tzinfo=UTC), timedelta(days=30), 0.5)
    desk, handed, _ = make_desk(tmp_path, Meeting(), Service(slot_s=0), schedule=schedule)
    threads = [threading.Thread(target=desk.slot) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(handed) == 1


def test_a_full_disk_refuses_the_order_and_the_caller_learns_no_reason(tmp_path, monkeypatch):
    import grpc

    desk, handed, journal = make_desk(tmp_path)
    with serving(desk, tmp_path / "door" / "socket", Service(60)):
        address = f"unix:{tmp_path}/door/socket"
        send(address, "Request", pb.Order(epsilon="1.0", delta="1e-06"))

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("nodes.journal.os.pwrite", full)
            with pytest.raises(grpc.RpcError) as refused:
                send(address, "Request", pb.Order(epsilon="1.0", delta="1e-06"))
        assert (refused.value.code(), refused.value.details()) == (
            grpc.StatusCode.UNAVAILABLE,
            "guard failed; details are in the node's own log",
        )
        send(address, "Request", pb.Order(epsilon="1.0", delta="1e-06"))
    assert [number for number, _ in handed] == [1, 2]
    assert [entry.number for entry in read(tmp_path / "journal.jsonl")] == [1, 2]
    journal.close()


AS_NOBODY = """
import os, sys
import grpc
from nodes.guard_service import SocketGuard
from protocol.errors import GuardUnreachable
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
try:
    print(SocketGuard(sys.argv[1]).collect())
except GuardUnreachable:
    print("turned away")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("uids", "group", "answer"), [([], None, "turned away"), ([65534], None, "None"), ([], 65534, "None")], ids=["others", "user", "group"]
)
def test_a_user_whom_the_policy_does_not_name_is_turned_away_whatever_the_sockets_mode(uids, group, answer):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        folder.chmod(0o755)
        service = Service(60, uids=frozenset(uids))
        desk, _, journal = make_desk(folder, service=service)
        with serving(desk, folder / "socket", service, group):
            (folder / "socket").chmod(0o666)
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, f"unix:{folder}/socket"], capture_output=True, text=True, timeout=60, check=False
            )
        journal.close()
    assert done.stdout.strip() == answer, done.stderr


def test_who_is_turned_away_again_and_again_fills_no_log(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("nodes.guard_service.peer_of", lambda connection: (1, 12345, 12345))
    desk, _, journal = make_desk(tmp_path)
    with caplog.at_level("WARNING"), serving(desk, tmp_path / "socket", Service(60)):
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as caller:
                caller.settimeout(10)
                caller.connect(str(tmp_path / "socket"))
                assert caller.recv(1) == b""
    assert sum("turned away" in record.getMessage() for record in caplog.records) == 1
    journal.close()


def test_a_place_that_is_not_safe_for_a_socket_is_refused(tmp_path):
    desk, _, journal = make_desk(tmp_path)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()
    for path, reason in {
        tmp_path / "open" / "socket": "anyone may write",
        tmp_path / "file": "something else",
        tmp_path / ("x" * 120): "at most",
    }.items():
        with pytest.raises(UsageError, match=reason), serving(desk, path, Service()):
            pass
    with serving(desk, tmp_path / "socket", Service()), pytest.raises(UsageError, match="another guard"):
        with serving(desk, tmp_path / "socket", Service()):
            pass
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with serving(desk, tmp_path / "stale", Service()):  # what a killed guard left is no obstacle
        assert SocketGuard(f"unix:{tmp_path}/stale").collect() is None
    journal.close()


def test_a_guard_that_is_down_is_one_error_and_the_shim_tells_no_more(tmp_path):
    from flwr.app import ConfigRecord, Message, RecordDict

    from nodes.flower import client
    from nodes.grid import InProcessGrid

    with pytest.raises(GuardUnreachable):
        reach(f"unix:{tmp_path}/nowhere").collect()
    grid = InProcessGrid(client, [{"guard": f"unix:{tmp_path}/nowhere"}])
    try:
        request = RecordDict({"request": ConfigRecord({"epsilon": "1.0", "delta": "1e-06"})})
        messages = [Message(request, dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
        (reply,) = grid.send_and_receive(messages, timeout=20)
    finally:
        grid.close()
    assert reply.has_error()
    assert reply.error.reason == "node failed; details are in the node's own log"


def test_an_idle_or_broken_caller_does_not_keep_others_waiting(tmp_path):
    desk, _, journal = make_desk(tmp_path)
    with serving(desk, tmp_path / "socket", Service()):
        silent = [socket.socket(socket.AF_UNIX) for _ in range(8)]
        for number, one in enumerate(silent):
            one.connect(str(tmp_path / "socket"))
            if number % 2:
                one.sendall(b"\xff" * 1000)  # not HTTP/2
        began = time.monotonic()
        assert SocketGuard(f"unix:{tmp_path}/socket").collect() is None
        assert time.monotonic() - began < 5
        for one in silent:
            one.close()
    journal.close()


def test_a_scheduled_release_is_drawn_though_nothing_changed_and_once_an_occasion(tmp_path, data, tiny_model_directory):
    from tests.nodes.owners import make_guard

    guard = make_guard(tmp_path / "home", data, BaseModel.open(tiny_model_directory))
    guard.release(ONE)
    for occasion in (1, 1, 2):
        guard.request(Order(Guarantee(0.5, 1e-6), occasion=occasion))
    guard.work()
    assert guard.failures == []
    assert open_envelope(guard.collect()).release_number == 3


def test_an_occasion_whose_order_comes_again_is_not_drawn_again_though_the_data_changed_in_between(tmp_path, data, tiny_model_directory):
    """As after a crash between the charge and the journal's line on it."""
    from tests.nodes.owners import make_guard

    model, order = BaseModel.open(tiny_model_directory), Order(Guarantee(0.5, 1e-6), occasion=1)
    first = make_guard(tmp_path / "home", data, model).release(order)
    write_records(data, count=50)
    guard = make_guard(tmp_path / "home", data, model)
    assert guard.release(order) == first
    assert guard.release(Order(Guarantee(0.5, 1e-6), occasion=2)) != first
    assert open_envelope(guard.collect()).release_number == 2


def test_what_the_journal_prints_is_one_json_object(tmp_path):
    from typer.testing import CliRunner

    from nodes.command import build

    (tmp_path / "node").mkdir()
    journal = Journal(tmp_path / "node" / "journal.jsonl")
    head = journal.append("asked", epsilon="1.0").hash.hex()
    journal.close()
    run_it = CliRunner()
    told = json.loads(run_it.invoke(build(), ["node", "log", "--home", str(tmp_path), "--json", "--contains", head]).stdout)
    assert (told["schema"], told["head"], told["chain"]) == ("veilmart.journal/1", head, "verified")
