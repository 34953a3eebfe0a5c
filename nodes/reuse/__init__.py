"""Using a specialist, alone or together with others or with a larger local model (docs/reuse.md).

    assistant = assemble(Wish(Strategy.PROXY, alpha=1.0), model, [specialist], larger=large)
    answer = assistant.answer([("user", "What does FOB mean?")], 64)

A wish is refused with its reason before any model runs.  Importing this package loads no model library.
"""

from nodes.reuse.strategies import Answer, Assistant, Mixing, Specialist, Strategy, Wish, assemble

__all__ = ["Answer", "Assistant", "Mixing", "Specialist", "Strategy", "Wish", "assemble"]
