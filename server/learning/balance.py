"""A training-free merge in which no domain is left behind: weights of the vectors, found on pseudo-users.

A rule such as Iso-C treats all vectors alike, and ends nearer to some domains' models than to others'. Here
the vectors are weighted before the rule, and its result is scaled after it:

    tau = scale * rule(w_1 tau_1, ..., w_N tau_N),   mean_d w_d = 1.

How near the merge is to a domain is its agreement with that domain's own model on held-back pseudo-users
(`choose.Judge`, target "own"): a_d. First the scale is tried on equal weights; then, round by round,
`w_d <- w_d exp(rate (mean(a) - a_d) / mean(a))`. The trial with the highest geometric mean of a_d is kept,
equal weights and scale 1 among them, so that by this measure the search cannot end below the rule itself.
The geometric mean counts a relative loss in one domain like the same relative gain in another.

No gradient is needed and no user: a trial costs one merge and one ranking of the held-back pseudo-users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import exp, log

from common.progress import NO_REPORT, Report
from common.vectors import TaskVector

SCALES = (1.0, 0.7, 1.4, 2.0, 2.8)
RATE = 3.0
FLOOR = 1e-3  # an agreement of zero would make every trial equal

Rule = Callable[[Mapping[str, TaskVector]], TaskVector]
Score = Callable[[TaskVector], Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """One merge that was tried: how, and its agreement with each domain's model (0 to 1)."""

    scale: float
    weights: dict[str, float]
    agreement: dict[str, float]

    @property
    def worth(self) -> float:
        """The geometric mean of the agreements."""
        return exp(sum(log(max(value, FLOOR)) for value in self.agreement.values()) / len(self.agreement))


def balance(
    taus: Mapping[str, TaskVector], rule: Rule, score: Score, rounds: int, report: Report = NO_REPORT
) -> tuple[TaskVector, Trial, list[Trial]]:
    """The best merge that was tried, how it was made, and all trials in order.

    `rule` merges vectors (domain -> vector), `score` says how a merged vector agrees with each domain. With
    `rounds` 0 the rule is taken as it is: one trial. Time: `rounds + 1` merges and `rounds + 5` scores.
    """
    trials: list[Trial] = []
    vectors: dict[int, TaskVector] = {}  # of the best trial alone
    best, total = 0, rounds + len(SCALES) if rounds else 1
    for vector, scale, weights in _tried(taus, rule, rounds, trials):
        report(phase="balance", step=len(trials), total=total)
        trials.append(Trial(scale, weights, dict(score(vector))))
        if not vectors or trials[-1].worth > trials[best].worth:
            best = len(trials) - 1
            vectors = {best: vector}
    report(phase="balance", step=total, total=total)
    return vectors[best], trials[best], trials


def _tried(
    taus: Mapping[str, TaskVector], rule: Rule, rounds: int, trials: list[Trial]
) -> Iterator[tuple[TaskVector, float, dict[str, float]]]:
    """What to try next, from the `trials` so far: the merged vector, its scale and weights."""
    weights = dict.fromkeys(taus, 1.0)
    merged = rule(taus)
    for scale in SCALES if rounds else SCALES[:1]:
        yield _scaled(merged, scale), scale, weights
    start = max(trials, key=lambda trial: trial.worth)
    agreement = start.agreement
    for _ in range(rounds):
        weights = reweighted(weights, agreement)
        merged = rule({name: _scaled(tau, weights[name]) for name, tau in taus.items()})
        yield _scaled(merged, start.scale), start.scale, weights
        agreement = trials[-1].agreement


def reweighted(weights: Mapping[str, float], agreement: Mapping[str, float]) -> dict[str, float]:
    """Weights with more for domains that agree less, their mean 1.

    >>> {name: round(w, 2) for name, w in reweighted({"a": 1.0, "b": 1.0}, {"a": 0.6, "b": 0.4}).items()}
    {'a': 0.46, 'b': 1.54}
    """
    mean = max(sum(agreement.values()) / len(agreement), FLOOR)
    moved = {name: w * exp(RATE * (1 - agreement.get(name, mean) / mean)) for name, w in weights.items()}
    total = sum(moved.values()) / len(moved)
    return {name: w / total for name, w in moved.items()}


def _scaled(tau: TaskVector, factor: float) -> TaskVector:
    return tau if factor == 1 else {name: tensor * factor for name, tensor in tau.items()}
