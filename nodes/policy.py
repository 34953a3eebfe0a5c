"""The owner's policy: a TOML file with strict keys, of which every value bounds what others can make the guard do."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from nodes.cohort import CohortRules
from nodes.guard import MOST_DAYS, Policy
from nodes.ledger import DEFAULT_POPULATION, POPULATION, Budget
from protocol.codec import format_decimal, parse_hex
from protocol.errors import FormatError, UsageError
from protocol.privacy import MAX_EPSILON, RECORD, PrivacyUnit
from protocol.sealing import MAX_QUESTION_BYTES, MAX_TOKENS
from protocol.window import USUAL_DAYS

EXAMPLE = """\
[population]
name = "default"
unit = "record"                 # or a field such as "person"; for life

[accept]
maps = ["kme-lin-96"]           # names or ids; leave out to accept the map that the command names
base_models = []                # ids; empty accepts the model that the command names

[specification]
epsilon_for_life = 4.0          # of everything that this population releases, adapters included
delta = 1e-6
largest_epsilon = 1.0           # of one release
smallest_epsilon = 0.05
minimum_units = 100
valid_days = 365                # how long a release holds; publishing again extends it without a charge

[adapter]
release = "relay"               # none: no adapter; relay: made, stays here; public: `veilmart node publish` uploads it
epsilon = "none"                # none: trained without a guarantee; or a number, charged as specifications are
require_guarantee = false       # true: none is trained without one, whatever asks; largest_epsilon = 8.0 beside it limits what it states

[service]
slot_s = 3600                   # releases become visible, and orders stop counting as waiting, at multiples of this
orders_per_hour = 60
uids = []                       # users who may ask, beside the one that runs the guard
gids = []

[relay]                         # leave out for none: answers questions that come through the market, sealed; needs an adapter
askers = []                     # keys of those who may ask, hexadecimal; empty: anybody
questions_per_hour = 60
longest_question = 4000         # bytes
most_tokens = 256               # of an answer

[cohort]                        # leave out for none: a specification released together with other owners, too small for one each
name = "joint-notes"            # of the learnware
members = []                    # keys of the owners you join with, hexadecimal; empty: no round
colluders = 1                   # the fewest members, beside market and SuperLink, that a round must withstand
rounds = 1                      # that others may begin in this population's life; each is charged, also one that breaks off
minimum_units = 5

[schedule]                      # leave out for none: the owner's releases, whether or not the data changed
first = 2027-01-01
every_days = 30
epsilon = 0.5
"""


class AdapterRelease(StrEnum):
    """What becomes of an adapter."""

    NONE = "none"
    RELAY = "relay"
    PUBLIC = "public"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Releases at fixed times, whether or not the data changed: one that follows a change would tell of it."""

    first: datetime
    every: timedelta
    epsilon: float

    def occasion(self, now: datetime) -> int:
        """Return the number of the occasion that is due, from 1, or 0 before the first.

        Missed ones are not made up for: a clock ten years ahead makes one release, not a hundred and twenty.
        """
        return 0 if now < self.first else 1 + (now - self.first) // self.every


@dataclass(frozen=True, slots=True)
class Service:
    """How the guard answers others."""

    slot_s: float = 0.0  # 0: at once, for simulations
    orders_per_hour: int = 60
    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class RelayRules:
    """Who may ask through the market, how often and how much."""

    askers: frozenset[bytes] = frozenset()  # Ed25519 public keys; empty: anybody
    questions_per_hour: int = 60
    longest_question: int = 4000  # bytes
    most_tokens: int = 256


