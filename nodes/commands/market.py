"""The market that a querier uses: `market add`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Home, Json, read_bytes, show
from protocol.errors import InvalidSignature, UsageError


def market_add(
    home: Home,
    market: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Address of the market.")],
    ca: Annotated[Path, typer.Option("--ca", help="Its certificate authority (ca.crt), as its operator hands it out.")],
    market_key: Annotated[
        str | None, typer.Option("--market-key", metavar="HEX", help="First digits, at least 16, of the key that it must have.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remember a market, so that later commands need no --market and --ca.  Owners with an invite use `node join` instead.

    The authority is copied into --home, the market must answer under it, and from then on its key may not change.  Compare the words
    with those that the operator reads out: whoever gave you another ca.crt could be another market.

    Example: veilmart market add market.example:7443 --ca ca.crt
    """
    from nodes.known_market import keep_authority, market_of, remember, require_same_market
    from nodes.market_client import MarketClient
    from protocol.certificates import load_certificates
    from protocol.enrolment import words_of

    if market_key is not None and (len(market_key) < 16 or not set(market_key.lower()) <= set("0123456789abcdef")):
        raise UsageError("--market-key: expected at least 16 hexadecimal digits", hint="`veilmart market up` prints them")
    authority = read_bytes(ca)
    with MarketClient(market, ca, home) as client:  # raises UsageError for a file that is no authority
        require_same_market(home, authority)
        description = client.describe()
    key = description.market_key
    if market_key is not None and not key.hex().startswith(market_key.lower()):
        raise InvalidSignature(f"market: expected the key {market_key[:16]}, got {key.hex()[:16]}", hint="do not go on; ask the operator")
    known, kept = market_of(home), keep_authority(home, authority)
    if known is None or known.address != market:  # what a join wrote down stays
        remember(home, market, key)
    result = {
        "schema": "veilmart.market-add/1", "market": market, "market_key": key.hex(), "market_words": words_of(key),
        "ca": str(kept), "authorities": len(load_certificates(authority)), "releases": description.head.size,
    }  # fmt: skip
    lines = [f"market {market}, {description.head.size} releases", f"the market is  {words_of(key)}    compare with what the operator says"]
    show(result, as_json, lines, then="find FILE")


COMMANDS = {"market add": market_add}
