"""An adapter merged into its base: `W + alpha / rank * B A`, as a model folder that needs no PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import LoraSection
from common.files import replace_folder, storage_errors
from common.language.adapters import adapted_layers, adapter_tensors, check_adapter
from common.language.peft_folder import PREFIX
from common.models.base import weight_files

if TYPE_CHECKING:
    import torch

_NOT_COPIED = {".md", ".safetensors", ".bin", ".h5", ".msgpack", ".gguf", ".onnx"}


def merged_weight(
    weight: torch.Tensor, lora: LoraSection, adapter: Mapping[str, torch.Tensor], layer: str
) -> torch.Tensor:
    """`W + alpha / rank * B A` [R, C] of one layer: summed in float32, given in the dtype of `weight`."""
    B_RK, A_KC = (adapter[f"{PREFIX}{layer}.lora_{letter}.weight"].float() for letter in "BA")
    return (weight.float() + lora.scaling * B_RK @ A_KC).to(weight.dtype)


def merge_into_base(
    base: Path, lora: LoraSection, adapter: Mapping[str, torch.Tensor], folder: Path, readme: str
) -> None:
    """Write the base with the adapter merged into it to `folder`, whole or not at all.

    Sums are in float32, tensors keep the base's dtype; configuration and tokenizer are the base's files.
    Needs memory for the largest file of the base. Raises VectorError where the adapter does not fit,
    StorageError.
    """
    from safetensors.torch import load_file

    from common.vectors import save_tensors

    check_adapter(adapter, adapter_tensors(base, lora))
    layers = adapted_layers(base, lora)
    stage = folder.with_name(f".{folder.name}.stage")
    shutil.rmtree(stage, ignore_errors=True)
    try:
        with storage_errors(folder):
            stage.mkdir(parents=True)
            for file in weight_files(base):
                tensors = load_file(file)
                for layer in [name for name in layers if f"{name}.weight" in tensors]:
                    weight = tensors[f"{layer}.weight"]
                    tensors[f"{layer}.weight"] = merged_weight(weight, lora, adapter, layer)
                save_tensors(stage / file.name, tensors, metadata={"format": "pt"})
            for beside in base.iterdir():
                if beside.is_file() and beside.suffix not in _NOT_COPIED:
                    shutil.copyfile(beside, stage / beside.name)
            (stage / "README.md").write_text(readme, encoding="utf-8")
            replace_folder(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
