"""Runs one command where nothing private can be seen or reached: what Flower sends to a node is code of whoever runs the SuperLink.

    python -m nodes.sandbox --user UID --group GID --hide DIR ... --keep PATH ... --gate PORT SOCKET -- COMMAND ...

Started as root, it takes for the command: a mount namespace in which hidden folders are empty, a network namespace whose only way out is
one port of loopback that leads to the SuperNode, another user without any privilege, and no way to gain one.  The rest of the file
system is as that user may see it.  Linux only; docs/deploy has the same with systemd and with containers.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
SIOCSIFFLAGS, IFF_UP = 0x8914, 1


def words(
    command: Sequence[str], *, user: int, group: int, hide: Sequence[Path], keep: Sequence[Path], gate: tuple[int, Path]
) -> tuple[str, ...]:
    """Return the command that runs another one in the sandbox; `gate` is the port inside and the socket that it leads to."""
    here = [sys.executable, "-m", "nodes.sandbox", "--user", str(user), "--group", str(group), "--gate", str(gate[0]), str(gate[1])]
    folders = [word for path in hide for word in ("--hide", str(path))] + [word for path in keep for word in ("--keep", str(path))]
    return (*here, *folders, "--", *command)


def main() -> None:
    """Enter the sandbox and become the command."""
    parser = argparse.ArgumentParser(prog="nodes.sandbox", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--user", type=int, required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--hide", type=Path, action="append", default=[])
    parser.add_argument("--keep", type=Path, action="append", default=[])
    parser.add_argument("--gate", nargs=2, metavar=("PORT", "SOCKET"), required=True)
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    if asked.user == 0 or asked.group == 0:
        parser.error("--user and --group: expected others than root's")
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    _call(libc.unshare, CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWNET)
    _call(libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
    _hide(libc, asked.hide, asked.keep)
    _loopback_up()
    _start_gate(int(asked.gate[0]), asked.gate[1], asked.user, asked.group)
    for word in asked.command:  # the pipe with a secret: its reader opens it by name, as the other user
        if word.startswith("/dev/fd/"):
            os.fchown(int(word.removeprefix("/dev/fd/")), asked.user, asked.group)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(asked.group, asked.group, asked.group)
    os.setresuid(asked.user, asked.user, asked.user)
    _call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _die_with_parent(libc, parent)  # a change of user undoes it, so it comes last
    os.execvpe(asked.command[0], asked.command, dict(os.environ))


def _hide(libc: ctypes.CDLL, hide: Sequence[Path], keep: Sequence[Path]) -> None:
    """Put an empty file system over each folder, and an empty file over each file; what is to be kept below one is bound back, read only.

    A folder that is listable by root alone would not do: a program that must be run by another user may lie in it.
    """
    folders = sorted({path.resolve() for path in hide if path.exists()})
    kept = {path.resolve(): os.open(path, os.O_PATH) for path in keep if path.exists()}
    for path in folders:
        _cover(libc, path)
    for path, handle in kept.items():
        if any(path.is_relative_to(folder) for folder in folders):
            source = f"/proc/self/fd/{handle}"
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            if os.path.isdir(source):
                path.mkdir(exist_ok=True, mode=0o755)
            else:
                path.touch()
            _call(libc.mount, source.encode(), os.fsencode(path), None, MS_BIND | MS_REC, None)
            _call(libc.mount, None, os.fsencode(path), None, MS_REMOUNT | MS_BIND | MS_RDONLY, None)
        os.close(handle)
    for path in folders:  # what lies below something that was bound back shows again
        if any(path != place and path.is_relative_to(place) for place in kept):
            _cover(libc, path)


def _cover(libc: ctypes.CDLL, path: Path) -> None:
    if path.is_dir():
        _call(libc.mount, b"none", os.fsencode(path), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=1m")
    elif path.exists():  # a folder above it may be covered by now
        _call(libc.mount, b"/dev/null", os.fsencode(path), None, MS_BIND, None)


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", IFF_UP, b""))


def _start_gate(port: int, path: str, user: int, group: int) -> None:
    """Start the inner end of the gate, as the sandbox's user; return when it listens."""
    read_end, write_end = os.pipe()
    command = [
        sys.executable,
        "-m",
        "nodes.gate",
        f"127.0.0.1:{port}",
        f"unix:{path}",
        "--ready",
        str(write_end),
        "--parent",
        str(os.getpid()),
    ]
    subprocess.Popen(command, user=user, group=group, extra_groups=[], pass_fds=(write_end,), stdin=subprocess.DEVNULL)
    os.close(write_end)
    if not os.read(read_end, 1):
        raise SystemExit("the gate to the SuperNode did not start")
    os.close(read_end)


def _die_with_parent(libc: ctypes.CDLL, parent: int) -> None:
    _call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        raise SystemExit(0)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
