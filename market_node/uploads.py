"""Places for adapters on their way in: how many at once, how many bytes all of them may grow to, and how much of that one sender holds.

A ticket is given on the announcement, before a byte is kept, and covers what was announced: an upload that brings more is refused.
Until then a call holds nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from protocol.errors import QuotaExceeded
from protocol.release import MAX_ADAPTER_BYTES

RETRY_S = 5  # a usual adapter takes less


@dataclass(slots=True)
class Uploads:
    """Tickets that are out; used by one thread, and read by any."""

    most: int = 8
    most_bytes: int = 4 * MAX_ADAPTER_BYTES
    most_of_one: int = 2
    count: int = field(default=0, init=False)
    announced_bytes: int = field(default=0, init=False)
    _of: Counter[str] = field(default_factory=Counter, init=False)

    @contextmanager
    def ticket(self, sender: str, size_bytes: int) -> Iterator[None]:
        """Hold a place for an upload of so many bytes; raise QuotaExceeded, with the seconds after which to ask again, if there is none."""
        if self._of[sender] >= self.most_of_one:
            raise QuotaExceeded(f"adapters: {self._of[sender]} of yours are on their way", "send one after the other", RETRY_S)
        if self.count >= self.most or self.announced_bytes + size_bytes > self.most_bytes:
            raise QuotaExceeded("adapters: too many uploads at once", "try again in a few seconds", RETRY_S)
        self.count += 1
        self.announced_bytes += size_bytes
        self._of[sender] += 1
        try:
            yield
        finally:
            self.count -= 1
            self.announced_bytes -= size_bytes
            self._of[sender] -= 1
            if not self._of[sender]:
                del self._of[sender]
