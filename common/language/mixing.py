"""Mixing LoRA adapters of one base: the paper's rule, the exact one, and the gradient of their weights.

Adapter d gives a layer the update `s B_d A_d` (`A_d` [K, C], `B_d` [R, K], one scaling `s` for all). With
weights `w_d`:

- `factors` (RecCocktail eq. 7): `A = sum_d w_d A_d` and `B = sum_d w_d B_d`, at the rank that all share. Its
  update `B A` also holds each `B_d A_e` of two different adapters, and weighs `B_d A_d` by `w_d^2`.
- `product`: `B A = sum_d w_d B_d A_d` exactly, by concatenation: `A` is the `w_d A_d` below each other, `B`
  the `B_d` side by side. The ranks add up; `cut` takes the result back to a rank.

The scaling stays right when the rank changes: `section_of_rank` keeps `alpha / rank`.

Both rules are linear in the weights, so `dL/dw_d` is the inner product of `dL/dA` and `dL/dB` with what
adapter d adds to them: one backward through the model and two inner products a tensor for any number of
adapters, as in `server.learning.merged`. Memory: the adapters, once.

    >>> mixture = Mixture({"g": {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(3, 1)}})
    >>> mixture.at(torch.tensor([[0.5]]))["x.lora_A.weight"]
    tensor([[0.5000, 0.5000]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from common.coefficients import Granularity, group_tensors
from common.config import LoraSection
from common.errors import ConfigError, VectorError, suggest
from common.language.adapters import Adapter, check_adapter
from common.language.options import Rule
from common.low_rank import LowRank, truncate

A_SUFFIX, B_SUFFIX = SUFFIXES = ".lora_A.weight", ".lora_B.weight"


class Mixture:
    """D adapters (label -> adapter) that share a scaling, ready to be mixed by weights [groups, D].

    `granularity` "domain" gives an adapter one weight, "layer" one for each transformer layer. `rank` is that
    of the mix. Raises VectorError naming adapter and tensor where they do not go together.
    """

    def __init__(
        self,
        adapters: Mapping[str, Adapter],
        rule: Rule = "factors",
        granularity: Granularity = "domain",
        device: torch.device | str = "cpu",
    ) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"no rule {rule!r}", next_step=suggest(rule, get_args(Rule)))
        check_alike(adapters, same_rank=rule == "factors")
        self.labels = list(adapters)
        self.rule: Rule = rule
        names = sorted(next(iter(adapters.values())))
        groups = group_tensors(names, granularity)
        self.groups = list(groups)
        self._group = {name: index for index, members in enumerate(groups.values()) for name in members}
        parts = {
            name: [adapter[name].detach().to(device, torch.float32) for adapter in adapters.values()]
            for name in names
        }
        ranks = [len(part) for part in parts[next(name for name in names if name.endswith(A_SUFFIX))]]
        self.rank = ranks[0] if rule == "factors" else sum(ranks)
        self._stacks: dict[str, Tensor] = {}  # factors: [D, rows, columns]
        self._rows: dict[str, tuple[Tensor, Tensor]] = {}  # product: the A_d below each other; each row's d
        self._constant: Adapter = {}  # product: the B_d side by side
        for name, own in parts.items():
            if rule == "factors":
                self._stacks[name] = torch.stack(own)
            elif name.endswith(A_SUFFIX):
                owner_K = torch.arange(len(own)).repeat_interleave(torch.tensor([len(part) for part in own]))
                self._rows[name] = torch.cat(own), owner_K.to(device)
            else:
                self._constant[name] = torch.cat(own, dim=1)

    @torch.no_grad()
    def at(self, weights_GD: Tensor) -> Adapter:
        """The mix at these weights, float32, of rank `self.rank`."""
        weights_GD = self._checked(weights_GD)
        mixed: Adapter = dict(self._constant)
        for name, stack in self._stacks.items():
            mixed[name] = torch.tensordot(weights_GD[self._group[name]].to(stack), stack, 1)
        for name, (rows_KC, owner_K) in self._rows.items():
            mixed[name] = weights_GD[self._group[name]].to(rows_KC)[owner_K, None] * rows_KC
        return mixed

    @torch.no_grad()
    def gradient(self, grads: Mapping[str, Tensor | None]) -> Tensor:
        """`dL/dw` [groups, D] on the CPU from `dL/d(tensor of the mix)`; None where a tensor was not used."""
        result_GD = torch.zeros(len(self.groups), len(self.labels), dtype=torch.float64)
        for name, stack in self._stacks.items():
            if (grad := grads[name]) is not None:
                result_GD[self._group[name]] += (stack.flatten(1) @ grad.to(stack).flatten()).double().cpu()
        for name, (rows_KC, owner_K) in self._rows.items():
            if (grad := grads[name]) is not None:
                of_rows_K = (rows_KC * grad.to(rows_KC)).sum(1).double()
                result_GD[self._group[name]].index_add_(0, owner_K.cpu(), of_rows_K.cpu())
        return result_GD

    def _checked(self, weights_GD: Tensor) -> Tensor:
        expected = (len(self.groups), len(self.labels))
        if tuple(weights_GD.shape) != expected or not bool(torch.isfinite(weights_GD).all()):
            raise ConfigError(
                f"weights of shape {list(weights_GD.shape)}, expected {list(expected)} finite numbers",
                next_step="give a weight for each adapter",
            )
        return weights_GD.detach().cpu()


def mix(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    rule: Rule = "factors",
    rank: int | None = None,
) -> Adapter:
    """The adapters mixed by a weight each; with `rank` cut to the nearest update of that rank.

    Raises ConfigError for weights that cannot be, VectorError for adapters that do not go together.
    """
    mixture = Mixture(adapters, rule)
    mixed = mixture.at(torch.tensor([list(weights)], dtype=torch.float32))
    return mixed if rank is None else cut(mixed, rank)[0]


def cut(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
    """The adapter of exactly `rank` whose updates are nearest to the given one's (Eckart and Young).

    By QR of the factors and an SVD of the small core in float64, never of a layer's whole matrix; padded with
    zeros where the update has fewer ranks. Also by layer how far off it is, relative, in Frobenius norm.
    """
    best: Adapter = {}
    residuals: dict[str, float] = {}
    for path in layers(adapter):
        A_KC, B_RK = adapter[path + A_SUFFIX], adapter[path + B_SUFFIX]
        residuals[path] = 0.0
        if len(A_KC) > rank:
            update, residuals[path] = truncate(LowRank.of(B_RK.cpu().numpy(), A_KC.cpu().numpy()), rank)
            A_KC, B_RK = torch.from_numpy(update.A_KC).float(), torch.from_numpy(update.B_RK).float()
        missing = rank - len(A_KC)
        best[path + A_SUFFIX] = nn.functional.pad(A_KC, (0, 0, 0, missing)).contiguous()
        best[path + B_SUFFIX] = nn.functional.pad(B_RK, (0, missing)).contiguous()
    return best, residuals


def section_of_rank(lora: LoraSection, rank: int) -> LoraSection:
    """`lora` with another rank and the same scaling `alpha / rank`."""
    return lora.model_copy(update={"rank": rank, "alpha": lora.scaling * rank})


def rescaled(adapter: Adapter, have: LoraSection, want: LoraSection) -> Adapter:
    """The adapter with the same update under `want`'s scaling: `sqrt(have / want)` goes into A and into B."""
    root = (have.scaling / want.scaling) ** 0.5
    return dict(adapter) if root == 1.0 else {name: root * tensor for name, tensor in adapter.items()}


