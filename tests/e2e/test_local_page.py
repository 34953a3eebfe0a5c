"""The local page in a real browser, over a real market: a match by file, an answer, the ledger; both themes, telephone and desk."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nodes.demo_texts import generate
from nodes.finetune import Recipe
from nodes.guard import Policy
from nodes.ledger import Budget
from nodes.market import Market
from nodes.owner import Owner
from nodes.querier import Querier
from protocol.privacy import Guarantee
from tests.e2e.browser import Watched, open_browser, serious_findings
from tests.e2e.processes import environment, market_process
from tests.e2e.test_two_homes import MARKET, OWNERS, write_task

pytestmark = pytest.mark.slow
EIGHT = Guarantee(8.0, 1e-6)
POLICY = Policy(Budget(16.0, 1e-6), largest_epsilon=8.0)
WAIT_MS = 600_000  # the model is loaded meanwhile; seconds on an idle machine
PAGES = ("match", "answer", "compare", "ledger", "outlook", "audit", "work")


@dataclass(frozen=True)
class Served:
    """A page that `veilmart ui` serves, and what its user has."""

    root: Path
    url: str
    title: str  # of the specialist that was pulled


@contextmanager
def serving(home: Path, *words: str):
    command = [sys.executable, "-m", "nodes.command", "ui", "--port", "0", "--json", *words]
    with (home / "ui.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment(home))
        try:
            lines = []
            while not lines or lines[-1] != b"}\n":
                lines.append(process.stdout.readline())
                assert lines[-1], (home / "ui.log").read_text()
            yield json.loads(b"".join(lines))
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 0
            process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory, slm_directory):
    """Two owners publish, one with a specialist that was hardly trained; yield the page of a user who is the first of them too."""
    root = tmp_path_factory.mktemp("page")
    home = root / "home"
    with market_process(root / "market-home", options=MARKET) as (started, _):
        for owner, recipe in zip(OWNERS, (Recipe(max_steps=6), None), strict=True):
            data, whose = write_task(root / f"{owner}.jsonl", owner, "train", 60), root / f"home-{owner}" if recipe is None else home
            published = Owner(data, home=whose, recipe=recipe, policy=POLICY, base=slm_directory).publish(
                Market(started["address"], started["ca"], whose), EIGHT
            )
            if recipe is not None:
                title = published.release.title
        market = Market(started["address"], started["ca"], home)
        Querier(market, base=slm_directory).pull(title)
        write_task(root / "task.jsonl", OWNERS[0], "test", 40)
        with serving(home, "--market", market.address, "--ca", str(market.ca), "--base", str(slm_directory)) as told:
            yield Served(root, told["url"], title)


def test_a_task_is_matched_by_its_file_and_its_specialist_answers(served):
    with open_browser() as browser:
        watched = Watched(browser.new_page(viewport={"width": 1200, "height": 900}))
        page = watched.page
        page.goto(served.url)
        page.wait_for_url("**/match")
        page.set_input_files("#file", served.root / "task.jsonl")
        page.get_by_role("button", name="Find the specialist").click()
        page.wait_for_url("**/work/*")
        page.get_by_role("heading", name="Scores", exact=True).wait_for(timeout=WAIT_MS)
        assert "✓ match" in page.locator(".verdict").inner_text()
        first = page.locator("tbody tr").first
        assert served.title in first.inner_text()
        assert "One ciphertext of 129 216 bytes" in page.locator("main").inner_text()
        matched = page.url
        first.get_by_role("link", name="Ask").click()
        page.fill("#question", generate(OWNERS[0], 1, "test")[0].prompt)
        page.get_by_text("Strategy, a larger model").click()
        page.fill("#tokens", "12")
        page.get_by_role("button", name="Ask both").click()
        page.get_by_role("heading", name="Where the answer comes from").wait_for(timeout=WAIT_MS)
        assert page.locator(".sides section").count() == 2
        answered = page.url
        at = page.url.split("/work/")[0]
        page.goto(f"{at}/outlook")
        page.set_input_files("#file", served.root / f"{OWNERS[0]}.jsonl")
        page.get_by_role("button", name="Simulate").click()
        page.get_by_text("Nothing left this machine").wait_for(timeout=WAIT_MS)
        look_at_everything(watched, [*(f"{at}/{name}" for name in PAGES), matched, answered, page.url])
        assert watched.violations == watched.errors == []
        assert watched.hosts == {served.url.split("/")[2]}
    log = (served.root / "home" / "ui.log").read_text()
    assert not any(private in log for private in (served.url.split("=")[1], at.rsplit("/", 1)[1], "bank"))


def look_at_everything(watched, addresses):
    """Each page in both themes and at both widths: nothing overflows, axe finds nothing serious."""
    page, shots = watched.page, os.environ.get("VEILMART_SCREENSHOTS")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 900})
            for number, address in enumerate(addresses):
                page.goto(address)
                assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0, (address, width)
                assert serious_findings(page) == [], (address, theme, width)
                if shots:
                    page.screenshot(path=f"{shots}/{number}-{theme}-{width}.png", full_page=True)


def test_a_browser_without_the_address_gets_nothing(served):
    with open_browser() as browser:
        page = browser.new_page()
        host = served.url.split("/?")[0]
        for address in (f"{host}/", f"{host}/match", f"{host}/?token=guessed"):
            assert page.goto(address).status == 403
            assert "open the address" in page.locator("body").inner_text()


@pytest.mark.parametrize("other", ["http://evil.example/", "http://127.0.0.1:9/", "http://localhost:9/"])
def test_a_page_of_another_site_or_port_can_order_nothing(served, other):
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(served.url)
        page.wait_for_url("**/match")  # this browser has the cookie from here on
        own, before = page.url, page.goto(page.url.replace("/match", "/work.json")).json()
        form = f'<form method="post" action="{own}"><button>order</button></form><a href="{own}">look</a>'
        page.route(f"{other}**", lambda route: route.fulfill(content_type="text/html", body=form))
        for what, role in (("order", "button"), ("look", "link")):
            page.goto(other)
            with page.expect_response(own) as answer:
                page.get_by_role(role, name=what).click()
            assert answer.value.status == 403
        page.goto(served.url)  # a control: the same browser comes in when its user says so
        page.wait_for_url("**/match")
        assert page.goto(page.url.replace("/match", "/work.json")).json() == before
