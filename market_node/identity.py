"""What a market is known by: the key that signs its catalogue, and the certificate of its TLS server."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.errors import UsageError
from protocol.keys import read_secret, signing_key, write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

CA_DAYS, SERVER_DAYS = 3650, 730
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


def market_identity(home: Path, hosts: Sequence[str], now: datetime.datetime) -> MarketIdentity:
    """Return the identity kept in a folder, made on first use.

    A server certificate for other hosts, that ends soon, or that does not fit its key or authority is made anew under the same authority.
    TLS keys are ECDSA on P-256, since gRPC's TLS knows no Ed25519 certificates.
    Raises UsageError for key files that others can read, a missing or damaged authority, and names that are no host names.
    """
    ca_file, ca_key_file = home / "ca.crt", home / "ca.key"
    names = sorted({_canonical(host) for host in (*LOOPBACK, *hosts)})
    market_key = signing_key(home / "market.key")
    if not ca_file.exists():
        key, certificate = _make_authority(now)
        write_durably(ca_key_file, _pem(key))
        write_durably(ca_file, _public_pem(certificate), 0o644)
    elif ca_key_file.exists():
        read_secret(ca_key_file)  # not needed today, but whoever could read it can be this market tomorrow
    server_file, server_key_file = home / "server.crt", home / "server.key"
    if not _serves(server_file, server_key_file, ca_file, names, now):
        if not ca_key_file.exists():
            raise UsageError(f"{ca_key_file}: missing, and a new server certificate is needed", hint="restore it from a backup")
        key, certificate = _make_server(read_secret(ca_key_file), ca_file.read_bytes(), names, now)
        write_durably(server_key_file, _pem(key))
        write_durably(server_file, _public_pem(certificate), 0o644)
    return MarketIdentity(market_key, ca_file, server_file.read_bytes(), read_secret(server_key_file))


def _make_authority(now: datetime.datetime) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "veilmart market authority")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(now, CA_DAYS)
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _make_server(
    ca_key_pem: bytes, ca_pem: bytes, names: Sequence[str], now: datetime.datetime
) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    ca_key = serialization.load_pem_private_key(ca_key_pem, None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    ca = x509.load_pem_x509_certificate(ca_pem)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(now, SERVER_DAYS)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "veilmart market")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return key, certificate


def _builder(now: datetime.datetime, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    # Clients' clocks may be a little behind.
    start = now - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        key_cert_sign=signs_certificates, crl_sign=signs_certificates, encipher_only=False, decipher_only=False,
    )  # fmt: skip


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


def _serves(server_file: Path, key_file: Path, ca_file: Path, names: Sequence[str], now: datetime.datetime) -> bool:
    """Return whether the stored certificate can go on: a process that is killed between two files leaves a pair that cannot."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    try:
        ca = x509.load_pem_x509_certificate(ca_file.read_bytes())
    except ValueError:
        raise UsageError(f"{ca_file}: expected a PEM certificate", hint="restore it from a backup") from None
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


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _public_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)
