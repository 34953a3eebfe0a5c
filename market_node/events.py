"""What a market writes to its log: one JSON line for each of the events below, and of everything else only where it came from.

A field that no event declares cannot be logged, and a text must be of the form that its name stands for: a digest, a class, a place in the
source.  So neither a request nor the message of an exception, which may quote one, has a way into the log, at whatever level.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TextIO

LOGGER = logging.getLogger("veilmart.market")
DIGITS = 16  # of an id in hexadecimal: enough to find it in the log of releases
FRAMES = 8  # of a traceback, the innermost
DIGEST, NAME, CODE = r"[0-9a-f]{1,16}", r"[A-Za-z_][A-Za-z0-9_.]{0,63}", r"[a-z.-]{1,40}"
FORMS = {
    "release": DIGEST, "owner": DIGEST, "adapter": DIGEST, "incident": DIGEST,
    "kind": NAME, "logger": NAME, "level": NAME, "code": CODE, "notice": CODE, "program": CODE,
    "where": r"(?:[A-Za-z0-9_<>.-]{1,64}:[0-9]{1,7} ?){0,8}",
    "witness": r"[A-Za-z0-9_.:/-]{1,255}",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """Something that may be logged.  Its fields are numbers, or texts of the form that FORMS has for the field's name."""

    LEVEL: ClassVar[int] = logging.INFO

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is int:
                continue
            if not (isinstance(value, str) and re.fullmatch(FORMS[field.name], value)):
                raise TypeError(f"{type(self).__name__}.{field.name}: a value of another form is not logged")  # without the value

    def __str__(self) -> str:
        return " ".join([type(self).__name__, *(f"{name}={value}" for name, value in asdict(self).items())])


@dataclass(frozen=True, slots=True)
class Published(Event):
    """A release was stored."""

    release: str
    position: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Enrolled(Event):
    """An owner used an invite."""

    owner: str


@dataclass(frozen=True, slots=True)
class CertificateIssued(Event):
    """A member got a certificate."""

    owner: str


@dataclass(frozen=True, slots=True)
class Cosigned(Event):
    """A witness handed in a checkpoint that it signed."""

    witness: str
    size: int


@dataclass(frozen=True, slots=True)
class AdapterStored(Event):
    """An adapter arrived whole."""

    adapter: str


@dataclass(frozen=True, slots=True)
class Noticed(Event):
    """An owner, or the operator, said something about releases."""

    notice: str
    owner: str
    index: int


@dataclass(frozen=True, slots=True)
class Aggregated(Event):
    """The aggregates of a state were signed."""

    size: int
    milliseconds: int


@dataclass(frozen=True, slots=True)
class RelayConnected(Event):
    """A guard opened its line."""

    owner: str
    release: str


@dataclass(frozen=True, slots=True)
class RelayClosed(Event):
    """A guard's line ended; what went over it, in numbers."""

    owner: str
    release: str
    asked: int
    answered: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class SuperNodeNotRegistered(Event):
    """A member's SuperNode may not connect; the code says why."""

    LEVEL: ClassVar[int] = logging.WARNING
    owner: str
    code: str


@dataclass(frozen=True, slots=True)
class DiskFull(Event):
    """A call could not store what it brought; whoever made it was told to come again."""

    LEVEL: ClassVar[int] = logging.ERROR
    where: str


@dataclass(frozen=True, slots=True)
class DatabaseAway(Event):
    """PostgreSQL did not answer a call, or ended its connection; whoever made the call was told to come again."""

    LEVEL: ClassVar[int] = logging.ERROR
    where: str


@dataclass(frozen=True, slots=True)
class CertificatesNotRead(Event):
    """The certificates could not be read or renewed; those that were read before are shown further."""

    LEVEL: ClassVar[int] = logging.ERROR
    code: str


@dataclass(frozen=True, slots=True)
class TileNotWritten(Event):
    """The disk did not take a tile of the index."""

    LEVEL: ClassVar[int] = logging.ERROR
    errno: int


@dataclass(frozen=True, slots=True)
class IndexFailed(Event):
    """The index could not be made; queries of older states are answered."""

    LEVEL: ClassVar[int] = logging.ERROR
    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class ProgramEnded(Event):
    """A process that the market keeps running ended; its own log says why, and it is started again."""

    LEVEL: ClassVar[int] = logging.WARNING
    program: str
    exit_code: int
    again_in_s: int


@dataclass(frozen=True, slots=True)
class WorkerEnded(Event):
    """A worker of the matcher ended or went silent; its part of a query was answered by the market's own process."""

    LEVEL: ClassVar[int] = logging.WARNING
    place: int
    where: str


@dataclass(frozen=True, slots=True)
class WorkerNotStarted(Event):
    """A worker of the matcher did not come up; it is tried again, later each time."""

    LEVEL: ClassVar[int] = logging.ERROR
    place: int
    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class Incident(Event):
    """A call ended in an error that nobody raised on purpose; the caller was told the incident's id alone."""

    LEVEL: ClassVar[int] = logging.ERROR
    incident: str
    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class Crashed(Event):
    """An exception that nobody caught."""

    LEVEL: ClassVar[int] = logging.CRITICAL
    kind: str
    where: str


@dataclass(frozen=True, slots=True)
class Other(Event):
    """A library logged something; what it said is dropped."""

    logger: str
    level: str
    kind: str
    where: str


def tell(event: Event) -> None:
    """Log an event."""
    LOGGER.log(event.LEVEL, event)


def tell_of_end(program: str, exit_code: int, again_in_s: float) -> None:
    """Log that a process ended, as a Supervisor reports it."""
    tell(ProgramEnded(program, exit_code, round(again_in_s)))


def short(digest: bytes) -> str:
    """Return an id as it stands in the log."""
    return digest.hex()[:DIGITS]


def kind_of(error: BaseException) -> str:
    """Return the class of an error: what of it may be logged, together with `where`."""
    return _formed("kind", type(error).__name__)


def where(traceback: TracebackType | None) -> str:
    """Return the innermost lines of a traceback as FILE:LINE, without source or values."""
    frames: list[str] = []
    while traceback is not None:
        name = re.sub(r"[^A-Za-z0-9_<>.-]", "_", Path(traceback.tb_frame.f_code.co_filename).name)[-64:]
        frames.append(f"{name or '_'}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " ".join(frames[-FRAMES:])


def write_events(stream: TextIO, level: int = logging.INFO) -> None:
    """Make `stream` the one place where this process logs: events, and what other loggers say without its words."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # where the log cannot be written, logging would print what it was about to tell of

    def uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
        tell(Crashed(_formed("kind", kind.__name__), where(traceback)))

    # These would print the exception's message, in which there may be anything.
    sys.excepthook = uncaught
    threading.excepthook = lambda hook: uncaught(hook.exc_type, hook.exc_value, hook.exc_traceback)
    sys.unraisablehook = lambda hook: uncaught(hook.exc_type, hook.exc_value, hook.exc_traceback)


class Lines(logging.Formatter):
    """Writes a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record; of one that is no event, neither message nor arguments are looked at."""
        event: Any = record.msg
        if not isinstance(event, Event) or record.args:
            error, traceback = record.exc_info[1:] if record.exc_info else (None, None)
            kind = kind_of(error) if error is not None else "none"
            event = Other(_formed("logger", record.name), _formed("level", record.levelname), kind, where(traceback))
        at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"
        return json.dumps({"time": at, "event": type(event).__name__, **asdict(event)})


def _formed(name: str, value: str) -> str:
    return value if re.fullmatch(FORMS[name], value) else "other"
