"""Canonical bytes: the only encoding of a value that a parser accepts (docs/protocol.md 1).

An object is  MAGIC || u32 length of metadata || metadata || payload,  little endian.  Metadata is RFC 8785 JSON of strings, integers and
nested objects only: no floats (a decimal has many spellings, so it travels as a string), no null, no booleans.
Signatures and hashes cover these bytes and never a re-serialisation.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

from protocol.errors import FormatError, UnsupportedVersion

MAX_METADATA_BYTES = 64 << 10
LARGEST_INTEGER = (1 << 53) - 1  # RFC 8785 writes numbers as doubles


def domain_tag(kind: str, version: int) -> bytes:
    """Return the prefix that keeps a signature or hash of one kind of object from standing for another."""
    return f"veilmart/{kind}/v{version}\0".encode()


def canonical_json(metadata: Mapping[str, Any]) -> bytes:
    """Return the RFC 8785 form of strings, integers, and objects and lists of them; raise FormatError for anything else."""
    try:
        return _canonical(metadata, "metadata").encode()
    except (UnicodeError, RecursionError) as error:  # a lone surrogate is no text
        raise FormatError(f"metadata: not expressible in RFC 8785 ({type(error).__name__})") from None


def _canonical(value: object, where: str) -> str:
    match value:
        case bool() | None | float():
            raise FormatError(f"{where}: expected strings and integers only, got {type(value).__name__}")
        case str():
            # Python escapes what RFC 8785 3.2.2.2 escapes, in the same spelling (test_canonical_json_is_that_of_another_implementation).
            return json.dumps(value, ensure_ascii=False)
        case int():
            if abs(value) > LARGEST_INTEGER:
                raise FormatError(f"{where}: expected an integer of at most 2^53 - 1, which every implementation holds exactly")
            return int.__repr__(value)
        case Mapping():
            if not all(isinstance(key, str) for key in value):
                raise FormatError(f"{where}: expected names that are strings")
            names = sorted(value, key=lambda name: name.encode("utf-16-be"))  # RFC 8785 3.2.3: by UTF-16 code units
            return (
                "{"
                + ",".join(f"{json.dumps(name, ensure_ascii=False)}:{_canonical(value[name], f'{where}.{name}')}" for name in names)
                + "}"
            )
        case list() | tuple():
            return "[" + ",".join(_canonical(item, f"{where}[{position}]") for position, item in enumerate(value)) + "]"
        case _:
            raise FormatError(f"{where}: expected strings and integers only, got {type(value).__name__}")


def encode(magic: bytes, metadata: Mapping[str, Any], payload: bytes) -> bytes:
    """Return the canonical bytes of an object."""
    text = canonical_json(metadata)
    return magic + struct.pack("<I", len(text)) + text + payload


def decode(magic: bytes, data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return metadata and payload; raise FormatError unless encoding them again gives the same bytes."""
    if not data.startswith(magic):
        kind = magic.split(b"/")[1].decode()
        if data.startswith(magic[: magic.rindex(b"/")]):
            raise UnsupportedVersion(f"{kind}: expected {magic[:-1].decode()}, got another version", hint="update veilmart")
        raise FormatError(f"{kind}: expected bytes that begin with {magic[:-1].decode()}")
    start = len(magic) + 4
    if len(data) < start:
        raise FormatError(f"{magic[:-1].decode()}: cut off in the header")
    (length,) = struct.unpack_from("<I", data, len(magic))
    if length > MAX_METADATA_BYTES or start + length > len(data):
        raise FormatError(f"{magic[:-1].decode()}: metadata length {length} does not fit in {len(data)} bytes")
    text, payload = data[start : start + length], data[start + length :]
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(f"{magic[:-1].decode()}: metadata is not JSON") from None
    if not isinstance(metadata, dict) or canonical_json(metadata) != text:
        raise FormatError(f"{magic[:-1].decode()}: metadata is not in canonical form")
    return metadata, payload


def take(metadata: Mapping[str, Any], fields: Mapping[str, type], what: str) -> list[Any]:
    """Return the values of exactly these fields, each of its type; raise FormatError naming the first that is not."""
    if set(metadata) != set(fields):
        odd = sorted(set(metadata) ^ set(fields))
        raise FormatError(f"{what}: expected the fields {sorted(fields)}, differs in {odd[:4]}")
    for name, kind in fields.items():
        if not isinstance(metadata[name], kind):
            raise FormatError(f"{what}.{name}: expected {kind.__name__}, got {type(metadata[name]).__name__}")
    return [metadata[name] for name in fields]


def parse_hex(text: str, size: int, what: str) -> bytes:
    """Return the bytes of a lower-case hexadecimal string of exactly `size` bytes."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        raise FormatError(f"{what}: expected {2 * size} hexadecimal digits") from None
    if len(value) != size or value.hex() != text:
        raise FormatError(f"{what}: expected {2 * size} lower-case hexadecimal digits, got {len(text)} characters")
    return value


def parse_decimal(text: str, what: str) -> float:
    """Return the number that a canonical decimal string stands for: the shortest spelling that reads back to it."""
    try:
        value = float(text)
    except ValueError:
        raise FormatError(f"{what}: expected a decimal number, got {len(text)} characters that are none") from None
    if format_decimal(value) != text:
        raise FormatError(f"{what}: expected the shortest spelling {format_decimal(value)!r}")
    return value


def parse_limit(text: str, what: str) -> float | None:
    """Return a canonical decimal above 0, or None for an empty text: no limit.

    Raises FormatError for anything else: nothing is larger than nan, so as a limit it would be none.
    """
    if not text:
        return None
    value = parse_decimal(text, what)
    if not (math.isfinite(value) and value > 0):
        raise FormatError(f"{what}: expected a finite number above 0, got {text}")
    return value


def format_decimal(value: float) -> str:
    """Return the shortest decimal string that reads back to the same double."""
    return repr(float(value))
