"""Read the form that a browser sent: fields and files, bounded, with the standard library alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from email.message import Message
from email.parser import BytesHeaderParser
from urllib.parse import parse_qsl

from starlette.requests import Request

from protocol.errors import FormatError, QuotaExceeded

MAX_PARTS = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What came, by the names of the inputs; the last one wins where a name came twice."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # file name as the browser told it, and content; empty ones left out


async def read_form(request: Request, max_bytes: int) -> Form:
    """Return the form of a POST; raise QuotaExceeded beyond `max_bytes` and FormatError for what is no form."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise QuotaExceeded(f"form: expected at most {max_bytes} bytes")
    return parse_form(request.headers.get("content-type", ""), bytes(body))


def parse_form(content_type: str, body: bytes) -> Form:
    """Return the form in a body; raise FormatError for what is none.  No IO."""
    kind = Message()
    kind["content-type"] = content_type
    if kind.get_content_type() == "application/x-www-form-urlencoded":
        try:
            return Form(dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, max_num_fields=MAX_PARTS, errors="strict")))
        except ValueError:
            raise FormatError(f"form: expected at most {MAX_PARTS} fields in UTF-8") from None
    boundary = kind.get_param("boundary")
    if kind.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not 0 < len(boundary) <= 70:
        raise FormatError("form: expected application/x-www-form-urlencoded, or multipart/form-data with a boundary")
    return _parts(boundary.encode("ascii", "replace"), body)


def _parts(boundary: bytes, body: bytes) -> Form:
    # Every part, the first too, begins after CRLF "--" boundary CRLF, and "--" follows the last boundary (RFC 7578, RFC 2046 5.1.1).
    _, *parts = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)
    if len(parts) < 2 or len(parts) > MAX_PARTS + 1 or parts.pop()[:2] != b"--":
        raise FormatError(f"form: expected 1 to {MAX_PARTS} parts and the boundary that ends them")
    form = Form()
    for part in parts:
        head, found, content = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = BytesHeaderParser().parsebytes(head)
        name, file = headers.get_param("name", header="content-disposition"), headers.get_filename()
        if not found or not part.startswith(b"\r\n") or not isinstance(name, str):
            raise FormatError("form: expected each part to name its input")
        if file is None:
            try:
                form.fields[name] = content.decode("utf-8")
            except UnicodeDecodeError:
                raise FormatError("form: expected fields in UTF-8") from None
        elif content:
            form.files[name] = (file, content)
    return form
