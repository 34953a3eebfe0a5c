"""The side that owns data or has a private task.

The names below are the public ones; everything else may change.  They are loaded at their first use, so that importing this package
stays instant.

    from nodes import Market, Owner, Querier

    market = Market("127.0.0.1:7443", "ca.crt")
    Owner("notes.jsonl").publish(market)                  # a private specification and a specialist of your records
    Querier(market).find("task.jsonl").titles             # the specialists for a task that the market never sees
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Answer": "reuse.strategies",
    "Budget": "ledger",
    "Filters": "query",
    "Market": "market",
    "Owner": "owner",
    "Pair": "records",
    "Plan": "guard",
    "Policy": "guard",
    "Price": "ledger",
    "PrivateRecipe": "private_training",
    "Prompt": "records",
    "Published": "owner",
    "Querier": "querier",
    "Recipe": "finetune",
    "Search": "querier",
    "Strategy": "reuse.strategies",
    "Text": "records",
    "Way": "querier",
    "read_records": "records",
}

__all__ = sorted(_HOME)  # computed, so that a name cannot be in one list only


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nodes' has no attribute {name!r}")
    return getattr(import_module(f"nodes.{_HOME[name]}"), name)
