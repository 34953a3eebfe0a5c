"""Which releases the catalogue shows, and in what order: pure functions of a state and of what the address says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from market_node.page.reading import Entry, State
from protocol.errors import UsageError

ON_A_PAGE = 50
LONGEST = 200  # characters of a filter
WITHOUT = math.inf  # an adapter without a guarantee, and none at all, come after every epsilon
SORTS: Mapping[str, Callable[[Entry], Any]] = {
    "logged": lambda entry: entry.position,
    "name": lambda entry: (entry.name, entry.position),
    "domain": lambda entry: (entry.domain, entry.position),
    "records": lambda entry: (entry.records, entry.position),
    "epsilon": lambda entry: (entry.epsilon, entry.position),
    "adapter": lambda entry: (WITHOUT if entry.adapter_epsilon is None else entry.adapter_epsilon, not entry.adapter, entry.position),
    "unit": lambda entry: (entry.unit, entry.position),
    "base": lambda entry: (entry.base_model, entry.position),
    "licence": lambda entry: (entry.licence, entry.position),
    "owner": lambda entry: (entry.owner, entry.position),
}
ADAPTERS: Mapping[str, Callable[[Entry], bool]] = {
    "any": lambda entry: bool(entry.adapter),
    "private": lambda entry: entry.adapter_epsilon is not None,
    "unbounded": lambda entry: bool(entry.adapter) and entry.adapter_epsilon is None,
    "none": lambda entry: not entry.adapter,
}
SHOWN = ("standing", "all", "gone")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of the catalogue; an empty text filters nothing."""

    q: str = ""  # words, each in name, summary or domain
    domain: str = ""
    records: str = ""  # at least
    epsilon: str = ""  # of the specification, at most
    adapter: str = ""  # one of ADAPTERS
    unit: str = ""
    base: str = ""
    licence: str = ""
    owner: str = ""  # first digits of the key, or words of the organisation
    show: str = "standing"
    sort: str = "logged"
    order: str = "down"
    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Wish:
        """Return the wish of an address; names that no filter has are ignored.  Raises UsageError for values that none takes."""
        given = {name: query[name].strip() for name in cls.__dataclass_fields__ if query.get(name, "").strip()}
        for name, value in given.items():
            if len(value) > LONGEST:
                raise UsageError(f"{name}: expected at most {LONGEST} characters")
        for name, allowed in (("sort", SORTS), ("order", ("up", "down")), ("adapter", ADAPTERS), ("show", SHOWN)):
            if name in given and given[name] not in allowed:
                raise UsageError(f"{name}: expected one of {', '.join(allowed)}")
        for name in ("records", "epsilon"):
            if name in given and not _number(given[name]) >= 0:
                raise UsageError(f"{name}: expected a number")
        page = given.pop("page", "1")
        if not (page.isascii() and page.isdigit() and 0 < int(page) < 10**9):
            raise UsageError("page: expected a number from 1")
        return cls(page=int(page), **given)

    def address(self, **other: Any) -> str:
        """Return the query of this wish with other values, without what is as usual."""
        wish, usual = replace(self, **other), Wish()
        values = {name: getattr(wish, name) for name in self.__dataclass_fields__}
        return urlencode({name: value for name, value in values.items() if value != getattr(usual, name)})

    def by(self, column: str) -> str:
        """Return the query that sorts by a column, the other way round if it does already."""
        up = (self.sort, self.order) == (column, "down") or (self.sort != column and column not in ("logged", "records"))
        return self.address(sort=column, order="up" if up else "down", page=1)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a wish found."""

    matched: list[Entry]  # in the order that was asked for
    page: int
    pages: int

    @property
    def shown(self) -> list[Entry]:
        """The entries of this page."""
        return self.matched[(self.page - 1) * ON_A_PAGE : self.page * ON_A_PAGE]


def choose(state: State, wish: Wish) -> Chosen:
    """Return the entries that a wish asks for; a page beyond the last is the last."""
    entries = state.standing if wish.show == "standing" else state.entries[: state.size]
    if wish.show == "gone":
        entries = [entry for entry in entries if entry.release_id in state.gone]
    tests: list[Callable[[Entry], bool]] = []
    if wish.q:
        words = wish.q.lower().split()
        tests.append(lambda entry: all(word in f"{entry.title} {entry.summary}".lower() for word in words))
    for name, column in (("domain", "domain"), ("unit", "unit"), ("licence", "licence")):
        if value := getattr(wish, name):
            tests.append(lambda entry, column=column, value=value: getattr(entry, column) == value)  # type: ignore[misc]
    if wish.base:
        tests.append(lambda entry: entry.base_model.startswith(wish.base.lower()))
    if wish.owner:
        wanted = wish.owner.lower()
        tests.append(lambda entry: entry.owner.startswith(wanted) or wanted in state.members.get(entry.owner, "").lower())
    if wish.records:
        least = float(wish.records)
        tests.append(lambda entry: entry.records >= least)
    if wish.epsilon:
        most = float(wish.epsilon)
        tests.append(lambda entry: entry.epsilon <= most)
    if wish.adapter:
        tests.append(ADAPTERS[wish.adapter])
    matched = [entry for entry in entries if all(test(entry) for test in tests)]
    matched.sort(key=SORTS[wish.sort], reverse=wish.order == "down")
    pages = max(1, -(-len(matched) // ON_A_PAGE))
    return Chosen(matched, min(wish.page, pages), pages)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
