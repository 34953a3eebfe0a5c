"""The port for members: which certificates open it, for what, until when, and how one authority follows another."""

import contextlib
import datetime
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID

from market_node.authority import KEY, NEXT_KEY, alone, authorities, issue, private_pem, public_pem, rotate
from market_node.certificates import CERTIFICATES_A_DAY, Certificates, Gate, _read, courier
from market_node.doors import Doors
from market_node.identity import market_identity
from market_node.members import Members
from nodes.market_client import MarketClient
from nodes.membership import FILE, Membership
from protocol import channel
from protocol.certificates import Name, load_certificates, make_request, new_tls_key, proves
from protocol.enrolment import Invite
from protocol.errors import (
    FormatError,
    InvalidSignature,
    MarketUnreachable,
    NotFound,
    QuotaExceeded,
    Unauthorised,
    UsageError,
    VeilmartError,
)
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import AdapterReference, open_envelope
from protocol.wire import market_pb2 as pb
from protocol.wire.market_pb2_grpc import MarketStub
from tests.commands import run
from tests.market_node.market import running_market
from tests.nodes.guard_processes import wait_for
from tests.protocol.worlds import adapter_bytes, envelope_of, public, small_map

MAP = small_map()
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@dataclass
class Owner:
    """A member with a home."""

    key: Ed25519PrivateKey
    home: Path
    address: str
    ca: Path

    @property
    def folder(self) -> Path:
        return self.home / "node"

    @property
    def membership(self) -> Membership:
        return Membership.of(self.folder)

    def client(self) -> MarketClient:
        return MarketClient(self.address, self.ca, self.home, self.membership)

    def release(self, seed=1, **how) -> bytes:
        return envelope_of(MAP, self.key, seed=seed, **how)


@dataclass
class World:
    """A running market with a port for members."""

    address: str
    ca: Path
    home: Path  # of the operator; the market's folder lies below
    root: Path

    @property
    def market_home(self) -> Path:
        return self.home / "market"

    @property
    def market_key(self) -> bytes:
        return public(market_identity(self.market_home, (), NOW, renew=False).market_key)

    def owner(self, name: str, enrolled: bool = True) -> Owner:
        key, home = Ed25519PrivateKey.generate(), self.root / name
        (home / "node").mkdir(parents=True)
        (home / "node" / "owner.key").write_bytes(key.private_bytes_raw())
        (home / "node" / "owner.key").chmod(0o600)
        (home / "market-ca.crt").write_bytes(self.ca.read_bytes())
        if enrolled:
            members = Members.open(self.market_home)
            members.enrol(members.invite(name, int(time.time()) + 1000), public(key), "", int(time.time()))
            members.close()
        return Owner(key, home, self.address, home / "market-ca.crt")

    def revoke(self, digits: str) -> list:
        certificates = Certificates.open(self.market_home)
        try:
            return certificates.revoke(digits, int(time.time()))
        finally:
            certificates.close()

    def members_port(self) -> int:
        with MarketClient(self.address, self.ca, self.root / "asker") as client:
            return client.describe().members_port

    @contextlib.contextmanager
    def stub(self, own: bytes, ca: Path | None = None):
        """Speak to the members' port under a certificate that nobody looked at before."""
        where = f"127.0.0.1:{self.members_port()}"
        with channel.connect(where, ca or self.ca, own) as made:
            yield MarketStub(made)


@contextlib.contextmanager
def world_in(root: Path, **how):
    with running_market(root / "operator" / "market", MAP, enrolled_only=True, members_port=True, **how) as (address, ca, _):
        yield World(address, ca, root / "operator", root)


@pytest.fixture
def world(tmp_path):
    with world_in(tmp_path) as made:
        yield made


def published(stub, envelope: bytes) -> pb.Receipt:
    return stub.Publish(pb.PublishRequest(envelope=envelope), timeout=30)


def refused(call) -> VeilmartError:
    """Return the error that a call ends with."""
    import grpc

    with pytest.raises(grpc.RpcError) as caught:
        call()
    return channel.error_from_status(caught.value)


def forged(
    home: Path, names, *, start=-1.0, days=30, usage=ExtendedKeyUsageOID.CLIENT_AUTH, key=None,
) -> bytes:  # fmt: skip
    """Return key and certificate that a market's authority issued without looking at anything."""
    with alone(home):
        found = authorities(home, NOW)
    key = key or new_tls_key()
    general = [x509.UniformResourceIdentifier(str(name)) if isinstance(name, Name) else name for name in names]
    made = issue(found.members, home / KEY, key.public_key(), "x", general, usage, NOW + start * DAY, days)
    return private_pem(key) + public_pem(made)


