"""Using a learnware: `pull`, `ask`, `compare`, `serve`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.completion import learnwares
from nodes.commands.options import (
    Authority,
    Base,
    Home,
    Json,
    Learnware,
    Map,
    MarketAddress,
    MaybeAuthority,
    MaybeMarket,
    Quiet,
    show,
)
from nodes.commands.show import signers_of
from protocol.errors import UsageError

if TYPE_CHECKING:
    from nodes.console import ProgressLine
    from nodes.querier import Querier
    from nodes.reuse.strategies import Mixing


def pull(
    home: Home,
    learnware: Learnware,
    market: MarketAddress,
    ca: Authority,
    which_map: Map = "kme-lin-96",
    cover: Annotated[int, typer.Option("--cover", min=0, max=63, help="Fetch so many others with it, so that the market cannot tell.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a learnware: release and adapter, signature and digest checked.  Without --cover the market sees which one.

    Example: veilmart pull notes@7c1f0a2b --cover 7 --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes import console
    from nodes.market import Market
    from nodes.querier import Querier

    progress = console.ProgressLine(not (as_json or quiet))
    stored = Querier(Market(market, ca, home), feature_map=which_map, on_progress=progress).pull(learnware, cover=cover)
    progress.close()
    if quiet:
        console.print_lines(stored.release.release_id.hex())
        return
    guarantee, adapter = stored.release.specification.guarantee, stored.release.adapter
    promise = str(adapter.guarantee) if stored.adapter and adapter else None
    result = {
        "schema": "veilmart.pull/1", "release_id": stored.release.release_id.hex(), "title": stored.release.title,
        "adapter": str(stored.adapter) if stored.adapter else None, "adapter_guarantee": promise,
        "epsilon_spec": guarantee.epsilon, "delta": guarantee.delta, "unit": str(guarantee.unit),
        "cover": cover, "signers": [signer.hex() for signer in stored.release.signers],
    }  # fmt: skip
    lines = [
        f"{stored.release.title}  signature ok, in the market's signed catalogue, admitted",
        *([f"signed by {signers_of(stored.release)}"] if stored.release.cohort is not None else []),
        f"specification: epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, unit {guarantee.unit}",
        f"adapter: {stored.adapter or 'this owner published none'}" + (f", digest ok, guarantee: {promise}" if stored.adapter else ""),
        f"fetched among {cover + 1} in random order: the market cannot tell which; it sees who fetched, when, and what several pulls share"
        if cover
        else "the market saw which one was fetched: --cover 7 hides it among eight",
    ]
    show(result, as_json, lines, then=f'ask -m {stored.release.title} "..."' if stored.adapter else "")


Learnwares = Annotated[
    list[str] | None,
    typer.Option(
        "-m",
        "--learnware",
        help="NAME@HEX as `find` prints it, or the id; several for a mixture.",
        show_default="the best match of --task",
        autocompletion=learnwares,
    ),
]
Larger = Annotated[Path | None, typer.Option("--larger", metavar="DIR", help="A larger local model: a Hugging Face directory.")]
Alpha = Annotated[float | None, typer.Option("--alpha", help="How strongly a proxy steers.", show_default="calibrated, else 1")]
Tau = Annotated[float | None, typer.Option("--tau", help="Confidence below which a cascade asks the larger model.")]
Mix = Annotated[str, typer.Option("--mixing", help="How a mixture is made: 'merge' adapters, or mix their 'outputs'.")]
Task = Annotated[Path | None, typer.Option("--task", help="Your task, as for `find`: chooses specialists, and weighs several.")]
NothingLeaves = Annotated[
    bool, typer.Option("--nothing-leaves", help="Refuse at once whatever would tell another machine anything: pulled learnwares only.")
]
Device = Annotated[str, typer.Option("--device", help="Where models compute: auto, cpu or cuda.")]
Tries = Annotated[
    int,
    typer.Option(
        "--try", min=0, max=16, help="Try so many of the best matches on your records with responses; 0 believes the specifications."
    ),
]
Cover = Annotated[int, typer.Option("--cover", min=0, max=63, help="Fetch so many others with each, so that the market cannot tell.")]
Several = Annotated[int, typer.Option("--several", min=1, max=8, help="At most so many specialists in a mixture found by --task.")]


def _querier(
    home: Home, market: str | None, ca: Path | None, which_map: str, base: Path | None, device: str, progress: ProgressLine
) -> Querier:
    from nodes.market import Market
    from nodes.querier import Querier

    named = Market(market, ca, home) if market is not None and ca is not None else None
    return Querier(named, home=home, feature_map=which_map, base=base, device=device, on_progress=progress)


def ask(
    home: Home,
    text: Annotated[str, typer.Argument(help="What to ask; '-' reads it from standard input.")],
    learnware: Learnwares = None,
    strategy: Annotated[str, typer.Option("--strategy", help="single, mixture, cascade, proxy or speculative.")] = "single",
    larger: Larger = None,
    alpha: Alpha = None,
    tau: Tau = None,
    mixing: Mix = "merge",
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="Your records with responses: tries specialists, calibrates --tau of a cascade, --alpha of a proxy.",
            show_default="those of --task",
        ),
    ] = None,
    task: Task = None,
    tries: Tries = 3,
    cover: Cover = 0,
    several: Several = 3,
    nothing_leaves: NothingLeaves = False,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    relay: Annotated[
        bool, typer.Option("--relay", help="Let the owner's guard answer: the question goes there through the market, sealed.")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")] = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2048, help="Longest answer.")] = 64,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let a specialist answer, here, alone or together with others or with a larger local model: the question goes nowhere.

    With --relay the guard of its owner answers, who then reads the question; the market forwards what it cannot open.

    Example: veilmart ask -m notes@7c1f0a2b "pt c/o chest pain"
    """
    from nodes import console

    if relay:
        here = (strategy != "single", larger, alpha, tau, mixing != "merge", validation, task, compare, base)
        if any(option not in (None, False) for option in here):
            raise UsageError(
                "--relay: the owner's guard answers, alone", hint="with -m ID, --tokens, --market and --ca, and no other model"
            )
        if nothing_leaves:
            raise UsageError("--nothing-leaves: with --relay the question leaves, sealed for the owner", hint="leave out one of both")
        _ask_the_guard(home, text, learnware or [], tokens, which_map, market, ca, as_json)
        return
    from nodes.records import read_records
    from nodes.reuse.calibration import answered
    from nodes.reuse.strategies import Strategy, parse_strategy

    chosen = parse_strategy(strategy)
    pairs = answered(read_records(validation), validation.name, 1) if validation else []
    examples = read_records(task) if task else []
    progress = console.ProgressLine(not as_json)
    querier = _querier(home, market, ca, which_map, base, device, progress)
    assistant = querier.assistant(
        chosen, learnwares=learnware or (), task=examples, validation=pairs, larger=larger, alpha=alpha, tau=tau, mixing=mixing_of(mixing),
        several=several, tries=tries, cover=cover, nothing_leaves=nothing_leaves, tokens=tokens,
    )  # fmt: skip
    progress.close()
    question = sys.stdin.read() if text == "-" else text
    answer = assistant.answer([("user", question)], tokens)
    plain = querier.model.generate(question, None, tokens) if compare else None
    result = {
        "schema": "veilmart.ask/2", "learnware": [one.title for one in assistant.account.specialists],
        "answer": answer.text, "base_answer": plain,
        "strategy": str(answer.strategy), "answered_by": answer.answered_by, "why": answer.why, "escalated": answer.escalated,
        "confidence": answer.confidence, "tokens": answer.tokens, "seconds": answer.seconds, "finished": answer.finished,
        "left_site": list(answer.left_site), "settings": dict(assistant.settings),
    }  # fmt: skip
    lines = [answer.text] if plain is None else [f"{answer.answered_by}: {answer.text}", f"base model: {plain}"]
    show(result, as_json, lines)
    if not as_json and (pairs or examples or chosen is not Strategy.SINGLE):
        console.say(f"answered by {answer.answered_by}: {answer.why}")
    if not as_json:
        for told in answer.left_site:
            console.say(f"left this site: {told}")


