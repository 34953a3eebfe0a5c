import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol import catalogue as catalogues
from protocol.catalogue import (
    EMPTY_HEAD,
    MAX_TERMS_BYTES,
    ROW,
    Catalogue,
    Tables,
    Terms,
    card_of,
    centred_means,
    columns_of,
    extend_head,
    open_cards,
    open_mirror,
    open_rows,
    parse_cards,
    parse_terms,
    scalars_of,
    sign_head,
    split_cards,
    tables_of,
)
from protocol.codec import decode, encode
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, NotFound
from protocol.privacy import RECORD, PrivacyUnit
from protocol.release import Card, open_envelope, sign_release
from tests.protocol.test_admission import promise
from tests.protocol.worlds import ADAPTER, ONE, release_of, small_map

MAP, OWNER, MARKET = small_map(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
OTHER_TERMS = {"adapter": ADAPTER, "guarantee": replace(ONE, unit=PrivacyUnit("person"))}
RELEASES = [release_of(MAP, OWNER, number=n + 1, seed=n, **(OTHER_TERMS if n == 2 else {})) for n in range(5)]
SPECIFICATIONS = [release.specification for release in RELEASES]
TABLES = tables_of(RELEASES, MAP)
HEAD = sign_head(TABLES.head(), MARKET)
PUBLIC = MARKET.public_key().public_bytes_raw()


def opened(tables: Tables = TABLES, head=HEAD, key=PUBLIC) -> Catalogue:
    return open_rows(MAP, tables.rows, tables.terms, head, key)


def signed(tables: Tables):
    return sign_head(tables.head(), MARKET)


def test_a_row_has_sixteen_bytes():
    assert ROW.itemsize == 16
    assert len(TABLES.rows) == 16 * len(RELEASES)


WORST = {"control characters": "\x01" * 500, "quotes": '"' * 500, "four bytes each": "\U0001f5dd" * 500, "nothing": ""}


@pytest.mark.parametrize("text", WORST.values(), ids=WORST)
def test_what_a_release_may_say_its_terms_may_say(text):
    """Else one owner's release, which a market takes, would keep every client from reading the catalogue."""
    unit = PrivacyUnit("f" * 63)
    training = promise(1.2345678901234567, 1.2345678901234567e-10)
    training = replace(training, guarantee=replace(training.guarantee, unit=unit))
    longest = release_of(MAP, OWNER, guarantee=replace(ONE, unit=unit), adapter=replace(ADAPTER, guarantee=training))
    longest = replace(longest, card=Card("n" * 63, summary=text, licence=text))
    terms, card = Terms.of(longest), card_of(longest)
    assert parse_terms(terms.body) == terms
    assert len(terms.body) <= MAX_TERMS_BYTES
    assert parse_cards([card])[0].name == "n" * 63
    assert open_envelope(sign_release(longest, OWNER)).card == longest.card


def slow_count(release) -> float:
    """docs/protocol.md 3.4 in Python's own numbers."""
    s0, *sums = (int(value) for value in release.specification.noisy_sums)
    norm, spread, d = MAP.full.norm, MAP.full.norm_std / (2 * MAP.full.norm), MAP.dimension
    noise = release.specification.noise_variance / 4096**2
    from_count, count_variance = s0 / 1024, release.specification.noise_variance / 1024**2
    from_length = math.sqrt(max(sum(s * s for s in sums) / 4096**2 - d * noise, 0.0) / norm)
    n = max((from_count + from_length) / 2, 1.0)
    for _ in range(4):
        variance = (spread * n) ** 2 + (2 * d * noise**2 + 4 * noise * norm * n**2) / (2 * norm * n) ** 2
        n = max((from_count / count_variance + from_length / variance) / (1 / count_variance + 1 / variance), 1.0)
    return n


def test_the_scalars_of_a_row_are_those_of_the_release_to_the_last_bit():
    rows = opened().rows
    for row, release in zip(rows, RELEASES, strict=True):
        assert row["count"] == np.float32(slow_count(release))
        n = Fraction(float(row["count"]))
        mean = [
            Fraction(int(s)) / (4096 * n) - Fraction(int(g), 1 << 20)
            for s, g in zip(release.specification.noisy_sums[1:], MAP.centre, strict=True)
        ]
        for view, half in enumerate((mean[:2], mean[2:])):
            assert row["norms_squared"][view] == np.float32(float(sum(m * m for m in half)))


@pytest.mark.parametrize("views", [1, 2])
def test_the_columns_of_a_catalogue_are_those_of_its_specifications(views):
    """The mirror and the encrypted query rank by the same numbers."""
    columns, direct = opened().columns(views), columns_of(SPECIFICATIONS, MAP, views)
    for name in ("counts", "count_stds", "noise_stds"):
        assert (getattr(columns, name) == getattr(direct, name)).all()
    means = centred_means(SPECIFICATIONS, MAP)[:, : views * MAP.view_dimension]
    assert columns.norms_squared == pytest.approx((means**2).sum(axis=1), rel=1e-6)
    assert direct.norms_squared == pytest.approx(columns.norms_squared, rel=1e-6)


def test_terms_are_numbered_by_their_first_use_and_shared():
    catalogue = opened()
    assert catalogue.rows["terms"].tolist() == [0, 0, 1, 0, 0]
    assert [catalogue.unit_of(at) for at in (0, 2)] == [RECORD, PrivacyUnit("person")]
    terms = catalogue.terms_of(2)
    assert (terms.adapter_class, terms.adapter_guarantee, terms.base_model.hex()) == (1024, "none", MAP.base_model)
    assert catalogue.terms_of(0).adapter_class == 0


@pytest.mark.parametrize(("size", "expected"), [(1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048), (64 << 20, 64 << 20)])
def test_an_adapter_counts_as_the_next_power_of_two(size, expected):
    assert Terms.of(replace(RELEASES[0], adapter=replace(ADAPTER, size_bytes=size))).adapter_class == expected


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


WAYS_TO_CHEAT = {
    "a row missing": lambda t: replace(t, rows=t.rows[:-16]),
    "rows swapped": lambda t: replace(t, rows=t.rows[16:32] + t.rows[:16] + t.rows[32:]),
    "a row twice": lambda t: replace(t, rows=t.rows + t.rows[:16]),
    "one bit of a count": lambda t: replace(t, rows=flipped(t.rows, 17)),
    "other terms": lambda t: replace(t, rows=flipped(t.rows, 12)),
    "a row cut short": lambda t: replace(t, rows=t.rows[:-1]),
    "terms missing": lambda t: replace(t, terms=t.terms[:-1]),
    "terms swapped": lambda t: replace(t, terms=t.terms[::-1]),
    "a smaller epsilon": lambda t: replace(t, terms=(t.terms[0].replace(b'"1.0"', b'"0.5"'), t.terms[1])),
    "terms that nobody uses": lambda t: replace(t, terms=(*t.terms, t.terms[0])),
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_catalogue_that_the_market_did_not_sign_is_refused(forge):
    opened()
    with pytest.raises(FormatError):
        opened(forge(TABLES))


SIGNED_NONSENSE = {
    "terms that nobody uses": replace(TABLES, terms=(*TABLES.terms, Terms.of(replace(RELEASES[0], adapter=ADAPTER)).body)),
    "terms that are not there": replace(TABLES, terms=TABLES.terms[:1]),
    "terms not in their order": replace(TABLES, rows=TABLES.rows[32:] + TABLES.rows[:32]),
    "a count of nothing": replace(TABLES, rows=bytes(4) + TABLES.rows[4:]),
    "a count that is no number": replace(TABLES, rows=np.float32(np.nan).tobytes() + TABLES.rows[4:]),
    "a negative norm": replace(TABLES, rows=TABLES.rows[:4] + np.float32(-1).tobytes() + TABLES.rows[8:]),
    "terms that are none": replace(TABLES, terms=(b"nonsense", TABLES.terms[1])),
}


@pytest.mark.parametrize("tables", SIGNED_NONSENSE.values(), ids=SIGNED_NONSENSE)
def test_nonsense_is_refused_though_it_is_signed(tables):
    with pytest.raises(FormatError):
        opened(tables, signed(tables))


def test_a_head_signed_by_someone_else_is_refused():
    for head in (
        sign_head(HEAD, OWNER),
        *(
            replace(HEAD, **{name: value})
            for name, value in {"size": 4, "rows": bytes(32), "terms_size": 1, "terms": bytes(32), "cards": bytes(32)}.items()
        ),
    ):
        with pytest.raises(InvalidSignature):
            opened(head=head)


def test_a_release_under_another_map_has_no_row():
    with pytest.raises(IncompatibleSpecification):
        scalars_of(RELEASES[0], small_map("other", seed=9))


def test_sums_that_no_data_set_has_are_refused():
    release = RELEASES[0]
    sums = np.full(5, 2**31 - 1, np.int32)
    huge = replace(release, specification=replace(release.specification, noisy_sums=sums))
    with pytest.raises(FormatError, match="too large"):
        scalars_of(huge, MAP)


# Terms and cards ----------------------------------------------------------------------------------------------------------


def changed(**fields) -> bytes:
    magic = catalogues.TERMS
    metadata, base = decode(magic, TABLES.terms[1])
    return encode(magic, {**metadata, **fields}, base)


BAD_TERMS = {
    "a class that is no power of two": changed(adapter_class=3),
    "a class below nothing": changed(adapter_class=-1),
    "an adapter without a guarantee": changed(adapter_guarantee=""),
    "a guarantee without an adapter": changed(adapter_class=0),
    "no epsilon": changed(epsilon="x"),
    "an epsilon out of range": changed(epsilon="99.0"),
    "another spelling": changed(epsilon="1.00"),
    "an unknown relation": changed(relation="friends"),
    "a unit that is none": changed(unit="field:text"),
    "no noise": changed(noise_variance=0),
    "less noise than its epsilon needs": changed(noise_variance=1_000_000),
    "a novel": changed(licence="x" * 5000),
    "a field too many": changed(extra="1"),
    "a short base model": TABLES.terms[1][:-1],
}


@pytest.mark.parametrize("body", BAD_TERMS.values(), ids=BAD_TERMS)
def test_terms_that_no_release_has_are_refused(body):
    assert parse_terms(TABLES.terms[1]) == Terms.of(RELEASES[2])
    with pytest.raises(FormatError):
        parse_terms(body)


def pages_at(size: int, monkeypatch) -> tuple[Tables, Catalogue, list[bytes]]:
    monkeypatch.setattr(catalogues, "PAGE_SIZE", size)
    tables = tables_of(RELEASES, MAP)
    chains = [extend_head(EMPTY_HEAD, tables.cards[start : start + size]) for start in range(0, len(tables.cards), size)]
    return tables, opened(tables, signed(tables)), chains


def test_cards_come_by_pages_and_others_stay_unknown(monkeypatch):
    tables, catalogue, chains = pages_at(2, monkeypatch)
    shown = open_cards(catalogue, chains, {1: tables.cards[2:4]})
    assert [shown.card(at).name for at in (2, 3)] == ["owner-2", "owner-3"]
    assert shown.release_ids == [b"", b"", RELEASES[2].release_id, RELEASES[3].release_id, b""]
    with pytest.raises(NotFound, match="not fetched"):
        shown.card(4)
    whole = open_cards(shown, chains, {0: tables.cards[:2], 2: tables.cards[4:]})
    assert whole.names == tuple(release.card.name for release in RELEASES)
    assert whole.only([3, 1]).names == ("owner-3", "owner-1")


def test_cards_that_are_not_under_the_signed_head_are_refused(monkeypatch):
    tables, catalogue, chains = pages_at(2, monkeypatch)
    other = card_of(replace(RELEASES[2], card=Card("stranger")))
    for pages, digests in (
        ({1: tables.cards[3:1:-1]}, chains), ({1: (tables.cards[2],)}, chains), ({1: (other, tables.cards[3])}, chains),
        ({0: tables.cards[2:4]}, chains), ({}, chains[:-1]), ({}, chains[::-1]), ({}, [*chains, bytes(32)]),
    ):  # fmt: skip
        with pytest.raises(FormatError):
            open_cards(catalogue, digests, pages)


def test_cards_lie_one_after_the_other_and_nothing_else_does():
    data = b"".join(TABLES.cards)
    assert split_cards(data, 5) == list(TABLES.cards)
    assert split_cards(b"", 0) == []
    for cut, count in ((data, 4), (data, 6), (data[:-1], 5), (data + b"x", 5), (data[:20], 1), (b"", 1)):
        with pytest.raises(FormatError):
            split_cards(cut, count)
    for body in (TABLES.cards[0] + b"x", TABLES.cards[0][:33], bytes(32) + b"\x01 ", bytes(32) + b"\x02\xff\xff"):
        with pytest.raises(FormatError):
            parse_cards([body])


def test_cards_that_are_read_together_are_those_that_are_read_alone():
    assert parse_cards(TABLES.cards) == [parse_cards([body])[0] for body in TABLES.cards]
    assert parse_cards([]) == []
    whole, broken = TABLES.cards[0], bytes(32) + b"\x03a\nb"  # which is two good names, one a line
    for bodies in ([broken], [whole, broken], [broken, whole], [whole, bytes(32) + b"\x02a\n"], [whole, whole[:33]]):
        with pytest.raises(FormatError):
            parse_cards(bodies)


def test_a_mirror_recomputes_everything():
    assert open_mirror(MAP, RELEASES, HEAD, PUBLIC).names == tuple(release.card.name for release in RELEASES)
    for releases in (RELEASES[:-1], RELEASES[::-1], [*RELEASES[:-1], release_of(MAP, OWNER, number=5, seed=77)]):
        with pytest.raises(FormatError):
            open_mirror(MAP, releases, HEAD, PUBLIC)
    renamed = [replace(RELEASES[0], card=Card("another")), *RELEASES[1:]]  # the same row and terms: only the card tells
    with pytest.raises(FormatError, match="cards"):
        open_mirror(MAP, renamed, HEAD, PUBLIC)
