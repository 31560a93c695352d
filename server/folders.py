"""Model folders: which tensors lie where, and whether models and base belong together.

A folder is in Hugging Face layout (`model.safetensors`, or shards with `model.safetensors.index.json`) or
in sentence-transformers layout, whose modules (a Dense layer, say) may hold weights of their own: their
tensors are named `2_Dense/linear.weight`. Only headers are read here. Never pickle.

The base decides: its tensors, shapes, files and configuration are those of the result. A model must have
the same float tensors with the same shapes; F32, BF16 and F16 may differ between folders. Two differences
that libraries make by themselves are allowed for: a tied output layer that is stored in one folder only,
and integer buffers (`position_ids`) that newer versions leave out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from common.errors import BaseMismatchError, ModelError, VectorError
from common.models.weights import FLOAT_DTYPES, read_shards, read_weights

WEIGHTS = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
INDEX = "model.safetensors.index.json"
MAX_PATH = 200
_MODULE = r"([\w-][\w.-]*(/[\w-][\w.-]*)*/?)?"
FLOATS = frozenset({"F32", "BF16", "F16"})
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.bin")
# What must not differ between models of one base: it changes what the same weights compute.
CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size", "head_dim", "vocab_size", "max_position_embeddings", "hidden_act",
)  # fmt: skip
_OUTPUTS = ("lm_head.weight",)
_INPUTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


@dataclass(frozen=True)
class Stored:
    """One tensor as it lies in a file: `start` is its byte offset there."""

    name: str  # as the folder's tensors are called here
    key: str  # as the file calls it
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file, relative to the folder; `index` is the index file that lists it, or None."""

    relative: str
    index: str | None
    tensors: tuple[Stored, ...]


@dataclass(frozen=True)
class ModelFolder:
    """A model folder's weights in file order, and its configuration."""

    path: Path
    files: tuple[WeightFile, ...]
    config: Mapping[str, Any]
    modules: tuple[str, ...]  # the folders of sentence-transformers modules, "" for the folder itself
    config_file: str  # relative

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def is_sentence_model(self) -> bool:
        return (self.path / "modules.json").is_file()


def is_adapter(path: Path) -> bool:
    """Whether `path` is a PEFT adapter rather than a full model."""
    return (path / ADAPTER_CONFIG).is_file()


def open_folder(path: Path) -> ModelFolder:
    """Read the headers of a model folder. Raises ModelError naming the file that is missing or wrong."""
    if not path.is_dir():
        if path.is_file():
            raise ModelError(f"{path}: is a file", next_step="give the folder that it lies in")
        raise ModelError(f"{path}: no such model folder", next_step="check the path; nothing is downloaded")
    modules = _modules(path)
    files: list[WeightFile] = []
    for number, module in enumerate(modules):
        files += _weight_files(path, module, "" if number == 0 else f"{module}/")
    if not files:
        raise ModelError(
            f"{path}: no {WEIGHTS}", next_step="give a folder that save_pretrained wrote, in safetensors"
        )
    config_file = str(PurePosixPath(modules[0]) / "config.json")
    config = _read_json(path / config_file) if (path / config_file).is_file() else {}
    if not isinstance(config, dict):
        raise ModelError(f"{path / config_file}: is not a JSON object", next_step="obtain the model again")
    return ModelFolder(path, tuple(files), config, modules, config_file)


def match_model(base: ModelFolder, model: ModelFolder) -> tuple[dict[str, Stored], list[str]]:
    """Where `model` has each tensor of `base`, and warnings.

    Integer tensors that the model lacks are not in the result. Raises BaseMismatchError for another
    architecture; VectorError naming file and tensor that is missing, extra, misshapen or of another kind.
    """
    _check_config(base, model)
    found: dict[str, Stored] = {}
    warnings: list[str] = []
    for name, wanted in base.tensors.items():
        tensor = model.tensors.get(name) or _tied_input(model, wanted)
        if tensor is not None:
            _check_alike(model, wanted, tensor)
            found[name] = tensor
        elif wanted.dtype in FLOAT_DTYPES:
            raise VectorError(
                f"{model.path}: has no tensor {name!r}, which the base {base.path} has",
                next_step="merge models that were fine-tuned from this base and saved in the same way",
            )
    for name, tensor in model.tensors.items():
        if name in base.tensors:
            continue
        if tensor.dtype in FLOAT_DTYPES and not _is_tied_output(model, name):
            raise VectorError(
                f"{tensor.file}: tensor {name!r} is not in the base {base.path}",
                next_step="merge models that were fine-tuned from this base and saved in the same way",
            )
        warnings.append(f"tensor {name!r} is not in the base and was left out")
    other = sorted({t.dtype for t in found.values()} - {base.tensors[name].dtype for name in found})
    if other:
        kinds = ", ".join(sorted({t.dtype for t in base.tensors.values() if t.dtype in FLOATS}))
        warnings.append(
            f"holds {', '.join(other)} where the base has {kinds}: what rounding changed counts as a change"
        )
    return found, warnings


