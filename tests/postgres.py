"""A real PostgreSQL server for tests: a cluster of its own in a temporary folder, on a socket in it, stopped by its pid."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
USER = "postgres"  # the server refuses to run as root


@dataclass
class Server:
    """A running server."""

    folder: Path
    binaries: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, *settings: str) -> None:
        words = [str(self.binaries / "postgres"), "-D", str(self.folder / "data"), "-k", str(self.folder), "-c", "listen_addresses="]
        words += [word for setting in settings for word in ("-c", setting)]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen([*_as_user(), *words], stdout=log, stderr=log, cwd=self.folder)
        ready = [str(self.binaries / "pg_isready"), "-q", "-h", str(self.folder)]
        for _ in range(600):
            if subprocess.run(ready, check=False).returncode == 0:
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("PostgreSQL does not start")

    def stop(self, how: int = signal.SIGINT) -> None:
        """End it: SIGINT ends connections, SIGQUIT is a crash that is recovered from at the next start."""
        assert self.process is not None
        self.process.send_signal(how)
        self.process.wait(60)

    def url(self) -> str:
        """Return the URL of a database without a market; there is one, emptied for each that asks."""
        self.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = 'postgres'")
        self.run("DROP SCHEMA IF EXISTS market, quotas CASCADE")
        return f"postgresql://{USER}@/postgres?host={self.folder}"

    def run(self, statement: str) -> str:
        """Run a statement as the administrator and return what it says."""
        words = [str(self.binaries / "psql"), "-h", str(self.folder), "-U", USER, "-Atqc", statement]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def _as_user() -> list[str]:
    # The process itself becomes the server, so that a signal to it is one to the server.
    return ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.getuid() == 0 else []


@contextmanager
def running() -> Iterator[Server]:
    """Yield a new server; skip where there is none, unless VEILMART_REQUIRE_POSTGRES says that there must be."""
    if not PLACES:
        assert not os.environ.get("VEILMART_REQUIRE_POSTGRES"), "no PostgreSQL below /usr/lib/postgresql"
        pytest.skip("no PostgreSQL on this machine")
    folder = Path(tempfile.mkdtemp(prefix="veilmart-pg-"))  # short: it holds the socket
    if os.getuid() == 0:
        shutil.chown(folder, USER, USER)
    server = Server(folder, PLACES[0])
    try:
        make = [
            str(server.binaries / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            USER,
            "--auth=trust",
            "--no-sync",
            "-E",
            "UTF8",
            "--locale=C",
        ]
        subprocess.run([*_as_user(), *make], check=True, capture_output=True, cwd=folder)
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A server for the tests of a run."""
    with running() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def market_home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A market's folder, with its records in each of the databases in turn."""
    from market_node.database import use  # not whenever a test is collected

    if request.param == "postgresql":
        use(tmp_path, request.getfixturevalue("postgres").url())
    return tmp_path
