"""Candidates scored in several processes at once, each with a model of its own.

Worth it where one forward pass does not keep the cores busy: small models on a CPU, whose passes are mostly
Python, so that threads would wait for each other. A large model fills the cores by itself, and one on a GPU
fills that. Adapters are mixed in the calling process and sent over as one array each.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from common.config import LoraSection
from common.errors import ModelError
from common.language.adapters import Adapter
from common.language.model import CausalLM, load_causal
from common.language.samples import Sample
from common.language.validation import Validation

_here: list[tuple[CausalLM, Validation]] = []  # of a worker process: what its first call made


class ScoringWorkers:
    """Processes that give the mean loss of adapters on the same samples; a context manager."""

    def __init__(
        self, base: Path, lora: LoraSection, samples: Sequence[Sample], workers: int, batch_size: int = 8
    ) -> None:
        """`workers` processes, on the CPU; each loads the model in folder `base` when it gets its first."""
        threads = max(1, (os.cpu_count() or 1) // workers)
        self._pool = ProcessPoolExecutor(
            workers,
            mp_context=get_context("spawn"),
            initializer=_start,
            initargs=(base, lora, list(samples), batch_size, threads),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def losses(self, adapters: Sequence[Adapter]) -> list[float]:
        """The mean loss of each. Raises ModelError where a process ended, what scoring raises otherwise."""
        flat = [
            np.concatenate([adapter[name].numpy().ravel() for name in sorted(adapter)])
            for adapter in adapters
        ]
        try:
            return list(self._pool.map(_score, flat))
        except BrokenProcessPool:
            raise ModelError(
                "a process that scores candidates ended",
                next_step="it may have run out of memory: use fewer workers, or smaller batches",
            ) from None


def _start(base: Path, lora: LoraSection, samples: Sequence[Sample], batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    lm = load_causal(base, precision="fp32")
    lm.attach(lora)
    _here[:] = [(lm, Validation(lm, samples, batch_size))]


def _score(flat_P: npt.NDArray[np.float32]) -> float:
    """The mean loss with an adapter whose tensors are side by side, in the order of their names."""
    lm, validation = _here[0]
    parameters = lm.lora_parameters()
    names = sorted(parameters)
    ends = np.cumsum([parameters[name].numel() for name in names])[:-1]
    parts = np.split(flat_P, ends)
    lm.set_adapter(
        {
            name: torch.from_numpy(part).reshape(parameters[name].shape)
            for name, part in zip(names, parts, strict=True)
        }
    )
    return float(validation.losses().mean())
