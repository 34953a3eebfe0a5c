"""Power cuts, simulated: what a real SQLite asked of the disk, and the states in which a cut could have left it.

`Recorder` puts itself between SQLite and the operating system (a VFS over ctypes, in the process that calls it, whatever opens the
database: sqlite3 or SQLAlchemy).  `Disk` replays the record up to a cut: what was synced is there, of the rest a random half, some of it
torn at sectors.  A file that was removed without syncing its folder may be back.  What acknowledged means is the caller's: `Recorder.ack`.

Model: one machine, writes of a file may be lost in any combination before its sync; sync and sector writes are honest.
"""

import _sqlite3
import ctypes
import ctypes.util
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

P, I32, I64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
OPEN = ctypes.CFUNCTYPE(I32, P, P, P, I32, P)
DELETE = ctypes.CFUNCTYPE(I32, P, P, I32)
WRITE = ctypes.CFUNCTYPE(I32, P, P, I32, I64)
TRUNCATE = ctypes.CFUNCTYPE(I32, P, I64)
SYNC = ctypes.CFUNCTYPE(I32, P, I32)
CLOSE = ctypes.CFUNCTYPE(I32, P)


class Vfs(ctypes.Structure):
    """sqlite3_vfs, version 3 (sqlite.org/c3ref/vfs.html)."""

    _fields_ = [
        ("iVersion", I32), ("szOsFile", I32), ("mxPathname", I32), ("pNext", P), ("zName", ctypes.c_char_p), ("pAppData", P),
        ("xOpen", P), ("xDelete", P), *((f"other{n}", P) for n in range(14)),
    ]  # fmt: skip


class Methods(ctypes.Structure):
    """sqlite3_io_methods, version 3 (sqlite.org/c3ref/io_methods.html)."""

    _fields_ = [
        ("iVersion", I32), ("xClose", P), ("xRead", P), ("xWrite", P), ("xTruncate", P), ("xSync", P),
        *((f"other{n}", P) for n in range(13)),
    ]  # fmt: skip


def shared_sqlite() -> ctypes.CDLL | None:
    """Return the SQLite library that Python's own module uses, or None if it is built into it without its symbols."""
    for path in (None, _sqlite3.__file__, ctypes.util.find_library("sqlite3")):
        try:
            library = ctypes.CDLL(path)
            library.sqlite3_vfs_find.restype = ctypes.POINTER(Vfs)
        except (OSError, AttributeError):
            continue
        return library
    return None


class Recorder:
    """Every write, sync and removal of this process's SQLite from now on, in order: `log`."""

    def __init__(self) -> None:
        library = shared_sqlite()
        assert library is not None
        self.log: list[tuple] = []
        self._names: dict[int, str] = {}
        self._methods: dict[int, Methods] = {}
        self._kept: list[object] = []  # ctypes frees what nobody refers to
        original = library.sqlite3_vfs_find(None).contents
        self._original = original
        self._open, self._delete = OPEN(original.xOpen), DELETE(original.xDelete)
        vfs = Vfs()
        ctypes.memmove(ctypes.byref(vfs), ctypes.byref(original), ctypes.sizeof(Vfs))
        vfs.zName = b"recording"
        vfs.xOpen, vfs.xDelete = self._pointer(OPEN(self._on_open)), self._pointer(DELETE(self._on_delete))
        self._kept += [vfs, library]
        assert library.sqlite3_vfs_register(ctypes.byref(vfs), 1) == 0

    def ack(self, what: bytes) -> None:
        """Note that somebody was told that this is stored."""
        self.log.append(("ack", what))

    def _pointer(self, function: object) -> int | None:
        self._kept.append(function)
        return ctypes.cast(function, P).value

    def _on_open(self, vfs: int, name: int, file: int, flags: int, out: int) -> int:
        code = self._open(vfs, name, file, flags, out)
        methods = P.from_address(file).value
        if code == 0 and name and methods:
            self._names[file] = os.path.basename(ctypes.string_at(name).decode())
            if methods not in self._methods:
                self._methods[methods] = self._recording(methods)
            P.from_address(file).value = ctypes.addressof(self._methods[methods])
        return code

    def _recording(self, at: int) -> Methods:
        methods = Methods()
        ctypes.memmove(ctypes.byref(methods), at, ctypes.sizeof(Methods))
        write, truncate, sync = WRITE(methods.xWrite), TRUNCATE(methods.xTruncate), SYNC(methods.xSync)

        def on_write(file: int, data: int, size: int, offset: int) -> int:
            self.log.append(("write", self._names[file], offset, ctypes.string_at(data, size)))
            return write(file, data, size, offset)

        def on_truncate(file: int, size: int) -> int:
            self.log.append(("truncate", self._names[file], size))
            return truncate(file, size)

        def on_sync(file: int, flags: int) -> int:
            self.log.append(("sync", self._names[file]))
            return 0 if sync else 1  # the model decides what is durable: no need to wait for a real disk

        methods.xWrite, methods.xTruncate = self._pointer(WRITE(on_write)), self._pointer(TRUNCATE(on_truncate))
        methods.xSync = self._pointer(SYNC(on_sync))
        return methods

    def _on_delete(self, vfs: int, name: int, folder_too: int) -> int:
        self.log.append(("delete", os.path.basename(ctypes.string_at(name).decode()), bool(folder_too)))
        return self._delete(vfs, name, folder_too)


