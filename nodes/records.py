"""Records: what an owner or a querier has.  One object per line of a JSONL file, read once and checked completely."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from protocol.errors import RecordError
from protocol.privacy import RECORD, PrivacyUnit

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its response."""

    prompt: str
    response: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt whose response is not known: a query only, never training data."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Text:
    """Running text; its first half stands for the prompt and its second half for the response (docs/protocol.md 2)."""

    text: str


Record = Pair | Prompt | Text


@dataclass(frozen=True, slots=True)
class Given:
    """A file that was handed over, not named: a browser gives its bytes, which are written nowhere."""

    name: str
    data: bytes

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        """Return its bytes as a stream, as `Path.open` does."""
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class OwnedRecords:
    """An owner's records, and the privacy unit of each."""

    records: tuple[Record, ...]
    units: tuple[str, ...] | None = None  # None: each record is a unit of its own

    @property
    def unit_count(self) -> int:
        """Exact number of privacy units: for the owner's eyes only."""
        return len(self.records) if self.units is None else len(set(self.units))


def parse_record(line: bytes, where: str) -> Record:
    """Return the record of one JSONL line; `where` ("notes.jsonl, line 7") is all that an error says about it."""
    return _record_of(_parse_line(line, where), where)


def _parse_line(line: bytes, where: str) -> object:
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"{where}: expected at most {MAX_LINE_BYTES} bytes, got {len(line)}")
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError):  # the decoder's own message quotes the text
        raise RecordError(f"{where}: expected one JSON object a line, got text that is not JSON") from None
    for text in value.values() if isinstance(value, dict) else ():
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise RecordError(f"{where}: expected Unicode text, got half of a surrogate pair")
    return value


def _record_of(value: object, where: str) -> Record:
    match value:
        case {"prompt": str(prompt), "response": str(response)} if prompt.strip() and response.strip():
            return Pair(prompt, response)
        case {"prompt": str(prompt), **rest} if prompt.strip() and "response" not in rest:
            return Prompt(prompt)
        case {"text": str(text)} if text.strip():
            return Text(text)
    raise RecordError(
        f"{where}: expected non-empty strings 'prompt' and 'response', or 'text'",
        hint='write records as {"prompt": "...", "response": "..."} or {"text": "..."}',
    )


def _unit_of(value: object, field: str, where: str) -> str:
    unit = value.get(field) if isinstance(value, dict) else None
    # Numbers and their texts are one unit, and so are values that differ in outer blanks: two units that are taken for one are protected
    # together, while one unit that is taken for two would be protected by halves.
    if isinstance(unit, str | int) and not isinstance(unit, bool) and str(unit).strip():
        return str(unit).strip()
    raise RecordError(
        f"{where}: expected the field {field!r}, a text or a whole number that says whom the record belongs to",
        hint="every record needs it: one without would be protected alone, and its unit not at all",
    )


def _lines(path: Path | Given, limit: int | None) -> Iterator[tuple[object, str]]:
    """Yield the object of each line that is not blank and where it stands; raise RecordError for a file that cannot be read or is empty."""
    count = 0
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if limit is not None and count >= limit:
                    break
                if line.strip():
                    count += 1
                    where = f"{path.name}, line {number}"
                    yield _parse_line(line, where), where
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or 'cannot be read'}") from None
    if not count:
        raise RecordError(f"{path.name}: expected at least one record, got an empty file")


def read_records(path: Path | Given, limit: int | None = None) -> list[Record]:
    """Return the records of a JSONL file in its order, at most `limit` of them; blank lines are skipped.

    Raises RecordError naming file and line, never the text.
    """
    return [_record_of(value, where) for value, where in _lines(path, limit)]


def read_owned_records(path: Path | Given, minimum: int, limit: int | None = None, unit: PrivacyUnit = RECORD) -> OwnedRecords:
    """Return the records of an owner's file with the unit of each.

    Raises RecordError unless every record has a response and, where the unit is a field, that field; unless there are `minimum` units;
    and if all records are the same.
    """
    records: list[Record] = []
    units: list[str] = []
    for value, where in _lines(path, limit):
        record = _record_of(value, where)
        if isinstance(record, Prompt):
            raise RecordError(f"{path.name}, record {len(records) + 1}: expected a response beside the prompt")
        records.append(record)
        if unit.field:
            units.append(_unit_of(value, unit.field, where))
    owned = OwnedRecords(tuple(records), tuple(units) if unit.field else None)
    if owned.unit_count < minimum:
        kind = f"different values of {unit.field!r}" if unit.field else "records"
        raise RecordError(
            f"{path.name}: expected at least {minimum} {kind}, got fewer",
            hint="with few records the noise hides the task; several small owners can release one specification together",
        )
    if len(records) > 1 and len(set(records)) == 1:
        raise RecordError(f"{path.name}: expected different records, got the same one {len(records)} times", hint="is this the right file?")
    return owned


def digest_of(records: Sequence[Record]) -> bytes:
    """Return the SHA-256 of the records in their order: private (it confirms a guess of the data), so it stays in the ledger."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([type(record).__name__, *astuple(record)], ensure_ascii=True).encode() + b"\n")
    return digest.digest()
