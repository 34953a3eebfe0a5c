"""What a market is known by: the key that signs its catalogue, and the certificate of its TLS server."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from market_node.authority import CERTIFICATE, KEY, Authorities, alone, authorities, issue, private_pem, public_pem
from protocol.certificates import new_tls_key
from protocol.errors import UsageError
from protocol.keys import read_secret, signing_key, write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SERVER_DAYS = 730
RENEW_DAYS = 30  # a server certificate with less left is made anew at the start
LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
HOST = re.compile(rf"(?=.{{1,253}}\Z){LABEL}(?:\.{LABEL})*", re.IGNORECASE)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class MarketIdentity:
    """Keys and certificates of one market."""

    market_key: Ed25519PrivateKey
    ca_file: Path
    server_certificate: bytes  # PEM
    server_key: bytes  # PEM
    trusted: bytes  # PEM: the authorities whose certificates are taken


def market_identity(
    home: Path, hosts: Sequence[str], now: datetime.datetime, *, renew: bool = True, fresh: bool = False, shared: bool = False
) -> MarketIdentity:
    """Return the identity kept in a folder, made on first use.

    A server certificate for other hosts, that ends soon, or that does not fit its key or authority is made anew under the same authority;
    a rotation of the authority whose time has come is finished (market_node/authority.py).
    renew: whether to make certificates; without it those that are there are read.  fresh: make the server's anew in any case.
    shared: names that are in the server's certificate stay in it, since other processes need them.
    TLS keys are ECDSA on P-256, since gRPC's TLS knows no Ed25519 certificates.
    Raises UsageError for key files that others can read, a missing or damaged authority, and names that are no host names.
    """
    ca_file, server_file, server_key_file = home / CERTIFICATE, home / "server.crt", home / "server.key"
    names = sorted({_canonical(host) for host in (*LOOPBACK, *hosts)})
    with alone(home):
        market_key = signing_key(home / "market.key")
        # Also where nothing is issued: whoever could read the authority's key can be this market tomorrow.
        found = authorities(home, now, change=renew)
        if renew and shared and server_file.exists():
            names = sorted({*names, *served_names(home)})
        if renew and (fresh or not _serves(server_file, server_key_file, found.serving.certificate, names, now)):
            key, certificate = _make_server(found, home / KEY, names, now)
            write_durably(server_key_file, private_pem(key))
            write_durably(server_file, public_pem(certificate), 0o644)
        return MarketIdentity(market_key, ca_file, server_file.read_bytes(), read_secret(server_key_file), found.trusted)


def served_names(home: Path) -> list[str]:
    """Return the names in the server's certificate; raise UsageError where there is none."""
    from cryptography import x509

    file = home / "server.crt"
    if not file.exists():
        raise UsageError(f"{home}: no market here yet", hint="`veilmart pki init` makes its authority")
    return _names_of(x509.load_pem_x509_certificate(file.read_bytes()))


def _make_server(
    found: Authorities, ca_key_file: Path, names: Sequence[str], now: datetime.datetime
) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key, general = new_tls_key(), [_general_name(name) for name in names]
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    return key, issue(found.serving, ca_key_file, key.public_key(), "veilmart market", general, usage, now, SERVER_DAYS)


def _general_name(name: str) -> x509.GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        if not HOST.fullmatch(host):
            hint = "an international name is written in its xn-- form"
            raise UsageError(f"name: expected a host name or an IP address, got {host!r}", hint=hint) from None
    return host.lower()


def _serves(server_file: Path, key_file: Path, ca: x509.Certificate, names: Sequence[str], now: datetime.datetime) -> bool:
    """Return whether the stored certificate can go on: a process that is killed between two files leaves a pair that cannot."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    if not server_file.exists() or not key_file.exists():
        return False
    try:
        certificate = x509.load_pem_x509_certificate(server_file.read_bytes())
        key = serialization.load_pem_private_key(read_secret(key_file), None)
        certificate.verify_directly_issued_by(ca)
    except (ValueError, InvalidSignature):
        return False
    left = certificate.not_valid_after_utc - now
    return _names_of(certificate) == names and key.public_key() == certificate.public_key() and left > datetime.timedelta(days=RENEW_DAYS)


def _names_of(certificate: x509.Certificate) -> list[str]:
    from cryptography import x509

    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return sorted(str(name.value) for name in extension.value)
