"""The commands of a market's authority: `pki init`, `pki issue`, `pki rotate`, `pki revoke`, `pki show`.  All work beside the market."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from market_node.options import Home, Json, Quiet
from protocol import console

if TYPE_CHECKING:
    from market_node.certificates import Issued


def pki_init(
    home: Home,
    name: Annotated[list[str] | None, typer.Option("--name", help="Host name or address for the server's certificate; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Make a market's authority, server certificate and key, mode 0600.  Again it changes nothing; `market up` does it by itself too.

    Example: veilmart pki init --name market.example
    """
    from market_node.identity import market_identity

    market_identity(home / "market", tuple(name or ()), _now())
    _show(home / "market", as_json)


def pki_issue(
    home: Home,
    csr: Annotated[Path, typer.Option("--csr", metavar="FILE", help="A request of `veilmart node certificate --request`.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help="Where to write the certificate, PEM.")],
    days: Annotated[int, typer.Option("--days", min=1, max=90, help="Days until it ends.")] = 90,
    as_json: Json = False,
) -> None:
    """Issue a member's certificate from a file; nodes that reach the market get and renew theirs by themselves.

    Example: veilmart pki issue --csr city.csr --out city.crt
    """
    from market_node.certificates import Certificates
    from market_node.members import Members
    from market_node.store import Store
    from protocol.certificates import load_certificates, open_request
    from protocol.enrolment import words_of
    from protocol.errors import FormatError, Unauthorised, UsageError
    from protocol.keys import signing_key, write_durably

    market_home = _market_in(home)
    try:
        data = csr.read_bytes()
    except OSError as error:
        raise UsageError(f"{csr}: {error.strerror}") from None
    asked, now = open_request(data, signing_key(market_home / "market.key").public_key().public_bytes_raw()), _now()
    if abs(now.timestamp() - asked.asked) > REQUEST_DAYS * 86_400:
        raise FormatError(f"{csr}: older than {REQUEST_DAYS} days", hint="its owner makes a new one")
    store, members, certificates = Store.beside(market_home), Members.open(market_home), Certificates.open(market_home)
    try:
        if not (members.may_publish(asked.name.key) and store.may_own(asked.name.key)):
            raise Unauthorised(f"{csr}: its owner is not enrolled at this market", hint="`veilmart market members`")
        made, _ = certificates.issue(asked, now, days)
    finally:
        certificates.close()
        members.close()
        store.close()
    write_durably(out, made, 0o644)
    ends = load_certificates(made)[0].not_valid_after_utc
    result = {
        "schema": "veilmart.pki-issue/1", "owner": asked.name.key.hex(), "name": str(asked.name), "ends": int(ends.timestamp()),
        "file": str(out),
    }  # fmt: skip
    console.show(result, as_json, [f"{out}: for {words_of(asked.name.key)}, until {ends:%Y-%m-%d}"])


REQUEST_DAYS = 7  # of a request in a file


def pki_rotate(
    home: Home,
    what: Annotated[Literal["server", "authority"], typer.Argument(help="The server's certificate and key, or the whole authority.")],
    overlap_days: Annotated[
        float, typer.Option("--overlap-days", min=0, max=365, help="Of an authority: days in which old and new are trusted; 0 for none.")
    ] = 90.0,
    as_json: Json = False,
) -> None:
    """Go on under a new certificate, or a new authority.  A running market takes it up within seconds.

    An authority's overlap should be as long as members' certificates last: until its end every node that talks to the market has learned
    the new one.  Queriers need the new ca.crt by then.  --overlap-days 0 is for an authority that was stolen: all need it at once.

    Example: veilmart pki rotate authority --overlap-days 90
    """
    from market_node.authority import alone, rotate
    from market_node.identity import market_identity, served_names

    market_home = _market_in(home)
    names = served_names(market_home)
    if what == "authority":
        with alone(market_home):
            rotate(market_home, _now(), datetime.timedelta(days=overlap_days))
    market_identity(market_home, names, _now(), fresh=what == "server")
    _show(market_home, as_json)


def pki_revoke(
    home: Home,
    which: Annotated[str, typer.Argument(metavar="HEX", help="First digits, at least 8, of an owner's key or of a serial number.")],
    as_json: Json = False,
) -> None:
    """Revoke certificates: their next call is refused, on open connections too.  The owner stays a member and may ask for a new one.

    `veilmart market members --remove` takes the right to publish, `veilmart market revoke` the releases too.

    Example: veilmart pki revoke 7c1f0a2b
    """
    from market_node.certificates import Certificates

    certificates = Certificates.open(_market_in(home))
    try:
        revoked = certificates.revoke(which, int(_now().timestamp()))
    finally:
        certificates.close()
    result = {"schema": "veilmart.pki-revoke/1", "revoked": [_row(one) for one in revoked]}
    console.show(result, as_json, ["\t".join(_cells(one)) for one in revoked])


def pki_show(home: Home, quiet: Quiet = False, as_json: Json = False) -> None:
    """Show a market's authorities, its server certificate, and the certificates of members; --quiet prints their serial numbers.

    Example: veilmart pki show
    """
    _show(_market_in(home), as_json, quiet)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _market_in(home: Path) -> Path:
    from protocol.errors import UsageError

    if not (home / "market" / "ca.crt").is_file():
        raise UsageError(f"{home / 'market'}: no market here yet", hint="`veilmart pki init` makes its authority, `veilmart market up` all")
    return home / "market"


def _show(market_home: Path, as_json: bool, quiet: bool = False) -> None:
    from cryptography.hazmat.primitives import hashes

    from market_node.authority import alone, authorities
    from market_node.certificates import Certificates
    from market_node.identity import served_names
    from protocol.certificates import load_certificates

    with alone(market_home):
        found = authorities(market_home, _now(), change=False)
    names = served_names(market_home)
    server = load_certificates((market_home / "server.crt").read_bytes())[0]
    certificates = Certificates.open(market_home)
    try:
        issued = certificates.all()
    finally:
        certificates.close()
    trusted = [(one.fingerprint(hashes.SHA256()).hex(), one.not_valid_after_utc) for one in load_certificates(found.trusted)]
    if as_json:
        console.print_json(
            {
                "schema": "veilmart.pki/1", "ca": str(market_home / "ca.crt"), "overlap_ends": found.until,
                "authorities": [{"sha256": digest, "ends": int(ends.timestamp())} for digest, ends in trusted],
                "server": {"names": names, "ends": int(server.not_valid_after_utc.timestamp())},
                "certificates": [_row(one) for one in issued],
            }
        )  # fmt: skip
        return
    if quiet:
        console.print_lines(*(one.serial for one in issued))
        return
    rows = [["authority", digest[:16], "", f"{ends:%Y-%m-%d}", "trusted"] for digest, ends in trusted]
    rows.append(["server", f"{server.serial_number:x}"[:16], ", ".join(names), f"{server.not_valid_after_utc:%Y-%m-%d}", "served"])
    console.print_table(["kind", "serial", "name", "until", "state"], [*rows, *(["member", *_cells(one)] for one in issued)])
    if found.until is not None:
        ends = datetime.datetime.fromtimestamp(found.until, datetime.UTC)
        console.say(f"both authorities are trusted until {ends:%Y-%m-%d %H:%M} UTC: hand out {market_home / 'ca.crt'} by then")


def _cells(one: Issued) -> list[str]:
    ends = datetime.datetime.fromtimestamp(one.ends, datetime.UTC)
    return [
        one.serial[:16], one.name.removeprefix("veilmart://")[:24], f"{ends:%Y-%m-%d}", "valid" if one.revoked is None else "REVOKED",
    ]  # fmt: skip


def _row(one: Issued) -> dict[str, Any]:
    return {"serial": one.serial, "name": one.name, "issued": one.issued, "ends": one.ends, "revoked": one.revoked}


COMMANDS: dict[str, Callable[..., None]] = {
    "init": pki_init, "issue": pki_issue, "rotate": pki_rotate, "revoke": pki_revoke, "show": pki_show,
}  # fmt: skip
