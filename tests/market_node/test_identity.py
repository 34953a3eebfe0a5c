import datetime

import pytest
from cryptography import x509

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
        market_identity(tmp_path, ("another.example",) if name == "ca.key" else (), NOW)
