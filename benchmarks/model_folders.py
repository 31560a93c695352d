"""Model folders for benchmarks: a BERT of any size from random numbers, and fine-tuned copies of a base.

A copy is the base plus small seeded noise on every float tensor. numpy and safetensors alone; one shard in
memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[np.float32]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POSITIONS = 64

# Not BertModel: mergekit 0.1.4 ends with a TypeError on its own table of that architecture (it adds a tuple
# to a list), and finds the tensors by itself where it does not know the name.
ARCHITECTURE = "BertEncoder"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order."""
    return sorted(folder.glob("*.safetensors"))


def make_bert(
    folder: Path, *, layers: int, hidden: int, vocabulary: int = 64, shard_bytes: int = 1 << 62
) -> Path:
    """A BertModel with random float32 weights; in several files where it is larger than `shard_bytes`."""
    folder.mkdir(parents=True)
    heads = max(2, hidden // 64)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "bert",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": POSITIONS,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "type_vocab_size": 2,
        "vocab_size": vocabulary,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size_bytes = 0
    for name, shape in _shapes(layers, hidden, vocabulary):
        tensor_bytes = 4 * math.prod(shape)
        if shards[-1] and size_bytes + tensor_bytes > shard_bytes:
            shards.append({})
            size_bytes = 0
        shards[-1][name] = shape
        size_bytes += tensor_bytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        generator = np.random.Generator(np.random.SFC64(number))
        tensors: dict[str, Any] = {name: _normal(generator, shape, 0.02) for name, shape in shard.items()}
        if number == 1:  # an integer tensor, as MiniLM has one
            tensors["embeddings.position_ids"] = np.arange(POSITIONS)[None]
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = 4 * sum(math.prod(shape) for shard in shards for shape in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
    return folder


def make_base(source: Path, folder: Path) -> Path:
    """The model folder `source` again, under an architecture's name that mergekit can merge."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(".*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [ARCHITECTURE]}, indent=1))
    return folder


def make_copy(base: Path, folder: Path, seed: int, scale: float = 0.001) -> Path:
    """The base with normal noise of deviation `scale` on every float tensor, with its other files."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", ".*"))
    for number, path in enumerate(weight_files(base)):
        generator = np.random.Generator(np.random.SFC64([seed, number]))
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == np.float32:
                tensors[name] = tensor + _normal(generator, tensor.shape, scale)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return folder


def link_copy(model: Path, folder: Path) -> Path:
    """Another folder of the same model, whose weight files are hard links."""
    shutil.copytree(model, folder, copy_function=os.link)
    return folder


def _normal(generator: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    values = generator.standard_normal(shape, dtype=np.float32)
    values *= np.float32(scale)
    return values


def _shapes(layers: int, hidden: int, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "embeddings.word_embeddings.weight", (vocabulary, hidden)
    yield "embeddings.position_embeddings.weight", (POSITIONS, hidden)
    yield "embeddings.token_type_embeddings.weight", (2, hidden)
    yield from _norm("embeddings.LayerNorm", hidden)
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        yield from _linear(f"{prefix}.attention.output.dense", hidden, hidden)
        yield from _norm(f"{prefix}.attention.output.LayerNorm", hidden)
        yield from _linear(f"{prefix}.intermediate.dense", 4 * hidden, hidden)
        yield from _linear(f"{prefix}.output.dense", hidden, 4 * hidden)
        yield from _norm(f"{prefix}.output.LayerNorm", hidden)


def _linear(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)
