"""T15: a market learns a query from which of its crafted answers are refused, if a key opens more than one."""

import numpy as np

from protocol.encryption import EncryptedScores, MatchPlan, QueryKey
from protocol.errors import FormatError
from protocol.evaluation import EncodedIndex, evaluate

# A full tile of one group: every slot holds a score, so a constant can be added to all of them without touching an empty one.
PLAN = MatchPlan(4096, 4, MatchPlan.build(4096, 4).layout, 1, 4)
QUERY = np.array([0.62, -0.31, 0.07, -0.71])
TASK = QUERY / np.linalg.norm(QUERY)
STEPS = 8


class Surviving(QueryKey):
    """A broken build: the key outlives an answer, as if the querier asked again until it likes what comes."""

    def decrypt(self, *arguments, **named):
        kept = self._secret
        try:
            return super().decrypt(*arguments, **named)
        finally:
            self._secret = kept


def raised(answer: bytes, by: float) -> bytes:
    """Return the answer with all its scores raised: the market adds to a ciphertext without reading it."""
    parameters = PLAN.parameters
    words = EncryptedScores.from_bytes(answer, PLAN).coefficients().astype(object)
    words[:, 0, 0] = (words[:, 0, 0] + round(by * parameters.query_scale * parameters.row_scale)) % parameters.data_prime
    drops = np.array(parameters.drops, np.uint64)[None, :, None]
    return EncryptedScores.pack(PLAN, words.astype(np.uint64) >> drops).to_bytes()


def refuses(key: QueryKey, answer: bytes) -> bool:
    """Return what a careless querier lets the market see: whether it was content."""
    try:
        key.decrypt(answer, np.ones(PLAN.rows))
    except (FormatError, RuntimeError):
        return True
    return False


def learned(key: QueryKey) -> np.ndarray:
    """Return what the market makes of refusals: all rows are one axis, and raising a cosine beyond 1 shows how large it was."""
    query, found = key.encrypt(QUERY), []
    for axis in np.eye(PLAN.dimension):
        answer = evaluate(EncodedIndex.build(np.tile(axis, (PLAN.rows, 1)), PLAN), query).to_bytes()
        low, high = -1.0, 1.0
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if refuses(key, raised(answer, 1 - middle)) else (low, middle)
        found.append((low + high) / 2)
    return np.array(found)


def test_refusals_tell_nothing_since_a_key_opens_one_answer():
    assert np.abs(learned(QueryKey.fresh(PLAN)) - TASK).max() > 0.2


def test_a_key_that_survives_gives_the_whole_query_away():
    """The control: 32 answers, and every coordinate is known to a hundredth."""
    assert np.abs(learned(Surviving.fresh(PLAN)) - TASK).max() < 0.01
