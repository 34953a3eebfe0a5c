"""Certificates of members: which key a TLS connection stands for, and how an owner proves that it is its own (docs/protocol.md 6.25).

name     the one entry of a certificate's subject alternative names, a URI: a member's key, or the market's own, which carries envelopes
request  PKCS#10 with that name, signed by the TLS key, and in it the owner's proof: its signature over market, TLS key and time
answer   the certificate and the authorities of the market, signed by the key that signs the market's catalogue

TLS keys are ECDSA on P-256: gRPC's TLS knows no Ed25519 certificates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.codec import domain_tag
from protocol.errors import FormatError, InvalidSignature, Unauthorised

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

PROOF = domain_tag("certificate-request", 1)
ANSWER = domain_tag("certificate", 1)
MAX_REQUEST_BYTES = 4096
NODE, COURIER = "veilmart://node/", "veilmart://courier/"
Prove = Callable[[bytes, bytes, int], bytes]  # market key, TLS key, time -> the owner's signature


@dataclass(frozen=True, slots=True)
class Name:
    """Whom a certificate stands for: a node of an owner, or the courier of a market, which hands in what others signed."""

    key: bytes  # Ed25519
    courier: bool = False

    def __str__(self) -> str:
        return (COURIER if self.courier else NODE) + self.key.hex()

    @classmethod
    def parse(cls, text: str) -> Name:
        """Return the name of its URI; raise FormatError for any other."""
        for prefix in (NODE, COURIER):
            digits = text.removeprefix(prefix)
            if digits != text and len(digits) == 64 and set(digits) <= set("0123456789abcdef"):
                return cls(bytes.fromhex(digits), prefix == COURIER)
        raise FormatError("certificate: expected the name of a node in it")


@dataclass(frozen=True, slots=True)
class Request:
    """What a certificate is asked for; its proof was verified."""

    name: Name
    public_key: bytes  # SubjectPublicKeyInfo, DER
    asked: int  # seconds since 1970


def name_in(certificate: x509.Certificate | x509.CertificateSigningRequest) -> Name:
    """Return the name in a certificate or request; raise FormatError unless there is exactly one, and nothing beside it."""
    from cryptography import x509

    try:
        names = list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        names = []
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise FormatError("certificate: expected exactly one name in it, a URI")
    return Name.parse(names[0].value)


def new_tls_key() -> EllipticCurvePrivateKey:
    """Return a fresh key for TLS."""
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def public_bytes(key: EllipticCurvePrivateKey) -> bytes:
    """Return the public half of a TLS key, as requests and proofs speak of it."""
    from cryptography.hazmat.primitives import serialization

    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def proof_bytes(market_key: bytes, owner: bytes, public_key: bytes, asked: int) -> bytes:
    """Return what an owner signs: that this TLS key speaks for it, at this market alone, asked for at this time."""
    return PROOF + market_key + owner + asked.to_bytes(8, "little") + hashlib.sha256(public_key).digest()


def proves(owner_key: Ed25519PrivateKey) -> Prove:
    """Return how the holder of an owner's key proves a TLS key to be its own."""
    owner = owner_key.public_key().public_bytes_raw()
    return lambda market_key, public_key, asked: owner_key.sign(proof_bytes(market_key, owner, public_key, asked))


def make_request(tls_key: EllipticCurvePrivateKey, owner: bytes, market_key: bytes, asked: int, prove: Prove) -> bytes:
    """Return a request for a certificate, PEM.  The proof travels in it, so a file says as much as a call."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import AttributeOID, NameOID

    proof = prove(market_key, public_bytes(tls_key), asked)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "veilmart node")]))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(Name(owner)))]), critical=False)
        .add_attribute(AttributeOID.CHALLENGE_PASSWORD, f"{asked}:{proof.hex()}".encode())
        .sign(tls_key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def open_request(data: bytes, market_key: bytes) -> Request:
    """Return what is asked for; raise FormatError or InvalidSignature unless the holders of both keys asked this market for it."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.x509.oid import AttributeOID

    if len(data) > MAX_REQUEST_BYTES:
        raise FormatError(f"certificate request: expected at most {MAX_REQUEST_BYTES} bytes, got {len(data)}")
    try:
        request = x509.load_pem_x509_csr(data)
        key = request.public_key()
        text = request.attributes.get_attribute_for_oid(AttributeOID.CHALLENGE_PASSWORD).value.decode("ascii")
        said, _, digits = text.partition(":")
        asked, proof = int(said[:16]), bytes.fromhex(digits)
        signed = request.is_signature_valid
    except (ValueError, x509.AttributeNotFound, x509.InvalidVersion, UnsupportedAlgorithm):
        raise FormatError("certificate request: expected PKCS#10 in PEM with an owner's proof") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError("certificate request: expected a key on P-256")
    name = name_in(request)
    if name.courier or not 0 <= asked < 1 << 62:
        raise FormatError("certificate request: expected a node's name and a time")
    if not signed:
        raise InvalidSignature("certificate request: not signed by the key that it asks for")
    public_key = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        Ed25519PublicKey.from_public_bytes(name.key).verify(proof, proof_bytes(market_key, name.key, public_key, asked))
    except (BadSignature, ValueError):
        raise InvalidSignature("certificate request: the owner's proof does not verify") from None
    return Request(name, public_key, asked)


def _answer_bytes(request: bytes, certificate: bytes, authorities: bytes) -> bytes:
    return ANSWER + b"".join(hashlib.sha256(part).digest() for part in (request, certificate, authorities))


def sign_answer(market_key: Ed25519PrivateKey, request: bytes, certificate: bytes, authorities: bytes) -> bytes:
    """Return the market's signature over its answer to a request."""
    return market_key.sign(_answer_bytes(request, certificate, authorities))


def verify_answer(market_key: bytes, request: bytes, certificate: bytes, authorities: bytes, signature: bytes) -> None:
    """Raise InvalidSignature unless the market's own key signed this answer: an authority alone cannot name its successor."""
    from cryptography.exceptions import InvalidSignature as BadSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(market_key).verify(signature, _answer_bytes(request, certificate, authorities))
    except (BadSignature, ValueError):
        raise InvalidSignature("certificate: the market's signature under it does not verify") from None


def load_certificates(data: bytes) -> list[x509.Certificate]:
    """Return the certificates of PEM bytes; raise FormatError where there is none."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise FormatError("certificate: expected PEM") from None


def issued_by(certificate: x509.Certificate, authorities: bytes) -> bool:
    """Return whether one of these authorities, PEM, signed a certificate."""
    from cryptography.exceptions import InvalidSignature as BadSignature

    for authority in load_certificates(authorities):
        try:
            certificate.verify_directly_issued_by(authority)
        except (BadSignature, ValueError, TypeError):
            continue
        return True
    return False


def require_current(certificate: x509.Certificate, now: int) -> None:
    """Raise Unauthorised outside a certificate's time."""
    if not certificate.not_valid_before_utc.timestamp() <= now < certificate.not_valid_after_utc.timestamp():
        raise Unauthorised("certificate: it is not valid now", hint="`veilmart node certificate --renew`, and look at the clocks")
