"""The guard's journal: every request and what became of it, one line each, chained by hashes.

    hash_0 = SHA-256(tag)        hash_k = SHA-256(tag || hash_{k-1} || canonical JSON of entry k)

A line that was changed, removed or slipped in shows.  That the *newest* lines are missing shows as well, since a second file holds
number and hash of the last one.  What cannot show: a rewrite of both files from some line on by somebody who may write both, as the
owner's own account may.  Against that, keep a head (`node log` prints it) elsewhere and ask for it with `node log --contains`.

The journal is the guard's queue at the same time: an order that was acknowledged has its line on the disk, and one without an outcome is
served after the next start.  It holds no records, counts of records or reasons that could tell of them beyond an error's code.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from protocol.codec import canonical_json, domain_tag
from protocol.errors import FormatError, LedgerDamaged, UsageError

TAG = domain_tag("guard-journal", 1)
HEAD_BYTES = 8 + 32
GENESIS = hashlib.sha256(TAG).digest()
Value = str | int


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: what happened, when by this machine's clock, and the hash of it and everything before."""

    number: int
    time: str
    event: str
    fields: Mapping[str, Value]
    hash: bytes


def head_file(path: Path) -> Path:
    """Return where number and hash of a journal's last line are kept."""
    return path.with_name(path.name + ".head")


def _hash(before: bytes, number: int, time: str, event: str, fields: Mapping[str, Value]) -> bytes:
    body = canonical_json({"number": number, "time": time, "event": event, "fields": dict(fields)})
    return hashlib.sha256(TAG + before + body).digest()


def read(path: Path) -> list[Entry]:
    """Return the verified lines of a journal; raise LedgerDamaged for one that is not what was written.

    A last line without its end is what a power cut leaves of an order that nobody was told is accepted: it is left out.
    """
    entries: list[Entry] = []
    before = GENESIS
    data = path.read_bytes() if path.exists() else b""
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        try:
            plain = json.loads(line)
            number, time, event, fields = int(plain["number"]), str(plain["time"]), str(plain["event"]), dict(plain["fields"])
            found = bytes.fromhex(plain["hash"])
            expected = _hash(before, len(entries) + 1, time, event, fields)
        except (ValueError, KeyError, TypeError, FormatError):
            raise _damaged(f"line {len(entries) + 1} cannot be read") from None
        if (number, found) != (len(entries) + 1, expected):
            raise _damaged(f"line {len(entries) + 1} is not the one that was written")
        entries.append(Entry(number, time, event, fields, found))
        before = found
    head = head_file(path).read_bytes() if head_file(path).exists() else b""
    if not head and not entries:
        return []
    if len(head) != HEAD_BYTES:
        raise _damaged("its head is missing")
    # A crash between the two writes leaves the head one line behind: more lines than it says are sound, fewer are not.
    last = int.from_bytes(head[:8], "little")
    if last > len(entries) or (last and entries[last - 1].hash != head[8:]):
        raise _damaged(f"expected at least {last} lines, the last of them as its head says, got {len(entries)}")
    return entries


def _damaged(what: str) -> LedgerDamaged:
    return LedgerDamaged(
        f"journal: {what}", hint="somebody or something changed it; to go on, move the journal and its head aside: the ledger is unharmed"
    )


class Journal:
    """A journal that this process alone appends to."""

    def __init__(self, path: Path) -> None:
        """Open a journal, made if it is not there, and verify it; raise UsageError if another process has it open."""
        self._path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self._head = os.open(head_file(path), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.found = read(path)  # what was there at the start
        except BlockingIOError:
            self.close()
            raise UsageError(f"{path}: another guard of this population is running", hint="one guard serves one population") from None
        except LedgerDamaged:
            self.close()
            raise
        data = path.read_bytes()
        self._end = data.rfind(b"\n") + 1
        os.ftruncate(self._file, self._end)
        self._number, self._last = (self.found[-1].number, self.found[-1].hash) if self.found else (0, GENESIS)
        self._write_head()

    def append(self, event: str, **fields: Value) -> Entry:
        """Write a line and return it when it is on the disk; raise UsageError, and leave the journal as it was, where that fails."""
        with self._lock:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            number = self._number + 1
            digest = _hash(self._last, number, time, event, fields)
            plain = {"number": number, "time": time, "event": event, "fields": fields, "hash": digest.hex()}
            line = json.dumps(plain, sort_keys=True).encode() + b"\n"
            try:
                written = os.pwrite(self._file, line, self._end)
                if written != len(line):  # the disk was full in the middle of the line
                    raise OSError(28, os.strerror(28))
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self._end)
                raise UsageError(f"{self._path}: {error.strerror}", hint="nothing was accepted; free the disk") from None
            self._end, self._number, self._last = self._end + len(line), number, digest
            self._write_head()
            return Entry(number, time, event, fields, digest)

    def _write_head(self) -> None:
        # Forty bytes within one sector: they are written whole or not at all, and at worst the head stays one line behind.
        os.pwrite(self._head, self._number.to_bytes(8, "little") + self._last, 0)
        os.fsync(self._head)

    def close(self) -> None:
        """Let another process open the journal."""
        for descriptor in (self._file, self._head):
            os.close(descriptor)
