"""Refuse to start when our generic package names resolve to somebody else's code.

`server`, `clients`, `common` and `simulations` are plain names; a directory of the same name on the
path would shadow ours. Every command and every process calls `check_imports` before anything else.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from common.errors import FederationError

OURS = ("common", "clients", "server", "simulations")


def check_imports() -> None:
    """Raise FederationError when any of our packages would be imported from outside our installation."""
    root = Path(__file__).resolve().parent.parent
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != root:
            raise FederationError(
                f"the package {name!r} resolves to {origin or 'nothing'}, outside our installation {root}",
                next_step="start from another directory, and remove that folder from PYTHONPATH",
            )
