"""The merged model as plain tensors, and the gradient of its coefficients without autograd through N vectors.

`theta_g = theta_0,g + sum_d lambda_{g,d} tau_{d,g}` for every group g is computed once a step into flat
buffers (one matrix-vector product a group). The model runs on leaf views of them, one backward gives
`dL/dtheta`, and by the chain rule `dL/dlambda_{g,d} = <dL/dtheta_g, tau_{d,g}>`: another matrix-vector
product. Each step reads the vectors twice and keeps nothing of size N x P in the graph. Vectors may be kept
in bf16, which halves their memory: they are widened chunk by chunk, and all arithmetic stays in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from common.errors import VectorError
from common.vectors import TaskVector

CPU_CHUNK = 1 << 16  # values of each bf16 vector that are widened at once: they stay in the cache
CUDA_CHUNK = 1 << 22


class MergedModel:
    """`params` maps tensor names to leaf tensors of the merged model; `set_coefficients` refills them.

    base: tensors of the base model by name, at least those of the vectors (fp32, any device).
    taus: D task vectors. groups: group label -> its tensors (see `coefficients`).
    vectors: how the vectors are kept. Those that crossed in bf16 lose nothing by it; processed ones and fp32
    ones are rounded (relative error up to 1/256), and the result is the merge of the rounded vectors.
    Memory: (D + 2) times the size of one vector in fp32 on `device`, or (D / 2 + 2) times with bf16.
    Raises VectorError when the base lacks a tensor or has it in another shape.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        taus: Sequence[TaskVector],
        groups: Mapping[str, Sequence[str]],
        device: torch.device,
        vectors: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        self.groups = list(groups)
        self._dtype = torch.bfloat16 if vectors == "bf16" else torch.float32
        self._chunk = CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK
        self.params: dict[str, Tensor] = {}
        self._base: list[Tensor] = []
        self._tau_DP: list[Tensor] = []
        self._merged: list[Tensor] = []
        self._slices: list[tuple[int, int, int]] = []  # (group, start, stop) of each of `params`
        for index, names in enumerate(groups.values()):
            self._add_group(index, names, base, taus, device)
        # one buffer for what is widened: memory that is asked for anew costs as much as the arithmetic
        widest = max((len(merged_P) for merged_P in self._merged), default=0)
        width = 0 if self._dtype is torch.float32 else min(self._chunk, widest)
        self._wide_DP = torch.empty(len(taus), width, device=device)

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
        tau_DP = torch.empty(len(taus), total, device=device, dtype=self._dtype)
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

    def _chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The borders of what is worked on at once: everything in fp32, where nothing is widened."""
        if self._dtype is torch.float32:
            yield start, stop
            return
        for low in range(start, stop, self._chunk):
            yield low, min(stop, low + self._chunk)

    def _wide(self, tau_DP: Tensor, low: int, high: int) -> Tensor:
        """Values `low` to `high` of every vector in fp32; valid until the next call."""
        if self._dtype is torch.float32:
            return tau_DP[:, low:high]
        wide_DP = self._wide_DP[:, : high - low]
        return wide_DP.copy_(tau_DP[:, low:high])

    @torch.no_grad()
    def set_coefficients(self, values_GD: Tensor) -> None:
        """Refill `params` with the merge at these coefficients [groups, domains]."""
        values_GD = values_GD.detach().to(self._merged[0].device)
        for base_P, tau_DP, merged_P, values_D in zip(
            self._base, self._tau_DP, self._merged, values_GD, strict=True
        ):
            for low, high in self._chunks(0, len(base_P)):
                tau_PD = self._wide(tau_DP, low, high).t()
                torch.addmv(base_P[low:high], tau_PD, values_D, out=merged_P[low:high])

    @torch.no_grad()
    def gradient(self, loss: Tensor) -> Tensor:
        """`dL/dlambda` [groups, domains] on the CPU: one backward, then inner products with the vectors."""
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        result_GD = torch.zeros(len(self._base), len(self._tau_DP[0]), device=loss.device)
        for (group, start, stop), grad in zip(self._slices, grads, strict=True):
            if grad is None:  # a tensor that the forward does not touch
                continue
            grad_P = grad.reshape(-1)
            for low, high in self._chunks(start, stop):
                tau_DP = self._wide(self._tau_DP[group], low, high)
                result_GD[group] += tau_DP @ grad_P[low - start : high - start]
        return result_GD.cpu()

    @torch.no_grad()
    def vector(self, values_GD: Tensor) -> TaskVector:
        """The merged task vector `sum_d lambda_d tau_d` at these coefficients, fp32 on the CPU."""
        values_GD = values_GD.detach().to(self._merged[0].device)
        flat: list[Tensor] = []
        for tau_DP, values_D in zip(self._tau_DP, values_GD, strict=True):
            parts = [
                (self._wide(tau_DP, low, high).t() @ values_D).cpu()
                for low, high in self._chunks(0, tau_DP.shape[1])
            ]
            flat.append(torch.cat(parts))
        return {
            name: flat[group][start:stop].reshape(param.shape).clone()
            for (name, param), (group, start, stop) in zip(self.params.items(), self._slices, strict=True)
        }
