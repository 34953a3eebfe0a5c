"""The local page as an ASGI application and as a server: pages and orders of `views`, behind the door of `door`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from nodes.audit import report_page
from nodes.loopback import make_server
from nodes.pareto import STYLE as PARETO
from nodes.ui import pictures
from nodes.ui.door import Door, Keys
from nodes.ui.views import Views
from nodes.ui.work import Job
from protocol.errors import VeilmartError
from protocol.web.forms import Form, read_form
from protocol.web.site import STATIC, Site

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

HERE = Path(__file__).parent
MAX_FORM_BYTES = 64 << 20  # a file of records; held in memory while its work lasts
MENU = (
    ("match", "Match"), ("answer", "Answer"), ("compare", "Compare"), ("ledger", "Ledger"), ("outlook", "Outlook"), ("audit", "Audit"),
    ("work", "Work"),
)  # fmt: skip
log = logging.getLogger("veilmart.ui")

HEADERS = {"cache-control": "no-store"}  # what is private stays in no browser's cache, and a back button shows nothing after the end


def application(views: Views, keys: Keys, port: int) -> ASGIApp:
    """Return the application of one user's page; it answers to the holder of `keys` alone."""
    at = keys.at
    menu = [(f"{at}/{name}", title) for name, title in MENU]
    site = Site("veilmart on this machine", HERE / "templates", menu, {"at": at, **pictures.FOR_TEMPLATES})
    pages = {
        "match": views.match, "answer": views.answer, "compare": views.compare, "ledger": views.ledger, "outlook": views.outlook,
        "audit": views.audit, "work": views.work, "work/{id}": views.job,
    }  # fmt: skip
    orders = {
        "match": views.start_match, "answer": views.start_answer, "compare": views.start_compare, "outlook": views.start_outlook,
        "audit": views.start_audit, "stop": views.stop,
    }  # fmt: skip
    routes: list[BaseRoute] = [_entrance(site, keys), Route("/looks.css", _looks)]
    for name, view in pages.items():
        routes += site.page(f"{at}/{name}", view)
    routes += [_order(site, f"{at}/{name}", start, at) for name, start in orders.items()]
    public = ["/looks.css", *(f"/static/{file.relative_to(STATIC).as_posix()}" for file in STATIC.rglob("*") if file.is_file())]
    return site.application(routes, middleware=[Middleware(Door, keys=keys, port=port, public=public)], headers=HEADERS)


def make_page_server(views: Views, keys: Keys, port: int) -> uvicorn.Server:
    """Return the HTTP server of the page; it runs on a socket of `nodes.loopback.bind`."""
    return make_server(application(views, keys, port))


def _entrance(site: Site, keys: Keys) -> Route:
    async def enter(request: Request) -> Response:
        # A page that goes on by itself, and no redirect: where the address was opened from another program or a file, the browser takes
        # what a redirect leads to for that one's request, and does not send the new SameSite=Strict cookie with it.
        return HTMLResponse(site.render("entrance.html", "/", first=f"{keys.at}/match"), headers={"set-cookie": keys.set_cookie})

    return Route("/", enter, methods=["GET"])


def _order(site: Site, path: str, start: Callable[[Form], Job], at: str) -> Route:
    async def take(request: Request) -> Response:
        try:
            form = await read_form(request, MAX_FORM_BYTES)
            job = await run_in_threadpool(start, form)
        except VeilmartError:
            raise  # shown by the site, as every other
        except Exception as error:  # noqa: BLE001  # its text may hold anything: the log gets its type, the reader nothing
            log.error("failed error=%s", type(error).__name__)
            return site.problem(request, 500, VeilmartError("Something went wrong here"))
        return RedirectResponse(f"{at}/work/{job.id}", 303)  # asked for anew, a result starts no work

    return Route(path, take, methods=["POST"])


async def _looks(request: Request) -> Response:
    """Return the styles of this page's own pictures; those of one-file reports hold inside an element of their class."""
    own = (HERE / "looks.css").read_text()
    return Response(f"{own}\n.report {{{report_page.STYLE}}}\n.strategies {{{PARETO}}}\n", media_type="text/css")
