"""The local page: who is let in, what runs behind it, what its pages say."""

import logging
import threading
from dataclasses import dataclass

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from nodes.ui.door import COOKIE, Door, Keys
from nodes.ui.work import MOST_WAITING, State, Worker
from protocol.errors import NotFound, QuotaExceeded, UsageError

PORT = 8643
HERE = f"127.0.0.1:{PORT}"
MARKER = "SECRET-MARKER-7731"


# The door --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behind:
    """A door with a page behind it that says "private" to whoever comes in."""

    keys: Keys
    client: TestClient

    def ask(self, method: str = "GET", path: str = "/match", **headers: str):
        """Ask as the user's own browser does; `headers` say what is different, None leaves one out.  A path after ^ is not below ours."""
        usual = {"host": HERE, "sec-fetch-site": "same-origin", "cookie": f"{COOKIE}={self.keys.cookie}"}
        if method == "POST":
            usual["origin"] = f"http://{HERE}"
        sent = {name: value.encode("latin-1") for name, value in {**usual, **_spelt(headers)}.items() if value is not None}
        return self.client.request(method, path.removeprefix("^") if path[0] == "^" else f"{self.keys.at}{path}", headers=sent)


def _spelt(headers):
    return {name.replace("_", "-"): value for name, value in headers.items()}


def behind_a_door() -> Behind:
    async def private(scope, receive, send):
        await PlainTextResponse("private")(scope, receive, send)

    keys = Keys()
    return Behind(keys, TestClient(Door(private, keys, PORT, {"/static/style.css"}), base_url=f"http://{HERE}"))


ATTACKS = {
    "a name that was made to lead here": ("names_this_page", {"host": f"evil.example:{PORT}"}),
    "a name that begins like ours": ("names_this_page", {"host": f"127.0.0.1.evil.example:{PORT}"}),
    "our address at another port": ("names_this_page", {"host": "127.0.0.1:1"}),
    "our address without its port": ("names_this_page", {"host": "127.0.0.1"}),
    "a rebound name with our origin": ("names_this_page is_ordered_from_here", {"method": "POST", "host": f"evil.example:{PORT}", "origin": f"http://{HERE}"}),
    "a rebound name as its own origin": (
        "names_this_page", {"method": "POST", "host": f"evil.example:{PORT}", "origin": f"http://evil.example:{PORT}"},
    ),
    "a preflight": ("asks_as_a_browser_does", {"method": "OPTIONS", "origin": "https://evil.example"}),
    "another method": ("asks_as_a_browser_does", {"method": "DELETE"}),
    "a page of another site reads": ("comes_from_here", {"sec_fetch_site": "cross-site"}),
    "a page of another port reads": ("comes_from_here", {"sec_fetch_site": "same-site"}),
    "a form of another site": ("is_ordered_from_here", {"method": "POST", "origin": "https://evil.example"}),
    "a form of another port": ("is_ordered_from_here", {"method": "POST", "origin": "http://127.0.0.1:8888"}),
    "a form of our other name": ("is_ordered_from_here", {"method": "POST", "origin": f"http://localhost:{PORT}"}),
    "a form of a sandboxed frame": ("is_ordered_from_here", {"method": "POST", "origin": "null"}),
    "a form of a browser that says nothing": ("is_ordered_from_here", {"method": "POST", "origin": None}),
    "no cookie": ("knows_a_secret", {"cookie": None}),
    "a wrong cookie": ("knows_a_secret", {"cookie": f"{COOKIE}=guessed"}),
    "an empty cookie": ("knows_a_secret", {"cookie": f"{COOKIE}="}),
    "a cookie that is no text": ("knows_a_secret", {"cookie": f"{COOKIE}=\xff"}),
    "no token": ("knows_a_secret", {"path": "^/"}),
    "a wrong token": ("knows_a_secret", {"path": "^/?token=guessed"}),
    "two tokens": ("knows_a_secret", {"path": "^/?token=a&token=b"}),
    "a page that is not ours with the cookie": ("knows_a_secret", {"path": "^/match"}),
    "a style sheet that is not there": ("knows_a_secret", {"path": "^/static/../match", "cookie": None}),
    "a form that is sent to a style sheet": ("knows_a_secret", {"method": "POST", "path": "^/static/style.css", "cookie": None}),
}  # fmt: skip


def attack(page: Behind, how: dict):
    path = how.get("path", "/match")
    return page.ask(**{**how, "path": path})


