"""Check what a market and an owner signed, from files alone: `python -m protocol.verify FILE`, the same as `veilmart verify`.

Runs in a Python that has nothing but `cryptography` installed: an auditor need not install, or trust, the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
import time
from pathlib import Path
from typing import Any

from protocol.claims import Claims
from protocol.conflict import Conflict, is_conflict
from protocol.errors import InvalidSignature, UsageError, VeilmartError
from protocol.evidence import Verified, is_evidence, read_evidence, unpack, verify
from protocol.transparency import Receipt, accept, open_checkpoint
from protocol.window import day_of
from protocol.witness import Witness, cosigned_at

Shown = tuple[dict[str, Any], list[str]]
"""A result for programs, and the same for people."""


def verify_receipt(file: Path, market_key: str | None = None, checkpoint: Path | None = None, holding: bool = False) -> Shown:
    """Return what a receipt proves; raise a VeilmartError where it does not.

    market_key: first digits, at least 8, of the key that must have signed it.  checkpoint: a file; must be the same one if of one size.
    holding: raise OutsideWindow unless the release holds today, by this clock.
    """
    receipt = Receipt.from_bytes(_read(file))
    _require_market(file, receipt.market_key, market_key)
    _require_checkpoint(receipt.market_key, receipt.verify(), checkpoint)
    return _shown_receipt(receipt, holding)


def _shown_receipt(receipt: Receipt, holding: bool = False) -> Shown:
    from protocol.claims import open_claims

    under, claims = receipt.verify(), open_claims(receipt.envelope)
    result: dict[str, Any] = {
        "schema": "veilmart.verified-release/1", **_claimed(claims), "market_key": receipt.market_key.hex(), "index": receipt.index,
        "size": under.size, "root": under.root.hex(),
    }  # fmt: skip
    guarantee = claims.guarantee
    today = day_of(time.time())
    if holding:
        claims.window.require(today, claims.title)
    lines = [
        f"{claims.title}  signed by its owner {claims.owner.hex()[:16]}, release {claims.release_number} of that owner",
        f"specification: epsilon {guarantee.epsilon:g} at delta {guarantee.delta:g}, unit {guarantee.unit}"
        + (", made with SIMULATED noise: it protects nobody" if claims.simulated else ""),
        *_cohort_lines(claims),
        f"holds {claims.window}" + ("" if claims.window.holds(today) else "; NOT today, by this clock"),
        f"in the log of market {receipt.market_key.hex()[:16]} at index {receipt.index} of {under.size}, root {under.root.hex()[:16]}",
    ]
    return result, lines


def verify_bundle(path: Path, market_key: str | None = None, checkpoint: Path | None = None, witness: str | None = None) -> Shown:
    """Return what a file or folder of evidence proves; raise a VeilmartError where it does not.  Arguments as of `verify_receipt`.

    witness: verifier key of a witness that must have signed a checkpoint of this log; when it did is told.
    """
    found: Verified = verify(read_evidence(path))
    _require_market(path, found.market_key, market_key)
    signed = None if witness is None else _signed_by(Witness.parse(witness), found)
    _require_checkpoint(found.market_key, found.checkpoint, checkpoint)
    return _shown_bundle(found, signed)


def _shown_bundle(found: Verified, signed: int | None = None) -> Shown:
    result: dict[str, Any] = {
        "schema": "veilmart.verified-bundle/1", "fingerprint": found.fingerprint.hex(), "market_key": found.market_key.hex(),
        "size": found.checkpoint.size, "root": found.checkpoint.root.hex(), "complete": found.complete, "witnessed_at": signed,
        "releases": [{"index": index, **_claimed(claims)} for index, claims in found.releases.items()],
        "maps": sorted(map_id.hex() for map_id in found.maps), "results": sorted(found.results),
    }  # fmt: skip
    whole = "every release of the log" if found.complete else f"{len(found.releases)} of {found.checkpoint.size} releases"
    lines = [
        f"{whole} of market {found.market_key.hex()[:16]}, root {found.checkpoint.root.hex()[:16]}: all signatures and proofs verified",
        *(
            f"{index:>6}  {claims.title}  epsilon {claims.guarantee.epsilon:g} at delta {claims.guarantee.delta:g}, "
            f"unit {claims.guarantee.unit}" + (", SIMULATED noise" if claims.simulated else "")
            for index, claims in found.releases.items()
        ),
        *([] if signed is None else [f"a witness that you trust signed this log at {_utc(signed)}"]),
        f"{len(found.maps)} maps, results of {', '.join(sorted(found.results)) or 'no audit'}",
        f"fingerprint of all of it {found.fingerprint.hex()}",
    ]
    return result, lines


def verify_conflict(file: Path, market_key: str | None = None, checkpoint: Path | None = None) -> Shown:
    """Return what evidence of a conflict proves; raise a VeilmartError where it does not.  Arguments as of `verify_receipt`."""
    conflict = Conflict.from_bytes(_read(file))
    _require_market(file, conflict.receipt.market_key, market_key)
    _require_checkpoint(conflict.receipt.market_key, conflict.verify()[2], checkpoint)
    return _shown_conflict(conflict)


def _shown_conflict(conflict: Conflict) -> Shown:
    receipt = conflict.receipt
    first, second, under = conflict.verify()
    result: dict[str, Any] = {
        "schema": "veilmart.verified-conflict/1", "owner": first.owner.hex(), "release_number": first.release_number,
        "logged": _claimed(first), "refused": _claimed(second), "market_key": receipt.market_key.hex(), "index": receipt.index,
        "size": under.size, "root": under.root.hex(),
    }  # fmt: skip
    lines = [
        f"the key {first.owner.hex()[:16]} signed two releases of number {first.release_number}:",
        f"{first.title}  in the log of market {receipt.market_key.hex()[:16]} at index {receipt.index} of {under.size}",
        f"{second.title}  refused there",
        "its node was copied, or its ledger put back, or somebody else has its key: what both cost is not in one ledger",
    ]
    return result, lines


def verify_bytes(data: bytes) -> Shown:
    """Return what a receipt, a conflict or packed evidence proves; raise a VeilmartError where it does not."""
    if is_evidence(data):
        return _shown_bundle(verify(unpack(data)))
    return _shown_conflict(Conflict.from_bytes(data)) if is_conflict(data) else _shown_receipt(Receipt.from_bytes(data))


def _signed_by(witness: Witness, found: Verified) -> int:
    """Return when a witness signed this log last, in seconds since 1970; raise InvalidSignature if it never did."""
    times = []
    for note in found.witnessed:
        with contextlib.suppress(InvalidSignature):
            times.append(cosigned_at(note, witness))
    if not times:
        raise InvalidSignature(f"evidence: no checkpoint in it is signed by the witness {witness.name}")
    return max(times)


def _utc(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _cohort_lines(claims: Claims) -> list[str]:
    """Return who released it together, where several did: their signatures and the noise of their shares are verified by then."""
    if (cohort := claims.cohort) is None:
        return []
    signers, sizes = ", ".join(signer.hex()[:16] for signer in claims.signers), cohort.resilience
    return [
        f"released together and signed by {len(claims.signers)} of {sizes.members} owners, "
        f"their noise enough without that of any {sizes.colluders}: {signers}"
    ]


def _claimed(claims: Claims) -> dict[str, Any]:
    guarantee = claims.guarantee
    return {
        "release_id": claims.release_id.hex(), "title": claims.title, "owner": claims.owner.hex(), "release_number": claims.release_number,
        "epsilon": guarantee.epsilon, "delta": guarantee.delta, "unit": str(guarantee.unit), "simulated": claims.simulated,
        "signers": [signer.hex() for signer in claims.signers],
        **claims.window.dates, "holds": claims.window.holds(day_of(time.time())),
    }  # fmt: skip


def _require_market(path: Path, found: bytes, wanted: str | None) -> None:
    if wanted is not None and (len(wanted) < 8 or not found.hex().startswith(wanted.lower())):
        raise InvalidSignature(f"{path}: signed by another market, {found.hex()[:16]}")


def _require_checkpoint(market_key: bytes, under: Any, checkpoint: Path | None) -> None:
    if checkpoint is None:
        return
    known = open_checkpoint(_read(checkpoint), market_key)
    if known.size != under.size:
        raise UsageError(
            f"{checkpoint}: of {known.size} releases, what is verified is under {under.size}",
            hint="`veilmart catalogue checkpoint --compare` lets the market prove that both are one log",
        )
    accept(known, under, [])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def main(arguments: list[str] | None = None) -> int:
    """Verify one file or folder; return the exit code of protocol/errors.py."""
    parser = argparse.ArgumentParser(
        prog="python -m protocol.verify", description="Check a receipt, evidence or a conflict, offline: signatures, proofs, digests.",
        epilog="Example: python -m protocol.verify evidence.tar --market-key 7c1f0a2b",
    )  # fmt: skip
    parser.add_argument("file", type=Path, help="receipt, conflict, or evidence of `veilmart audit export`, packed or as a folder")
    parser.add_argument("--market-key", metavar="HEX", help="key of the market that must have signed it")
    parser.add_argument("--checkpoint", type=Path, help="must be under exactly this one, if the sizes agree")
    parser.add_argument("--witness", metavar="KEY", help="with evidence: this witness must have signed the log")
    parser.add_argument("--holding", action="store_true", help="with a receipt: the release must hold today")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    try:
        evidence = given.file.is_dir() or is_evidence(_read(given.file))
        if given.witness is not None and not evidence:
            raise UsageError(f"{given.file}: a receipt bears no witness's signature", hint="--witness is for evidence")
        if given.holding and evidence:
            raise UsageError(f"{given.file}: many releases, each with days of its own", hint="--holding is for a receipt")
        wanted = given.file, given.market_key, given.checkpoint
        if evidence:
            result, lines = verify_bundle(*wanted, given.witness)
        else:
            conflict = is_conflict(_read(given.file))
            if given.holding and conflict:
                raise UsageError(f"{given.file}: no receipt", hint="--holding is for a receipt")
            result, lines = verify_conflict(*wanted) if conflict else verify_receipt(*wanted, given.holding)
    except VeilmartError as error:
        if given.json:
            sys.stdout.write(json.dumps({"error": {"code": error.code, "message": str(error), "hint": error.hint}}, indent=1) + "\n")
        else:
            sys.stderr.write(f"error: {error}\n" + (f"hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code
    sys.stdout.write(json.dumps(result, indent=1) + "\n" if given.json else "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
