"""The local page: who is let in, what runs behind it, what its pages say."""

import logging
import re
import stat
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from nodes.audit.report import build_report, to_json
from nodes.base_model import BaseModel
from nodes.commands.ui import OPENER, open_in_browser
from nodes.finetune import Recipe
from nodes.forecast import EPSILONS
from nodes.journal import Journal
from nodes.market import Market
from nodes.owner import Owner
from nodes.querier import Querier
from nodes.reuse import Strategy
from nodes.statement import open_ledger
from nodes.ui.application import application
from nodes.ui.door import COOKIE, Door, Keys
from nodes.ui.views import Views
from nodes.ui.work import MOST_WAITING, Failure, State, Worker
from protocol.errors import NotFound, QuotaExceeded, UsageError
from protocol.privacy import Guarantee
from tests.market_node.local import QuietService
from tests.market_node.market import running_market
from tests.nodes.owners import MARKER as MARKER_OF_OWNERS
from tests.nodes.owners import tiny_map, write_records

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


def test_the_token_is_in_no_argument_of_a_browser(tmp_path, monkeypatch):
    """Everybody on this machine reads arguments; the file is its owner's, and goes with the page."""
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    address = f"http://{HERE}/?token={MARKER}"
    (tmp_path / OPENER).write_text("left by one that was killed")
    forget = open_in_browser(tmp_path, address)
    assert opened == [(tmp_path / OPENER).as_uri()]
    assert MARKER not in opened[0]
    assert stat.S_IMODE((tmp_path / OPENER).stat().st_mode) == 0o600
    assert f"url={address}" in (tmp_path / OPENER).read_text()
    forget()
    assert list(tmp_path.iterdir()) == []


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
    assert first.error == Failure("usage", "expected a file", "choose one")
    assert second.error == Failure("unexpected", "unexpected ValueError")
    assert first.state is second.state is State.FAILED
    assert "code=usage" in caplog.text
    assert MARKER not in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_the_records_of_work_are_forgotten_when_it_is_over(fails):
    class Records(list):
        """Can be referred to weakly."""

    def start(worker):
        records = Records([MARKER])

        def run(job):
            if fails and records:
                raise UsageError("no")
            return {"count": len(records)}

        return worker.start("match", "a", run), weakref.ref(records)

    with Worker() as worker:
        job, kept = start(worker)
        assert (wait_for(job).state is State.FAILED) is fails
        assert worker.find(job.id) is job
        assert kept() is None


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


# Pages -----------------------------------------------------------------------------------------------------------------------


class Local:
    """The page of a user who has a home, a model and a market; asked as the user's browser does."""

    def __init__(self, querier: Querier, worker: Worker) -> None:
        self.querier, self.worker, self.keys = querier, worker, Keys()
        views = Views(querier, worker, budget=4.0)
        self._client = TestClient(application(views, self.keys, PORT), base_url=f"http://{HERE}", follow_redirects=False)
        entered = self._client.get(f"/?token={self.keys.token}")
        assert entered.status_code == 200
        self.set_cookie = entered.headers["set-cookie"]
        self._client.cookies.set(COOKIE, self.keys.cookie, path=self.keys.at)

    def get(self, page: str):
        return self._client.get(f"{self.keys.at}/{page}")

    def send(self, order: str, **fields):
        """Send a form; bytes among the fields are a file."""
        files = {name: ("task.jsonl", data) for name, data in fields.items() if isinstance(data, bytes)}
        data = {name: str(value) for name, value in fields.items() if not isinstance(value, bytes)}
        if not files:
            files = {"nothing": ("", b"")}  # an empty file input, as a browser sends it
        return self._client.post(f"{self.keys.at}/{order}", data=data, files=files, headers={"origin": f"http://{HERE}"})

    def work(self, order: str, **fields):
        """Send a form and return what its work came to: the page, and the job in JSON."""
        answer = self.send(order, **fields)
        assert answer.status_code == 303, answer.text
        place = answer.headers["location"].removeprefix(f"{self.keys.at}/")
        wait_for(self.worker.find(place.removeprefix("work/")), 120)
        return self.get(place), self.get(f"{place}.json").json()


