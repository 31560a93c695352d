"""A transformer taken apart: its layers run one after another, each with the tensors one likes.

So the layers of N models can be gone through side by side, and the next layer's tensors can depend on what
the layers before it gave. That a layer run on its own does what it does in the model is checked once, on the
first texts, against the whole model; an architecture for which it does not is refused.

All texts of a batch have the same number of tokens: no input of a layer is padding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ModelError
from common.vectors import TaskVector
from server.learning.teachers import with_vector

BATCH_ITEMS = 64


def equal_lengths(list_of_ids: Iterable[list[int]], device: torch.device) -> list[Tensor]:
    """Token ids [B, T] in batches of texts of one length, shortest first; in a batch in the order given."""
    by_length: dict[int, list[list[int]]] = defaultdict(list)
    for ids in list_of_ids:
        by_length[len(ids)].append(ids)
    return [
        torch.tensor(same[start : start + BATCH_ITEMS], device=device)
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), BATCH_ITEMS)
    ]


@dataclass(frozen=True)
class States:
    """What a layer is given for one batch: `hidden_BTE`, and whatever else every layer is called with."""

    hidden_BTE: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def tokens(self) -> int:
        return self.hidden_BTE.shape[0] * self.hidden_BTE.shape[1]


class _Reached(Exception):  # noqa: N818 - no error: the first layer was reached, the rest need not run
    def __init__(self, states: States) -> None:
        self.states = states


class Layers:
    """The transformer layers of `model`, the base; `prefixes[l]` begins the names of layer l's tensors.

    Raises ModelError where there are none, or where running them one by one is not running the model.
    """

    def __init__(self, model: nn.Module, ids_BT: Tensor) -> None:
        stacks = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList)]
        if not stacks:
            raise _refusal(model)
        name, self._layers = max(stacks, key=lambda stack: sum(p.numel() for p in stack[1].parameters()))
        self.prefixes = [f"{name}.{layer}." for layer in range(len(self._layers))]
        self.base = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self._model = model
        self._check(ids_BT)

    def __len__(self) -> int:
        return len(self._layers)

    def linear(self, layer: int) -> dict[str, nn.Module]:
        """Weight name -> module, for every linear layer inside transformer layer `layer`."""
        return {
            f"{self.prefixes[layer]}{name}.weight": module
            for name, module in self._layers[layer].named_modules()
            if isinstance(module, nn.Linear)
        }

    def names(self, layer: int | None) -> list[str]:
        """The names of the tensors of `layer`, or (None) of those in no layer."""
        if layer is None:
            return [name for name in self.base if not name.startswith(tuple(self.prefixes))]
        return [name for name in self.base if name.startswith(self.prefixes[layer])]

    def first(self, tau: Mapping[str, Tensor], ids_BT: Tensor) -> States:
        """What the first layer is given in the model `base + tau` (what is in no layer counts)."""
        outside = {name: tau[name] for name in self.names(None) if name in tau}

        def reached(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if not arguments:
                raise _refusal(self._model)
            raise _Reached(States(arguments[0], arguments[1:], keywords))

        hook = self._layers[0].register_forward_pre_hook(reached, with_kwargs=True)
        try:
            self._forward(with_vector(self.base, outside), ids_BT)
        except _Reached as found:
            return found.states
        finally:
            hook.remove()
        raise _refusal(self._model)

    def params(self, layer: int, tau: Mapping[str, Tensor]) -> TaskVector:
        """`base + tau` for the tensors of `layer`, as `run` takes them."""
        tensors = with_vector(self.base, {name: tau[name] for name in self.names(layer) if name in tau})
        return {name.removeprefix(self.prefixes[layer]): tensor for name, tensor in tensors.items()}

    def run(self, layer: int, params: Mapping[str, Tensor], states: States) -> States:
        """The states after `layer` with `params` in the place of the base's tensors."""
        arguments = (states.hidden_BTE, *states.arguments)
        output = torch.func.functional_call(self._layers[layer], dict(params), arguments, states.keywords)
        return replace(states, hidden_BTE=output[0] if isinstance(output, tuple) else output)

    def _forward(self, params: Mapping[str, Tensor], ids_BT: Tensor) -> None:
        inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
        torch.func.functional_call(self._model, dict(params), args=(), kwargs=inputs)

    @torch.no_grad()
    def _check(self, ids_BT: Tensor) -> None:
        last: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            last.append(output[0] if isinstance(output, tuple) else output)

        hook = self._layers[-1].register_forward_hook(keep)
        try:
            self._forward({}, ids_BT)
        finally:
            hook.remove()
        states = self.first({}, ids_BT)
        for layer in range(len(self)):
            states = self.run(layer, {}, states)
        same = len(last) == 1 and last[0].shape == states.hidden_BTE.shape
        if not same or not torch.allclose(last[0], states.hidden_BTE, rtol=1e-3, atol=1e-4):
            raise _refusal(self._model)


def _refusal(model: nn.Module) -> ModelError:
    return ModelError(
        f"{type(model).__name__}: its layers cannot be run one by one",
        next_step="use a merge method that needs no catalogs, or a BERT, RoBERTa or MPNet base",
    )
