"""Who may ask for a certificate: the holders of both keys, of this market, for one name."""

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import AttributeOID, NameOID

from protocol import certificates
from protocol.certificates import Name, make_request, new_tls_key, open_request, proof_bytes, proves, public_bytes
from protocol.errors import FormatError, InvalidSignature, VeilmartError
from tests.protocol.worlds import public

MARKET, NOW = b"\2" * 32, 1_800_000_000


@pytest.fixture
def owner():
    return Ed25519PrivateKey.generate()


def custom(tls_key, names, proof: str, signer=None) -> bytes:
    """A request that nothing of ours would make."""
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")]))
        .add_attribute(AttributeOID.CHALLENGE_PASSWORD, proof.encode())
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(signer or tls_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def proof_of(owner, tls_key, market=MARKET, asked=NOW) -> str:
    return f"{asked}:{proves(owner)(market, public_bytes(tls_key), asked).hex()}"


def uri(owner) -> x509.UniformResourceIdentifier:
    return x509.UniformResourceIdentifier(str(Name(public(owner))))


def test_a_request_says_whose_key_it_is_and_when_it_was_asked_for(owner):
    key = new_tls_key()
    asked = open_request(make_request(key, public(owner), MARKET, NOW, proves(owner)), MARKET)
    assert (asked.name, asked.public_key, asked.asked) == (Name(public(owner)), public_bytes(key), NOW)
    # `custom` makes the same, so what is refused below is refused for what is wrong with it.
    assert open_request(custom(key, [uri(owner)], proof_of(owner, key)), MARKET) == asked


def test_a_request_with_a_foreign_key_or_a_wrong_proof_is_refused(owner):
    key, other_tls, thief = new_tls_key(), new_tls_key(), Ed25519PrivateKey.generate()
    wrong = {
        "signed by another owner": proof_of(thief, key),
        "for another TLS key": proof_of(owner, other_tls),
        "for another market": proof_of(owner, key, market=b"\3" * 32),
        "asked at another time": f"{NOW + 1}:{proof_of(owner, key).partition(':')[2]}",
    }
    for proof in wrong.values():
        with pytest.raises(InvalidSignature):
            open_request(custom(key, [uri(owner)], proof), MARKET)
    with pytest.raises(InvalidSignature):
        open_request(make_request(key, public(owner), b"\3" * 32, NOW, proves(owner)), MARKET)


def test_a_request_that_its_tls_key_did_not_sign_is_refused(owner):
    key = new_tls_key()
    good = make_request(key, public(owner), MARKET, NOW, proves(owner))
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    import base64

    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(VeilmartError):
        open_request(forged, MARKET)


def test_a_request_without_exactly_one_name_of_a_node_is_refused(owner):
    key = new_tls_key()
    proof, market = proof_of(owner, key), x509.UniformResourceIdentifier(str(Name(MARKET, courier=True)))
    short = x509.UniformResourceIdentifier("veilmart://node/abcd")
    upper = x509.UniformResourceIdentifier(str(Name(b"\xab" * 32)).upper().replace("VEILMART://NODE", "veilmart://node"))
    for names in (
        [],
        [uri(owner), uri(Ed25519PrivateKey.generate())],
        [uri(owner), x509.DNSName("a")],
        [x509.DNSName("a")],
        [market],
        [short],
        [upper],
    ):
        with pytest.raises(FormatError):
            open_request(custom(key, names, proof), MARKET)


def test_other_bytes_and_other_kinds_of_keys_are_refused(owner):
    p384 = ec.generate_private_key(ec.SECP384R1())
    public_key = p384.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    proof = f"{NOW}:{owner.sign(proof_bytes(MARKET, public(owner), public_key, NOW)).hex()}"
    good = make_request(new_tls_key(), public(owner), MARKET, NOW, proves(owner))
    for wrong in (b"", b"x", good[:-60], custom(p384, [uri(owner)], proof), custom(new_tls_key(), [uri(owner)], "x"), good + bytes(5000)):
        with pytest.raises(FormatError):
            open_request(wrong, MARKET)


def test_an_answer_is_the_markets_own_and_for_this_request():
    key = Ed25519PrivateKey.generate()
    parts = (b"request", b"certificate", b"authorities")
    signature = certificates.sign_answer(key, *parts)
    certificates.verify_answer(public(key), *parts, signature)
    for place in range(3):
        with pytest.raises(InvalidSignature):
            certificates.verify_answer(public(key), *[b"x" if i == place else part for i, part in enumerate(parts)], signature)
    with pytest.raises(InvalidSignature):
        certificates.verify_answer(public(Ed25519PrivateKey.generate()), *parts, signature)


def test_control_a_market_that_reads_the_name_without_the_proof_certifies_an_impostor(owner, monkeypatch):
    """Without the proof the name in a request is whatever its sender wrote."""
    key, thief = new_tls_key(), Ed25519PrivateKey.generate()
    forged = custom(key, [uri(owner)], proof_of(thief, key))

    class Believing:
        @classmethod
        def from_public_bytes(cls, data):
            return cls()

        def verify(self, *_):
            return None

    from cryptography.hazmat.primitives.asymmetric import ed25519

    monkeypatch.setattr(ed25519, "Ed25519PublicKey", Believing)
    assert open_request(forged, MARKET).name == Name(public(owner))