def _check_config(base: ModelFolder, model: ModelFolder) -> None:
    for key in CONFIG_KEYS:
        wanted, got = base.config.get(key), model.config.get(key)
        if wanted is not None and got is not None and wanted != got:
            raise BaseMismatchError(
                f"{model.path / model.config_file}: {key} is {got!r}, the base has {wanted!r}",
                next_step="merge only models that were fine-tuned from the same base",
            )


def _check_alike(model: ModelFolder, wanted: Stored, tensor: Stored) -> None:
    if tensor.shape != wanted.shape:
        raise VectorError(
            f"{tensor.file}: tensor {wanted.name!r} has shape {list(tensor.shape)}, "
            f"the base has {list(wanted.shape)}",
            next_step="merge only models that were fine-tuned from the same base",
        )
    for one in (wanted, tensor):
        if one.dtype in FLOAT_DTYPES and one.dtype not in FLOATS:
            raise VectorError(
                f"{one.file}: tensor {one.name!r} has dtype {one.dtype}; F32, BF16 and F16 can be merged",
                next_step="save the model in one of these",
            )
    if tensor.dtype != wanted.dtype and not {tensor.dtype, wanted.dtype} <= FLOATS:
        raise VectorError(
            f"{tensor.file}: tensor {wanted.name!r} has dtype {tensor.dtype}, the base has {wanted.dtype}",
            next_step="merge only models that were fine-tuned from the same base",
        )


def _is_tied_output(model: ModelFolder, name: str) -> bool:
    """Whether `name` is an output layer that the model ties to its input embeddings."""
    return name.endswith(_OUTPUTS) and bool(model.config.get("tie_word_embeddings", True))


def _tied_input(model: ModelFolder, wanted: Stored) -> Stored | None:
    """The input embeddings of `model` where it does not store the output layer tied to them."""
    if not _is_tied_output(model, wanted.name):
        return None
    alike = [t for t in model.tensors.values() if t.name.endswith(_INPUTS) and t.shape == wanted.shape]
    return alike[0] if len(alike) == 1 else None


def _modules(path: Path) -> tuple[str, ...]:
    """The module folders of a sentence-transformers model, the Transformer first; else the folder itself."""
    if not (path / "modules.json").is_file():
        return ("",)
    modules = _read_json(path / "modules.json")
    if not isinstance(modules, list) or not modules:
        raise ModelError(f"{path / 'modules.json'}: lists no modules", next_step="obtain the model again")
    found = []
    for module in modules:
        where = module.get("path") if isinstance(module, dict) else None
        if not isinstance(where, str) or len(where) > MAX_PATH or not re.fullmatch(_MODULE, where):
            raise ModelError(
                f"{path / 'modules.json'}: a module's path is not inside the folder",
                next_step="obtain the model again",
            )
        found.append(where)
    return tuple(dict.fromkeys(found))


def _weight_files(folder: Path, module: str, prefix: str) -> list[WeightFile]:
    """The weights of one module, shards in the order of their names."""
    where = folder / module
    if (where / INDEX).is_file():
        shards = read_shards(where / INDEX)
        names = sorted(set(shards.values()))
        files = [
            _weight_file(folder, module, name, prefix, str(PurePosixPath(module) / INDEX)) for name in names
        ]
        have = {tensor.key: Path(file.relative).name for file in files for tensor in file.tensors}
        if different := sorted(
            name for name in have.keys() | shards.keys() if have.get(name) != shards.get(name)
        ):
            raise ModelError(
                f"{where / INDEX}: tensor {different[0]!r} is not in the file that the index names",
                next_step="obtain the model again",
            )
        return files
    if (where / WEIGHTS).is_file():
        return [_weight_file(folder, module, WEIGHTS, prefix, None)]
    if pickled := [name for name in PICKLES if (where / name).is_file()]:
        raise ModelError(
            f"{where / pickled[0]}: is pickled, and pickle files can run code: it is not opened",
            next_step="save the model as safetensors (save_pretrained does)",
        )
    return []


def _weight_file(folder: Path, module: str, name: str, prefix: str, index: str | None) -> WeightFile:
    relative = str(PurePosixPath(module) / name)
    path = folder / relative
    tensors = tuple(
        Stored(prefix + entry.name, entry.name, entry.dtype, entry.shape, path, entry.start)
        for entry in read_weights(path)
    )
    return WeightFile(relative, index, tensors)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{path}: not readable as JSON", next_step="obtain the model again") from None
