"""Programs that are watched: started again when they end, told a secret over a pipe, gone when we are."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from protocol import processes
from protocol.errors import UsageError, VeilmartError
from protocol.processes import SECRET, Program, Supervisor, flower_program, last_words, shorten, start, wait_for_port

KEPT = b"a secret of 32 bytes, or nearly.."


def python(text: str, log: Path, *words: str, secret: bytes = b"") -> Program:
    return Program("python", (sys.executable, "-c", text, *words), dict(os.environ), log, secret)


def wait_for(what) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_program_that_ends_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.05)
    program = python("import time; print('here', flush=True); time.sleep(600)", tmp_path / "log")
    with Supervisor([program]) as supervisor:
        wait_for(lambda: supervisor.pids() and "here" in program.log.read_text())
        first = supervisor.pids()["python"]
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: supervisor.pids().get("python", first) != first)
        second = supervisor.pids()["python"]
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)
    assert supervisor.ended == {"python": -signal.SIGKILL}


def test_what_a_running_program_prints_without_end_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES", 1 << 16)
    program = python("while True: print('x' * 99, flush=True)", tmp_path / "a.log")
    with Supervisor([program]):
        wait_for(lambda: (tmp_path / "a.old").exists())
        time.sleep(2 * processes.POLL_S)
    assert (tmp_path / "a.old").stat().st_size == 1 << 16
    size = program.log.stat().st_size
    shorten(program.log)
    assert program.log.stat().st_size == (0 if size > 1 << 16 else size)


def test_a_program_that_cannot_be_started_is_tried_again_and_keeps_no_other_from_running(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "FIRST_PAUSE_S", 0.05)
    here = python("import time; print('here', flush=True); time.sleep(600)", tmp_path / "log")
    missing = Program("missing", (str(tmp_path / "missing"),), {}, tmp_path / "missing.log")
    with Supervisor([missing, here]) as supervisor:
        wait_for(lambda: supervisor.pids() and "here" in here.log.read_text())
        (tmp_path / "missing").write_text("#!/bin/sh\nexec sleep 600\n")
        (tmp_path / "missing").chmod(0o700)
        wait_for(lambda: "missing" in supervisor.pids())


def test_a_secret_reaches_a_program_and_neither_its_arguments_nor_its_environment(tmp_path):
    text = "import sys; got = open(sys.argv[1], 'rb').read(); print(got.hex(), flush=True); sys.stdin.read(); import time; time.sleep(600)"
    program = python(text, tmp_path / "log", SECRET, secret=KEPT)
    process = start(program)
    try:
        wait_for(lambda: KEPT.hex() in program.log.read_text())
        for name in ("cmdline", "environ"):
            assert KEPT not in Path(f"/proc/{process.pid}/{name}").read_bytes()
        assert KEPT.decode() not in repr(program)
    finally:
        process.kill()
        process.wait()


def test_what_a_program_said_last_is_told_when_it_does_not_start(tmp_path):
    program = python("raise SystemExit('the disk is full')", tmp_path / "log")
    with Supervisor([program]) as supervisor, pytest.raises(VeilmartError, match="the disk is full"):
        wait_for_port(supervisor, program, "127.0.0.1", 1, timeout_s=20)


def test_last_words_are_short_and_printable(tmp_path):
    (tmp_path / "log").write_bytes(b"x" * 10_000 + b"\n\x1b[31mred\x1b[0m\n" + b"y" * 900 + b"\n")
    words = last_words(tmp_path / "log")
    assert "\x1b" not in words
    assert len(words) < 700
    assert last_words(tmp_path / "nothing") == ""


def test_a_program_that_is_not_installed_is_named():
    with pytest.raises(UsageError, match="flower-nothing"):
        flower_program("flower-nothing")