def _ask_the_guard(
    home: Path, text: str, names: list[str], tokens: int, which_map: str, market: str | None, ca: Path | None, as_json: bool
) -> None:
    from nodes import console
    from nodes.market_client import MarketClient
    from nodes.relay import ask_relayed
    from protocol.features import open_map

    if len(names) != 1 or market is None or ca is None:
        raise UsageError("--relay: expected one learnware and its market", hint="-m ID, --market HOST:PORT and --ca FILE")
    question = sys.stdin.read() if text == "-" else text
    progress = console.ProgressLine(not as_json)
    progress("ask", 0, 1)
    with MarketClient(market, ca, home) as client:
        relayed = ask_relayed(names[0], question, tokens, client, home, open_map(which_map))
    progress.close()
    release, reply = relayed.release, relayed.reply
    left_site = [
        f"the owner of {release.title} read the question",
        f"the market saw that {release.title} was asked, when, and {relayed.sent_bytes} and {relayed.received_bytes} sealed bytes",
    ]
    guarantee = str(release.adapter.guarantee) if release.adapter else "none"
    result = {
        "schema": "veilmart.ask-relay/1", "learnware": release.title, "answer": reply.text, "tokens": reply.tokens,
        "finished": reply.finished, "seconds": relayed.seconds, "adapter_guarantee": guarantee, "left_site": left_site,
    }  # fmt: skip
    # A stranger wrote it: without control characters, which a terminal would obey.
    shown = "".join(character for character in reply.text if character.isprintable() or character in "\n\t")
    show(result, as_json, [shown])
    if not as_json:
        for told in left_site:
            console.say(f"left this site: {told}")