@dataclass
class World:
    """An owner with a home, what was published, and a page over both."""

    root: Path
    owner: Owner
    title: str
    local: Local


def lines_of(path: Path, count: int) -> bytes:
    return b"".join(path.read_bytes().splitlines(keepends=True)[:count])


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model_directory):
    root = tmp_path_factory.mktemp("ui")
    feature_map = tiny_map(BaseModel.open(tiny_model_directory))
    (root / "tiny.map").write_bytes(feature_map.manifest)
    tiny = {"feature_map": str(root / "tiny.map"), "base": tiny_model_directory}
    with running_market(root / "market", feature_map, service_type=QuietService) as (address, ca, _), Worker() as worker:
        market = Market(address, ca, root / "home")
        data = write_records(root / "wool.jsonl", 120)
        owner = Owner(data, home=root / "home", recipe=Recipe(rank=2, max_steps=2), summary="<b>wool</b>", **tiny)
        title = owner.publish(market, Guarantee(1.0, 1e-6)).release.title
        querier = Querier(market, **tiny)
        querier.pull(title)
        yield World(root, owner, title, Local(querier, worker))


PAGES = ("match", "answer", "compare", "ledger", "outlook", "audit", "work")


def test_the_address_is_exchanged_for_a_cookie_that_no_other_site_is_sent(world):
    name, *how = world.local.set_cookie.split("; ")
    assert name == f"{COOKIE}={world.local.keys.cookie}"
    assert set(how) == {f"Path={world.local.keys.at}", "HttpOnly", "SameSite=Strict"}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_kept_in_no_cache_and_runs_nothing_of_others(world, page):
    shown, twin = world.local.get(page), world.local.get(f"{page}.json")
    assert (shown.status_code, twin.status_code) == (200, 200)
    assert shown.headers["cache-control"] == twin.headers["cache-control"] == "no-store"
    assert "unsafe" not in shown.headers["content-security-policy"]
    assert not any(name.startswith("access-control") for name in shown.headers)
    assert "<b>wool</b>" not in shown.text  # an owner's words are text
    assert not re.search(r"\sstyle=|<style|<script>|\son\w+=", shown.text)
    assert twin.json()["schema"].startswith("veilmart.ui-")
    assert 'aria-current="page"' in shown.text


def test_a_task_is_matched_and_the_verdict_is_explained(world):
    page, twin = world.local.work("match", file=lines_of(world.root / "wool.jsonl", 40), way="mirror")
    result = twin["result"]
    assert result["matches"][0]["title"] == world.title
    begins = {"match": "a match:", "sibling": "a sibling:", "none": "no suitable learnware:", "cannot tell": "cannot tell:"}
    assert result["words"].startswith(begins[result["verdict"]])  # whichever it is: a random model is no calibrated one
    assert result["words"][1:].replace("'", "&#39;") in page.text
    assert "That somebody fetched the catalogue" in page.text
    assert "<svg" in page.text
    assert "Scores as a table" in page.text
    assert MARKER_OF_OWNERS not in page.text
    assert world.local.get("match").text.count("task.jsonl</a>") >= 1
    same, _ = world.local.work("match", path=world.root / "wool.jsonl", way="mirror")
    assert world.title in same.text


def test_a_file_that_cannot_be_read_is_told_by_its_line_and_never_by_its_text(world, caplog):
    with caplog.at_level(logging.DEBUG):
        page, twin = world.local.work("match", file=b'{"prompt": "a", "response": "b"}\n{"prompt": "' + MARKER.encode() + b"\n")
    assert twin["job"]["state"] == "failed"
    assert "task.jsonl, line 2" in page.text
    assert MARKER not in page.text + caplog.text
    for how in ({}, {"path": "/nowhere/task.jsonl"}, {"path": "/dev/stdin"}, {"file": b"x", "way": "guess"}):
        answer = world.local.send("match", **how)
        assert answer.status_code == 400, how
        assert "usage" in answer.text


