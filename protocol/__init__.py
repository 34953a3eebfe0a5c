"""The protocol: what a second implementation or an auditor needs.

The names below are the public ones (docs/protocol.md 9); everything else may change.  They are loaded at their first use, so that
importing this package stays instant.

    from protocol import default_map, open_envelope
    release = open_envelope(open("notes.release", "rb").read())        # raises unless the owner's signature verifies
    release.specification.guarantee.epsilon, release.specification.count
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "BoundedVectors": "specification",
    "Catalogue": "catalogue",
    "FeatureMap": "features",
    "Guarantee": "privacy",
    "MatchPlan": "encryption",
    "QueryKey": "encryption",
    "Ranking": "scoring",
    "Release": "release",
    "Sketch": "scoring",
    "Specification": "specification",
    "VeilmartError": "errors",
    "default_map": "features",
    "estimate": "specification",
    "load_map": "features",
    "open_envelope": "release",
    "quantise": "specification",
    "rank": "scoring",
    "score": "scoring",
    "sign_release": "release",
    "sketch_of": "scoring",
}

__all__ = sorted(_HOME)  # computed, so that a name cannot be in one list only


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'protocol' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"protocol.{_HOME[name]}"), name)
    return found
