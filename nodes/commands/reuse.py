"""Using a learnware: `pull`, `ask`, `compare`, `serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nodes.commands.options import Authority, Base, Home, Json, Map, MarketAddress, MaybeAuthority, MaybeMarket, Quiet, open_model, show
from protocol.errors import NotFound, UsageError

if TYPE_CHECKING:
    from nodes.base_model import BaseModel
    from nodes.console import ProgressLine
    from nodes.records import Pair, Record
    from nodes.reuse.choice import Choice
    from nodes.reuse.strategies import Mixing, Wish


def pull(
    home: Home,
    learnware: Annotated[str, typer.Argument(metavar="ID", help="NAME@HEX as `find` prints it, or the id.")],
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
    from nodes.learnwares import pull_learnware
    from nodes.market_client import MarketClient
    from protocol.features import open_map

    progress = console.ProgressLine(not (as_json or quiet))
    with MarketClient(market, ca, home) as client:
        stored = pull_learnware(learnware, client, home, open_map(which_map), lambda done, of: progress("pull", done, of), cover)
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
        "cover": cover,
    }  # fmt: skip
    lines = [
        f"{stored.release.title}  signature ok, in the market's signed catalogue, admitted",
        f"specification: epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, unit {guarantee.unit}",
        f"adapter: {stored.adapter or 'this owner published none'}" + (f", digest ok, guarantee: {promise}" if stored.adapter else ""),
        f"fetched among {cover + 1} in random order: the market cannot tell which; it sees who fetched, when, and what several pulls share"
        if cover
        else "the market saw which one was fetched: --cover 7 hides it among eight",
    ]
    show(result, as_json, lines)


Learnwares = Annotated[
    list[str] | None,
    typer.Option(
        "-m", "--learnware", help="NAME@HEX as `find` prints it, or the id; several for a mixture.", show_default="the best match of --task"
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


@dataclass(frozen=True, slots=True)
class _Request:
    """The options that `ask`, `compare` and `serve` have in common."""

    home: Path
    names: tuple[str, ...]
    strategies: tuple[str, ...]
    market: str | None
    ca: Path | None
    task: Path | None
    larger: Path | None
    base: Path | None
    which_map: str
    nothing_leaves: bool
    device: str
    several: int = 1
    tries: int = 1
    cover: int = 0

    def check(self) -> None:
        """Raise UsageError for what cannot work, before anything is loaded or sent."""
        from nodes.reuse.choice import check_here, check_nothing_leaves
        from nodes.reuse.strategies import WITH_SPECIALIST, Strategy, check_directories

        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError("--device: expected auto, cpu or cuda")
        wanted = [Strategy(name) for name in self.strategies]
        needed = any(strategy in WITH_SPECIALIST for strategy in wanted)
        if self.nothing_leaves and needed:
            check_nothing_leaves(self.names, self.home, self.market)
        if needed and not self.names and (self.task is None or self.market is None):
            raise UsageError("no specialist is named", hint="-m ID names one; --task FILE with --market finds one")
        if needed and not (self.market and self.ca):
            check_here(self.names, self.home)
        for strategy in wanted:
            check_directories(strategy, self.base or self.home / "models" / "smollm2-135m", self.larger)

    def choose(self, model: BaseModel, task: Sequence[Record]) -> Choice:
        """Return the specialists; raise NotFound where there are none."""
        from contextlib import nullcontext

        from nodes.market_client import MarketClient
        from nodes.reuse.choice import matched, named
        from protocol.features import open_map

        feature_map = open_map(self.which_map)
        connected = MarketClient(self.market, self.ca, self.home) if self.market and self.ca else nullcontext()
        with connected as client:
            if self.names:
                return named(self.names, model, self.home, client, feature_map, task, self.cover)
            if client is None:
                raise UsageError("--task: needs a market to find a specialist at", hint="give --market and --ca")
            return matched(task, model, self.home, client, feature_map, self.several, tries=self.tries, cover=self.cover)

    def records(self) -> Sequence[Record]:
        """Return the records of the task, none without one."""
        from nodes.records import read_records

        return read_records(self.task) if self.task else ()


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
    from nodes.reuse.strategies import Strategy, Wish, assemble, parse_strategy
    from nodes.reuse.trial import base_instead, triable

    chosen, names = parse_strategy(strategy), tuple(learnware or ())
    count = len(names) or (several if chosen is Strategy.MIXTURE else 1)
    wish = Wish(chosen, larger is not None, count, alpha, tau, mixing_of(mixing), calibrated=validation is not None)
    found = several if chosen is Strategy.MIXTURE else 1
    request = _Request(home, names, (chosen,), market, ca, task, larger, base, which_map, nothing_leaves, device, found, cover=cover)
    request.check()
    pairs = answered(read_records(validation), validation.name, 1) if validation else []
    examples = request.records()
    trial = triable(pairs or examples) if tries else []
    model = open_model(home, base, device)
    choice = None
    progress = console.ProgressLine(not as_json)
    if chosen not in (Strategy.BASE, Strategy.LARGER):
        choice = _tried(wish, model, replace(request, tries=tries if trial else 1).choose(model, examples), trial, progress)
    if choice is not None and not choice.specialists:
        assistant = base_instead(model, choice)
    else:
        large = open_model(home, larger, device) if wish.larger else None
        wish = _calibrated(wish, model, choice, large, pairs, tokens, progress)
        assistant = assemble(
            replace(wish, specialists=len(choice.specialists) if choice else 0), model, choice.specialists if choice else (),
            weights=choice.weights if choice else (), larger=large,
            why=choice.why if choice else "", left_site=choice.left_site if choice else (),
        )  # fmt: skip
    progress.close()
    question = sys.stdin.read() if text == "-" else text
    answer = assistant.answer([("user", question)], tokens)
    plain = model.generate(question, None, tokens) if compare else None
    result = {
        "schema": "veilmart.ask/2", "learnware": [one.title for one in choice.specialists] if choice else [],
        "answer": answer.text, "base_answer": plain,
        "strategy": str(answer.strategy), "answered_by": answer.answered_by, "why": answer.why, "escalated": answer.escalated,
        "confidence": answer.confidence, "tokens": answer.tokens, "seconds": answer.seconds, "finished": answer.finished,
        "left_site": list(answer.left_site), "settings": dict(assistant.settings),
    }  # fmt: skip
    lines = [answer.text] if plain is None else [f"{answer.answered_by}: {answer.text}", f"base model: {plain}"]
    show(result, as_json, lines)
    if not as_json and (trial or chosen is not Strategy.SINGLE):
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


def _tried(wish: Wish, model: BaseModel, choice: Choice, pairs: Sequence[Pair], progress: ProgressLine) -> Choice:
    """Return what is left of a choice after a trial on these records, which may be the base model; all of it without records."""
    from nodes.reuse.strategies import WITH_LARGER
    from nodes.reuse.trial import tried

    if not pairs:
        return replace(choice, why=f"{choice.why}; not tried on your records")
    kept = tried(wish, model, choice, pairs, progress)
    if not kept.specialists and wish.strategy in WITH_LARGER:
        raise NotFound(f"no specialist for this task: {kept.why}", hint="--try 0 takes the best match all the same")
    return kept


def _calibrated(
    wish: Wish,
    model: BaseModel,
    choice: Choice | None,
    larger: BaseModel | None,
    pairs: Sequence[Pair],
    tokens: int,
    progress: ProgressLine,
) -> Wish:
    """Return the wish with what was not given calibrated on a user's records."""
    from nodes.reuse.calibration import calibrate_alpha, calibrate_tau
    from nodes.reuse.decoding import Voice
    from nodes.reuse.strategies import Part, Strategy

    if not pairs or larger is None or choice is None:
        return wish
    specialist, large = Voice(model, choice.specialists[0].adapter), Voice(larger)
    if wish.strategy is Strategy.CASCADE and wish.tau is None:
        return replace(wish, tau=calibrate_tau(pairs, Part(specialist, model), Part(large, larger), tokens, progress))
    if wish.strategy is Strategy.PROXY and wish.alpha is None:
        return replace(wish, alpha=calibrate_alpha(pairs, model, specialist, Voice(model), large, progress))
    return wish


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
    from nodes.compare import compare as run
    from nodes.compare import lineup, pareto_front
    from nodes.pareto import cells, page, table_columns
    from nodes.records import read_records
    from nodes.reuse.calibration import answered, halves
    from protocol.keys import write_durably

    pairs = answered(read_records(validation, limit), validation.name, 2)
    calibration, scored = halves(pairs)
    if not scored:
        raise UsageError(f"{validation.name}: expected at least two different records")
    wanted = ("single", *(("larger",) if larger else ()))
    request = _Request(
        home, tuple(learnware or ()), wanted, market, ca, validation, larger, base, which_map, nothing_leaves, device, several
    )
    request.check()
    model = open_model(home, base, device)
    choice = request.choose(model, calibration)
    large = open_model(home, larger, device) if larger else None
    progress = console.ProgressLine(not as_json)
    assistants = lineup(model, choice, large, calibration, tokens, progress)
    rows = run(assistants, scored, tokens, progress)
    progress.close()
    front = [row.name for row in pareto_front(rows)]
    result = {
        "schema": "veilmart.compare/1", "calibrated_on": len(calibration), "scored_on": len(scored), "device": model.device,
        "learnwares": [{"title": one.title, "weight": weight} for one, weight in zip(choice.specialists, choice.weights, strict=True)],
        "why": choice.why, "left_site": list(choice.left_site), "pareto_front": front, "strategies": [asdict(row) for row in rows],
        "html": str(html) if html else None,
    }  # fmt: skip
    if html is not None:
        write_durably(html, page(rows, validation.name, len(scored)).encode(), 0o644)
    if as_json:
        console.print_json(result)
        return
    columns = table_columns(rows)
    console.print_table(columns, [cells(row, columns) for row in rows])
    console.say(f"scored on {len(scored)} records; nothing beats {', '.join(front)} in both loss and time")
    for told in choice.left_site:
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
    from nodes.reuse.strategies import Strategy, Wish, assemble, parse_strategy
    from nodes.reuse.trial import base_instead, triable

    chosen, names = parse_strategy(strategy), tuple(learnware or ())
    several = several if chosen is Strategy.MIXTURE else 1
    wish = Wish(chosen, larger is not None, len(names) or several, alpha, tau, mixing_of(mixing))
    request = _Request(home, names, (chosen,), market, ca, task, larger, base, which_map, nothing_leaves, device, several, cover=cover)
    request.check()
    examples = request.records()
    trial = triable(examples) if tries else []
    token_path = token_file or home / "serve-token"
    token, bound = endpoint.read_token(token_path), loopback.bind(port)
    with bound:
        model = open_model(home, base, device)
        large = open_model(home, larger, device) if larger else None
        served = {"base": assemble(Wish(Strategy.BASE, specialists=0), model)}
        if large is not None:
            served["larger"] = assemble(Wish(Strategy.LARGER, larger=True, specialists=0), model, larger=large)
        title = str(chosen)
        if chosen not in (Strategy.BASE, Strategy.LARGER):
            progress = console.ProgressLine(not as_json)
            choice = _tried(wish, model, replace(request, tries=tries if trial else 1).choose(model, examples), trial, progress)
            progress.close()
            title = " + ".join(one.title for one in choice.specialists) or "base"
            served["veilmart"] = base_instead(model, choice) if not choice.specialists else assemble(
                replace(wish, specialists=len(choice.specialists)), model, choice.specialists, weights=choice.weights, larger=large,
                why=choice.why, left_site=choice.left_site,
            )  # fmt: skip
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
