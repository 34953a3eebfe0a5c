"""What a program in the sandbox sees, reaches and may do; each against the same program outside."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nodes import sandbox
from nodes.supernode import AppUser, _closed_above, _programs, places_of, supernode_key, supernode_key_file
from protocol.errors import FormatError, UsageError
from protocol.processes import free_port

ROOT = Path(__file__).parent.parent.parent
USER = 54340
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can enter the sandbox")

LOOK = """
import json, os, socket, sys
secret, kept, port, canary, pipe = sys.argv[1:]
def attempt(what):
    try: return what()
    except OSError as error: return type(error).__name__
def ask(port):
    with socket.create_connection(("127.0.0.1", int(port)), 3) as s: return s.recv(9).decode()
def root():
    os.setuid(0)
    return "root"
print(json.dumps({"secret": attempt(lambda: open(secret).read()), "kept": attempt(lambda: open(kept).read()),
    "write": attempt(lambda: str(open(kept, "w"))), "gate": attempt(lambda: ask(port)), "canary": attempt(lambda: ask(canary)),
    "root": attempt(root), "uid": os.getuid(), "groups": os.getgroups(), "pipe": attempt(lambda: open(pipe).read()),
    "privileges": [line.split()[1] for line in open("/proc/self/status") if line.startswith(("NoNewPrivs", "CapEff", "CapPrm"))]}))
"""


def greeting(listener: socket.socket) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        client.sendall(b"hello")
        client.close()


@pytest.fixture
def world(tmp_path):
    """A private folder with one file that is to be kept, a gate and a listener on loopback."""
    private = tmp_path / "private"
    (private / "shared").mkdir(parents=True)
    (private / "secret").write_text("S")
    (private / "shared" / "kept").write_text("K")
    for path in (private, private / "shared"):
        path.chmod(0o755)
    door, canary = tmp_path / "door", socket.create_server(("127.0.0.1", 0))
    gate = socket.socket(socket.AF_UNIX)
    gate.bind(str(door))
    gate.listen()
    door.chmod(0o666)
    for listener in (gate, canary):
        threading.Thread(target=greeting, args=(listener,), daemon=True).start()
    yield private, door, canary.getsockname()[1]
    gate.close()
    canary.close()


def look(command, private: Path, canary: int, port: int) -> dict:
    read_end, write_end = os.pipe()
    os.write(write_end, b"P")
    os.close(write_end)
    words = (
        sys.executable,
        "-c",
        LOOK,
        str(private / "secret"),
        str(private / "shared/kept"),
        str(port),
        str(canary),
        f"/dev/fd/{read_end}",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command(words), capture_output=True, text=True, env=environment, pass_fds=(read_end,), timeout=60, check=False
        )
    finally:
        os.close(read_end)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_root
def test_a_program_in_the_sandbox_has_one_port_one_folder_and_no_privilege(world):
    private, door, canary = world
    port = free_port()
    kept = [*_programs(), private / "shared", door]

    def inside(words):
        return sandbox.words(words, user=USER, group=USER, hide=[private, *_closed_above(kept)], keep=kept, gate=(port, door))

    got = look(inside, private, canary, port)
    assert got == {
        "secret": "FileNotFoundError", "kept": "K", "write": "OSError", "gate": "hello", "canary": "ConnectionRefusedError",
        "root": "PermissionError", "uid": USER, "groups": [], "pipe": "P", "privileges": ["0" * 16, "0" * 16, "1"],
    }  # fmt: skip


@needs_root
def test_outside_the_same_program_sees_and_reaches_everything(world):
    """The control; the port of the gate leads nowhere here."""
    private, _, canary = world
    got = look(lambda words: words, private, canary, free_port())
    assert (got["secret"], got["canary"], got["root"], got["gate"]) == ("S", "hello", "root", "ConnectionRefusedError")


@needs_root
def test_what_is_private_below_a_folder_that_is_kept_stays_covered(world):
    private, door, canary = world
    port = free_port()
    kept = [*_programs(), private, door]

    def inside(words):
        hide = [private.parent, private / "secret", *_closed_above(kept)]
        return sandbox.words(words, user=USER, group=USER, hide=hide, keep=kept, gate=(port, door))

    got = look(inside, private, canary, port)
    assert got["secret"] in ("", "PermissionError")
    assert got["kept"] == "K"


def read_before_and_after_an_exchange(hide, data: Path, door: Path) -> list[str]:
    """Return what a program in a sandbox reads from a file before and after another one was renamed into its place."""
    data.parent.chmod(0o755)
    data.write_text("old")
    read = f"""
import sys
def read():
    try: return open({str(data)!r}).read()
    except OSError as error: return type(error).__name__
print(read(), flush=True); sys.stdin.readline(); print(read(), flush=True)
"""
    kept = [*_programs(), door]
    words = sandbox.words(
        (sys.executable, "-c", read), user=USER, group=USER, hide=[*hide, *_closed_above(kept)], keep=kept, gate=(free_port(), door)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        first = process.stdout.readline()
        (data.parent / "new").write_text("new")
        (data.parent / "new").replace(data)
        second, _ = process.communicate("go\n", timeout=60)
    return [first.strip(), second.strip()]


@needs_root
def test_records_that_are_exchanged_under_a_running_sandbox_stay_hidden(world):
    private, door, _ = world
    data = private / "notes.jsonl"
    assert read_before_and_after_an_exchange(places_of(data), data, door) == ["FileNotFoundError", "FileNotFoundError"]


@needs_root
def test_a_cover_over_the_file_alone_falls_off_when_it_is_exchanged(tmp_path):
    """The control; the folders above are open to everybody, as /srv is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        door = Path(folder) / "door"
        with socket.socket(socket.AF_UNIX) as gate:
            gate.bind(str(door))
            Path(folder).chmod(0o755)
            (Path(folder) / "data").mkdir()
            data = Path(folder) / "data" / "notes.jsonl"
            assert read_before_and_after_an_exchange([data], data, door)[1] == "new"


def test_records_lie_in_a_folder_of_their_own(tmp_path):
    import tempfile

    assert places_of(tmp_path / "notes.jsonl") == [tmp_path.resolve(), tmp_path.resolve() / "notes.jsonl"]
    for folder in (Path("/"), Path(tempfile.gettempdir()), Path(sys.prefix)):
        with pytest.raises(UsageError, match="folder of their own"):
            places_of(folder / "notes.jsonl")


@pytest.mark.parametrize("name", ["0", "root", str(os.getuid())])
def test_bundles_never_run_as_root_or_as_the_guard(name):
    with pytest.raises(UsageError, match="another user"):
        AppUser.parse(name)


def test_a_user_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="no user 'nobody-here'"):
        AppUser.parse("nobody-here")


def test_a_supernodes_key_is_made_once_for_its_owner_alone(tmp_path):
    line = supernode_key(tmp_path)
    assert line.startswith("ecdsa-sha2-nistp384 ")
    assert supernode_key(tmp_path) == line
    path = supernode_key_file(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(UsageError, match="0600"):
        supernode_key(tmp_path)
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(FormatError, match="P-384"):
        supernode_key(tmp_path)
