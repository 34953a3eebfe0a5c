import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from market_node.identity import market_identity
from protocol.errors import UsageError

NOW = datetime.datetime.now(datetime.UTC)


def test_the_identity_outlives_a_restart(tmp_path):
    first, second = (market_identity(tmp_path, (), NOW) for _ in range(2))
    assert first.server_certificate == second.server_certificate
    assert first.market_key.private_bytes_raw() == second.market_key.private_bytes_raw()


def test_a_new_name_gives_a_new_certificate_under_the_same_authority(tmp_path):
    market_identity(tmp_path, (), NOW)
    authority = (tmp_path / "ca.crt").read_bytes()
    certificate = x509.load_pem_x509_certificate(market_identity(tmp_path, ("market.example", "10.1.2.3"), NOW).server_certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "market.example" in names.get_values_for_type(x509.DNSName)
    assert (tmp_path / "ca.crt").read_bytes() == authority


@pytest.mark.parametrize("name", ["market.key", "ca.key", "server.key"])
def test_secret_files_are_the_owners_alone(tmp_path, name):
    market_identity(tmp_path, (), NOW)
    assert (tmp_path / name).stat().st_mode & 0o077 == 0
    (tmp_path / name).chmod(0o640)
    with pytest.raises(UsageError, match="0600"):
        market_identity(tmp_path, (), NOW)


def fits(identity) -> bool:
    certificate = x509.load_pem_x509_certificate(identity.server_certificate)
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(identity.ca_file.read_bytes()))
    return certificate.public_key() == serialization.load_pem_private_key(identity.server_key, None).public_key()


def test_a_market_killed_between_key_and_certificate_heals_at_the_next_start(tmp_path):
    newer = market_identity(tmp_path / "other", (), NOW).server_key
    market_identity(tmp_path, (), NOW)
    (tmp_path / "server.key").write_bytes(newer)
    assert fits(market_identity(tmp_path, (), NOW))
    (tmp_path / "server.key").unlink()
    assert fits(market_identity(tmp_path, (), NOW))


def test_a_server_certificate_is_renewed_before_it_ends(tmp_path):
    first = market_identity(tmp_path, (), NOW).server_certificate
    assert market_identity(tmp_path, (), NOW + datetime.timedelta(days=600)).server_certificate == first
    later = NOW + datetime.timedelta(days=720)
    renewed = x509.load_pem_x509_certificate(market_identity(tmp_path, (), later).server_certificate)
    assert renewed.not_valid_after_utc > later + datetime.timedelta(days=600)


def test_one_address_in_two_spellings_is_one_name(tmp_path):
    first = market_identity(tmp_path, ("2001:db8:0::1",), NOW).server_certificate
    for spelling in ("2001:db8:0::1", "2001:db8::1", "2001:DB8::1"):
        assert market_identity(tmp_path, (spelling,), NOW).server_certificate == first


@pytest.mark.parametrize("name", ["", "a b", "bücher.example", "*.example", "a..b", "x" * 64, "127.0.0.1\n"])
def test_what_is_no_host_name_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(UsageError, match="host name"):
        market_identity(tmp_path / "market", (name,), NOW)
    assert not (tmp_path / "market").exists()


def test_a_lost_or_damaged_authority_is_a_clear_error(tmp_path):
    market_identity(tmp_path, (), NOW)
    (tmp_path / "ca.key").unlink()
    assert fits(market_identity(tmp_path, (), NOW))  # an operator may keep it elsewhere until it is needed
    with pytest.raises(UsageError, match="missing"):
        market_identity(tmp_path, ("another.example",), NOW)
    (tmp_path / "ca.crt").write_bytes(b"not a certificate")
    with pytest.raises(UsageError, match="PEM"):
        market_identity(tmp_path, (), NOW)
