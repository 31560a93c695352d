"""Gram matrices of the inputs of linear layers, for RegMean and RegMean++: from pseudo-users alone.

`gram_matrices` draws items of each domain's catalog (each one-item history is a pseudo-user), embeds them and
takes the transformer layers one after another. What is kept between layers is the hidden states of every
domain's pseudo-users, and the Gram matrices of one layer: they are made when a weight of that layer is asked
for, and freed with the next layer. So weights are best asked for layer by layer; going back starts over.

    grams = gram_matrices(base_folder, taus, catalogs, config.text, seed=0)
    grams.get("encoder.layer.0.output.dense.weight")  # [N, C, C], N in the order of `taus`

Rules: no input is padding (see `server.learning.layers`); dropout is off; activations are float32, sums over
batches float64. Linear layers outside the transformer layers (BERT, RoBERTa, MiniLM and MPNet have none
there) have no Gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from common.catalog import Catalog
from common.config import TextSection
from common.errors import ModelError
from common.models.device import default_device
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report
from server.learning.layers import Layers, States, equal_lengths
from server.learning.prepare import check_catalogs

GRAM_ITEMS = 512  # a domain: some 10,000 tokens, several for each of the inputs of a layer

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Vector = Mapping[str, Tensor]


def gram_matrices(
    base: Path,
    taus: Mapping[str, Vector],
    catalogs: Mapping[str, Catalog],
    text: TextSection,
    *,
    seed: int,
    items: int = GRAM_ITEMS,
    report: Report = NO_REPORT,
) -> LayerGrams:
    """Gram matrices for the models `base + tau` (domain -> vector), from at most `items` items a domain.

    The same seed draws the same items. Tensors of the vectors that the encoder lacks are left out. Runs on
    CUDA when there is one. Time: one forward pass of each domain's items through its model, and `C^2`
    multiplications a token and linear layer; nothing is computed before a weight is asked for. Memory: the
    hidden states (4 bytes a value) and, in float64, the N Gram matrices of the weights of one layer: 21 N E^2
    values in a BERT of width E.
    Raises DataError for a missing catalog or an item without text, ModelError for an architecture that
    cannot be taken layer by layer; later VectorError for a vector that does not fit.
    """
    check_catalogs(taus, catalogs)
    encoder = Encoder.load(base, pooling="mean", device=default_device())  # pooled embeddings are not used
    encoder.model.eval().requires_grad_(False)
    drawn = [_draw(encoder, catalogs[domain], text, seed, items) for domain in taus]
    batches = [equal_lengths(list_of_ids, encoder.device) for list_of_ids in drawn]
    return LayerGrams(encoder.model, taus, batches, report)


def _draw(encoder: Encoder, catalog: Catalog, text: TextSection, seed: int, items: int) -> list[list[int]]:
    """Token ids of a seeded draw of one-item histories of the catalog."""
    rows = catalog.texts(text.attributes)
    generator = np.random.default_rng([seed, 2, *catalog.domain.encode()])
    chosen = sorted(generator.choice(len(rows), min(items, len(rows)), replace=False).tolist())
    tokens = encoder.tokenize_items([rows[item] for item in chosen], text.max_attribute_tokens)
    return [tokens.history([place], text.max_seq_len) for place in range(len(chosen))]


class LayerGrams:
    """Gram matrices layer by layer (the protocol `server.merging.Grams`); see the module."""

    def __init__(
        self,
        model: nn.Module,
        taus: Mapping[str, Vector],
        batches: Sequence[Sequence[Tensor]],
        report: Report = NO_REPORT,
    ) -> None:
        """`model` is the base, `batches` token ids [B, T] without padding for each domain of `taus`."""
        self._layers = Layers(model, batches[0][0])
        self._domains, self._taus = list(taus), list(taus.values())
        self._batches, self._report = batches, report
        self._linear = [  # of every layer, the linear weights that the vectors hold
            {name: module for name, module in self._layers.linear(layer).items() if name in self._taus[0]}
            for layer in range(len(self._layers))
        ]
        self._states: list[list[States]] = []  # for every domain: what layer `_next` is given
        self._next = 0
        self._grams: dict[str, Doubles] = {}  # of the layer before `_next`

    @torch.no_grad()
    def get(self, tensor: str) -> Doubles | None:
        """[N, C, C] for the weight of a linear layer, a mean over tokens; None for any other tensor."""
        wanted = next((layer for layer, linear in enumerate(self._linear) if tensor in linear), None)
        if wanted is None:
            return None
        if tensor not in self._grams:
            if not self._states or wanted < self._next:
                self._states, self._next = self._first(self._taus), 0
            while self._next <= wanted:
                self._report(phase="layer inputs", step=self._next, total=len(self._layers))
                self._grams = {}
                linear = self._linear[wanted] if self._next == wanted else {}
                self._grams, self._states = self._own_layers(self._next, linear, self._states)
                self._next += 1
        return self._grams[tensor]

    @torch.no_grad()
    def merge_in_order(self, solve: Callable[[Doubles, Floats], Floats]) -> dict[str, Floats]:
        """`solve(gram_NCC, tau_NRC)` of every linear weight [R, C], layer by layer from the first.

        The inputs of a layer are what the layers before it, merged, make of each domain's pseudo-users;
        tensors that are no linear weight take the mean. Returns the results by name.
        """
        self._grams, self._states = {}, []
        states = self._first([self._mean(self._layers.names(None))] * len(self._taus))
        result: dict[str, Floats] = {}
        for layer, linear in enumerate(self._linear):
            self._report(phase="layer inputs", step=layer, total=len(self._layers))
            grams, _ = self._own_layers(layer, linear, states)
            for name in linear:
                tau_NRC = np.stack([tau[name].float().cpu().numpy() for tau in self._taus])
                result[name] = solve(grams.pop(name), tau_NRC)
            merged = self._mean([name for name in self._layers.names(layer) if name not in linear])
            merged |= {name: torch.from_numpy(result[name]) for name in linear}
            params = self._layers.params(layer, merged)
            states = [[self._layers.run(layer, params, state) for state in mine] for mine in states]
        return result

    def _first(self, taus: Sequence[Vector]) -> list[list[States]]:
        """What the first layer is given, for every domain's batches, in models with these vectors."""
        return [
            [self._layers.first(tau, ids_BT) for ids_BT in batches]
            for batches, tau in zip(self._batches, taus, strict=True)
        ]

    def _own_layers(
        self, layer: int, linear: Mapping[str, nn.Module], states: Sequence[Sequence[States]]
    ) -> tuple[dict[str, Doubles], list[list[States]]]:
        """Run each domain's own `layer` on its states: Gram matrices of the `linear` ones, and outputs."""
        widths = {name: self._layers.base[name].shape[1] for name in linear}
        grams = {name: np.empty((len(self._taus), width, width)) for name, width in widths.items()}
        outputs = []
        for n, (domain, tau, mine) in enumerate(zip(self._domains, self._taus, states, strict=True)):
            params = self._layers.params(layer, tau)
            with _InputGrams(linear) as found:
                outputs.append([self._layers.run(layer, params, state) for state in mine])
            for name in linear:
                grams[name][n] = found.mean(name, sum(state.tokens for state in mine), domain)
        return grams, outputs

    def _mean(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The mean of the vectors, for those of these tensors that they hold."""
        held = [name for name in names if name in self._taus[0]]
        return {name: torch.stack([tau[name].float() for tau in self._taus]).mean(0) for name in held}


class _InputGrams:
    """While entered: sums `x^T x` over all rows x that the modules (weight name -> module) are given."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._sums: dict[str, Tensor] = {}
        self._rows = dict.fromkeys(modules, 0)
        self._hooks: list[Any] = []

    def __enter__(self) -> _InputGrams:
        self._hooks = [
            module.register_forward_pre_hook(self._adder(name)) for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _adder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TC = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            gram_CC = (x_TC.T @ x_TC).double()
            self._sums[name] = self._sums[name].add_(gram_CC) if name in self._sums else gram_CC
            self._rows[name] += len(x_TC)

        return add

    def mean(self, name: str, tokens: int, domain: str) -> Doubles:
        """The sum by the number of rows, which must be `tokens`; freed here. Raises ModelError."""
        if self._rows[name] != tokens:
            raise ModelError(
                f"tensor {name!r}: its layer is given {self._rows[name]} rows for {tokens} tokens",
                next_step="this architecture pads or selects tokens; use a method that needs no catalogs",
            )
        gram_CC: Doubles = (self._sums.pop(name) / tokens).cpu().numpy()
        if not np.isfinite(gram_CC).all():
            raise ModelError(
                f"domain {domain!r}, tensor {name!r}: the inputs of the layer are not finite",
                next_step="ask the domain to fine-tune again; its training diverged",
            )
        return gram_CC
