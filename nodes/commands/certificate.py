"""`node certificate`: the certificate under which a node calls its market."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Home, Json, MaybeAuthority, MaybeMarket, Population, population_name, show
from protocol.errors import NotFound, UsageError


def node_certificate(
    home: Home,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    population: Population = "default",
    renew: Annotated[bool, typer.Option("--renew", help="Get a new one from the market, for a new TLS key.")] = False,
    request: Annotated[Path | None, typer.Option("--request", metavar="FILE", help="Write a request for `veilmart pki issue`.")] = None,
    install: Annotated[Path | None, typer.Option("--install", metavar="FILE", help="Keep the certificate that answers it.")] = None,
    as_json: Json = False,
) -> None:
    """Show your certificate, or get another one.  Commands that need one get and renew it by themselves; `--renew` is for a revoked one.

    Example: veilmart node certificate --renew --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.market_client import MarketClient
    from nodes.membership import Membership
    from nodes.populations import folder_of
    from protocol.certificates import name_in
    from protocol.keys import write_durably

    if sum((renew, request is not None, install is not None)) > 1:
        raise UsageError("node certificate: expected one of --renew, --request and --install")
    folder = folder_of(home, population_name(population))
    if not (folder / "owner.key").exists():
        raise NotFound(f"{folder / 'owner.key'}: there is no key yet", hint="`veilmart node join` makes it")
    membership = Membership.of(folder)
    if renew or request is not None:
        if market is None or ca is None:
            raise UsageError("node certificate: expected --market and --ca", hint="or `veilmart node join` a market once")
        with MarketClient(market, ca, home) as client:
            market_key = client.market_key if request is not None and client.market_key else client.describe().market_key
            if renew:
                membership.renew(client, market_key)
        if request is not None:
            write_durably(request, membership.request(market_key), 0o644)
            asked = {"schema": "veilmart.certificate-request/1", "request": str(request)}
            show(asked, as_json, [f"{request}: for the operator's `veilmart pki issue --csr`, within seven days"])
            return
    if install is not None:
        if ca is None:
            raise UsageError("node certificate: expected --ca", hint="the market's certificate authority")
        try:
            membership.install(install.read_bytes(), ca.read_bytes())
        except OSError as error:
            raise UsageError(f"{error.filename}: {error.strerror}") from None
    held = membership.held()
    if held is None:
        raise NotFound(f"{membership.file}: there is none yet", hint="`--renew` gets one from a market with a port for members")
    ends = held.not_valid_after_utc
    result = {
        "schema": "veilmart.certificate/1", "name": str(name_in(held)), "serial": f"{held.serial_number:x}",
        "begins": int(held.not_valid_before_utc.timestamp()), "ends": int(ends.timestamp()), "file": str(membership.file),
    }  # fmt: skip
    show(result, as_json, [f"{name_in(held)}", f"until {ends:%Y-%m-%d %H:%M} UTC, serial {held.serial_number:x}, {membership.file}"])


COMMANDS = {"node certificate": node_certificate}
