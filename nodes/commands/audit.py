"""The auditor's commands: `audit release`, `audit specification`, `audit market`, `audit report`, `audit export`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nodes.commands.options import (
    Authority,
    Base,
    Home,
    Json,
    Map,
    MarketAddress,
    MaybeAuthority,
    MaybeMarket,
    read_bytes,
    show,
)
from nodes.home import open_model
from protocol.errors import CheckFailed, UsageError

REFUTED = CheckFailed.exit_code  # a claim is shown to be false
ATTACKED = 2_000  # pairs of releases that the membership attack looks at: its AUC is known to about 0.007


def audit_release(
    file: Annotated[
        Path, typer.Argument(help="A receipt (`node publish`, `catalogue receipt`), a signed release, or evidence (`audit export`).")
    ],
    which_map: Map = "kme-lin-96",
    largest_epsilon: Annotated[float, typer.Option("--largest-epsilon", help="The market's limit.")] = 2.0,
    smallest_count: Annotated[int, typer.Option("--smallest-count", min=1, help="The market's limit.")] = 50,
    as_json: Json = False,
) -> None:
    """Recompute what a release claims, offline: noise, epsilon, admission, map, its place in the log.  Exit code 4 if a claim is false.

    An adapter without differential privacy, or a map that is not at hand, is reported, and is no false claim.

    Example: veilmart audit release notes.receipt
    """
    from nodes.audit.results import result_of_file
    from protocol.features import open_map

    try:
        result = result_of_file(file, open_map(which_map), largest_epsilon, smallest_count)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    lines = []
    for release in result.get("releases", [result]):
        lines += [release["title"], *_lines(release["checks"])]
    show(result, as_json, lines)
    if result["refuted"]:
        raise typer.Exit(REFUTED)


def audit_specification(
    home: Home,
    data: Annotated[
        Path | None, typer.Option("--data", help="Your records: also attack their membership, and show what a reduced set would leak.")
    ] = None,
    strangers: Annotated[
        Path | None, typer.Option("--strangers", help="Records of the same task that are not among them.", show_default="half of --data")
    ] = None,
    epsilon: Annotated[float, typer.Option("--epsilon", help="The claim to test.")] = 1.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta of the claim.")] = 1e-6,
    releases: Annotated[int, typer.Option("--releases", min=10, help="Draw so many; more show more.")] = 12_000,
    records: Annotated[int | None, typer.Option("--records", min=3, help="At most so many of --data.")] = None,
    which_map: Map = "kme-lin-96",
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Attack the mechanism that makes specifications, and say what epsilon that shows.  Exit code 4 if it refutes the claim.

    Every release of an audit is drawn here, for the audit alone: nothing is published, sent or charged.  What is printed about --data is
    for its owner's eyes.

    Example: veilmart audit specification --epsilon 1 --releases 500
    """
    from nodes import console
    from nodes.audit.results import result_of_specification
    from nodes.audit.specification import audit_specification, expected_epsilon
    from protocol.features import open_map
    from protocol.privacy import Guarantee

    guarantee, feature_map = Guarantee(epsilon, delta), open_map(which_map)
    expected = expected_epsilon(guarantee, feature_map.dimension, releases)
    if not as_json:
        console.say(f"{releases} releases: an honest mechanism will show an epsilon of about {expected:.2f} of {epsilon:g}")
    progress = console.ProgressLine(not as_json)
    members, others = _features(home, base, data, strangers, records, which_map, progress)
    audit = audit_specification(guarantee, feature_map.dimension, releases, records=members, on_progress=progress)
    attacks = None if members is None or others is None else _attacks(members, others, guarantee)
    progress.close()
    result = result_of_specification(audit, feature_map.dimension, attacks)
    lines = [*_lines(result["checks"]), f"shown over claimed: {audit.ratio:.3f}"]
    if attacks is not None:
        ours, theirs = attacks["ours"], attacks["reduced_set"]
        lines += [
            f"membership, ours         AUC {ours['auc']:.3f} +- {ours['error']:.3f}, at most {attacks['ceiling']['auc']:.3f}; "
            f"found at 1 % false alarms: {100 * ours['true_positives']:.1f} %, at most {100 * attacks['ceiling']['true_positives']:.1f} %",
            f"membership, reduced set  AUC {theirs['auc']:.3f}; found at 1 % false alarms: {100 * theirs['true_positives']:.0f} %; "
            f"{attacks['copies']} of its points are a record (no privacy: what other systems publish)",
        ]
    show(result, as_json, lines)
    if audit.refuted:
        raise typer.Exit(REFUTED)


