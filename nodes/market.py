"""A market as its owners and queriers name it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nodes.home import default_home
from nodes.known_market import market_of
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.market_client import MarketClient
    from nodes.membership import Membership


@dataclass(frozen=True, slots=True)
class Market:
    """Where a market is, the certificate authority that it is trusted by, and the home that keeps what was seen of it.

    Nothing is connected before `connect`.
    """

    address: str  # HOST:PORT
    ca: Path | str  # the market's ca.crt, a public file of its operator
    home: Path = field(default_factory=default_home)

    @classmethod
    def known(cls, home: Path | None = None) -> Market:
        """Return the market that a home joined or added; raise UsageError where it knows none."""
        home = home or default_home()
        found = market_of(home)
        if found is None:
            raise UsageError(f"{home}: knows no market", hint="`veilmart market add` for queriers, `veilmart node join` for owners")
        return cls(found.address, found.authority, home)

    def connect(self, membership: Membership | None = None) -> MarketClient:
        """Return a connection, a context manager; membership: under whose certificate members' calls go out."""
        from nodes.market_client import MarketClient

        return MarketClient(self.address, Path(self.ca), self.home, membership)
