"""Where models run."""

from __future__ import annotations


def default_device(device: str | None = None) -> str:
    """`device`, or where it is None or "auto": CUDA if there is one, else the CPU."""
    import torch

    if device in (None, "auto"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return str(device)
