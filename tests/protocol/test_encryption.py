import copy
from pathlib import Path

import numpy as np
import pytest

from protocol.encryption import PQ_STRICT, PRESETS, STD128, EncryptedQuery, EncryptedScores, Layout, MatchPlan, Parameters, QueryKey, preset
from protocol.errors import FeatureNormError, FormatError, IncompatibleSpecification
from protocol.evaluation import EncodedIndex, evaluate
from protocol.hazmat.packing import pack, packed_bytes, unpack
from protocol.hazmat.seal import saved

PLAN = MatchPlan.build(100, 64)
NAMES = [parameters.name for parameters in PRESETS]


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


ROWS, QUERY = unit(100, 64), unit(64, seed=1)
INDEX = EncodedIndex.build(ROWS, PLAN)


def asked(vector: np.ndarray = QUERY) -> tuple[QueryKey, bytes]:
    key = QueryKey.fresh(PLAN)
    return key, evaluate(INDEX, key.encrypt(vector)).to_bytes()


def test_both_sides_make_the_same_plan_and_every_slot_is_met_once():
    for rows, dimension in [(1, 64), (1000, 64), (5000, 64), (300, 65), (10, 1), (9, 1000)]:
        plan = MatchPlan.build(rows, dimension)
        assert plan == MatchPlan.build(rows, dimension)
        assert plan.rows <= plan.tiles * plan.rows_per_tile
        assert plan.layout is (Layout.CYCLIC if dimension == 64 else Layout.WINDOW)
        coordinates = plan.slot_coordinates()
        for pair in {0, plan.capacity - 1}:
            met = [coordinates[g * plan.period + (pair + k) % plan.period] for g in range(plan.groups) for k in range(plan.width)]
            if plan.layout is Layout.CYCLIC:
                met = [coordinates[(g * plan.period + pair + k) % len(coordinates)] for g in range(plan.groups) for k in range(plan.width)]
            assert sorted(m for m in met if m < dimension) == list(range(dimension))


@pytest.mark.parametrize(("rows", "dimension"), [(0, 64), (1 << 25, 64), (5, 0), (5, 5000)])
def test_a_plan_out_of_range_is_refused(rows, dimension):
    with pytest.raises(FormatError):
        MatchPlan.build(rows, dimension)


def test_a_query_has_the_same_length_whatever_the_task():
    vectors = [np.zeros(64), QUERY, 1e-9 * QUERY, np.eye(64)[3], 1.9 * QUERY]
    assert {len(QueryKey.fresh(PLAN).encrypt(vector).to_bytes()) for vector in vectors} == {STD128.query_bytes}
    assert len(QueryKey.fresh(MatchPlan.build(50_000, 64)).encrypt(QUERY).to_bytes()) == STD128.query_bytes


def test_the_same_task_never_gives_the_same_bytes():
    sent = {QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes() for _ in range(4)}
    assert len(sent) == 4


def test_a_key_is_for_one_query_and_cannot_be_copied_or_printed():
    key = QueryKey.fresh(PLAN)
    key.encrypt(QUERY)
    with pytest.raises(RuntimeError, match="fresh key"):
        key.encrypt(QUERY)
    with pytest.raises(TypeError):
        copy.copy(key)
    assert repr(key) == "<QueryKey: secret>"


@pytest.mark.parametrize("vector", [3 * QUERY, np.full(64, np.nan), np.full(64, np.inf)], ids=["too long", "nan", "infinite"])
def test_a_vector_out_of_range_is_refused(vector):
    with pytest.raises(FeatureNormError):
        QueryKey.fresh(PLAN).encrypt(vector)


def test_a_vector_of_another_dimension_is_refused():
    with pytest.raises(IncompatibleSpecification):
        QueryKey.fresh(PLAN).encrypt(unit(32))


def test_messages_read_back_to_the_same_bytes():
    query = QueryKey.fresh(PLAN).encrypt(QUERY)
    assert EncryptedQuery.from_bytes(query.to_bytes(), PLAN).to_bytes() == query.to_bytes()
    _, answer = asked()
    coefficients = EncryptedScores.from_bytes(answer, PLAN).coefficients()
    shifted = coefficients >> np.array(STD128.drops, np.uint64)[None, :, None]
    assert EncryptedScores.pack(PLAN, shifted).to_bytes() == answer
    assert len(answer) == PLAN.answer_bytes


@pytest.mark.parametrize("bits", [1, 22, 28, 50, 51, 63])
def test_packed_words_are_one_little_endian_integer(bits):
    values = np.random.default_rng(bits).integers(0, 1 << bits, 128, dtype=np.uint64)
    values[:2] = [(1 << bits) - 1, 0]
    data = pack(values, bits)
    assert len(data) == packed_bytes(128, bits)
    assert int.from_bytes(data, "little") == sum(int(v) << (i * bits) for i, v in enumerate(values))
    assert (unpack(data, 128, bits) == values).all()