@dataclass(frozen=True, slots=True)
class OwnerPolicy:
    """All of a policy file."""

    limits: Policy
    maps: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    adapter: AdapterRelease = AdapterRelease.NONE
    adapter_epsilon: str = "none"
    service: Service = Service()
    schedule: Schedule | None = None
    relay: RelayRules | None = None
    cohort: CohortRules | None = None

    def require_accepted(self, map_name: str, map_id: str, base_model: str) -> None:
        """Raise UsageError for a map or base model that the owner does not accept."""
        if self.maps and not {map_name, map_id} & set(self.maps):
            raise UsageError(f"policy: accept.maps does not name map {map_name!r}", hint=f"accepted: {', '.join(self.maps)}")
        if self.base_models and base_model not in self.base_models:
            raise UsageError(f"policy: accept.base_models does not name base model {base_model[:16]}")


_REQUIRED = object()


class _Table:
    """A table of the file: takes keys with a check, and knows what nobody asked for."""

    def __init__(self, path: Path, name: str, content: object) -> None:
        if not isinstance(content, dict):
            raise UsageError(f"{path}: {name}: expected a table, [{name}]")
        self._path, self._name, self._content = path, name, dict(content)

    def error(self, key: str, expected: str, got: object) -> UsageError:
        return UsageError(
            f"{self._path}: {self._name}.{key}: expected {expected}, got {got!r}", hint="`veilmart node policy` shows a whole file"
        )

    @property
    def where(self) -> str:
        """The file and the table's name."""
        return f"{self._path}: {self._name}"

    def number(self, key: str, default: object = _REQUIRED, *, above: float = 0.0, least: float | None = None) -> float:
        value = self._take(key, default)
        low = math.nextafter(above, math.inf) if least is None else least
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
            raise self.error(key, f"a number of at least {least:g}" if least is not None else f"a number above {above:g}", value)
        return float(value)

    def whole(self, key: str, default: object = _REQUIRED, *, least: int = 1, most: int | None = None) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
            raise self.error(key, f"a whole number of at least {least}" + (f" and at most {most}" if most is not None else ""), value)
        return value

    def keys(self, key: str) -> frozenset[bytes]:
        """Return public keys of 32 bytes, given in hexadecimal."""
        try:
            return frozenset(parse_hex(text, 32, key) for text in self.list_of(key, str))
        except FormatError:
            raise self.error(key, "a list of keys, 64 lower-case hexadecimal digits each", "others") from None

    def text(self, key: str, default: object = _REQUIRED) -> str:
        value = self._take(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def number_or_none(self, key: str) -> str:
        """Return a number above 0 as text, or "none"."""
        if self._content.get(key, "none") == "none":
            self._content.pop(key, None)
            return "none"
        return format_decimal(self.number(key))

    def flag(self, key: str) -> bool:
        """Return true or false, false where it is left out."""
        value = self._take(key, False)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def holds(self, key: str) -> bool:
        """Return whether the file has a key that was not taken yet."""
        return key in self._content

    def list_of(self, key: str, kind: type) -> tuple[Any, ...]:
        value = self._take(key, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.error(key, f"a list of {'numbers' if kind is int else 'strings'}", value)
        return tuple(value)

    def day(self, key: str) -> datetime:
        value = self._take(key, _REQUIRED)
        if isinstance(value, datetime):
            return value if value.tzinfo else value.replace(tzinfo=UTC)
        if not isinstance(value, date):
            raise self.error(key, "a date such as 2027-01-01", value)
        return datetime(value.year, value.month, value.day, tzinfo=UTC)

    def done(self) -> None:
        for key in self._content:
            raise UsageError(f"{self._path}: {self._name}.{key}: no such key", hint="`veilmart node policy` shows all of them")

    def _take(self, key: str, default: object) -> object:
        if key not in self._content and default is _REQUIRED:
            raise self.error(key, "a value", None)
        return self._content.pop(key, default)


def read_policy(path: Path) -> OwnerPolicy:
    """Return the policy in a file; raise UsageError that names file and key for anything that is not one."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not TOML: {error}", hint="`veilmart node policy` shows a whole file") from None
    names = ("population", "accept", "specification", "adapter", "service", "relay", "cohort", "schedule")
    for name in content:
        if name not in names:
            raise UsageError(f"{path}: {name}: no such table", hint=f"expected {', '.join(names)}")
    scheduled, relayed, joined = "schedule" in content, "relay" in content, "cohort" in content
    tables = {name: _Table(path, name, content.get(name, {})) for name in names}
    population, accept, specification, adapter, service, relay, cohort, schedule = (tables[name] for name in names)

    name = population.text("name", DEFAULT_POPULATION)
    if not POPULATION.fullmatch(name):
        raise population.error("name", "1 to 63 of a-z, 0-9, '.', '_', '-'", name)
    unit = population.text("unit", "record")
    release = adapter.text("release", "none")
    if release not in set(AdapterRelease):
        raise adapter.error("release", "none, relay or public", release)
    epsilon = adapter.number_or_none("epsilon")
    if adapter.flag("require_guarantee"):
        largest = adapter.number("largest_epsilon", MAX_EPSILON)
        if release != AdapterRelease.NONE and not (epsilon != "none" and float(epsilon) <= largest):
            raise adapter.error("epsilon", f"at most {largest:g}, since require_guarantee asks for it", epsilon)
    else:
        largest = None
        if adapter.holds("largest_epsilon"):
            raise adapter.error("require_guarantee", "true beside largest_epsilon: an adapter without a guarantee has no epsilon", False)
    budget = Budget(specification.number("epsilon_for_life"), specification.number("delta", 1e-6))
    limits = Policy(
        budget,
        specification.whole("minimum_units", 20, least=2),
        specification.number("largest_epsilon", 2.0),
        specification.number("smallest_epsilon", 0.05),
        name,
        RECORD if unit == "record" else PrivacyUnit(unit),
        largest,
        specification.whole("valid_days", USUAL_DAYS, most=MOST_DAYS),
    )
    if limits.smallest_epsilon > limits.largest_epsilon:
        raise specification.error("smallest_epsilon", "at most largest_epsilon", limits.smallest_epsilon)
    policy = OwnerPolicy(
        limits, accept.list_of("maps", str), accept.list_of("base_models", str), AdapterRelease(release), epsilon,
        Service(
            service.number("slot_s", 3600.0, least=0.0), service.whole("orders_per_hour", 60),
            frozenset(service.list_of("uids", int)), frozenset(service.list_of("gids", int)),
        ),
        _schedule(schedule, limits) if scheduled else None,
        _relay(relay) if relayed else None,
        _cohort(cohort, limits) if joined else None,
    )  # fmt: skip
    if policy.relay is not None and policy.adapter is AdapterRelease.NONE:
        raise adapter.error("release", "relay or public, since [relay] answers with the adapter", release)
    for table in tables.values():
        table.done()
    return policy


def _relay(table: _Table) -> RelayRules:
    rules = RelayRules()
    return RelayRules(
        table.keys("askers"), table.whole("questions_per_hour", rules.questions_per_hour),
        table.whole("longest_question", rules.longest_question, most=MAX_QUESTION_BYTES),
        table.whole("most_tokens", rules.most_tokens, most=MAX_TOKENS),
    )  # fmt: skip


def _cohort(table: _Table, limits: Policy) -> CohortRules:
    if limits.unit != RECORD:
        raise table.error("name", "no table [cohort] where the population's unit is not 'record'", str(limits.unit))
    try:
        return CohortRules(
            table.text("name"), table.keys("members"), table.whole("colluders", 1, least=0), table.whole("rounds", 1, least=0),
            table.whole("minimum_units", 5),
        )  # fmt: skip
    except UsageError as error:
        raise UsageError(f"{table.where}: {error}", hint="`veilmart node policy` shows a whole file") from None


def _schedule(table: _Table, limits: Policy) -> Schedule:
    schedule = Schedule(table.day("first"), timedelta(days=table.whole("every_days")), table.number("epsilon"))
    if schedule.epsilon > limits.largest_epsilon:
        raise table.error("epsilon", f"at most specification.largest_epsilon, {limits.largest_epsilon:g}", schedule.epsilon)
    return schedule
