"""An owner's certificate at a market: made with a fresh TLS key, kept beside the owner's key, renewed before it ends.

TLS key and certificate lie in one file, so that they always fit, and a lost one is simply made anew: who the owner is, its own key proves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nodes.known_market import AUTHORITY
from protocol.certificates import Name, Prove, issued_by, load_certificates, make_request, name_in, new_tls_key, proves
from protocol.errors import FormatError, UsageError
from protocol.keys import read_secret, signing_key, write_durably

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

FILE, PENDING = "tls.pem", "tls-request.key"
RENEW_S = 30 * 86_400  # a certificate with less left is renewed with the next call of a member


class Issuer(Protocol):
    """A market as a certificate needs it."""

    @property
    def ca(self) -> Path:
        """The file of the authorities that this client trusts."""
        ...

    def certify(self, request: bytes) -> tuple[bytes, bytes]:
        """Return a certificate and all authorities, PEM, signed by the market's key."""
        ...


class Membership:
    """The certificate of one owner, in the folder of its population.  prove: signs for a TLS key with the owner's key."""

    def __init__(self, folder: Path, owner: bytes, prove: Prove, now: Callable[[], float] = time.time) -> None:
        self._folder, self._owner, self._prove, self._now = folder, owner, prove, now

    @classmethod
    def of(cls, folder: Path) -> Membership:
        """Return the membership of the owner whose key lies in a population's folder."""
        key = signing_key(folder / "owner.key")
        return cls(folder, key.public_key().public_bytes_raw(), proves(key))

    @property
    def file(self) -> Path:
        """Where key and certificate lie, mode 0600."""
        return self._folder / FILE

    def held(self) -> x509.Certificate | None:
        """Return the certificate that is here, whatever its state; None where there is none.

        Raises UsageError for a file that others can read, FormatError for a damaged one.
        """
        return load_certificates(read_secret(self.file))[0] if self.file.exists() else None

    def usable(self, authorities: bytes) -> bool:
        """Return whether what is here is this owner's, of one of these authorities, and good for a while."""
        try:
            shown = self.held()
            if shown is None or name_in(shown) != Name(self._owner) or not issued_by(shown, authorities):
                return False
        except FormatError:
            return False
        begins, ends = shown.not_valid_before_utc.timestamp(), shown.not_valid_after_utc.timestamp()
        return begins <= self._now() < ends - min(RENEW_S, (ends - begins) / 3)

    def current(self, market: Issuer, market_key: bytes) -> bytes:
        """Return key and certificate, PEM; asks the market for new ones where what is here is not usable."""
        if not self.usable(market.ca.read_bytes()):
            self.renew(market, market_key)
        return read_secret(self.file)

    def renew(self, market: Issuer, market_key: bytes) -> None:
        """Get a certificate for a fresh TLS key, and learn the authorities that the market has by now."""
        key = new_tls_key()
        certificate, authorities = market.certify(self._request(key, market_key))
        self._keep(key, certificate, authorities)
        # A file that --ca names somewhere else is not ours to change.
        if market.ca.name == AUTHORITY and market.ca.read_bytes() != authorities:
            write_durably(market.ca, authorities, 0o644)

    def request(self, market_key: bytes) -> bytes:
        """Return a request for the operator to answer from a file; its TLS key waits here, and is another one each time."""
        key = new_tls_key()
        request = self._request(key, market_key)
        write_durably(self._folder / PENDING, _pem(key))
        return request

    def install(self, certificate: bytes, authorities: bytes) -> None:
        """Keep the certificate that answers the last `request`; raise UsageError or FormatError for any other."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        pending = self._folder / PENDING
        if not pending.exists():
            raise UsageError(f"{pending}: no certificate was asked for", hint="`veilmart node certificate --request FILE` comes first")
        key = serialization.load_pem_private_key(read_secret(pending), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._keep(key, certificate, authorities)
        pending.unlink()

    def _request(self, key: EllipticCurvePrivateKey, market_key: bytes) -> bytes:
        return make_request(key, self._owner, market_key, int(self._now()), self._prove)

    def _keep(self, key: EllipticCurvePrivateKey, certificate: bytes, authorities: bytes) -> None:
        from cryptography.hazmat.primitives import serialization

        shown = load_certificates(certificate)[0]
        if shown.public_key() != key.public_key() or name_in(shown) != Name(self._owner) or not issued_by(shown, authorities):
            raise FormatError("certificate: expected one for this owner and the key that was asked for, of this market's authority")
        write_durably(self.file, _pem(key) + shown.public_bytes(serialization.Encoding.PEM))


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
