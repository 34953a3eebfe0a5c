"""The audits that take seconds: of every receipt of a home, of the mechanism, and of the market if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nodes.audit.market import audit_market
from nodes.audit.results import result_of_file, result_of_market, result_of_specification
from nodes.audit.specification import Progress, audit_specification
from nodes.market_client import MarketClient
from protocol.admission import AdmissionPolicy
from protocol.features import FeatureMap
from protocol.privacy import Guarantee


def audit_receipts(home: Path, feature_map: FeatureMap) -> list[dict[str, Any]]:
    """Return the audit of each receipt that a home keeps, by their ids."""
    policy = AdmissionPolicy()
    files = sorted((home / "receipts").glob("*.receipt"))
    return [result_of_file(file, feature_map, policy.largest_epsilon, policy.smallest_count or 1) for file in files]


def quick_audits(
    home: Path, market: str | None, ca: Path | None, epsilon: float, releases: int, feature_map: FeatureMap, on_progress: Progress
) -> list[dict[str, Any]]:
    """Return the audits in the form that their commands print.  releases: drawn to attack the mechanism; 0 leaves that out."""
    found = audit_receipts(home, feature_map)
    if releases:
        audit = audit_specification(Guarantee(epsilon, 1e-6), feature_map.dimension, releases, on_progress=on_progress)
        found.append(result_of_specification(audit, feature_map.dimension, None))
    if market is not None and ca is not None:
        with MarketClient(market, ca, home) as client:
            found.append(result_of_market(audit_market(client, feature_map, 1, on_progress)))
    return found
