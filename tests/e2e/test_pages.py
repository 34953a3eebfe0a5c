"""The market's page in a real browser: `veilmart market web` over a folder with 60 releases."""

import json
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from protocol.features import default_map
from tests.e2e.browser import Watched, open_browser, serious_findings
from tests.e2e.processes import environment
from tests.market_node.pages import fill, synthetic

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MAP = default_map()
PATIENCE_MS = 60_000  # of a machine that is busy with other tests
PATHS = ("", "map", "aggregates", "log", "log/check", "health", "releases/{}")


@pytest.fixture(scope="module")
def made():
    return synthetic(MAP, 60, owners=20)


@pytest.fixture(scope="module")
def base(made, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    fill(home / "market", made, MAP, Ed25519PrivateKey.generate())
    command = [sys.executable, "-m", "nodes.command", "market", "web", "--page", "0", "--json"]
    with (home / "page.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment(home))
    try:
        yield json.loads(process.stdout.readline())["page"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as found:
        yield found


def expect(found):
    """Return playwright's assertions on a part of a page; that library is loaded where a browser is."""
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE_MS)
    return expect(found)


@contextmanager
def looking(browser, base, *, width=1200, theme="light", script=True):
    """Yield a page in a context of its own, watched."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=script, base_url=base, accept_downloads=True
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    yield Watched(page)
    context.close()


@contextmanager
def clean(browser, base, **how):
    """Yield a page on which nothing goes wrong: the policy stops nothing, no other host is asked, no script fails."""
    with looking(browser, base, **how) as watched:
        yield watched.page
    assert (watched.violations, watched.errors, watched.hosts) == ([], [], {urlsplit(base).netloc})


def too_wide(page) -> int:
    """Return by how many pixels a page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def first_names(page) -> list[str]:
    return [text.partition("@")[0] for text in page.locator("tbody th").all_inner_texts()]


def test_the_catalogue_narrows_while_one_types_and_sorts_by_a_click(browser, base):
    with clean(browser, base) as page:
        page.goto("/")
        expect(page.locator("tbody tr")).to_have_count(50)
        page.get_by_label("Name or summary").press_sequentially("health")
        expect(page.locator("tbody tr")).to_have_count(10)
        expect(page.get_by_role("status")).to_have_text("10 of 60 releases")
        assert re.search(r"[?&]q=health", page.url), "what is shown can be sent to somebody"
        page.get_by_label("Epsilon at most").fill("0.7")
        expect(page.locator("tbody tr")).to_have_count(10)  # every sixth name is health, every third epsilon 0.5
        page.get_by_role("link", name="Records").click()
        expect(page.locator("th[aria-sort=descending]")).to_contain_text("Records")
        records = [int(text) for text in page.locator("tbody td:nth-child(3)").all_inner_texts()]
        assert records == sorted(records, reverse=True)
        assert len(records) == 10


def test_the_same_form_works_without_script(browser, base):
    with clean(browser, base, script=False) as page:
        page.goto("/")
        page.get_by_label("Domain").select_option("legal")
        page.get_by_role("button", name="Filter").click()
        expect(page.locator("tbody tr")).to_have_count(10)
        page.get_by_role("link", name="Name", exact=True).click()
        assert first_names(page) == sorted(first_names(page))
        page.locator("tbody a").first.click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("legal-")
        expect(page.get_by_role("heading", name="Privacy guarantees")).to_be_visible()


def test_the_map_is_reached_by_mouse_and_by_keyboard(browser, base):
    with clean(browser, base) as page:
        page.goto("/map")
        points = page.locator("svg.map a")
        expect(points).to_have_count(50)
        page.get_by_label("Domain").select_option("code")
        expect(points).to_have_count(10)
        one = points.first
        told = one.get_attribute("aria-label")
        assert re.fullmatch(r"code-\d+@[0-9a-f]{8}: code, epsilon [\d.]+, about \d+ records", told)
        one.hover(force=True)
        expect(one.locator("text")).to_be_visible()
        page.get_by_role("button", name="Filter").focus()
        page.keyboard.press("Tab")  # Reset
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == told
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text(told.partition(":")[0])
        page.go_back()
        points.nth(3).locator("circle, rect, polygon").click()
        expect(page.get_by_role("heading", level=1)).to_contain_text("code-")


def test_a_receipt_is_downloaded_and_checked(browser, base, made, tmp_path):
    with clean(browser, base) as page:
        page.goto(f"/releases/{made[5][0].release_id.hex()}")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download the receipt").click()
        file = tmp_path / download.value.suggested_filename
        download.value.save_as(file)
        assert file.name == f"{made[5][0].title.replace('@', '-')}.receipt"
        page.goto("/log")
        page.get_by_label("or choose its file").set_input_files(file)
        page.get_by_role("button", name="Check it").click()
        expect(page.locator("#found")).to_contain_text("✓ Verified")
        expect(page.locator("#found")).to_contain_text("the same root")
        page.get_by_label("Paste a receipt").fill(file.read_bytes().hex())
        page.get_by_role("button", name="Check it").click()
        expect(page.locator("#found")).to_contain_text("✓ Verified")
    with looking(browser, base) as watched:
        page = watched.page
        page.goto("/log/check")
        page.get_by_label("Paste a receipt").fill(file.read_bytes()[:-1].hex() + "00")
        page.get_by_role("button", name="Check it").click()
        expect(page.locator("#found")).to_contain_text("✗ Not verified")
        assert all("422" in text for text in watched.errors), "a browser tells the status of what was refused"
        assert watched.violations == []


@pytest.mark.parametrize(("theme", "width"), [("light", 1200), ("dark", 390)])
def test_every_page_fits_and_can_be_read_by_everybody(browser, base, made, theme, width):
    with clean(browser, base, width=width, theme=theme) as page:
        for path in PATHS:
            page.goto("/" + path.format(made[9][0].release_id.hex()))
            assert too_wide(page) <= 0, path
            assert serious_findings(page) == [], path


@pytest.mark.parametrize(("theme", "width"), [("dark", 1200), ("light", 390)])
def test_the_other_theme_of_each_width_fits_as_well(browser, base, theme, width):
    with clean(browser, base, width=width, theme=theme) as page:
        for path in ("", "map"):
            page.goto(f"/{path}")
            assert too_wide(page) <= 0, path
            assert serious_findings(page) == [], path


def test_control_what_the_policy_forbids_and_who_cannot_read_would_be_seen(browser, base):
    with looking(browser, base) as watched:
        page = watched.page
        page.goto("/health")
        page.evaluate('document.body.innerHTML += \'<p style="color:red" onclick="x()">a</p><img src="http://192.0.2.1/x.png">\'')
        page.evaluate("document.querySelector('main').innerHTML += '<input><p class=\"soft\" id=\"w\">' + 'w'.repeat(900) + '</p>'")
        expect(page.locator("#w")).to_be_attached()
        page.evaluate("new Promise(done => setTimeout(done, 500))")
        told = " ".join(watched.violations)
        assert all(directive in told for directive in ("style-src", "script-src", "img-src"))
        assert too_wide(page) > 0
        assert any("label" in found for found in serious_findings(page))
