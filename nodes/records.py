"""Records: what an owner or a querier has.  One object per line of a JSONL file, read once and checked completely."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from protocol.errors import RecordError

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


def parse_record(line: bytes, where: str) -> Record:
    """Return the record of one JSONL line; `where` ("notes.jsonl, line 7") is all that an error says about it."""
    if len(line) > MAX_LINE_BYTES:
        raise RecordError(f"{where}: expected at most {MAX_LINE_BYTES} bytes, got {len(line)}")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # the decoder's own message quotes the text
        raise RecordError(f"{where}: expected one JSON object a line, got text that is not JSON") from None
    for text in value.values() if isinstance(value, dict) else ():
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise RecordError(f"{where}: expected Unicode text, got half of a surrogate pair")
    match value:
        case {"prompt": str(prompt), "response": str(response)} if prompt.strip() and response.strip():
            return Pair(prompt, response)
        case {"prompt": str(prompt)} if prompt.strip() and "response" not in value:
            return Prompt(prompt)
        case {"text": str(text)} if text.strip():
            return Text(text)
    raise RecordError(
        f"{where}: expected non-empty strings 'prompt' and 'response', or 'text'",
        hint='write records as {"prompt": "...", "response": "..."} or {"text": "..."}',
    )


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """Return the records of a JSONL file in its order, at most `limit` of them; blank lines are skipped.

    Raises RecordError naming file and line, never the text.
    """
    try:
        with path.open("rb") as lines:
            records: list[Record] = []
            for number, line in enumerate(lines, start=1):
                if limit is not None and len(records) >= limit:
                    break
                if line.strip():
                    records.append(parse_record(line, f"{path.name}, line {number}"))
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror or 'cannot be read'}") from None
    if not records:
        raise RecordError(f"{path.name}: expected at least one record, got an empty file")
    return records


def read_training_records(path: Path, minimum: int, limit: int | None = None) -> list[Record]:
    """Return the records of an owner's file; every one needs a response, and there must be `minimum` of them."""
    records = read_records(path, limit)
    for number, record in enumerate(records, start=1):
        if isinstance(record, Prompt):
            raise RecordError(f"{path.name}, record {number}: expected a response beside the prompt")
    if len(records) < minimum:
        raise RecordError(
            f"{path.name}: expected at least {minimum} records, got fewer",
            hint="with few records the noise hides the task; several small owners can release one specification together",
        )
    return records


def digest_of(records: Sequence[Record]) -> bytes:
    """Return the SHA-256 of the records in their order: private (it confirms a guess of the data), so it stays in the ledger."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([type(record).__name__, *astuple(record)], ensure_ascii=True).encode() + b"\n")
    return digest.digest()
