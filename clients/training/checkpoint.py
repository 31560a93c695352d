"""Checkpoints without pickle: safetensors and JSON, whole or not at all.

transformers' own checkpoints are pickles and are written file by file, so a kill in between leaves a
torn one. Here a checkpoint is a folder that appears by one rename; the newest one there is complete.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from common.files import fsync_folder, storage_errors, write_atomic
from common.vectors import save_tensors

_PREFIX = "checkpoint-"
TRAINER_STATE = "trainer_state.json"
_WEIGHTS, _OPTIMIZER, _RANDOM, _STATE = (
    "weights.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "state.json",
)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)


def write_checkpoint(
    folder: Path,
    step: int,
    *,
    weights: dict[str, Tensor],
    optimizer: Optimizer,
    trainer_state: dict[str, Any],
    state: dict[str, Any],
) -> Path:
    """Write `checkpoint-<step>` and remove older ones. Returns its path. Raises StorageError.

    `trainer_state` is transformers' own (JSON), `state` whatever else must survive (JSON).
    """
    final, temporary = folder / f"{_PREFIX}{step}", folder / f".{_PREFIX}{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    with storage_errors(final):
        temporary.mkdir(parents=True)
        save_tensors(temporary / _WEIGHTS, weights)
        save_tensors(temporary / _OPTIMIZER, _flatten(optimizer))
        save_tensors(temporary / _RANDOM, _random_state())
        write_atomic(temporary / TRAINER_STATE, json.dumps(trainer_state).encode())
        write_atomic(temporary / _STATE, json.dumps(state).encode())
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        fsync_folder(folder)
    for path in folder.glob(f"{_PREFIX}*"):
        if path != final:
            shutil.rmtree(path, ignore_errors=True)
    return final


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint (CPU)."""
    return dict(load_file(checkpoint / _WEIGHTS))


def restore_optimizer(checkpoint: Path, optimizer: Optimizer) -> None:
    """Put the moments and step counts of a checkpoint back into `optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(checkpoint / _OPTIMIZER).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def restore_random(checkpoint: Path) -> None:
    """Set torch's random state (CPU, and CUDA where there is one) to that of a checkpoint."""
    states = load_file(checkpoint / _RANDOM)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _flatten(optimizer: Optimizer) -> dict[str, Tensor]:
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items()}


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