def mixing_of(text: str) -> Mixing:
    """Return how a mixture is made; raise UsageError for another word."""
    from nodes.reuse.strategies import Mixing

    if text not in list(Mixing):
        raise UsageError(f"--mixing: expected one of {', '.join(Mixing)}")
    return Mixing(text)


def compare(
    home: Home,
    validation: Annotated[Path, typer.Option("--validation", help="Your records: one half calibrates, the other half is scored.")],
    learnware: Learnwares = None,
    larger: Larger = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the picture and the table to this file.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Use at most so many records.")] = 64,
    several: Several = 3,
    nothing_leaves: NothingLeaves = False,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, max=2048, help="Longest answer.")] = 40,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Run every strategy on your own records: what each is worth, costs and tells.

    Example: veilmart compare --validation mine.jsonl -m notes@7c1f0a2b --larger models/larger --html compare.html
    """
    from nodes import console
    from nodes.compare import compare_on, comparison_to_json
    from nodes.pareto import cells, page, table_columns
    from nodes.records import read_records
    from protocol.keys import write_durably

    progress = console.ProgressLine(not as_json)
    querier = _querier(home, market, ca, which_map, base, device, progress)
    found = compare_on(
        querier, read_records(validation, limit), validation.name, learnware or (),
        larger=larger, several=several, tokens=tokens, nothing_leaves=nothing_leaves,
    )  # fmt: skip
    progress.close()
    rows, result = found.rows, {**comparison_to_json(found), "html": str(html) if html else None}
    if html is not None:
        write_durably(html, page(rows, validation.name, found.scored_on).encode(), 0o644)
    if as_json:
        console.print_json(result)
        return
    columns = table_columns(rows)
    console.print_table(columns, [cells(row, columns) for row in rows])
    console.say(f"scored on {found.scored_on} records; nothing beats {', '.join(result['pareto_front'])} in both loss and time")
    for told in found.choice.left_site:
        console.say(f"left this site: {told}")


def serve(
    home: Home,
    learnware: Learnwares = None,
    strategy: Annotated[str, typer.Option("--strategy", help="single, mixture, cascade, proxy or speculative.")] = "single",
    larger: Larger = None,
    alpha: Alpha = None,
    tau: Tau = None,
    mixing: Mix = "merge",
    task: Task = None,
    tries: Tries = 3,
    cover: Cover = 0,
    several: Several = 3,
    nothing_leaves: NothingLeaves = False,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8642,
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="Bearer token, mode 0600; made if missing.", show_default="HOME/serve-token")
    ] = None,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Serve specialists to programs that speak OpenAI's protocol, on this machine only.

    The models served: 'veilmart' (the strategy), 'base', and 'larger' if there is one.

    Example: veilmart serve -m notes@7c1f0a2b --port 8642
    """
    from nodes import console, endpoint, loopback
    from nodes.records import read_records
    from nodes.reuse.strategies import WITH_SPECIALIST, Strategy, Wish, assemble, parse_strategy

    chosen = parse_strategy(strategy)
    examples = read_records(task) if task else []
    token_path = token_file or home / "serve-token"
    token, bound = endpoint.read_token(token_path), loopback.bind(port)
    with bound:
        progress = console.ProgressLine(not as_json)
        querier = _querier(home, market, ca, which_map, base, device, progress)
        assistant = querier.assistant(
            chosen, learnwares=learnware or (), task=examples, larger=larger, alpha=alpha, tau=tau, mixing=mixing_of(mixing),
            several=several, tries=tries, cover=cover, nothing_leaves=nothing_leaves,
        )  # fmt: skip
        progress.close()
        served = {"base": assemble(Wish(Strategy.BASE, specialists=0), querier.model)}
        if larger is not None:
            large = querier.larger_model(larger)
            served["larger"] = assemble(Wish(Strategy.LARGER, larger=True, specialists=0), querier.model, larger=large)
        title = str(chosen)
        if chosen in WITH_SPECIALIST:
            served["veilmart"] = assistant
            title = " + ".join(one.title for one in assistant.account.specialists) or "base"
        url = f"http://{loopback.HOST}:{bound.getsockname()[1]}/v1"
        result = {
            "schema": "veilmart.serve/1", "url": url, "models": list(served), "learnware": title, "strategy": str(chosen),
            "token_file": str(token_path), "pid": os.getpid(),
        }  # fmt: skip
        show(result, as_json, [f"{url}  models: {', '.join(served)}  (veilmart = {title})", f"bearer token: in {token_path}"])
        sys.stdout.flush()
        endpoint.serve(served, token, bound)
        console.say("stopped")


COMMANDS = {"pull": pull, "ask": ask, "compare": compare, "serve": serve}
