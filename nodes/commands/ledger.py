"""The owner's ledger: `node ledger`, `backup`, `restore`, `repair`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import Authority, Home, Json, Map, MarketAddress, Population, Quiet, Unit, population_name, show, unit_in
from protocol.errors import UsageError

if TYPE_CHECKING:
    from protocol.privacy import PrivacyUnit


def node_ledger(
    home: Home,
    population: Population = "default",
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life.")] = 4.0,
    prv: Annotated[bool, typer.Option("--prv", help="Also compose by PRV, as if all were planned beforehand; takes seconds.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Verify the ledger's chain and show every charge, what is spent and what is left.

    Example: veilmart node ledger
    """
    from nodes import console
    from nodes.populations import folder_of
    from nodes.statement import open_ledger, statement

    result = statement(open_ledger(folder_of(home, population_name(population)), population, budget), prv=prv)
    if as_json:
        console.print_json(result)
        return
    if quiet:
        console.print_lines(*(row["release_id"] for row in result["entries"] if row["release_id"]))
        return
    table = [
        [
            str(row["number"]), str(row["release_number"] or "-"), row["release_id"][:16] or "-",
            f"{row['epsilon']:.3g}", f"{row['delta']:g}", row["origin"], row["hash"][:16],
        ]
        for row in result["entries"]
    ]  # fmt: skip
    console.print_table(["#", "release", "id", "epsilon", "delta", "origin", "hash"], table)
    figure = result["epsilon_prv"]
    console.print_lines(
        f"population {population}, unit {result['unit']}: {len(table)} charges, chain verified"
        + ("" if result["compared"] else "; NOT compared with the market since it was restored, so nothing is drawn from it"),
        f"spent {result['spent']:.2f} of {budget:.2f} at delta {result['delta']:g}, left {result['left']:.2f}"
        + ("" if figure is None else f"; {figure:.2f} by PRV, valid if every charge was planned before the first release"),
    )


def node_backup(
    home: Home,
    file: Annotated[Path, typer.Argument(help="File to write.")],
    key: Annotated[Path | None, typer.Option("--key", help="Also copy the signing key into a file of its own.")] = None,
    population: Population = "default",
    as_json: Json = False,
) -> None:
    """Copy the ledger with all its releases, consistently, while the node may go on working.

    Example: veilmart node backup ledger-2026.backup
    """
    from nodes.populations import claimed_by, claims_of, folder_of
    from nodes.statement import open_ledger
    from protocol.keys import read_secret, write_durably

    folder = folder_of(home, population_name(population))
    ledger = open_ledger(folder, population)
    if key is not None and key.exists():
        raise UsageError(f"{key}: already there", hint="a backup never overwrites one")
    count = ledger.backup(file, lambda: claimed_by(claims_of(home), population))
    if key is not None:
        write_durably(key, read_secret(folder / "owner.key"))
    kept = "it holds no key" if key is None else f"the signing key is in {key}: whoever has that file can publish in your name"
    lines = [
        f"{file}: {count} charges with their releases, readable by you alone; {kept}",
        "a digest of each record and unit that was charged is in it too: it confirms a guess, so keep the file private",
        "adapters, the data and the base model are not in it",
        *(() if key else ("without owner.key nothing can be published under this name again: keep a copy of it elsewhere (--key FILE)",)),
    ]
    result = {"schema": "veilmart.backup/1", "file": str(file), "entries": count, "key": str(key) if key else None}
    show(result, as_json, lines)


