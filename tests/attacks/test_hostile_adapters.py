"""T19: files that a stranger publishes as an adapter.  None is loaded, each is refused within a second and in bounded memory.

Each is read by a process that may do nothing else.  What a defect in that reader would cost is shown with readers that are broken: one
crashes, one never ends, one eats memory, one opens files and sockets.
"""

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load

from nodes.adapter import MAX_HEADER_BYTES, Adapter
from nodes.market_client import MarketClient
from protocol import adapter_check
from protocol.adapter_check import Checker, Manifest, check_adapter
from protocol.errors import InvalidAdapter
from protocol.release import AdapterReference
from tests.market_node.market import running_market
from tests.nodes.test_adapter import BASE, GOOD, NAME, WAYS_TO_CHEAT, forge, joined
from tests.protocol.worlds import adapter_bytes, small_map

SECOND, MEMORY = 1.0, 512 << 20
# What the library of the format takes without a word, and what we refuse.
LOADED_BY_THE_LIBRARY = {
    "a weight that is not a number",
    "one tensor more",
    "another base model",
    "a huge rank",
    "layers moved down",
    "a guarantee that was never given",
    "one manifest field more",
    "no manifest",
}


def bomb(rows: int, columns: int) -> bytes:
    """Return a small file whose header speaks of a huge tensor."""
    entry = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * rows * columns]}
    return joined({NAME: entry, "__metadata__": json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])["__metadata__"]}, bytes(64))


MORE = {
    "a tensor of 16 GiB in 64 bytes": bomb(1 << 16, 1 << 16),
    "a shape beyond all integers": bomb(1 << 62, 1 << 62),
    "a shape below zero": bomb(-1, -16),
    "a number of a million digits": joined("[" + "9" * (MAX_HEADER_BYTES - 100) + "]", b""),
    "a header of blanks": joined(" " * (MAX_HEADER_BYTES + 8), b""),
    "a zip": b"PK\x03\x04" + GOOD,
}
FILES = {name: forge(change) for name, change in WAYS_TO_CHEAT.items()} | MORE


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_refused_within_a_second_and_in_bounded_memory(name):
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InvalidAdapter):
        Adapter.from_bytes(FILES[name], base_model=BASE)
    spent, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spent < SECOND
    assert peak < MEMORY


def test_the_library_alone_would_load_many_of_them():
    """The control: a build that leaves a stranger's file to the library of its format."""
    loaded = set()
    for name, data in FILES.items():
        try:
            load(data)
        except (SafetensorError, ValueError, KeyError, OverflowError, MemoryError):
            continue
        loaded.add(name)
    assert loaded >= LOADED_BY_THE_LIBRARY, LOADED_BY_THE_LIBRARY - loaded


class Payload:
    """What a pickle makes of itself when it is loaded."""

    def __init__(self, trace: str) -> None:
        self._trace = trace

    def __reduce__(self):
        return os.mkdir, (self._trace,)


def test_a_pickle_runs_nothing(tmp_path):
    trace = tmp_path / "executed"
    hostile = pickle.dumps({"weights": np.zeros(3), "more": Payload(str(trace))})
    with pytest.raises(InvalidAdapter):
        Adapter.from_bytes(hostile, base_model=BASE)
    assert not trace.exists()
    pickle.loads(hostile)  # the control: a build that unpickles
    assert trace.exists()


# The process that reads them -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checker():
    one = Checker()
    yield one
    one.close()


def checked(checker: Checker, data: bytes, base_model: str = BASE) -> Manifest:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        return checker.check(file.fileno(), base_model)


@pytest.mark.parametrize("name", FILES)
def test_the_process_refuses_every_file_for_the_reason_that_the_parser_has(checker, name):
    with pytest.raises(InvalidAdapter) as here:
        Adapter.from_bytes(FILES[name], base_model=BASE)
    process = checker._process
    with pytest.raises(InvalidAdapter) as there:
        checked(checker, FILES[name])
    assert str(there.value) == str(here.value)
    assert process is None or checker._process is process, "a file that is merely wrong costs no new process"


def test_the_process_lets_sound_ones_pass(checker):
    assert checked(checker, GOOD) == Manifest(BASE, "none")
    checked(checker, GOOD, adapter_check.ANY_BASE_MODEL)
    with pytest.raises(InvalidAdapter, match="another"):
        checked(checker, GOOD, "cd" * 32)
    for other in ("epsilon 8.0 at delta 1e-06, unit record", "non", ""):
        with pytest.raises(InvalidAdapter, match="guarantee: expected"):
            check_adapter(GOOD, BASE, other)
    largest = adapter_bytes(width=18_700, rank=64)
    assert adapter_check.MEMORY_BYTES > 6 * len(largest) > 6 * (63 << 20)
    checked(checker, largest, "ab" * 32)


