"""The auditor's report: what the audits found, collected into one JSON object from which its page is drawn (nodes/audit/report_page.py).

The object follows docs/schemas/audit-report-1.json.  Every figure and every check in it names the command that made it.  Of each result
only fields that are listed here are taken, so nothing that is for the owner's eyes alone can come along: no attack on private records,
no number of records.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from protocol.errors import FormatError

SCHEMA = "veilmart.audit.report/1"
LARGEST_WHOLE = 1e9
BEYOND = 1e300  # no figure comes near it, and neither infinity nor NaN is below it
MOST_EVIDENCE = 3  # shown beside a hazard; all of it stands in the sections
DIGITS = 4  # significant ones of a figure; the results themselves are in the report too
CHECKS = ("checks", "refuted")
MEMBERSHIP, UNPROTECTED = "membership", "membership, no guarantee"  # a check on private records, and its name where nothing was claimed
RELEASE, BUNDLE = "veilmart.audit-release/1", "veilmart.audit-bundle/1"
TAKEN = {
    RELEASE: ("release_id", "title", "epsilon", "delta", "unit", *CHECKS),
    BUNDLE: ("fingerprint", "market_key", "size", "complete", "releases", "refuted"),
    "veilmart.audit-specification/1": (
        "epsilon", "delta", "dimension", "releases", "tests", "confidence", "expected_lower_bound", "epsilon_lower_bound", "ratio", *CHECKS,
    ),
    "veilmart.audit-training/1": (
        "kind", "guarantee", "epsilon", "delta", "noise_multiplier", "sampling_rate", "steps", "canaries", "power_against_half_the_noise",
        "confidence", "expected_lower_bound", "epsilon_lower_bound", "ratio", "one_run_lower_bound", *CHECKS,
    ),
    "veilmart.audit-market/1": ("market_key", "size", "root", "known_size", "flags", *CHECKS),
    "veilmart.audit-node/1": CHECKS,
    "veilmart.sim/2": ("top1", "top3", "simulated_noise", "digest"),
    "veilmart.ledger/1": ("population", "unit", "chain", "compared", "spent", "left", "budget", "delta", "epsilon_prv"),
    "veilmart.verified-bundle/1": ("fingerprint", "market_key", "size", "root", "complete"),
}  # fmt: skip
TEXTS = {
    "schema", "kind", "guarantee", "title", "unit", "release_id", "fingerprint", "market_key", "root", "population", "chain", "digest",
}  # fmt: skip
TRUTHS = {"refuted", "complete", "compared", "simulated_noise"}
NEEDED = {
    RELEASE: ("title", "epsilon", "delta", "unit", *CHECKS),
    BUNDLE: ("releases", "refuted"),
    "veilmart.audit-node/1": CHECKS,
}
COMMAND = {
    RELEASE: "veilmart audit release",
    BUNDLE: "veilmart audit release",
    "veilmart.audit-specification/1": "veilmart audit specification",
    "veilmart.audit-training/1": "veilmart audit training",
    "veilmart.audit-market/1": "veilmart audit market",
    "veilmart.audit-node/1": "veilmart audit node",
    "veilmart.sim/2": "veilmart simulate",
    "veilmart.ledger/1": "veilmart node ledger",
    "veilmart.verified-bundle/1": "veilmart verify bundle",
}


@dataclass(frozen=True, slots=True)
class Hazard:
    """One way in which a deployment can void its guarantee, and the checks, by audit and name, that would show it."""

    name: str
    means: str
    shown_by: tuple[tuple[str, str], ...]


def _by(audit: str, *names: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"veilmart.audit-{audit}/1", name) for name in names)


HAZARDS = (
    Hazard("floating-point noise", "the last digits of a float tell what the noise was added to", _by("specification", "integers")),
    Hazard(
        "seeded noise", "whoever knows the seed subtracts the noise",
        _by("specification", "independent") + _by("training", "independent") + _by("release", "not simulated") + _by("node", "noise"),
    ),
    Hazard(
        "no bounding", "one long record shifts the sums beyond the noise",
        _by("specification", "bounded") + _by("training", "bounded") + _by("node", "bounding"),
    ),
    Hazard(
        "less noise than claimed", "epsilon is larger than what is stated",
        _by("release", "noise", "epsilon", "residual") + _by("specification", "empirical epsilon")
        + _by("training", "empirical epsilon", "noise", "noise multiplier"),
    ),
    Hazard("unlimited or refreshed budget", "releases add up beyond every claim", _by("node", "budget", "ledger", "market log")),
    Hazard(
        "adapter without differential privacy", "training data can be told from its weights",
        _by("release", "adapter") + _by("training", UNPROTECTED),
    ),
    Hazard("adapter labelled private that is not", "its epsilon is a false claim", _by("training", "membership") + _by("node", "adapter")),
    Hazard("padded batches", "the features of one record depend on the others, so one record moves many rows", _by("node", "batches")),
    Hazard("too few records", "a specification of few says little and is close to everything", _by("release", "admission")),
    Hazard("private files open to others", "whoever reads them needs no attack", _by("node", "permissions", "socket")),
    Hazard("code of others beside the records", "a bundle that runs as the guard's user reads everything", _by("node", "isolation")),
    Hazard("no limits in writing", "others decide how often and how long the guard works", _by("node", "policy")),
    Hazard("telemetry", "a library tells somebody that and when it is used", _by("node", "telemetry")),
    Hazard("rewritten journal", "what was done here can be denied", _by("node", "journal")),
    Hazard("insecure transport", "somebody between node and market reads or changes what is sent", _by("node", "tls")),
    Hazard("side channel", "how long an answer takes tells about the data", _by("node", "constant-time replies")),
    Hazard("market rewrites its history", "a release is swapped or dropped", _by("market", "log", "releases") + _by("release", "log")),
    Hazard("market answers wrongly", "a querier is led to another specialist", _by("market", "answers", "aggregates")),
    Hazard("implausible or copied releases", "a forger takes an honest owner's place", _by("market", "plausible")),
    Hazard("people with many records", "with a record as the unit, epsilon does not hold for somebody who has several", ()),
    Hazard("choices made on the data and not counted", "tuning on private records spends budget that no ledger shows", ()),
)  # fmt: skip

NOT_PROTECTED = (
    "A specification, once released, is public for ever: epsilon bounds what it tells about one unit, not about the data set's topic.",
    "Epsilon holds for the declared unit alone; records of one family, or copies, weaken it.",
    "An owner can lie about data or count. A signature shows who said it, not that it is true.",
    "An adapter trained without differential privacy leaks whatever its specification does.",
    "Weights can carry backdoors.",
    "A market can refuse service. It sees who connects, when, and which learnware is fetched.",
    "Nothing helps where the owner's own machine is in somebody else's hands.",
    "Nothing can be taken back from an append-only log: personal data must never be in one.",
)
TRUST = (
    "The owner's guard is trusted with the records, the noise, the ledger and the key; nothing else on the owner's side is.",
    "The market is trusted with nothing about the records and nothing about a query: releases are private before they reach it, queries "
    "are encrypted, answers are signed and can be evaluated again.",
    "Owners are trusted to have the data that they claim. Witnesses are trusted, where some are named, to sign one log only.",
)
SECTIONS = (  # id, title, schemas whose results stand there, what is said anyway
    ("parameters", "Parameters", (RELEASE, BUNDLE), (
        "Neighbours are data sets that differ by adding or removing one unit. Gaussians compose exactly, whatever is sampled by a filter "
        "of Renyi divergences (docs/privacy.md, P3). Sensitivity is bounded by an exact check on integers (P1).",)),
    ("mechanism", "Mechanism and correctness", ("veilmart.audit-specification/1", "veilmart.audit-training/1"), (
        "A specification is an integer sum of bounded vectors with discrete Gaussian noise of the operating system (docs/privacy.md, P2). "
        "An audit cannot show that a mechanism is private: it fails to show that it is not.",)),
    ("trust", "Trust model", (), TRUST),
    ("deployment", "Deployment security", ("veilmart.audit-node/1",), ()),
    ("exposure", "Data exposure", (), (
        "Records stay with the owner's guard; what leaves is a specification, the card and, if one is published, an adapter. "
        "`veilmart explain` names every field that a command sends.",
        "Not examined: how the records were collected and prepared. Preparation that depended on them is covered by no epsilon here.")),
    ("ledger", "Ledger", ("veilmart.ledger/1",), (
        "One ledger counts everything made from one population, adapters included; the charge and the noisy bytes are one transaction.",)),
    ("utility", "Utility", ("veilmart.sim/2",), (
        "What an epsilon costs in matches is measured on public tasks; a figure by domain and size of the data set is in docs/results.",)),
    ("catalogue", "Catalogue evidence", ("veilmart.audit-market/1", "veilmart.verified-bundle/1"), ()),
    ("not-protected", "Not protected", (), NOT_PROTECTED),
    ("assessment", "For an impact assessment", (), (
        "Purpose: finding a specialist without showing records or task. Risk that remains: the list above, bounded for one unit by the "
        "epsilon of each release and by the ledger's total. Erasure: delete data and adapters at the owner; what is in the log stays.",
        "What only the owner can state is not examined here: where the records come from, on which ground they are processed, how long "
        "they are kept, who has access, and whether they were selected in view of earlier releases.")),
)  # fmt: skip


def build_report(results: Sequence[Mapping[str, Any]], on: str, version: str) -> dict[str, Any]:
    """Return the report of these results, each as its command printed it; `on`: the day.  Raises FormatError for one that is no audit's."""
    taken = [taken_of(result) for result in results]
    sections = []
    for name, title, schemas, text in SECTIONS:
        parts = [_part(number, result) for number, result in enumerate(taken) if result["schema"] in schemas]
        if schemas and not parts:
            text = (
                *text,
                "Not examined: " + " or ".join(sorted({COMMAND[schema] for schema in schemas})) + " was not run for this report.",
            )
        sections.append({"id": name, "title": title, "text": list(text), "parts": parts})
    hazards = [_hazard(hazard, taken) for hazard in HAZARDS]
    counts = {state: sum(hazard["state"] == state for hazard in hazards) for state in ("present", "absent", "not examined")}
    refuted = [number for number, result in enumerate(taken) if result.get("refuted")]
    return {
        "schema": SCHEMA, "on": on, "version": version, "python": platform.python_version(),
        "summary": {
            "claim": _claim(taken), "refuted": bool(refuted), "audits": len(taken), "refuted_audits": len(refuted),
            "hazards_present": counts["present"], "hazards_absent": counts["absent"], "hazards_not_examined": counts["not examined"],
            "command": "veilmart audit report",
        },
        "hazards": hazards, "sections": sections,
        "results": [{"command": COMMAND[result["schema"]], "result": result} for result in taken],
    }  # fmt: skip


