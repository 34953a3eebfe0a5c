"""A real Chromium for tests of pages: what it fetched, what the policy stopped, what axe-core finds."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

QUIET = (  # reaches no host by itself; as root it has no sandbox to run in
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)  # fmt: skip


@contextmanager
def open_browser() -> Iterator:
    """Yield a browser; skip where there is none, or fail where VEILMART_REQUIRE_BROWSER says that there should be."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sync_playwright = None
    if chromium is None or sync_playwright is None:
        if os.environ.get("VEILMART_REQUIRE_BROWSER"):
            pytest.fail("VEILMART_REQUIRE_BROWSER is set, and there is no chromium or no playwright")
        pytest.skip("no chromium, or no playwright: apt-get install chromium, pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(QUIET))
        yield browser
        browser.close()


class Watched:
    """A page with everything that it asked for and everything that went wrong on it."""

    def __init__(self, page) -> None:
        self.page = page
        self.hosts: set[str] = set()
        self.violations: list[str] = []  # of the policy
        self.errors: list[str] = []  # of scripts, and answers that are errors
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _said(self, message) -> None:
        if "Content Security Policy" in message.text:
            self.violations.append(message.text)
        elif message.type == "error":
            self.errors.append(message.text)


def serious_findings(page) -> list[str]:
    """Return what axe-core calls serious or critical on a page, with where it is."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['target']}"
        for one in found if one["impact"] in ("serious", "critical") for node in one["nodes"]
    ]  # fmt: skip
