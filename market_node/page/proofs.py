"""Check what somebody pastes: a receipt, a conflict or evidence, by the protocol's own verifier, and against the log that is held here."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from market_node.page.reading import Reading
from protocol.errors import NotFound, UsageError, VeilmartError
from protocol.verify import verify_bytes

MAX_BYTES = 1 << 20  # of a file; larger evidence is verified offline


def bytes_of(pasted: str) -> bytes:
    """Return the bytes of a text in hexadecimal or base64; raise UsageError for neither."""
    packed = re.sub(r"\s+", "", pasted)
    try:
        return bytes.fromhex(packed) if re.fullmatch(r"(?:[0-9a-fA-F]{2})+", packed) else base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError("expected a file, or its bytes in base64 or hexadecimal") from None


def checked(data: bytes, reading: Reading) -> dict[str, Any]:
    """Return what bytes prove, as a JSON value: `verified`, the words for people, and how it stands to this market's log.

    here: "same" log; "ahead" of what this page has read; "another" market's; "differs": this market signed two histories.
    """
    try:
        result, lines = verify_bytes(data)
    except VeilmartError as error:
        return {"verified": False, "lines": [str(error)], "hint": error.hint, "here": None, "result": None}
    return {"verified": True, "lines": lines, "hint": "", "here": _compared(result, reading), "result": result}


def _compared(result: dict[str, Any], reading: Reading) -> str:
    key = reading.market_key
    if key is None or result["market_key"] != key.hex():
        return "another"
    try:
        return "same" if reading.store.root(result["size"]).hex() == result["root"] else "differs"
    except NotFound:
        return "ahead"
