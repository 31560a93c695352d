"""A fixed set of labelled prompts to score many adapters on: tokenised once, in batches of like length.

validation = Validation(lm, [Sample("Which is next? A or B\\n", "B")])
lm.set_adapter(one)
validation.losses().mean()

Of a prompt and its answer the loss is the mean negative log-likelihood a token, the answer's end included. It
counts how well an answer is spelt as much as which one it is. Of a choice it is the negative log of the
probability of the answer among all that the sample names: log(n) where n answers look alike to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import DataError
from common.language.model import CausalLM
from common.language.samples import Sample, ask_for_choice
from common.language.scoring import choice_losses, whole_log_likelihoods


class Validation:
    """Samples in tokens, for one model whose adapter changes between calls of `losses`."""

    def __init__(self, lm: CausalLM, samples: Sequence[Sample], batch_size: int = 8) -> None:
        """Raises DataError without samples, or where some are choices and some are not."""
        if not samples:
            raise DataError("no samples to score adapters on", next_step="give at least one")
        self._lm, self.is_choice = lm, ask_for_choice(samples)
        self._prompts = [lm.encode(sample.prompt) for sample in samples]
        self._answers = [self._encoded(sample) for sample in samples]
        tokens = [
            len(prompt) + sum(map(len, answers))
            for prompt, answers in zip(self._prompts, self._answers, strict=True)
        ]
        order = sorted(range(len(samples)), key=tokens.__getitem__)
        self._batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __len__(self) -> int:
        return len(self._prompts)

    def losses(self) -> Tensor:
        """The loss of each sample [N] as the samples came, float32 on the CPU, without gradient.

        Raises DataError where a sample is too long for the model.
        """
        losses_N = torch.empty(len(self))
        with torch.no_grad():
            for numbers in self._batches:
                losses_N[numbers] = self.of(numbers).float().cpu()
        return losses_N

    def of(self, numbers: Sequence[int]) -> Tensor:
        """The losses of some samples [B], run together; with gradient where grad is enabled."""
        prompts = [self._prompts[n] for n in numbers]
        answers = [self._answers[n] for n in numbers]
        if self.is_choice:
            return choice_losses(self._lm, prompts, answers)
        return -whole_log_likelihoods(self._lm, prompts, [own[0] for own in answers])

    def _encoded(self, sample: Sample) -> list[list[int]]:
        goes_on = self.is_choice and sample.answer.endswith("\n")
        return self._lm.encode_answers(sample.prompt, [sample.answer, *sample.others], end=not goes_on)