def audit_market(
    home: Home,
    market: MarketAddress,
    ca: Authority,
    answers: Annotated[int, typer.Option("--answers", min=0, help="Ask so many encrypted queries and evaluate the answers again.")] = 3,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Check a market's log, re-verify every release, flag implausible ones and copies, and evaluate a sample of answers again.

    Exit code 4 if the market contradicts itself or answered wrongly; a flagged release is its owner's doing.

    Example: veilmart audit market --market 127.0.0.1:7443 --ca ca.crt
    """
    from nodes import console
    from nodes.audit.market import audit_market
    from nodes.audit.results import result_of_market
    from nodes.market_client import MarketClient
    from protocol.features import open_map

    progress = console.ProgressLine(not as_json)
    with MarketClient(market, ca, home) as client:
        audit = audit_market(client, open_map(which_map), answers, progress)
    progress.close()
    result = result_of_market(audit)
    show(result, as_json, [*_lines(result["checks"]), *(f"    flagged {flag.title}: {flag.reason}" for flag in audit.flags)])
    if result["refuted"]:
        raise typer.Exit(REFUTED)


def audit_report(
    home: Home,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write report.json and report.html into.")],
    results: Annotated[
        list[Path] | None, typer.Option("--with", metavar="FILE", help="JSON that another audit, or `node ledger`, printed; repeat it.")
    ] = None,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    epsilon: Annotated[float, typer.Option("--epsilon", help="The claim that the attack on the mechanism tests.")] = 1.0,
    releases: Annotated[int, typer.Option("--releases", min=0, help="Draw so many for that attack; 0: leave it out.")] = 500,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Collect what audits found into report.json, and draw report.html from it.  Exit code 4 if a claim is refuted.

    Runs the quick audits itself: of each receipt of this home, of the mechanism, and of the market if there is one.  Nothing that is for
    your eyes alone is taken from the files of --with: no attack on your records, no number of records.

    Example: veilmart audit report --out report --with training.json --with node.json
    """
    import datetime
    import json
    from importlib.metadata import version

    from nodes import console
    from nodes.audit.quick import quick_audits
    from nodes.audit.report import build_report, to_json
    from nodes.audit.report_page import page
    from nodes.audit.results import read_result
    from protocol.features import open_map
    from protocol.keys import write_durably

    if (market is None) != (ca is None):
        raise UsageError("audit report: expected --market and --ca, or neither")
    progress = console.ProgressLine(not as_json)
    found = quick_audits(home, market, ca, epsilon, releases, open_map(which_map), progress)
    progress.close()
    report = build_report(
        [*found, *map(read_result, results or ())], datetime.datetime.now(datetime.UTC).date().isoformat(), version("veilmart")
    )
    data = to_json(report)
    write_durably(out / "report.json", data, 0o644)
    write_durably(out / "report.html", page(json.loads(data)).encode(), 0o644)
    summary = report["summary"]
    result = {"schema": "veilmart.report-written/1", "json": str(out / "report.json"), "html": str(out / "report.html"), **summary}
    present = [f"    hazard: {hazard['name']}" for hazard in report["hazards"] if hazard["state"] == "present"]
    lines = [
        f"{summary['audits']} audits, {summary['refuted_audits']} refuted a claim; hazards: {summary['hazards_present']} present, "
        f"{summary['hazards_absent']} absent, {summary['hazards_not_examined']} not examined",
        *present,
        f"{out / 'report.html'} is drawn from {out / 'report.json'} alone",
    ]
    show(result, as_json, lines)
    if summary["refuted"]:
        raise typer.Exit(REFUTED)


def audit_export(
    home: Home,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    release: Annotated[
        list[str] | None, typer.Option("--release", metavar="ID", help="Only this release of the market; repeat it.")
    ] = None,
    receipt: Annotated[
        list[Path] | None, typer.Option("--receipt", metavar="FILE", help="From receipts at hand instead, without a market; repeat it.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--with", metavar="FILE", help="JSON of an audit, or a report's, to put beside; repeat it.")
    ] = None,
    market: MaybeMarket = None,
    ca: MaybeAuthority = None,
    which_map: Map = "kme-lin-96",
    as_json: Json = False,
) -> None:
    """Write releases with all that proves them into one file that is verified offline: receipts, checkpoint, proofs, map, results.

    Beside them lies the digest of the list of packages that this program runs on, as `audit parts` makes it.

    `verify bundle` and `audit release` take it, without a network; so does `python -m protocol.verify`, where little is installed.

    Example: veilmart audit export --out evidence.tar --market 127.0.0.1:7443 --ca ca.crt --with report/report.json
    """
    from contextlib import ExitStack

    from nodes.audit.export import evidence_of_market, evidence_of_receipts
    from nodes.audit.parts import digest_of, installed
    from nodes.audit.report import to_json
    from nodes.audit.results import shareable
    from nodes.market_client import MarketClient, find_release_id
    from protocol.features import open_map
    from protocol.keys import write_durably
    from protocol.transparency import Receipt
    from protocol.verify import verify_bundle

    if (market is None) != (ca is None) or (market is None and not receipt) or (receipt and release):
        raise UsageError("audit export: expected --market and --ca, or --receipt", hint="--release chooses among a market's releases")
    feature_map, beside = open_map(which_map), shareable(results or ())
    if "parts" in beside:
        raise UsageError("audit export: --with parts.json takes the place of the list of parts", hint="give the file another name")
    beside["parts"] = to_json(digest_of(installed()))
    with ExitStack() as stack:
        client = stack.enter_context(MarketClient(market, ca, home)) if market is not None and ca is not None else None
        if receipt:
            given = [Receipt.from_bytes(read_bytes(path)) for path in receipt]
            data = evidence_of_receipts(given, feature_map, beside, client)
        else:
            assert client is not None
            catalogue = client.sync(feature_map) if release else None
            wanted = [find_release_id(name, catalogue, holding_alone=False) for name in release or ()] if catalogue else []
            data = evidence_of_market(client, feature_map, beside, wanted)
    write_durably(out, data, 0o644)
    result, lines = verify_bundle(out)
    result = {"schema": "veilmart.evidence-written/1", "file": str(out), "size_bytes": len(data), "verified": result}
    show(
        result,
        as_json,
        [f"{out}: {len(data)} bytes", *lines],
        then=f"verify bundle {shlex.quote(str(out))}",
    )


def _features(
    home: Path, base: Path | None, data: Path | None, strangers: Path | None, records: int | None, which_map: str, progress: Any
) -> tuple[Any, Any]:
    """Return the features of members and of strangers, or None twice without data."""
    if data is None:
        if strangers is not None:
            raise UsageError("audit specification: --strangers needs --data")
        return None, None
    from nodes.guard import map_alone
    from nodes.records import read_records
    from protocol.features import open_map

    feature_map, inside = open_map(which_map), read_records(data, records)
    if strangers is not None:
        outside = read_records(strangers, max(len(inside), 200))
    else:
        inside, outside = inside[::2], inside[1::2]
    if min(len(inside), len(outside)) < 3:
        raise UsageError(f"{data}: expected at least 3 records and 3 strangers", hint="--strangers names a file of others")
    model = open_model(home, base)
    model.admit_map(feature_map)

    def features(texts: Any, stage: str) -> Any:
        embedding = model.embed_alone(
            texts, layer=feature_map.layer, kind=feature_map.embedding, on_progress=lambda done, of: progress(stage, done, of)
        )
        return map_alone(feature_map, embedding)

    return features(inside, "embed members"), features(outside, "embed strangers")


def _attacks(members: Any, strangers: Any, guarantee: Any) -> dict[str, Any]:
    from nodes.audit.membership import attack_ours, attack_reduced_set, ceiling
    from nodes.audit.results import result_of_membership

    reduced, copies = attack_reduced_set(members, strangers)
    ours, limit = attack_ours(members, strangers, guarantee, ATTACKED), ceiling(guarantee)
    return result_of_membership(len(members), len(strangers), ours, (limit.auc, limit.true_positives(0.01)), reduced, copies)


def _lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{'yes' if check['holds'] else 'NO':<4}{check['name']:<19}{check['evidence']}" for check in checks]


COMMANDS = {
    "audit release": audit_release,
    "audit specification": audit_specification,
    "audit market": audit_market,
    "audit report": audit_report,
    "audit export": audit_export,
}