# Who comes in ------------------------------------------------------------------------------------------------------------


def test_a_member_publishes_through_its_port_without_being_told_of_it(world):
    owner = world.owner("city")
    with owner.client() as client:
        release_id = open_envelope(client.publish(owner.release()).envelope).release_id
        notice = Notice(Kind.WITHDRAWAL, world.market_key, public(owner.key), (release_id,))
        assert client.submit(sign_notice(notice, owner.key)) == 0
    held = owner.membership.held()
    assert (owner.folder / FILE).stat().st_mode & 0o777 == 0o600
    assert 89 < (held.not_valid_after_utc - NOW) / DAY < 91
    with MarketClient(world.address, world.ca, world.root / "querier") as querier:  # who asks shows nothing
        assert len(querier.sync(MAP)) == 1


def test_calls_of_members_are_refused_at_the_port_for_everybody(world):
    owner = world.owner("city")
    with MarketClient(world.address, world.ca, owner.home) as client:
        with pytest.raises(Unauthorised, match=r"members' port|port \d+ alone"):
            client.publish(owner.release())
        with pytest.raises(Unauthorised, match=r"port \d+ alone"):
            client.upload_adapter(AdapterReference(bytes(32), 10), bytes(10))
        notice = sign_notice(Notice(Kind.WITHDRAWAL, world.market_key, public(owner.key), (bytes(32),)), owner.key)
        with pytest.raises(Unauthorised, match=r"port \d+ alone"):
            client.submit(notice)
        assert isinstance(refused(lambda: next(client.relay(iter([]), 20.0))), Unauthorised)
        assert client.describe().head.size == 0


def test_the_port_for_members_is_closed_to_certificates_that_are_none(world, tmp_path):
    """Refused while the connection is made: none at all, another authority's, one that ended, one of tomorrow, the server's own kind."""
    owner = world.owner("city")
    name = Name(public(owner.key))
    market_identity(tmp_path / "elsewhere", (), NOW)
    wrong = {
        "none": None,
        "another authority's": forged(tmp_path / "elsewhere", [name]),
        "ended": forged(world.market_home, [name], start=-40, days=30),
        "not yet valid": forged(world.market_home, [name], start=+2),
        "for servers": forged(world.market_home, [name], usage=ExtendedKeyUsageOID.SERVER_AUTH),
    }
    for why, own in wrong.items():
        with world.stub(own) as stub:
            assert isinstance(refused(lambda stub=stub: published(stub, owner.release())), MarketUnreachable), why
    with world.stub(forged(world.market_home, [name])) as stub:
        assert published(stub, owner.release()).index == 0, "the same without what was wrong is taken"


def test_one_certificate_stands_for_one_owner_and_nobody_else(world):
    owner, impostor = world.owner("city"), world.owner("mallory")
    with impostor.client() as client:
        with pytest.raises(Unauthorised, match="another owner"):
            client.publish(owner.release())
        notice = sign_notice(Notice(Kind.WITHDRAWAL, world.market_key, public(owner.key), (bytes(32),)), owner.key)
        with pytest.raises(Unauthorised, match="another owner"):
            client.submit(notice)
        assert client.describe().head.size == 0
        client.publish(impostor.release())


def test_an_adapter_is_taken_from_the_owner_of_its_release(world):
    owner, impostor, data = world.owner("city"), world.owner("mallory"), adapter_bytes()
    adapter = AdapterReference(hashlib.sha256(data).digest(), len(data))
    with owner.client() as client:
        client.publish(owner.release(adapter=adapter))
    with impostor.client() as client, pytest.raises(Unauthorised, match="no release of yours"):
        client.upload_adapter(adapter, data)
    with owner.client() as client:
        client.upload_adapter(adapter, data)
        assert client.download_adapter(adapter) == data


class TrustingGate(Gate):
    """What a market does that trusts every certificate of its authority: it never looks whom one stands for."""

    def require(self, certificate, owner, now, *, courier=None):
        self.caller(certificate, now)


