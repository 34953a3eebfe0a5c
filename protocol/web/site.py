"""Pages of one surface: a view gives facts, a template shows them to people, and the twin `.json` gives the same facts to programs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from protocol.errors import FormatError, NotFound, QuotaExceeded, Unauthorised, UsageError, VeilmartError
from protocol.web import picture
from protocol.web.headers import SecurityHeaders

HERE = Path(__file__).parent
STATIC = HERE / "static"
STATUS: tuple[tuple[type[VeilmartError], int], ...] = (
    (NotFound, 404), (UsageError, 400), (FormatError, 400), (QuotaExceeded, 413), (Unauthorised, 403),
)  # fmt: skip
WORDS = {404: "There is no such page", 405: "This page cannot be asked that way"}

log = logging.getLogger("veilmart.web")


@dataclass(frozen=True, slots=True)
class Page:
    """What a view found.

    facts: JSON values alone; the template reads them by these names.  etag: changes whenever the facts do; "" where nothing tells.
    """

    schema: str
    template: str
    facts: Mapping[str, Any]
    etag: str = ""
    status: int = 200


View = Callable[[Request], Page | Awaitable[Page]]
"""A function runs in a thread, so it may read a database; a coroutine function runs in the event loop, and may read the request's body."""


class Site:
    """The templates of one surface, and the routes made with them.

    name: shown above every page.  templates: its folder, searched before the shared one.  menu: path and title of each entry.
    helpers: names that its templates may use.
    """

    def __init__(self, name: str, templates: Path, menu: Sequence[tuple[str, str]], helpers: Mapping[str, Any] | None = None) -> None:
        self.name, self.menu = name, tuple(menu)
        self._environment = Environment(
            loader=FileSystemLoader([templates, HERE / "templates"]), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, auto_reload=False,
        )  # fmt: skip
        self._environment.globals.update(site=self, picture=picture, **(helpers or {}))

    def render(self, template: str, here: str, twin: str = "", **facts: Any) -> str:
        """Return the HTML of a template.  here: path of the page; twin: address of its JSON, if it has one."""
        return self._environment.get_template(template).render(here=here, twin=twin, **facts)

    def page(self, path: str, view: View, *, twin: str = "", methods: Sequence[str] = ("GET",)) -> list[Route]:
        """Return the routes of a page and of its twin, by default the same path with `.json` behind it."""
        twin = twin or f"{path}.json"

        async def shown(request: Request, as_json: bool) -> Response:
            try:
                found = view(request) if inspect.iscoroutinefunction(view) else await run_in_threadpool(view, request)
                page = await found if inspect.isawaitable(found) else found
                return await run_in_threadpool(self._answer, request, page, "" if as_json else twin)
            except VeilmartError as error:
                return self.problem(request, _status(error), error)
            except HTTPException:
                raise
            except Exception as error:  # noqa: BLE001  # its text may hold anything: the log gets its type, the reader nothing
                log.error("failed error=%s", type(error).__name__)
                return self.problem(request, 500, VeilmartError("Something went wrong here"))

        # Functions of their own, since Starlette takes an object without a name for an ASGI application.
        async def for_people(request: Request) -> Response:
            return await shown(request, as_json=False)

        async def for_programs(request: Request) -> Response:
            return await shown(request, as_json=True)

        # The twin first: a path with a parameter would take its name for the parameter's value.
        return [Route(twin, for_programs, methods=list(methods)), Route(path, for_people, methods=list(methods))]

    def application(
        self, routes: Sequence[BaseRoute], *, middleware: Sequence[Middleware] = (), headers: Mapping[str, str] | None = None
    ) -> ASGIApp:
        """Return the application of these routes, with the style sheets, script and icon that all pages share.

        middleware: what looks at a request before its page does.  headers: further ones of every answer.
        """
        handlers = {HTTPException: self._http_error, VeilmartError: self._our_error}
        static = Mount("/static", StaticFiles(directory=STATIC))
        app = Starlette(routes=[*routes, static], middleware=list(middleware), exception_handlers=handlers)
        return SecurityHeaders(app, headers)  # outermost: what Starlette says where all else failed has the policy too

    def problem(self, request: Request, status: int, error: VeilmartError) -> Response:
        """Return an answer that says what went wrong: JSON for a twin, otherwise a page in this site's frame."""
        told = {"code": error.code, "message": str(error), "hint": error.hint}
        if request.url.path.endswith(".json"):
            return JSONResponse({"error": told}, status)
        return HTMLResponse(self.render("problem.html", request.url.path, error=told, status=status), status)

    def _answer(self, request: Request, page: Page, twin: str) -> Response:
        """Return the page of a view as HTML where it has a twin to link to, and as that twin where it has none."""
        tag = f'W/"{page.etag}{"" if twin else "-json"}"' if page.etag else ""
        headers = {"etag": tag} if tag else {}
        if tag and tag in request.headers.get("if-none-match", "").split(", "):
            return Response(status_code=304, headers=headers)
        if not twin:
            return JSONResponse({"schema": page.schema, **page.facts}, page.status, headers)
        link = ""
        if request.method in ("GET", "HEAD"):  # the twin of an answer to a form is asked the same way, which a link cannot
            link = twin.format(**request.path_params) + (f"?{request.url.query}" if request.url.query else "")
        return HTMLResponse(self.render(page.template, request.url.path, link, **page.facts), page.status, headers)

    def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        answer = self.problem(request, error.status_code, _Http(WORDS.get(error.status_code, error.detail)))
        answer.headers.update(error.headers or {})
        return answer

    def _our_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, VeilmartError)
        return self.problem(request, _status(error), error)


def _status(error: VeilmartError) -> int:
    return next((status for kind, status in STATUS if isinstance(error, kind)), 503)


class _Http(VeilmartError):
    code = "http"
