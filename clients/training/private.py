"""Fine-tuning with differential privacy of each user: DP-SGD (Abadi et al., CCS 2016).

What the promise rests on, one by one:

- **One user, one bounded vector.** In each step every user takes part on its own with the plan's rate
  (Poisson sampling of users, not of interactions), with one of its positions, drawn anew. Its gradient is cut
  to L2 norm `clip` (`clients.training.clipping`).
- **Nobody else in it.** Negatives are items of the public catalog, drawn for each step from the run's seed:
  in-batch negatives would put one user's items into another's gradient. The gradient passes through them too
  (without it all embeddings fall together), for each user on its own.
- **Secret randomness.** Who takes part and the noise come from `SecretRandom`, not from the run's seed,
  which is public: with it anybody could subtract the noise. There is no other: no dropout.
- **Nothing else looks at the data.** As many steps as planned, the last weights; validation users are
  ranked once, at the end, for the owner alone.
"""

from __future__ import annotations

import math
import secrets
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor, nn
from torch.utils.data import Dataset

from clients.data.domain import Domain
from clients.training.accounting import PrivacyPlan
from clients.training.clipping import GhostClipping
from clients.training.dataset import Batch, Examples, domain_tokens, recent_first
from clients.training.loss import TwoTower
from clients.training.trainer import EncoderTrainer, Plan, Validate
from common.config import RunConfig
from common.files import write_atomic
from common.models.encoder import Encoder
from common.progress import Report

_SAMPLING, _NOISE = 0, 1


class SecretRandom:
    """Randomness that nobody outside can repeat: ChaCha20 under a key of the system's, one stream a step.

    The key lies at `path` while training goes on, so that a killed fine-tuning ends as it would have. Torch's
    own generator will not do: on the CPU it takes 32 bits of a seed, which can be tried out.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            write_atomic(path, secrets.token_bytes(32), mode=0o600)
        self._key = path.read_bytes()

    def sampling(self, step: int) -> Stream:
        """For who takes part in `step`."""
        return Stream(self._key, _SAMPLING, step)

    def noise(self, step: int) -> Stream:
        """For the noise of `step`."""
        return Stream(self._key, _NOISE, step)


class Stream:
    """Numbers from one keystream, in order."""

    def __init__(self, key: bytes, purpose: int, step: int) -> None:
        nonce = struct.pack("<IIQ", 0, purpose, step)  # the block counter comes first
        self._keystream = Cipher(ChaCha20(key, nonce), mode=None).encryptor()

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """`count` numbers above 0 and up to 1."""
        words = np.frombuffer(self._keystream.update(bytes(8 * count)), dtype="<u8")
        return ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53

    def normal(self, shape: torch.Size) -> Tensor:
        """Independent standard normal numbers (float32, CPU), by Box and Muller."""
        count = math.prod(shape)
        half = (count + 1) // 2
        radius, angle = np.sqrt(-2 * np.log(self.uniform(half))), 2 * np.pi * self.uniform(half)
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
        return torch.from_numpy(values.astype(np.float32).reshape(shape))


def public_negatives(items: int, count: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """`count` of `items` catalog positions for `step`, by the run's seed: whatever the interactions are."""
    return np.random.default_rng([seed, step]).choice(items, size=min(count, items), replace=False)


class PrivateBatches(Dataset[Batch]):
    """The users that take part in each step, one row each; a step may have none."""

    def __init__(
        self, encoder: Encoder, domain: Domain, config: RunConfig, plan: PrivacyPlan, secret: SecretRandom
    ) -> None:
        self.plan, self.secret = plan, secret
        self._encoder, self._domain, self._text = encoder, domain, config.text
        self._tokens = domain_tokens(encoder, domain, config.text)
        examples = Examples(domain.train, config.training.positions_per_user)
        self._count_U = np.bincount(examples.user_N, minlength=len(domain.train))
        self._last_U = np.array([len(history) - 1 for history in domain.train])
        self._negatives, self._seed = config.privacy.negatives, config.run.seed

    def __len__(self) -> int:
        return self.plan.steps

    def negatives(self, step: int) -> npt.NDArray[np.int64]:
        """Catalog positions of the negatives of `step`, the same for every user."""
        return public_negatives(len(self._domain.item_ids), self._negatives, self._seed, step)

    def members(self, step: int) -> list[tuple[int, int]]:
        """The (user, position) pairs of `step`: a user once at most, each drawn apart from the others."""
        stream = self.secret.sampling(step)
        part_U, which_U = (stream.uniform(len(self._domain.train)) for _ in range(2))
        chosen = np.flatnonzero((part_U <= self.plan.rate) & (self._count_U > 0))
        back = np.ceil(which_U * self._count_U).astype(np.int64) - 1
        return [(int(user), int(self._last_U[user] - back[user])) for user in chosen]

    def __getitem__(self, step: int) -> Batch:
        """What `clipping.GhostClipping.summed` takes; a step without users has no rows of any."""
        chosen, negatives, text = self.members(step), self.negatives(step), self._text
        past = [self._domain.train[user][: position + 1] for user, position in chosen]  # the target is last
        histories = [
            self._tokens.history(recent_first(items[:-1], text.max_history_items), text.max_seq_len)
            for items in past
        ]
        batch = {"blocked_UI": torch.zeros(0, 1 + len(negatives), dtype=torch.bool)}
        if chosen:
            blocked = np.array([[False, *np.isin(negatives, items)] for items in past])
            batch["blocked_UI"] = torch.from_numpy(blocked)
        for name, texts in (
            ("history_{}_UT", histories),
            ("target_{}_UT", [self._tokens.item(int(items[-1])) for items in past]),
            ("negative_{}_IT", [self._tokens.item(int(item)) for item in negatives]),
        ):
            ids_NT, mask_NT = (
                self._encoder.batch(texts) if texts else 2 * [torch.zeros(0, 1, dtype=torch.int64)]
            )
            batch |= {name.format("ids"): ids_NT, name.format("mask"): mask_NT}
        return batch


class PrivateTrainer(EncoderTrainer):
    """`EncoderTrainer` whose gradients are private; every optimiser may follow, it sees nothing else."""

    tower: TwoTower

    def __init__(
        self,
        tower: TwoTower,
        batches: PrivateBatches,
        validate: Validate,
        plan: Plan,
        folder: Path,
        report: Report,
    ) -> None:
        super().__init__(tower, batches, validate, plan, folder, report)
        self.args.max_grad_norm = 0.0  # what is clipped is each user's own
        self._privacy, self._batches = batches.plan, batches
        self.clipping = GhostClipping(tower)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Put the private gradient of the step in place; returns the mean loss, for the owner's log."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        privacy, stream = self._privacy, self._batches.secret.noise(self.state.global_step)
        summed, losses = self.clipping.summed(inputs, privacy.clip)
        for parameter, total in summed.items():
            noise = stream.normal(total.shape).to(total.device)
            parameter.grad = (total + privacy.noise * privacy.clip * noise) / privacy.users_per_step
        self.last_loss = float(losses.mean()) if len(losses) else 0.0
        return torch.tensor(self.last_loss, device=self.args.device)

    def close(self) -> None:
        """Take the hooks off the model."""
        self.clipping.close()
