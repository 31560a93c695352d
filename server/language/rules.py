"""The rules of `server.adapters` as merge methods of a run: factors, product, elementwise, KnOTS.

What crosses keeps the run's rank and scaling `s = alpha / rank`, so an update `B A` whose scaling is 1 is
sent as `B / sqrt(s)` and `A / sqrt(s)`, and a rule that raises the rank is cut back to the run's: the nearest
update of that rank (Eckart and Young), with the largest relative residual of a layer among the facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.config import LoraSection
from common.language.adapters import Adapter
from common.language.mixing import layers
from common.language.peft_folder import PREFIX, AdapterFolder, Module
from common.low_rank import truncate
from common.models.weights import WeightEntry
from server import adapters as local
from server.adapters.rules import resolve
from server.language.registry import METHODS, AdapterInputs, AdapterMethod, AdapterResult
from server.merging import Floats


@dataclass(frozen=True)
class Held(AdapterFolder):
    """An adapter in memory, as the rules read one from a folder."""

    tensors: Mapping[str, torch.Tensor] = None  # type: ignore[assignment]

    @classmethod
    def of(cls, label: str, lora: LoraSection, adapter: Adapter) -> Held:
        """From the tensors that crossed."""
        paths = [path.removeprefix(PREFIX) for path in layers(adapter)]
        modules = {
            path: Module(path, _entry(adapter, path, "A"), _entry(adapter, path, "B"), lora.scaling)
            for path in paths
        }
        return cls(label, None, {}, modules, "", "", adapter)  # type: ignore[arg-type]

    def factors(self, path: str) -> tuple[Floats, Floats]:
        """`B` and `A` of one layer, without the scaling."""
        B, A = (self.tensors[f"{PREFIX}{path}.lora_{letter}.weight"] for letter in "BA")
        return B.float().numpy(), A.float().numpy()


def _entry(adapter: Adapter, path: str, letter: str) -> WeightEntry:
    name = f"{PREFIX}{path}.lora_{letter}.weight"
    return WeightEntry(name, "F32", tuple(adapter[name].shape), 0, 0)


def merge_by(rule: local.AdapterMethod, inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
    """Merge by one of the rules with equal weights, and cut every layer to the run's rank."""
    held = [Held.of(name, inputs.lora, adapter) for name, adapter in inputs.adapters.items()]
    weight = 1.0 if rule.default_weight == "one" else 1.0 / len(held)
    root, layers = math.sqrt(inputs.lora.scaling), len(held[0].modules)
    merged: Adapter = {}
    worst: dict[str, float] = {}
    for number, layer in enumerate(rule.apply(held, [weight] * len(held), options)):
        inputs.report(phase="merge", step=number, total=layers)
        update, cut = layer.update, 0.0
        if update.rank > inputs.lora.rank:
            update, cut = truncate(update, inputs.lora.rank)
        for name, value in {**layer.errors, "cut_to_rank": cut}.items():
            worst[name] = max(worst.get(name, 0.0), float(value))
        for letter, values in (("A", update.A_KC), ("B", update.B_RK)):
            merged[f"{PREFIX}{layer.path}.lora_{letter}.weight"] = _padded(
                values / root, inputs.lora.rank, axis="AB".index(letter)
            )
    inputs.report(phase="merge", step=layers, total=layers)
    return AdapterResult(dict(sorted(merged.items())), {f"largest_{name}": v for name, v in worst.items()})


def _padded(values: np.ndarray[Any, Any], rank: int, axis: int) -> torch.Tensor:
    """float32, with zeros up to `rank`, which change no product."""
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - values.shape[axis])
    return torch.from_numpy(np.pad(values, widths).astype(np.float32))


def _register(rule: local.AdapterMethod) -> None:
    def merge(inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
        return merge_by(rule, inputs, options)

    def check(options: Mapping[str, Any]) -> dict[str, Any]:
        return resolve(rule, options)

    METHODS[rule.name] = AdapterMethod(rule.name, merge, check, rule.paper, rule.equation)


for _rule in local.adapter_methods().values():
    _register(_rule)
