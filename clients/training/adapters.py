"""LoRA on encoders: the same towers, loss and trainer; what trains are adapters, not the base's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clients.training.loss import TwoTower
from common.config import LoraSection, RunConfig
from common.crossing import crossing_tensors
from common.errors import ModelError, VectorError
from common.language.adapters import (
    adapted_layers,
    base_of,
    initial_adapter,
    is_adapter,
    load_adapter,
)
from common.language.layers import put_lora
from common.language.merged import merged_weight
from common.language.peft_folder import CONFIG_FILE
from common.models.encoder import Encoder


class AdapterTower(TwoTower):
    """An encoder with LoRA layers and its loss; only A and B train, from the run's first values."""

    def __init__(self, encoder: Encoder, base: Path, config: RunConfig) -> None:
        lora = config.lora or LoraSection()
        super().__init__(encoder, set(), config.training.temperature)
        wrapped = put_lora(encoder.model, lora, "FEATURE_EXTRACTION")  # into the encoder's own model
        self._adapter = {
            name.replace(".default.", "."): parameter
            for name, parameter in wrapped.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        }
        self.load_trained(initial_adapter(crossing_tensors(base, config), config.run.seed))
        for parameter in self._adapter.values():
            parameter.requires_grad_(True)
        if lora.gradient_checkpointing:
            keep_few_activations(encoder.model)

    def trained_tensors(self) -> dict[str, Tensor]:
        """A and B by the names under which they cross (not copied)."""
        return {name: parameter.detach() for name, parameter in self._adapter.items()}

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Put `trained_tensors` of an earlier moment back in place. Raises VectorError naming a misfit."""
        if tensors.keys() != self._adapter.keys():
            name = min(tensors.keys() ^ self._adapter.keys())
            raise VectorError(f"adapter tensor {name!r} does not fit", next_step="use the run's modules")
        with torch.no_grad():
            for name, parameter in self._adapter.items():
                parameter.copy_(tensors[name])


def keep_few_activations(model: Any) -> None:
    """Gradient checkpointing: each block's activations are computed again in the backward pass."""
    # the method's name since transformers 5.23, and the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def load_adapted(folder: Path, **options: Any) -> Encoder:
    """`Encoder.load` of a model folder, or of an adapter's base with the adapter merged in, in memory.

    Raises ModelError where an adapter's base is not on this host, VectorError where it does not fit.
    """
    if not is_adapter(folder):
        return Encoder.load(folder, **options)
    base = required_base(folder)
    encoder = Encoder.load(base, **options)
    lora, adapter = load_adapter(folder)
    parameters: dict[str, nn.Parameter] = dict(encoder.model.named_parameters())
    with torch.no_grad():
        for layer in adapted_layers(base, lora):
            weight = parameters[f"{layer}.weight"]
            weight.copy_(merged_weight(weight.cpu(), lora, adapter, layer))
    return encoder


def required_base(folder: Path) -> Path:
    """The base that an adapter's folder names. Raises ModelError where it is not on this host."""
    base = base_of(folder)
    if base is None:
        raise ModelError(
            f"{folder / CONFIG_FILE}: its base model is not on this host",
            next_step="install the base again where it was, or take part in a run with the new place",
        )
    return base
