"""Whether a stranger's adapter is one, told by a process that may do nothing else (docs/protocol.md 4.8).

A file is read by a process of its own: bounded in memory and CPU time, unable to open anything or to reach a network, gone after one
verdict of constant size.  What a file does to its reader, it does there.  The process is forked from one that has loaded what reading
takes, so that a check costs milliseconds; `Checkers` starts that one, and starts it again when it died.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from protocol.errors import InvalidAdapter

MEMORY_BYTES = 768 << 20  # of address space: the interpreter, and six times the largest file
CPU_S, WALL_S = 10, 60  # the largest file takes below one CPU second; a crowded machine may stretch that
VERDICT_BYTES = 256
SOUND, REFUSED = b"+", b"-"
ANY_BASE_MODEL = "*" * 64
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
COMMAND: Sequence[str] = (sys.executable, "-m", "protocol.adapter_check")
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME")
AT_ONCE = 2


class Manifest(NamedTuple):
    """What an adapter says of itself, and its release has to say as well."""

    base_model: str  # hexadecimal
    guarantee: str


class Checkers:
    """So many checks at a time, for callers in any thread; a caller waits for its turn."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._all = [Checker() for _ in range(at_once)]
        self._idle: queue.SimpleQueue[Checker] = queue.SimpleQueue()
        for checker in self._all:
            self._idle.put(checker)

    def check(self, file: int, base_model: str = ANY_BASE_MODEL) -> Manifest:
        """As `Checker.check`."""
        checker = self._idle.get()
        try:
            return checker.check(file, base_model)
        finally:
            self._idle.put(checker)

    def close(self) -> None:
        """End the processes; a check that is running is a refusal."""
        for checker in self._all:
            checker.close()


class Checker:
    """One process for checks, one after the other, started at the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def check(self, file: int, base_model: str = ANY_BASE_MODEL) -> Manifest:
        """Return what a sound adapter, for `base_model` if one is named, says of itself; raise InvalidAdapter for any other file.

        A check that crashes, or takes more memory or time than any adapter needs, is a refusal; the next one gets a new process.
        """
        connection = self._connected()
        try:
            socket.send_fds(connection, [base_model.encode()], [file])
            verdict = _receive(connection)
        except OSError:  # no answer in time, or nobody there any more
            verdict = b""
        if len(verdict) != VERDICT_BYTES:
            self.close()
            raise InvalidAdapter("adapter: its check ended without a verdict", hint="what is in the file broke its reader: do not load it")
        # From a process that a stranger's bytes may have taken over, to a terminal: printable, and never long.
        told = "".join(c for c in verdict[1:].rstrip(b"\0").decode("ascii", "replace") if c.isprintable())
        if not verdict.startswith(SOUND):
            raise InvalidAdapter(told or "adapter: refused")
        return Manifest(told[: len(ANY_BASE_MODEL)], told[len(ANY_BASE_MODEL) :])

    def close(self) -> None:
        """End the process and whatever it is reading."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _connected(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._connection is None:
            ours, theirs = socket.socketpair()
            with theirs:
                # In the folder that this very code lies in: a checker of another version would judge by other rules.
                self._process = subprocess.Popen(
                    [*COMMAND, str(theirs.fileno())], pass_fds=(theirs.fileno(),), cwd=Path(__file__).parent.parent,
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
                    env={name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ} | {"OPENBLAS_NUM_THREADS": "1"},
                )  # fmt: skip
            ours.settimeout(WALL_S + 30)  # it ends its reader itself after WALL_S; this is for one that does not
            self._connection = ours
        return self._connection


def check_adapter(data: bytes, base_model: str, guarantee: str) -> None:
    """Return if these bytes are a sound adapter that says this of itself; raise InvalidAdapter otherwise.

    A process of its own reads them.
    """
    checker = Checker()
    try:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            require_said(checker.check(file.fileno(), base_model), Manifest(base_model, guarantee))
    finally:
        checker.close()


def require_said(manifest: Manifest, by_release: Manifest) -> None:
    """Raise InvalidAdapter unless an adapter says of itself what its release says of it."""
    for name, found, expected in zip(Manifest._fields, manifest, by_release, strict=True):
        if found != expected:
            raise InvalidAdapter(f"adapter, {name}: expected {expected[:80]}, as its release says, got {found[:80]}")


def _receive(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < VERDICT_BYTES and (more := connection.recv(VERDICT_BYTES - len(data))):
        data += more
    return data


# In the process -----------------------------------------------------------------------------------------------------------


def judge(file: int, base_model: str) -> Manifest:
    """Return what a sound adapter says of itself; raise InvalidAdapter for any other file."""
    from protocol.adapter import MAX_BYTES, Adapter

    data, size = [], 0
    while size <= MAX_BYTES and (part := os.pread(file, 1 << 20, size)):
        data.append(part)
        size += len(part)
    try:
        adapter = Adapter.from_bytes(b"".join(data), base_model=None if base_model == ANY_BASE_MODEL else base_model)
    except MemoryError:
        raise InvalidAdapter("adapter: reading it takes more memory than an adapter needs") from None
    return Manifest(adapter.base_model, adapter.guarantee)


def confine() -> None:
    """Give up everything but reading what is open, for good."""
    limits = {"AS": MEMORY_BYTES, "CPU": CPU_S, "FSIZE": 0, "NOFILE": 0, "NPROC": 0, "CORE": 0}
    for name, most in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
    signal.alarm(WALL_S)


def serve(connection: socket.socket) -> None:
    """Judge files until the connection ends, each in a process of its own."""
    while True:
        asked, files, _, _ = socket.recv_fds(connection, len(ANY_BASE_MODEL), 1)
        if not files:
            return
        read_end, write_end = os.pipe()
        reader = os.fork()
        if not reader:
            connection.close()
            os.close(read_end)
            confine()
            try:
                words = SOUND + "".join(judge(files[0], asked.decode())).encode()
            except InvalidAdapter as error:
                words = REFUSED + str(error).encode("ascii", "replace")
            os.write(write_end, words[:VERDICT_BYTES].ljust(VERDICT_BYTES, b"\0"))
            os._exit(0)
        os.close(write_end)
        os.close(files[0])
        with open(read_end, "rb") as told:
            verdict = told.read(VERDICT_BYTES)
        _, status = os.waitpid(reader, 0)
        if status or len(verdict) != VERDICT_BYTES:
            how = signal.Signals(status & 0x7F).name if status & 0x7F else "an error"
            verdict = (REFUSED + f"adapter: its check ended with {how}".encode()).ljust(VERDICT_BYTES, b"\0")
        connection.sendall(verdict)


def leave_the_network() -> None:
    """Go where there is no network, if the machine lets us: a reader opens no socket in any case."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)


def main() -> None:
    """Serve the connection whose descriptor is the last argument."""
    import protocol.adapter  # noqa: F401 - before the first file, so that its reader has nothing to load

    connection = socket.socket(fileno=int(sys.argv[-1]))
    leave_the_network()
    serve(connection)


if __name__ == "__main__":
    main()
