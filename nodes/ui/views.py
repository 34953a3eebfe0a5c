"""What each page of the local page shows, and the work that its form starts.

A view gives facts, JSON values alone; an order reads a form and starts a job whose result is JSON too.  The work itself is that of the
commands: nodes/querier.py, nodes/compare.py, nodes/statement.py, nodes/forecast.py, nodes/audit/.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.records import Given, Pair, Record, read_owned_records, read_records
from nodes.ui.work import Job, Worker
from protocol.errors import FormatError, NotFound, UsageError
from protocol.privacy import PrivacyUnit
from protocol.web.forms import Form
from protocol.web.site import Page

if TYPE_CHECKING:
    from starlette.requests import Request

    from nodes.ledger import Entry
    from nodes.querier import Querier
    from nodes.reuse.strategies import Assistant

MOST_TOKENS = 512
MOST_JOURNAL = 50  # lines of the journal that are shown
MOST_RELEASES = 2_000  # drawn in an audit that is started from the page
SMALLEST_UNITS = 20  # as the owner's policy asks at least
PAGES = {"match": "Match", "answer": "Answer", "compare": "Compare", "outlook": "Outlook", "audit": "Audit"}  # that start work


class Views:
    """Everything that is shown and started, for one user: `querier` has home, model and market, `worker` does what takes long.

    budget: epsilon that the owner may spend for life, as `node ledger --budget`.
    """

    def __init__(self, querier: Querier, worker: Worker, budget: float) -> None:
        self._querier, self._worker, self._budget = querier, worker, budget

    # Work --------------------------------------------------------------------------------------------------------------

    def job(self, request: Request) -> Page:
        """How far one piece of work is, or what came of it."""
        job = self._worker.find(request.path_params["id"])
        return Page("veilmart.ui-work/1", "job.html", {"job": _told(job), "page": PAGES[job.kind], "result": job.result})

    def work(self, request: Request) -> Page:
        """Everything that was started since the program runs."""
        return Page("veilmart.ui-works/1", "work.html", {"jobs": [_told(job) for job in self._worker.jobs()]})

    def stop(self, form: Form) -> Job:
        """Stop a piece of work."""
        job = self._worker.find(form.fields.get("id", ""))
        job.stop()
        return job

    def _start(self, kind: str, title: str, run: Callable[[Job], Mapping[str, Any]]) -> Job:
        def with_progress(job: Job) -> Mapping[str, Any]:
            self._querier.on_progress = job.progress  # one worker, so one piece of work at a time reports through it
            return run(job)

        return self._worker.start(kind, title, with_progress)

    def _recent(self, kind: str) -> list[dict[str, Any]]:
        return [_told(job) for job in self._worker.jobs(kind)[:5]]

    # Querier -----------------------------------------------------------------------------------------------------------

    def match(self, request: Request) -> Page:
        """The form of a match."""
        return Page("veilmart.ui-match/1", "match.html", {"market": self._market(), "recent": self._recent("match")})

    def start_match(self, form: Form) -> Job:
        """Find the specialist for a task."""
        from nodes.querier import Way, search_to_json

        source, way = source_of(form), _chosen(form, "way", list(Way), Way.ENCRYPTED)
        if self._market() is None:
            raise UsageError("there is no market to ask", hint="start `veilmart ui` with --market and --ca, or `veilmart node join` one")

        def run(job: Job) -> Mapping[str, Any]:
            found = self._querier.find(read_records(source), way=Way(way))
            return {**search_to_json(found), "words": found.words, "seen": found.seen, "file": source.name, "time": _now()}

        return self._start("match", source.name, run)

    def answer(self, request: Request) -> Page:
        """The form of a question."""
        from nodes.reuse.strategies import Strategy

        facts = {
            "market": self._market(), "pulled": self._pulled(), "strategies": list(Strategy),
            "learnware": request.query_params.get("learnware", "")[:200], "recent": self._recent("answer"),
        }  # fmt: skip
        return Page("veilmart.ui-answer/1", "answer.html", facts)

    def start_answer(self, form: Form) -> Job:
        """Ask a question of a specialist and of the base model."""
        from nodes.endpoint import provenance
        from nodes.reuse.choice import check_here
        from nodes.reuse.strategies import Strategy, Wish, assemble, parse_strategy

        question, names, larger = form.fields.get("question", "").strip(), self._names(form), _folder(form, "larger")
        strategy, tokens = parse_strategy(form.fields.get("strategy") or "single"), _whole(form, "tokens", 64, 1, MOST_TOKENS)
        task = source_of(form) if _has_source(form) else None
        if not question:
            raise UsageError("a question is missing", hint="write it into the first field")
        if "fetch" not in form.fields:
            check_here(names, self._querier.home)
            if not names and strategy not in (Strategy.BASE, Strategy.LARGER):
                raise UsageError("no specialist is chosen", hint="choose one that is here, or let one be fetched for a task")

        def run(job: Job) -> Mapping[str, Any]:
            records = read_records(task) if task is not None else []
            querier = self._querier
            assistant = querier.assistant(
                strategy, learnwares=names, task=records, validation=_pairs(records), larger=larger, tokens=tokens
            )
            said = _said(job, "specialist", assistant, question, tokens)
            base = _said(job, "base", assemble(Wish(Strategy.BASE, specialists=0), querier.model), question, tokens)
            specialists = [
                {"title": one.title, "epsilon": one.epsilon, "adapter_guarantee": str(one.adapter.guarantee)}
                for one in assistant.account.specialists
            ]
            return {
                "schema": "veilmart.ui-answered/1", "question": question, "answer": said.text, "base_answer": base.text,
                "specialists": specialists, "tokens": said.tokens, "seconds": said.seconds, "finished": said.finished,
                "base_tokens": base.tokens, "base_seconds": base.seconds, "base_finished": base.finished,
                "settings": dict(assistant.settings), **provenance(said),
            }  # fmt: skip

        return self._start("answer", "a question", run)

    def compare(self, request: Request) -> Page:
        """The form of a comparison."""
        facts = {"market": self._market(), "pulled": self._pulled(), "recent": self._recent("compare")}
        return Page("veilmart.ui-compare/1", "compare.html", facts)

    def start_compare(self, form: Form) -> Job:
        """Compare strategies on the user's records."""
        from nodes.compare import compare_on, comparison_to_json
        from nodes.reuse.choice import check_here

        source, names, larger = source_of(form), self._names(form), _folder(form, "larger")
        limit, tokens = _whole(form, "limit", 24, 2, 1_000), _whole(form, "tokens", 40, 1, MOST_TOKENS)
        if "fetch" not in form.fields:
            check_here(names, self._querier.home)
            if not names:
                raise UsageError("no specialist is chosen", hint="choose one that is here, or let some be fetched for these records")

        def run(job: Job) -> Mapping[str, Any]:
            found = compare_on(self._querier, read_records(source, limit), source.name, names, larger=larger, tokens=tokens)
            return {**comparison_to_json(found), "file": source.name}

        return self._start("compare", source.name, run)

    # Owner -------------------------------------------------------------------------------------------------------------

    def ledger(self, request: Request) -> Page:
        """Charges, budget and price of the next release, what was sent, and what others asked of this node."""
        from nodes.journal import read
        from nodes.populations import folder_of
        from nodes.statement import open_ledger, price_of, statement

        asked, home = request.query_params, self._querier.home
        population, budget = asked.get("population", "default"), _number(asked.get("budget"), self._budget)
        epsilon = _number(asked.get("epsilon"), 1.0)
        there = _populations(home)
        if population not in {"default", *there}:  # it becomes the name of a folder
            raise NotFound("no such population in this home", hint="`veilmart node publish --population NAME` begins one")
        folder = folder_of(home, population)
        facts: dict[str, Any] = {
            "population": population, "populations": there, "budget": budget, "epsilon": epsilon, "statement": None, "price": None,
            "sent": [], "journal": [
                {"time": line.time, "event": line.event, "fields": dict(line.fields)}
                for line in reversed(read(folder / "journal.jsonl")[-MOST_JOURNAL:])
            ],
        }  # fmt: skip
        if population in there:
            ledger = open_ledger(folder, population, budget)
            price = price_of(ledger, epsilon)
            facts["statement"] = statement(ledger)
            facts["price"] = {"asked": price.asked, "total": price.total, "left": price.left, "affordable": price.affordable}
            facts["sent"] = _sent(ledger.entries(), home)
        return Page("veilmart.ui-ledger/1", "ledger.html", facts)

    def outlook(self, request: Request) -> Page:
        """The form of a forecast."""
        return Page("veilmart.ui-outlook/1", "outlook.html", {"recent": self._recent("outlook")})

    def start_outlook(self, form: Form) -> Job:
        """Simulate how useful a specification of the owner's records would be at each epsilon."""
        from nodes.forecast import forecast

        source, unit = source_of(form), PrivacyUnit(form.fields.get("unit", "").strip())

        def run(job: Job) -> Mapping[str, Any]:
            querier = self._querier
            owned = read_owned_records(source, SMALLEST_UNITS, unit=unit)
            model, feature_map = querier.model, querier.feature_map
            model.admit_map(feature_map)
            # Padded batches, as for a query: nothing that is made of these features is released.
            embeddings = model.embed_batched(
                owned.records, layer=feature_map.layer, kind=feature_map.embedding,
                on_progress=lambda done, of: job.progress("read your records", done, of),
            )  # fmt: skip
            units = owned.units or [str(number) for number in range(len(owned.records))]
            found = forecast(feature_map(embeddings), units, feature_map, 1e-6, on_progress=job.progress)
            return {"schema": "veilmart.forecast/1", "file": source.name, "unit": str(unit), "records": len(owned.records), **asdict(found)}

        return self._start("outlook", source.name, run)

    # Auditor -----------------------------------------------------------------------------------------------------------

    def audit(self, request: Request) -> Page:
        """The forms of an audit, and what there is to audit."""
        receipts = sorted(path.name for path in (self._querier.home / "receipts").glob("*.receipt"))
        facts = {"market": self._market(), "receipts": receipts, "most": MOST_RELEASES, "recent": self._recent("audit")}
        return Page("veilmart.ui-audit/1", "audit.html", facts)

    def start_audit(self, form: Form) -> Job:
        """Audit a file, show a report, or run the quick audits of this home."""
        match form.fields.get("what"):
            case "file":
                return self._audit_file(_path(form.fields.get("path", "")))
            case "report":
                source = source_of(form)
                return self._start("audit", source.name, lambda job: {"schema": "veilmart.ui-report/1", "report": _report_in(source)})
            case "home":
                releases = _whole(form, "releases", 500, 0, MOST_RELEASES)
                return self._start("audit", "this home", lambda job: self._audit_home(job, releases, "market" in form.fields))
        raise UsageError("audit: expected a file, a report or this home")

    def _audit_file(self, path: Path) -> Job:
        def run(job: Job) -> Mapping[str, Any]:
            from nodes.audit.results import result_of_file
            from protocol.admission import AdmissionPolicy

            policy = AdmissionPolicy()
            result = result_of_file(path, self._querier.feature_map, policy.largest_epsilon, policy.smallest_count or 1)
            return {"schema": "veilmart.ui-audited/1", "file": path.name, "audits": result.get("releases", [result])}

        return self._start("audit", path.name, run)

    def _audit_home(self, job: Job, releases: int, with_market: bool) -> Mapping[str, Any]:
        from importlib.metadata import version

        from nodes.audit.quick import quick_audits
        from nodes.audit.report import build_report, to_json

        querier = self._querier
        market = querier.market if with_market else None
        address, ca = (market.address, Path(market.ca)) if market is not None else (None, None)
        found = quick_audits(querier.home, address, ca, 1.0, releases, querier.feature_map, job.progress)
        report = build_report(found, datetime.datetime.now(datetime.UTC).date().isoformat(), version("veilmart"))
        return {"schema": "veilmart.ui-report/1", "report": json.loads(to_json(report))}

    # What there is -----------------------------------------------------------------------------------------------------

    def _market(self) -> str | None:
        market = self._querier.market
        return market.address if market is not None else None

    def _pulled(self) -> list[dict[str, str]]:
        from nodes.learnwares import local_learnwares

        return [
            {
                "id": stored.release.release_id.hex(), "title": stored.release.title, "summary": stored.release.card.summary,
                "adapter_guarantee": str(stored.release.adapter.guarantee) if stored.release.adapter else "",
            }
            for stored in local_learnwares(self._querier.home)
        ]  # fmt: skip

    def _names(self, form: Form) -> list[str]:
        """Return the learnwares that were ticked, then those that were typed."""
        ticked = [learnware["title"] for learnware in self._pulled() if f"use-{learnware['id']}" in form.fields]
        return list(dict.fromkeys([*ticked, *form.fields.get("learnwares", "").split()]))


