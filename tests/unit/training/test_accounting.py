"""Epsilon: against another accountant, rounded up, and refused where it promises nothing."""

from __future__ import annotations

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant

from clients.training.accounting import ORDERS, epsilon, noise_for, plan_privacy
from common.config import RunConfig
from common.errors import ConfigError


def config(**privacy: float) -> RunConfig:
    return RunConfig.model_validate(
        {
            "training": {"batch_size": 20, "max_steps": 100},
            "privacy": {"mechanism": "dp-sgd", "noise_multiplier": 1.0, **privacy},
        }
    )


@pytest.mark.parametrize(
    ("rate", "noise", "steps", "delta"),
    [
        (0.01, 1.0, 1000, 1e-5),
        (0.05, 0.8, 300, 1e-5),
        (0.1, 1.5, 80, 1e-6),
        (0.2, 0.6, 12, 1e-4),
        (0.005, 0.5, 50, 1e-5),
    ],
)
def test_two_accountants_agree(rate: float, noise: float, steps: int, delta: float) -> None:
    other = RdpAccountant(ORDERS)
    other.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps))
    assert epsilon(rate, noise, steps, delta) == pytest.approx(other.get_epsilon(delta), rel=0.02)


def test_a_target_epsilon_is_met_and_not_wasted() -> None:
    noise = noise_for(3.0, 0.05, 200, 1e-5)
    assert 2.99 < epsilon(0.05, noise, 200, 1e-5) <= 3.0
    with pytest.raises(ConfigError, match="no noise"):
        noise_for(1e-9, 0.5, 10, 1e-12)


def test_the_facts_are_whole_numbers_rounded_against_us() -> None:
    plan = plan_privacy(config(clip_norm=0.5), 480)
    assert plan is not None
    assert plan.rate == 20 / 200  # of the bucket that the domain card says, not of 480
    facts = plan.facts()
    exact = epsilon(0.1, 1.0, 100, 1e-5)
    assert (facts.mechanism, facts.clip_e6, facts.noise_e6, facts.delta_e12) == (
        "dp-sgd", 500_000, 1_000_000, 10_000_000,
    )  # fmt: skip
    assert 0 <= facts.epsilon_e6 / 1e6 - exact <= 1e-6


def test_a_promise_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="hides nobody"):
        plan_privacy(config(), 49)
    with pytest.raises(ConfigError, match="given away"):
        plan_privacy(config(delta=0.01), 480)
    assert plan_privacy(RunConfig(), 480) is None
