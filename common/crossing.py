"""Which tensors a run's task vector holds: the one place that decides it, for both shores.

Without `[lora]` what fine-tuning changes of the base's own tensors; with it the adapter, A and B. Gate,
policy, admission and audit all follow this table.
"""

from __future__ import annotations

from pathlib import Path

from common.config import RunConfig
from common.errors import ConfigError
from common.language.adapters import adapter_tensors, is_causal
from common.models.base import trainable_tensors


def crossing_tensors(base: Path, config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that crosses in a run of `config` on the model folder `base`, sorted.

    Raises ConfigError where base, [lora] and [instruction] do not go together, ModelError.
    """
    causal = is_causal(base)
    if causal and config.instruction is None:
        raise ConfigError(
            f"{base}: a causal language model is trained to rank by instructions",
            next_step="add the sections [lora] and [instruction], or name an encoder",
        )
    if not causal and config.instruction is not None:
        raise ConfigError(
            f"{base}: not a causal language model (its config.json names no ...ForCausalLM)",
            next_step="name one, or remove [instruction]",
        )
    if config.lora is None:
        return trainable_tensors(base)
    return adapter_tensors(base, config.lora)