def source_of(form: Form) -> Given | Path:
    """Return the file that came with a form, or the one that its path names; raise UsageError where there is neither."""
    if "file" in form.files:
        return Given(*form.files["file"])
    return _path(form.fields.get("path", ""))


def _has_source(form: Form) -> bool:
    return "file" in form.files or bool(form.fields.get("path", "").strip())


def _path(text: str) -> Path:
    if not text.strip():
        raise UsageError("a file is missing", hint="choose or drop one, or type its path")
    path = Path(text.strip()).expanduser()
    if not path.is_file() and not path.is_dir():  # opening anything else, such as a pipe, could wait for ever
        raise UsageError(f"{path}: no such file", hint="a path as this machine knows it, from the folder where `veilmart ui` was started")
    return path


def _folder(form: Form, name: str) -> Path | None:
    text = form.fields.get(name, "").strip()
    return Path(text).expanduser() if text else None


def _chosen(form: Form, name: str, choices: Iterable[str], otherwise: str) -> str:
    given = form.fields.get(name, otherwise)
    if given not in choices:
        raise UsageError(f"{name}: expected one of {', '.join(choices)}")
    return given


def _whole(form: Form, name: str, otherwise: int, least: int, most: int) -> int:
    text = form.fields.get(name, "").strip() or str(otherwise)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise UsageError(f"{name}: expected a whole number from {least} to {most}")
    return int(text)


