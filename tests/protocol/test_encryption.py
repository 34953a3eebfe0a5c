import copy
from pathlib import Path

import numpy as np
import pytest

from protocol.encryption import DATA_PRIME, DEGREE, QUERY_BYTES, EncryptedQuery, EncryptedScores, Layout, MatchPlan, QueryKey
from protocol.errors import FeatureNormError, FormatError, IncompatibleSpecification
from protocol.evaluation import EncodedIndex, evaluate
from protocol.hazmat.seal import saved

PLAN = MatchPlan.build(100, 64)


def unit(*shape: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


ROWS, QUERY = unit(100, 64), unit(64, seed=1)
INDEX = EncodedIndex.build(ROWS, PLAN)


def asked(vector: np.ndarray = QUERY) -> tuple[QueryKey, EncryptedScores]:
    key = QueryKey.fresh(PLAN)
    return key, evaluate(INDEX, key.encrypt(vector))


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
    assert {len(QueryKey.fresh(PLAN).encrypt(vector).to_bytes()) for vector in vectors} == {QUERY_BYTES}
    assert len(QueryKey.fresh(MatchPlan.build(50_000, 64)).encrypt(QUERY).to_bytes()) == QUERY_BYTES


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
    _, scores = asked()
    assert EncryptedScores.from_bytes(scores.to_bytes(), PLAN).to_bytes() == scores.to_bytes()
    assert len(scores.to_bytes()) == PLAN.answer_bytes


def test_2_000_mutated_messages_give_typed_errors_or_are_valid_ring_elements():
    rng = np.random.default_rng(7)
    original = QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes()
    refused = 0
    for _ in range(2_000):
        data = bytearray(original)
        match rng.integers(4):
            case 0:
                data = data[: rng.integers(len(data))]
            case 1:
                data += bytes(int(rng.integers(1, 100)))
            case 2:
                at = int(rng.integers(len(data) - 8))
                data[at : at + 8] = rng.bytes(8)
            case 3:
                data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        try:
            query = EncryptedQuery.from_bytes(bytes(data), PLAN)
        except FormatError:
            refused += 1
            continue
        assert int(query.ciphertext.max()) < DATA_PRIME
    assert refused > 900


def test_a_word_at_its_prime_is_refused_and_one_below_is_not():
    data = bytearray(QueryKey.fresh(PLAN).encrypt(QUERY).to_bytes())
    data[:8] = (DATA_PRIME - 1).to_bytes(8, "little")
    EncryptedQuery.from_bytes(bytes(data), PLAN)
    data[:8] = DATA_PRIME.to_bytes(8, "little")
    with pytest.raises(FormatError, match="prime"):
        EncryptedQuery.from_bytes(bytes(data), PLAN)


def replaced(scores: EncryptedScores, tiles: np.ndarray) -> EncryptedScores:
    return EncryptedScores(scores.plan, tiles)


WAYS_TO_CHEAT = {
    "a random tile": lambda tiles: np.random.default_rng(1).integers(0, DATA_PRIME, tiles.shape, dtype=np.uint64),
    "one word changed": lambda tiles: np.where(np.arange(DEGREE) == 5, (tiles + np.uint64(1 << 48)) % np.uint64(DATA_PRIME), tiles),
    "a tile times a thousand": lambda tiles: np.array([[(int(w) * 1000) % DATA_PRIME for w in row] for row in tiles[0]], np.uint64)[None],
}


@pytest.mark.parametrize("forge", WAYS_TO_CHEAT.values(), ids=WAYS_TO_CHEAT)
def test_a_garbled_answer_is_noticed(forge):
    key, scores = asked()
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(replaced(scores, forge(scores.tiles.copy())), np.ones(100))


def test_an_honest_answer_is_not():
    key, scores = asked()
    assert np.abs(key.decrypt(scores, np.ones(100)) - ROWS @ QUERY).max() < 1e-3


def test_an_answer_made_under_another_key_is_noticed():
    key, _ = asked()
    _, scores = asked()
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(scores, np.ones(100))


def test_a_score_where_no_row_is_is_noticed_although_it_is_possible():
    """The market slips in a row: every cosine is below 1, and only the slots beyond the catalogue tell."""
    larger = MatchPlan(101, 64, PLAN.layout, PLAN.groups, PLAN.baby)
    index = EncodedIndex.build(np.vstack([ROWS, QUERY]), larger)
    key = QueryKey.fresh(PLAN)
    query = key.encrypt(QUERY)
    answer = evaluate(index, EncryptedQuery(larger, query.ciphertext, query.keys))
    with pytest.raises(FormatError, match="implausible"):
        key.decrypt(EncryptedScores(PLAN, answer.tiles), np.ones(100))


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
