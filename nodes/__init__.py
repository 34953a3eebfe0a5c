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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers read; what a program loads stands below, and a test compares the two
    from nodes.finetune import Recipe as Recipe
    from nodes.guard import Plan as Plan
    from nodes.guard import Policy as Policy
    from nodes.ledger import Budget as Budget
    from nodes.ledger import Price as Price
    from nodes.market import Market as Market
    from nodes.owner import Owner as Owner
    from nodes.owner import Published as Published
    from nodes.private_training import PrivateRecipe as PrivateRecipe
    from nodes.querier import Querier as Querier
    from nodes.querier import Search as Search
    from nodes.querier import Way as Way
    from nodes.query import Filters as Filters
    from nodes.records import Pair as Pair
    from nodes.records import Prompt as Prompt
    from nodes.records import Text as Text
    from nodes.records import read_records as read_records
    from nodes.reuse.strategies import Answer as Answer
    from nodes.reuse.strategies import Strategy as Strategy

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
    found = globals()[name] = getattr(import_module(f"nodes.{_HOME[name]}"), name)
    return found
