"""What a domain answers when it is asked how good a merge of adapters would be: one rounded number.

The domain holds the adapters (those that their owners allowed to be shared, received once) and validation
samples that never leave it. From then on it gets candidates of 2N numbers, mixes each on its own, and says
the mean loss in thousandths of a nat: a token of the answers, or a choice (`Validation`). Rules:

- a budget: at most `max_answers` different candidates in the life of `folder`; the same candidate asked
  again gets the same answer and costs nothing, also after kill -9: answers are on the disk before they are
  given;
- each user counts once, by the mean over its samples, cut to [0, `clip`]; what is not finite counts as
  `clip`. So no answer is ever anything but one whole number between 0 and `1000 * clip`;
- at least `min_users` users, or nothing is answered.

With `noise_multiplier` z each answer gets Gaussian noise of standard deviation `z * clip / users` before it
is rounded: z times what one user, replaced by another, can change. All answers of the budget are accounted
for together, as a composition of that many Gaussian mechanisms; `privacy_of` says it beforehand. Without
noise there is no such promise: a rounded mean over few users still tells something about each.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from clients.privacy import AnswerLimits
from common.config import LoraSection
from common.digests import json_digest
from common.errors import DataError, PolicyError
from common.language.model import CausalLM
from common.language.pool import Candidate, Pool
from common.language.samples import Sample
from common.language.validation import Validation
from common.learning_state import Trajectory, read_trajectory
from common.payloads import THOUSANDTHS

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class UserSamples:
    """Validation samples of one user; its name stays here."""

    user: str
    samples: tuple[Sample, ...]


class Answers:
    """The answers of one domain about candidates of one pool, kept in `folder`."""

    def __init__(
        self,
        lm: CausalLM,
        lora: LoraSection,
        pool: Pool,
        users: Sequence[UserSamples],
        limits: AnswerLimits,
        folder: Path,
        *,
        normal: Callable[[], float] | None = None,
        batch_size: int = 8,
    ) -> None:
        """`normal` draws standard normal noise (the system's randomness unless given).

        Raises PolicyError with too few users, DataError for a user without samples, ModelError, VectorError.
        """
        if len(users) < limits.min_users:
            raise PolicyError(
                f"{len(users)} validation users, fewer than the {limits.min_users} that an answer needs",
                next_step="validate on more users, or lower min_users",
            )
        if not all(user.samples for user in users):
            raise DataError("a validation user has no samples", next_step="leave such users out")
        self._lm, self._pool, self._limits = lm, pool, limits
        self._normal = normal or (lambda: secrets.SystemRandom().gauss(0.0, 1.0))
        self._counts = [len(user.samples) for user in users]
        lm.attach(lora)
        self._validation = Validation(lm, [sample for user in users for sample in user.samples], batch_size)
        self._kept = Trajectory(folder / ANSWERS_FILE)
        folder.mkdir(parents=True, exist_ok=True)
        lines = read_trajectory(self._kept.path)
        self._kept.rewind(len(lines))  # a line that a kill cut off goes
        self._given = {line["candidate"]: int(line["loss_e3"]) for line in lines}

    @property
    def left(self) -> int:
        """How many more candidates will be answered."""
        return self._limits.max_answers - len(self._given)

    def __call__(self, candidate: Candidate) -> int:
        """The domain's loss with this candidate, in thousandths. Raises PolicyError with the budget spent."""
        asked = {"adapters": self._pool.digests, "candidate": asdict(candidate)}
        digest = json_digest({**asked, "choice": self._validation.is_choice})
        if digest not in self._given:
            if self.left <= 0:
                raise PolicyError(
                    f"{self._limits.max_answers} candidates were answered: all that the owner allows",
                    next_step="plan fewer evaluations, or let the owner raise max_answers",
                )
            self._lm.set_adapter(self._pool.mix([candidate])[0])
            loss_e3 = self._released(self._validation.losses())
            line = {"step": len(self._given) + 1, "candidate": digest, "loss_e3": loss_e3}
            self._kept.append([line])
            self._given[digest] = loss_e3
        return self._given[digest]

    def _released(self, losses_N: Tensor) -> int:
        """Mean over users, with noise where there is to be some, as a whole number within its range."""
        clip = self._limits.clip
        of_users = [float(own.mean()) for own in torch.split(losses_N, self._counts)]
        kept = [min(max(loss, 0.0), clip) if math.isfinite(loss) else clip for loss in of_users]
        mean = math.fsum(kept) / len(kept)
        if self._limits.noise_multiplier:
            mean += self._limits.noise_multiplier * clip / len(kept) * self._normal()
        return round(min(max(mean, 0.0), clip) * THOUSANDTHS)