# How a reader may be broken; every one begins with a file that it lets pass, so that the break is in the middle of a market's life.
BROKEN = {
    "crashes": "import ctypes\nctypes.string_at(0)",
    "never ends": "while True: pass",
    "eats memory": "kept = []\nwhile True: kept.append(bytearray(1 << 24))",
    "ends without a word": "os._exit(0)",
    "raises": "raise LookupError('record text')",
    "kills who waits for it": "os.kill(os.getppid(), 9)\ntime.sleep(600)",
}
READER = """
import os, time
from protocol import adapter_check
sound = adapter_check.judge
def judge(file, base_model):
    if os.fstat(file).st_size != {size}:
        return sound(file, base_model)
{body}
adapter_check.judge = judge
adapter_check.CPU_S = 1
"""
HOSTILE = adapter_bytes(alpha=2, width=40)  # a sound one, so that nothing but the break refuses it


def broken(body: str) -> str:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return READER.format(size=len(HOSTILE), body=indented)


def reference(data: bytes) -> AdapterReference:
    return AdapterReference(hashlib.sha256(data).digest(), len(data))


@pytest.mark.parametrize("how", BROKEN)
def test_a_reader_that_breaks_is_a_refusal_and_the_market_goes_on(tmp_path, monkeypatch, how):
    monkeypatch.setattr(adapter_check, "COMMAND", (sys.executable, "-c", broken(BROKEN[how]) + "adapter_check.main()"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with running_market(tmp_path / "m", small_map()) as (address, ca, store), MarketClient(address, ca, tmp_path / "home") as client:
        for alpha in (1, 3):  # the second needs a new process, where the hostile one took the first with it
            client.upload_adapter(reference(good := adapter_bytes(alpha)), good)
            with pytest.raises(InvalidAdapter, match="check"):
                client.upload_adapter(reference(HOSTILE), HOSTILE)
            assert client.describe().head.size == 0
            assert client.download_adapter(reference(good)) == good
        assert {path.name for path in store._adapters.iterdir()} == {reference(adapter_bytes(alpha)).digest.hex() for alpha in (1, 3)}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: not here


@pytest.mark.parametrize(("how", "killed_by"), [("crashes", signal.SIGSEGV), ("never ends", signal.SIGXCPU)])
def test_without_a_process_of_its_own_a_broken_reader_takes_the_market_down(tmp_path, how, killed_by):
    """Control: a market that reads what it is sent itself."""
    program = (
        broken(BROKEN[how])
        + f"""
import resource
from pathlib import Path
from nodes.market_client import MarketClient
from tests.attacks.test_hostile_adapters import HOSTILE, reference
from tests.market_node.market import TakesAnything, running_market
from tests.protocol.worlds import adapter_bytes, small_map

class ReadsItself(TakesAnything):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._checkers.check = lambda file: adapter_check.judge(file, adapter_check.ANY_BASE_MODEL)

home = Path({str(tmp_path)!r})
with running_market(home / "m", small_map(), service_type=ReadsItself) as (address, ca, _), MarketClient(address, ca, home) as client:
    good = adapter_bytes()
    client.upload_adapter(reference(good), good)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 2,) * 2)  # so that what never ends shows within a test
    client.upload_adapter(reference(HOSTILE), HOSTILE)
"""
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300, check=False)
    assert -ended.returncode in (killed_by, signal.SIGKILL if killed_by == signal.SIGXCPU else killed_by), ended.stderr[-2000:]


REACHES_OUT = """
import socket
tried = {"a file": lambda: open("/etc/hostname"), "a socket": socket.socket, "a pipe": os.pipe}
done = []
for name, what in tried.items():
    try: done.append((name, what()))
    except OSError: pass
raise adapter_check.InvalidAdapter("check: reached " + (", ".join(name for name, _ in done) or "nothing"))
"""


def reached(monkeypatch, program: str) -> str:
    monkeypatch.setattr(adapter_check, "COMMAND", (sys.executable, "-c", program + "adapter_check.main()"))
    with pytest.raises(InvalidAdapter) as told:
        check_adapter(HOSTILE, "ab" * 32, "none")
    return str(told.value)


def test_a_reader_reaches_nothing_but_its_file(monkeypatch):
    told_as_a_refusal = broken(REACHES_OUT)
    assert reached(monkeypatch, told_as_a_refusal) == "check: reached nothing"
    unconfined = told_as_a_refusal + "adapter_check.confine = lambda: None\n"  # the control
    assert reached(monkeypatch, unconfined) == "check: reached a file, a socket, a pipe"