def taken_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a report takes of a result: the listed fields."""
    schema = result.get("schema")
    if not isinstance(schema, str) or schema not in TAKEN:
        raise FormatError(
            f"report: expected the JSON of an audit, got {schema!r}" if isinstance(schema, str) else "report: a file without a schema",
            hint=f"the output of {', '.join(sorted({command.removeprefix('veilmart ') for command in COMMAND.values()}))} with --json",
        )
    taken: dict[str, Any] = {"schema": schema, **{name: result[name] for name in TAKEN[schema] if result.get(name) is not None}}
    if not all(_form_of(schema, name)(value) for name, value in taken.items()) or not set(NEEDED.get(schema, ())) <= set(taken):
        raise FormatError(f"report: {schema}: not in the form that its command prints")
    if "checks" in taken:
        taken["checks"] = [_shareable(check, result) for check in taken["checks"]]
    if "flags" in taken:
        taken["flags"] = [{"title": flag["title"], "reason": flag["reason"]} for flag in taken["flags"]]
    if isinstance(taken.get("releases"), list):
        taken["releases"] = [taken_of(release) for release in taken["releases"]]
    return taken


def _form_of(schema: str, name: str) -> Callable[[Any], bool]:
    """Return what tells whether a field that came from a file holds what its name promises; what is not named below is a number."""
    if name == "checks":
        return _are_checks
    if name == "flags":
        return lambda value: isinstance(value, list) and all(_has_texts(flag, "title", "reason") for flag in value)
    if name == "releases" and schema == BUNDLE:  # their audits; elsewhere it is how many were drawn
        return lambda value: isinstance(value, list) and all(isinstance(one, dict) and one.get("schema") == RELEASE for one in value)
    if name in TEXTS:
        return lambda value: isinstance(value, str)
    if name in TRUTHS:
        return lambda value: isinstance(value, bool)
    return _is_number


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < BEYOND


def _are_checks(value: Any) -> bool:
    return isinstance(value, list) and all(
        _has_texts(check, "name", "evidence") and "holds" in check and (check["holds"] is None or isinstance(check["holds"], bool))
        for check in value
    )


def _has_texts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in names)


def _shareable(check: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a check without the figures of an attack on private records: whether it holds is told, and by how much is the owner's."""
    if check["name"] == MEMBERSHIP:
        name = UNPROTECTED if result.get("guarantee") == "none" else MEMBERSHIP
        return {"name": name, "holds": check["holds"], "evidence": "the figures of this attack stay with the owner"}
    return {name: check[name] for name in ("name", "holds", "evidence")}


