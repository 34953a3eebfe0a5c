"""Real processes for end-to-end tests: each with a home of its own, all on loopback, each stopped by its pid."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "VEILMART_HOME": str(home)}


def veilmart(*words: str, home: Path, code: int | tuple[int, ...] = 0, timeout: float = 600.0) -> str:
    """Run a command, expect its exit code, or one of several, and return its standard output."""
    command = [sys.executable, "-m", "nodes.command", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(home), timeout=timeout, check=False)
    assert done.returncode in (code if isinstance(code, tuple) else (code,)), done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@contextmanager
def market_process(home: Path, program: str | None = None, options: tuple[str, ...] = ("--open",), page: str = ""):
    """Yield (what the market said when ready, its process); its log goes to home/market.log.  page: [HOST:]PORT; "" for none."""
    home.mkdir(parents=True, exist_ok=True)
    what = ["-c", program] if program else ["-m", "nodes.command"]
    command = [sys.executable, *what, "market", "up", "--port", "0", "--json", *(["--page", page] if page else ["--no-page"]), *options]
    with (home / "market.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment(home))
        try:
            yield json.loads(process.stdout.readline()), process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=20)
            process.stdout.close()


def cpu_of(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settle(pid: int) -> None:
    """Return when a market does nothing any more: it loads its kernels when it starts, which belongs to no registration."""
    before, now = -1.0, cpu_of(pid)
    while now > before + 0.02:
        time.sleep(1.0)
        before, now = now, cpu_of(pid)


def memory_of(pid: int) -> Iterator[bytes]:
    """Yield the writable regions of a process's memory; skip the test where that is not permitted."""
    looked_at = 0
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for line in maps:
                span = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
                if not span or "[vvar]" in line:
                    continue
                start, end = (int(number, 16) for number in span.groups())
                try:
                    memory.seek(start)
                    data = memory.read(end - start)
                except OSError:
                    continue
                looked_at += len(data)
                yield data
    except PermissionError:
        pytest.skip("needs permission to read the memory of a child process")
    assert looked_at > 10 << 20, "a market has more memory than that: the scan saw nothing"
