"""How much privacy a fine-tuning spends: known before its first step, for the steps that are planned.

The mechanism is the subsampled Gaussian one, once a step: each user takes part with probability `rate`,
alone, adds a vector of L2 norm at most `clip`, and noise of standard deviation `noise * clip` is added to the
sum. Opacus' Renyi accountant turns it into (epsilon, delta) for one user more or less (Mironov et al., "Renyi
differential privacy of the sampled Gaussian mechanism", 2019). `rate` counts the users by the bucket that the
vector's header publishes, never exactly.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

from common.config import RunConfig
from common.errors import ConfigError
from common.parcels import Privacy, bucket

NOISE_KEY = "noise.key"
ORDERS = [1.5, 2.5, 3.5, *range(2, 64), 128, 256, 512]  # whole ones are fast, and enough


@dataclasses.dataclass(frozen=True)
class PrivacyPlan:
    """The numbers of one private fine-tuning; `users_per_step` is the expected count, and public."""

    rate: float
    noise: float
    clip: float
    delta: float
    steps: int
    users_per_step: int

    def facts(self) -> Privacy:
        """What the header says: whole numbers, epsilon and delta rounded up. Raises ConfigError."""
        return Privacy(
            mechanism="dp-sgd",
            clip_e6=round(self.clip * 1e6),
            noise_e6=round(self.noise * 1e6),
            epsilon_e6=math.ceil(epsilon(self.rate, self.noise, self.steps, self.delta) * 1e6),
            delta_e12=math.ceil(self.delta * 1e12 - 1e-6),
        )


def plan_privacy(config: RunConfig, users: int) -> PrivacyPlan | None:
    """The plan of `config` for a domain of `users`; None without differential privacy.

    The rate comes from the bucket that the domain card publishes, not from the exact count, which is not
    public. Raises ConfigError where no promise worth the name can be made.
    """
    section, steps, batch_size = config.privacy, config.training.max_steps, config.training.batch_size
    if section.mechanism == "none":
        return None
    public_users = bucket(users)
    if batch_size >= public_users:
        raise ConfigError(
            f"a step of {batch_size} users from about {public_users} hides nobody among the others",
            next_step="lower training.batch_size",
        )
    if section.delta >= 1 / public_users:
        raise ConfigError(
            f"delta {section.delta:g} for about {public_users} users allows that one is given away",
            next_step=f"set privacy.delta below {1 / public_users:g}",
        )
    rate = batch_size / public_users
    noise = section.noise_multiplier
    if noise is None:
        noise = noise_for(float(section.epsilon or 0), rate, steps, section.delta)
    return PrivacyPlan(
        rate=rate,
        noise=math.ceil(noise * 1e6 - 1e-6) / 1e6,
        clip=round(section.clip_norm, 6),
        delta=section.delta,
        steps=steps,
        users_per_step=batch_size,
    )


def epsilon(rate: float, noise: float, steps: int, delta: float) -> float:
    """The epsilon of `steps` steps at `delta`. Raises ConfigError where the noise bounds nothing."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the best order may be the first or last: the bound holds all the same
        found = float(accountant.get_epsilon(delta=delta, alphas=ORDERS))
    if not (math.isfinite(found) and 0 <= found < 1e6):
        raise ConfigError(f"noise {noise:g} bounds no epsilon", next_step="raise privacy.noise_multiplier")
    return found


def noise_for(target: float, rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, to 1 in 10,000, whose epsilon is at most `target`. Raises ConfigError."""
    low, high = 0.0, 1.0
    while epsilon(rate, high, steps, delta) > target:
        low, high = high, 2 * high
        if high > 1000:
            raise ConfigError(
                f"no noise reaches epsilon {target:g} at delta {delta:g}", next_step="raise privacy.epsilon"
            )
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if _within(target, rate, middle, steps, delta):
            high = middle
        else:
            low = middle
    return high


def _within(target: float, rate: float, noise: float, steps: int, delta: float) -> bool:
    try:
        return epsilon(rate, noise, steps, delta) <= target
    except ConfigError:
        return False
