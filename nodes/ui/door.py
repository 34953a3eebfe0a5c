"""Who may enter the local page: the browser that was shown the printed address, and nobody else on this machine or beyond.

The page shows matches, ledgers and answers, so what could reach it has to be kept out (each has its test in tests/nodes/test_ui.py):

* **Programs of other users here** can connect to the port.  They do not know the token, which is printed once, and not the cookie that
  a browser is given for it.
* **A site whose name is made to resolve to 127.0.0.1** (DNS rebinding) is told by its Host header, before anything else is looked at.
* **A page of another site, or of another port of this machine**, can make the browser send requests.  SameSite=Strict keeps the cookie
  from other sites; other ports count as the same site, so Sec-Fetch-Site has to say "same-origin" (or "none": the user's own doing),
  and Origin has to be this page's own for whatever changes something.
* **A server on another port of this machine** is sent this machine's cookies, since cookies know no ports.  Ours is for one path that
  begins with random characters, which no other server is asked for.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from nodes.loopback import hosts_of, same_secret

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send

COOKIE = "veilmart-ui"
PUBLIC = ("/static/", "/looks.css")  # style sheets, icon and script: the same for everybody
OWN = (None, "same-origin", "none")  # a browser that is too old to say is held by Host, cookie and Origin


class Keys:
    """The secrets of one run of the page; nothing of them is kept or logged."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)  # in the printed address
        self.cookie = secrets.token_urlsafe(32)  # what a browser gets for it
        self.at = f"/{secrets.token_urlsafe(12)}"  # where all pages lie, and the only path that the cookie is sent to

    @property
    def set_cookie(self) -> str:
        """The header that gives a browser its cookie; it is forgotten when the browser is closed."""
        return f"{COOKIE}={self.cookie}; Path={self.at}; HttpOnly; SameSite=Strict"


class Door:
    """ASGI middleware in front of the whole page; what it refuses learns nothing but a status and one constant sentence."""

    def __init__(self, app: ASGIApp, keys: Keys, port: int) -> None:
        self._app, self._keys, self._hosts = app, keys, hosts_of(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":  # nothing here speaks websockets
            return
        refused = self._refusal(Request(scope))
        if refused is None:
            await self._app(scope, receive, send)
            return
        status, why = refused
        await PlainTextResponse(why + "\n", status)(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Return status and reason, or None for a request that may enter."""
        headers, path = request.headers, request.url.path
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return 421, "this page answers to its loopback address only"
        if request.method not in ("GET", "HEAD", "POST"):
            return 405, "this page cannot be asked that way"
        # `/` is asked once, with the token, and may be linked from anywhere: from a terminal, or the file that --open opens.
        if path != "/" and headers.get("sec-fetch-site") not in OWN:
            return 403, "this page is not for other sites"
        # A browser names the origin of every POST; a request without one does not come from a form of ours.
        if request.method == "POST" and headers.getlist("origin") != [f"http://{hosts[0].lower()}"]:
            return 403, "this page takes orders from itself only"
        if path.startswith(PUBLIC):
            return None
        if path == "/":
            may_enter = request.method != "POST" and same_secret(_token_of(request), self._keys.token.encode())
        else:
            known = [same_secret(value, self._keys.cookie.encode()) for value in _cookies_of(request)]
            may_enter = path.startswith(f"{self._keys.at}/") and any(known)
        return None if may_enter else (403, "open the address that `veilmart ui` printed")


def _token_of(request: Request) -> str:
    given = parse_qs(request.scope.get("query_string", b"").decode("latin-1")).get("token", [])
    return given[0] if len(given) == 1 else ""


def _cookies_of(request: Request) -> list[str]:
    """Return the values of our cookie: several where a server on another port of this machine set one of its name."""
    pairs = (pair.strip().partition("=") for header in request.headers.getlist("cookie") for pair in header.split(";"))
    return [value for name, _, value in pairs if name == COOKIE]