def layers(adapter: Mapping[str, Tensor]) -> list[str]:
    """What comes before `.lora_A.weight` and `.lora_B.weight`, sorted."""
    return sorted(name.removesuffix(A_SUFFIX) for name in adapter if name.endswith(A_SUFFIX))


def check_alike(adapters: Mapping[str, Adapter], *, same_rank: bool) -> None:
    """Refuse NaN, and adapters of other modules, shapes or (with `same_rank`) ranks than the first.

    Raises ConfigError for no adapters, VectorError naming adapter and tensor.
    """
    if not adapters:
        raise ConfigError("no adapters to mix", next_step="give at least one")
    first_label, first = next(iter(adapters.items()))
    if not layers(first) or any(path + letter not in first for path in layers(first) for letter in SUFFIXES):
        raise VectorError(
            f"adapter {first_label}: expected a {A_SUFFIX[1:]} and a {B_SUFFIX[1:]} for each layer",
            next_step="obtain the adapter again",
        )
    for label, adapter in adapters.items():
        table: dict[str, tuple[int, ...]] = {}
        for path in layers(first):
            A_KC, B_RK = (first[path + letter] for letter in SUFFIXES)
            rank = len(A_KC if same_rank else adapter.get(path + A_SUFFIX, A_KC))
            table |= {path + A_SUFFIX: (rank, A_KC.shape[1]), path + B_SUFFIX: (len(B_RK), rank)}
        try:
            check_adapter(adapter, table)
        except VectorError as err:
            raise VectorError(
                f"adapter {label}, compared with {first_label}: {err.message}",
                next_step="mix only adapters of the same base and modules"
                + (", and of the same rank, or use the rule `product`" if same_rank else ""),
            ) from None