@pytest.mark.parametrize(("check", "how"), ATTACKS.values(), ids=ATTACKS)
def test_whoever_is_not_the_users_browser_is_refused_and_learns_nothing(check, how):
    page = behind_a_door()
    answer = attack(page, how)
    assert answer.status_code in (403, 405, 421)
    assert "private" not in answer.text
    assert not any(secret in answer.text + str(answer.headers) for secret in (page.keys.token, page.keys.cookie, page.keys.at))
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(("check", "how"), ATTACKS.values(), ids=ATTACKS)
def test_it_is_that_check_that_refuses(check, how, monkeypatch):
    kept = tuple(one for one in Door.CHECKS if one[0].__name__ not in check.split())
    assert len(kept) == len(Door.CHECKS) - len(check.split())
    monkeypatch.setattr(Door, "CHECKS", kept)
    assert attack(behind_a_door(), how).text == "private"


def test_the_users_browser_comes_in():
    page = behind_a_door()
    for how in (
        {}, {"sec_fetch_site": "none"}, {"sec_fetch_site": None}, {"method": "POST"}, {"method": "HEAD"}, {"host": f"LocalHost:{PORT}"},
        {"method": "POST", "host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"},
        {"cookie": f"{COOKIE}=of-another-port; {COOKIE}={page.keys.cookie}; other=1"},
        {"path": f"^/?token={page.keys.token}", "cookie": None, "sec_fetch_site": "cross-site"},  # from a file, or a terminal on a page
        {"path": "^/static/style.css", "cookie": None},
    ):  # fmt: skip
        assert attack(page, how).status_code == 200, how


def test_no_two_pages_share_a_secret():
    secrets = [secret for keys in (Keys(), Keys()) for secret in (keys.token, keys.cookie, keys.at)]
    assert len(set(secrets)) == 6
    assert min(map(len, secrets)) >= 17


# Work ------------------------------------------------------------------------------------------------------------------------


def wait_for(job, worker_step=10.0):
    done = threading.Event()
    for _ in range(int(worker_step / 0.005)):
        if job.over:
            return job
        done.wait(0.005)
    raise AssertionError(f"still {job.state}")


def test_work_is_done_in_its_order_and_one_at_a_time():
    seen = []
    with Worker() as worker:
        jobs = [worker.start("match", str(number), lambda job: seen.append(job.title) or {"n": job.title}) for number in range(3)]
        assert [wait_for(job).result["n"] for job in jobs] == ["0", "1", "2"] == seen
        assert [job.title for job in worker.jobs("match")] == ["2", "1", "0"]
        assert worker.jobs("audit") == []


def test_work_stops_at_its_next_step_and_keeps_nothing():
    began, go_on = threading.Event(), threading.Event()

    def endless(job):
        began.set()
        for step in range(1_000_000):
            go_on.wait(10)
            job.progress("step", step, 1_000_000)
        return {"never": True}

    with Worker() as worker:
        running, waiting = worker.start("match", "a", endless), worker.start("match", "b", lambda job: {"done": True})
        assert began.wait(10)
        waiting.stop()
        running.stop()
        assert running.stopping
        go_on.set()
        assert wait_for(running).state is wait_for(waiting).state is State.STOPPED
        assert running.result is waiting.result is None


def test_what_fails_says_what_to_do_and_never_what_was_in_it(caplog):
    def refused(job):
        raise UsageError("expected a file", hint="choose one")

    def broken(job):
        raise ValueError(MARKER)

    with caplog.at_level(logging.DEBUG), Worker() as worker:
        first, second = wait_for(worker.start("match", MARKER, refused)), wait_for(worker.start("match", MARKER, broken))
    assert (str(first.error), first.error.hint) == ("expected a file", "choose one")
    assert str(second.error) == "unexpected ValueError"
    assert first.state is second.state is State.FAILED
    assert "code=usage" in caplog.text
    assert MARKER not in caplog.text


def test_too_much_work_is_refused_and_old_results_are_forgotten():
    hold = threading.Event()
    with Worker() as worker:
        old = wait_for(worker.start("match", "old", lambda job: {}))
        for _ in range(25):
            wait_for(worker.start("match", "x", lambda job: {}))
        with pytest.raises(NotFound):
            worker.find(old.id)
        for _ in range(MOST_WAITING + 1):
            worker.start("match", "held", lambda job: hold.wait(10) and {})
        with pytest.raises(QuotaExceeded):
            worker.start("match", "one too many", lambda job: {})
        hold.set()
