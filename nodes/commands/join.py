"""Becoming a member of a market in one line: `node join`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Home, Json, Population, population_name, show
from protocol.errors import FormatError, InvalidSignature, UsageError


def node_join(
    home: Home,
    market: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Address of the market, as the invite names it.")],
    invite: Annotated[str, typer.Option("--invite", metavar="WHERE", help="file:PATH, env:NAME, or - for standard input.")],
    population: Population = "default",
    as_json: Json = False,
) -> None:
    """Make your keys, become a member of a market, get its certificate, and register your SuperNode there.  Again it finishes and renews.

    Later commands use this market without --market and --ca.

    Example: veilmart node join market.example:7443 --invite file:city.invite
    """
    from nodes.known_market import keep_authority, remember, require_same_market
    from nodes.market_client import MarketClient
    from nodes.membership import Membership
    from nodes.populations import folder_of
    from nodes.supernode import supernode_key
    from protocol.enrolment import Invite, sign_enrolment, words_of
    from protocol.keys import signing_key

    given = Invite.parse(_secret(invite))
    if given.address != market:
        raise UsageError(f"node join: the invite is for {given.address}, not {market}", hint="give the address that the invite names")
    require_same_market(home, given.authority)
    folder = folder_of(home, population_name(population))
    owner_key = signing_key(folder / "owner.key")
    owner, node_key = owner_key.public_key().public_bytes_raw(), supernode_key(home)
    authority = keep_authority(home, given.authority)  # it travels in the invite: the first contact already trusts this market alone
    membership, ends = Membership.of(folder), None
    with MarketClient(market, authority, home) as client:
        description = client.describe()
        if description.market_key != given.market_key:
            raise InvalidSignature("market: its key is not the one of the invite", hint="do not go on; ask the operator")
        signature = sign_enrolment(given.market_key, given.secret, owner_key, node_key)
        organisation, node_name, superlink = client.enrol(given.secret, owner, node_key, signature)
        if description.members_port:
            membership.current(client, given.market_key)
            held = membership.held()
            ends = int(held.not_valid_after_utc.timestamp()) if held is not None else None
    # Last: without it nothing here counts as joined, and the same command finishes what was begun.
    remember(home, market, given.market_key, superlink)
    result = {
        "schema": "veilmart.join/1", "market": market, "market_words": words_of(given.market_key), "organisation": organisation,
        "owner": owner.hex(), "owner_words": words_of(owner), "node": node_name, "superlink": superlink or None,
        "certificate": str(membership.file) if ends is not None else None, "certificate_ends": ends,
    }  # fmt: skip
    lines = [
        f"enrolled as {organisation} at {market}",
        f"the market is  {words_of(given.market_key)}",
        f"you are        {words_of(owner)}    read both to the operator on the telephone",
        *([f"your certificate is {membership.file}; it is renewed by itself"] if ends is not None else []),
        *([f"SuperNode {node_name} is registered at {superlink}"] if superlink else []),
    ]
    show(result, as_json, lines, then="node publish --data FILE --dry-run")


def _secret(where: str) -> str:
    """Return the text that file:PATH, env:NAME or - names; an invite itself is refused, since arguments can be read by everybody here."""
    import sys

    from protocol.keys import read_secret

    kind, _, name = where.partition(":")
    try:
        if where == "-":
            return sys.stdin.read(1 << 16)
        if kind == "file" and name:
            return read_secret(Path(name)).decode("ascii")
        if kind == "env" and name:
            return os.environ[name]
    except KeyError:
        raise UsageError(f"--invite: the environment has no {name}") from None
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FormatError(f"{name}: expected an invite, got other bytes") from None
    raise UsageError("--invite: expected file:PATH, env:NAME or -", hint="an invite on a command line could be read by everybody here")


COMMANDS = {"node join": node_join}
