"""A generation of candidates as a file: 2N numbers each, which is all of them that crosses.

Safetensors with `ratios` and `scales`, each [candidates, N] in fp32, N in the order of the pool's labels.
What is read has the six digits of `Candidate` again, so both shores mix from equal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from common.errors import IsthmusError, VectorError
from common.language.pool import Candidate
from common.vectors import save_tensors

MAX_CANDIDATES = 10_000  # as many as a fitness can number


def write_generation(path: Path, candidates: Sequence[Candidate]) -> None:
    """Equal candidates give equal bytes. Raises VectorError for too many, StorageError."""
    if not 0 < len(candidates) <= MAX_CANDIDATES:
        raise VectorError(f"{len(candidates)} candidates in a generation, 1 to {MAX_CANDIDATES} are possible")
    columns = {"ratios": [c.ratios for c in candidates], "scales": [c.scales for c in candidates]}
    tensors = {name: torch.tensor(rows, dtype=torch.float32) for name, rows in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors)


def read_generation(path: Path, adapters: int) -> list[Candidate]:
    """Candidates for a pool of so many adapters. Raises VectorError."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as err:
        raise VectorError(f"{path.name}: not a safetensors file: {type(err).__name__}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rows = next(iter(shapes.values()), (0,))[0]
    if shapes != dict.fromkeys(("ratios", "scales"), (rows, adapters)) or not 0 < rows <= MAX_CANDIDATES:
        raise VectorError(f"{path.name}: not ratios and scales of candidates for {adapters} adapters")
    try:
        return [
            Candidate.of(ratios, scales)
            for ratios, scales in zip(tensors["ratios"].tolist(), tensors["scales"].tolist(), strict=True)
        ]
    except IsthmusError as err:
        raise VectorError(f"{path.name}: {err.message}") from None
