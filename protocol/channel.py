"""TLS channels to a market, and the one table that turns errors into gRPC statuses and back."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import errors
from protocol.errors import FormatError, MarketUnreachable, UntrustedMarket, UsageError, VeilmartError

if TYPE_CHECKING:
    import grpc

CHUNK_BYTES = 64 << 10
CALL_TIMEOUT_S = 30.0
CODE_KEY = "veilmart-code"
RETRY_KEY = "retry-after"  # seconds, with a refusal by a limit
OPTIONS = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    # A connection that carries nothing any more, of which no end was told, would swallow every call until its deadline, and the next as
    # well (measured: without these, calls went on failing for as long as the test looked).  With a call open, a ping every 10 s; one
    # without an answer for 10 s ends the connection.  The market takes them (market_node/server.py).
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own pauses between two attempts to connect grow to two minutes, and an attempt may take 20 s.
    ("grpc.max_reconnect_backoff_ms", 3000),
    ("grpc.min_reconnect_backoff_ms", 5000),
]

UNTRUSTED = ("CERTIFICATE_VERIFY_FAILED", "not in peer certificate")  # how gRPC says that a certificate is not the right one


def addresses_of(market: str) -> list[str]:
    """Return the addresses of a market's processes, HOST:PORT[,HOST:PORT...], in order; they are looked at when they are connected to."""
    return [address.strip() for address in market.split(",")]


def connect(address: str, ca: Path, own: bytes | None = None, *, apart: bool = False) -> grpc.Channel:
    """Return a TLS channel to HOST:PORT that trusts exactly the certificate authority in the file `ca`.

    own: key and certificate of this side, PEM, for a port that asks for one.
    apart: with a connection of its own.  Channels to one address share theirs, and the pause after an attempt that failed.
    """
    import grpc

    from protocol.certificates import load_certificates

    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "," in host:
        raise UsageError(f"market: expected HOST:PORT, got {address!r}")
    try:
        authority = ca.read_bytes()
    except OSError as error:
        raise UsageError(f"{ca}: {error.strerror}", hint="`veilmart market up` prints the path of its certificate") from None
    try:
        load_certificates(authority)
    except FormatError:  # gRPC would take it, and report that the market does not answer
        raise UsageError(
            f"{ca}: expected a certificate authority, PEM, got other bytes", hint="the market's operator hands out its ca.crt"
        ) from None
    # A site may reach the world through a proxy only (HTTPS_PROXY); without this gRPC would send calls of loopback there as well.
    options = [*OPTIONS, ("grpc.enable_http_proxy", 0 if _is_loopback(host) else 1), ("grpc.use_local_subchannel_pool", int(apart))]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, own, own), options=options)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def error_from_status(error: Any) -> VeilmartError:
    """Return the error that a failed call stands for."""
    import grpc

    status = error.code()
    # A stranger wrote it and a terminal will show it: no control characters, no length that hides what follows.
    details = "".join(character for character in error.details() or "" if character.isprintable())[:500]
    # CANCELLED: a market that stops ends what it could not finish in its last seconds.
    if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        if any(words in (error.details() or "") for words in UNTRUSTED):
            return UntrustedMarket(
                "market: the certificate that is shown there is not of the given authority, for this name and this time",
                hint="is --ca this market's newest ca.crt?  If it is, do not go on: ask its operator; and look at the clocks",
            )
        return MarketUnreachable(
            f"market: no answer ({status.name.lower().replace('_', ' ')})",
            hint="is `veilmart market up` running, and is --ca its certificate?",
        )
    trailing = dict(error.trailing_metadata() or ())
    named, later = trailing.get(CODE_KEY, ""), str(trailing.get(RETRY_KEY, ""))
    for candidate in _error_classes(VeilmartError):
        if candidate.code == named and candidate is not errors.BudgetSpent:  # a budget belongs to a node and never crosses the wire
            if not later[:6].isdecimal():
                return candidate(details)
            wait_s = int(later[:6])
            hint = f"try again in {_spoken(wait_s)}"
            return candidate(details, hint, wait_s) if candidate is errors.QuotaExceeded else candidate(details, hint)
    return VeilmartError(f"market: {status.name.lower()}: {details[:200]}")


def _spoken(seconds: int) -> str:
    """Return a duration as a person says it, rounded up."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{-(-seconds // unit)} {name}"
    return f"{seconds} s"


def _error_classes(root: type[VeilmartError]) -> list[type[VeilmartError]]:
    return [root, *(c for child in root.__subclasses__() for c in _error_classes(child))]