def node_restore(
    home: Home,
    file: Annotated[Path, typer.Argument(help="A backup of `veilmart node backup`.")],
    population: Population = "default",
    as_json: Json = False,
) -> None:
    """Put a backup in the place of a ledger that is lost or damaged.  Then `node repair` must compare it with the market.

    Example: veilmart node restore ledger-2026.backup
    """
    from nodes.ledger import claims_in, in_use, restore
    from nodes.populations import claim, claims_of, folder_of

    folder = folder_of(home, population_name(population))
    with in_use(folder, alone=True):
        count = restore(file, folder / "ledger.db", population, lambda digests: claim(claims_of(home), population, digests))
    lines = [
        f"{count} charges restored; the chain verifies",
        "charges made after the backup may be missing: nothing is drawn until `veilmart node repair` or a publish has compared it",
        *(
            ("this older backup does not say which records were charged: another population could charge them again unnoticed",)
            if claims_in(file) is None
            else ()
        ),
        *(
            ()
            if (folder / "owner.key").exists()
            else (f"the signing key is not there: put your copy at {folder / 'owner.key'}, mode 0600",)
        ),
    ]
    show({"schema": "veilmart.restore/1", "entries": count, "compared": False}, as_json, lines, then="node repair")


def node_repair(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    population: Population = "default",
    unit: Unit = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Set a damaged ledger aside and rebuild it from the market alone.")] = False,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Compare the ledger with the market's list of your releases, and charge again what it does not know.

    Example: veilmart node repair --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.ledger import Budget, Ledger, in_use, set_aside
    from nodes.market_client import MarketClient
    from nodes.populations import folder_of
    from nodes.succession import keep_rotations, keys_before
    from protocol.features import open_map
    from protocol.keys import signing_key

    folder = folder_of(home, population_name(population))
    if not (folder / "owner.key").is_file():  # `signing_key` would make a new one, which owns nothing
        raise UsageError(f"{folder / 'owner.key'}: expected the signing key of the releases", hint="put your copy there, mode 0600")
    owner = signing_key(folder / "owner.key").public_key().public_bytes_raw()
    with MarketClient(market, ca, home) as client:
        keep_rotations(folder, owner, client.rotations())  # of a folder that was lost with them
        envelopes = client.releases_of((owner, *keys_before(folder, owner)), open_map(which_map))
    path, of = folder / "ledger.db", unit_in(unit, folder)
    if rebuild:
        of = _unit_of_releases(envelopes, of, unit is not None)  # before the ledger is set aside: what fails here changes nothing
    with in_use(folder, alone=rebuild):
        aside = set_aside(path) if rebuild else None
        ledger = Ledger.open(path, Budget(4.0, 1e-6), population, of, behind=rebuild)
        ledger.require_owner(owner)
        added = ledger.absorb(envelopes)
    lines = [
        f"the market holds {len(envelopes)} releases of this owner; {added} were missing in the ledger and are in it now",
        "each is charged but a renewal, which has the numbers of one that is",
        "releases at other markets are not known to this one: repair with each market you published at",
        *((f"the damaged ledger is kept at {aside}",) if aside else ()),
    ]
    result = {
        "schema": "veilmart.repair/1", "releases": len(envelopes), "charged_again": added, "entries": len(ledger.entries()),
        "set_aside": str(aside) if aside else None,
    }  # fmt: skip
    show(result, as_json, lines)


def _unit_of_releases(envelopes: Sequence[bytes], otherwise: PrivacyUnit, asked: bool) -> PrivacyUnit:
    """Return the unit that releases state; raise PopulationConflict if they state several, or another than was asked for."""
    from protocol.errors import PopulationConflict
    from protocol.release import open_envelope

    units = {open_envelope(envelope).specification.guarantee.unit for envelope in envelopes}
    if len(units) > 1 or (asked and units and units != {otherwise}):
        names = ", ".join(sorted(map(str, units)))
        expected = str(otherwise) if asked else "one unit"
        raise PopulationConflict(
            f"--rebuild: expected releases of {expected}, got {names}",
            hint="a ledger is of one unit for life; `veilmart node restore` takes a backup",
        )
    return units.pop() if units else otherwise


COMMANDS = {"node ledger": node_ledger, "node backup": node_backup, "node restore": node_restore, "node repair": node_repair}
