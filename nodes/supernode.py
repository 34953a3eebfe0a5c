"""The owner's Flower processes: a SuperNode that dials the SuperLink, and the SuperExec that runs what it is sent."""

from __future__ import annotations

import logging
import os
import pwd
import secrets
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nodes import sandbox
from protocol.errors import FormatError, Unauthorised, UsageError, VeilmartError
from protocol.keys import read_secret, write_durably
from protocol.processes import (
    POLL_S,
    QUIET_FLOWER,
    SECRET,
    Program,
    Supervisor,
    dies_with_us,
    flower_environment,
    flower_program,
    free_port,
    last_words,
    shorten,
    wait_for_port,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

log = logging.getLogger("veilmart.supernode")

LOOPBACK = "127.0.0.1"
TURNED_AWAY = "[code: 2004]"  # Flower's words for a key that the SuperLink does not know
LINK_S = 20.0  # how long a start waits for the SuperLink
# What a program of Flower's needs from our environment; anything else, such as a password that somebody exported, stays here.
HANDED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "PYTHONDONTWRITEBYTECODE", *QUIET_FLOWER)


@dataclass(frozen=True, slots=True)
class AppUser:
    """The user under which bundles run: it owns nothing."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, text: str) -> AppUser:
        """Return the user with this name or number; raise UsageError for root, ourselves, or nobody known."""
        try:
            entry = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
            user = cls(entry.pw_uid, entry.pw_gid)
        except KeyError:
            if not text.isdecimal():
                raise UsageError(f"app user: there is no user {text!r}", hint="make one: useradd --system veilmart-app") from None
            user = cls(int(text), int(text))
        if user.uid in (0, os.getuid()) or user.gid == 0:
            raise UsageError("app user: expected another user than root and than the one that runs the guard")
        return user


def supernode_key_file(home: Path) -> Path:
    """Return where the SuperNode's private key lies below an owner's home."""
    return home / "flower" / "supernode.key"


def supernode_key(home: Path) -> str:
    """Return the SuperNode's public key as one line of OpenSSH; the key pair is made on first use.

    Flower wants ECDSA on P-384.  This key only lets a SuperNode connect; what it publishes is signed by the owner's other key.
    """
    from cryptography.hazmat.primitives import serialization

    key = _private_key(supernode_key_file(home))
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        form = serialization.PrivateFormat.OpenSSH
        write_durably(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
        return key
    try:
        known = serialization.load_ssh_private_key(read_secret(path), None)
    except ValueError:
        known = None
    if not isinstance(known, ec.EllipticCurvePrivateKey) or known.curve.name != "secp384r1":
        raise FormatError(f"{path}: expected an OpenSSH key on P-384", hint="remove it and join again: another key is another SuperNode")
    return known


@contextmanager
def supernode(
    home: Path,
    superlink: str,
    ca: Path,
    guard: str,
    *,
    app_user: AppUser | None,
    hide: Sequence[Path] = (),
    keep: Sequence[Path] = (),
) -> Iterator[Supervisor]:
    """Run a SuperNode and the SuperExec that runs bundles; both are started again when they end.

    guard: where a bundle asks for releases, unix:PATH.  app_user: the user of bundles, in a sandbox (needs root); None: bundles run
    as we do and see what we see, which the caller has to want.  hide: folders and files that a bundle may not see, beside `home`;
    keep: what it needs to see although a hidden folder holds it.
    Raises UsageError without the rights for a sandbox, VeilmartError if the SuperNode does not start.
    """
    if app_user is not None and os.geteuid() != 0:
        raise UsageError("app user: only root can run bundles as another user", hint="docs/deploy has units that need no root at run time")
    door_to_guard = Path(guard.removeprefix("unix:")).parent  # the folder: a guard that starts anew makes a new socket in it
    if any(path.resolve().is_relative_to(door_to_guard) for path in (home, *hide)):
        raise UsageError(f"{door_to_guard}: expected a folder with the guard's socket and nothing private", hint="--socket names another")
    key, port, secret = supernode_key_file(home), free_port(), secrets.token_bytes(32)
    supernode_key(home)
    scratch = Path(tempfile.mkdtemp(prefix="veilmart-apps-"))
    logs = home / "flower"
    node = Program(
        "flower-supernode",
        (
            *dies_with_us(), flower_program("flower-supernode"), "--superlink", superlink, "--root-certificates", str(ca),
            "--host", LOOPBACK, "--port", str(port), "--auth-supernode-private-key", str(key), "--node-config", f'guard="{guard}"',
            "--isolation", "process", "--superexec-auth-secret-file", SECRET,
        ),
        flower_environment(home / "flower"), logs / "supernode.log", secret,
    )  # fmt: skip
    apps = scratch / "apps"
    apps.mkdir()
    runner = (
        flower_program("flower-superexec"), "--insecure", "--runtime-api-address", f"{LOOPBACK}:{port}",  # the hop over loopback
        "--superexec-auth-secret-file", SECRET,
    )  # fmt: skip
    environment = {name: value for name, value in flower_environment(apps).items() if name in HANDED_ON}
    environment |= {"FLWR_HOME": str(apps), "HOME": str(apps), "TMPDIR": str(apps)}
    programs = [node]
    if app_user is None:
        programs.append(Program("flower-superexec", (*dies_with_us(), *runner), environment, logs / "superexec.log", secret))
    else:
        os.chown(apps, app_user.uid, app_user.gid)
        os.chmod(scratch, 0o711)
        doors = scratch / "door"
        doors.mkdir(mode=0o750)
        os.chown(doors, 0, app_user.gid)
        os.chmod(doors, 0o750)
        door = doors / "runtime"
        outside = (*dies_with_us(), sys.executable, "-m", "nodes.gate", f"unix:{door}", f"{LOOPBACK}:{port}")
        kept = [*_programs(), *keep, door_to_guard]
        inside = sandbox.words(
            runner, user=app_user.uid, group=app_user.gid, hide=[home, *hide, *_closed_above(kept)], keep=kept, gate=(port, door)
        )
        programs.append(Program("gate", outside, environment, logs / "gate.log"))
        programs.append(Program("flower-superexec", inside, environment, logs / "superexec.log", secret))
    shorten(node.log)
    said_before = node.log.stat().st_size if node.log.exists() else 0
    try:
        with Supervisor(programs) as supervisor:
            try:
                wait_for_port(supervisor, node, LOOPBACK, port)
                _wait_for_link(supervisor, node, said_before)
            except VeilmartError as error:
                raise _explained(error, home) from None
            yield supervisor
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def places_of(data: Path) -> list[Path]:
    """Return what to hide for a file of records: its folder, and the file; raise UsageError where bundles need the folder themselves.

    The file alone would not do.  A cover falls off, in every mount namespace, when another file is renamed into the place of the one
    below it, and that is how most programs save: the new records would lie open.
    See test_records_that_are_exchanged_under_a_running_sandbox_stay_hidden.
    """
    folder = data.resolve().parent
    if folder in [place.resolve() for place in _programs()] or Path(tempfile.gettempdir()).resolve().is_relative_to(folder):
        raise UsageError(f"{data.name}: expected records in a folder of their own, got {folder}", hint="bundles need what else lies there")
    return [folder, data.resolve()]


def _closed_above(kept: Sequence[Path]) -> list[Path]:
    """Return the topmost folders on the way to these that others may not enter, as a user's home: covered, the way through is open."""
    ways = [list(reversed(path.resolve().parents)) for path in kept]
    closed = (next((folder for folder in way if folder.exists() and not folder.stat().st_mode & 0o001), None) for way in ways)
    return list(dict.fromkeys(folder for folder in closed if folder is not None))


