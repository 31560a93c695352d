"""Merges that look at catalogs: learned coefficients, and methods on Gram matrices. Imports torch.

The vectors are in memory here. Learned methods merge what fine-tuning in a federation may change
(`common.models.base.trainable_tensors`): embedding tables and poolers stay the base's.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ConfigError, ModelError
from common.progress import Report
from server.engine.inputs import check_memory
from server.engine.stream import FolderVectors
from server.merging._vectors import Floats

if TYPE_CHECKING:
    from server.engine.inputs import Inputs


@dataclass(frozen=True)
class Learned:
    """A merged vector [tensor -> values], the resolved options, and what was found.

    `found` are entries of `merge.json`: coefficients, reasons, and the sections of the recipe, resolved.
    `catalogs` name each model's catalog by file and digest. `trajectory` holds the coefficients step by step.
    """

    vector: dict[str, Floats]
    options: dict[str, Any]
    found: dict[str, Any]
    catalogs: dict[str, dict[str, str]]
    trajectory: Path | None


def learn_vector(inputs: Inputs, vectors: FolderVectors, work: Path, report: Report) -> Learned:
    """Merge by a method that needs catalogs; `work` keeps its progress.

    Raises ConfigError (options, device), DataError (catalog), ModelError (base), VectorError.
    """
    recipe = inputs.recipe
    _choose_device(recipe.device)
    import torch

    from common.config import MergeMethod, RunConfig, validate
    from common.files import sha256_file
    from common.models.base import trainable_tensors
    from common.models.device import default_device
    from server.engine.catalogs import read_catalog
    from server.merge import LEARNED_PAPERS, check_method, run_merge

    config = validate(
        {
            "run": {"seed": recipe.seed},
            "base": {"model": str(inputs.base.path)},
            "learning": dict(recipe.learning),
            "text": dict(recipe.text),
        },
        RunConfig,
        where="recipe",
    )
    method = MergeMethod(method=recipe.method, options=dict(recipe.options))
    options = check_method(method)
    if other := [file.relative for file in inputs.base.files if Path(file.relative).parent != Path()]:
        raise ModelError(
            f"{inputs.base.path}: has weights in {other[0]}; {recipe.method} takes the folder's own alone",
            next_step="use a base without modules of its own weights, or a method that needs no catalogs",
        )
    catalogs = {entry.label: read_catalog(entry.catalog) for entry in recipe.models if entry.catalog}
    kept = trainable_tensors(inputs.base.path) if recipe.method in LEARNED_PAPERS else dict(vectors.shapes)
    check_memory(recipe, sum(math.prod(vectors.shapes[name]) for name in kept if name in vectors.shapes))
    taus = _read(vectors, set(kept), inputs.warnings)
    tensors = {
        label: {name: torch.from_numpy(values) for name, values in tau.items()} for label, tau in taus.items()
    }
    result = run_merge(method, inputs.base.path, tensors, catalogs, config, work, report)
    found = {"coefficients": result.coefficients, "facts": result.facts, "device": default_device()}
    sections = ("learning", "text") if recipe.method in LEARNED_PAPERS else ("text",)
    found |= {section: getattr(config, section).model_dump(mode="json") for section in sections}
    if result.facts.get("fallback"):
        inputs.warnings.append("no step lowered the held-back loss: the result is where learning began")
    return Learned(
        {name: tensor.numpy() for name, tensor in result.vector.items()},
        options,
        found,
        {
            entry.label: {"name": entry.catalog.name, "sha256": sha256_file(entry.catalog)}
            for entry in recipe.models
            if entry.catalog
        },
        result.trajectory_path,
    )


def _read(vectors: FolderVectors, kept: set[str], warnings: list[str]) -> dict[str, dict[str, Floats]]:
    """The kept tensors of every vector; a change in any other tensor is a warning."""
    shapes = vectors.shapes
    taus = {
        label: {name: np.zeros(shapes[name], np.float32) for name in shapes if name in kept}
        for label in vectors.labels
    }
    lost: set[str] = set()
    for block in vectors.blocks():
        for label, tau_X in zip(vectors.labels, block.tau_NX, strict=True):
            if block.name in kept:
                taus[label][block.name].reshape(-1)[block.start : block.stop] = tau_X
            elif block.name not in lost and tau_X.any():
                lost.add(block.name)
    if lost:
        warnings.append(f"changes in {', '.join(sorted(lost))} were left out: this method keeps the base's")
    return taus


def _choose_device(device: str) -> None:
    """Make torch see a GPU or none. Raises ConfigError where there is none and one is asked for."""
    if device == "cpu" and "torch" not in sys.modules:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device cuda: torch finds no GPU", next_step="use --device cpu")
    if device == "cpu" and available:
        raise ConfigError("device cpu: torch was loaded with a GPU before", next_step="use a new process")
