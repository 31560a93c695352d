"""The two baselines that learn by gradients from the very samples that the searches score on: LoRA and (IA)3.

Each learning rate of `RATES` is tried from the same start; a fifth of the samples is held back, and the
parameters of the lowest held-back loss over all rates and epochs win, the untrained ones included. (IA)3
(Liu et al., NeurIPS 2022) scales keys, values and the inputs of the feed-forward's second layer by learned
vectors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config import LoraSection
from common.errors import DataError, ModelError
from common.language.adapters import Adapter
from common.language.layers import put_layers
from common.language.model import CausalLM
from common.language.samples import Sample
from common.language.validation import Validation
from common.progress import NO_REPORT, Report

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
HOLDOUT = 0.2
IA3_MODULES, IA3_FEEDFORWARD = ("k_proj", "v_proj", "down_proj"), ("down_proj",)


@dataclass(frozen=True)
class Tuning:
    """How long and in which batches."""

    epochs: int = 10
    batch_size: int = 8
    seed: int = 0


def tune_lora(
    lm: CausalLM,
    lora: LoraSection,
    start: Adapter,
    samples: Sequence[Sample],
    tuning: Tuning,
    report: Report = NO_REPORT,
) -> tuple[Adapter, dict[str, Any]]:
    """An adapter tuned on `samples` from `start`, and facts: rate, held-back loss, steps. Leaves it attached.

    Raises DataError for fewer than two samples.
    """
    lm.attach(lora, start)
    facts = _tune(lm, lm.lora_parameters(), samples, tuning, report)
    return lm.adapter(), facts


@contextlib.contextmanager
def tuned_ia3(
    lm: CausalLM, samples: Sequence[Sample], tuning: Tuning, report: Report = NO_REPORT
) -> Iterator[dict[str, Any]]:
    """Within the block `lm` has (IA)3 vectors tuned on `samples`; gives the facts as `tune_lora`.

    Raises DataError for fewer than two samples, ModelError for a model without the layers that it scales.
    """
    from peft import IA3Config

    lm.detach()
    config = IA3Config(
        target_modules=list(IA3_MODULES), feedforward_modules=list(IA3_FEEDFORWARD), task_type="CAUSAL_LM"
    )
    try:
        scaled = put_layers(lm.model, config)
    except ValueError as err:
        raise ModelError(f"(IA)3 does not fit this model: {str(err).splitlines()[0]}") from None
    try:
        scaled.eval()
        vectors = {name: vector for name, vector in scaled.named_parameters() if ".ia3_l." in name}
        yield _tune(lm, vectors, samples, tuning, report)
    finally:
        lm.model = scaled.unload()


def _tune(
    lm: CausalLM,
    parameters: Mapping[str, nn.Parameter],
    samples: Sequence[Sample],
    tuning: Tuning,
    report: Report,
) -> dict[str, Any]:
    """Tune `parameters` in place; what they hold at the end is the best."""
    if len(samples) < 2:
        raise DataError(f"{len(samples)} sample to tune on, and some are held back", next_step="give more")
    order = np.random.default_rng([tuning.seed, len(samples)]).permutation(len(samples)).tolist()
    held = max(1, round(HOLDOUT * len(samples)))
    validation = Validation(lm, [samples[n] for n in order[:held]], tuning.batch_size)
    own = Validation(lm, [samples[n] for n in order[held:]], tuning.batch_size)
    start = _copy(parameters)
    first = float(validation.losses().mean())
    lowest, best, facts = first, start, {"rate": 0.0, "epoch": 0}
    for number, rate in enumerate(RATES):
        _load(parameters, start)
        adam = torch.optim.AdamW([p.requires_grad_() for p in parameters.values()], lr=rate, weight_decay=0.0)
        shuffle = np.random.default_rng([tuning.seed, len(samples), number])
        for epoch in range(1, tuning.epochs + 1):
            report(phase="tune", step=number * tuning.epochs + epoch - 1, total=len(RATES) * tuning.epochs)
            _epoch(adam, own, shuffle.permutation(len(own)).tolist(), tuning.batch_size)
            loss = float(validation.losses().mean())
            if math.isfinite(loss) and loss < lowest:
                lowest, best, facts = loss, _copy(parameters), {"rate": rate, "epoch": epoch}
    _load(parameters, best)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return {**facts, "held_back_loss": {"untuned": first, "tuned": lowest}, "tuned_on": len(own)}


def _epoch(adam: torch.optim.Optimizer, own: Validation, order: list[int], batch_size: int) -> None:
    for start in range(0, len(order), batch_size):
        adam.zero_grad()
        loss = own.of(order[start : start + batch_size]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()


def _copy(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
