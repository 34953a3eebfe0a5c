"""The report: each number names its command, the page is drawn from the JSON alone, hazards turn red, nothing private comes along."""

import copy
import json
import re
from html import unescape
from pathlib import Path

import jsonschema
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from nodes.audit.node import Deployment, audit_node
from nodes.audit.report import HAZARDS, NOT_PROTECTED, TAKEN, UNPROTECTED, build_report, to_json
from nodes.audit.report_page import page
from nodes.audit.results import result_of_release, result_of_specification
from nodes.audit.specification import audit_specification
from nodes.command import build
from protocol.errors import FormatError
from protocol.privacy import Guarantee
from tests.market_node.market import running_market
from tests.protocol.worlds import ADAPTER, envelope_of, release_of, small_map

MAP = small_map()
SCHEMA = json.loads((Path(__file__).parent.parent.parent / "docs" / "schemas" / "audit-report-1.json").read_text())
LEDGER = {
    "schema": "veilmart.ledger/1", "population": "default", "unit": "record", "entries": [{"number": 1}], "chain": "verified",
    "compared": True, "spent": 1.2345678, "left": 2.7654322, "budget": 4.0, "delta": 1e-6, "epsilon_prv": None,
}  # fmt: skip
MARKET = {
    "schema": "veilmart.audit-market/1", "market_key": "ab" * 32, "size": 3, "root": "cd" * 32, "known_size": 2, "refuted": False,
    "checks": [{"name": name, "holds": True, "evidence": "3 of 3"} for name in ("log", "releases", "plausible", "answers")], "flags": [],
}  # fmt: skip


def release_result(**how) -> dict:
    return result_of_release(release_of(MAP, Ed25519PrivateKey.generate(), **how), MAP, 2.0, 50)


@pytest.fixture(scope="module")
def specification():
    return result_of_specification(audit_specification(Guarantee(1.0, 1e-6), 32, 60), 32, None)


@pytest.fixture(scope="module")
def report(specification):
    return build_report([release_result(), specification, MARKET, LEDGER], "2026-01-31", "0.1")


def numbers(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?", text))


def shown(html: str) -> str:
    """Return what a reader sees: the body without its markup."""
    body = html.split("</head>")[1]
    return unescape(re.sub(r"<[^>]+>", " ", body))


def invented(html: str, data: bytes) -> set[str]:
    return numbers(shown(html)) - numbers(data.decode())


def state(report, name: str) -> str:
    return next(hazard["state"] for hazard in report["hazards"] if hazard["name"] == name)


def test_a_report_follows_its_published_schema(report):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(to_json(report)), SCHEMA)


