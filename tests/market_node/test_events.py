"""The market's log holds events of a fixed list and nothing else, whatever is logged, by whom, at which level."""

import ast
import json
import logging
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import grpc
import pytest

from market_node import events, service
from market_node.events import FORMS, LOGGER, Event, Incident, Lines, Published, TileNotWritten, kind_of, tell, where
from protocol.channel import connect
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.market_node.market import running_market
from tests.protocol.worlds import small_map

ROOT = Path(__file__).parents[2]
SECRET = "PRIVATE-5519"
EVENTS = [kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event]
# What the market's process runs; the ServerApp of a campaign (flower.py, cohort.py), in a process of Flower's, logs on a logger of its own.
SERVED = sorted(path for path in (ROOT / "market_node").glob("*.py") if path.name not in ("events.py", "flower.py", "cohort.py"))


def line_of(record: logging.LogRecord) -> dict:
    line = Lines().format(record)
    assert SECRET not in line
    return json.loads(line)


def record(message: object, *args: object, name: str = "library", error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.ERROR, "x.py", 1, message, args, info)


def test_an_event_is_one_line_of_its_fields():
    line = line_of(record(Published("ab" * 8, 3, 912)))
    assert {name: line[name] for name in line if name != "time"} == {
        "event": "Published", "release": "ab" * 8, "position": 3, "size_bytes": 912,
    }  # fmt: skip


@pytest.mark.parametrize("kind", EVENTS)
def test_every_field_is_a_number_or_has_a_form(kind):
    assert is_dataclass(kind)
    assert all(field.type == "int" or field.name in FORMS for field in fields(kind))


@pytest.mark.parametrize("value", [SECRET, "ab" * 32, "AB", b"ab", None, 1.5, "", "ab\n"])
def test_a_text_of_another_form_is_no_event_and_the_refusal_does_not_say_it(value):
    with pytest.raises(TypeError) as caught:
        Published(value, 1, 1)
    assert SECRET not in str(caught.value)


def test_what_others_log_keeps_place_and_class_but_no_words():
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        line = line_of(record("%s failed", SECRET, name="grpc.aio", error=error))
    assert (line["event"], line["logger"], line["level"], line["kind"]) == ("Other", "grpc.aio", "ERROR", "ValueError")
    assert line["where"].startswith("test_events.py:")
    assert line_of(record(SECRET, name=SECRET + "!"))["logger"] == "other"
    assert line_of(record(Published("ab", 1, 1), SECRET))["event"] == "Other", "an event with arguments is none"
    odd = type("X" + "y" * 100, (Exception,), {})
    assert kind_of(odd()) == "other"


def test_a_usual_formatter_would_have_written_it():
    """Control."""
    assert SECRET in logging.Formatter().format(record("%s failed", SECRET))


def test_a_process_that_crashes_writes_no_message(tmp_path):
    program = f"""
import logging, sys, threading, warnings
from market_node.events import write_events
write_events(sys.stderr, logging.DEBUG)
def fail(): raise RuntimeError({SECRET!r})
class Left:
    def __del__(self): fail()
logging.getLogger("grpc").debug({SECRET!r})
warnings.warn({SECRET!r})
thread = threading.Thread(target=fail); thread.start(); thread.join()
Left()
fail()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert SECRET not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["Other", "Other", "Crashed", "Crashed", "Crashed"]
    assert all(line["kind"] == "RuntimeError" and line["where"] for line in lines[2:])


@pytest.mark.parametrize("said_by_default", [False, True])
def test_a_log_that_cannot_be_written_writes_nothing_else(said_by_default):
    """logging tells of a handler that fails on standard error, with all exceptions that were under way (the control)."""
    program = f"""
import io, logging
from market_node.events import Incident, tell, write_events
closed = io.StringIO()
closed.close()
write_events(closed)
logging.raiseExceptions |= {said_by_default}
try:
    raise RuntimeError({SECRET!r})
except RuntimeError:
    tell(Incident("0a", "RuntimeError", ""))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert (SECRET in done.stderr) is said_by_default
    assert said_by_default or not done.stderr


def logging_calls(source: str) -> list[int]:
    """Return the lines on which something is logged, printed or warned of otherwise than by `tell`."""
    names = {"debug", "info", "warning", "error", "exception", "critical", "log", "warn", "print_exc", "print"}
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in names]


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.name)
def test_the_source_logs_by_events_alone(path):
    calls = [call for call in logging_calls(path.read_text()) if ".log()" not in path.read_text().splitlines()[call - 1]]
    assert not calls, f"{path.name}: lines {calls}"  # Store.log() is the log of releases


def test_a_source_that_logs_otherwise_is_caught():
    """Control."""
    assert logging_calls("log.info('query %s', query)\nprint(query)\nwarnings.warn(query)") == [1, 2, 3]


def test_a_market_that_logs_a_request_fails_in_every_test(tmp_path):
    """Control: the filter of all tests raises where it is logged, so that the call ends in an incident."""

    class Talkative(service.MarketService):
        async def GetRelease(self, request, context):
            LOGGER.debug("asked for %s", request.release_id)

    LOGGER.setLevel(logging.DEBUG)
    try:
        with running_market(tmp_path, small_map(), service_type=Talkative) as (address, ca, _):
            channel = connect(address, ca)
            with pytest.raises(grpc.RpcError) as caught:
                MarketStub(channel).GetRelease(pb.ReleaseRequest(release_id=bytes(32)), timeout=10)
            channel.close()
    finally:
        LOGGER.setLevel(logging.NOTSET)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


def test_tell_writes_at_the_level_of_the_event(caplog):
    caplog.set_level(logging.INFO)
    tell(TileNotWritten(28))
    assert [(entry.levelname, str(entry.msg)) for entry in caplog.records] == [("ERROR", "TileNotWritten errno=28")]
    assert str(Incident("ab", "KeyError", where(None))) == "Incident incident=ab kind=KeyError where="
