"""What a market says about owners: one form, signed for one state of its catalogue."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.errors import FormatError, InvalidSignature
from protocol.organisations import Organisations, numbered, open_organisations

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()
STATE = bytes(range(32))
KEYS = [("o", "City"), (b"1", ""), ("o", "City"), ("p", "Village"), (b"1", ""), (b"2", "")]
SAID = numbered(KEYS)


def test_releases_are_numbered_in_the_order_of_their_owners():
    assert (SAID.numbers.tolist(), SAID.names) == ([0, 1, 0, 2, 1, 3], ("City", "", "Village", ""))
    assert (numbered(()).numbers.tolist(), numbered(()).names) == ([], ())


@pytest.mark.parametrize("size", range(len(KEYS) + 1))
def test_what_is_said_of_a_prefix_is_what_would_have_been_said_then(size):
    assert SAID.upto(size).body == numbered(KEYS[:size]).body


def test_what_was_signed_comes_back_whole():
    again = open_organisations(SAID.numbers.astype("<u4").tobytes(), SAID.names, len(KEYS))
    again.verify(SAID.sign(STATE, KEY), STATE, PUBLIC)


WAYS_TO_CHEAT = {
    "a number too few": ([0, 1, 0, 2, 1], SAID.names),
    "a number that skips one": ([0, 2, 0, 1, 2, 3], SAID.names),
    "a first number that is not 0": ([1, 0, 1, 2, 0, 3], SAID.names),
    "a name too many": ([0, 1, 0, 2, 1, 3], (*SAID.names, "Other")),
    "a name too few": ([0, 1, 0, 2, 1, 3], SAID.names[:3]),
    "one organisation under two numbers": ([0, 1, 0, 2, 1, 3], ("City", "", "City", "")),
    "a name that a terminal would obey": ([0, 1, 0, 2, 1, 3], ("City", "", "\x1b[2J", "")),
    "a name that no invite has": ([0, 1, 0, 2, 1, 3], ("City", "", "x" * 70, "")),
    "names without numbers": ([], ("City",)),
}


@pytest.mark.parametrize(("numbers", "names"), WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_another_form_is_refused(numbers, names):
    with pytest.raises(FormatError):
        open_organisations(np.array(numbers, "<u4").tobytes(), names, len(KEYS) if numbers else 0)


def test_a_signature_is_for_one_state_one_market_and_these_names():
    signature = SAID.sign(STATE, KEY)
    other = Organisations(SAID.numbers, ("Town", *SAID.names[1:]))
    moved = replace(SAID, numbers=np.array([0, 1, 0, 2, 2, 3]))
    for said, state, key in (
        (SAID, bytes(32), PUBLIC), (SAID, STATE, bytes(32)), (other, STATE, PUBLIC), (moved, STATE, PUBLIC),
        (SAID.upto(5), STATE, PUBLIC),
    ):  # fmt: skip
        with pytest.raises(InvalidSignature):
            said.verify(signature, state, key)