def test_control_a_market_that_trusts_any_certificate_of_its_authority_lets_the_impostor_through(tmp_path):
    with world_in(tmp_path, gate_type=TrustingGate) as world:
        owner, impostor = world.owner("city"), world.owner("mallory")
        with impostor.client() as client:
            client.publish(owner.release())


@pytest.mark.parametrize("names", ["two owners", "an owner and a host", "a host", "none of ours"])
def test_a_certificate_without_exactly_one_name_opens_nothing(world, names):
    owner, other = world.owner("city"), world.owner("town")
    mine, theirs, host = Name(public(owner.key)), Name(public(other.key)), x509.DNSName("city.example")
    shown = {
        "two owners": [mine, theirs], "an owner and a host": [mine, host], "a host": [host],
        "none of ours": [x509.UniformResourceIdentifier("https://city.example/")],
    }[names]  # fmt: skip
    with world.stub(forged(world.market_home, shown)) as stub:
        error = refused(lambda: published(stub, owner.release()))
    assert isinstance(error, Unauthorised)


def test_whoever_is_no_member_gets_no_certificate_and_opens_nothing(world):
    stranger = world.owner("stranger", enrolled=False)
    with stranger.client() as client, pytest.raises(Unauthorised, match="not enrolled"):
        client.publish(stranger.release())
    assert not (stranger.folder / FILE).exists()
    with world.stub(forged(world.market_home, [Name(public(stranger.key))])) as stub:  # who was removed has one still
        assert "not enrolled" in str(refused(lambda: published(stub, stranger.release())))


def test_a_market_without_the_port_certifies_nobody_and_takes_releases_as_before(tmp_path):
    with running_market(tmp_path / "operator" / "market", MAP, enrolled_only=True) as (address, ca, _):
        owner = World(address, ca, tmp_path / "operator", tmp_path).owner("city")
        with owner.client() as client:
            client.publish(owner.release())
            with pytest.raises(UsageError, match="no port for members"):
                owner.membership.renew(client, client.market_key)
    assert not (owner.folder / FILE).exists()


# Revocation and time -----------------------------------------------------------------------------------------------------


