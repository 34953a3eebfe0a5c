"""Programs of others that a command of ours starts, watches and stops: Flower's long-running processes.

A program that ends is started again, later each time.  Its output goes to a file.  A secret reaches it over a pipe, never by its
arguments or environment, where every user of the machine or every grandchild could read it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from protocol.errors import UsageError, VeilmartError

log = logging.getLogger("veilmart.processes")

SECRET = "{secret}"  # in a command: where the name of the pipe with the secret goes
POLL_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
STEADY_S = 60.0  # a program that ran so long starts again at once
GRACE_S = 10.0
LOG_BYTES = 10 << 20

# No process that we start reaches any host but the configured one, and none installs anything at run time.
QUIET_FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",  # the default of 1 s is most of what a message costs
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes with their state in a folder of ours, and their programs beside this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET_FLOWER, "FLWR_HOME": str(home), "PATH": path}


def flower_program(name: str) -> str:
    """Return where one of Flower's programs lies; raise UsageError if it is not installed beside this Python."""
    program = Path(sys.executable).parent / name
    if not program.exists():
        raise UsageError(f"{name}: not installed beside this Python", hint="`pip install veilmart` brings it")
    return str(program)


def dies_with_us() -> tuple[str, ...]:
    """Return the words before a command that end it when this process is killed, where the machine knows how."""
    setpriv = shutil.which("setpriv")
    return (setpriv, "--pdeathsig", "TERM", "--") if setpriv else ()


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, and where its output goes."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    log: Path
    secret: bytes = field(default=b"", repr=False)


def start(program: Program) -> subprocess.Popen[bytes]:
    """Start a program; a secret waits for it in a pipe that is named where its command says `{secret}`."""
    program.log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, program.secret)  # a pipe holds 64 KiB, so nothing waits here
    finally:
        os.close(write_end)
    try:
        words = [word.replace(SECRET, f"/dev/fd/{read_end}") for word in program.command]
        with program.log.open("ab") as out:
            return subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=dict(program.environment), pass_fds=(read_end,)
            )
    finally:
        os.close(read_end)


def shorten(log_file: Path) -> None:
    """Move what a program said so far aside, once it is much: programs run for months, and a stranger's code may print without end.

    The program goes on writing to the same file, at its end, wherever that is.
    """
    with contextlib.suppress(OSError):
        if log_file.stat().st_size > LOG_BYTES:
            with log_file.open("rb") as file:
                file.seek(-LOG_BYTES, os.SEEK_END)
                log_file.with_suffix(".old").write_bytes(file.read(LOG_BYTES))
            os.truncate(log_file, 0)


def _log_end(program: str, code: int, again_in_s: float) -> None:
    log.warning("ended program=%s code=%s again_in_s=%.0f", program, code, again_in_s)


class Supervisor:
    """Keeps programs running from `start` to `stop`.

    on_end: gets the name of a program that ended, its exit code, and in how many seconds it is tried again.
    """

    def __init__(self, programs: Sequence[Program], on_end: Callable[[str, int, float], None] = _log_end) -> None:
        self._programs = programs
        self._on_end = on_end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.ended: dict[str, int] = {}  # exit code of the latest end of each program that ended

    def __enter__(self) -> Supervisor:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def pids(self) -> dict[str, int]:
        """Return the process ids of what runs now."""
        return {name: process.pid for name, process in list(self._running.items()) if process.poll() is None}

    def stop(self) -> None:
        """Stop everything, the last started first."""
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        # Everything is started by this one thread: the signal that a child gets with its parent's death means the thread.
        due = {program.name: (0.0, FIRST_PAUSE_S) for program in self._programs}
        since: dict[str, float] = {}
        while not self._stopping.is_set():
            for program in self._programs:
                shorten(program.log)
                process, now = self._running.get(program.name), time.monotonic()
                if process is not None and (code := process.poll()) is not None:
                    del self._running[program.name]
                    self.ended[program.name] = code
                    pause = FIRST_PAUSE_S if now - since[program.name] > STEADY_S else due[program.name][1]
                    due[program.name] = (now + pause, min(2 * pause, LONGEST_PAUSE_S))
                    self._on_end(program.name, code, pause)
                if program.name not in self._running and now >= due[program.name][0]:
                    try:
                        self._running[program.name] = start(program)
                        since[program.name] = now
                    except OSError as error:  # a full disk, or no process left: others go on, and this one is tried again
                        log.error("not started program=%s error=%s", program.name, error.strerror)
                        due[program.name] = (now + due[program.name][1], min(2 * due[program.name][1], LONGEST_PAUSE_S))
            self._stopping.wait(POLL_S)
        for program in reversed(self._programs):
            if (process := self._running.get(program.name)) is not None:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill it if it does not."""
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(path: Path, lines: int = 3) -> str:
    """Return the end of a program's output, printable and short: what a person needs when it does not start."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        text = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return " / ".join("".join(c for c in line if c.isprintable())[:200] for line in text[-lines:])
    return ""


def wait_for_port(supervisor: Supervisor, program: Program, host: str, port: int, timeout_s: float = 60.0) -> None:
    """Return when a program listens; raise VeilmartError with its last words if it ended or time is up."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if program.name in supervisor.ended:
            code = supervisor.ended[program.name]
            raise VeilmartError(f"{program.name} ended with {code}: {last_words(program.log, 12)}", hint=f"its whole output: {program.log}")
        with contextlib.suppress(OSError), socket.create_connection((host, port), 1.0):
            return
        time.sleep(POLL_S)
    raise VeilmartError(f"{program.name} does not listen on {host}:{port} after {timeout_s:.0f} s", hint=f"its output: {program.log}")


def free_port() -> int:
    """Return a port of loopback that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
