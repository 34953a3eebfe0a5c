"""Guarantees: what an epsilon means here, how much noise it takes, and how the mechanisms of one population compose.

Everything is stated for add-or-remove-one neighbours; replacing one record is two such steps.
The discrete Gaussian is accounted as a continuous one whose variance is smaller by SMOOTHING^2 (docs/privacy.md, P2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from protocol.codec import format_decimal, parse_decimal
from protocol.errors import FormatError, UsageError

SMOOTHING_SQUARED = 4  # tau = 2: by Poisson summation the rounding error is below 1.1e-34 a coordinate
MAX_EPSILON = 20.0
FEATURE_SCALE = 4096
COUNT_STEP = 1024
# A record adds (c, 1024) with ||c|| <= 4096: the squared sensitivity of the sum under add-or-remove-one, exactly.
NORM_SQUARED = FEATURE_SCALE**2 + COUNT_STEP**2
MAX_UNITS = 400_000  # of one specification: keeps every noisy sum inside int32


class NeighbouringRelation(StrEnum):
    """Which data sets count as neighbours."""

    ADD_OR_REMOVE_ONE = "add-or-remove-one"


FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,62}")
CONTENT_FIELDS = ("prompt", "response", "text")


@dataclass(frozen=True, slots=True)
class PrivacyUnit:
    """What one epsilon protects: a record, or all records that share the value of a named field (one person, say).

    Its text is "record" or "field:NAME"; the name of the field is public, its values never are.
    """

    field: str = ""  # empty: each record is a unit of its own

    def __post_init__(self) -> None:
        if self.field and not FIELD.fullmatch(self.field):
            raise UsageError(
                "unit: expected 'record' or the name of a field, 1 to 63 letters, digits, '_', '.', '-' beginning with a letter or '_'"
            )
        if self.field in CONTENT_FIELDS:
            raise UsageError(f"unit: {self.field!r} is what a record says, not whom it belongs to", hint="name a field such as 'person'")

    def __str__(self) -> str:
        return f"field:{self.field}" if self.field else "record"

    @classmethod
    def parse(cls, text: str) -> PrivacyUnit:
        """Return the unit of its text; raise UsageError for any other."""
        if text == "record":
            return RECORD
        if not text.startswith("field:") or text == "field:":
            raise UsageError("unit: expected 'record' or 'field:NAME'")
        return cls(text.removeprefix("field:"))


RECORD = PrivacyUnit()


@dataclass(frozen=True, slots=True)
class Guarantee:
    """An epsilon with everything without which it means nothing."""

    epsilon: float
    delta: float
    relation: NeighbouringRelation = NeighbouringRelation.ADD_OR_REMOVE_ONE
    unit: PrivacyUnit = RECORD

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= MAX_EPSILON:
            raise UsageError(f"epsilon: expected a number in (0, {MAX_EPSILON:g}], got {self.epsilon:g}")
        if not 1e-12 <= self.delta <= 1e-2:
            raise UsageError(f"delta: expected a number in [1e-12, 0.01], got {self.delta:g}", hint="1e-6 is the default")


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def delta_at(epsilon: float, multiplier: float) -> float:
    """Return the exact delta of a Gaussian mechanism (Balle and Wang 2018, theorem 8).

    multiplier: noise standard deviation divided by sensitivity.
    """
    half, shift = 1 / (2 * multiplier), epsilon * multiplier
    # Far in the tail the second factor underflows to 0 long before exp(epsilon), epsilon <= 20, could overflow.
    return max(_normal_cdf(half - shift) - math.exp(epsilon) * _normal_cdf(-half - shift), 0.0)


@lru_cache(maxsize=256)  # 200 bisections, asked for every release of a mirror; bounded, since strangers choose the numbers
def noise_multiplier(epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier for which delta_at(epsilon, multiplier) <= delta."""
    low, high = 1e-3, 1e5
    if delta_at(epsilon, high) > delta:
        raise UsageError(f"epsilon {epsilon:g} and delta {delta:g}: too small together for any useful noise")
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if delta_at(epsilon, middle) > delta else (low, middle)
    return high


def epsilon_at(delta: float, multiplier: float) -> float:
    """Return the smallest epsilon that a noise multiplier gives at this delta; infinity beyond MAX_EPSILON."""
    if delta_at(MAX_EPSILON, multiplier) > delta:
        return math.inf
    low, high = 0.0, MAX_EPSILON
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle, multiplier) > delta else (low, middle)
    return high


def noise_variance(guarantee: Guarantee, norm_squared: int) -> int:
    """Return s^2 = ceil(multiplier^2 * norm_squared) + 4, the integer variance of the discrete Gaussian.

    norm_squared: squared L2 sensitivity of an integer sum under add-or-remove-one.
    """
    return math.ceil(noise_multiplier(guarantee.epsilon, guarantee.delta) ** 2 * norm_squared) + SMOOTHING_SQUARED


def effective_multiplier(variance: int, norm_squared: int) -> float:
    """Return the multiplier with which a discrete Gaussian of this variance is accounted: sqrt((s^2 - 4) / Delta^2)."""
    return math.sqrt((variance - SMOOTHING_SQUARED) / norm_squared)


