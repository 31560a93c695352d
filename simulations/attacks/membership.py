"""Who was in the training data? Two membership inference attacks on released vectors and on merged models.

*Base-calibrated*: how much better than the base the model predicts a user's sequence
(`clients.training.leakage`, with the paper). It needs nothing but base and vector.

*Shadow models*: LiRA of Carlini et al., "Membership inference attacks from first principles", IEEE S&P 2022,
section 4 (online, with one variance for all users, as they advise for few shadow models, section 6.3). Shadow
models are fine-tuned with the run's own configuration on random halves of the users, in pairs of a half and
its complement, so that each user is in as many as out. A user's score is the log-likelihood of its change of
loss under the Gaussian of the models that had the user, less that under the others'. The shadow models see
the very users that are asked about, and the whole catalog: an attacker who knows that much is a strong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from clients.training.leakage import Doubles, assess
from common.vectors import TaskVector
from simulations.attacks.lab import Lab, noise_like

CALIBRATED, SHADOWS = "base-calibrated", "shadow models"
Row = dict[str, Any]


def attack_membership(lab: Lab) -> list[Row]:
    """One row a model, domain and attack: `model`, `domain`, `attack`, and the fields of `Leakage`."""
    config, taus = lab.config, lab.released()
    first, second, steps = config.names[0], config.names[1], lab.run.training.max_steps
    rows = [
        _calibrated(lab, f"own vector, {steps} steps" if name == first else "own vector", tau, name)
        for name, tau in taus.items()
    ]
    for other_steps in config.attacks.other_steps:
        tau = lab.fine_tuned(lab.halves(first).trained_on, other_steps)
        rows.append(_calibrated(lab, f"own vector, {other_steps} steps", tau, first))
    rows.append(_calibrated(lab, "control: noise", noise_like(taus[first], lab.run.run.seed), first))
    rows += [
        _calibrated(lab, "control: another domain's vector", taus[second if name == first else first], name)
        for name in taus
    ]
    merges = {method.label: lab.merged(method, taus) for method in config.merge}
    rows += [_calibrated(lab, f"merged: {label}", tau, first) for label, tau in merges.items()]
    rows += [
        _calibrated(lab, f"merged: {config.publish}", merges[config.publish], name)
        for name in taus
        if name != first
    ]
    if config.attacks.shadow_pairs:
        rows += _shadowed(lab, first, {f"own vector, {steps} steps": taus[first]})
        published = {f"merged: {config.publish}": merges[config.publish]}
        rows += _shadowed(lab, first, {**published, "control: another domain's vector": taus[second]})
    return rows


def lira(change_U: Doubles, shadow_NU: Doubles, in_NU: npt.NDArray[np.bool_]) -> Doubles:
    """The log-likelihood ratio that each user was a member: [U].

    change_U: what the attacked model changed in each user's loss. shadow_NU: the same of each shadow model,
    in_NU whether it had the user. Carlini et al., algorithm 1, with means by user and pooled variances.
    """
    score_U = np.zeros_like(change_U)
    for side, sign in ((in_NU, 1.0), (~in_NU, -1.0)):
        count_U = side.sum(0)
        mean_U = np.where(side, shadow_NU, 0).sum(0) / count_U
        freedom = count_U.sum() - len(count_U)
        squares = np.square(np.where(side, shadow_NU - mean_U, 0)).sum()
        # with one model a user there is no spread within users; take that between them
        variance = squares / freedom if freedom else mean_U.var()
        variance = variance * (1 + 1 / count_U) + 1e-12  # the mean is an estimate, too
        score_U += sign * (-0.5 * np.square(change_U - mean_U) / variance - 0.5 * np.log(variance))
    return score_U


def halves_of(users: int, pairs: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which users each shadow model has: [2 * pairs, U], each pair a random half and its complement."""
    sides = []
    for pair in range(pairs):
        side_U = np.zeros(users, dtype=np.bool_)
        side_U[np.random.default_rng([seed, users, pair]).permutation(users)[: users // 2]] = True
        sides += [side_U, ~side_U]
    return np.stack(sides)


def _calibrated(lab: Lab, model: str, tau: TaskVector, name: str) -> Row:
    domain = lab.halves(name).whole
    return _row(lab, model, name, CALIBRATED, lab.losses(None, domain) - lab.losses(tau, domain))


def _shadowed(lab: Lab, name: str, taus: dict[str, TaskVector]) -> list[Row]:
    domain, pairs = lab.halves(name).whole, lab.config.attacks.shadow_pairs
    in_NU = halves_of(len(domain.user_ids), pairs, lab.run.run.seed)
    base_U = lab.losses(None, domain)
    shadows = [lab.fine_tuned(domain.with_users(np.flatnonzero(side_U))) for side_U in in_NU]
    shadow_NU = np.stack([base_U - lab.losses(tau, domain) for tau in shadows])
    return [
        _row(lab, model, name, SHADOWS, lira(base_U - lab.losses(tau, domain), shadow_NU, in_NU))
        for model, tau in taus.items()
    ]


def _row(lab: Lab, model: str, name: str, attack: str, score_U: Doubles) -> Row:
    halves = lab.halves(name)
    found = assess(score_U[halves.members], score_U[halves.others], lab.run.run.seed)
    return {"model": model, "domain": name, "attack": attack, **asdict(found)}


def membership_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| model | domain | attack | AUC (95%) | TPR at 1% FPR (95%) |", "|---|---|---|---|---|"]
    for row in rows:
        auc = f"{row['auc']:.3f} ({row['auc_low']:.3f} to {row['auc_high']:.3f})"
        tpr = f"{row['tpr']:.3f} ({row['tpr_low']:.3f} to {row['tpr_high']:.3f})"
        lines.append(f"| {row['model']} | {row['domain']} | {row['attack']} | {auc} | {tpr} |")
    return "\n".join(lines) + "\n"
