"""TLS channels to a market, and the one table that turns errors into gRPC statuses and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import errors
from protocol.errors import MarketUnreachable, UsageError, VeilmartError

if TYPE_CHECKING:
    import grpc

CHUNK_BYTES = 64 << 10
CALL_TIMEOUT_S = 30.0
CODE_KEY = "veilmart-code"
RETRY_KEY = "retry-after"  # seconds, with a refusal by a limit
OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    # Without this gRPC honours http_proxy even for loopback.
    ("grpc.enable_http_proxy", 0),
]


def connect(address: str, ca: Path) -> grpc.Channel:
    """Return a TLS channel to HOST:PORT that trusts exactly the certificate authority in the file `ca`."""
    import grpc

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"market: expected HOST:PORT, got {address!r}")
    try:
        authority = ca.read_bytes()
    except OSError as error:
        raise UsageError(f"{ca}: {error.strerror}", hint="`veilmart market up` prints the path of its certificate") from None
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root_certificates=authority), options=OPTIONS)


def error_from_status(error: Any) -> VeilmartError:
    """Return the error that a failed call stands for."""
    import grpc

    status = error.code()
    # A stranger wrote it and a terminal will show it: no control characters, no length that hides what follows.
    details = "".join(character for character in error.details() or "" if character.isprintable())[:500]
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return MarketUnreachable(
            f"market: no answer ({status.name.lower().replace('_', ' ')})",
            hint="is `veilmart market up` running, and is --ca its certificate?",
        )
    trailing = dict(error.trailing_metadata() or ())
    named, later = trailing.get(CODE_KEY, ""), str(trailing.get(RETRY_KEY, ""))
    for candidate in _error_classes(VeilmartError):
        if candidate.code == named and candidate is not errors.BudgetSpent:  # a budget belongs to a node and never crosses the wire
            return candidate(details, hint=f"try again in {int(later[:4])} s") if later[:4].isdecimal() else candidate(details)
    return VeilmartError(f"market: {status.name.lower()}: {details[:200]}")


def _error_classes(root: type[VeilmartError]) -> list[type[VeilmartError]]:
    return [root, *(c for child in root.__subclasses__() for c in _error_classes(child))]
