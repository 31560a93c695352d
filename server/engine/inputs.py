"""The folders of a recipe, opened, compared with each other and named by what they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, VectorError
from server.engine.digests import stamp
from server.engine.recipe import Recipe
from server.engine.stream import FolderVectors, Reader
from server.engine.writing import item_size
from server.folders import FLOATS, ModelFolder, Stored, match_model, open_folder

KEY_VERSION = 3


class Inputs:
    """The folders of a recipe, opened and compared; `models` maps a label to where its tensors lie."""

    def __init__(self, recipe: Recipe) -> None:
        if recipe.base is None:
            raise ConfigError("the recipe names no base model", next_step="give `base` (or --base)")
        self.recipe = recipe
        self.warnings: list[str] = []
        self.base = open_folder(recipe.base)
        if not self.base.config and not self.base.is_sentence_model:
            raise ConfigError(
                f"{recipe.base}: has no config.json", next_step="give a folder that save_pretrained wrote"
            )
        self.folders: dict[str, ModelFolder] = {}
        self.models: dict[str, dict[str, Stored]] = {}
        for entry in recipe.models:
            folder = open_folder(entry.path)
            self.models[entry.label], warnings = match_model(self.base, folder)
            self.folders[entry.label] = folder
            self.warnings += [f"{entry.label}: {warning}" for warning in warnings]
        if len(self.models) == 1:
            self.warnings.append("one model only; the method is applied to it alone")

    @property
    def files(self) -> list[Path]:
        """Every weight file, once."""
        folders = [self.base, *self.folders.values()]
        return list(dict.fromkeys(f.path / w.relative for f in folders for w in f.files))

    def vectors(self) -> FolderVectors:
        weights = [1.0 if entry.weight is None else entry.weight for entry in self.recipe.models]
        return FolderVectors(self.base, self.models, weights)

    def check_buffers(self, reader: Reader) -> None:
        """Raises VectorError where an integer tensor of a model differs from the base's."""
        for tensor in self.base.tensors.values():
            for model in self.models.values():
                other = model.get(tensor.name)
                if tensor.dtype in FLOATS or other is None:
                    continue
                if not np.array_equal(_bytes(reader, tensor), _bytes(reader, other)):
                    raise VectorError(
                        f"{other.file}: tensor {other.key!r} ({other.dtype}) differs from the base's",
                        next_step="integer tensors do not merge; use models that have the base's",
                    )


def check_out(recipe: Recipe) -> None:
    """Refuse an output folder that is, holds or lies in one of the inputs."""
    out = recipe.out.resolve()
    for path in filter(None, [recipe.base, *(entry.path for entry in recipe.models)]):
        folder = path.resolve()
        if out == folder or out in folder.parents or folder in out.parents:
            raise ConfigError(
                f"{recipe.out}: the output is, holds or lies in the input folder {path}",
                next_step="choose another output folder",
            )


def check_settings(recipe: Recipe, *, learns: bool, needs_catalogs: bool, warnings: list[str]) -> None:
    """Raises ConfigError where a catalog is missing; what was given and is of no use is a warning."""
    method = recipe.method
    if recipe.learning and not learns:
        warnings.append(f"the [learning] section was not used: {method} learns nothing")
    if recipe.text and not needs_catalogs:
        warnings.append(f"the [text] section was not used: {method} reads no texts")
    if recipe.device == "cuda" and not needs_catalogs:
        warnings.append(f"device cuda was not used: {method} runs on the processor")
    for entry in recipe.models:
        if needs_catalogs and entry.catalog is None:
            raise ConfigError(
                f"method {method!r} needs the catalog of every model; {entry.label!r} has none",
                next_step=f"give `catalog` (--catalog {entry.label}=FILE), or use a method that needs none",
            )
        if not needs_catalogs and entry.catalog is not None:
            warnings.append(f"the catalog of {entry.label} was not used: {method} needs none")


def check_memory(recipe: Recipe, values: int) -> None:
    """Raises ConfigError where so many values of every model cannot be in memory at once, as float32."""
    wanted, available = 4 * values * len(recipe.models), available_bytes()
    if available is not None and wanted > available:
        raise ConfigError(
            f"method {recipe.method!r} holds {wanted / 1e9:.1f} GB of {len(recipe.models)} models at once, "
            f"{available / 1e9:.1f} GB of memory are free",
            next_step="merge fewer models, or by a method that reads blocks (--explain all tells)",
        )


def available_bytes() -> int | None:
    """Memory that can be had without swapping; None where nobody says (not Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def merge_key(recipe: Recipe, options: Mapping[str, Any], inputs: Inputs) -> str:
    """Names everything that the result follows from; files by path, size and times."""
    facts = {
        "schema": KEY_VERSION,
        "recipe": {**asdict(recipe), "options": dict(options), "out": ""},
        "files": {str(path): stamp(path) for path in inputs.files},
        "catalogs": {
            str(e.catalog): stamp(e.catalog) for e in recipe.models if e.catalog and e.catalog.exists()
        },
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _bytes(reader: Reader, tensor: Stored) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = np.empty(tensor.size * item_size(tensor.dtype), np.uint8)
    reader.read_bytes(tensor, tensor.start, data)
    return data