def to_json(report: Mapping[str, Any]) -> bytes:
    """Return the bytes of a report's file."""
    return (json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _part(number: int, result: Mapping[str, Any]) -> dict[str, Any]:
    """Return one result as people read it: figures, checks, and a picture where one says more; `number`: of it among the results."""
    command = COMMAND[result["schema"]]
    figures = [
        {"name": name.replace("_", " "), "value": _rounded(value), "command": command}
        for name, value in result.items()
        if name not in ("schema", "refuted") and isinstance(value, str | int | float)
    ]
    checks = [{**check, "command": command} for check in result.get("checks", [])]
    for release in result.get("releases", []) if isinstance(result.get("releases"), list) else []:
        checks += [{**check, "name": f"{release['title']}: {check['name']}", "command": command} for check in release["checks"]]
    checks += [
        {"name": f"flagged {flag['title']}", "holds": False, "evidence": flag["reason"], "command": command}
        for flag in result.get("flags", [])
    ]
    part: dict[str, Any] = {
        "result": number,
        "title": result.get("title", command),
        "command": command,
        "figures": figures,
        "checks": checks,
    }
    bars = _bars(result)
    if bars:
        part["picture"] = {
            "title": bars[0],
            "command": command,
            "bars": [{"label": label, "value": _rounded(value)} for label, value in bars[1]],
        }
    return part


def _bars(result: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]] | None:
    if "epsilon_lower_bound" in result and "epsilon" in result:
        bars = [("claimed", result["epsilon"]), ("shown by the attack", result["epsilon_lower_bound"])]
        if "expected_lower_bound" in result:
            bars.insert(1, ("expected if honest", result["expected_lower_bound"]))
        return "epsilon", bars
    if {"spent", "left", "budget"} <= set(result):
        return "epsilon of the population", [("budget", result["budget"]), ("spent", result["spent"]), ("left", result["left"])]
    return None


