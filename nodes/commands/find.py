"""Matching a private task, and proof of a market's answer: `find`, `catalogue export`, `verify answer`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import (
    Authority,
    Base,
    Home,
    Json,
    Map,
    MarketAddress,
    MaybeAuthority,
    MaybeMarket,
    Quiet,
    read_bytes,
    show,
)
from protocol.errors import FormatError, IncompatibleSpecification, InvalidSignature, NotFound, UsageError

if TYPE_CHECKING:
    from nodes.market_client import Exchange


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
    adapter_epsilon_at_most: Annotated[
        float | None, typer.Option("--adapter-epsilon-at-most", help="Only adapters with a guarantee of at most this epsilon.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the price of both ways and what the market saw.")] = False,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="How many to show.")] = 5,
    places_per_org: Annotated[
        int, typer.Option("--places-per-org", min=0, help="Show at most so many of one organisation; 0 for any number.")
    ] = 2,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the specialist that suits a private task.  Exit code 3 if there is none, or if the noise does not let it tell.

    Example: veilmart find task.jsonl --market 127.0.0.1:7443 --ca ca.crt -k 3
    """
    from nodes import console
    from nodes.market import Market
    from nodes.querier import Querier, Way, search_to_json
    from nodes.query import Filters
    from protocol.keys import write_durably
    from protocol.scoring import Verdict

    if mirror and (auto or keep_proof):
        raise UsageError("find: --mirror asks the market nothing that could be proved, and leaves nothing to choose")

    def keep(exchange: Exchange) -> None:
        if keep_proof is not None:
            write_durably(keep_proof, exchange.proof.to_bytes())

    progress = console.ProgressLine(not (as_json or quiet))
    querier = Querier(Market(market, ca, home), feature_map=which_map, base=base, on_progress=progress)
    search = querier.find(
        file,
        way=Way.MIRROR if mirror else Way.CHEAPER if auto and not keep_proof else Way.ENCRYPTED,
        filters=Filters(base_model, licence, max_bytes, epsilon_at_most, adapter_epsilon_at_most),
        top=top, places_per_organisation=places_per_org, on_exchange=keep,
    )  # fmt: skip
    progress.close()
    found, given, price = search.found, search.places, search.price_bytes
    shown, result, matched = given.matches, search_to_json(search, keep_proof), search.verdict is Verdict.MATCH
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
        for name, count in given.folded.items():
            console.say(f"and {count} more of {name or 'the same owners'}: --places-per-org 0 shows them")
        for title, original in given.copies.items():
            console.say(f"no place for {title}: a copy of {original}")
        if explain:
            cheaper = "mirror" if price["mirror"] <= price["encrypted"] else "encrypted"
            console.say(
                f"bytes from nothing: mirror {price['mirror']}, encrypted {price['encrypted']} with the catalogue; cheaper: {cheaper}"
            )
            console.say(f"the market saw: {search.seen}.  It did not see your text, your sketch, your filters or these scores.")
        if matched and shown:
            console.next_step(f'ask -m {found.title_of(shown[0])} "..."')
    if not matched:
        if not (as_json or quiet):
            console.say(search.why_not)
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
    lines = [f"{out}: {len(envelopes)} releases, as the market signed them"]
    show(result, as_json, lines, then=f"verify answer PROOF --releases {shlex.quote(str(out))}")


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
        proof = AnswerProof.from_bytes(read_bytes(file))
    if releases is not None:
        with _no_proof(releases):
            opened = [open_envelope(envelope) for envelope in unpack_releases(read_bytes(releases))]
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
    show(result, as_json, [f"{judgement.finding}: {judgement.reason}", f"market key {proof.market_key.hex()}"])
    exit_code = {Finding.HONEST: 0, Finding.WRONG: 7, Finding.NO_PROOF: 2}[judgement.finding]
    if exit_code:
        raise typer.Exit(exit_code)


@contextmanager
def _no_proof(source: Path | str) -> Iterator[None]:
    """Exit code 7 of `verify answer` says that a market is proven wrong: what cannot be read proves nothing and is 2."""
    try:
        yield
    except (FormatError, InvalidSignature, IncompatibleSpecification) as error:
        raise UsageError(f"{source}: proves nothing: {error}", hint=error.hint) from None


COMMANDS = {"find": find, "catalogue export": catalogue_export, "verify answer": verify_answer}
