"""Model folders of a few tiny tensors, made with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Tensors = Mapping[str, np.ndarray[Any, Any]]
CONFIG = {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1, "vocab_size": 5}
SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.word_embeddings.weight": (5, 4),
    "encoder.layer.0.dense.weight": (4, 4),
    "encoder.layer.0.dense.bias": (4,),
}


def write_model(
    folder: Path, tensors: Tensors, *, shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    """A folder as save_pretrained writes it, with several shards and their index if asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "vocab.txt").write_text("a\nb\n")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def random_tensors(
    seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, scale: float = 1.0
) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(generator.standard_normal(shape) * scale, np.float32)
        for name, shape in shapes.items()
    }


def moved(base: Tensors, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """A model that was fine-tuned from `base`, as it were."""
    step = random_tensors(seed, {name: tensor.shape for name, tensor in base.items()}, 0.1)
    return {name: np.asarray(tensor + step[name]) for name, tensor in base.items()}