def test_a_revoked_certificate_is_refused_on_the_connection_that_is_open(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.publish(owner.release(1))
        (gone,) = world.revoke(public(owner.key).hex()[:8])
        assert gone.revoked
        with pytest.raises(Unauthorised, match="revoked"):
            client.publish(owner.release(2, number=2))
    with owner.client() as client, pytest.raises(Unauthorised, match="revoked"):  # and on a new one
        client.publish(owner.release(2, number=2))
    with owner.client() as client:  # who still has the owner's key gets another, for another TLS key
        owner.membership.renew(client, world.market_key)
        client.publish(owner.release(2, number=2))


def test_an_owner_hears_of_its_certificate_before_it_pays_for_a_release(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.knock()
        world.revoke(public(owner.key).hex())
        with pytest.raises(Unauthorised, match="revoked"):
            client.knock()
    with MarketClient(world.address, world.ca, world.root / "querier") as querier:
        querier.knock()  # who shows none is not looked at


class ForgetfulGate(Gate):
    """What a market does that leaves certificates to TLS: what was good when the connection began is good for ever."""

    def __init__(self, *args):
        super().__init__(*args)
        self._seen = {}

    def caller(self, certificate, now):
        if certificate not in self._seen:
            self._seen[certificate] = super().caller(certificate, now)
        return self._seen[certificate]


def test_control_a_market_that_looks_once_a_connection_takes_what_was_revoked(tmp_path):
    with world_in(tmp_path, gate_type=ForgetfulGate) as world:
        owner = world.owner("city")
        with owner.client() as client:
            client.publish(owner.release(1))
            world.revoke(public(owner.key).hex()[:8])
            client.publish(owner.release(2, number=2))


def test_a_revocation_outlives_a_restart(tmp_path):
    with world_in(tmp_path) as world:
        owner = world.owner("city")
        with owner.client() as client:
            client.publish(owner.release(1))
        world.revoke(public(owner.key).hex())
    with world_in(tmp_path) as world, MarketClient(world.address, owner.ca, owner.home, owner.membership) as client:
        with pytest.raises(Unauthorised, match="revoked"):
            client.publish(owner.release(2, number=2))


def test_a_revoked_key_is_never_certified_again(world):
    owner, key = world.owner("city"), new_tls_key()
    request = make_request(key, public(owner.key), world.market_key, int(time.time()), proves(owner.key))
    with owner.client() as client:
        made, _ = client.certify(request)
        serial = f"{load_certificates(made)[0].serial_number:x}"
        assert [one.serial for one in world.revoke(serial)] == [serial]
        with pytest.raises(Unauthorised, match="its key was revoked"):
            client.certify(make_request(key, public(owner.key), world.market_key, int(time.time()), proves(owner.key)))


def test_a_certificate_that_ends_on_an_open_connection_is_refused_from_then_on(world):
    owner = world.owner("city")
    own = forged(world.market_home, [Name(public(owner.key))], start=-1, days=2)
    shown = own[own.index(b"-----BEGIN CERTIFICATE-----") :]
    certificates = Certificates.open(world.market_home)
    gate, now = Gate(certificates, world.market_home, 1), int(NOW.timestamp())
    try:
        assert gate.caller(shown, now) == Name(public(owner.key))
        for when in (now + 3 * 86_400, now - 3 * 86_400):
            with pytest.raises(Unauthorised, match="not valid now"):
                gate.caller(shown, when)
    finally:
        certificates.close()


@pytest.mark.parametrize("off", [-7200, 7200])
def test_a_request_of_another_time_is_refused(world, off):
    owner = world.owner("city")
    request = make_request(new_tls_key(), public(owner.key), world.market_key, int(time.time()) + off, proves(owner.key))
    with owner.client() as client, pytest.raises(UsageError, match="clock"):
        client.certify(request)


def test_a_request_whose_proof_is_another_owners_is_refused(world):
    owner, impostor = world.owner("city"), world.owner("mallory")
    request = make_request(new_tls_key(), public(owner.key), world.market_key, int(time.time()), proves(impostor.key))
    with impostor.client() as client, pytest.raises(InvalidSignature, match="proof"):
        client.certify(request)


def test_one_owner_gets_so_many_certificates_a_day(world):
    owner = world.owner("city")
    with owner.client() as client:
        for _ in range(CERTIFICATES_A_DAY):
            owner.membership.renew(client, world.market_key)
        with pytest.raises(QuotaExceeded) as caught:
            owner.membership.renew(client, world.market_key)
    assert caught.value.retry_after_s == 3600
    with (other := world.owner("town")).client() as client:
        client.publish(other.release())


def test_a_certificate_is_renewed_a_month_before_it_ends_and_not_sooner(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.publish(owner.release(1))
        first = owner.membership.held().serial_number
        client.publish(owner.release(2, number=2))
        assert owner.membership.held().serial_number == first
    later = Membership(owner.folder, public(owner.key), proves(owner.key), now=lambda: time.time() + 65 * 86_400)
    assert not later.usable(owner.ca.read_bytes())
    with MarketClient(world.address, owner.ca, owner.home, later) as client:
        with pytest.raises(UsageError, match="clock"):  # this owner's clock is 65 days ahead, so it asks, and is told
            client.publish(owner.release(3, number=3))
    almost = forged(world.market_home, [Name(public(owner.key))], start=-70, days=90)
    (owner.folder / FILE).write_bytes(almost)
    with owner.client() as client:
        client.publish(owner.release(3, number=3))
    assert (owner.membership.held().not_valid_after_utc - NOW) / DAY > 85


# Files -------------------------------------------------------------------------------------------------------------------


def test_a_key_file_that_others_can_read_is_refused_on_both_sides(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.publish(owner.release(1))
    (owner.folder / FILE).chmod(0o644)
    with owner.client() as client, pytest.raises(UsageError, match="0600"):
        client.publish(owner.release(2, number=2))
    file = courier(world.market_home, world.market_key, NOW)
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(UsageError, match="0600"):
        courier(world.market_home, world.market_key, NOW)
    with alone(world.market_home):
        rotate(world.market_home, NOW, 9 * DAY)
    for name in (KEY, NEXT_KEY, "server.key"):
        assert (world.market_home / name).stat().st_mode & 0o777 == 0o600
        (world.market_home / name).chmod(0o644)
        with pytest.raises(UsageError, match="0600"):
            market_identity(world.market_home, (), NOW)
        (world.market_home / name).chmod(0o600)


def test_what_answers_another_request_is_not_kept(world):
    owner, other = world.owner("city"), world.owner("town")
    with other.client() as client:
        client.publish(other.release())
    request = owner.membership.request(world.market_key)
    theirs = (other.folder / FILE).read_bytes()
    for wrong in (
        theirs[theirs.index(b"-----BEGIN CERTIFICATE-----") :],
        b"x",
        b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n",
    ):
        with pytest.raises(FormatError):
            owner.membership.install(wrong, world.ca.read_bytes())
    assert not (owner.folder / FILE).exists()
    with owner.client() as client:
        made, trusted = client.certify(request)
        owner.membership.install(made, trusted)
        client.publish(owner.release(2))


# Rotation ----------------------------------------------------------------------------------------------------------------


def moment(home: Path, days: float):
    with alone(home):
        return authorities(home, NOW + days * DAY)


def test_one_authority_follows_another_and_both_are_trusted_meanwhile(tmp_path):
    home = tmp_path / "market"
    first = market_identity(home, (), NOW)
    with alone(home):
        during = rotate(home, NOW, 90 * DAY)
    assert len(load_certificates(during.trusted)) == 2
    assert (home / "ca.crt").read_bytes() == during.trusted
    assert public_pem(during.serving.certificate) == first.trusted, "who has not heard of the new one still knows the server"
    assert during.members.certificate != during.serving.certificate, "members' certificates outlive the overlap"
    assert market_identity(home, (), NOW + 89 * DAY).server_certificate == first.server_certificate
    with alone(home), pytest.raises(UsageError, match="goes on until"):
        rotate(home, NOW + 5 * DAY, 90 * DAY)
    after = market_identity(home, (), NOW + 91 * DAY)
    assert after.trusted == public_pem(during.members.certificate)
    load_certificates(after.server_certificate)[0].verify_directly_issued_by(during.members.certificate)
    assert not (home / NEXT_KEY).exists()


def test_a_rotation_that_is_killed_between_any_two_files_goes_on(tmp_path, monkeypatch):
    """Control: the count of files says that it was killed everywhere."""
    import market_node.authority as module

    real, killed = module.write_durably, []
    for begun, most in ((False, 3), (True, 2)):
        for at in range(most + 1):
            home, count = tmp_path / f"market-{begun}-{at}", 0
            market_identity(home, (), NOW)
            if begun:
                with alone(home):
                    rotate(home, NOW, 9 * DAY)

            def write(path, data, mode=0o600, at=at):
                nonlocal count
                if count == at:
                    raise KeyboardInterrupt
                count += 1
                real(path, data, mode)

            monkeypatch.setattr(module, "write_durably", write)
            with contextlib.suppress(KeyboardInterrupt), alone(home):
                authorities(home, NOW + 10 * DAY) if begun else rotate(home, NOW, 9 * DAY)
                count = most + 1
            monkeypatch.setattr(module, "write_durably", real)
            killed.append(count <= most)
            later = market_identity(home, (), NOW + 10 * DAY)
            if not begun and at < most:  # never begun: the same command begins it
                with alone(home):
                    rotate(home, NOW + 10 * DAY, DAY)
                later = market_identity(home, (), NOW + 12 * DAY)
            (authority,) = load_certificates(later.trusted)
            load_certificates(later.server_certificate)[0].verify_directly_issued_by(authority)
            assert moment(home, 12).until is None
    assert killed == [True, True, True, False, True, True, False]


def test_members_go_over_to_the_next_authority_without_noticing(world):
    owner, town = world.owner("city"), world.owner("town")
    with owner.client() as client:
        client.publish(owner.release(1))
    old = world.ca.read_bytes()
    with alone(world.market_home):
        rotate(world.market_home, NOW, 90 * DAY)
    with owner.client() as client:  # an old certificate on a new connection
        client.publish(owner.release(2, number=2))

    with town.client() as client:  # a new one, of the next authority: trusted from its issue on
        client.publish(town.release(1))
    assert town.ca.read_bytes() == world.ca.read_bytes() != old, "with its certificate it learned of the next authority"
    with alone(world.market_home):
        rotate(world.market_home, NOW, datetime.timedelta(0))
    market_identity(world.market_home, (), NOW)

    def served_by_new() -> bool:
        with town.client() as client:
            try:
                return client.publish(town.release(2, number=2)) is not None
            except MarketUnreachable:
                return False

    def served_by_old() -> bool:
        """It is the old server's certificate, which the town still trusts too, until the market has looked."""
        with owner.client() as client, pytest.raises((MarketUnreachable, Unauthorised)) as refusal:
            client.publish(owner.release(3, number=3))
        return isinstance(refusal.value, Unauthorised)

    wait_for(served_by_new, 30)
    wait_for(lambda: not served_by_old(), 30)  # it never heard, and needs the new ca.crt
    owner.ca.write_bytes(world.ca.read_bytes())
    with owner.client() as client:  # its certificate is of an authority that is gone: it gets another by itself
        client.publish(owner.release(3, number=3))


def test_an_open_connection_does_not_outlive_its_authority(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.publish(owner.release(1))
        own = owner.membership.current(client, world.market_key)
    with world.stub(own) as stub:
        published(stub, owner.release(2, number=2))
        with alone(world.market_home):
            rotate(world.market_home, NOW, datetime.timedelta(0))
        assert "another authority" in str(refused(lambda: published(stub, owner.release(3, number=3))))


def test_what_a_client_remembers_of_a_market_follows_the_rotation(world):
    """A market that changed its authority must not be able to change its log with it."""
    owner, home = world.owner("city"), world.root / "querier"
    with owner.client() as client:
        client.publish(owner.release(1))
    file = world.root / "known.crt"
    file.write_bytes(world.ca.read_bytes())

    with MarketClient(world.address, file, home) as client:
        client.describe()
    with alone(world.market_home):
        both = rotate(world.market_home, NOW, 90 * DAY)
    file.write_bytes(both.trusted)
    with MarketClient(world.address, file, home) as client:
        client.describe()
        assert client.checkpoint(world.market_key).size == 1
    file.write_bytes(public_pem(both.members.certificate))
    with MarketClient(world.address, file, home) as client:  # not asked: the server is of the first one still
        assert client.market_key == world.market_key
        assert client.checkpoint(world.market_key).size == 1


def test_a_running_market_shows_a_new_server_certificate_to_the_next_connection(tmp_path):
    import ssl

    market_identity(tmp_path / "operator" / "market", (), NOW)
    with world_in(tmp_path) as world:
        host, port = world.address.split(":")

        def shown() -> str:
            return ssl.get_server_certificate((host, int(port)))

        before = shown()
        market_identity(world.market_home, (), NOW, fresh=True)
        wait_for(lambda: shown() != before, 30)
        with MarketClient(world.address, world.ca, tmp_path / "asker") as client:
            client.describe()


def test_certificates_that_cannot_be_read_leave_those_that_were_there(tmp_path, caplog):
    doors = Doors(tmp_path, ())
    before = doors.identity
    (tmp_path / "server.key").chmod(0o644)
    doors.look()
    assert doors.identity is before
    doors.look()
    assert caplog.text.count("CertificatesNotRead code=usage") == 1
    (tmp_path / "server.key").chmod(0o600)
    doors.look()
    (tmp_path / "ca.crt").rename(tmp_path / "away.crt")
    doors.look()  # a market that serves makes no other authority, whose certificates nobody would know
    assert caplog.text.count("CertificatesNotRead code=usage") == 2
    assert not (tmp_path / "ca.crt").exists()


# Commands ----------------------------------------------------------------------------------------------------------------


def joined(world: World, capsys, name="city") -> Path:
    members = Members.open(world.market_home)
    expires = int(time.time()) + 1000
    secret = members.invite(name, expires)
    members.close()
    file = world.root / f"{name}.invite"
    file.write_text(str(Invite(world.address, name, expires, world.market_key, secret, world.ca.read_bytes())))
    file.chmod(0o600)
    return file


def test_join_brings_a_certificate_and_again_changes_nothing(world, capsys):
    home, where = world.root / "home-city", joined(world, capsys)
    words = ("node", "join", world.address, "--invite", f"file:{where}", "--home", home)
    done = run(capsys, *words)
    assert run(capsys, *words) == done
    there = ("--market", world.address, "--ca", home / "market-ca.crt", "--home", home)
    shown = run(capsys, "node", "certificate", "--home", home)
    assert (shown["name"], shown["ends"]) == (f"veilmart://node/{done['owner']}", done["certificate_ends"])
    renewed = run(capsys, "node", "certificate", "--renew", *there)
    assert renewed["serial"] != shown["serial"]
    listed = run(capsys, "pki", "show", "--home", world.home)
    assert {one["serial"] for one in listed["certificates"]} == {shown["serial"], renewed["serial"]}
    gone = run(capsys, "pki", "revoke", done["owner"][:8], "--home", world.home)["revoked"]
    assert all(one["revoked"] for one in gone)
    assert len(gone) == 2
    with pytest.raises(NotFound):
        run(capsys, "pki", "revoke", "00000000", "--home", world.home)
    with pytest.raises(NotFound):
        run(capsys, "pki", "revoke", done["owner"][:4], "--home", world.home)


def test_a_certificate_goes_by_file_where_a_node_has_no_line(world, capsys):
    owner = world.owner("city")
    csr, crt, there = world.root / "city.csr", world.root / "city.crt", ("--market", world.address, "--ca", owner.ca, "--home", owner.home)
    run(capsys, "node", "certificate", "--request", csr, *there)
    issued = run(capsys, "pki", "issue", "--csr", csr, "--out", crt, "--days", "7", "--home", world.home)
    assert issued["owner"] == public(owner.key).hex()
    shown = run(capsys, "node", "certificate", "--install", crt, *there)
    assert shown["ends"] - time.time() < 7 * 86_400
    with owner.client() as client:
        client.publish(owner.release())
    stranger = world.owner("stranger", enrolled=False)
    csr.write_bytes(stranger.membership.request(world.market_key))
    with pytest.raises(Unauthorised, match="not enrolled"):
        run(capsys, "pki", "issue", "--csr", csr, "--out", crt, "--home", world.home)
    csr.write_bytes(make_request(new_tls_key(), public(owner.key), world.market_key, int(time.time()) - 8 * 86_400, proves(owner.key)))
    with pytest.raises(FormatError, match="older"):
        run(capsys, "pki", "issue", "--csr", csr, "--out", crt, "--home", world.home)


def test_the_commands_of_the_operator_beside_no_market(tmp_path, capsys):
    made = run(capsys, "pki", "init", "--name", "market.example", "--home", tmp_path)
    assert "market.example" in made["server"]["names"]
    assert run(capsys, "pki", "init", "--name", "market.example", "--home", tmp_path) == made
    turned = run(capsys, "pki", "rotate", "authority", "--overlap-days", "90", "--home", tmp_path)
    assert len(turned["authorities"]) == 2
    assert turned["server"] == made["server"]
    with pytest.raises(UsageError, match="goes on until"):
        run(capsys, "pki", "rotate", "authority", "--home", tmp_path)
    ended = run(capsys, "pki", "rotate", "authority", "--overlap-days", "0", "--home", tmp_path)
    assert ended["authorities"] == turned["authorities"][1:]
    assert ended["overlap_ends"] is None
    before = (tmp_path / "market" / "server.crt").read_bytes()
    run(capsys, "pki", "rotate", "server", "--home", tmp_path)
    assert (tmp_path / "market" / "server.crt").read_bytes() != before
    for words in (["show"], ["revoke", "00000000"], ["rotate", "server"]):
        with pytest.raises(UsageError, match="no market here"):
            run(capsys, "pki", *words, "--home", tmp_path / "elsewhere")


# The courier -------------------------------------------------------------------------------------------------------------


def test_a_campaign_hands_in_what_members_signed_and_nothing_else(world, tmp_path):
    owner, stranger = world.owner("city"), world.owner("stranger", enrolled=False)
    own = courier(world.market_home, world.market_key, NOW).read_bytes()
    assert courier(world.market_home, world.market_key, NOW).read_bytes() == own
    with world.stub(own) as stub:
        assert published(stub, owner.release()).index == 0
        assert isinstance(refused(lambda: published(stub, stranger.release())), Unauthorised)
        notice = sign_notice(Notice(Kind.WITHDRAWAL, world.market_key, public(owner.key), (bytes(32),)), owner.key)
        assert isinstance(refused(lambda: stub.SubmitNotice(pb.NoticeRequest(notice=notice), timeout=30)), Unauthorised)
        assert isinstance(refused(lambda: stub.UploadAdapter(iter([pb.AdapterChunk(digest=bytes(32))]), timeout=30)), Unauthorised)
    with world.stub(forged(world.market_home, [Name(b"\1" * 32, courier=True)])) as stub:  # of another market, by this authority
        assert isinstance(refused(lambda: published(stub, owner.release(2, number=2))), Unauthorised)


def test_looking_at_a_certificate_again_costs_no_signature(world):
    owner = world.owner("city")
    with owner.client() as client:
        client.publish(owner.release(1))
        before = _read.cache_info().misses
        client.publish(owner.release(2, number=2))
    assert _read.cache_info().misses == before
