"""Learnwares that a querier pulled: release and adapter in one folder each, every byte checked again when it is used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nodes.market_client import MarketClient, find_release_id
from protocol.admission import admit
from protocol.catalogue import SCALARS_BYTES, Terms, card_of, scalars_of
from protocol.errors import FormatError, InvalidAdapter, NotFound, UsageError
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

    def load_adapter(self, base_model: str) -> Adapter:
        """Return the adapter; raise InvalidAdapter unless its bytes are the release's and its weights are sound."""
        from nodes.adapter import Adapter

        if self.adapter is None or self.release.adapter is None:
            raise NotFound(f"{self.release.title}: its owner published no adapter", hint="a specification alone cannot answer")
        data = self.adapter.read_bytes()
        if hashlib.sha256(data).digest() != self.release.adapter.digest:
            raise InvalidAdapter(f"{self.release.title}: the adapter on disk is not the release's", hint="`veilmart pull` fetches it again")
        return Adapter.from_bytes(data, base_model=base_model)


def pull_learnware(
    text: str, client: MarketClient, home: Path, feature_map: FeatureMap, on_progress: Callable[[int, int], None] = lambda done, of: None
) -> StoredLearnware:
    """Fetch a learnware, check it completely, then store it; nothing is stored if any check fails."""
    from nodes.adapter import Adapter

    catalogue = client.sync(feature_map)
    release_id = find_release_id(text, catalogue)
    envelope = client.release(release_id)
    release = open_envelope(envelope)
    admit(release.specification, client.describe().admission)
    at = catalogue.release_ids.index(release_id)
    ranked_by = catalogue.rows[at].tobytes()[:SCALARS_BYTES], catalogue.terms_of(at).body, catalogue.card(at).body
    if (scalars_of(release, feature_map), Terms.of(release).body, card_of(release)) != ranked_by:
        raise FormatError("catalogue: the row that ranked this release is not its own; the market signed a wrong one")
    folder = _folder(home) / release_id.hex()
    if release.adapter is not None:
        data = client.download_adapter(release.adapter, on_progress)
        Adapter.from_bytes(data, base_model=release.base_model.hex())
        write_durably(folder / "adapter.safetensors", data)
    # The release comes last: a learnware is there once its release is there.
    write_durably(folder / "release", envelope)
    return _stored(folder)


def local_learnware(text: str, home: Path) -> StoredLearnware | None:
    """Return the pulled learnware that NAME@HEX, HEX or NAME names, or None."""
    name, _, digits = text.rpartition("@")
    hits = []
    for folder in sorted(_folder(home).glob("*")):
        if (folder / "release").is_file():
            stored = _stored(folder)
            title = stored.release.card.name
            if (name in ("", title) and len(digits) >= 8 and folder.name.startswith(digits)) or (not name and digits == title):
                hits.append(stored)
    if len(hits) > 1:
        raise UsageError(f"{text}: names {len(hits)} learnwares", hint="give NAME@ and the first digits of the id")
    return hits[0] if hits else None


def _folder(home: Path) -> Path:
    return home / "learnwares"


def _stored(folder: Path) -> StoredLearnware:
    release = open_envelope((folder / "release").read_bytes())
    adapter = folder / "adapter.safetensors"
    return StoredLearnware(release, adapter if release.adapter is not None and adapter.is_file() else None)
