"""When a release holds: from one day to another, in whole days since 1970, UTC (docs/protocol.md 4.10).

Days, because a release then tells no more of the time it was made than a log that everybody can watch.  Nothing here reads a clock:
who asks gives its own day, and never the market's.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

from protocol.errors import FormatError, OutsideWindow

USUAL_DAYS = 365
END_OF_DAYS = (1 << 16) - 1  # in the year 2149
SKEW_DAYS = 1  # how far the clock of an owner may be ahead of ours
DAY_S = 86_400


def day_of(seconds: float) -> int:
    """Return the day of a time in seconds since 1970."""
    return int(seconds // DAY_S)


@dataclass(frozen=True, slots=True)
class Window:
    """The days on which a release holds, both ends among them."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= END_OF_DAYS:
            raise FormatError(f"window: expected two days in order, from 0 to {END_OF_DAYS}, got {self.first} and {self.last}")

    @classmethod
    def beginning(cls, today: int, days: int) -> Window:
        """Return the window of so many days from today on."""
        return cls(today, min(today + days - 1, END_OF_DAYS))

    def __str__(self) -> str:
        return f"{_iso(self.first)} to {_iso(self.last)}"

    @property
    def dates(self) -> dict[str, str]:
        """Both ends as programs are shown them."""
        return {"valid_from": _iso(self.first), "valid_until": _iso(self.last)}

    def holds(self, today: int) -> bool:
        """Whether the release holds today; one that begins tomorrow does, since clocks differ."""
        return self.first - SKEW_DAYS <= today <= self.last

    def needs_renewal(self, today: int) -> bool:
        """Whether an owner should sign it again: it does not hold, or the last third of its days has begun."""
        return not self.holds(today) or 3 * (self.last - today) < self.last - self.first

    def require(self, today: int, title: str) -> None:
        """Raise OutsideWindow, naming the release, unless it holds today."""
        if today > self.last:
            raise OutsideWindow(
                f"{title}: it held until {_iso(self.last)}", hint="its owner extends it for nothing: `veilmart node publish` again"
            )
        if not self.holds(today):
            raise OutsideWindow(f"{title}: it holds from {_iso(self.first)} on", hint="is this clock, or its owner's, set?")


ALWAYS = Window(0, END_OF_DAYS)  # of simulated releases: who makes them again on another day gets the same bytes


def _iso(day: int) -> str:
    return str(date(1970, 1, 1) + timedelta(days=day))