def mutants(original: bytes, count: int, seed: int):
    """Yield `count` spoiled copies: other lengths, other bytes, other bits, other words, pieces moved."""
    rng, size = np.random.default_rng(seed), len(original)
    for _ in range(count):
        data = bytearray(original)
        at, other = (int(i) for i in rng.integers(size - 64, size=2))
        match rng.integers(7):
            case 0:
                data = data[: rng.integers(size)]
            case 1:
                data += bytes(int(rng.integers(1, 100)))
            case 2:
                data[at : at + 8] = rng.bytes(8)
            case 3:
                data[at] ^= 1 << int(rng.integers(8))
            case 4:
                data[at : at + 64] = b"\xff" * 64
            case 5:
                data[at : at + 64] = data[other : other + 64]
            case 6:
                data = bytearray(rng.bytes(64)) * (size // 64 + 1)
                data = data[:size]
        yield bytes(data)


def read_or_refused(data: bytes) -> EncryptedQuery | None:
    """Return the query in `data`, of which every word is below its prime, or None; anything but FormatError is a failure."""
    try:
        query = EncryptedQuery.from_bytes(data, PLAN)
    except FormatError:
        return None
    assert int(query.ciphertext.max()) < STD128.data_prime
    assert int(query.keys[:, 0].max()) < STD128.data_prime
    assert int(query.keys[:, 1].max()) < STD128.special_prime
    return query


def test_50_000_mutated_queries_give_typed_errors_or_are_valid_ring_elements():
    original = QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes()
    read = [read_or_refused(data) is not None for data in mutants(original, 50_000, seed=7)]
    # A third has another length or a run of ones, which is no word of a ring; everything else but 1 in 2**14 is one.
    assert 0.3 < np.mean(read) < 0.7


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_a_million_mutated_queries_are_refused_or_evaluated_in_bounded_time():
    import time

    original = QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes()
    evaluate(INDEX, EncryptedQuery.from_bytes(original, PLAN))  # compiled before the clock starts
    slowest = evaluated = 0
    for data in mutants(original, 1_000_000, seed=8):
        started = time.thread_time_ns()
        query = read_or_refused(data)
        if query is not None:
            assert len(evaluate(INDEX, query).to_bytes()) == PLAN.answer_bytes
            evaluated += 1
        slowest = max(slowest, time.thread_time_ns() - started)
    assert evaluated > 300_000
    assert slowest < 100_000_000  # about a hundred times the median


@pytest.mark.parametrize("word", ["ciphertext", "first key, data prime", "first key, special prime", "last of the second key"])
def test_a_word_at_its_prime_is_refused_and_one_below_is_not(word):
    """The last word of a polynomial ends with its bytes, so that it can be set without its neighbours."""
    query = QueryKey.fresh(PLAN).encrypt(QUERY)
    ciphertext, keys = query.ciphertext.copy(), query.keys.copy()
    target, prime = {
        "ciphertext": (ciphertext, STD128.data_prime),
        "first key, data prime": (keys[0, 0], STD128.data_prime),
        "first key, special prime": (keys[0, 1], STD128.special_prime),
        "last of the second key": (keys[1, 1], STD128.special_prime),
    }[word]
    target[-1] = prime - 1
    largest = EncryptedQuery(PLAN, ciphertext, keys, query.seeds)
    assert EncryptedQuery.from_bytes(largest.to_bytes(), PLAN).to_bytes() == largest.to_bytes()
    target[-1] = prime
    with pytest.raises(FormatError, match="prime"):
        EncryptedQuery(PLAN, ciphertext, keys, query.seeds)
    # The same on the wire, where the word is the last before a seed or before the limb of the special prime.
    forged = EncryptedQuery.__new__(EncryptedQuery)
    for name, value in {"plan": PLAN, "ciphertext": ciphertext, "keys": keys, "seeds": query.seeds}.items():
        object.__setattr__(forged, name, value)
    with pytest.raises(FormatError, match="prime"):
        EncryptedQuery.from_bytes(forged.to_bytes(), PLAN)


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("parameters", "query_bytes", "tile_bytes"), [(STD128, 129_216, 25_600), (PQ_STRICT, 258_240, 53_248)], ids=NAMES)
def test_messages_of_a_preset_have_the_promised_size(parameters, query_bytes, tile_bytes):
    assert (parameters.query_bytes, parameters.tile_bytes) == (query_bytes, tile_bytes)
    assert tile_bytes / parameters.degree <= 6.5, "bytes a score on a full tile"
    for rows, dimension in ((1, 64), (5000, 64), (300, 65)):
        plan = MatchPlan.build(rows, dimension, parameters)
        key = QueryKey.fresh(plan)
        assert len(key.encrypt(unit(dimension)).to_bytes()) == query_bytes


def test_an_unknown_preset_is_refused():
    assert preset("pq-strict") is PQ_STRICT
    with pytest.raises(IncompatibleSpecification, match="std128"):
        preset("std64")


def test_presets_do_not_mix():
    strict = MatchPlan.build(100, 64, PQ_STRICT)
    assert strict != PLAN
    with pytest.raises(IncompatibleSpecification, match="pq-strict"):
        evaluate(INDEX, QueryKey.fresh(strict).encrypt(QUERY))
    with pytest.raises(FormatError, match="bytes"):
        EncryptedQuery.from_bytes(QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes(), strict)


