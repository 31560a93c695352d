"""Which tensors share a coefficient: all of them (domain-wise), those of a layer, or none (tensor-wise).

Layer-wise, the transformer layers are told by their names (`encoder.layer.3.output.dense.weight`,
`h.3.`, `layers.3.`), and all the rest - embeddings, their norm, pooler - is one further group, last.

    >>> group_tensors(["embeddings.norm.weight", "encoder.layer.0.weight"], "layer")
    {'layer-0': ['encoder.layer.0.weight'], 'rest': ['embeddings.norm.weight']}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from common.errors import ModelError

Granularity = Literal["domain", "layer", "tensor"]

_LAYER = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.(\d+)\.")


def layer_of(name: str) -> int | None:
    """The number of the transformer layer that the tensor `name` belongs to, or None for the rest."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def group_tensors(names: Iterable[str], granularity: Granularity) -> dict[str, list[str]]:
    """Group label -> its tensors; layers in order, `rest` last. Raises ModelError if no layer is found."""
    ordered = sorted(names)
    if granularity == "domain":
        return {"all": ordered}
    if granularity == "tensor":
        return {name: [name] for name in ordered}
    layers: dict[int, list[str]] = {}
    rest: list[str] = []
    for name in ordered:
        layer = layer_of(name)
        if layer is None:
            rest.append(name)
        else:
            layers.setdefault(layer, []).append(name)
    if not layers:
        raise ModelError(
            "no tensor is named after a transformer layer, so there is nothing to merge layer-wise",
            next_step='use granularity = "domain" or "tensor" for this base model',
        )
    groups = {f"layer-{layer}": layers[layer] for layer in sorted(layers)}
    return {**groups, "rest": rest} if rest else groups


def as_table(values_GD: Tensor, groups: Iterable[str], domains: Iterable[str]) -> dict[str, dict[str, float]]:
    """`{group: {domain: coefficient}}` for journals, cards and curves."""
    names = list(domains)
    rows: list[list[float]] = values_GD.tolist()
    return {group: dict(zip(names, row, strict=True)) for group, row in zip(groups, rows, strict=True)}
