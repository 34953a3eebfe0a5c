"""Certificates of members: those that a market issued, which of them it revoked, and which calls they open.

The list lies in the market's database: a revocation that another process makes is seen by the next call, whatever connection it comes on.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, LargeBinary, String, Table, func, insert, or_, select, update

from market_node.authority import CERTIFICATE, COURIER_FILE, KEY, NEXT_KEY, alone, authorities, issue, private_pem, public_pem
from market_node.store import METADATA, Beside, Whole
from protocol.certificates import Name, Request, issued_by, load_certificates, name_in, new_tls_key, public_bytes, require_current
from protocol.errors import FormatError, NotFound, QuotaExceeded, Unauthorised
from protocol.keys import read_secret, write_durably

if TYPE_CHECKING:
    from cryptography import x509

NODE_DAYS, COURIER_DAYS = 90, 90
RENEW_DAYS = 30  # a courier's certificate with less left is made anew
CERTIFICATES_A_DAY = 20  # of one name
RENEWING = "`veilmart node certificate --renew` makes a new one"

ISSUED = Table(
    "certificate",
    METADATA,
    Column("serial", String(40), primary_key=True),  # hexadecimal
    Column("name", String, nullable=False),  # protocol/certificates.py
    Column("key_digest", LargeBinary(32), nullable=False),  # SHA-256 of the TLS key
    Column("issued", Whole, nullable=False),  # seconds since 1970
    Column("ends", Whole, nullable=False),
    Column("revoked", Whole),
)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued."""

    serial: str
    name: str
    key_digest: bytes
    issued: int
    ends: int
    revoked: int | None