@dataclass(frozen=True, slots=True)
class Gaussian:
    """One Gaussian release: noise standard deviation divided by sensitivity."""

    multiplier: float

    def __post_init__(self) -> None:
        if not 0 < self.multiplier < math.inf:
            raise UsageError(f"multiplier: expected a positive number, got {self.multiplier:g}")


@dataclass(frozen=True, slots=True)
class PoissonSampledGaussian:
    """`steps` Gaussian releases, each over units drawn independently with probability `sampling_rate` (DP-SGD)."""

    multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.multiplier < math.inf:
            raise UsageError(f"multiplier: expected a positive number, got {self.multiplier:g}")
        if not 0 < self.sampling_rate <= 1:
            raise UsageError(f"sampling rate: expected a number in (0, 1], got {self.sampling_rate:g}")
        if self.steps < 1:
            raise UsageError(f"steps: expected at least 1, got {self.steps}")


Event = Gaussian | PoissonSampledGaussian


def event_to_plain(event: Event) -> dict[str, str | int]:
    """Return an event as strings and integers, for canonical JSON."""
    match event:
        case Gaussian(multiplier):
            return {"kind": "gaussian", "multiplier": repr(float(multiplier))}
        case PoissonSampledGaussian(multiplier, rate, steps):
            plain = {"kind": "poisson-sampled-gaussian", "multiplier": repr(float(multiplier)), "sampling_rate": repr(float(rate))}
            return {**plain, "steps": steps}


def event_from_plain(plain: object) -> Event:
    """Return the event that `event_to_plain` wrote; an event of an unknown kind is refused, never guessed at."""
    try:
        match plain:
            case {"kind": "gaussian", "multiplier": str(multiplier)}:
                return Gaussian(float(multiplier))
            case {"kind": "poisson-sampled-gaussian", "multiplier": str(multiplier), "sampling_rate": str(rate), "steps": int(steps)}:
                return PoissonSampledGaussian(float(multiplier), float(rate), steps)
    except (ValueError, UsageError):
        pass
    raise FormatError("event: expected a gaussian or poisson-sampled-gaussian with its numbers")


def specification_event(variance: int, norm_squared: int) -> Gaussian:
    """Return the event that a specification with this integer noise variance is charged as."""
    return Gaussian(effective_multiplier(variance, norm_squared))


def composed_epsilon(multipliers: list[float], delta: float) -> float:
    """Return the epsilon of several Gaussian releases together: exact, since mu_total^2 = sum of mu_i^2 with mu = 1/multiplier.

    Holds for adaptively chosen releases too (Dong, Roth, Su 2019, corollary 2; as a filter: Smith and Thakurta 2022).
    """
    precision = sum(multiplier**-2 for multiplier in multipliers)
    return epsilon_at(delta, precision**-0.5) if precision else 0.0


# Orders of the Renyi accountant for plans fixed beforehand (the usual grid), and the sparse one of the filter, whose delta is shared out.
ORDERS = (*(1 + k / 10 for k in range(1, 100)), *map(float, range(11, 65)), 128.0, 256.0, 512.0)
FILTER_ORDERS = (3.0, 5.0, 7.0, 10.0, 16.0)  # few: each costs its share of delta; measured best for a specification and DP-SGD


def renyi_divergence(event: Event, order: float) -> float:
    """Return a bound on the Renyi divergence of this order between the outputs on neighbours, for order > 1.

    A Gaussian: order/(2 multiplier^2).  Sampled: exact at integer orders (Mironov, Talwar, Zhang 2019, section 3.3); between them the
    chord of (order - 1) * divergence, which is convex in the order, so the bound holds.
    """
    match event:
        case Gaussian(multiplier):
            return order / (2 * multiplier**2)
        case PoissonSampledGaussian(multiplier, rate, steps):
            if rate == 1:
                return steps * order / (2 * multiplier**2)
            low = math.floor(order)
            share = order - low
            moment = (1 - share) * _log_moment(rate, multiplier, low)
            if share:
                moment += share * _log_moment(rate, multiplier, low + 1)
            return steps * moment / (order - 1)


