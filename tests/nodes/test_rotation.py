"""A key that was rotated: ledger, budget and chain go on, an older ledger is still noticed, and no stranger's key passes."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes import guard as guards
from nodes.base_model import BaseModel
from nodes.succession import KEY, NEXT, begin_rotation, finish_rotation, keep_rotations, keys_before
from protocol.errors import InvalidSignature, LedgerBehind, UsageError
from protocol.notices import Kind, Notice, sign_notice
from protocol.release import open_envelope
from tests.nodes.test_repair import ONE, Owner, owner  # noqa: F401 - the fixture


@pytest.fixture(scope="module")
def model(tiny_model_directory):
    return BaseModel.open(tiny_model_directory)


def rotate(of: Owner) -> bytes:
    """As `veilmart node rotate-key` does."""
    notice, new = begin_rotation(of.home, of.client.describe().market_key)
    of.client.submit(notice)
    finish_rotation(of.home, notice)
    return new


def test_the_chain_of_releases_goes_on_under_the_new_key(owner):  # noqa: F811
    first = open_envelope(owner.publish(150))
    spent = owner.guard().price(ONE.guarantee).spent
    new = rotate(owner)
    assert owner.guard().owner == new != first.owner
    assert owner.guard().price(ONE.guarantee).spent == spent
    second = open_envelope(owner.publish(151))
    assert (second.owner, second.release_number, second.previous) == (new, 2, first.release_id)
    third = rotate(owner)
    assert owner.guard().owners == (third, new, first.owner)
    assert not (owner.home / NEXT).exists()


def test_an_older_ledger_is_noticed_though_the_key_was_rotated_since(owner, monkeypatch):  # noqa: F811
    owner.publish(150)
    old = owner.ledger_file.read_bytes()
    owner.publish(151)
    rotate(owner)
    owner.ledger_file.write_bytes(old)
    with pytest.raises(LedgerBehind):
        owner.publish(152)
    # Control: who asks for the new key's releases alone misses what the old one published.
    owner.ledger_file.write_bytes(old)
    monkeypatch.setattr(guards, "keys_before", lambda folder, key: ())
    owner.publish(152)


def test_the_same_command_finishes_a_rotation_that_broke_off(owner):  # noqa: F811
    owner.publish(150)
    market_key = owner.client.describe().market_key
    notice, new = begin_rotation(owner.home, market_key)
    assert begin_rotation(owner.home, market_key) == (notice, new)  # killed before the market was told
    owner.client.submit(notice)
    assert begin_rotation(owner.home, market_key) == (notice, new)  # killed after
    assert rotate(owner) == new
    assert owner.guard().owner == new


def test_a_lost_folder_finds_its_rotations_in_the_markets_notices(owner):  # noqa: F811
    first = open_envelope(owner.publish(150)).owner
    new = rotate(owner)
    (kept,) = (owner.home / "rotations").iterdir()
    kept.unlink()
    with pytest.raises(UsageError, match="expected the key of owner"):
        owner.guard()
    keep_rotations(owner.home, new, owner.client.rotations())
    assert keys_before(owner.home, new) == (first,)
    assert owner.guard().owner == new


def test_a_key_that_the_old_one_did_not_sign_over_is_refused(owner):  # noqa: F811
    envelope = owner.publish(150)
    key, thief = owner.home / KEY, Ed25519PrivateKey.generate()
    key.write_bytes(thief.private_bytes_raw())
    with pytest.raises(UsageError, match="expected the key of owner"):
        owner.guard()
    forged = Notice(Kind.ROTATION, bytes(32), open_envelope(envelope).owner, (thief.public_key().public_bytes_raw(),))
    folder = owner.home / "rotations"
    folder.mkdir()
    (folder / "x.rotation").write_bytes(sign_notice(forged, thief, thief))
    with pytest.raises(InvalidSignature):
        owner.guard()
