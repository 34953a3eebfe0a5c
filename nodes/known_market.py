"""The market that a home knows, because it joined or added it: commands that name none use this one.

One home, one market.  `market.toml` names it and `market-ca.crt` holds its authorities.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UsageError
from protocol.keys import write_durably

FILE = "market.toml"
AUTHORITY = "market-ca.crt"


@dataclass(frozen=True, slots=True)
class KnownMarket:
    """Address and authority of a market, and the files that say so."""

    address: str
    authority: Path
    file: Path


def market_of(home: Path) -> KnownMarket | None:
    """Return the market of a home; None where there is none, or where the file does not say: the command then asks for one."""
    import tomllib

    file = home / FILE
    try:
        return KnownMarket(str(tomllib.loads(file.read_text())["market"]["address"]), home / AUTHORITY, file)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, UnicodeDecodeError):
        return None


def require_same_market(home: Path, given: bytes) -> None:
    """Raise UsageError if a home belongs to another market than that of the given authorities, PEM.

    Of a market that rotates its own, either file may be newer: one authority in common is enough.
    """
    authority = home / AUTHORITY
    if not (home / FILE).exists() or not authority.exists():
        return
    from protocol.certificates import load_certificates

    if set(load_certificates(authority.read_bytes())).isdisjoint(load_certificates(given)):
        raise UsageError(
            f"{authority}: this home belongs to another market", hint="one home, one market: another --home, or move market.toml away"
        )


def keep_authority(home: Path, given: bytes) -> Path:
    """Return the file of a home's authorities, with the given ones in it; what was learned of a rotation meanwhile stays."""
    authority = home / AUTHORITY
    if not (home / FILE).exists() or _knows_more(given, authority):
        write_durably(authority, given, 0o644)
    return authority


def remember(home: Path, address: str, market_key: bytes, superlink: str = "") -> None:
    """Write down which market this home knows; its authorities must lie there already."""
    import json

    lines = {"address": address, "key": market_key.hex(), "superlink": superlink}
    text = "[market]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
    write_durably(home / FILE, text.encode(), 0o644)


def _knows_more(given: bytes, file: Path) -> bool:
    """Return whether all authorities that are kept are among the given ones."""
    from protocol.certificates import load_certificates

    return not file.exists() or set(load_certificates(given)) >= set(load_certificates(file.read_bytes()))