def test_scales_under_which_a_cosine_would_wrap_around_are_refused():
    with pytest.raises(FormatError, match="room"):
        Parameters("loud", STD128.degree, STD128.data_prime, STD128.special_prime, 2.0**30, 2.0**19, STD128.drops)


# --- answers ---------------------------------------------------------------------------------------------------------


def with_coefficients(change):
    """Return the forgery that changes an answer's coefficients before they are packed."""

    def forge(answer: bytes) -> bytes:
        coefficients = EncryptedScores.from_bytes(answer, PLAN).coefficients()
        parameters = PLAN.parameters
        changed = np.array(
            [[[change(int(c), k, j) % parameters.data_prime for j, c in enumerate(tile[k])] for k in range(2)] for tile in coefficients]
        )
        return EncryptedScores.pack(PLAN, changed.astype(np.uint64) >> np.array(parameters.drops, np.uint64)[None, :, None]).to_bytes()

    return forge


WAYS_TO_CHEAT = {
    "random bytes": lambda answer: np.random.default_rng(1).bytes(len(answer)),
    "zeros behind the middle": lambda answer: answer[: len(answer) // 2] + bytes(len(answer) - len(answer) // 2),
    # Eight groups are added: what is not a multiple of 8 cancels, and changes nothing.
    "one coefficient changed": with_coefficients(lambda c, k, j: c + ((1 << 48) if (k, j) == (0, 8) else 0)),
    "a tile times a thousand": with_coefficients(lambda c, k, j: 1000 * c),
    "polynomials swapped": lambda answer: answer[11_264:] + answer[:11_264],
    "too short": lambda answer: answer[:-1],
    "too long": lambda answer: answer + b"0",
    "empty": lambda answer: b"",
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_garbled_answer_is_noticed_and_burns_the_key(forge):
    key, answer = asked()
    with pytest.raises(FormatError):
        key.decrypt(forge(answer), np.ones(100))
    with pytest.raises(RuntimeError, match="fresh key"):  # also the honest answer: nobody learns whether it would have been
        key.decrypt(answer, np.ones(100))


def test_an_honest_answer_is_accepted_once_and_no_query_follows():
    key, answer = asked()
    assert np.abs(key.decrypt(answer, np.ones(100), known={3: ROWS[3], 99: ROWS[99]}) - ROWS @ QUERY).max() < 1e-3
    with pytest.raises(RuntimeError, match="fresh key"):
        key.decrypt(answer, np.ones(100))
    with pytest.raises(RuntimeError, match="fresh key"):
        key.encrypt(QUERY)


def test_every_anomaly_says_the_same():
    """The message would otherwise be the oracle of a reaction attack, if a caller ever showed it."""
    said = set()
    for forge in (WAYS_TO_CHEAT["random bytes"], WAYS_TO_CHEAT["a tile times a thousand"], lambda answer: answer):
        key, answer = asked()
        with pytest.raises(FormatError) as raised:
            key.decrypt(forge(answer), np.ones(100), known={0: -ROWS[0]})
        said.add((str(raised.value), raised.value.hint))
    assert len(said) == 1


def test_a_wrong_score_of_a_row_the_querier_holds_is_noticed():
    """Possible scores, empty slots: only who knows a row can tell that the market scored another one in its place."""
    shuffled = ROWS.copy()
    shuffled[[7, 8]] = shuffled[[8, 7]]
    key = QueryKey.fresh(PLAN)
    answer = evaluate(EncodedIndex.build(shuffled, PLAN), key.encrypt(QUERY)).to_bytes()
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(answer, np.ones(100), known={7: ROWS[7]})
    key = QueryKey.fresh(PLAN)  # the control: without the row nothing is seen
    key.decrypt(evaluate(EncodedIndex.build(shuffled, PLAN), key.encrypt(QUERY)).to_bytes(), np.ones(100))


def test_an_answer_made_under_another_key_is_noticed():
    key, _ = asked()
    _, answer = asked()
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(answer, np.ones(100))


def test_a_score_where_no_row_is_is_noticed_although_it_is_possible():
    """The market slips in a row: every cosine is below 1, and only the slots beyond the catalogue tell."""
    larger = MatchPlan(101, 64, PLAN.layout, PLAN.groups, PLAN.baby)
    index = EncodedIndex.build(np.vstack([ROWS, QUERY]), larger)
    key = QueryKey.fresh(PLAN)
    query = key.encrypt(QUERY)
    answer = evaluate(index, EncryptedQuery(larger, query.ciphertext, query.keys, query.seeds))
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(answer.to_bytes(), np.ones(100))


def test_files_for_seal_are_private_and_gone_even_after_an_error():
    seen: list[Path] = []

    class Unsaveable:
        def save(self, path: str) -> None:
            seen.append(Path(path).parent)
            assert seen[0].stat().st_mode & 0o077 == 0
            Path(path).write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        saved(Unsaveable())
    assert not seen[0].exists()
