"""A pool of LoRA adapters, and the candidates that Evo-Merging mixes from it (METHODS, "Evo-Merging").

A candidate is two numbers an adapter, a ratio `a_i` and a signed scale `b_i`, and means the adapter

    A = sum_i b_i S_{a_i}(A_i),    B = sum_i b_i B_i

matrix by matrix. `S_a` keeps the entries of a matrix of n whose magnitude is at least that of its
`round(a n)`-th largest: equal magnitudes at that border are all kept, so the order of entries means nothing.

Magnitudes are sorted once, when the pool is made; a candidate then only looks its thresholds up. Candidates
that are mixed together and share their ratios (the whole second stage) share the thresholding too, and are
one matrix product over the stacked adapters. Everything is in float32 on the CPU; memory is the adapters
and, once more, their A.

    >>> one = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    >>> pool = Pool({"tea": one, "toys": {name: 3 * value for name, value in one.items()}})
    >>> pool.mix([Candidate.of([1, 0], [0.5, 0.5])])[0]["x.lora_A.weight"]
    tensor([[0.5000, 0.5000]])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from common.digests import vector_digest
from common.errors import ConfigError, VectorError
from common.language.mixing import A_SUFFIX

DIGITS = 6  # of every number of a candidate: what crosses is exactly what was scored
_ABOVE_ALL, _NOTHING = 1e30, 1e-30  # as borders: no entry is kept; every entry that is not zero


@dataclass(frozen=True)
class Candidate:
    """Ratios in [0, 1] and signed scales of N adapters, in the order of the pool's labels."""

    ratios: tuple[float, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, ratios: Sequence[float], scales: Sequence[float]) -> Candidate:
        """Rounded to `DIGITS`. Raises ConfigError for a ratio outside [0, 1], or what is not finite."""
        rounded = [
            tuple(round(float(value), DIGITS) + 0.0 for value in values) for values in (ratios, scales)
        ]
        if len(rounded[0]) != len(rounded[1]) or not all(map(math.isfinite, rounded[0] + rounded[1])):
            raise ConfigError("a candidate needs one finite ratio and one finite scale for each adapter")
        if not all(0 <= ratio <= 1 for ratio in rounded[0]):
            raise ConfigError("a candidate's ratios must be between 0 and 1")
        return cls(*rounded)


class Pool:
    """N adapters over the same tensors, stacked, in the order of their names."""

    def __init__(self, adapters: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises ConfigError without adapters, VectorError naming the adapter and tensor that do not fit."""
        if not adapters:
            raise ConfigError("no adapters to merge", next_step="name at least one")
        self.labels = tuple(sorted(adapters))
        first = adapters[self.labels[0]]
        self.shapes = {name: tuple(first[name].shape) for name in sorted(first)}
        for label in self.labels:
            self._check(label, adapters[label])
        self._stacks_NX = {
            name: torch.stack(
                [adapters[label][name].detach().float().cpu().flatten() for label in self.labels]
            )
            for name in self.shapes
        }
        self._borders_NX = {
            name: _borders(values_NX)
            for name, values_NX in self._stacks_NX.items()
            if name.endswith(A_SUFFIX)
        }

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digests(self) -> dict[str, str]:
        """Each adapter's label and the digest of its values: what a journal of losses belongs to."""
        return {label: vector_digest(self.adapter(label)) for label in self.labels}

    def adapter(self, label: str) -> dict[str, Tensor]:
        """One adapter as it was given, in float32."""
        place = self.labels.index(label)
        return {name: self._stacks_NX[name][place].reshape(shape) for name, shape in self.shapes.items()}

    def mix(self, candidates: Sequence[Candidate]) -> list[dict[str, Tensor]]:
        """The adapter of each candidate. Raises ConfigError where one is not for N adapters."""
        for candidate in candidates:
            if len(candidate.ratios) != len(self):
                raise ConfigError(
                    f"a candidate for {len(candidate.ratios)} adapters", next_step=f"the pool has {len(self)}"
                )
        scales_CN = torch.tensor([candidate.scales for candidate in candidates]).reshape(-1, len(self))
        groups: dict[tuple[float, ...], list[int]] = {}
        for place, candidate in enumerate(candidates):
            groups.setdefault(candidate.ratios, []).append(place)
        mixed: list[dict[str, Tensor]] = [{} for _ in candidates]
        for name, shape in self.shapes.items():
            if name.endswith(A_SUFFIX):
                out_CX = torch.empty(len(candidates), math.prod(shape))
                for ratios, places in groups.items():
                    out_CX[places] = self._mix_sparse(name, ratios, scales_CN[places])
            else:
                out_CX = scales_CN @ self._stacks_NX[name]
            for place, adapter in enumerate(mixed):
                adapter[name] = out_CX[place].reshape(shape)
        return mixed

    def _mix_sparse(self, name: str, ratios: Sequence[float], scales_CN: Tensor) -> Tensor:
        """[C, X]: `sum_i b_i S_{a_i}(A_i)` of matrix `name` for candidates that share their ratios.

        `S(A_i)` is `border * hardshrink(A_i / border, 1)`: the one form of it that is a single fast pass.
        """
        values_NX = self._stacks_NX[name]
        kept_N = [round(ratio * values_NX.shape[1]) for ratio in ratios]
        border_N = torch.from_numpy(self._borders_NX[name][range(len(self)), kept_N])
        return (scales_CN * border_N) @ hardshrink(values_NX / border_N[:, None], 1.0)

    def _check(self, label: str, adapter: Mapping[str, Tensor]) -> None:
        different = sorted(set(adapter) ^ set(self.shapes))
        if different:
            side = "has an extra" if different[0] in adapter else "lacks"
            raise VectorError(
                f"adapter {label} {side} tensor {different[0]!r}, compared with {self.labels[0]}",
                next_step="merge only adapters of the same base, rank and modules",
            )
        for name, shape in self.shapes.items():
            if tuple(adapter[name].shape) != shape:
                raise VectorError(
                    f"adapter {label}: tensor {name!r} has shape {list(adapter[name].shape)}, "
                    f"{self.labels[0]}'s {list(shape)}",
                    next_step="merge only adapters of the same base, rank and modules",
                )
            if not bool(torch.isfinite(adapter[name]).all()):
                raise VectorError(f"adapter {label}: tensor {name!r} has values that are not finite")


def _borders(values_NX: Tensor) -> npt.NDArray[np.float32]:
    """[N, X + 1]: at k the largest float32 below the k-th largest magnitude; what is above it is kept."""
    magnitudes_NX = values_NX.abs().sort(dim=1, descending=True).values.numpy()
    all_N1 = np.full((len(magnitudes_NX), 1), _ABOVE_ALL, np.float32)
    below_NX = np.nextafter(magnitudes_NX, np.float32(0.0)).clip(_NOTHING, _ABOVE_ALL)
    return np.concatenate([all_N1, below_NX], axis=1)
