"""LoRA adapters as vectors that cross: their table, their first values, and their folder in PEFT's layout.

Rules: an adapter holds `A` [rank, inputs] and `B` [outputs, rank] for exactly the layers that the run's
`[lora]` section names, under the names that PEFT saves; no layer with a row or column for each word of the
vocabulary is ever adapted (its adapter would tell which words the data hold); a folder is safetensors and
JSON, never pickle, and `PeftModel.from_pretrained(base, folder)` loads it. All owners of a run begin with the
same A, drawn from the run's seed, or their adapters could not be mixed factor by factor.

    table = adapter_tensors(base, LoraSection(rank=8))
    adapter = initial_adapter(table, seed=0)   # B is zero: the model is the base
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from common.config import LoraSection, validate
from common.errors import BaseMismatchError, ModelError, VectorError, suggest
from common.files import replace_folder, storage_errors
from common.language.peft_folder import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter, read_settings
from common.models.base import is_table, model_digest, read_config, read_entries
from common.models.weights import FLOAT_DTYPES, tensor_table

if TYPE_CHECKING:
    import torch

Adapter: TypeAlias = "dict[str, torch.Tensor]"
Table: TypeAlias = Mapping[str, tuple[int, ...]]

_VOLATILE_KEYS = ("base_model_name_or_path", "peft_version", "inference_mode")
_UNEVEN = (
    "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "layers_to_transform", "exclude_modules",
)  # fmt: skip


def is_causal(base: Path) -> bool:
    """Whether a model folder is a causal language model, by the class that its configuration names."""
    named = read_config(base).get("architectures") or [""]
    return str(named[0]).endswith(("ForCausalLM", "LMHeadModel"))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG_FILE).is_file()


def adapted_layers(base: Path, lora: LoraSection) -> dict[str, tuple[int, int]]:
    """Path in the model and weight shape [outputs, inputs] of every layer that `lora` adapts, sorted.

    Raises ModelError naming a module that the base lacks, or one that would tell the vocabulary.
    """
    vocabulary = read_config(base).get("vocab_size")
    linear = {
        entry.name.removesuffix(".weight"): entry.shape
        for entry in read_entries(base)
        if len(entry.shape) == 2
        and entry.name.endswith(".weight")
        and entry.dtype in FLOAT_DTYPES
        and "pooler" not in entry.name.split(".")  # nothing that ranks uses it
    }
    layers: dict[str, tuple[int, int]] = {}
    for module in lora.modules:
        found = {path: shape for path, shape in linear.items() if path.rpartition(".")[2] == module}
        if not found:
            known = {path.rpartition(".")[2] for path in linear if not is_table(f"{path}.weight")}
            raise ModelError(
                f"{base}: no linear layer is called {module!r}",
                next_step=f"lora.modules: {suggest(module, known)}",
            )
        for path, (rows, columns) in found.items():
            if is_table(f"{path}.weight") or rows == vocabulary:
                raise ModelError(
                    f"layer {path!r} has a row for each word: what an adapter changes there tells the words "
                    "of the data",
                    next_step=f"take {module!r} out of lora.modules",
                )
            layers[path] = (rows, columns)
    return dict(sorted(layers.items()))


def adapter_tensors(base: Path, lora: LoraSection) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an adapter of `base`, sorted: what crosses in a run with `lora`.

    Raises ModelError as `adapted_layers`.
    """
    table: dict[str, tuple[int, ...]] = {}
    for path, (rows, columns) in adapted_layers(base, lora).items():
        table[f"{PREFIX}{path}.lora_A.weight"] = (lora.rank, columns)
        table[f"{PREFIX}{path}.lora_B.weight"] = (rows, lora.rank)
    return dict(sorted(table.items()))


def check_adapter(adapter: Mapping[str, torch.Tensor], table: Table) -> None:
    """Raises VectorError naming the first tensor that is extra, missing, of another rank, or not finite.

    `table` is `adapter_tensors` of the run's base and `[lora]` section.
    """
    import torch

    for name in sorted(adapter.keys() - table.keys()):
        raise VectorError(
            f"extra tensor {name!r}: not of a module that the run adapts",
            next_step="train with the run's lora.modules, on the run's base model",
        )
    for name in sorted(table.keys() - adapter.keys()):
        raise VectorError(f"tensor {name!r} is missing", next_step="train with the run's lora.modules")
    for name, shape in table.items():
        got = tuple(adapter[name].shape)
        if got != tuple(shape):
            axis = 0 if ".lora_A." in name else 1
            only_rank = len(got) == 2 and got[1 - axis] == shape[1 - axis]
            wrong = f"rank {got[axis]}, expected {shape[axis]}" if only_rank else f"shape {list(got)}"
            raise VectorError(
                f"tensor {name!r} has {wrong}" + ("" if only_rank else f", expected {list(shape)}"),
                next_step="train with the run's lora.rank" if only_rank else "use the run's base model",
            )
        if not bool(torch.isfinite(adapter[name]).all()):
            raise VectorError(
                f"tensor {name!r} holds NaN or infinite values",
                next_step="lower the learning rate and fine-tune again",
            )