def test_specialist_and_base_model_answer_side_by_side(world):
    question = f"<i>{MARKER}</i>"
    ticked = {f"use-{one['id']}": "on" for one in world.local.get("answer.json").json()["pulled"]}
    page, twin = world.local.work("answer", question=question, tokens=4, **ticked)
    result = twin["result"]
    assert (result["answered_by"], result["left_site"]) == (world.title, [])
    assert result["specialists"][0]["adapter_guarantee"] == "none"
    assert question not in page.text
    assert "&lt;i&gt;" in page.text
    assert "named by the user" in page.text
    assert "unbounded" in page.text
    alone = world.local.querier.assistant(Strategy.BASE).answer([("user", question)], 4)
    assert result["base_answer"] == alone.text


def test_nothing_is_fetched_that_was_not_allowed(world):
    answer = world.local.send("answer", question="?", learnwares="other@00112233")
    assert answer.status_code == 404
    assert "not pulled yet" in answer.text
    assert world.local.send("answer", question="?").status_code == 400
    _, twin = world.local.work("answer", question="?", learnwares="other@00112233", fetch="on")
    assert twin["job"]["error"]["code"] == "not-found"


def test_strategies_are_compared_on_the_users_records(world):
    page, twin = world.local.work("compare", file=lines_of(world.root / "wool.jsonl", 4), learnwares=world.title, tokens=2)
    result = twin["result"]
    assert [row["name"] for row in result["strategies"]] == ["base", "single"]
    assert (result["calibrated_on"], result["scored_on"]) == (2, 2)
    assert 'class="strategies"' in page.text
    assert f"{result['strategies'][0]['nats_per_token']:.3f}" in page.text


def test_the_ledger_shows_charges_and_price_and_spends_nothing(world):
    before = open_ledger(world.owner.folder, "default").entries()
    page, twin = world.local.get("ledger?epsilon=0.5&budget=1.05"), world.local.get("ledger.json?epsilon=0.5&budget=1.05").json()
    assert twin["statement"]["spent"] == pytest.approx(1.0, abs=1e-3)
    assert twin["statement"]["entries"][-1]["spent_after"] == pytest.approx(twin["statement"]["spent"])
    assert (twin["price"]["affordable"], twin["price"]["asked"]) == (False, pytest.approx(0.5, abs=1e-3))
    assert "It would be refused" in page.text
    assert "It fits" in world.local.get("ledger").text
    assert [one["title"] for one in twin["sent"]] == [world.title]
    assert twin["sent"][0]["adapter_bytes"] > 1_000  # what left without a guarantee is not passed over
    assert twin["sent"][0]["integers"] == tiny_map(world.local.querier.model).dimension + 1
    assert open_ledger(world.owner.folder, "default").entries() == before
    for wrong in ("population=../../etc", "population=nobody", "epsilon=x", "epsilon=nan", "epsilon=-1", "budget=0"):
        assert world.local.get(f"ledger?{wrong}").status_code in (400, 404), wrong


def test_an_outlook_leaves_no_trace_and_charges_nothing(world):
    def kept():
        return {path: path.read_bytes() for path in sorted((world.root / "home").rglob("*")) if path.is_file()}

    before = kept()
    page, twin = world.local.work("outlook", file=(world.root / "wool.jsonl").read_bytes())
    assert [one["epsilon"] for one in twin["result"]["outlooks"]] == list(EPSILONS)
    assert "Nothing left this machine, nothing was spent" in page.text
    assert kept() == before
    refused, twin = world.local.work("outlook", file=lines_of(world.root / "wool.jsonl", 10))
    assert (twin["job"]["error"]["code"], "at least 20" in refused.text) == ("records", True)


