"""What does differential privacy cost, and what does it leave to an attacker? One row a model of one domain.

The first domain's members are fine-tuned on as the run says, and privately (`clients.training.private`) at
each epsilon. A model ranks the test items of members and of others, none of which was trained on, and the
membership attacks of `simulations.attacks.membership` are carried out on its vector. Shadow models of a
private vector are private, too: an attacker knows the configuration, and not the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from clients.data.domain import Domain
from clients.training.accounting import plan_privacy
from clients.training.leakage import Doubles, Rows, assess
from common.config import RunConfig
from common.metrics import ndcg_at_k, ndcg_gains, recall_at_k
from common.vectors import TaskVector
from simulations.attacks.lab import Lab, norm_of
from simulations.attacks.membership import halves_of, lira

ZERO_SHOT, PLAIN, PRIVATE = "zero-shot", "fine-tuned", "fine-tuned, dp-sgd"
Row = dict[str, Any]


@dataclass(frozen=True)
class Tested:
    """The users that every model is tested on: members first, then as many others."""

    lab: Lab
    rows: Rows

    @cached_property
    def domain(self) -> Domain:
        """Those users alone, with the whole catalog."""
        return self.lab.halves(self.lab.config.names[0]).whole.with_users(self.rows)

    @property
    def members(self) -> int:
        """How many of them are members."""
        return len(self.rows) // 2

    def change(self, tau: TaskVector) -> Doubles:
        """By how much each user's loss fell from the base: [U]."""
        return self.lab.losses(None, self.domain) - self.lab.losses(tau, self.domain)

    def attack(self, score_U: Doubles) -> Row:
        """The fields of `Leakage`, by a score of each user."""
        return asdict(assess(score_U[: self.members], score_U[self.members :], self.lab.run.run.seed))


def attack_private(lab: Lab) -> list[Row]:
    """One row a model.

    Fields: `model`, `epsilon`, `delta` and `noise` as accounted (None: not private), `norm`, `recall` and
    `ndcg` of `members` and `others`, `gain` (of NDCG@k over zero-shot, the mean of all tested users) and
    `gain_error` (one standard error, paired), and the fields of `Leakage` for `calibrated` and `shadows`
    (None: not made).
    """
    tested = Tested(lab, _tested_rows(lab))
    models: list[tuple[str, RunConfig | None]] = [(ZERO_SHOT, None), (PLAIN, lab.run)]
    models += [(PRIVATE, private_config(lab, epsilon)) for epsilon in lab.config.attacks.epsilons]
    rows = []
    for number, (label, config) in enumerate(models):
        lab.report(phase=f"privacy: {label}", step=number, total=len(models))
        rows.append(_row(tested, label, config))
    return rows


def private_config(lab: Lab, epsilon: float) -> RunConfig:
    """The run's configuration with `dp-sgd` at this epsilon, and what it refuses turned off."""
    section, training = lab.config.attacks, lab.run.training
    return RunConfig.model_validate(
        {
            **lab.run.model_dump(),
            "privacy": {**lab.run.privacy.model_dump(), "mechanism": "dp-sgd", "epsilon": epsilon},
            "training": {
                **training.model_dump(),
                "batch_size": section.private_batch_size,
                "learning_rate": section.private_learning_rate,
                "max_steps": section.private_steps,
                "eval_every_steps": section.private_steps,
                "checkpoint_every_steps": 2,  # they are long
                "warmup_steps": 0,
                "weight_decay": 0.0,
                "dropout": None,
                "history_negatives": 0,
                "logq_correction": False,
            },
        }
    )


def _tested_rows(lab: Lab) -> Rows:
    """As many members as others, drawn by `run.seed`."""
    halves = lab.halves(lab.config.names[0])
    count = min(lab.config.attacks.tested, len(halves.members), len(halves.others))
    generator = np.random.default_rng([lab.run.run.seed, count])
    drawn = [
        np.sort(generator.choice(rows, count, replace=False)) for rows in (halves.members, halves.others)
    ]
    return np.concatenate(drawn)


def _row(tested: Tested, label: str, config: RunConfig | None) -> Row:
    lab, k = tested.lab, tested.lab.run.evaluation.k
    members = lab.halves(lab.config.names[0]).trained_on
    tau = None if config is None else lab.fine_tuned(members, config=config)
    plan = None if config is None else plan_privacy(config, len(members.user_ids))
    facts = None if plan is None else plan.facts()
    rank_U = lab.ranks(tau, tested.domain)
    parts = {"members": rank_U[: tested.members], "others": rank_U[tested.members :]}
    base_U = lab.ranks(None, tested.domain)
    gain_U = (ndcg_gains(torch.from_numpy(rank_U), k) - ndcg_gains(torch.from_numpy(base_U), k)).numpy()
    return {
        "model": label,
        "epsilon": None if facts is None else facts.epsilon_e6 / 1e6,
        "delta": None if facts is None else facts.delta_e12 / 1e12,
        "noise": None if plan is None else plan.noise,
        "norm": None if tau is None else norm_of(tau),
        "recall": {name: recall_at_k(torch.from_numpy(ranks), k) for name, ranks in parts.items()},
        "ndcg": {name: ndcg_at_k(torch.from_numpy(ranks), k) for name, ranks in parts.items()},
        "gain": None if tau is None else float(gain_U.mean()),
        "gain_error": None if tau is None else float(gain_U.std(ddof=1) / np.sqrt(len(gain_U))),
        "calibrated": None if tau is None else tested.attack(tested.change(tau)),
        "shadows": None if tau is None or config is None else _shadowed(tested, tau, config),
    }


def _shadowed(tested: Tested, tau: TaskVector, config: RunConfig) -> Row | None:
    lab = tested.lab
    domain, pairs = lab.halves(lab.config.names[0]).whole, lab.config.attacks.shadow_pairs
    if not pairs:
        return None
    in_NU = halves_of(len(domain.user_ids), pairs, lab.run.run.seed)
    shadows = [lab.fine_tuned(domain.with_users(np.flatnonzero(side_U)), config=config) for side_U in in_NU]
    shadow_NU = np.stack([tested.change(shadow) for shadow in shadows])
    return tested.attack(lira(tested.change(tau), shadow_NU, in_NU[:, tested.rows]))


def privacy_table(rows: Sequence[Row]) -> str:
    """The rows as Markdown; Recall and NDCG x 100."""
    head = ["model", "epsilon", "delta", "noise", "norm", "Recall, members", "Recall, others"]
    head += ["NDCG, members", "NDCG, others", "NDCG over zero-shot", "AUC (95%)", "TPR at 1% FPR (95%)"]
    head += ["AUC, shadow models", "TPR, shadow models"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = zip(("epsilon", "delta", "noise", "norm"), (".2f", ".0e", ".3f", ".2f"), strict=True)
        cells = [row["model"], *("" if row[key] is None else format(row[key], form) for key, form in numbers)]
        cells += [
            f"{100 * row[what][users]:.2f}" for what in ("recall", "ndcg") for users in ("members", "others")
        ]
        gain, error = row["gain"], row["gain_error"]
        cells.append("" if gain is None else f"{100 * gain:+.2f} +- {100 * error:.2f}")
        cells += [
            _attacked(row[attack], what) for attack in ("calibrated", "shadows") for what in ("auc", "tpr")
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _attacked(found: Row | None, what: str) -> str:
    if found is None:
        return ""
    return f"{found[what]:.3f} ({found[f'{what}_low']:.3f} to {found[f'{what}_high']:.3f})"