def _number(text: str | None, otherwise: float) -> float:
    try:
        return float(text) if text else otherwise
    except ValueError:
        raise UsageError("expected a number", hint="such as 0.5") from None


def _pairs(records: list[Record]) -> list[Pair]:
    """Return the records where every one has a response, else none: with some alone there is nothing to calibrate on."""
    pairs = [record for record in records if isinstance(record, Pair)]
    return pairs if len(pairs) == len(records) else []


def _said(job: Job, name: str, assistant: Assistant, question: str, tokens: int) -> Any:
    """Return an answer, shown while it is decoded."""
    stream, text = assistant.stream([("user", question)], tokens), ""
    while True:
        try:
            text += next(stream)
        except StopIteration as stop:
            return stop.value
        job.tell(name, text)


def _report_in(source: Given | Path) -> dict[str, Any]:
    from nodes.audit.report import SCHEMA

    with source.open("rb") as stream:
        data = stream.read(32 << 20)
    try:
        report = json.loads(data)
    except (ValueError, RecursionError):
        raise FormatError(f"{source.name}: not JSON", hint="the report.json that `veilmart audit report` wrote") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise FormatError(f"{source.name}: expected a report of `veilmart audit report`")
    return report


def _populations(home: Path) -> list[str]:
    """Return the populations of a home that have a ledger."""
    from nodes.ledger import DEFAULT_POPULATION

    others = sorted(path.parent.name for path in (home / "node" / "populations").glob("*/ledger.db"))
    return ([DEFAULT_POPULATION] if (home / "node" / "ledger.db").is_file() else []) + others