@lru_cache(maxsize=4096)
def _log_moment(rate: float, multiplier: float, order: int) -> float:
    """Return log E[(1 - q + q exp((2x - 1)/(2 sigma^2)))^order], x ~ N(0, sigma^2): a binomial sum at integer orders."""
    terms = []
    for k in range(order + 1):
        chosen = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        terms.append(chosen + k * math.log(rate) + (order - k) * math.log1p(-rate) + k * (k - 1) / (2 * multiplier**2))
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def renyi_epsilon(events: Sequence[Event], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """Return the epsilon at this delta of events that were all fixed beforehand, by Renyi composition over a grid of orders.

    Conversion: Canonne, Kamath, Steinke 2020, proposition 12.  A later event may depend on earlier outputs; its numbers may not.
    """
    if not events:
        return 0.0
    return max(0.0, min(
        sum(renyi_divergence(event, order) for event in events) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in orders
    ))  # fmt: skip


@lru_cache(maxsize=256)
def sampled_multiplier(guarantee: Guarantee, rate: float, steps: int) -> float:
    """Return the smallest multiplier, to four digits, with which DP-SGD keeps a guarantee by Renyi composition; rounded up."""

    def fits(multiplier: float) -> bool:
        return renyi_epsilon([PoissonSampledGaussian(multiplier, rate, steps)], guarantee.delta) <= guarantee.epsilon

    low, high = 0.1, 1.0
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e6:
            raise UsageError(f"epsilon: {guarantee.epsilon:g} at delta {guarantee.delta:g} is out of reach of DP-SGD")
    while high - low > 1e-4 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return math.ceil(high * 1e4) / 1e4


def filter_epsilon(events: Sequence[Event], delta: float) -> float:
    """Return the smallest budget whose Renyi filter admits these events, whatever each of them was chosen in view of.

    For one order fixed beforehand, stopping before the divergences sum beyond a budget keeps that budget though every event is chosen
    adaptively (Feldman and Zrnic 2021, theorem 3.1; Lecuyer 2021, theorem 1).  Which order is the best one may then depend on the
    outputs, so the orders share delta: a union bound over a fixed grid (docs/privacy.md, P3).
    """
    return renyi_epsilon(events, delta / len(FILTER_ORDERS), FILTER_ORDERS)


def ledger_epsilon(events: Sequence[Event], delta: float) -> float:
    """Return the epsilon by which a ledger judges a history: exact for Gaussians alone, else by the Renyi filter."""
    if all(isinstance(event, Gaussian) for event in events):
        return composed_epsilon([event.multiplier for event in events], delta)
    return filter_epsilon(events, delta)


LARGEST_PLAN = 1_000_000  # steps of one training
NOT_PRIVATE = "none"  # how the absence of a guarantee is written


@dataclass(frozen=True, slots=True)
class PrivateTraining:
    """An adapter's guarantee with the mechanism that keeps it, so that anyone can check one against the other; else UsageError."""

    guarantee: Guarantee
    event: PoissonSampledGaussian

    def __post_init__(self) -> None:
        event = self.event
        if not (0.1 <= event.multiplier <= 1e6 and event.sampling_rate >= 1e-6 and event.steps <= LARGEST_PLAN):
            raise UsageError("adapter: expected a multiplier from 0.1, a sampling rate from 1e-6 and at most a million steps")
        found = renyi_epsilon([event], self.guarantee.delta)
        if not found <= self.guarantee.epsilon * (1 + 1e-9):
            raise UsageError(f"adapter: its mechanism keeps epsilon {found:.3f}, expected at most the {self.guarantee.epsilon:g} it states")

    def __str__(self) -> str:
        return (
            f"epsilon {format_decimal(self.guarantee.epsilon)} at delta {format_decimal(self.guarantee.delta)}, unit {self.guarantee.unit}"
        )


AdapterGuarantee = PrivateTraining | str  # the text is NOT_PRIVATE, and no other
GUARANTEE_TEXT = re.compile(r"none|epsilon [0-9.e-]{1,24} at delta [0-9.e-]{1,24}, unit (record|field:[A-Za-z_][A-Za-z0-9_.-]{0,62})")


def training_to_plain(guarantee: AdapterGuarantee) -> str | dict[str, object]:
    """Return an adapter's guarantee as strings and integers, for canonical JSON."""
    if isinstance(guarantee, str):
        return guarantee
    stated = guarantee.guarantee
    return {
        "delta": format_decimal(stated.delta), "epsilon": format_decimal(stated.epsilon), "event": event_to_plain(guarantee.event),
        "relation": str(stated.relation), "unit": str(stated.unit),
    }  # fmt: skip


def training_from_plain(plain: object) -> AdapterGuarantee:
    """Return the guarantee that `training_to_plain` wrote; raise FormatError for one that its mechanism does not keep."""
    match plain:
        case "none":
            return NOT_PRIVATE
        case {"delta": str(delta), "epsilon": str(epsilon), "event": dict(event), "relation": str(relation), "unit": str(unit)}:
            mechanism = event_from_plain(event)
            if isinstance(mechanism, PoissonSampledGaussian):
                try:
                    numbers = parse_decimal(epsilon, "adapter.epsilon"), parse_decimal(delta, "adapter.delta")
                    return PrivateTraining(Guarantee(*numbers, NeighbouringRelation(relation), PrivacyUnit.parse(unit)), mechanism)
                except (UsageError, ValueError) as error:
                    raise FormatError(str(error) if isinstance(error, UsageError) else "adapter: unknown relation") from None
    raise FormatError("adapter.guarantee: expected 'none', or a guarantee with the mechanism that keeps it")


def total_epsilon(specification: Event, adapter: PrivateTraining | None, delta: float) -> float:
    """Return what a specification and an adapter made from the same records say together, as a ledger composes them."""
    return ledger_epsilon([specification] if adapter is None else [specification, adapter.event], delta)
