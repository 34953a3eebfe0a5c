from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.catalogue import EMPTY_HEAD, ROW, centred_means, extend_head, open_rows, row_of, sign_head
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature
from protocol.privacy import RECORD, PrivacyUnit
from tests.protocol.worlds import release_of, small_map

MAP, OWNER, MARKET = small_map(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
RELEASES = [release_of(MAP, OWNER, number=n + 1, seed=n) for n in range(3)]
ROWS = [row_of(release, MAP) for release in RELEASES]
HEAD = sign_head(3, extend_head(EMPTY_HEAD, ROWS), MARKET)
PUBLIC = MARKET.public_key().public_bytes_raw()


def test_the_scalars_of_a_row_are_those_of_the_release():
    columns = open_rows(MAP, [], ROWS, HEAD, PUBLIC).columns(2)
    for i, release in enumerate(RELEASES):
        (mean,) = centred_means([release.specification], MAP)
        assert columns.norms_squared[i] == pytest.approx(mean @ mean, rel=1e-9)
        assert columns.noise_stds[i] * columns.counts[i] == pytest.approx(
            release.specification.noise_std * release.specification.count, rel=1e-9
        )


def test_a_query_of_prompts_uses_the_first_view_only():
    columns = open_rows(MAP, [], ROWS, HEAD, PUBLIC).columns(1)
    mean = centred_means([RELEASES[0].specification], MAP)[0, : MAP.view_dimension]
    assert columns.norms_squared[0] == pytest.approx(mean @ mean, rel=1e-9)


def test_rows_come_in_parts():
    whole, parts = open_rows(MAP, [], ROWS, HEAD, PUBLIC), open_rows(MAP, ROWS[:2], ROWS[2:], HEAD, PUBLIC)
    assert whole.release_ids == parts.release_ids == [release.release_id for release in RELEASES]


WAYS_TO_CHEAT = {
    "a row missing": lambda rows: rows[:-1],
    "rows swapped": lambda rows: [rows[1], rows[0], rows[2]],
    "a row twice": lambda rows: [*rows, rows[0]],
    "one bit of a scalar": lambda rows: [rows[0], rows[1][:40] + bytes([rows[1][40] ^ 1]) + rows[1][41:], rows[2]],
    "another name": lambda rows: [rows[0][:-1] + b"z", *rows[1:]],
    "a row cut short": lambda rows: [rows[0][:50], *rows[1:]],
    "another privacy unit": lambda rows: [rows[0] + b" field:person", *rows[1:]],
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_catalogue_that_the_market_did_not_sign_is_refused(forge):
    with pytest.raises(FormatError):
        open_rows(MAP, [], forge(list(ROWS)), HEAD, PUBLIC)


def test_a_head_signed_by_someone_else_is_refused():
    with pytest.raises(InvalidSignature):
        open_rows(MAP, [], ROWS, sign_head(3, HEAD.head, OWNER), PUBLIC)
    with pytest.raises(InvalidSignature):
        open_rows(MAP, [], ROWS, replace(HEAD, size=2), PUBLIC)


def test_a_release_under_another_map_has_no_row():
    with pytest.raises(IncompatibleSpecification):
        row_of(RELEASES[0], small_map("other", seed=9))


def test_sums_that_no_data_set_has_are_refused():
    release = RELEASES[0]
    sums = np.full(5, 2**31 - 1, np.int32)
    huge = replace(release, specification=replace(release.specification, noisy_sums=sums))
    with pytest.raises(FormatError, match="too large"):
        row_of(huge, MAP)


@pytest.mark.parametrize(
    "label", [b"", b"a b", b"a record", b"a field:", b"a field:text", b"a  field:x", b"a field:x y", b" field:x", b"\xff"]
)
def test_a_row_whose_label_nobody_writes_is_refused_though_it_is_signed(label):
    rows = [ROWS[0][: ROW.itemsize] + label]
    with pytest.raises(FormatError, match=r"unit|row"):
        open_rows(MAP, [], rows, sign_head(1, extend_head(EMPTY_HEAD, rows), MARKET), PUBLIC)


def test_the_unit_of_a_row_is_the_releases():
    guarantee = replace(RELEASES[0].specification.guarantee, unit=PrivacyUnit("person"))
    release = replace(RELEASES[0], specification=replace(RELEASES[0].specification, guarantee=guarantee))
    rows = [ROWS[1], row_of(release, MAP)]
    catalogue = open_rows(MAP, [], rows, sign_head(2, extend_head(EMPTY_HEAD, rows), MARKET), PUBLIC)
    assert [catalogue.unit_of(position) for position in range(2)] == [RECORD, PrivacyUnit("person")]
    assert rows[1] == ROWS[0].replace(RELEASES[0].release_id, release.release_id) + b" field:person", "rows of records are as they were"
