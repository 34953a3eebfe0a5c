"""Notices: who may take what back, for which market, and that a list which changed is not the one that was signed."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import FormatError, InvalidProof, InvalidSignature, VeilmartError
from protocol.notices import (
    Kind,
    Notice,
    NoticesHead,
    inclusion_in,
    open_notice,
    open_notices,
    sign_notice,
    sign_notices,
    taken_back,
    verify_logged,
)

MARKET, OWNER, OTHER = (Ed25519PrivateKey.generate() for _ in range(3))
KEY, ME, YOU = (key.public_key().public_bytes_raw() for key in (MARKET, OWNER, OTHER))
RELEASE, SECOND = bytes([1]) * 32, bytes([2]) * 32


def withdrawal(release_id: bytes = RELEASE, market: bytes = KEY) -> bytes:
    return sign_notice(Notice(Kind.WITHDRAWAL, market, ME, (release_id,)), OWNER)


REVOCATION = sign_notice(Notice(Kind.REVOCATION, KEY, ME, (RELEASE, SECOND)), MARKET)
ROTATION = sign_notice(Notice(Kind.ROTATION, KEY, ME, (YOU,)), OWNER, OTHER)


@pytest.mark.parametrize("data", [withdrawal(), REVOCATION, ROTATION], ids=["withdrawal", "revocation", "rotation"])
def test_a_notice_has_one_encoding_and_every_byte_of_it_counts(data):
    notice = open_notice(data, KEY)
    assert data.startswith(notice.body)
    for position in range(len(data)):
        with pytest.raises(VeilmartError):
            open_notice(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :], KEY)
    for cut in (data[:-1], data + b"\0", data[:-64]):
        with pytest.raises(VeilmartError):
            open_notice(cut, KEY)


WAYS_TO_CHEAT = {
    "another owner in the owner's name": lambda: sign_notice(Notice(Kind.WITHDRAWAL, KEY, ME, (RELEASE,)), OTHER),
    "the market in the owner's name": lambda: sign_notice(Notice(Kind.WITHDRAWAL, KEY, ME, (RELEASE,)), MARKET),
    "an owner in the market's name": lambda: sign_notice(Notice(Kind.REVOCATION, KEY, ME, (RELEASE,)), OWNER),
    "one of another market": lambda: withdrawal(market=YOU),
    "a rotation that the new key did not sign": lambda: sign_notice(Notice(Kind.ROTATION, KEY, ME, (YOU,)), OWNER, OWNER),
    "a rotation that the old key did not sign": lambda: sign_notice(Notice(Kind.ROTATION, KEY, ME, (YOU,)), OTHER, OTHER),
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_nobody_else_takes_a_release_back(forge):
    open_notice(withdrawal(), KEY)
    with pytest.raises(InvalidSignature):
        open_notice(forge(), KEY)


def test_a_notice_says_one_thing():
    for kind, subjects in ((Kind.WITHDRAWAL, ()), (Kind.WITHDRAWAL, (RELEASE, SECOND)), (Kind.REVOCATION, (SECOND, RELEASE))):
        with pytest.raises(FormatError):
            Notice(kind, KEY, ME, subjects)
    for kind, subjects in ((Kind.ROTATION, (ME,)), (Kind.REVOCATION, (RELEASE, RELEASE)), (Kind.WITHDRAWAL, (b"short",))):
        with pytest.raises(FormatError):
            Notice(kind, KEY, ME, subjects)


ENTRIES = [withdrawal(bytes([number]) * 32) for number in range(1, 12)]
HEAD = sign_notices(ENTRIES, MARKET)


def test_the_list_tells_what_no_longer_stands():
    notices = open_notices([*ENTRIES[:2], ROTATION], sign_notices([*ENTRIES[:2], ROTATION], MARKET), KEY)
    assert taken_back(notices) == {RELEASE, SECOND}


LISTS = {
    "one missing": ENTRIES[:-1],
    "one missing in the middle": [*ENTRIES[:3], *ENTRIES[4:]],
    "two exchanged": [ENTRIES[1], ENTRIES[0], *ENTRIES[2:]],
    "one more": [*ENTRIES, withdrawal(bytes(32))],
    "another one": [*ENTRIES[:-1], withdrawal(bytes(32))],
}


@pytest.mark.parametrize("entries", LISTS.values(), ids=LISTS)
def test_a_list_that_is_not_the_signed_one_is_refused(entries):
    open_notices(ENTRIES, HEAD, KEY)
    with pytest.raises(FormatError):
        open_notices(entries, HEAD, KEY)
    with pytest.raises(InvalidSignature):
        open_notices(entries, sign_notices(entries, OTHER), KEY)


def test_a_receipt_of_a_notice_is_proven():
    for index, entry in enumerate(ENTRIES):
        verify_logged(entry, index, inclusion_in(ENTRIES, index), HEAD, KEY)
    proof = inclusion_in(ENTRIES, 3)
    for cheat in (
        lambda: verify_logged(ENTRIES[4], 3, proof, HEAD, KEY),
        lambda: verify_logged(ENTRIES[3], 4, proof, HEAD, KEY),
        lambda: verify_logged(ENTRIES[3], 3, proof[:-1], HEAD, KEY),
        lambda: verify_logged(ENTRIES[3], 3, proof, NoticesHead(HEAD.size, bytes(32), HEAD.signature), KEY),
    ):
        with pytest.raises((InvalidProof, InvalidSignature)):
            cheat()
