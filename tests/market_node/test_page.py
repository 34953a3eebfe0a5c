"""The market's page: what it shows is what the log holds, nothing that comes in does anything, and it cannot write."""

import base64
import json
import re
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy.exc import OperationalError

from market_node.backup import NEWEST
from market_node.members import Members
from market_node.metrics import CALLS, Metrics
from market_node.page import choosing, projection, proofs
from market_node.page.condition import read_counts
from market_node.page.reading import Reading
from market_node.store import Store
from protocol.aggregation import domain_of
from protocol.errors import InvalidSignature, NotFound, UsageError
from protocol.notices import Kind, Notice, open_notice, sign_notice
from protocol.privacy import Guarantee, PoissonSampledGaussian, PrivateTraining
from protocol.release import AdapterReference, Card
from protocol.transparency import Receipt
from protocol.web.headers import POLICY
from tests.market_node.pages import client_of, fill, reading_of, synthetic
from tests.protocol.test_web import HOSTILE, Tags
from tests.protocol.worlds import small_map

MAP = small_map()
COUNT = 60
PATHS = ["/", "/map", "/aggregates", "/log", "/log/check", "/health"]
TWINS = {"/": "/catalogue.json"}


@pytest.fixture(scope="module")
def market_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture(scope="module")
def made():
    releases = synthetic(MAP, COUNT, owners=20)
    hostile = replace(releases[7][0], card=Card("legal-7", HOSTILE, HOSTILE))
    training = PrivateTraining(Guarantee(3.0, 1e-6), PoissonSampledGaussian(2.0, 0.05, 50))
    private = replace(releases[9][0], adapter=AdapterReference(bytes([7]) * 32, 5_000, training))
    releases[7], releases[9] = (hostile, releases[7][1]), (private, releases[9][1])
    return releases


@pytest.fixture(scope="module")
def reading(made, market_key, tmp_path_factory):
    home = tmp_path_factory.mktemp("market")
    fill(home, made, MAP, market_key)
    members = Members.open(home)
    members.enrol(members.invite("City Hospital", int(time.time()) + 1000), made[0][0].owner, "", int(time.time()))
    members.close()
    found = reading_of(home, MAP)
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(reading):
    return client_of(reading)