@dataclass
class Disk:
    """Files as they are for sure, what is under way to each, and what was acknowledged."""

    files: dict[str, bytearray] = field(default_factory=dict)
    pending: dict[str, list[tuple]] = field(default_factory=dict)
    removed: dict[str, bytearray] = field(default_factory=dict)  # their folder is not synced: they may be back
    acknowledged: set[bytes] = field(default_factory=set)

    def apply(self, entry: tuple) -> None:
        """Take the next entry of a record."""
        match entry:
            case ("ack", what):
                self.acknowledged.add(what)
            case ("write" | "truncate", name, *_):
                self.pending.setdefault(name, []).append(entry)
            case ("sync", name):
                if name not in self.files and name.endswith(("-journal", "-wal")):
                    self.removed.clear()  # SQLite syncs the folder with the first sync of a new journal (os_unix.c, UNIXFILE_DIRSYNC)
                for change in self.pending.pop(name, []):
                    _change(self.files.setdefault(name, bytearray()), change)
            case ("delete", name, folder_too):
                content = self.files.pop(name, None)
                self.pending.pop(name, None)
                if folder_too:
                    self.removed.clear()  # one folder: its sync settles all removals before
                elif content is not None:
                    self.removed[name] = content

    def after_a_cut(self, rng: random.Random) -> dict[str, bytes]:
        """Return the files as a cut at this moment could leave them."""
        files = {name: bytearray(content) for name, content in self.files.items()}
        for name, content in self.removed.items():
            if name not in files and rng.random() < 0.5:
                files[name] = bytearray(content)
        for name, changes in self.pending.items():
            for change in changes:
                if rng.random() < 0.5:
                    if change[0] == "write" and len(change[3]) > 512 and rng.random() < 0.3:
                        change = (*change[:3], change[3][: 512 * rng.randrange(1, 1 + len(change[3]) // 512)])
                    _change(files.setdefault(name, bytearray()), change)
        return {name: bytes(content) for name, content in files.items() if not name.endswith("-shm")}


def _change(content: bytearray, change: tuple) -> None:
    if change[0] == "truncate":
        del content[change[2] :]
        return
    _, _, offset, data = change
    if len(content) < offset + len(data):
        content.extend(bytes(offset + len(data) - len(content)))
    content[offset : offset + len(data)] = data


def images(log: list[tuple], count: int, rng: random.Random):
    """Yield (files, acknowledged by then) for so many cuts at random moments of a record, in the order of the moments."""
    moments = sorted(rng.randrange(len(log) + 1) for _ in range(count))
    disk, done = Disk(), 0
    for moment in moments:
        for entry in log[done:moment]:
            disk.apply(entry)
        done = moment
        yield disk.after_a_cut(rng), frozenset(disk.acknowledged)


def write_image(files: dict[str, bytes], folder: Path) -> None:
    """Put an image into an empty folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