def _sent(entries: Iterable[Entry], home: Path) -> list[dict[str, Any]]:
    """Return what each release told the world, the newest first."""
    from nodes.ledger import epsilon_of
    from protocol.release import open_envelope

    rows = []
    for entry in entries:
        if not entry.envelope:
            continue
        release = open_envelope(entry.envelope)
        receipt = home / "receipts" / f"{release.release_id.hex()}.receipt"
        kept = datetime.date.fromtimestamp(receipt.stat().st_mtime).isoformat() if receipt.is_file() else None
        rows.append({
            "title": release.title, "bytes": len(entry.envelope), "integers": release.specification.dimension + 1,
            "noisy_count": round(release.specification.count), "epsilon": release.specification.guarantee.epsilon,
            "adapter": epsilon_of(release.adapter), "adapter_bytes": release.adapter.size_bytes if release.adapter else 0,
            "summary": release.card.summary, "licence": release.card.licence, "receipt_kept": kept,
        })  # fmt: skip
    return rows[::-1]


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _told(job: Job) -> dict[str, Any]:
    error = asdict(job.error) if job.error is not None else None
    return {
        "id": job.id, "kind": job.kind, "title": job.title, "state": str(job.state), "over": job.over, "stopping": job.stopping,
        "stage": job.stage, "done": job.done, "of": job.of, "partial": dict(job.partial), "seconds": round(job.seconds, 1), "error": error,
    }  # fmt: skip
