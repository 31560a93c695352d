"""Decoders of what `isthmus merge` is given: a recipe, model folders and adapter folders, file by file.

A folder that is accepted was merged: the outcome must be the mean of what an independent reader finds in it.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from fuzz.decoders import DECODERS, Decoder, Make, decoder, encoded
from server.engine.recipe import ModelEntry, Recipe, read_recipe
from server.engine.run import merge_folders

Tensors = dict[str, np.ndarray[Any, Any]]
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LAYER = "encoder.layer.0.dense.weight"
CONFIG = {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 5}
LORA = {
    "peft_type": "LORA", "base_model_name_or_path": "base", "r": 2, "lora_alpha": 4,
    "target_modules": ["dense"], "bias": "none", "use_dora": False, "modules_to_save": None,
}  # fmt: skip
RECIPE = b"""method = "ties"
base = "base"
out = "out"
seed = 3

[options]
density = 0.5

[[model]]
path = "a"
label = "a"
weight = 0.25

[[model]]
path = "b"
"""


@decoder
def merge_recipe(folder: Path) -> Decoder:
    path = folder / "recipe.toml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        found, said = read_recipe(path), tomllib.loads(data.decode())
        assert found.method == said["method"]
        assert [model.path for model in found.models] == [folder / entry["path"] for entry in said["model"]]
        assert found.options == said.get("options", {})

    return Decoder((RECIPE,), read)


def _tensors(seed: int) -> Tensors:
    draw = np.random.default_rng(seed)
    shapes = {"embeddings.word_embeddings.weight": (5, 4), LAYER: (4, 4), "encoder.layer.0.dense.bias": (4,)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _factors(seed: int) -> Tensors:
    draw, path = np.random.default_rng(seed), LAYER.removesuffix(".weight")
    shapes = {"lora_A": (2, 4), "lora_B": (4, 2)}
    return {
        f"base_model.model.{path}.{side}.weight": draw.standard_normal(shape).astype(np.float32)
        for side, shape in shapes.items()
    }


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _model_files(seed: int) -> dict[str, bytes]:
    return {"config.json": encoded(CONFIG), MODEL: save(_tensors(seed), {"format": "pt"})}


def adapter_files(seed: int) -> dict[str, bytes]:
    return {"adapter_config.json": encoded(LORA), ADAPTER: save(_factors(seed))}


def _sentence_files() -> dict[str, bytes]:
    """A model as sentence-transformers saves it, in one module."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    return {**_model_files(2), "modules.json": encoded(modules)}


def _sharded_files() -> dict[str, bytes]:
    """A model in two files and their index."""
    tensors, names = _tensors(2), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = [{name: tensors[name] for name in sorted(tensors)[start::2]} for start in range(2)]
    index = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    return {
        "config.json": encoded(CONFIG),
        "model.safetensors.index.json": encoded({"metadata": {}, "weight_map": index}),
        **{file: save(part) for file, part in zip(names, parts, strict=True)},
    }


def _fuzzed_file(files: dict[str, bytes], fuzzed: str, *, adapter: bool) -> Make:
    def make(folder: Path) -> Decoder:
        other = adapter_files(3) if adapter else _model_files(3)
        _write(folder / "base", _model_files(1))
        _write(folder / "other", other)
        _write(folder / "given", files)
        models = tuple(ModelEntry(folder / name, name) for name in ("given", "other"))
        method = "product" if adapter else "weight-averaging"
        dtype = "base" if adapter else "fp32"  # adapters merge in float32, whatever the base has
        recipe = Recipe(models, method, folder / "out", folder / "base", dtype=dtype)
        found = _product if adapter else _whole

        def read(data: bytes) -> None:
            (folder / "given" / fuzzed).write_bytes(data)
            shutil.rmtree(folder / "out", ignore_errors=True)
            merge_folders(recipe, force=True, digests=False)
            parts = [found(folder / name) for name in ("given", "other")]
            for name, value in found(folder / "out").items():
                wanted = np.mean([part[name].astype(np.float64) for part in parts], 0)
                np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5 * (1 + np.abs(wanted).max()))

        return Decoder((files[fuzzed],), read)

    return make


def _whole(folder: Path) -> Tensors:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def _product(folder: Path) -> Tensors:
    """The update of the one layer, with the scaling that the configuration says."""
    config = json.loads((folder / "adapter_config.json").read_text())
    (_, A), (_, B) = sorted(_whole(folder).items())
    scaling = config["lora_alpha"] / (A.shape[0] ** (0.5 if config.get("use_rslora") else 1))
    return {LAYER: scaling * (B.astype(np.float64) @ A.astype(np.float64))}


for _name in _model_files(2):
    DECODERS[f"model-folder-{_name.split('.')[0]}"] = _fuzzed_file(_model_files(2), _name, adapter=False)
DECODERS["model-folder-modules"] = _fuzzed_file(_sentence_files(), "modules.json", adapter=False)
DECODERS["model-folder-index"] = _fuzzed_file(_sharded_files(), "model.safetensors.index.json", adapter=False)
for _name in adapter_files(2):
    DECODERS[f"adapter-folder-{_name.split('.')[0]}"] = _fuzzed_file(adapter_files(2), _name, adapter=True)
