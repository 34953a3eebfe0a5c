"""Who may publish: what an invite is good for, what it is not, and what remains of it."""

import contextlib
import hashlib
import os
import threading
import time

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from market_node.members import Members
from nodes.known_market import market_of
from nodes.market_client import MarketClient
from protocol.enrolment import Invite, sign_enrolment, verify_enrolment, words_of
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
from protocol.release import AdapterReference, sign_release
from tests.commands import run
from tests.market_node.market import running_market
from tests.protocol.worlds import adapter_bytes, envelope_of, public, release_of, small_map

MAP = small_map()
LATER = int(time.time()) + 1000


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


@pytest.fixture
def members(market_home):
    made = Members.open(market_home)
    yield made
    made.close()


# Words and lines ----------------------------------------------------------------------------------------------------------


def test_words_are_those_of_the_published_scheme():
    from protocol.enrolment import _proquint

    known = {0x7F00: "lusab", 0x0001: "babad", 0x3F54: "gutih", 0xDCC1: "tugad", 0x3F76: "gutuk", 0x0723: "bisog"}
    assert {value: _proquint(value) for value in known} == known


def test_words_tell_keys_apart():
    assert len({words_of(os.urandom(32)) for _ in range(200)}) == 200


def an_invite(secret=b"\1" * 32) -> Invite:
    return Invite("market.example:7443", "City Hospital", LATER, b"\2" * 32, secret, b"-----BEGIN CERTIFICATE-----\nabc\n")


def test_an_invite_is_one_line_and_comes_back_whole():
    line = str(an_invite())
    assert "\n" not in line
    assert " " not in line
    assert Invite.parse(f"  {line}\n") == an_invite()


def test_a_damaged_invite_is_refused_without_being_quoted():
    line = str(an_invite())
    for wrong in (line[:-10], line[5:], line.replace("A", "!", 1), "", "veilmart-invite-", line + line):
        with pytest.raises(VeilmartError) as caught:
            Invite.parse(wrong)
        assert line[40:60] not in str(caught.value)


def test_the_owners_signature_is_for_one_market_invite_and_supernode():
    key, secret, node = Ed25519PrivateKey.generate(), os.urandom(32), node_key()
    signature = sign_enrolment(b"\2" * 32, secret, key, node)
    verify_enrolment(b"\2" * 32, secret, public(key), node, signature)
    for changed in (
        (b"\3" * 32, secret, public(key), node), (b"\2" * 32, os.urandom(32), public(key), node),
        (b"\2" * 32, secret, public(Ed25519PrivateKey.generate()), node), (b"\2" * 32, secret, public(key), node_key()),
    ):  # fmt: skip
        with pytest.raises(InvalidSignature):
            verify_enrolment(*changed, signature)


# Members ------------------------------------------------------------------------------------------------------------------


def test_an_invite_is_for_one_owner_once_and_the_same_owner_may_come_again(members):
    secret = members.invite("City Hospital", LATER)
    first = members.enrol(secret, b"\1" * 32, "key", 5)
    assert members.enrol(secret, b"\1" * 32, "key", LATER + 5) == first, "also when it is over: the answer may have been lost"
    with pytest.raises(Unauthorised, match="unknown, used or expired"):
        members.enrol(secret, b"\2" * 32, "key", 5)
    assert members.may_publish(b"\1" * 32)
    assert not members.may_publish(b"\2" * 32)


def test_what_is_wrong_with_an_invite_is_one_error(members):
    used, over = members.invite("A", LATER), members.invite("B", 10)
    members.enrol(used, b"\1" * 32, "", 5)
    said = set()
    for secret in (used, over, os.urandom(32)):
        with pytest.raises(Unauthorised) as caught:
            members.enrol(secret, b"\2" * 32, "", 11)
        said.add((str(caught.value), caught.value.hint))
    assert len(said) == 1


def test_the_market_keeps_no_secret(tmp_path):
    members = Members.open(tmp_path)
    secret = members.invite("City Hospital", LATER)
    members.close()
    assert all(secret not in path.read_bytes() for path in tmp_path.iterdir())


