"""Canonical JSON is made by hand, so that a verifier needs the standard library alone; another implementation says whether it is right."""

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from protocol.codec import LARGEST_INTEGER, canonical_json
from protocol.errors import FormatError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PLAIN = st.recursive(
    TEXTS | st.integers(-LARGEST_INTEGER, LARGEST_INTEGER),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
)


@given(st.dictionaries(TEXTS, PLAIN, max_size=5))
def test_canonical_json_is_that_of_another_implementation(value):
    assert canonical_json(value) == rfc8785.dumps(value)


def test_names_are_sorted_by_utf_16_and_not_by_code_point():
    value = {"\U0001f600": 1, "\ufb33": 2}
    assert canonical_json(value) == rfc8785.dumps(value) == '{"\U0001f600":1,"\ufb33":2}'.encode()
    assert sorted(value) == ["\ufb33", "\U0001f600"], "an implementation that sorts code points is told apart"


@pytest.mark.parametrize(
    "value", [1.0, True, None, b"x", "\ud800", 1 << 53, -(1 << 53), {1: 2}, {"\udfff": 1}], ids=lambda value: ascii(value)[:12]
)
def test_what_rfc_8785_or_the_protocol_does_not_know_is_refused(value):
    with pytest.raises(FormatError):
        canonical_json({"x": value})


def test_nesting_without_end_is_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(FormatError):
        canonical_json({"x": deep})
