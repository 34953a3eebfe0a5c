"""Who gets a place among the first of a ranking: at most so many of one organisation, however many keys it comes with, and no copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protocol.scoring import Match, Verdict

if TYPE_CHECKING:
    from nodes.query import Found

PLACES_PER_ORGANISATION = 2


@dataclass(frozen=True, slots=True)
class Places:
    """The first matches of a ranking, and which before the last of them had to stand back."""

    matches: tuple[Match, ...]
    verdict: Verdict  # on the first of them
    folded: Mapping[str, int]  # how many of each organisation; "" for owners that have none
    copies: Mapping[str, str]  # title of a copy: title of what it is a copy of


def anything(match: Match) -> bool:
    """Want every match."""
    return True


def places(found: Found, count: int, most: int = PLACES_PER_ORGANISATION, wanted: Callable[[Match], bool] = anything) -> Places:
    """Return the first `count` matches that are wanted, at most `most` of one organisation; 0 for any number of it.

    An owner that was not invited is an organisation of its own.  Copies are known where the releases lie here in clear.
    """
    taken: Counter[int] = Counter()
    folded: Counter[str] = Counter()
    copies: dict[str, str] = {}
    kept: list[Match] = []
    for match in found.ranking.matches:
        if len(kept) == count:
            break
        if not wanted(match):
            continue
        original = found.original_of(match)
        if original is not None:
            copies[found.title_of(match)] = original
            continue
        number = found.owner_of(match)
        if most and taken[number] == most:
            folded[found.organisations[number]] += 1
            continue
        taken[number] += 1
        kept.append(match)
    return Places(tuple(kept), found.verdict_on(kept[0]) if kept else Verdict.NONE, folded, copies)
