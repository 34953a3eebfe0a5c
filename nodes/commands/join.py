"""Becoming a member of a market in one line: `node join`; and the market that later commands then need not be told."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Home, Json, Population, population_name, show
from nodes.home import default_home
from protocol.errors import FormatError, InvalidSignature, UsageError

JOINED = "market.toml"


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
    from nodes.market_client import MarketClient
    from nodes.membership import AUTHORITY, Membership
    from nodes.populations import folder_of
    from nodes.supernode import supernode_key
    from protocol.enrolment import Invite, sign_enrolment, words_of
    from protocol.keys import signing_key, write_durably

    given = Invite.parse(_secret(invite))
    if given.address != market:
        raise UsageError(f"node join: the invite is for {given.address}, not {market}", hint="give the address that the invite names")
    # The authority travels in the invite: the first contact already trusts this market alone.
    authority = home / AUTHORITY
    if (home / JOINED).exists() and authority.exists() and not _same_market(authority.read_bytes(), given.authority):
        raise UsageError(
            f"{authority}: this home belongs to another market", hint="one home, one market: another --home, or move market.toml away"
        )
    folder = folder_of(home, population_name(population))
    owner_key = signing_key(folder / "owner.key")
    owner, node_key = owner_key.public_key().public_bytes_raw(), supernode_key(home)
    if not (home / JOINED).exists() or _knows_more(given.authority, authority):
        write_durably(authority, given.authority, 0o644)
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
    write_durably(home / JOINED, _toml(market, given.market_key, superlink).encode(), 0o644)
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
        "next: veilmart node publish --data FILE --dry-run",
    ]
    show(result, as_json, lines)


def adopt_market(words: Sequence[str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Let commands without --market use the one that this home joined, as if the environment named it."""
    if any(word.split("=")[0] in ("--market", "--ca") for word in words) or {"VEILMART_MARKET", "VEILMART_CA"} & environment.keys():
        return  # named at least in part: an address must never meet an authority that was not meant for it
    from nodes.membership import AUTHORITY

    home = _home_in(words, environment)
    joined = home / JOINED
    if not joined.is_file():
        return
    import tomllib

    try:
        environment["VEILMART_MARKET"] = str(tomllib.loads(joined.read_text())["market"]["address"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return  # the command then asks for --market, and says so
    environment["VEILMART_CA"] = str(home / AUTHORITY)


def _same_market(known: bytes, given: bytes) -> bool:
    """Return whether two files of authorities, PEM, have one in common: of a market that rotates its own, either may be newer."""
    from protocol.certificates import load_certificates

    return not set(load_certificates(known)).isdisjoint(load_certificates(given))


def _knows_more(given: bytes, file: Path) -> bool:
    """Return whether an invite names all authorities that are kept; else what was learned of a rotation since it was made stays."""
    from protocol.certificates import load_certificates

    return not file.exists() or set(load_certificates(given)) >= set(load_certificates(file.read_bytes()))


def _home_in(words: Sequence[str], environment: MutableMapping[str, str]) -> Path:
    for place, word in enumerate(words):
        if word == "--home" and place + 1 < len(words):
            return Path(words[place + 1])
        if word.startswith("--home="):
            return Path(word.removeprefix("--home="))
    named = environment.get("VEILMART_HOME")
    return Path(named) if named else default_home()


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


def _toml(market: str, key: bytes, superlink: str) -> str:
    import json

    return f"[market]\naddress = {json.dumps(market)}\nkey = {json.dumps(key.hex())}\nsuperlink = {json.dumps(superlink)}\n"


COMMANDS = {"node join": node_join}