def test_a_figure_without_its_command_is_no_report(report):
    broken = copy.deepcopy(report)
    figure = next(part["figures"][0] for section in broken["sections"] for part in section["parts"])
    del figure["command"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_every_number_on_the_page_is_in_the_json(report):
    data = to_json(report)
    html = page(json.loads(data))
    assert len(numbers(shown(html))) > 20
    assert invented(html, data) == set()


def test_a_number_that_is_not_in_the_json_would_be_noticed(report):
    data = to_json(report)
    html = page(json.loads(data))
    assert invented(html.replace("</main>", "<p>accuracy 98.7 %</p></main>"), data) == {"98.7"}
    changed = copy.deepcopy(report)
    changed["sections"][0]["parts"][0]["figures"][0]["value"] = 31337
    assert "31337" in invented(page(changed), data)


def test_the_page_is_drawn_from_the_json_alone(report):
    """Whoever has the file draws the same page, and what is changed in the file changes on the page."""
    html = page(json.loads(to_json(report)))
    assert page(json.loads(to_json(report))) == html
    changed = json.loads(to_json(report))
    changed["hazards"][0]["means"] = "<script>alert(1)</script>"
    assert "&lt;script&gt;" in page(changed), "text is text"


def test_the_page_has_no_script_and_may_load_nothing(report):
    html = page(json.loads(to_json(report)))
    assert "default-src 'none'; style-src 'unsafe-inline'" in html
    assert not re.search(r"<script|<link|<img|<iframe|\son\w+=|src=|url\(|@import|https?:", html)
    assert "prefers-color-scheme: dark" in html
    assert "<svg" in html


def test_an_honest_deployment_shows_no_hazard(report):
    assert [hazard["name"] for hazard in report["hazards"] if hazard["state"] == "present"] == []
    assert not report["summary"]["refuted"]
    assert report["summary"]["hazards_absent"] >= 8


def test_what_nobody_looked_at_is_said():
    report = build_report([release_result()], "2026-01-31", "0.1")
    assert state(report, "insecure transport") == "not examined"
    told = next(section["text"] for section in report["sections"] if section["id"] == "ledger")
    assert any(line.startswith("Not examined") for line in told)


@pytest.mark.parametrize("hazard", [hazard for hazard in HAZARDS if hazard.shown_by], ids=lambda hazard: hazard.name)
def test_a_failed_check_turns_its_hazard_red(hazard):
    for schema, name in hazard.shown_by:
        for holds, expected in ((True, "absent"), (False, "present"), (None, "not examined")):
            result = {"schema": schema, "refuted": not holds, "checks": [{"name": name, "holds": holds, "evidence": "seen"}]}
            if name == UNPROTECTED:  # how a report calls it
                result |= {"guarantee": "none", "checks": [{"name": "membership", "holds": holds, "evidence": "seen"}]}
            if schema == "veilmart.audit-release/1":
                result |= {"title": "a@0", "epsilon": 1.0, "delta": 1e-6, "unit": "record"}
            report = build_report([result], "2026-01-31", "0.1")
            assert state(report, hazard.name) == expected
            jsonschema.validate(report, SCHEMA)


def test_hazards_name_checks_that_the_audits_make(specification):
    """A check that is renamed would never turn its hazard red again."""
    made = {"release": {check["name"] for check in release_result()["checks"]} | {"log"}}
    made |= {"specification": {check["name"] for check in specification["checks"]}}
    made |= {
        "market": {"log", "releases", "plausible", "aggregates", "answers"}
    }  # see test_the_command_writes_both_files_and_says_what_is_red
    for hazard in HAZARDS:
        for schema, name in hazard.shown_by:
            audit = schema.removeprefix("veilmart.audit-").removesuffix("/1")
            assert audit not in made or name in made[audit], (hazard.name, name)


@pytest.mark.slow
def test_hazards_of_a_node_are_looked_for_by_audit_node(tmp_path):
    looked = {look.name for look in audit_node(Deployment(tmp_path, tmp_path, tmp_path / "socket"))}
    assert {name for hazard in HAZARDS for schema, name in hazard.shown_by if schema == "veilmart.audit-node/1"} <= looked


def test_seeded_noise_and_an_unprotected_adapter_are_red_in_real_audits():
    report = build_report([release_result(simulated=True, adapter=ADAPTER)], "2026-01-31", "0.1")
    assert state(report, "seeded noise") == state(report, "adapter without differential privacy") == "present"
    assert report["summary"]["refuted"]
    assert "A claim is refuted" in page(report)


def test_nothing_for_the_owners_eyes_comes_along(specification):
    attack = {"name": "membership", "holds": False, "evidence": "AUC 0.4711 over 4711 records"}
    training = {"schema": "veilmart.audit-training/1", "guarantee": "none", "checks": [attack], "refuted": False, "membership": {"n": 4711}}
    private = {**specification, "membership": {"members": 4711, "ours": {"auc": 0.5662}}, "records": 4711, "losses": [4711]}
    data = to_json(build_report([private, training, {**LEDGER, "records": 4711}], "2026-01-31", "0.1"))
    assert b"4711" not in data
    assert b"AUC" not in data
    assert "membership" not in TAKEN["veilmart.audit-specification/1"], "the list is what keeps it out"


def test_what_is_no_audit_is_refused():
    for result in ({}, {"schema": "veilmart.plan/1"}, {"schema": 3}, {"schema": "veilmart.audit-node/1", "checks": [{"name": "x"}]}):
        with pytest.raises(FormatError):
            build_report([result], "2026-01-31", "0.1")


def results_of(specification) -> list[dict]:
    bundle = {
        "schema": "veilmart.audit-bundle/1", "fingerprint": "ef" * 32, "market_key": "ab" * 32, "size": 1, "complete": True,
        "releases": [release_result()], "refuted": False,
    }  # fmt: skip
    flagged = {**MARKET, "flags": [{"title": "x@0", "reason": "a copy"}]}
    return [release_result(), specification, flagged, LEDGER, bundle]


def test_a_file_with_odd_values_is_refused_or_makes_a_valid_report(specification):
    """Whatever stands in a file of --with: a report that follows its schema and can be drawn, or one clear error."""
    odd = [
        None,
        "x",
        -1,
        1e400,
        float("nan"),
        True,
        [],
        {},
        [{}],
        [1],
        {"schema": 1},
        [{"name": 1, "holds": "x", "evidence": None}],
        "1" * 5000,
    ]
    refused = 0
    for result in results_of(specification):
        for name in result:
            for value in odd:
                try:
                    report = build_report([{**result, name: value}], "2026-01-31", "0.1")
                except FormatError:
                    refused += 1
                    continue
                jsonschema.validate(json.loads(to_json(report)), SCHEMA)
                page(report)
    assert refused > 200


def test_what_cannot_be_protected_stands_in_every_report(report):
    html = unescape(page(report))
    assert all(line in html for line in NOT_PROTECTED)


def test_the_command_writes_both_files_and_says_what_is_red(tmp_path, capsys):
    (tmp_path / "small.map").write_bytes(MAP.manifest)
    (tmp_path / "ledger.json").write_text(json.dumps(LEDGER))
    key = Ed25519PrivateKey.generate()
    with running_market(tmp_path / "m", MAP) as (address, ca, _):
        from nodes.market_client import MarketClient

        with MarketClient(address, ca, tmp_path / "home") as client:
            receipt = client.publish(envelope_of(MAP, key))
        (tmp_path / "home" / "receipts").mkdir()
        (tmp_path / "home" / "receipts" / "a.receipt").write_bytes(receipt.to_bytes())
        words = ["audit", "report", "--out", str(tmp_path / "out"), "--home", str(tmp_path / "home"), "--map", str(tmp_path / "small.map")]
        words += ["--with", str(tmp_path / "ledger.json"), "--market", address, "--ca", str(ca), "--releases", "150", "--json"]
        code = build(None)(words, standalone_mode=False)
    written = json.loads(capsys.readouterr().out)
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    assert (code or 0, written["audits"], written["refuted"]) == (0, 4, False)
    assert [entry["command"] for entry in report["results"]] == [
        "veilmart audit release", "veilmart audit specification", "veilmart audit market", "veilmart node ledger",
    ]  # fmt: skip
    assert {check["name"] for check in report["results"][2]["result"]["checks"]} == {
        "log",
        "releases",
        "plausible",
        "aggregates",
        "answers",
    }
    jsonschema.validate(report, SCHEMA)
    html = (tmp_path / "out" / "report.html").read_text()
    assert html == page(report)
    assert invented(html, (tmp_path / "out" / "report.json").read_bytes()) == set()
