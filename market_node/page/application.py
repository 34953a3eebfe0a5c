"""The pages of a market, each with its twin in JSON."""

from __future__ import annotations

import datetime
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from market_node.aggregates import Running
from market_node.metrics import SECONDS
from market_node.page import choosing, projection, proofs
from market_node.page.condition import Condition, address_of, counts_text
from market_node.page.reading import Entry, Reading, State, plain
from protocol.aggregation import State as LogState
from protocol.catalogue import name_of_map
from protocol.codec import format_decimal
from protocol.enrolment import words_of
from protocol.errors import NotFound
from protocol.overview import described, tree_lines
from protocol.privacy import PrivateTraining, noise_variance, specification_event, total_epsilon
from protocol.specification import NORM_SQUARED
from protocol.transparency import leaf_hash, root_of_all
from protocol.web.forms import read_form
from protocol.web.site import Page, Site

MENU = (("/", "Catalogue"), ("/map", "Map"), ("/aggregates", "Domains"), ("/log", "Log"), ("/health", "Health"))
TEMPLATES = Path(__file__).parent / "templates"
ID = re.compile(r"[0-9a-f]{8,64}")
ENTRIES_ON_A_PAGE = 50  # of the log
FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


def application(reading: Reading, condition: Condition, *, show_counts: bool = True) -> ASGIApp:
    """Return the market's page.  show_counts: serve /metrics, which is for this machine alone."""
    views = Views(reading, condition)
    helpers = {
        "drawn": projection.drawn,
        "sign": projection.sign,
        "short": _short,
        "size_of": _size,
        "day": _day,
    }
    site = Site("veilmart market", TEMPLATES, MENU, helpers)
    counts = Counts()
    routes = [
        *site.page("/", views.catalogue, twin="/catalogue.json"),
        *site.page("/map", views.map),
        Route("/releases/{digits}.receipt", views.receipt),
        *site.page("/releases/{digits}", views.release),
        *site.page("/aggregates", views.aggregates),
        *site.page("/log", views.log),
        *site.page("/log/check", views.check, methods=("GET", "POST")),
        *site.page("/health", views.health),
        Route("/healthz", views.healthz),
        Route("/robots.txt", lambda request: PlainTextResponse("User-agent: *\nDisallow: /log/check\n")),
    ]
    if show_counts:
        routes.append(Route("/metrics", lambda request: _counts(request, reading, counts)))
    return counts.counting(site.application(routes, headers={"cache-control": "no-cache"}))