class Rows(HTMLParser):
    """The rows of all tables of a page, as texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.rows[-1][-1] += data.strip()


def names(client, query: str) -> list[str]:
    return [one["name"] for one in client.get(f"/catalogue.json?{query}").json()["releases"]]


# Catalogue ----------------------------------------------------------------------------------------------------------------


def test_the_catalogue_shows_what_the_log_holds(client, made):
    found = client.get("/catalogue.json").json()
    assert (found["total"], found["matched"], found["pages"], found["size"]) == (COUNT, COUNT, 2, COUNT)
    both = found["releases"] + client.get("/catalogue.json?page=2").json()["releases"]
    assert [one["id"] for one in both] == [release.release_id.hex() for release, _ in reversed(made)], "the newest first"
    shown = both[-1]
    release = made[0][0]
    assert (shown["epsilon"], shown["owner"], shown["licence"]) == ("0.5", release.owner.hex(), release.card.licence)
    assert shown["organisation"] == "City Hospital"
    assert shown["records"] == pytest.approx(release.specification.count, rel=0.3)
    rows = Rows(client.get("/?page=2").text).rows
    assert rows[-1][0] == release.title
    assert {"City Hospital", "apache-2.0"} <= {text for cell in rows[-1] for text in (cell, cell[:13])}


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ("q=legal", lambda release: release.card.name.startswith("legal")),
        ("q=questions+HEALTH", lambda release: release.card.name.startswith("health")),
        ("domain=finance", lambda release: release.card.name.startswith("finance-")),
        ("epsilon=1", lambda release: release.specification.guarantee.epsilon <= 1),
        ("licence=research", lambda release: release.card.licence == "research"),
        ("adapter=none", lambda release: release.adapter is None),
        ("adapter=any", lambda release: release.adapter is not None),
        ("adapter=private", lambda release: release.adapter is not None and release.adapter.guarantee != "none"),
        ("adapter=unbounded", lambda release: release.adapter is not None and release.adapter.guarantee == "none"),
        ("unit=record", lambda release: True),
        ("unit=field:person", lambda release: False),
        ("base=" + "ab" * 32, lambda release: True),
        ("base=cd", lambda release: False),
        ("licence=research&adapter=none&sort=name", lambda release: release.card.licence == "research" and release.adapter is None),
        ("show=gone", lambda release: False),
    ],
)  # fmt: skip
def test_every_filter_leaves_what_fits_and_nothing_else(client, made, query, holds):
    wanted = {release.card.name for release, _ in made if holds(release)}
    found = {name for page in (1, 2) for name in names(client, f"{query}&page={page}")}
    assert found == wanted


def test_owners_are_found_by_key_and_by_organisation(client, made):
    owner = made[0][0].owner
    wanted = {release.card.name for release, _ in made if release.owner == owner}
    assert set(names(client, f"owner={owner.hex()[:12]}")) == wanted
    assert set(names(client, "owner=city+hosp")) == wanted
    assert len(wanted) == 3


@pytest.mark.parametrize(
    ("column", "key"), [("name", "name"), ("records", "records"), ("epsilon", "epsilon"), ("owner", "owner"), ("logged", "position")]
)
def test_every_column_sorts_both_ways(client, column, key):
    def sorted_by(order):
        both = [client.get(f"/catalogue.json?sort={column}&order={order}&page={page}").json()["releases"] for page in (1, 2)]
        return [float(one[key]) if key == "epsilon" else one[key] for part in both for one in part]

    up, down = sorted_by("up"), sorted_by("down")
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert up != down


def test_every_column_that_is_shown_can_be_filtered_and_sorted(client):
    page = client.get("/")
    tags = Tags(page.text).found
    inputs = {attributes["name"] for tag, attributes in tags if tag in ("input", "select") and attributes.get("type") != "hidden"}
    assert inputs == {"q", "domain", "records", "epsilon", "adapter", "unit", "base", "licence", "owner", "show"}
    heads = re.findall(r'<th scope="col"[^>]*><a href="/\?([^"]*)"', page.text)
    assert len(heads) == 10
    for query in heads:
        assert client.get("/?" + query.replace("&amp;", "&")).status_code == 200


def test_a_click_on_the_sorted_column_turns_it_round():
    wish = choosing.Wish.of({"sort": "epsilon", "order": "up", "q": "a b", "page": "3"})
    assert wish.by("epsilon") == "q=a+b&sort=epsilon"
    assert wish.by("name") == "q=a+b&sort=name&order=up"
    assert choosing.Wish().by("logged") == "order=up"


# The map ------------------------------------------------------------------------------------------------------------------


def test_the_map_keeps_the_share_of_distances_that_it_says(reading):
    state = reading.state()
    found = projection.project(state, reading.map)
    means, places = state.means, found.places
    weights = np.array([MAP.full.between / (MAP.full.between + MAP.full.within / e.records + e.noise**2) for e in state.standing])
    pairs = np.outer(weights, weights)

    def together(points):
        return (pairs * ((points[:, None] - points[None]) ** 2).sum(-1)).sum()

    assert found.kept == pytest.approx(together(places) / together(means))
    rng = np.random.default_rng(0)
    others = [np.linalg.qr(rng.standard_normal((MAP.dimension, 2)))[0] for _ in range(20)]
    assert found.kept > max(together(means @ axes) / together(means) for axes in others), "control: no two other axes keep as much"


def test_a_halo_holds_the_true_place_in_95_of_100():
    rng = np.random.default_rng(3)
    errors = rng.standard_normal((20_000, 2))
    assert (np.hypot(*errors.T) < projection.HALO).mean() == pytest.approx(0.95, abs=0.006)


def test_points_can_be_reached_by_keyboard_and_say_what_they_are(client, made):
    page, found = client.get("/map"), client.get("/map.json").json()
    tags = Tags(page.text).found
    labels = [attributes["aria-label"] for tag, attributes in tags if tag == "a" and "aria-label" in attributes]
    assert len(labels) == len(found["map"]["points"]) == 50
    assert len(found["map"]["others"]) == COUNT - 50
    one = made[-1][0]
    assert any(label.startswith(f"{one.title}: {one.card.name.split('-')[0]}, epsilon 2, about ") for label in labels)
    assert f"{100 * found['map']['kept']:.0f} % of the squared distances" in page.text
    assert {row[0] for row in Rows(page.text).rows} >= {point["title"] for point in found["map"]["points"]}, "the table has them all"


def test_names_cover_neither_each_other_nor_a_mark():
    rng = np.random.default_rng(5)
    places = [(float(x), float(y), "a-name-of-18-signs") for x, y in rng.uniform((30, 30), (730, 450), (30, 2))]
    shown = [one for one in projection._labels(places) if one[3]]
    boxes = [(x - 133.2 * projection.SHARE_BEFORE[anchor], y - 11, y + 3) for x, y, anchor, _ in shown]
    apart = [abs(a[0] - b[0]) >= 133 or a[1] >= b[2] - 1e-6 or b[1] >= a[2] - 1e-6 for n, a in enumerate(boxes) for b in boxes[:n]]
    assert all(apart)
    assert len(shown) >= 20
    crowd = projection._labels([(100.0 + n, 100.0, "a-name-of-18-signs") for n in range(20)])
    assert sum(always for *_, always in crowd) < 10, "the rest is shown where it is pointed at"


def test_more_noise_is_a_wider_halo(client):
    points = {point["title"]: point for point in client.get("/map.json").json()["map"]["points"]}
    noise = {one["title"]: one["noise"] for one in client.get("/catalogue.json").json()["releases"]}
    for title, point in points.items():
        assert point["halo"] == pytest.approx(projection.HALO * noise[title], abs=1e-3)


# Cards, receipts, aggregates ----------------------------------------------------------------------------------------------


def test_a_card_tells_both_guarantees_and_no_private_number(client, made, reading):
    release = made[9][0]
    found = client.get(f"/releases/{release.release_id.hex()}.json").json()
    assert found["specification"] | {"epsilon": "0.5", "unit": "record", "relation": "add-or-remove-one"} == found["specification"]
    assert found["adapter"]["guarantee"] == {"epsilon": "3.0", "delta": "1e-06", "unit": "record", "relation": "add-or-remove-one"}
    assert 0.5 < found["together"] < 3.5, "as a ledger composes the two mechanisms"
    assert found["specification"]["noisy_sums"] == release.specification.noisy_sums.tolist()
    page = client.get(f"/releases/{release.release_id.hex()}").text
    for words in ("3.0", "add-or-remove-one", release.title, release.release_id.hex(), f"veilmart pull {release.title}"):
        assert words in page
    assert not {"loss", "accuracy", "exact_count", "duration"} & set(re.findall(r"\w+", json.dumps(found)))
    assert len(found["history"]) == 3
    assert [one["release_number"] for one in found["history"]] == [3, 2, 1]


def test_without_a_guarantee_the_total_is_unbounded(client, made):
    adapter, alone = made[1][0], made[0][0]
    found = client.get(f"/releases/{adapter.release_id.hex()}.json").json()
    assert found["together"] is None
    assert "unbounded" in client.get(f"/releases/{adapter.release_id.hex()}").text
    assert client.get(f"/releases/{alone.release_id.hex()}.json").json()["adapter"] is None


def test_a_release_is_found_by_its_title_and_first_digits(client, made):
    release = made[5][0]
    for word in (release.release_id.hex()[:8], release.title, release.release_id.hex()):
        assert client.get(f"/releases/{word}.json").json()["release"]["id"] == release.release_id.hex()


def test_a_receipt_verifies_offline_and_on_the_page(client, made, market_key):
    release = made[5][0]
    data = client.get(f"/releases/{release.release_id.hex()}.receipt").content
    receipt = Receipt.from_bytes(data)
    assert receipt.verify().size == COUNT
    assert receipt.market_key == market_key.public_key().public_bytes_raw()
    pasted = [{"data": {"proof": text}} for text in (base64.b64encode(data).decode(), data.hex())]
    for form in ({"files": {"file": ("a.receipt", data)}}, *pasted):
        answer = client.post("/log/check", **form)
        assert answer.status_code == 200, answer.text
        assert "✓ Verified" in answer.text
        assert "the same root" in answer.text
    found = client.post("/log/check.json", data={"proof": data.hex()}).json()
    assert found["found"] | {"verified": True, "here": "same"} == found["found"]


def test_a_broken_or_foreign_proof_is_told_apart(client, made, market_key, tmp_path):
    data = client.get(f"/releases/{made[5][0].release_id.hex()}.receipt").content
    broken = bytearray(data)
    broken[-1] ^= 1
    answer = client.post("/log/check", files={"file": ("x", bytes(broken))})
    assert answer.status_code == 422
    assert "✗ Not verified" in answer.text
    assert "✓" not in answer.text
    fill(tmp_path / "other", made[:6], MAP, Ed25519PrivateKey.generate())
    other = reading_of(tmp_path / "other", MAP)
    assert proofs.checked(other.receipt(other.state().entries[2]).to_bytes(), _reading(client))["here"] == "another"
    fill(tmp_path / "forked", made[1:7], MAP, market_key)  # the same market signs another history
    forked = reading_of(tmp_path / "forked", MAP)
    assert proofs.checked(forked.receipt(forked.state().entries[2]).to_bytes(), _reading(client))["here"] == "differs"
    longer = reading_of(tmp_path / "forked", MAP)
    assert proofs.checked(data, longer)["here"] == "ahead"
    for one in (other, forked, longer):
        one.close()


def _reading(client) -> Reading:
    return client.reading


def test_aggregates_are_those_of_the_log(client, made):
    found = client.get("/aggregates.json").json()
    assert found["federation"]["releases"] == COUNT
    counted = Counter(domain_of(release.card.name) for release, _ in made)
    assert {one["domain"]: one["releases"] for one in found["domains"]} == counted
    assert "legal" in client.get("/aggregates").text


def test_the_log_shows_root_checkpoint_and_entries(client, reading, made):
    found = client.get("/log.json").json()
    assert (found["size"], found["checkpoint"]["size"], found["root"]) == (COUNT, COUNT, found["checkpoint"]["root"])
    assert found["checkpoint"]["note"].encode() == (reading.home / NEWEST).read_bytes()
    both = found["entries"] + client.get("/log.json?page=2").json()["entries"]
    assert [one["index"] for one in both] == list(range(COUNT))[::-1]
    assert client.get("/log?page=99999").status_code == 200


# It follows the market, and cannot write ----------------------------------------------------------------------------------


def test_what_comes_later_is_shown_and_what_was_taken_back_is_not(made, market_key, tmp_path):
    fill(tmp_path / "m", made[:4], MAP, market_key)
    reading = reading_of(tmp_path / "m", MAP)
    client = client_of(reading)
    before = client.get("/map")
    assert client.get("/map", headers={"if-none-match": before.headers["etag"]}).status_code == 304
    fill(tmp_path / "m", made[4:6], MAP, market_key)
    after = client.get("/map", headers={"if-none-match": before.headers["etag"]})
    assert after.status_code == 200
    assert client.get("/catalogue.json").json()["total"] == 6
    release, key = made[2]
    public = market_key.public_key().public_bytes_raw()
    data = sign_notice(Notice(Kind.WITHDRAWAL, public, release.owner, (release.release_id,)), key)
    store = Store.open(tmp_path / "m")
    store.append_notice(open_notice(data, public), data)
    store.close()
    assert release.card.name not in names(client, "")
    assert names(client, "show=gone") == [release.card.name]
    assert "Taken back" in client.get(f"/releases/{release.release_id.hex()}").text
    assert client.get("/log.json").json()["notices"] == [{"kind": "withdrawal", "owner": release.owner.hex(), "releases": 1}]
    assert client.get("/aggregates.json").json()["federation"]["releases"] == 5
    reading.close()


def test_a_release_whose_days_are_over_is_shown_as_such(client, made, monkeypatch):
    entry = client.reading.state().entries[0]
    for day, holds in ((entry.window.last, True), (entry.window.last + 1, False)):
        monkeypatch.setattr("market_node.page.reading.day_of", lambda seconds, day=day: day)
        shown = client.get(f"/releases/{entry.release_id}.json").json()["release"]
        assert (shown["holds"], shown["valid_until"]) == (holds, entry.window.dates["valid_until"])
        page = client.get(f"/releases/{entry.release_id}").text
        assert shown["valid_from"] in page
        assert ("It does not hold today" in page) == (not holds)
        assert ("does not hold today" in client.get("/").text) == (not holds)


def test_nothing_can_be_written_through_what_the_page_holds(reading, made):
    with pytest.raises(OperationalError, match="readonly"):
        reading.store.keep_cosigned("a", 1, b"x")
    with pytest.raises(UsageError, match="readonly"):
        reading._members.invite("somebody", int(time.time()) + 1000)
    writable = Store.beside(reading.home)
    writable.keep_cosigned("control", 1, b"x")
    assert writable.cosigned() == [b"x"]
    writable.close()


def test_a_folder_without_a_market_or_with_an_unknown_map_is_refused(tmp_path, made, market_key):
    with pytest.raises(NotFound, match="no market here yet"):
        Reading(tmp_path, "kme-lin-96")
    fill(tmp_path / "m", made[:1], MAP, market_key)
    with pytest.raises(UsageError, match="under the map"):
        Reading(tmp_path / "m", "kme-lin-96")


def test_a_market_without_releases_has_pages(tmp_path):
    Store.open(tmp_path / "m").close()
    client = client_of(reading_of(tmp_path / "m", MAP))
    for path in ("/", "/map", "/log", "/health"):
        assert client.get(path).status_code == 200, path
    assert client.get("/aggregates").status_code == 404
    assert client.get("/healthz").status_code == 503


# Twins, headers, strangers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_page_has_a_twin_and_links_to_it(client, path):
    page = client.get(f"{path}?q=legal")
    twin = TWINS.get(path, f"{path}.json")
    assert f'href="{twin}?q=legal"' in page.text
    assert client.get(twin).json()["schema"].startswith("veilmart.page-")


@pytest.mark.parametrize("path", [*PATHS, "/releases/00000000", "/static/style.css", "/healthz", "/metrics", "/nothing"])
def test_every_answer_has_the_policy_and_names_no_other_host(client, path):
    answer = client.get(path)
    assert answer.headers["content-security-policy"] == POLICY
    assert "set-cookie" not in answer.headers
    assert not re.search(r"(?:src|href|action)=\"(?:https?:)?//", answer.text)


def test_what_a_stranger_wrote_on_a_card_is_text_everywhere(client, made):
    release = made[7][0]
    paths = [
        "/",
        "/map",
        "/log",
        f"/releases/{release.release_id.hex()}",
        "/?q=alert",
        f"/?licence={HOSTILE[:150]}",
        f"/map?q={HOSTILE[:150]}",
    ]
    for path in paths:
        page = client.get(path)
        tags = Tags(page.text).found
        assert [attributes.get("src") for tag, attributes in tags if tag == "script"] == ["/static/vendor/htmx-4.0.1.min.js"], path
        assert not [name for _, attributes in tags for name in attributes if name == "style" or name.startswith("on")], path
        assert "49" not in re.findall(r"alert[^<]{0,80}", page.text)
    assert "alert(1)" in client.get(f"/releases/{release.release_id.hex()}").text, "the control: the text is there"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/?q=" + "a" * 201, 400),
        ("/?sort=password", 400),
        ("/?order=sideways", 400),
        ("/?adapter=1", 400),
        ("/?show=secret", 400),
        ("/?epsilon=nan", 400),
        ("/?records=1e", 400),
        ("/?page=0", 400),
        ("/?page=-1", 400),
        ("/?page=" + "9" * 150, 400),
        ("/?page=999999", 200),
        ("/?" + "&".join(f"x{n}=1" for n in range(500)), 200),
        ("/?q=%00%ff%ed%a0%80", 200),
        ("/log?page=x", 400),
        ("/releases/zz", 404),
        ("/releases/" + "a" * 64, 404),
        ("/releases/" + "A" * 64, 404),
        ("/releases/abc", 404),
        ("/releases/..%2f..%2fmarket.key", 404),
        ("/releases/%00", 404),
        ("/releases/00000000.receipt", 404),
        ("/static/../../market.key", 404),
        ("/static/%2e%2e/%2e%2e/site.py", 404),
        ("/static//etc/passwd", 404),
        ("/market.db", 404),
        ("/.git/config", 404),
        ("/releases", 404),
    ],
)
def test_odd_addresses_get_an_answer_and_nothing_else(client, path, status):
    for asked in (path, path.replace("/?", "/catalogue.json?")):
        answer = client.get(asked, follow_redirects=False)
        assert answer.status_code == status, answer.text[:300]
        assert "Traceback" not in answer.text
        assert "market.key" not in answer.headers.get("location", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_pages_only_answer_to_be_read(client, method):
    for path in ("/", "/map", "/health", "/log", "/catalogue.json", "/metrics", "/static/style.css"):
        assert client.request(method, path).status_code == 405


@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"data": {"proof": ""}}, 422),
        ({"data": {"proof": "not a proof!"}}, 400),
        ({"data": {"proof": "00"}}, 422),
        ({"data": {"other": "1"}}, 422),
        ({"content": b"{}", "headers": {"content-type": "application/json"}}, 400),
        ({"files": {"file": ("../../x", b"\0" * (proofs.MAX_BYTES + 8192))}}, 413),
        ({"files": {"file": ("x.tar", bytes(257) + b"ustar\x0000" + bytes(2000))}}, 422),
    ],
)
def test_the_proof_checker_takes_anything_and_keeps_nothing(client, reading, form, status):
    before = {path.name: path.stat().st_mtime_ns for path in reading.home.rglob("*") if path.suffix != ".db-shm"}
    answer = client.post("/log/check", **form)
    assert answer.status_code == status, answer.text
    assert "✓ Verified" not in answer.text
    assert {path.name: path.stat().st_mtime_ns for path in reading.home.rglob("*") if path.suffix != ".db-shm"} == before


def test_pasted_text_is_read_as_hexadecimal_or_base64():
    assert proofs.bytes_of(" 0a FF\n") == b"\n\xff"
    assert proofs.bytes_of("aGVs\nbG8h") == b"hello!"
    with pytest.raises(UsageError):
        proofs.bytes_of("aGVsb")


# Condition ----------------------------------------------------------------------------------------------------------------


def test_times_are_the_ends_of_the_buckets_that_hold_them():
    from prometheus_client import generate_latest

    metrics = Metrics()
    for seconds in [0.002] * 90 + [0.04] * 9 + [1000.0]:
        metrics._seconds.labels("Match").observe(seconds)
        metrics._calls.labels("Match", "OK").inc()
    metrics._calls.labels("Publish", "PERMISSION_DENIED").inc(3)
    found = read_counts(generate_latest(metrics.registry).decode())
    calls = {one["call"]: one for one in found["calls"]}
    assert calls["Match"] == {"call": "Match", "ok": 100, "other": 0, "p50_ms": 2.5, "p95_ms": 50.0}
    assert calls["Publish"] == {"call": "Publish", "ok": 0, "other": 3, "p50_ms": None, "p95_ms": None}
    assert set(calls) <= set(CALLS)
    assert read_counts("") == {"counted": False, "calls": [], "queries": None, "uploads": None, "unsent_bytes": None, "started": None}


def test_counts_are_for_this_machine_alone(client, reading):
    assert "veilmart_page_answers_total" in client.get("/metrics").text
    assert client.get("/metrics", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 403
    assert client_of(reading, show_counts=False).get("/metrics").status_code == 404
    client.get("/releases/" + "canary" * 3)
    client.get("/?q=canary")
    assert "canary" not in client.get("/metrics").text


def test_a_checkpoint_that_is_not_the_markets_own_is_not_believed(made, market_key, tmp_path):
    fill(tmp_path / "m", made[:3], MAP, market_key)
    note = (tmp_path / "m" / NEWEST).read_bytes()
    (tmp_path / "m" / NEWEST).write_bytes(note.replace(b"\n3\n", b"\n2\n"))
    assert reading_of(tmp_path / "m", MAP).market_key is None
    with pytest.raises(InvalidSignature, match="checkpoint"):
        reading_of(tmp_path / "m", MAP, market_key.public_key().public_bytes_raw()).checkpoint()
