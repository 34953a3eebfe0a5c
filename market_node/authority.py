"""The authority of a market: who may issue its certificates, how one authority follows another, and what it issues.

ca.key, ca.crt    the authority that issues the server's certificate; during a rotation `ca.crt` holds the next one too: both are trusted
ca-next.key       during a rotation: the next authority, which issues members' certificates already
ca-next.until     when the next one takes the place, in seconds since 1970

Whoever holds `ca.crt` trusts all that is in it, so the overlap is the time to hand it out anew.
"""

from __future__ import annotations

import datetime
import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.certificates import load_certificates, new_tls_key
from protocol.errors import FormatError, UsageError
from protocol.keys import read_secret, write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.x509 import ObjectIdentifier

CA_DAYS = 3650
CERTIFICATE, KEY, NEXT_KEY, UNTIL = "ca.crt", "ca.key", "ca-next.key", "ca-next.until"
COURIER_FILE = "courier.pem"  # certificate and key of the market's own campaigns (market_node/certificates.py)


@dataclass(frozen=True, slots=True)
class Authority:
    """One authority.  Its key may be kept elsewhere until something is issued."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey | None

    def require_key(self, file: Path) -> EllipticCurvePrivateKey:
        """Return the key; raise UsageError where it is not at hand."""
        if self.key is None:
            raise UsageError(f"{file}: missing, and a certificate has to be issued", hint="restore it from a backup")
        return self.key


@dataclass(frozen=True, slots=True)
class Authorities:
    """Who issues what at a moment."""

    serving: Authority  # the server's certificates
    members: Authority  # members' certificates: the next one as soon as there is one
    trusted: bytes  # PEM of all that are trusted
    until: int | None  # end of the overlap, in seconds since 1970; None outside a rotation


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """Let no other process change certificates meanwhile."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "pki.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def authorities(home: Path, now: datetime.datetime, *, change: bool = True) -> Authorities:
    """Return the authorities of a market, the first made on first use; `alone` is held.

    change: whether a rotation whose overlap is over is finished; without it what is there is read.
    Raises UsageError for key files that others can read, or of another authority, and for a damaged certificate.
    """
    file = home / CERTIFICATE
    if not file.exists():
        key, certificate = _make(now)
        write_durably(home / KEY, private_pem(key))
        write_durably(file, public_pem(certificate), 0o644)
    certificates = _certificates(file)
    serving, following = _key(home / KEY), _key(home / NEXT_KEY)
    until = int((home / UNTIL).read_text()) if following is not None and len(certificates) > 1 else None
    if change and until is not None and following is not None and now.timestamp() >= until and not _fits(serving, certificates[-1]):
        write_durably(home / KEY, private_pem(following))
        serving = following
    if len(certificates) > 1 and _fits(serving, certificates[-1]):
        # Killed anywhere in here, the same goes on next time: the key says which authority serves.
        certificates, until = certificates[-1:], None
        if change:
            write_durably(file, public_pem(certificates[0]), 0o644)
            for name in (NEXT_KEY, UNTIL):
                (home / name).unlink(missing_ok=True)
    if serving is not None and not _fits(serving, certificates[0]):
        raise UsageError(f"{home / KEY}: not the key of {file}", hint="restore both from one backup")
    first = Authority(certificates[0], serving)
    members = Authority(certificates[-1], following) if len(certificates) > 1 else first
    return Authorities(first, members, b"".join(map(public_pem, certificates)), until)


def rotate(home: Path, now: datetime.datetime, overlap: datetime.timedelta) -> Authorities:
    """Let another authority follow after an overlap, in which both are trusted; `alone` is held.  None ends a rotation at once."""
    found = authorities(home, now)
    until = int((now + overlap).timestamp())
    if found.until is not None and overlap:
        ends = datetime.datetime.fromtimestamp(found.until, datetime.UTC)
        raise UsageError(
            f"{home / CERTIFICATE}: a rotation goes on until {ends:%Y-%m-%d %H:%M} UTC", hint="--overlap-days 0 ends it now, for everybody"
        )
    if found.until is None:
        found.serving.require_key(home / KEY)
        key, certificate = _make(now)
        write_durably(home / NEXT_KEY, private_pem(key))
        write_durably(home / UNTIL, f"{until}\n".encode(), 0o644)
        write_durably(home / CERTIFICATE, found.trusted + public_pem(certificate), 0o644)  # last: from here on there are two
    else:
        write_durably(home / UNTIL, f"{until}\n".encode(), 0o644)
    return authorities(home, now)


def issue(
    authority: Authority, file: Path, public_key: EllipticCurvePublicKey, subject: str, names: Sequence[x509.GeneralName],
    usage: ObjectIdentifier, now: datetime.datetime, days: int,
) -> x509.Certificate:  # fmt: skip
    """Return a certificate for one use.  file: where the authority's key lies, for the error that it is missing."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key = authority.require_key(file)
    return (
        _builder(now, days)
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(authority.certificate.subject)
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def private_pem(key: EllipticCurvePrivateKey) -> bytes:
    """Return a key as it lies in its file."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def public_pem(certificate: x509.Certificate) -> bytes:
    """Return a certificate as it lies in its file."""
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _certificates(file: Path) -> list[x509.Certificate]:
    try:
        return load_certificates(file.read_bytes())
    except FormatError:
        raise UsageError(f"{file}: expected a PEM certificate", hint="restore it from a backup") from None


def _key(file: Path) -> EllipticCurvePrivateKey | None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not file.exists():
        return None
    try:
        key = serialization.load_pem_private_key(read_secret(file), None)
    except ValueError:
        raise UsageError(f"{file}: expected a PEM key", hint="restore it from a backup") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{file}: expected a key on P-256", hint="restore it from a backup")
    return key


def _fits(key: EllipticCurvePrivateKey | None, certificate: x509.Certificate) -> bool:
    return key is not None and key.public_key() == certificate.public_key()


def _make(now: datetime.datetime) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    key = new_tls_key()
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
