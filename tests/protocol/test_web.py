"""What both web surfaces share: headers, pages with twins, forms, pictures, and the script that was taken from elsewhere."""

import asyncio
import hashlib
import itertools
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from protocol.errors import FormatError, NotFound, QuotaExceeded
from protocol.web import picture
from protocol.web.forms import MAX_PARTS, parse_form, read_form
from protocol.web.headers import POLICY
from protocol.web.site import STATIC, Page, Site

HOSTILE = '"><script>alert(1)</script><b onmouseover=alert(2) style=color:red>{{ 7*7 }}'


class Tags(HTMLParser):
    """All elements of a page with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def site(tmp_path) -> Site:
    (tmp_path / "thing.html").write_text(
        '{% extends "layout.html" %}{% block title %}{{ name }}{% endblock %}{% block main %}<p id="it">{{ name }}</p>{% endblock %}'
    )
    (tmp_path / "broken.html").write_text("{{ nobody_gave_this }}")
    return Site("A market", tmp_path, [("/", "Things")])


@pytest.fixture
def client(site) -> TestClient:
    def thing(request: Request) -> Page:
        if request.path_params["name"] == "none":
            raise NotFound("thing: not here", hint="ask for another")
        return Page("veilmart.thing/1", "thing.html", {"name": request.path_params["name"]}, etag="7")

    async def fails(request: Request) -> Page:
        raise ValueError("a private text")

    routes = [
        *site.page("/things/{name}", thing),
        *site.page("/broken", lambda request: Page("x/1", "broken.html", {})),
        *site.page("/fails", fails),
        Route("/own", lambda request: PlainTextResponse("", headers={"cache-control": "no-store"})),
    ]
    return TestClient(site.application(routes, headers={"cache-control": "no-cache"}))


# The script that is not ours ----------------------------------------------------------------------------------------------


def test_what_was_vendored_is_what_was_taken():
    vendored = STATIC / "vendor"
    sums = dict(reversed(line.split("  ")) for line in (vendored / "SHA256SUMS").read_text().splitlines())
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in vendored.iterdir() if path.name != "SHA256SUMS"}
    assert files == sums
    assert sums["htmx-4.0.1.min.js"] == "a0abb04f2f45a1f89d1d4844023245537e5e6014c87b144553e0607b4cc32130"


# Headers and pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/things/a", "/things/a.json", "/things/none", "/nothing", "/fails", "/static/style.css", "/static/../x"])
def test_every_answer_carries_the_policy(client, path):
    headers = client.get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert "unsafe" not in POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-cache"


def test_an_answer_with_a_header_of_its_own_keeps_it(client):
    assert client.get("/own").headers["cache-control"] == "no-store"


def test_a_page_and_its_twin_show_the_same_facts(client):
    page, twin = client.get("/things/a?x=1&y=2"), client.get("/things/a.json")
    assert '<p id="it">a</p>' in page.text
    assert 'href="/things/a.json?x=1&amp;y=2"' in page.text
    assert twin.json() == {"schema": "veilmart.thing/1", "name": "a"}


def test_text_of_strangers_is_text(client):
    page = client.get("/things/" + HOSTILE.replace("/", "%2F").replace("%2F", ""))
    tags = Tags(page.text).found
    assert page.status_code == 200
    assert "49" not in page.text
    assert [attributes for tag, attributes in tags if tag == "script"] == [{"src": "/static/vendor/htmx-4.0.1.min.js", "defer": None}]
    assert not [attributes for _, attributes in tags if any(name == "style" or name.startswith("on") for name in attributes)]


def test_a_known_answer_is_not_sent_again(client):
    first = client.get("/things/a")
    again = client.get("/things/a", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/things/a.json", headers={"if-none-match": first.headers["etag"]}).status_code == 200, "the twin is another text"


def test_what_goes_wrong_is_told_in_the_frame_and_in_json(client):
    page, twin = client.get("/things/none"), client.get("/things/none.json")
    assert (page.status_code, twin.status_code) == (404, 404)
    assert "ask for another" in page.text
    assert twin.json() == {"error": {"code": "not-found", "message": "thing: not here", "hint": "ask for another"}}
    assert client.get("/nothing").status_code == 404
    refused = client.post("/things/a")
    assert (refused.status_code, set(refused.headers["allow"].split(", "))) == (405, {"GET", "HEAD"})


def test_an_unexpected_error_tells_nothing_of_its_text(client, caplog):
    for path in ("/fails", "/fails.json"):
        answer = client.get(path)
        assert answer.status_code == 500
        assert "private" not in answer.text + caplog.text
    assert "ValueError" in caplog.text
    assert client.get("/broken").status_code == 500, "a name that nobody gave is an error, not an empty place"


def test_no_template_needs_what_the_policy_forbids():
    for path in [*STATIC.parent.glob("templates/*.html"), *STATIC.rglob("*.svg")]:
        assert not re.search(r"\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|<style", path.read_text()), path.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text()), path.name
    for path in STATIC.glob("*.css"):
        assert "url(" not in path.read_text()
        assert "@import" not in path.read_text()


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_read_in_both_themes():
    """WCAG 2.2: 4.5:1 for text."""
    light, dark = (STATIC / "palette.css").read_text().split("@media")
    for theme in (light, dark):
        colours = dict(re.findall(r"(--[\w]+): (#\w+)", theme))
        for ground in ("--paper", "--raised"):
            for name in ("--ink", "--soft", "--good", "--bad", "--c1", "--c2", "--c3", "--c4", "--c5"):
                low, high = sorted((luminance(colours[name]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)


# Forms --------------------------------------------------------------------------------------------------------------------


def sent(**how) -> httpx.Request:
    request = httpx.Request("POST", "http://x/", **how)
    request.read()
    return request


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=60))
def test_a_form_arrives_as_it_was_sent(content, text):
    """The files of a browser come with every byte that they have, line ends and boundaries' beginnings too."""
    whole = sent(data={"a": text}, files={"f": ("n.bin", content)})
    form = parse_form(whole.headers["content-type"], whole.content)
    assert form.fields == {"a": text}
    assert form.files == ({"f": ("n.bin", content)} if content else {})
    plain = sent(data={"a": text})
    assert parse_form(plain.headers["content-type"], plain.content).fields == {"a": text}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("", b"a=1"),
        ("text/plain", b"a=1"),
        ("application/x-www-form-urlencoded", b"a=%ff"),
        ("application/x-www-form-urlencoded", b"&".join([b"a=1"] * (MAX_PARTS + 1))),
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n1'),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data\r\n\r\n1\r\n--x--"),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="a"\r\n\r\n\xff\r\n--x--'),
        ("multipart/form-data; boundary=x", b"\r\n--x\r\n\r\n" * 100_000),
        ("multipart/form-data; boundary=" + 71 * "x", b""),
    ],
)
def test_what_is_no_form_is_refused(kind, body):
    with pytest.raises(FormatError, match="form: expected"):
        parse_form(kind, body)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_body_breaks_the_parser(body):
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        for whole in (body, b"--x\r\n" + body + b"\r\n--x--"):
            try:
                parse_form(kind, whole)
            except FormatError:
                continue


