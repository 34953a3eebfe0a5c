"""What each audit found, as the JSON objects that its command prints and that a report is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodes.audit.market import MarketAudit
from nodes.audit.release import audit_release
from nodes.audit.report import SCHEMA as REPORT
from nodes.audit.report import taken_of, to_json
from nodes.audit.specification import Check, SpecificationAudit
from protocol.admission import AdmissionPolicy
from protocol.errors import FormatError, UsageError
from protocol.evidence import is_evidence, read_evidence, verify
from protocol.features import FeatureMap, load_map
from protocol.release import Release, open_envelope
from protocol.transparency import RECEIPT, Checkpoint, Receipt

if TYPE_CHECKING:
    from nodes.audit.membership import Attack

NO_CLAIM = ("adapter", "map")  # of a release that says so, and of one that was made with a map which is not at hand


def result_of_file(path: Path, feature_map: FeatureMap, largest_epsilon: float, smallest_count: int) -> dict[str, Any]:
    """Return the audit of a receipt or of a signed release; of all releases where the file, or folder, is evidence.

    Evidence brings its own maps.  Raises what reading and verifying raise: of a file that proves nothing there is nothing to audit.
    """
    if path.is_dir() or is_evidence(data := path.read_bytes()):
        found = verify(read_evidence(path))
        maps = {map_id: load_map(manifest) for map_id, manifest in found.maps.items()}
        results = [
            result_of_release(
                open_envelope(found.envelopes[index]), maps.get(claims.map_id, feature_map), largest_epsilon, smallest_count,
                [_in_the_log(index, found.checkpoint, found.market_key)],
            )
            for index, claims in found.releases.items()
        ]  # fmt: skip
        return {
            "schema": "veilmart.audit-bundle/1", "fingerprint": found.fingerprint.hex(), "market_key": found.market_key.hex(),
            "size": found.checkpoint.size, "complete": found.complete, "releases": results,
            "refuted": any(result["refuted"] for result in results),
        }  # fmt: skip
    checks = []
    if data.startswith(RECEIPT):
        receipt = Receipt.from_bytes(data)
        checks, data = [_in_the_log(receipt.index, receipt.verify(), receipt.market_key)], receipt.envelope
    return result_of_release(open_envelope(data), feature_map, largest_epsilon, smallest_count, checks)


def result_of_release(
    release: Release, feature_map: FeatureMap, largest_epsilon: float, smallest_count: int, seen: Sequence[Check] = ()
) -> dict[str, Any]:
    """Return the audit of one release; `seen`: what was checked about it before."""
    guarantee = release.specification.guarantee
    checks = [*seen, *audit_release(release, feature_map, AdmissionPolicy(largest_epsilon, guarantee.delta, smallest_count))]
    return {
        "schema": "veilmart.audit-release/1", "release_id": release.release_id.hex(), "title": release.title,
        "epsilon": guarantee.epsilon, "delta": guarantee.delta, "unit": str(guarantee.unit),
        "checks": [asdict(check) for check in checks],
        "refuted": any(not check.holds and check.name not in NO_CLAIM for check in checks),
    }  # fmt: skip


def result_of_specification(audit: SpecificationAudit, dimension: int, attacks: dict[str, Any] | None) -> dict[str, Any]:
    """Return the audit of the mechanism; `attacks`: what the attacks on membership showed, if there were any."""
    return {
        "schema": "veilmart.audit-specification/1", "epsilon": audit.guarantee.epsilon, "delta": audit.guarantee.delta,
        "dimension": dimension, "releases": audit.releases, "tests": audit.tests, "confidence": audit.confidence,
        "epsilon_lower_bound": audit.epsilon_lower_bound, "expected_lower_bound": audit.expected_lower_bound, "ratio": audit.ratio,
        "checks": [asdict(check) for check in audit.checks], "membership": attacks, "refuted": audit.refuted,
    }  # fmt: skip


def result_of_membership(
    members: int, strangers: int, ours: Attack, ceiling: tuple[float, float], reduced: Attack, copies: int
) -> dict[str, Any]:
    """Return what the attacks on membership showed; `ceiling`: largest AUC, and largest true positives at 1 % false ones."""
    return {
        "members": members, "strangers": strangers, "ours": asdict(ours), "reduced_set": asdict(reduced), "copies": copies,
        "ceiling": {"auc": ceiling[0], "true_positives": ceiling[1]},
    }  # fmt: skip


def result_of_market(audit: MarketAudit) -> dict[str, Any]:
    """Return the audit of a market; a flagged release is its owner's doing and refutes nothing that the market says."""
    return {
        "schema": "veilmart.audit-market/1", "market_key": audit.market_key.hex(), "size": audit.size, "root": audit.root.hex(),
        "known_size": audit.known_size, "checks": [asdict(check) for check in audit.checks],
        "flags": [asdict(flag) for flag in audit.flags],
        "refuted": any(not check.holds and check.name != "plausible" for check in audit.checks),
    }  # fmt: skip


def read_result(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise UsageError or FormatError."""
    try:
        result = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path}: not JSON", hint="the output of an audit with --json") from None
    if not isinstance(result, dict):
        raise FormatError(f"{path}: expected one JSON object")
    return result


def shareable(paths: Sequence[Path]) -> dict[str, bytes]:
    """Return results to put beside evidence, by name, without what is for their owner alone; reports as they are.

    Raises UsageError or FormatError for a file that is neither, and for two of one name.
    """
    found: dict[str, bytes] = {}
    for path in paths:
        result = read_result(path)
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in path.stem.lower()).strip("-")[:60]
        if not name or name in found:
            raise UsageError(f"{path}: expected a name with letters or digits that no other file has")
        found[name] = to_json(result if result.get("schema") == REPORT else taken_of(result))
    return found


def _in_the_log(index: int, under: Checkpoint, market_key: bytes) -> Check:
    return Check("log", True, f"index {index} of {under.size} in the log of market {market_key.hex()[:16]}")
