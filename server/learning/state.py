"""What a learning run needs to go on after kill -9: a small JSON state, and the trajectory it wrote.

The state holds coefficients, Adam's moments, the step, the coefficients at the last refresh of the item
embeddings (which are encoded again from them) and the seconds spent. Pseudo-users follow from the seed.
Floats are written so that they read back bit for bit. The trajectory is one JSON line a step:

    {"step": 1, "loss": 0.71, "coefficients": {"layer-0": {"toys": 0.201, ...}, ...}}

with the loss before the step and the coefficients after it; step 0 has the initial ones and no loss.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import storage_errors, write_atomic


@dataclass
class LearningState:
    """Everything that changes while coefficients [groups, domains] are learned."""

    step: int
    coefficients_GD: Tensor
    refreshed_GD: Tensor
    mean_GD: Tensor
    square_GD: Tensor
    seconds: float = 0.0

    @classmethod
    def start(cls, initial: float, groups: int, domains: int) -> LearningState:
        values_GD = torch.full((groups, domains), initial)
        zeros_GD = torch.zeros_like(values_GD)
        return cls(0, values_GD, values_GD.clone(), zeros_GD, zeros_GD.clone())

    def save(self, path: Path, inputs: str) -> None:
        """Write the state whole or not at all; `inputs` is the digest of what is being learned."""
        record = {
            "inputs": inputs,
            "step": self.step,
            "coefficients": self.coefficients_GD.tolist(),
            "refreshed": self.refreshed_GD.tolist(),
            "mean": self.mean_GD.tolist(),
            "square": self.square_GD.tolist(),
            "seconds": self.seconds,
        }
        write_atomic(path, json.dumps(record).encode("ascii"))

    @classmethod
    def load(cls, path: Path, inputs: str) -> LearningState | None:
        """The saved state of these very inputs, or None when there is none."""
        try:
            record = json.loads(path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("inputs") != inputs:
            return None
        return cls(
            step=record["step"],
            coefficients_GD=torch.tensor(record["coefficients"]),
            refreshed_GD=torch.tensor(record["refreshed"]),
            mean_GD=torch.tensor(record["mean"]),
            square_GD=torch.tensor(record["square"]),
            seconds=record["seconds"],
        )


class Trajectory:
    """The append-only JSON lines of one learning run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep the lines up to `step`, drop what a killed process wrote after its last saved state."""
        kept = [json.dumps(line) for line in read_trajectory(self.path) if line["step"] <= step]
        write_atomic(self.path, "".join(f"{line}\n" for line in kept).encode("ascii"))

    def append(self, records: list[dict[str, Any]]) -> None:
        """Add the records durably."""
        with storage_errors(self.path), self.path.open("a", encoding="ascii") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())


def read_trajectory(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a trajectory; a line that was cut off by a kill, and all after it, is left out."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
