"""What learning of coefficients needs to go on after kill -9: a small JSON state, and its trajectory.

The state holds coefficients, Adam's moments, the step, the coefficients at the last refresh of the item
embeddings (which are encoded again from them), the best coefficients so far with their held-back loss, and
the seconds spent. Pseudo-users follow from the seed.
Floats are written so that they read back bit for bit. The trajectory is one JSON line a step:

    {"step": 1, "loss": 0.71, "coefficients": {"layer-0": {"toys": 0.201, ...}, ...}}

with the loss before the step and the coefficients after it; step 0 has the initial ones and no loss. Where
pseudo-users are held back, the lines of evaluated steps have their loss at these coefficients: `held_back`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import storage_errors, write_atomic


@dataclass
class LearningState:
    """Everything that changes while coefficients [groups, domains] are learned."""

    step: int
    initial: float
    search: dict[str, float]  # held-back loss of each common coefficient that was tried
    coefficients_GD: Tensor
    refreshed_GD: Tensor
    mean_GD: Tensor
    square_GD: Tensor
    best_GD: Tensor
    initial_loss: float | None = None  # held-back losses; None where nothing is held back
    best_loss: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations since the best one
    stopped: bool = False
    seconds: float = 0.0

    @classmethod
    def start(cls, initial: float, groups: int, domains: int) -> LearningState:
        """All coefficients at `initial`."""
        values_GD = torch.full((groups, domains), initial)
        zeros_GD = torch.zeros_like(values_GD)
        return cls(
            0, initial, {}, values_GD, values_GD.clone(), zeros_GD, zeros_GD.clone(), values_GD.clone()
        )

    @property
    def result(self) -> Tensor:
        """The result: the best coefficients where pseudo-users were held back, else the last ones."""
        return self.coefficients_GD if self.best_loss is None else self.best_GD

    def evaluated(self, loss: float, patience: int) -> None:
        """Take note of the held-back loss at the present coefficients; the first one is the initial loss."""
        if self.initial_loss is None:
            self.initial_loss = self.best_loss = loss
        elif self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_GD, self.best_step = loss, self.coefficients_GD.clone(), self.step
            self.waited = 0
        else:
            self.waited += 1
            self.stopped = self.waited >= patience

    def adam(self, gradient_GD: Tensor, learning_rate: float) -> None:
        """One step of torch's Adam (default betas, no weight decay) against this gradient."""
        value_GD = self.coefficients_GD.requires_grad_()
        adam = torch.optim.Adam([value_GD], lr=learning_rate, foreach=False)
        adam.state[value_GD] = {
            "step": torch.tensor(float(self.step)),
            "exp_avg": self.mean_GD,
            "exp_avg_sq": self.square_GD,
        }
        value_GD.grad = gradient_GD
        adam.step()
        self.coefficients_GD = value_GD.detach()
        self.step += 1

    def save(self, path: Path, inputs: str) -> None:
        """Write the state whole or not at all; `inputs` is the digest of what is being learned."""
        record: dict[str, Any] = {"inputs": inputs}
        for field in fields(self):
            value = getattr(self, field.name)
            record[field.name] = value.tolist() if isinstance(value, Tensor) else value
        write_atomic(path, json.dumps(record).encode("ascii"))

    @classmethod
    def load(cls, path: Path, inputs: str) -> LearningState | None:
        """The saved state of these very inputs, or None when there is none."""
        try:
            record = json.loads(path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(record, dict) or record.pop("inputs", None) != inputs:
            return None
        values: dict[str, Any] = {
            name: torch.tensor(value) if name.endswith("_GD") else value for name, value in record.items()
        }
        return cls(**values)


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