def _rounded(value: str | int | float) -> str | int | float:
    if not isinstance(value, float):
        return value
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < LARGEST_WHOLE else short


def _releases(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    found = [result for result in results if result["schema"] == RELEASE]
    for result in results:
        if result["schema"] == BUNDLE:
            found += result["releases"]
    return found


def _claim(results: Sequence[Mapping[str, Any]]) -> str:
    releases = _releases(results)
    if not releases:
        return "No release was audited for this report."
    largest = max(releases, key=lambda release: float(release["epsilon"]))
    count = "1 release" if len(releases) == 1 else f"{len(releases)} releases"
    units = " and ".join(sorted({str(release["unit"]) for release in releases}))
    return (
        f"{count}, each at most epsilon {_rounded(largest['epsilon'])} at delta {largest['delta']} "
        f"against adding or removing one unit ({units})."
    )


def _hazard(hazard: Hazard, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return whether the results show a hazard: present where one check fails, absent where some were made and all hold."""
    seen = [
        (check, COMMAND[result["schema"]])
        for result in [*results, *(release for one in results if one["schema"] == BUNDLE for release in one["releases"])]
        for check in result.get("checks", [])
        if (result["schema"], check["name"]) in hazard.shown_by and check["holds"] is not None
    ]
    failed = [(check, command) for check, command in seen if not check["holds"]]
    state = "present" if failed else "absent" if seen else "not examined"
    commands = sorted({COMMAND[schema] for schema, _ in hazard.shown_by})
    evidence: list[dict[str, Any]] = []
    for check, command in failed or seen:
        entry = {"name": check["name"], "holds": check["holds"], "evidence": check["evidence"], "command": command}
        if entry not in evidence and len(evidence) < MOST_EVIDENCE:
            evidence.append(entry)
    return {"name": hazard.name, "means": hazard.means, "state": state, "evidence": evidence, "examined_by": commands}