def test_files_and_reports_are_audited(world):
    (receipt,) = (world.root / "home" / "receipts").iterdir()
    page, twin = world.local.work("audit", what="file", path=receipt)
    assert twin["result"]["audits"][0]["title"] == world.title
    assert "no claim is refuted" in page.text
    report = to_json(build_report(twin["result"]["audits"], "2026-01-01", "0"))
    shown, _ = world.local.work("audit", what="report", file=report)
    assert "No claim is refuted" in shown.text
    assert "Hazards" in shown.text
    for wrong in (b"{}", b"nothing", b"[]"):
        _, twin = world.local.work("audit", what="report", file=wrong)
        assert twin["job"]["error"]["code"] == "format"
    assert world.local.send("audit", what="everything").status_code == 400


def test_a_new_home_has_pages_that_say_what_to_do_and_makes_nothing(tmp_path):
    home = tmp_path / "home"
    with Worker() as worker:
        local = Local(Querier(home=home), worker)
        for page in PAGES:
            assert local.get(page).status_code == 200, page
        assert "node join" in local.get("match").text
        assert "no ledger yet" in local.get("ledger").text
        assert local.send("match", file=b"{}").status_code == 400
    assert not home.exists()


def test_what_campaigns_asked_is_read_from_the_guards_journal(tmp_path):
    journal = Journal(tmp_path / "node" / "journal.jsonl")
    for number in range(60):
        journal.append("order", number=number, code="<i>")
    journal.close()
    with Worker() as worker:
        local = Local(Querier(home=tmp_path), worker)
        lines, page = local.get("ledger.json").json()["journal"], local.get("ledger").text
        assert [line["fields"]["number"] for line in lines] == list(range(59, 9, -1))  # the newest first
        assert "&lt;i&gt;" in page
        path = tmp_path / "node" / "journal.jsonl"
        path.write_bytes(path.read_bytes().replace(b'"number": 7, "time"', b'"number": 8, "time"'))
        assert "somebody or something changed it" in local.get("ledger").text


def test_a_file_beyond_the_limit_is_refused_before_it_is_kept(world, monkeypatch):
    monkeypatch.setattr("nodes.ui.application.MAX_FORM_BYTES", 1_000)
    before = len(world.local.worker.jobs())
    assert world.local.send("match", file=b"x" * 2_000).status_code == 413
    assert len(world.local.worker.jobs()) == before


def test_work_is_stopped_from_its_page_and_unknown_work_is_not_there(world):
    hold = threading.Event()

    def endless(job):
        while True:
            hold.wait(0.01)
            job.progress("step <b>", 3, 9)

    job = world.local.worker.start("match", "<i>", endless)
    while not job.of:
        hold.wait(0.005)
    page = world.local.get(f"work/{job.id}").text
    assert 'hx-trigger="every 1s"' in page
    assert "step &lt;b&gt; 3/9" in page
    assert world.local.send("stop", id=job.id).status_code == 303
    assert wait_for(job).state is State.STOPPED
    assert "Stopped by you" in world.local.get(f"work/{job.id}").text
    assert world.local.get("work/0123").status_code == world.local.send("stop", id="0123").status_code == 404


def test_what_is_wrong_behind_a_form_is_told_to_nobody(world, monkeypatch, caplog):
    def broken(form):
        raise ValueError(MARKER)

    monkeypatch.setattr("nodes.ui.views.source_of", broken)
    with caplog.at_level(logging.DEBUG):
        answer = world.local.send("match", file=b"x")
    assert answer.status_code == 500
    assert MARKER not in answer.text + caplog.text
    assert "error=ValueError" in caplog.text


def test_no_secret_and_no_record_is_ever_logged(world, caplog):
    with caplog.at_level(logging.DEBUG):
        TestClient(application(Views(world.local.querier, world.local.worker, 4.0), world.local.keys, PORT)).get(
            f"/?token={world.local.keys.token}", headers={"host": HERE}
        )
        world.local.work("match", file=lines_of(world.root / "wool.jsonl", 40), way="mirror")
        world.local.get("ledger")
    ours = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore")))
    assert "work kind=match state=done" in ours
    assert not any(secret in ours for secret in (world.local.keys.token, world.local.keys.cookie, world.local.keys.at, MARKER_OF_OWNERS))
