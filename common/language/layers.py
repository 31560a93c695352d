"""PEFT's layers put into a loaded model: LoRA as a run's section says it, or what a configuration names."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from common.config import LoraSection


def put_lora(model: Any, lora: LoraSection, task: Literal["CAUSAL_LM", "FEATURE_EXTRACTION"]) -> Any:
    """`model` within LoRA layers: A random, B zero. Raises ValueError where no layer has such a name."""
    from peft import LoraConfig

    return put_layers(
        model,
        LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft takes any number
            lora_dropout=lora.dropout, target_modules=list(lora.modules), task_type=task,
        ),
    )  # fmt: skip


def put_layers(model: Any, config: Any) -> Any:
    """`model` within the layers of a `PeftConfig`. Raises ValueError where it has no place for them."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # peft asks transformers for a property by the name that it had before
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)
