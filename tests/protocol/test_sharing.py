"""Shamir's sharing: enough shares give the secret, fewer are those of any secret."""

import itertools

import pytest

from protocol.hazmat.sharing import PRIME, SECRET_BYTES, SHARE_BYTES, join, split

SECRET = bytes(range(100, 132))


def test_any_threshold_of_shares_gives_the_secret_and_no_fewer_do():
    shares = split(SECRET, 3, 5)
    assert {len(share) for share in shares} == {SHARE_BYTES}
    for size in range(1, 6):
        for places in itertools.combinations(range(5), size):
            assert (join({place: shares[place] for place in places}) == SECRET) is (size >= 3)


def test_fewer_shares_than_the_threshold_fit_every_secret():
    """For two shares and any secret there is a polynomial of degree two through all three: the two say nothing of it."""
    shares = split(SECRET, 3, 5)
    points = {place + 1: int.from_bytes(shares[place], "little") for place in (0, 3)}
    for other in (bytes(SECRET_BYTES), b"\xff" * SECRET_BYTES):
        points[0] = int.from_bytes(other, "little")
        third = sum(
            value * _product(-(5 - x) for x in points if x != at) * pow(_product(x - at for x in points if x != at), -1, PRIME)
            for at, value in points.items()
        ) % PRIME  # fmt: skip
        made_up = {0: shares[0], 3: shares[3], 4: third.to_bytes(SHARE_BYTES, "little")}
        assert join(made_up) == other


def _product(values) -> int:
    result = 1
    for value in values:
        result *= value
    return result


def test_the_same_secret_is_shared_afresh_each_time():
    assert not set(split(SECRET, 2, 3)) & set(split(SECRET, 2, 3))


def test_a_changed_share_gives_another_secret_or_none():
    shares = split(SECRET, 2, 3)
    shares[0] = bytes([shares[0][0] ^ 1]) + shares[0][1:]
    assert join({0: shares[0], 1: shares[1]}) != SECRET


@pytest.mark.parametrize(("secret", "threshold"), [(b"short", 2), (SECRET, 0), (SECRET, 4)])
def test_what_cannot_be_shared_is_refused(secret, threshold):
    with pytest.raises(ValueError, match="expected a secret"):
        split(secret, threshold, 3)


def test_the_field_has_a_prime_number_of_elements():
    """Lucas and Lehmer: 2^p - 1 is prime if and only if it divides the term p - 2 of s_0 = 4, s_i = s_(i-1)^2 - 2."""
    term = 4
    for _ in range(521 - 2):
        term = (term * term - 2) % PRIME
    assert term == 0
