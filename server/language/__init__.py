"""Merging of adapters in a federation: the methods that a run with `[lora]` may name.

Importing this package registers every method in `server.language.registry.METHODS`; a method's module is
named here once.
"""

from __future__ import annotations

from server.language import cocktail, evo_merging, rules

__all__ = ["cocktail", "evo_merging", "rules"]