def initial_adapter(table: Table, seed: int) -> Adapter:
    """Where every owner of a run begins: A uniform as PEFT draws it, from `seed` and its name; B zero.

    PEFT: Kaiming uniform with a = sqrt(5), which is uniform within 1 / sqrt(inputs). float32, CPU.
    """
    import torch

    adapter: Adapter = {}
    for name, shape in table.items():
        if ".lora_B." in name:
            adapter[name] = torch.zeros(shape)
            continue
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        adapter[name] = (2.0 * torch.rand(shape, generator=generator) - 1.0) / math.sqrt(shape[1])
    return adapter


def save_adapter(
    base: Path,
    lora: LoraSection,
    adapter: Mapping[str, torch.Tensor],
    folder: Path,
    readme: str,
    *,
    base_name: str | None = None,
) -> None:
    """Write an adapter as PEFT does, float32, whole or not at all; an older folder there is replaced.

    `base_name` is how the folder calls its base: a hub name, or a path that stays on this host; None: it does
    not. Raises VectorError where the adapter does not fit `base` and `lora`, StorageError.
    """
    import torch

    from common.vectors import save_tensors

    check_adapter(adapter, adapter_tensors(base, lora))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal(base) else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
    }
    stage = folder.with_name(f".{folder.name}.stage")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with storage_errors(folder):
            stage.mkdir(parents=True)
            tensors = {name: adapter[name].detach().to("cpu", torch.float32) for name in sorted(adapter)}
            save_tensors(stage / WEIGHTS_FILE, tensors, metadata={"format": "pt"})
            (stage / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (stage / "README.md").write_text(readme, encoding="utf-8")
            replace_folder(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def load_adapter(folder: Path, base: Path | None = None) -> tuple[LoraSection, Adapter]:
    """The settings and tensors (float32, CPU) of a folder that `save_adapter` or PEFT wrote.

    With `base` they are compared with that model, too. Raises ModelError for a folder or setting that is not
    supported, BaseMismatchError for an adapter of another base that is on this host, VectorError naming file
    and tensor for one that is extra, missing, misshapen or not finite.
    """
    import torch

    lora, read = read_lora(folder), read_adapter(folder.name, folder)
    tensors: Adapter = {}
    for path, module in read.modules.items():
        for entry, values in zip((module.B, module.A), read.factors(path), strict=True):
            tensors[entry.name] = torch.tensor(values)
    if base is not None:
        own = base_of(folder)
        if own and own.resolve() != base.resolve() and model_digest(own) != model_digest(base):
            raise BaseMismatchError(
                f"{folder}: an adapter of {own}, which is another model than {base}",
                next_step="use it with the base that it was trained on",
            )
        check_adapter(tensors, adapter_tensors(base, lora))
    return lora, dict(sorted(tensors.items()))


def read_lora(folder: Path) -> LoraSection:
    """The `[lora]` section that an adapter folder was trained with. Raises ModelError."""
    file, config = folder / CONFIG_FILE, read_settings(folder)
    wrong = [key for key in _UNEVEN if config.get(key)]
    if not isinstance(config.get("target_modules"), list):
        wrong.append("target_modules")
    if wrong:
        raise ModelError(
            f"{file}: {wrong[0]} = {config.get(wrong[0])!r} is not supported here",
            next_step="needed is plain LoRA of one rank on linear layers that are listed by name",
        )
    settings = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "modules": config["target_modules"],
    }
    return validate(settings, LoraSection, where=str(file))


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) that names an adapter: its tensors' bytes and what its configuration makes of them."""
    config = {key: value for key, value in read_settings(folder).items() if key not in _VOLATILE_KEYS}
    statement = {"tensors": tensor_table(folder / WEIGHTS_FILE), "config": config}
    return hashlib.sha256(json.dumps(statement, sort_keys=True).encode()).hexdigest()


def base_of(folder: Path) -> Path | None:
    """The base model's folder, where an adapter's configuration names one on this host."""
    named = read_settings(folder).get("base_model_name_or_path")
    return Path(named) if named and Path(named).is_dir() else None


def folder_digest(folder: Path) -> str:
    """The digest that names an adapter or a model folder, whichever it is. Raises ModelError."""
    return adapter_digest(folder) if is_adapter(folder) else model_digest(folder)
