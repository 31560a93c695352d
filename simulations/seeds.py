"""Seeds on the command line."""

from __future__ import annotations

from common.errors import ConfigError


def seed_numbers(text: str) -> list[int]:
    """The seeds in `0,1,2`. Raises ConfigError."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text!r}", next_step="write whole numbers: --seeds 0,1,2") from None
