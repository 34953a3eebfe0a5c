"""Two rankings of the same releases, compared up to what the noise of a ciphertext exchanges."""

import itertools

from protocol.scoring import Ranking


def farthest_exchanged(one: Ranking, other: Ranking) -> float:
    """Return the largest difference in LLR, by the other, of two releases that the two rankings order differently; 0 if none are."""
    llr = {match.release_id: match.llr for match in other.matches}
    place = {match.release_id: match.rank for match in other.matches}
    assert len(llr) == len(one.matches) == len(other.matches)
    pairs = itertools.combinations([match.release_id for match in one.matches], 2)
    return max((abs(llr[first] - llr[second]) for first, second in pairs if place[first] > place[second]), default=0.0)
