"""What this program runs on: every installed package, as a CycloneDX list of parts, and whether its files are those that were installed."""

from __future__ import annotations

import base64
import csv
import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from nodes.audit.report import to_json

CHUNK = 1 << 20
LONGEST_LICENCE = 100  # characters; some packages put the whole text where its name belongs


@dataclass(frozen=True, slots=True)
class Part:
    """An installed package."""

    name: str
    version: str
    licence: str  # as it names it itself; "" if it does not
    record: str | None  # its list of files with their hashes, as its installer wrote it
    of: Distribution

    @property
    def record_digest(self) -> str:
        """SHA-256 of that list: with it, of every file in it; "" without one."""
        return hashlib.sha256(self.record.encode()).hexdigest() if self.record is not None else ""

    def altered(self) -> list[str]:
        """Return the files that are not as they were installed, or are gone."""
        found = []
        for name, wanted, *_ in csv.reader((self.record or "").splitlines()):
            kind, _, value = wanted.partition("=")
            if kind == "sha256" and _digest(Path(str(self.of.locate_file(name)))) != value:
                found.append(name)
        return found


def installed(of: Iterable[Distribution] | None = None) -> list[Part]:
    """Return all packages that this interpreter can import, each once, by name."""
    found: dict[str, Part] = {}
    for one in distributions() if of is None else of:
        name = one.metadata["Name"].lower().replace("_", "-").replace(".", "-")
        if name not in found:  # the first of a name on the path is the one that is imported
            found[name] = Part(name, one.version, _licence(one), one.read_text("RECORD"), one)
    return [found[name] for name in sorted(found)]


def bill_of(parts: Iterable[Part]) -> dict[str, Any]:
    """Return a CycloneDX 1.6 bill of materials; the same parts give the same value."""
    components = []
    for part in parts:
        purl = f"pkg:pypi/{part.name}@{part.version}"
        component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": part.name, "version": part.version, "purl": purl}
        if part.licence:
            component["licenses"] = [{"license": {"name": part.licence}}]
        if part.record_digest:
            component["properties"] = [{"name": "veilmart:record-sha256", "value": part.record_digest}]
        components.append(component)
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}


def digest_of(parts: Collection[Part]) -> dict[str, Any]:
    """Return how many parts there are and the SHA-256 of their list as `audit parts` writes it: one digest names all that is installed."""
    return {"schema": "veilmart.parts/1", "parts": len(parts), "sha256": hashlib.sha256(to_json(bill_of(parts))).hexdigest()}


def _licence(one: Distribution) -> str:
    named = str((one.metadata.get_all("License-Expression") or one.metadata.get_all("License") or [""])[0])
    if not named or "\n" in named or len(named) > LONGEST_LICENCE:
        classes = [text for text in one.metadata.get_all("Classifier", []) if text.startswith("License :: ")]
        named = classes[0].rpartition(" :: ")[2] if classes else named.partition("\n")[0][:LONGEST_LICENCE]
    return named.strip()


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file as a list of files has it, or nothing if it is gone."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError:
        return ""
    return base64.urlsafe_b64encode(digest.digest()).rstrip(b"=").decode()
