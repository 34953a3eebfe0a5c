"""A market that alters one word of an answer is proved guilty by its own signature; an honest one is cleared; nobody else is accused."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.catalogue import ROW, Tables, centred_means, sign_head, tables_of
from protocol.encryption import PQ_STRICT, STD128, EncryptedScores, MatchPlan, QueryKey
from protocol.errors import FormatError, InvalidSignature, UnsupportedVersion
from protocol.evaluation import EncodedIndex, evaluate
from protocol.proof import (
    AnswerProof,
    Finding,
    index_digest,
    judge,
    pack_releases,
    sign_statement,
    statement_of,
    unpack_releases,
    verify_statement,
)
from protocol.release import sign_release
from tests.protocol.worlds import DIMENSION, release_of, small_map

MAP, MARKET, STRANGER = small_map(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
OWNERS = [Ed25519PrivateKey.generate() for _ in range(6)]
RELEASES = [release_of(MAP, owner, seed=seed) for seed, owner in enumerate(OWNERS)]
ROWS = centred_means([release.specification for release in RELEASES], MAP)
PUBLIC = MARKET.public_key().public_bytes_raw()
HEAD = sign_head(tables_of(RELEASES, MAP).head(), MARKET)


def exchange(alter=lambda scores: scores, *, rows=ROWS, key=MARKET, parameters=STD128, seed=0) -> AnswerProof:
    """A query and the answer that a market signed to it.  alter: what it does to the answer before.  rows: what it really holds."""
    plan = MatchPlan.build(len(RELEASES), DIMENSION, parameters)
    query = QueryKey.fresh(plan).encrypt(np.random.default_rng(seed).uniform(-0.4, 0.4, DIMENSION)).to_bytes()
    index = EncodedIndex.build(rows, plan)
    from protocol.encryption import EncryptedQuery

    answer = alter(evaluate(index, EncryptedQuery.from_bytes(query, plan)).to_bytes())
    digest = index_digest(EncodedIndex.build(ROWS, plan))
    signature = sign_statement(statement_of(query, MAP.map_id, HEAD, digest, answer), key)
    return AnswerProof(PUBLIC, MAP.map_id, parameters.name, HEAD, digest, query, answer, signature)


HONEST = exchange()


def found(proof: AnswerProof, releases=RELEASES) -> Finding:
    return judge(proof, releases, MAP).finding


@pytest.mark.parametrize("parameters", [STD128, PQ_STRICT], ids=["std128", "pq-strict"])
def test_an_honest_market_is_cleared(parameters):
    proof = exchange(parameters=parameters)
    assert found(proof) is Finding.HONEST
    assert found(AnswerProof.from_bytes(proof.to_bytes())) is Finding.HONEST


@pytest.mark.slow
def test_an_honest_market_is_cleared_a_thousand_times():
    assert all(found(exchange(seed=seed)) is Finding.HONEST for seed in range(1000))


def flip(at: int, bit: int):
    return lambda answer: answer[:at] + bytes([answer[at] ^ 1 << bit]) + answer[at + 1 :]


@pytest.mark.parametrize("seed", range(20))
def test_any_bit_of_an_answer_that_the_market_alters_proves_it_wrong(seed):
    rng = np.random.default_rng(seed)
    proof = exchange(flip(int(rng.integers(len(HONEST.answer))), int(rng.integers(8))), seed=seed)
    assert found(proof) is Finding.WRONG


@pytest.mark.slow
def test_a_thousand_altered_words_are_proven_wrong():
    rng = np.random.default_rng(5)
    for _ in range(1000):
        spoil = flip(int(rng.integers(len(HONEST.answer))), int(rng.integers(8)))
        answer = spoil(HONEST.answer)
        signature = sign_statement(statement_of(HONEST.query, MAP.map_id, HEAD, HONEST.index, answer), MARKET)
        assert found(replace(HONEST, answer=answer, signature=signature)) is Finding.WRONG


@pytest.mark.parametrize("row", range(len(RELEASES)))
def test_a_market_that_raises_or_hides_a_single_score_is_proven_wrong(row):
    for factor in (0.0, -1.0):
        changed = ROWS.copy()
        changed[row] *= factor
        assert found(exchange(rows=changed)) is Finding.WRONG


def test_a_market_that_answers_with_zeros_or_garbage_is_proven_wrong():
    for alter in (
        lambda answer: bytes(len(answer)),
        lambda answer: np.random.default_rng(1).bytes(len(answer)),
        lambda answer: answer[:-1],
    ):
        assert found(exchange(alter)) is Finding.WRONG


def test_a_market_that_signs_another_index_is_proven_wrong():
    signature = sign_statement(statement_of(HONEST.query, MAP.map_id, HEAD, bytes(32), HONEST.answer), MARKET)
    assert found(replace(HONEST, index=bytes(32), signature=signature)) is Finding.WRONG


def signed_by(proof: AnswerProof, key) -> AnswerProof:
    return replace(proof, signature=sign_statement(proof.statement, key))


OTHER = exchange(seed=9)
FORGED = {
    "signed by somebody else": signed_by(replace(HONEST, answer=bytes(len(HONEST.answer))), STRANGER),
    "an answer that was never signed": replace(HONEST, answer=bytes(len(HONEST.answer))),
    "the answer to another query": replace(HONEST, answer=OTHER.answer, signature=OTHER.signature),
    "another query for this answer": replace(HONEST, query=OTHER.query),
    "a head that was never signed": replace(HONEST, head=replace(HEAD, size=5)),
    "a head signed by somebody else": replace(HONEST, head=sign_head(HEAD, STRANGER)),
    "another index": replace(HONEST, index=bytes(32)),
    "another market's key": replace(HONEST, market_key=STRANGER.public_key().public_bytes_raw()),
    "a key that is none": replace(HONEST, market_key=b"\xff" * 32),
    "another map": replace(HONEST, map_id=bytes(32)),
    "a preset of the other size": replace(HONEST, parameters="pq-strict"),
    "an unknown preset": replace(HONEST, parameters="std64"),
    "no signature": replace(HONEST, signature=bytes(64)),
}


@pytest.mark.parametrize("proof", FORGED.values(), ids=FORGED)
def test_a_forged_proof_accuses_nobody(proof):
    assert found(HONEST) is Finding.HONEST
    assert found(proof) is Finding.NO_PROOF
    assert found(AnswerProof.from_bytes(proof.to_bytes())) is Finding.NO_PROOF


def test_other_releases_than_the_catalogues_accuse_nobody():
    """Whoever shows an altered catalogue could otherwise make an honest answer look wrong."""
    other = release_of(MAP, OWNERS[2], seed=99)
    for releases in (RELEASES[:-1], RELEASES[::-1], [*RELEASES[:2], other, *RELEASES[3:]], []):
        assert found(HONEST, releases) is Finding.NO_PROOF
    assert found(HONEST, [*RELEASES, other]) is Finding.HONEST, "a catalogue that grew since will do"


def test_a_market_that_signs_rows_or_terms_of_its_own_is_proven_wrong():
    """A row that claims less noise or a longer mean wins rankings while the answer to every query is right."""
    tables = tables_of(RELEASES, MAP)
    rows = np.frombuffer(tables.rows, ROW).copy()
    rows["norms_squared"][2] *= 50
    terms = (tables.terms[0].replace(b'"1.0"', b'"0.9"'), *tables.terms[1:])
    assert terms != tables.terms
    for lie in (Tables(rows.tobytes(), tables.terms, tables.cards), Tables(tables.rows, terms, tables.cards)):
        proof = replace(HONEST, head=sign_head(lie.head(), MARKET))
        proof = replace(proof, signature=sign_statement(proof.statement, MARKET))
        assert found(proof) is Finding.WRONG
        assert found(proof, [*RELEASES[:5], release_of(MAP, OWNERS[5], seed=99)]) is Finding.NO_PROOF
        assert found(replace(proof, head=sign_head(lie.head(), STRANGER))) is Finding.NO_PROOF


def test_a_preset_is_not_signed_but_fixes_the_lengths():
    """The preset stands in the query's length: a proof under another name is none."""
    assert STD128.query_bytes != PQ_STRICT.query_bytes
    with pytest.raises(FormatError):
        EncryptedScores.from_bytes(HONEST.answer + b"x", MatchPlan.build(len(RELEASES), DIMENSION))


