"""What both shores say to Flower's own programs: the settings that are always on.

FLWR_HOME is separate for each process tree; telemetry, the update check and the installation of
dependencies at run time are off; the runner's poll is short because the messages are kilobytes.
"""

from __future__ import annotations

from pathlib import Path

FAB_NAME = "isthmus"
RUN_KEY = "isthmus-run"


def flower_env(home: Path) -> dict[str, str]:
    """Environment for a Flower process that belongs to `home` (its FLWR_HOME is `home/flower`)."""
    flower_home = home / "flower"
    flower_home.mkdir(parents=True, exist_ok=True)
    return {
        "FLWR_HOME": str(flower_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
