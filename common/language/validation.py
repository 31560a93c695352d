"""A fixed set of labelled prompts to score many adapters on: tokenised once, in batches of like length.

validation = Validation(lm, [("Which is next? A or B\\n", "B")])
lm.set_adapter(one)
validation.losses().mean()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import DataError
from common.language.model import CausalLM
from common.language.samples import Sample
from common.language.scoring import whole_log_likelihoods


class Validation:
    """Samples in tokens, for one model whose adapter changes between calls of `losses`."""

    def __init__(self, lm: CausalLM, samples: Sequence[Sample], batch_size: int = 8) -> None:
        """Raises DataError without samples."""
        if not samples:
            raise DataError("no samples to score adapters on", next_step="give at least one")
        self._lm = lm
        prompts = [lm.encode(prompt) for prompt, _ in samples]
        answers = [lm.encode_answers(prompt, [answer])[0] for prompt, answer in samples]
        order = sorted(range(len(samples)), key=lambda n: len(prompts[n]) + len(answers[n]))
        self._batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        self._prompts, self._answers = prompts, answers

    def __len__(self) -> int:
        return len(self._prompts)

    def losses(self) -> Tensor:
        """Mean negative log-likelihood a token [N] of each answer, its end included, as the samples came.

        No gradient. Raises DataError where a sample is too long for the model.
        """
        losses_N = torch.empty(len(self))
        with torch.no_grad():
            for numbers in self._batches:
                prompts = [self._prompts[n] for n in numbers]
                answers = [self._answers[n] for n in numbers]
                losses_N[numbers] = -whole_log_likelihoods(self._lm, prompts, answers).float().cpu()
        return losses_N