def test_of_two_owners_with_one_invite_exactly_one_wins(members):
    for _ in range(20):
        secret, won = members.invite("A", LATER), []

        def join(owner: bytes, secret=secret, won=won) -> None:
            with contextlib.suppress(Unauthorised):
                won.append(members.enrol(secret, owner, "", 5).owner)

        threads = [threading.Thread(target=join, args=(os.urandom(32),)) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(won) == 1


def test_a_member_that_was_removed_needs_a_new_invite(members):
    secret = members.invite("A", LATER)
    members.enrol(secret, b"\1" * 32, "", 5)
    members.remove("01" * 8, 6)
    assert not members.may_publish(b"\1" * 32)
    with pytest.raises(Unauthorised):
        members.enrol(secret, b"\1" * 32, "", 7)
    assert members.enrol(members.invite("A", LATER), b"\1" * 32, "", 8).removed is None
    with pytest.raises(NotFound):
        members.remove("ff" * 8, 9)


def test_an_organisation_has_a_name_that_can_be_shown(members):
    for wrong in ("", "-", "a\nb", "x" * 70, "<b>"):
        with pytest.raises(UsageError):
            members.invite(wrong, LATER)


# Through the market -------------------------------------------------------------------------------------------------------


@pytest.fixture
def market(tmp_path):
    with running_market(tmp_path / "home" / "market", MAP, enrolled_only=True) as (address, ca, _):
        (tmp_path / "home" / "market" / "address").write_text(address)
        yield address, ca, tmp_path


def invite_file(capsys, folder, org="City Hospital", *more) -> tuple[str, dict]:
    file = folder / f"{org.replace(' ', '-')}.invite"
    return f"file:{file}", run(capsys, "market", "invite", "--org", org, "--home", str(folder / "home"), "-o", str(file), *more)


def test_join_makes_a_member_who_may_publish_and_shows_the_same_words_on_both_sides(market, capsys):
    address, ca, folder = market
    where, shown = invite_file(capsys, folder)
    owner = folder / "owner"
    joined = run(capsys, "node", "join", address, "--invite", where, "--home", str(owner))
    assert joined["market_words"] == shown["market_words"]
    (member,) = run(capsys, "market", "members", "--home", str(folder / "home"))["members"]
    assert (member["words"], member["organisation"]) == (joined["owner_words"], "City Hospital")
    assert run(capsys, "node", "join", address, "--invite", where, "--home", str(owner)) == joined, "again: nothing changes"
    key = Ed25519PrivateKey.from_private_bytes((owner / "node" / "owner.key").read_bytes())
    with MarketClient(address, ca, owner) as client:
        assert client.describe(public(key)).may_publish
        client.publish(sign_release(release_of(MAP, key), key))
    assert market_of(owner).address == address
    assert (owner / "market-ca.crt").read_bytes() == ca.read_bytes()


def test_who_is_not_enrolled_cannot_publish(market):
    address, ca, folder = market
    key = Ed25519PrivateKey.generate()
    with MarketClient(address, ca, folder / "stranger") as client:
        assert not client.describe(public(key)).may_publish
        with pytest.raises(Unauthorised, match="not enrolled"):
            client.publish(sign_release(release_of(MAP, key), key))


def test_an_adapter_is_taken_once_a_members_release_names_it(market, capsys):
    address, ca, folder = market
    data = adapter_bytes()
    adapter = AdapterReference(hashlib.sha256(data).digest(), len(data))
    where, _ = invite_file(capsys, folder)
    run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "owner"))
    key = Ed25519PrivateKey.from_private_bytes((folder / "owner" / "node" / "owner.key").read_bytes())
    with MarketClient(address, ca, folder / "stranger") as client:
        client.publish(envelope_of(MAP, key, seed=1))
        with pytest.raises(Unauthorised, match="no release"):
            client.upload_adapter(adapter, data)
        assert list((folder / "home" / "market" / "adapters").iterdir()) == []
        client.publish(envelope_of(MAP, key, seed=2, number=2, adapter=adapter))
        client.upload_adapter(adapter, data)
        assert client.download_adapter(adapter) == data


def test_an_open_market_takes_anybody(tmp_path):
    """Control; adapters of anybody too: tests/nodes/test_market_client.py uploads first."""
    key = Ed25519PrivateKey.generate()
    with running_market(tmp_path / "m", MAP) as (address, ca, _), MarketClient(address, ca, tmp_path / "home") as client:
        assert client.describe(public(key)).may_publish
        client.publish(sign_release(release_of(MAP, key), key))


