"""Evidence of a market, gathered so that everything about it can be verified later, elsewhere, without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nodes.market_client import MarketClient
from protocol.errors import NotFound, StaleCatalogue, UsageError
from protocol.evidence import assemble
from protocol.features import FeatureMap
from protocol.release import open_envelope
from protocol.transparency import Receipt, appended, leaf_hash, open_checkpoint, prove_consistency, prove_inclusion

MOST_WITNESSES = 100  # two digits number them


def evidence_of_market(client: MarketClient, feature_map: FeatureMap, results: Mapping[str, bytes], wanted: Sequence[bytes] = ()) -> bytes:
    """Return evidence of all releases of a market, or of the wanted ones: ids.  The market sees that somebody fetched its catalogue.

    Every proof is made here, from the releases themselves, and verified before it is written.
    """
    envelopes = client.envelopes(feature_map)
    market_key, note = client.market_key, client.checkpoint_note()
    assert market_key is not None  # `envelopes` keeps it or raises
    size = open_checkpoint(note, market_key).size
    if size != len(envelopes):  # another process of this home has seen more in the meantime
        raise StaleCatalogue("catalogue: it grew while it was fetched", hint="once more")
    known: dict[tuple[int, int], bytes] = {}

    def node(level: int, number: int) -> bytes:
        return known[level, number]

    for index, envelope in enumerate(envelopes):
        known |= {(level, number): value for level, number, value in appended(index, leaf_hash(envelope), node)}
    ids = [open_envelope(envelope).release_id for envelope in envelopes]
    missing = set(wanted) - set(ids)
    if missing or not ids:
        raise NotFound(f"evidence: {len(missing)} of the releases asked for are not in the log" if missing else "evidence: an empty log")
    receipts = [
        Receipt(envelopes[index], market_key, index, note, tuple(prove_inclusion(index, size, node)))
        for index in range(size)
        if not wanted or ids[index] in wanted
    ]
    # A witness may have signed an older state of the log; what it signed is proven to be a part of this one.
    sizes = {signed: open_checkpoint(signed, market_key).size for signed in client.describe().witnessed[:MOST_WITNESSES]}
    witnessed = [signed for signed, seen in sizes.items() if 0 < seen <= size]
    proofs = {seen: prove_consistency(seen, size, node) for seen in sorted({sizes[signed] for signed in witnessed} - {size})}
    return assemble(note, market_key, receipts, proofs, _maps(receipts, feature_map), results, witnessed)


def evidence_of_receipts(
    receipts: Sequence[Receipt], feature_map: FeatureMap, results: Mapping[str, bytes], client: MarketClient | None = None
) -> bytes:
    """Return evidence of releases whose receipts are at hand, under the newest of their checkpoints.

    client: asked to prove that older checkpoints belong to the same log; not needed where all receipts are under one.
    """
    if len({receipt.market_key for receipt in receipts}) != 1:
        raise UsageError("evidence: expected receipts of one market")
    under = {receipt: receipt.verify() for receipt in receipts}
    newest = max(receipts, key=lambda receipt: under[receipt].size)
    size = under[newest].size
    older = sorted({checkpoint.size for checkpoint in under.values()} - {size})
    if older and client is None:
        raise UsageError(
            f"evidence: receipts under {len(older) + 1} checkpoints, and nothing that proves them to be of one log",
            hint="--market and --ca: the market proves it",
        )
    proofs = {first: client.prove_consistency(first, size) for first in older} if client is not None else {}
    # A release published twice has one place in the log, and one receipt is enough.
    chosen = {receipt.index: receipt for receipt in sorted(receipts, key=lambda receipt: under[receipt].size)}
    needed = {under[receipt].size for receipt in chosen.values()}
    proofs = {first: proof for first, proof in proofs.items() if first in needed}
    return assemble(newest.checkpoint, newest.market_key, list(chosen.values()), proofs, _maps(list(chosen.values()), feature_map), results)


def _maps(receipts: Sequence[Receipt], feature_map: FeatureMap) -> list[bytes]:
    used = any(open_envelope(receipt.envelope).specification.map_id == feature_map.map_id for receipt in receipts)
    return [feature_map.manifest] if used else []