class Certificates(Beside):
    """The certificates that one market issued; safe beside the running market, which shares the database."""

    def issue(self, request: Request, now: datetime.datetime, days: int = NODE_DAYS) -> tuple[bytes, bytes]:
        """Return a new certificate, noted durably before it is anybody's, and all authorities of this market, in PEM.

        Raises Unauthorised for a TLS key that was revoked, QuotaExceeded beyond so many a day of one name.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key = serialization.load_der_public_key(request.public_key)
        assert isinstance(key, ec.EllipticCurvePublicKey)
        with alone(self._home):
            found = authorities(self._home, now)
        file = self._home / (NEXT_KEY if found.until is not None else KEY)
        name, usage = x509.UniformResourceIdentifier(str(request.name)), ExtendedKeyUsageOID.CLIENT_AUTH
        made = issue(found.members, file, key, "veilmart node", [name], usage, now, days)
        self._note(made, request, int(now.timestamp()))
        return public_pem(made), found.trusted

    def _note(self, made: x509.Certificate, request: Request, now: int) -> None:
        name, digest = str(request.name), hashlib.sha256(request.public_key).digest()
        with self._readable(), self._writing.begin() as db:
            if db.execute(select(ISSUED.c.serial).where(ISSUED.c.key_digest == digest, ISSUED.c.revoked.is_not(None))).first():
                raise Unauthorised("certificate: its key was revoked", hint=RENEWING)
            lately = select(func.count()).where(ISSUED.c.name == name, ISSUED.c.issued > now - 86_400)
            if db.execute(lately).scalar_one() >= CERTIFICATES_A_DAY:
                raise QuotaExceeded(f"certificates: {CERTIFICATES_A_DAY} within a day are enough", retry_after_s=3600)
            ends = int(made.not_valid_after_utc.timestamp())
            db.execute(insert(ISSUED).values(serial=f"{made.serial_number:x}", name=name, key_digest=digest, issued=now, ends=ends))

    def revoke(self, digits: str, now: int) -> list[Issued]:
        """Return the certificates that are revoked now: all of an owner, or one, named by at least 8 first digits of key or serial number.

        Raises NotFound unless the digits name one owner, or one certificate.
        """
        digits = digits.lower()
        hits = [
            one for one in self.all() if len(digits) >= 8 and (one.serial.startswith(digits) or one.name.split("/")[-1].startswith(digits))
        ]
        if not hits or (len({one.name for one in hits}) > 1 or len({one.serial.startswith(digits) for one in hits}) > 1):
            raise NotFound(f"certificate {digits}: expected the first digits, at least 8, of one owner's key or one serial number")
        with self._readable(), self._writing.begin() as db:
            these = ISSUED.c.serial.in_([one.serial for one in hits])
            db.execute(update(ISSUED).where(these, ISSUED.c.revoked.is_(None)).values(revoked=now))
            return [Issued(*row) for row in db.execute(select(ISSUED).where(these).order_by(ISSUED.c.issued, ISSUED.c.serial))]

    def is_revoked(self, serial: str, key_digest: bytes) -> bool:
        """Return whether a certificate, or another one of the same TLS key, was revoked."""
        revoked = ISSUED.c.revoked.is_not(None)
        with self._readable(), self._engine.connect() as db:
            query = select(ISSUED.c.serial).where(or_(ISSUED.c.serial == serial, ISSUED.c.key_digest == key_digest), revoked)
            return db.execute(query).first() is not None

    def all(self) -> list[Issued]:
        """Return all certificates, in the order in which they were issued."""
        with self._readable(), self._engine.connect() as db:
            return [Issued(*row) for row in db.execute(select(ISSUED).order_by(ISSUED.c.issued, ISSUED.c.serial))]


class Gate:
    """Who may make calls of members: whoever comes over the members' port under a certificate of the owner that the call speaks for."""

    def __init__(self, certificates: Certificates, home: Path, port: int, look: Callable[[], None] = lambda: None) -> None:
        """look: lets the ports read the authorities again."""
        self._certificates, self._authorities, self._look = certificates, home / CERTIFICATE, look
        self._trusted = b""
        self.port = port

    def issue(self, request: Request, now: datetime.datetime) -> tuple[bytes, bytes]:
        """Return a certificate and all authorities, in PEM; what it is of is trusted by then."""
        made, trusted = self._certificates.issue(request, now)
        if trusted != self._trusted:
            self._look()
            self._trusted = trusted
        return made, trusted

    def caller(self, certificate: bytes, now: int) -> Name:
        """Return whom a connection's certificate, PEM, stands for at this moment.

        TLS looked at it when the connection began; here it is looked at with every call: it may have ended or been revoked since.
        Raises Unauthorised where there is none, or none that is good.
        """
        if not certificate:
            raise Unauthorised(
                f"members: this market takes it on port {self.port} alone, under a certificate",
                hint="`veilmart node join` or `veilmart node certificate --renew` gets one; an older veilmart knows no certificates",
            )
        try:
            shown, digest, name, known = _read(certificate, self._authorities.read_bytes())
        except FormatError as error:
            raise Unauthorised(str(error)) from None
        if not known:
            raise Unauthorised("certificate: of another authority than this market's", hint=RENEWING)
        require_current(shown, now)
        if self._certificates.is_revoked(f"{shown.serial_number:x}", digest):
            raise Unauthorised("certificate: it was revoked", hint=f"ask the operator why; {RENEWING}")
        return name

    def require(self, certificate: bytes, owner: bytes, now: int, *, courier: bytes | None = None) -> None:
        """Raise Unauthorised unless the caller is this owner, or the courier of this market where one may come."""
        name = self.caller(certificate, now)
        if name.courier:
            if name.key != courier:
                raise Unauthorised("certificate: a courier hands in releases and nothing else")
        elif name.key != owner:
            raise Unauthorised("certificate: it stands for another owner than the one who signed", hint="--population names your other key")


@functools.lru_cache(maxsize=1024)  # by connection, not by call: a signature takes a tenth of a millisecond
def _read(certificate: bytes, trusted: bytes) -> tuple[x509.Certificate, bytes, Name, bool]:
    """Return a certificate, the digest of its key, its name, and whether it is of one of these authorities."""
    from cryptography.hazmat.primitives import serialization

    shown = load_certificates(certificate)[0]
    public = shown.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return shown, hashlib.sha256(public).digest(), name_in(shown), issued_by(shown, trusted)


def certificate_of(context: Any) -> bytes:
    """Return the certificate that a call's connection showed, PEM; empty where none was asked for."""
    shown = context.auth_context().get("x509_pem_cert", [])
    return bytes(shown[0]) if shown else b""


def courier(home: Path, market_key: bytes, now: datetime.datetime) -> Path:
    """Return the file of key and certificate, mode 0600, under which a market's campaigns hand in what nodes signed; made or renewed."""
    file = home / COURIER_FILE
    if file.exists():
        shown = load_certificates(read_secret(file))[0]
        left = shown.not_valid_after_utc - now
        if left > datetime.timedelta(days=RENEW_DAYS) and issued_by(shown, (home / CERTIFICATE).read_bytes()):
            return file
    key, certificates = new_tls_key(), Certificates.open(home)
    try:
        request = Request(Name(market_key, courier=True), public_bytes(key), int(now.timestamp()))
        made, _ = certificates.issue(request, now, COURIER_DAYS)
    finally:
        certificates.close()
    write_durably(file, private_pem(key) + made)
    return file