def test_a_home_that_never_joined_may_join_another_market_than_it_tried(market, capsys, tmp_path):
    address, _, folder = market
    where, _ = invite_file(capsys, folder)
    given = Invite.parse((folder / "City-Hospital.invite").read_text())
    gone = folder / "gone.invite"
    gone.write_text(str(Invite("127.0.0.1:1", "A", LATER, given.market_key, given.secret, other_authority(tmp_path))))
    gone.chmod(0o600)
    with pytest.raises(VeilmartError):
        run(capsys, "node", "join", "127.0.0.1:1", "--invite", f"file:{gone}", "--home", str(folder / "owner"))
    run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "owner"))
    with pytest.raises(UsageError, match="another market"):  # and once it has joined, no other
        run(capsys, "node", "join", "127.0.0.1:1", "--invite", f"file:{gone}", "--home", str(folder / "owner"))


def test_an_invite_names_no_address_that_nobody_reaches(market, capsys):
    _, _, folder = market
    (folder / "home" / "market" / "address").write_text("0.0.0.0:7443\n")
    with pytest.raises(UsageError, match="--address"):
        invite_file(capsys, folder)
    assert invite_file(capsys, folder, "A", "--address", "market.example:7443")[1]["address"] == "market.example:7443"


def test_an_invite_of_another_owner_or_a_replayed_enrolment_is_refused(market, capsys):
    address, ca, folder = market
    where, _ = invite_file(capsys, folder)
    run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "first"))
    with pytest.raises(Unauthorised):
        run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "second"))
    given = Invite.parse((folder / "City-Hospital.invite").read_text())
    key, thief = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    fresh = Members.open(folder / "home" / "market")
    secret = fresh.invite("B", LATER)
    fresh.close()
    signature = sign_enrolment(given.market_key, secret, key, "")
    with MarketClient(address, ca, folder / "thief") as client:
        with pytest.raises(InvalidSignature):  # somebody's signature with one's own key
            client.enrol(secret, public(thief), "", signature)
        with pytest.raises(InvalidSignature):  # or for another SuperNode
            client.enrol(secret, public(key), node_key(), signature)


def test_invites_cannot_be_guessed_for_long(market):
    address, ca, folder = market
    key = Ed25519PrivateKey.generate()
    with MarketClient(address, ca, folder / "guesser") as client:
        market_key, refused = client.describe().market_key, 0
        for _ in range(40):
            secret = os.urandom(32)
            with pytest.raises((Unauthorised, QuotaExceeded)) as caught:
                client.enrol(secret, public(key), "", sign_enrolment(market_key, secret, key, ""))
            refused += caught.type is Unauthorised
        assert refused == 20
        invites = Members.open(folder / "home" / "market")
        secret = invites.invite("City Hospital", LATER)
        invites.close()
        organisation, _, _ = client.enrol(secret, public(key), "", sign_enrolment(market_key, secret, key, ""))
    assert organisation == "City Hospital", "who guesses keeps nobody out"


def test_a_supernode_is_registered_once_however_often_its_owner_asks_and_later_if_the_superlink_was_away(tmp_path):
    home, asked = tmp_path / "home" / "market", []

    def register(member) -> str:
        asked.append(member.owner)
        if len(asked) == 1:
            raise MarketUnreachable("market: its SuperLink does not answer")
        return "market.example:9092"

    with running_market(home, MAP, enrolled_only=True, register=register) as (address, ca, _):
        key, node, invites = Ed25519PrivateKey.generate(), node_key(), Members.open(home)
        secret = invites.invite("City Hospital", LATER)
        invites.close()
        with MarketClient(address, ca, tmp_path / "owner") as client:
            signature = sign_enrolment(client.describe().market_key, secret, key, node)
            with pytest.raises(MarketUnreachable):
                client.enrol(secret, public(key), node, signature)
            for _ in range(5):
                assert client.enrol(secret, public(key), node, signature)[2] == "market.example:9092"
    assert len(asked) == 2


def test_a_supernode_key_that_is_none_uses_no_invite(market):
    address, _, folder = market
    key, invites = Ed25519PrivateKey.generate(), Members.open(folder / "home" / "market")
    secret = invites.invite("City Hospital", LATER)
    with MarketClient(address, folder / "home" / "market" / "ca.crt", folder / "stranger") as client:
        market_key = client.describe().market_key
        for wrong in ("ecdsa-sha2-nistp384 AAAA", "ssh-ed25519 AAAA"):
            with pytest.raises(UsageError, match="P-384"):
                client.enrol(secret, public(key), wrong, sign_enrolment(market_key, secret, key, wrong))
        assert invites.all() == []
        client.enrol(secret, public(key), node := node_key(), sign_enrolment(market_key, secret, key, node))
    assert [member.supernode_key for member in invites.all()] == [node]
    invites.close()