def _wait_for_link(supervisor: Supervisor, node: Program, said_before: int) -> None:
    """Return when the SuperLink took the SuperNode in, or does not answer yet: it is tried for as long as we run.

    Raises VeilmartError if it turned the SuperNode away: Flower then ends the process.
    """
    until = time.monotonic() + LINK_S
    while time.monotonic() < until:
        if node.name in supervisor.ended:
            raise VeilmartError(f"{node.name} ended with {supervisor.ended[node.name]}: {last_words(node.log, 12)}", hint=f"see {node.log}")
        with node.log.open("rb") as file:
            file.seek(said_before)
            if b"SuperNode ID:" in file.read():
                return
        time.sleep(POLL_S)
    log.warning("no answer superlink_wait_s=%.0f", LINK_S)


def _programs() -> list[Path]:
    """Return the folders of this Python and of the packages: a bundle's code runs on them, wherever they lie."""
    installed = [sys.prefix, sys.base_prefix, sysconfig.get_paths()["purelib"], str(Path(__file__).resolve().parent.parent)]
    return [Path(place) for place in dict.fromkeys(installed)]


def _explained(error: VeilmartError, home: Path) -> VeilmartError:
    """Return the error with what to do about it, where Flower's words tell."""
    if TURNED_AWAY in str(error):
        return Unauthorised("SuperNode: the SuperLink does not know its key", hint=f"register it there: {supernode_key(home)}")
    if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate verify failed" in str(error):
        return Unauthorised("SuperNode: the SuperLink's certificate is not of this authority, or has expired", hint="check --ca and clocks")
    return error
