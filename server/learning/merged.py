"""The merged model as plain tensors, and the gradient of its coefficients without autograd through N vectors.

`theta_g = theta_0,g + sum_d lambda_{g,d} tau_{d,g}` for every group g is computed once a step into flat
buffers (one matrix-vector product a group). The model runs on leaf views of them, one backward gives
`dL/dtheta`, and by the chain rule `dL/dlambda_{g,d} = <dL/dtheta_g, tau_{d,g}>`: another matrix-vector
product. Each step reads the vectors twice and keeps nothing of size N x P in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from common.errors import VectorError
from common.vectors import TaskVector


class MergedModel:
    """`params` maps tensor names to leaf tensors of the merged model; `set_coefficients` refills them.

    base: tensors of the base model by name, at least those of the vectors (fp32, any device).
    taus: D task vectors. groups: group label -> its tensors (see `coefficients`).
    Memory: (D + 2) times the size of one vector, in fp32, on `device`.
    Raises VectorError when the base lacks a tensor or has it in another shape.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        taus: Sequence[TaskVector],
        groups: Mapping[str, Sequence[str]],
        device: torch.device,
    ) -> None:
        self.groups = list(groups)
        self.params: dict[str, Tensor] = {}
        self._base: list[Tensor] = []
        self._tau_DP: list[Tensor] = []
        self._merged: list[Tensor] = []
        self._slices: list[tuple[int, int, int]] = []  # (group, start, stop) of each of `params`
        for index, names in enumerate(groups.values()):
            self._add_group(index, names, base, taus, device)

    def _add_group(
        self,
        index: int,
        names: Sequence[str],
        base: Mapping[str, Tensor],
        taus: Sequence[TaskVector],
        device: torch.device,
    ) -> None:
        for name in names:
            if name not in base or base[name].shape != taus[0][name].shape:
                got = list(base[name].shape) if name in base else "no such tensor"
                raise VectorError(
                    f"tensor {name!r}: vectors have {list(taus[0][name].shape)}, the base has {got}",
                    next_step="merge onto the base model that the vectors were trained from",
                )
        total = sum(base[name].numel() for name in names)
        base_P = torch.empty(total, device=device)
        tau_DP = torch.empty(len(taus), total, device=device)
        merged_P = torch.empty(total, device=device)
        start = 0
        for name in names:
            stop = start + base[name].numel()
            base_P[start:stop].copy_(base[name].detach().reshape(-1))
            for tau_P, tau in zip(tau_DP, taus, strict=True):
                tau_P[start:stop].copy_(tau[name].reshape(-1))
            view = merged_P[start:stop].view(base[name].shape).detach()  # a leaf that shares the memory
            self.params[name] = view.requires_grad_()
            self._slices.append((index, start, stop))
            start = stop
        self._base.append(base_P)
        self._tau_DP.append(tau_DP)
        self._merged.append(merged_P)

    @torch.no_grad()
    def set_coefficients(self, values_GD: Tensor) -> None:
        """Refill `params` with the merge at these coefficients [groups, domains]."""
        values_GD = values_GD.detach().to(self._merged[0].device)
        for base_P, tau_DP, merged_P, values_D in zip(
            self._base, self._tau_DP, self._merged, values_GD, strict=True
        ):
            torch.addmv(base_P, tau_DP.t(), values_D, out=merged_P)

    def gradient(self, loss: Tensor) -> Tensor:
        """`dL/dlambda` [groups, domains] on the CPU: one backward, then inner products with the vectors."""
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        result_GD = torch.zeros(len(self._base), len(self._tau_DP[0]), device=loss.device)
        for (group, start, stop), grad in zip(self._slices, grads, strict=True):
            if grad is not None:  # a tensor that the forward does not touch
                result_GD[group] += self._tau_DP[group][:, start:stop] @ grad.reshape(-1)
        return result_GD.cpu()

    @torch.no_grad()
    def vector(self, values_GD: Tensor) -> TaskVector:
        """The merged task vector `sum_d lambda_d tau_d` at these coefficients, fp32 on the CPU."""
        values_GD = values_GD.detach().to(self._merged[0].device)
        flat = [
            (tau_DP.t() @ values_D).cpu() for tau_DP, values_D in zip(self._tau_DP, values_GD, strict=True)
        ]
        return {
            name: flat[group][start:stop].reshape(param.shape).clone()
            for (name, param), (group, start, stop) in zip(self.params.items(), self._slices, strict=True)
        }
