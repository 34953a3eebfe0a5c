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
from collections.abc import Collection
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from nodes.loopback import hosts_of, same_secret

COOKIE = "veilmart-ui"
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
    """ASGI middleware in front of the whole page; who is refused learns a status and one constant sentence.

    public: paths of style sheets, icon and script, the same for everybody.  By name, since whatever else is said about a path, such as
    that nothing is there, comes in a page that names `keys.at`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, port: int, public: Collection[str]) -> None:
        self._app, self._keys, self._hosts, self._public = app, keys, hosts_of(port), frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":  # nothing here speaks websockets
            request = Request(scope)
            for check, status, why in self.CHECKS:
                if not check(self, request):
                    await PlainTextResponse(why + "\n", status)(scope, receive, send)
                    return
            await self._app(scope, receive, send)

    def names_this_page(self, request: Request) -> bool:
        """Whether it is asked under a loopback name and the port: another site's name was made to lead here (DNS rebinding)."""
        hosts = request.headers.getlist("host")
        return len(hosts) == 1 and hosts[0].lower() in self._hosts

    def asks_as_a_browser_does(self, request: Request) -> bool:
        """Whether the method is one that pages and forms have; OPTIONS is not: nothing here is for other origins."""
        return request.method in ("GET", "HEAD", "POST")

    def comes_from_here(self, request: Request) -> bool:
        """Whether the user or a page of ours caused it.

        `/` is asked once, with the token, and may be linked from anywhere: from a terminal, or the file that `ui --open` opens.
        """
        return request.headers.get("sec-fetch-site") in OWN or request.url.path == "/"

    def is_ordered_from_here(self, request: Request) -> bool:
        """Whether what may change something comes from a form of ours: a browser names the origin of every POST."""
        own = f"http://{request.headers['host'].lower()}"
        return request.method != "POST" or request.headers.getlist("origin") == [own]

    def knows_a_secret(self, request: Request) -> bool:
        """Whether the cookie is there, or the token where it is exchanged for one; style sheets are for all."""
        path, keys = request.url.path, self._keys
        if request.method != "POST" and path in self._public:
            return True
        if path == "/":
            return request.method != "POST" and same_secret(_token_of(request), keys.token.encode())
        known = [same_secret(value, keys.cookie.encode()) for value in _cookies_of(request)]
        return path.startswith(f"{keys.at}/") and any(known)

    # In this order: nothing of an answer may depend on a secret before it is sure that no page of another site can see it.
    CHECKS = (
        (names_this_page, 421, "this page answers to its loopback address only"),
        (asks_as_a_browser_does, 405, "this page cannot be asked that way"),
        (comes_from_here, 403, "this page is not for other sites"),
        (is_ordered_from_here, 403, "this page takes orders from itself only"),
        (knows_a_secret, 403, "open the address that `veilmart ui` printed"),
    )


def _token_of(request: Request) -> str:
    given = parse_qs(request.scope.get("query_string", b"").decode("latin-1")).get("token", [])
    return given[0] if len(given) == 1 else ""


def _cookies_of(request: Request) -> list[str]:
    """Return the values of our cookie: several where a server on another port of this machine set one of its name."""
    pairs = (pair.strip().partition("=") for header in request.headers.getlist("cookie") for pair in header.split(";"))
    return [value for name, _, value in pairs if name == COOKIE]