class Views:
    """What the pages show, as JSON values."""

    def __init__(self, reading: Reading, condition: Condition) -> None:
        self._reading, self._condition = reading, condition
        self._lock = threading.Lock()
        self._projection: tuple[str, projection.Projection] | None = None
        self._running: Running | None = None
        self._aggregated: tuple[str, dict[str, Any]] | None = None
        self._tag = f"{version('veilmart')}-{reading.map.map_id.hex()[:8]}"

    def _page(self, schema: str, template: str, state: State, facts: Mapping[str, Any], more: str = "") -> Page:
        # What is shown follows from the state and the address alone, so that a browser that has it need not be sent it again.
        return Page(f"veilmart.page-{schema}/1", template, {**facts, "size": state.size}, f"{self._tag}-{state.version}{more}")

    # Catalogue and map ----------------------------------------------------------------------------------------------------

    def catalogue(self, request: Request) -> Page:
        """Show the releases that the address asks for."""
        state = self._reading.state()
        wish = choosing.Wish.of(request.query_params)
        return self._page("catalogue", "catalogue.html", state, self._chosen(state, wish, "/")[1])

    def map(self, request: Request) -> Page:
        """Show the same releases by what their data are like."""
        state = self._reading.state()
        wish = choosing.Wish.of(request.query_params)
        chosen, facts = self._chosen(state, wish, "/map")
        drawing = projection.facts(self._projected(state), projection.kinds_of(state), chosen.matched, chosen.shown)
        return self._page("map", "map.html", state, {**facts, "map": drawing, "map_name": name_of_map(self._reading.map.map_id)})

    def _chosen(self, state: State, wish: choosing.Wish, path: str) -> tuple[choosing.Chosen, dict[str, Any]]:
        chosen = choosing.choose(state, wish)
        columns = ("name", "domain", "records", "epsilon", "adapter", "unit", "base", "licence", "owner", "logged")
        links = {column: f"{path}?{wish.by(column)}" for column in columns}
        turned = {name: f"{path}?{wish.address(page=number)}" for name, number in (("before", chosen.page - 1), ("after", chosen.page + 1))}
        return chosen, {
            "total": len(state.standing), "matched": len(chosen.matched), "page": chosen.page, "pages": chosen.pages,
            "wish": asdict(wish), "values": state.values, "sorts": links, "turned": turned,
            "releases": [plain(entry, state) for entry in chosen.shown],
        }  # fmt: skip

    def _projected(self, state: State) -> projection.Projection:
        with self._lock:
            if self._projection is None or self._projection[0] != state.version:
                self._projection = state.version, projection.project(state, self._reading.map)
            return self._projection[1]

    # A release ------------------------------------------------------------------------------------------------------------

    def _entry(self, request: Request) -> tuple[State, Entry]:
        digits = request.path_params["digits"].rpartition("@")[2]
        if not ID.fullmatch(digits):
            raise NotFound("There is no such release here", hint="the catalogue lists all releases; an id has 64 hexadecimal digits")
        state = self._reading.state()
        return state, state.find(digits)

    def release(self, request: Request) -> Page:
        """Show all that one release says."""
        state, entry = self._entry(request)
        release = self._reading.release(entry)
        specification, adapter = release.specification, release.adapter
        guarantee = specification.guarantee
        trained = adapter.guarantee if adapter is not None and isinstance(adapter.guarantee, PrivateTraining) else None
        event = specification_event(specification.noise_variance, NORM_SQUARED)
        total = None if adapter is not None and trained is None else total_epsilon(event, trained, guarantee.delta)
        address = address_of(self._reading.home) or "HOST:PORT"
        checkpoint, key = self._reading.checkpoint(), self._reading.market_key
        (envelope,) = self._reading.store.envelopes(entry.position, entry.position + 1)
        stored = adapter is not None and self._reading.store.has_adapter(adapter.digest)
        facts = {
            "release": plain(entry, state),
            "specification": {
                "epsilon": format_decimal(guarantee.epsilon), "delta": format_decimal(guarantee.delta), "unit": str(guarantee.unit),
                "relation": str(guarantee.relation), "noise_variance": specification.noise_variance,
                "least_noise_variance": noise_variance(guarantee, NORM_SQUARED), "dimension": specification.dimension,
                "map": name_of_map(specification.map_id), "map_id": specification.map_id.hex(),
                "noisy_sums": specification.noisy_sums.tolist(),
            },
            "adapter": None if adapter is None else {
                "digest": adapter.digest.hex(), "bytes": adapter.size_bytes, "stored": stored,
                "guarantee": None if trained is None else {
                    "epsilon": format_decimal(trained.guarantee.epsilon), "delta": format_decimal(trained.guarantee.delta),
                    "unit": str(trained.guarantee.unit), "relation": str(trained.guarantee.relation),
                },
            },
            "together": None if total is None else round(total, 4),
            "previous": release.previous.hex(),
            "words": words_of(release.owner),
            "history": [plain(other, state) for other in state.history(entry)],
            "leaf": leaf_hash(envelope).hex(),
            "envelope_bytes": len(envelope),
            "receipt": checkpoint is not None and checkpoint[1].size > entry.position,
            "market_key": "" if key is None else key.hex(),
            "commands": _commands(entry, address, "" if key is None else key.hex()[:16]),
        }  # fmt: skip
        signed = "" if checkpoint is None else f"-{checkpoint[1].size}"
        return self._page("release", "release.html", state, facts, f"{signed}-{address}-{stored}")

    def receipt(self, request: Request) -> Response:
        """Hand out the market's receipt of a release, which anybody verifies offline."""
        _, entry = self._entry(request)
        name = f"{entry.title.replace('@', '-')}.receipt"  # a name of a release is letters, digits, '.', '_', '-'
        headers = {"content-disposition": f'attachment; filename="{name}"'}
        return Response(self._reading.receipt(entry).to_bytes(), media_type="application/octet-stream", headers=headers)

    # Aggregates -----------------------------------------------------------------------------------------------------------

    def aggregates(self, request: Request) -> Page:
        """Show what all standing releases say together, recomputed here from the log."""
        del request
        state, key = self._reading.state(), self._reading.market_key
        if key is None or not state.size:
            raise NotFound("There is nothing to aggregate yet", hint="this market has no release")
        with self._lock:
            if self._aggregated is None or self._aggregated[0] != state.version:
                self._aggregated = state.version, self._aggregate(state, key)
            return self._page("aggregates", "aggregates.html", state, self._aggregated[1])

    def _aggregate(self, state: State, key: bytes) -> dict[str, Any]:
        store, feature_map = self._reading.store, self._reading.map
        if self._running is None:
            self._running = Running(store, feature_map, key)
        notices = store.notices()[: len(state.notices)]
        self._running.follow(state.size, notices)
        found = self._running.made(LogState(feature_map.map_id, state.size, store.root(state.size), len(notices), root_of_all(notices)))
        return {
            "notices": len(notices), "root": found.state.root.hex(), **described(found, feature_map),
            "lines": tree_lines(found, feature_map),
        }  # fmt: skip

    # The log --------------------------------------------------------------------------------------------------------------

    def log(self, request: Request) -> Page:
        """Show the log's newest entries, its checkpoint, and where to check a proof."""
        state = self._reading.state()
        pages = max(1, -(-state.size // ENTRIES_ON_A_PAGE))
        page = min(choosing.Wish.of({"page": request.query_params.get("page", "")}).page, pages)
        stop = max(0, state.size - (page - 1) * ENTRIES_ON_A_PAGE)
        start = max(0, stop - ENTRIES_ON_A_PAGE)
        leaves = [leaf_hash(envelope).hex() for envelope in self._reading.store.envelopes(start, stop)]
        listed = [
            {"index": entry.position, "leaf": leaf, "id": entry.release_id, "title": entry.title, "owner": entry.owner}
            for entry, leaf in zip(state.entries[start:stop], leaves, strict=True)
        ]
        newest, key, cosigned = self._reading.checkpoint(), self._reading.market_key, self._reading.store.cosigned()
        facts = {
            "root": self._reading.store.root(state.size).hex(), "market_key": "" if key is None else key.hex(),
            "market_words": "" if key is None else words_of(key),
            "checkpoint": None if newest is None else {
                "note": newest[0].decode("utf-8", "replace"), "size": newest[1].size, "root": newest[1].root.hex(),
            },
            "cosigned": [note.decode("utf-8", "replace") for note in cosigned],
            "entries": listed[::-1], "page": page, "pages": pages,
            "notices": [{"kind": kind, "owner": owner, "releases": count} for kind, owner, count in reversed(state.notices)],
        }  # fmt: skip
        return Page("veilmart.page-log/1", "log.html", {**facts, "size": state.size})

    async def check(self, request: Request) -> Page:
        """Check a receipt, a conflict or evidence; nothing of it is kept."""
        if request.method != "POST":
            return Page("veilmart.page-check/1", "check.html", {"found": None})
        form = await read_form(request, proofs.MAX_BYTES + 4096)
        _, data = form.files.get("file", ("", b""))
        data = data or proofs.bytes_of(form.fields.get("proof", ""))
        found = await run_in_threadpool(proofs.checked, data, self._reading)
        return Page("veilmart.page-check/1", "check.html", {"found": found}, status=200 if found["verified"] else 422)

    # Health ---------------------------------------------------------------------------------------------------------------

    def health(self, request: Request) -> Page:
        """Show whether the market serves, and how it fares."""
        del request
        state, told = self._reading.state(), self._condition.now()
        facts = {
            **told, "version": version("veilmart"), "size": state.size, "notices": len(state.notices),
            "standing": len(state.standing), "owners": len({entry.owner for entry in state.standing}),
            "members": len(state.members) - state.removed, "map": name_of_map(self._reading.map.map_id),
        }  # fmt: skip
        return Page("veilmart.page-health/1", "health.html", facts)

    def healthz(self, request: Request) -> Response:
        """Answer 200 while the market serves, for whoever watches machines."""
        del request
        serving = self._condition.now()["serving"]
        return PlainTextResponse("serving\n" if serving else "not serving\n", 200 if serving else 503)


def _commands(entry: Entry, address: str, market_key: str) -> list[dict[str, str]]:
    """Return what somebody types who wants this release."""
    at = f"--market {address} --ca ca.crt"
    found = [{"why": "fetch it, checked", "command": f"veilmart pull {entry.title} {at}"}] if entry.adapter_bytes else []
    if entry.adapter_bytes:
        found.append({"why": "ask it, on your machine", "command": f'veilmart ask -m {entry.title} "your question"'})
    found.append({"why": "ask whether it suits your task", "command": f"veilmart find task.jsonl {at}"})
    file = f"{entry.title.replace('@', '-')}.receipt"
    found.append({"why": "verify the receipt, offline", "command": f"veilmart verify release {file} --market-key {market_key or 'HEX'}"})
    return found


# Counts -------------------------------------------------------------------------------------------------------------------


class Counts:
    """What the page's own process counts: answers by page and status, and how long they took; no address, no query."""

    PAGES = ("/", "/map", "/releases", "/aggregates", "/log", "/health", "/static", "other")

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(namespace="veilmart_page", registry=self.registry)
        self._answers = Counter("veilmart_page_answers", "Answers of the page.", ("page", "status"), registry=self.registry)
        self._seconds = Histogram("veilmart_page_seconds", "How long they took.", ("page",), registry=self.registry, buckets=SECONDS)

    def counting(self, app: ASGIApp) -> ASGIApp:
        """Return the application with its answers counted."""

        async def counted(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            first = "/" + scope["path"].removesuffix(".json").removeprefix("/catalogue").lstrip("/").partition("/")[0]
            page, status = first if first in self.PAGES else "other", 500

            async def noting(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            with self._seconds.labels(page).time():
                try:
                    await app(scope, receive, noting)
                finally:
                    self._answers.labels(page, str(status)).inc()

        return counted


def _counts(request: Request, reading: Reading, counts: Counts) -> Response:
    # A proxy on this machine reaches this port as well, and would hand them to everybody.
    if any(name in request.headers for name in FORWARDED):
        return PlainTextResponse("for this machine alone\n", 403)
    text = counts_text(reading.home) + generate_latest(counts.registry).decode()
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


# Words --------------------------------------------------------------------------------------------------------------------


def _short(digits: str, count: int = 12) -> str:
    return digits[:count]


def _size(count: int) -> str:
    """Return a number of bytes as people read it."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} B"


def _day(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M} UTC"
