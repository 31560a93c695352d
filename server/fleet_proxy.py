"""The only way from outside to the SuperLink: Fleet paths, and nothing else.

The SuperLink listens on loopback and serves Fleet, Control and Runtime on one port; whoever holds the
CA certificate could start runs there. This process listens on the public address, forwards the twelve
Fleet calls byte for byte (`common.fleet`), and answers 403 to everything else.
"""

from __future__ import annotations

from pathlib import Path

from common import fleet


def serve(host: str, port: int, superlink: str, ca: Path, certificate: Path, key: Path) -> None:
    """Serve the proxy until the process is told to end."""
    fleet.serve(fleet.build(superlink, ca), host, port, certificate, key)
