"""Learnwares that a querier pulled: release and adapter in one folder each, every byte checked again when it is used."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nodes.market_client import MarketClient, find_release_id
from protocol.adapter_check import check_adapter
from protocol.admission import admit_release
from protocol.catalogue import SCALARS_BYTES, Catalogue, Terms, card_of, scalars_of
from protocol.errors import FormatError, InvalidAdapter, MarketUnreachable, NotFound, UsageError, VeilmartError
from protocol.features import FeatureMap
from protocol.keys import write_durably
from protocol.release import Release, open_envelope

if TYPE_CHECKING:
    from nodes.adapter import Adapter


@dataclass(frozen=True, slots=True)
class StoredLearnware:
    """A release on this machine, and where its adapter lies."""

    release: Release
    adapter: Path | None
    size_bytes: int  # of both files: what fetching them moved

    def load_adapter(self, base_model: str) -> Adapter:
        """Return the adapter; raise InvalidAdapter unless its bytes are the release's and its weights are sound, OutsideWindow unless
        the release holds today."""
        from nodes.adapter import Adapter

        self.release.window.require(MarketClient.today(), self.release.title)
        if self.adapter is None or self.release.adapter is None:
            raise NotFound(f"{self.release.title}: its owner published no adapter", hint="a specification alone cannot answer")
        data = self.adapter.read_bytes()
        if hashlib.sha256(data).digest() != self.release.adapter.digest:
            raise InvalidAdapter(f"{self.release.title}: the adapter on disk is not the release's", hint="`veilmart pull` fetches it again")
        return Adapter.from_bytes(data, base_model=base_model)


def pull_learnware(
    text: str,
    client: MarketClient,
    home: Path,
    feature_map: FeatureMap,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
    cover: int = 0,
) -> StoredLearnware:
    """Fetch a learnware, check it completely, then store it; nothing is stored if any check fails.

    cover: how many others are fetched with it and thrown away, so that the market cannot tell which was wanted.
    """
    catalogue = client.sync(feature_map)
    wanted = catalogue.release_ids.index(find_release_id(text, catalogue))
    envelope, data = _fetched_among(fetch_order(wanted, catalogue, cover), wanted, catalogue, client, on_progress)
    release = open_envelope(envelope)
    _require_own_row(release, wanted, catalogue, client, feature_map)
    folder = _folder(home) / release.release_id.hex()
    if release.adapter is not None:
        check_adapter(data, release.base_model.hex(), str(release.adapter.guarantee))
        write_durably(folder / "adapter.safetensors", data)
    # The release comes last: a learnware is there once its release is there.
    write_durably(folder / "release", envelope)
    return _stored(folder)


def fetch_order(wanted: int, catalogue: Catalogue, cover: int) -> list[int]:
    """Return the positions to fetch, the wanted one and `cover` others, in an order that says nothing.

    The others are drawn evenly from all that could be wanted in its place: they stand, are for the same base model, and have an adapter if
    it has one.  Raises UsageError if there are too few of them.
    """
    like = _kind(wanted, catalogue)
    others = [int(at) for at in np.flatnonzero(catalogue.standing) if at != wanted and _kind(int(at), catalogue) == like]
    if cover > len(others):
        raise UsageError(
            f"--cover {cover}: expected at most {len(others)}, the others of this kind here",
            hint=f"--cover {len(others)} hides it among all there are",
        )
    draw = secrets.SystemRandom()
    order = [wanted, *draw.sample(others, cover)]
    draw.shuffle(order)
    return order


def _kind(at: int, catalogue: Catalogue) -> tuple[bytes, bool]:
    terms = catalogue.terms_of(at)
    return terms.base_model, terms.adapter_class > 0


def _fetched_among(
    order: list[int], wanted: int, catalogue: Catalogue, client: MarketClient, on_progress: Callable[[int, int], None]
) -> tuple[bytes, bytes]:
    """Return envelope and adapter of the wanted release; all are fetched alike, whatever comes.

    What is wrong with the wanted one is raised at the end: a client that stopped there would say which one it was.
    """
    found: tuple[bytes, bytes] | VeilmartError | None = None
    for at in order:
        got: tuple[bytes, bytes] | VeilmartError
        try:
            envelope = client.release(catalogue.release_ids[at])
            reference = open_envelope(envelope).adapter
            got = envelope, client.download_adapter(reference, on_progress) if reference else b""
        except MarketUnreachable:
            raise
        except VeilmartError as error:
            got = error
        if at == wanted:
            found = got
    if isinstance(found, VeilmartError):
        raise found
    assert found is not None
    return found


def fetch_release(text: str, client: MarketClient, feature_map: FeatureMap) -> tuple[bytes, Release]:
    """Return envelope and release of a name, in the market's signed catalogue, admitted, and ranked by its own row."""
    catalogue = client.sync(feature_map)
    release_id = find_release_id(text, catalogue)
    envelope = client.release(release_id)
    release = open_envelope(envelope)
    _require_own_row(release, catalogue.release_ids.index(release_id), catalogue, client, feature_map)
    return envelope, release


def _require_own_row(release: Release, at: int, catalogue: Catalogue, client: MarketClient, feature_map: FeatureMap) -> None:
    """Raise NotAdmitted or FormatError unless the release is admitted and the catalogue ranks it by what it says."""
    admit_release(release, client.describe().admission)
    ranked_by = catalogue.rows[at].tobytes()[:SCALARS_BYTES], catalogue.terms_of(at).body, catalogue.card(at).body
    if (scalars_of(release, feature_map), Terms.of(release).body, card_of(release)) != ranked_by:
        raise FormatError("catalogue: the row that ranked this release is not its own; the market signed a wrong one")


def local_learnwares(home: Path) -> list[StoredLearnware]:
    """Return what was pulled into a home, by its ids."""
    return [_stored(release.parent) for release in sorted(_folder(home).glob("*/release"))]


def local_learnware(text: str, home: Path) -> StoredLearnware | None:
    """Return the pulled learnware that NAME@HEX, HEX or NAME names, or None."""
    name, _, digits = text.rpartition("@")
    hits = []
    for stored in local_learnwares(home):
        title, identity = stored.release.card.name, stored.release.release_id.hex()
        if (name in ("", title) and len(digits) >= 8 and identity.startswith(digits)) or (not name and digits == title):
            hits.append(stored)
    if len(hits) > 1:
        raise UsageError(f"{text}: names {len(hits)} learnwares", hint="give NAME@ and the first digits of the id")
    return hits[0] if hits else None


def _folder(home: Path) -> Path:
    return home / "learnwares"


def _stored(folder: Path) -> StoredLearnware:
    envelope = (folder / "release").read_bytes()
    release, path = open_envelope(envelope), folder / "adapter.safetensors"
    adapter = path if release.adapter is not None and path.is_file() else None
    return StoredLearnware(release, adapter, len(envelope) + (adapter.stat().st_size if adapter else 0))