def test_a_signature_is_bound_to_everything_it_speaks_of():
    verify_statement(HONEST.statement, HONEST.signature, PUBLIC)
    for name in ("query", "map_id", "state", "index", "answer"):
        with pytest.raises(InvalidSignature):
            verify_statement(replace(HONEST.statement, **{name: bytes(32)}), HONEST.signature, PUBLIC)


def test_a_proof_file_holds_neither_key_nor_task_and_reads_back():
    data = HONEST.to_bytes()
    assert AnswerProof.from_bytes(data) == HONEST
    assert len(data) - len(HONEST.query) - len(HONEST.answer) < 600
    for spoiled in (data[:-1], data + b"x", data[:100], b"", data.replace(b"std128", b"std 28", 1)[:-3]):
        with pytest.raises(FormatError):
            AnswerProof.from_bytes(spoiled)
    with pytest.raises(UnsupportedVersion):
        AnswerProof.from_bytes(data.replace(b"proof/v1", b"proof/v2", 1))


def test_releases_travel_as_one_file():
    envelopes = [sign_release(release, owner) for release, owner in zip(RELEASES, OWNERS, strict=True)]
    data = pack_releases(envelopes)
    assert unpack_releases(data) == envelopes
    assert unpack_releases(pack_releases([])) == []
    for spoiled in (data[:-1], data + b"x", data[:60], pack_releases([])[:-1]):
        with pytest.raises(FormatError):
            unpack_releases(spoiled)