def test_whoever_names_the_supernode_of_another_member_does_not_take_its_place(members, tmp_path):
    from market_node.server import register_members
    from market_node.superlink import list_supernode, registered

    node = node_key()
    for place in (1, 2):
        members.enrol(members.invite("A", LATER), bytes([place]) * 32, node, place)
    register_members(members, lambda member: list_supernode(tmp_path, member.supernode_key, member.node_name, member.owner).name)
    assert [(known.owner, known.public_key) for known in registered(tmp_path)] == [("01" * 32, node)]


def test_a_wrong_market_or_authority_is_noticed_before_anything_is_sent(market, tmp_path, capsys):
    address, _, folder = market
    where, _ = invite_file(capsys, folder)
    given = Invite.parse((folder / "City-Hospital.invite").read_text())
    forged = folder / "forged.invite"
    for wrong, error in (
        (Invite(address, given.organisation, given.expires, b"\7" * 32, given.secret, given.authority), InvalidSignature),
        (Invite("elsewhere:1", given.organisation, given.expires, given.market_key, given.secret, given.authority), UsageError),
        (Invite(address, given.organisation, given.expires, given.market_key, given.secret, other_authority(tmp_path)), VeilmartError),
    ):
        forged.write_text(str(wrong))
        forged.chmod(0o600)
        home = folder / f"victim{error.__name__}{len(str(wrong))}"
        with pytest.raises(error):
            run(capsys, "node", "join", address, "--invite", f"file:{forged}", "--home", str(home))
        assert not (home / "market.toml").exists()
    run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "good"))  # the invite is still good


def other_authority(folder) -> bytes:
    import datetime

    from market_node.identity import market_identity

    return market_identity(folder / "other-market", (), datetime.datetime.now(datetime.UTC)).ca_file.read_bytes()


def test_an_expired_invite_is_refused(market, capsys):
    address, _, folder = market
    members = Members.open(folder / "home" / "market")
    secret = members.invite("Late", int(time.time()) - 1)
    members.close()
    invite_file(capsys, folder)
    given = Invite.parse((folder / "City-Hospital.invite").read_text())
    late = folder / "late.invite"
    late.write_text(str(Invite(address, "Late", 1, given.market_key, secret, given.authority)))
    late.chmod(0o600)
    with pytest.raises(Unauthorised):
        run(capsys, "node", "join", address, "--invite", f"file:{late}", "--home", str(folder / "late"))


class Killed(BaseException):
    """What no handler stops."""


def test_killed_between_enrolment_and_saving_the_same_command_finishes(market, capsys, monkeypatch):
    from nodes import known_market

    address, _, folder = market
    where, _ = invite_file(capsys, folder)
    real, owner = known_market.write_durably, folder / "owner"

    def killed(path, *rest):
        if path.name == "market.toml":
            raise Killed
        real(path, *rest)

    monkeypatch.setattr(known_market, "write_durably", killed)
    with pytest.raises(Killed):
        run(capsys, "node", "join", address, "--invite", where, "--home", str(owner))
    monkeypatch.undo()
    assert not (owner / "market.toml").exists()
    run(capsys, "node", "join", address, "--invite", where, "--home", str(owner))
    assert len(run(capsys, "market", "members", "--home", str(folder / "home"))["members"]) == 1


def test_secrets_come_from_files_that_nobody_else_reads(market, capsys):
    address, _, folder = market
    where, _ = invite_file(capsys, folder)
    file = folder / "City-Hospital.invite"
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(UsageError, match="0600"):
        run(capsys, "node", "join", address, "--invite", where, "--home", str(folder / "owner"))
    for wrong in (file.read_text().strip(), "file:", "env:VEILMART_NO_SUCH", "file:/nowhere/at/all"):
        with pytest.raises(UsageError) as caught:
            run(capsys, "node", "join", address, "--invite", wrong, "--home", str(folder / "owner"))
        assert file.read_text().strip()[30:60] not in str(caught.value)


def test_foreign_bytes_are_no_invite():
    with pytest.raises(FormatError):
        Invite.parse("veilmart-invite-" + "A" * 9000)