def test_a_body_is_not_read_beyond_its_limit():
    read = []

    async def receive():
        read.append(1)
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    with pytest.raises(QuotaExceeded, match="at most 2500 bytes"):
        asyncio.run(read_form(Request({"type": "http", "headers": []}, receive), 2500))
    assert len(read) == 3


# Pictures -----------------------------------------------------------------------------------------------------------------


def drawn(markup: str) -> ElementTree.Element:
    root = ElementTree.fromstring(markup)
    assert not [one.attrib for one in root.iter() if "style" in one.attrib]
    return root


def test_bars_stand_for_their_values_with_their_errors():
    rows = [picture.Bar("one", 2.0, 0.5, "2 ± 0.5"), picture.Bar("two", -1.0), picture.Bar(HOSTILE, 4.0, words=HOSTILE)]
    root = drawn(picture.bars(rows, HOSTILE))
    one, two, three = ((float(bar.get("x")), float(bar.get("width"))) for bar in root.iter("rect"))
    assert one[1] / three[1] == pytest.approx(0.5, abs=0.01)
    assert two[0] + two[1] == pytest.approx(one[0], abs=0.1), "both begin at zero"
    assert len([path for path in root.iter("path") if path.get("class") == "error"]) == 1
    assert not list(root.iter("script"))
    assert not list(drawn(picture.bars([], "none")).iter("rect"))


def test_lines_go_up_where_values_do():
    series = [picture.Line("a", [(0, 1), (1, 2), (2, 4)]), picture.Line("b", [(0, 4), (2, 1)], "c2")]
    root = drawn(picture.lines(series, "t", "x", "y"))
    up, down = ([tuple(map(float, place.split(","))) for place in line.get("points").split()] for line in root.iter("polyline"))
    assert [y for _, y in up] == sorted((y for _, y in up), reverse=True)
    assert [y for _, y in down] == sorted(y for _, y in down)
    assert picture.lines([], "t", "x", "y") == ""
    drawn(picture.lines([picture.Line("one place", [(3.0, 3.0)])], "t", "x", "y"))


def test_every_kind_has_a_shape_of_its_own():
    shapes = [re.sub(r'class="\w+"', "", picture.mark(kind, 10, 10)) for kind in picture.SHAPES]
    assert len(set(shapes)) == len(picture.SHAPES)
    for shape in shapes:
        drawn(shape)


@settings(deadline=None)
@given(st.lists(st.floats(0, 400), max_size=12))
def test_labels_keep_their_distance_and_their_order(places):
    found = picture.spread(places, 17, 24, 394)
    order = sorted(range(len(places)), key=lambda at: places[at])
    assert all(found[b] - found[a] >= 17 - 1e-9 for a, b in itertools.pairwise(order))
