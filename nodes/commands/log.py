"""The market's log as its users see it: `catalogue receipt`, `catalogue checkpoint`, `verify release`, `verify bundle`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from nodes.commands.options import Authority, Home, Json, Learnware, Map, MarketAddress, read_bytes, show
from protocol.console import say

MarketKey = Annotated[str | None, typer.Option("--market-key", metavar="HEX", help="Key of the market that must have signed it.")]
Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", help="Must be under exactly this one, if the sizes agree.")]


def catalogue_receipt(
    home: Home,
    learnware: Learnware,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    market: MarketAddress,
    ca: Authority,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Write a release with the market's signed promise that it is in the log: what `verify release` works on.

    Example: veilmart catalogue receipt notes@7c1f0a2b -o notes.receipt --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes.market_client import MarketClient, find_release_id
    from protocol.features import open_map
    from protocol.keys import write_durably

    with MarketClient(market, ca, home) as client:
        catalogue = client.sync(open_map(which_map))  # whole: the market sees that somebody wants a receipt, and of which release
        release_id = find_release_id(learnware, catalogue, holding_alone=False)
        receipt = client.receipt(release_id, catalogue.release_ids.index(release_id))
    write_durably(out, receipt.to_bytes(), 0o644)
    result = {"schema": "veilmart.receipt/1", "file": str(out), "release_id": release_id.hex(), "index": receipt.index}
    lines = [f"{out}: release {release_id.hex()[:16]} at index {receipt.index}, proven to be in the log"]
    show(result, as_json, lines, then=f"verify release {shlex.quote(str(out))}")


def catalogue_checkpoint(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write it to a file, to compare with others.")] = None,
    compare: Annotated[Path | None, typer.Option("--compare", help="A checkpoint that somebody else saw: is it the same log?")] = None,
    as_json: Json = False,
) -> None:
    """Show the newest checkpoint of a market's log, proven to extend all that this home has seen.

    A market that shows one history to you and another to somebody else is found out when you compare.  Exit code 7 if it did.

    Example: veilmart catalogue checkpoint --market 127.0.0.1:7443 --ca ca.crt --compare theirs.checkpoint
    """
    from nodes.market_client import MarketClient
    from protocol.keys import write_durably
    from protocol.transparency import accept, open_checkpoint

    theirs = read_bytes(compare) if compare is not None else None
    with MarketClient(market, ca, home) as client:
        market_key = client.describe().market_key
        ours, note = client.checkpoint(market_key), client.checkpoint_note()
        assert ours is not None  # `describe` keeps one or raises
        if theirs is not None:
            other = open_checkpoint(theirs, market_key)
            older, newer = sorted((ours.size, other.size))
            accept(ours, other, client.prove_consistency(older, newer) if 0 < older < newer else [])
    if out is not None:
        write_durably(out, note, 0o644)
    result = {
        "schema": "veilmart.checkpoint/1", "origin": ours.origin, "size": ours.size, "root": ours.root.hex(),
        "catalogue": ours.catalogue.hex(), "compared": str(compare) if compare else None,
    }  # fmt: skip
    lines = [
        f"log        {ours.origin}",
        f"size       {ours.size} releases",
        f"root       {ours.root.hex()}",
        f"catalogue  {ours.catalogue.hex()}",
        *([f"{compare}: the same log"] if compare else []),
        *([f"written to {out}"] if out else []),
    ]
    show(result, as_json, lines)


def catalogue_trust(
    home: Home,
    witness: Annotated[str | None, typer.Argument(metavar="KEY", help="Verifier key, as `veilmart market witness` prints it.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Trust it no more.")] = False,
    as_json: Json = False,
) -> None:
    """Trust a witness: from now on a market must show a checkpoint that it, or another trusted one, signed within 24 hours.

    Without KEY the trusted ones are listed.

    Example: veilmart catalogue trust
    """
    from nodes.market_client import read_witnesses
    from protocol.keys import write_durably
    from protocol.witness import Witness

    path = home / "witnesses"
    trusted = {str(one): one for one in read_witnesses(path)}
    if witness is not None:
        one = Witness.parse(witness)
        if remove:
            trusted.pop(str(one), None)
        else:
            trusted[str(one)] = one
        write_durably(path, "".join(f"{key}\n" for key in trusted).encode(), 0o644)
    result = {"schema": "veilmart.witnesses/1", "witnesses": list(trusted)}
    show(result, as_json, list(trusted))
    if not (trusted or as_json):
        say("no witness is trusted: a market that shows two logs is found out by comparing alone")


def verify_release(
    file: Annotated[Path, typer.Argument(help="A receipt of `node publish` or `catalogue receipt`.")],
    market_key: MarketKey = None,
    checkpoint: Checkpoint = None,
    holding: Annotated[bool, typer.Option("--holding", help="It must hold today, by this clock: exit code 7 if not.")] = False,
    as_json: Json = False,
) -> None:
    """Check a release and its place in a market's log, offline: both signatures and the proof.  Exit code 7 if anything is wrong.

    Whether the release holds today is said, and with --holding required.

    Example: veilmart verify release notes.receipt
    """
    from protocol.verify import verify_receipt

    result, lines = verify_receipt(file, market_key, checkpoint, holding)
    show(result, as_json, lines)


def verify_bundle(
    path: Annotated[Path, typer.Argument(help="Evidence of `audit export`, packed or as a folder.")],
    market_key: MarketKey = None,
    checkpoint: Checkpoint = None,
    witness: Annotated[str | None, typer.Option("--witness", metavar="KEY", help="This witness must have signed the log.")] = None,
    as_json: Json = False,
) -> None:
    """Check evidence offline: every signature, every proof, and that all of it is of one log.  Exit code 7 if anything is wrong.

    `python -m protocol.verify evidence.tar` does the same where nothing but Python's `cryptography` is installed.

    Example: veilmart verify bundle evidence.tar
    """
    from protocol.verify import verify_bundle

    result, lines = verify_bundle(path, market_key, checkpoint, witness)
    show(result, as_json, lines)


def verify_conflict(
    file: Annotated[Path, typer.Argument(help="Evidence of two releases of one number, as a refused publication leaves it.")],
    market_key: MarketKey = None,
    checkpoint: Checkpoint = None,
    as_json: Json = False,
) -> None:
    """Check evidence that one key signed two releases of one number, offline.  Exit code 7 if it does not prove that.

    Example: veilmart verify conflict conflicts/7c1f0a2b7c1f0a2b-2.conflict
    """
    from protocol.verify import verify_conflict

    result, lines = verify_conflict(file, market_key, checkpoint)
    show(result, as_json, lines)


COMMANDS = {
    "catalogue receipt": catalogue_receipt,
    "catalogue checkpoint": catalogue_checkpoint,
    "catalogue trust": catalogue_trust,
    "verify release": verify_release,
    "verify bundle": verify_bundle,
    "verify conflict": verify_conflict,
}
