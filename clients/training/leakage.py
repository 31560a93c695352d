"""What a fine-tuned model tells about who was in its training data, and the owner's limit on it.

The attack is membership inference, calibrated by the base model: a user's score is how much better the
fine-tuned model predicts the user's sequence than the base does. It needs the base and the vector alone,
which every receiver of a vector has. Calibration by a reference model: Watson et al., "On the importance of
difficulty calibration in membership inference attacks", ICLR 2022, section 3; the true-positive rate at a low
false-positive rate, as the figure that counts: Carlini et al., "Membership inference attacks from first
principles", IEEE S&P 2022, section 3.

Stronger attacks exist (`simulations/attacks` has one with shadow models): what is measured here is a lower
bound on what a vector tells, never an upper one. It stays with the owner.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clients.data.domain import Domain
from clients.training.dataset import domain_tokens, recent_first
from clients.training.fit import FitResult, load_encoder
from clients.training.job import ReleaseLimit
from common.config import RunConfig
from common.errors import ConfigError, LeakageError
from common.files import write_atomic
from common.metrics import auc
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report

FPR = 0.01
POSITIONS = 3
DRAWS = 1000
RECORD = "leakage.json"
_USERS_AT_ONCE = 256
Doubles = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Leakage:
    """How well an attack tells members from others.

    `auc`: how often a random member's score is above a random other's. `tpr`: the share of members above
    a threshold that at most `FPR` of the others pass (rounded down: of fewer than 100 others none). Each with
    the middle 95% of its bootstrap over users.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float
    members: int
    others: int


def assess(member_U: Doubles, other_U: Doubles, seed: int = 0) -> Leakage:
    """How far the scores of members are above those of others (both [U], higher means member)."""
    generator = np.random.default_rng(seed)
    auc_N, tpr_N = np.empty(DRAWS), np.empty(DRAWS)
    for draw in range(DRAWS):
        members = generator.choice(member_U, len(member_U))
        others = generator.choice(other_U, len(other_U))
        auc_N[draw], tpr_N[draw] = _auc(members, others), _tpr(members, others)
    auc_low, auc_high = np.quantile(auc_N, [0.025, 0.975])
    tpr_low, tpr_high = np.quantile(tpr_N, [0.025, 0.975])
    return Leakage(
        auc=_auc(member_U, other_U),
        auc_low=float(auc_low),
        auc_high=float(auc_high),
        tpr=_tpr(member_U, other_U),
        tpr_low=float(tpr_low),
        tpr_high=float(tpr_high),
        members=len(member_U),
        others=len(other_U),
    )


def sequence_losses(
    encoder: Encoder,
    domain: Domain,
    config: RunConfig,
    positions: int = POSITIONS,
    report: Report = NO_REPORT,
) -> Doubles:
    """Each user's mean loss over the newest `positions` of the training sequence that have a history: [U].

    The loss is `-log softmax(z . e_i / temperature)[next item]` over the whole catalog. A user with a single
    training item has no loss to tell anything: 0.
    """
    tokens, text = domain_tokens(encoder, domain, config.text), config.text
    report(phase="leakage: items", total=1)
    item_IE = encoder.encode(tokens.items(), config.evaluation.batch_size)
    loss_U = np.zeros(len(domain.train))
    for start in range(0, len(loss_U), _USERS_AT_ONCE):
        report(phase="leakage: users", step=start, total=len(loss_U))
        examples = [
            (user, history[:position], int(history[position]))
            for user, history in enumerate(domain.train[start : start + _USERS_AT_ONCE], start)
            for position in range(max(1, len(history) - positions), len(history))
        ]
        if not examples:
            continue
        ids = [
            tokens.history(recent_first(history, text.max_history_items), text.max_seq_len)
            for _, history, _ in examples
        ]
        z_BE = encoder.encode(ids, config.evaluation.batch_size)
        log_p_BI = torch.log_softmax(z_BE @ item_IE.T / config.training.temperature, dim=1)
        target_B = torch.tensor([target for _, _, target in examples], device=log_p_BI.device)
        loss_B = -log_p_BI.gather(1, target_B[:, None])[:, 0].double().cpu().numpy()
        user_B = np.array([user for user, _, _ in examples])
        counts_U = np.bincount(user_B, minlength=len(loss_U))
        loss_U += np.bincount(user_B, loss_B, len(loss_U)) / np.maximum(counts_U, 1)
    return loss_U


def _losses(
    domain: Domain, base: Path, own: Path, config: RunConfig, report: Report
) -> tuple[Doubles, Doubles]:
    """Each user's loss under the base model and under the domain's own: two of [U]."""
    if config.instruction is None:
        found = [
            sequence_losses(load_encoder(folder, config, training=False), domain, config, report=report)
            for folder in (base, own)
        ]
    else:
        from clients.training.language import load_language, wear
        from clients.training.ranking import user_losses

        lm, found = load_language(base, config), []
        for adapter in (None, own):
            wear(lm, base, config, adapter)
            found.append(user_losses(lm, domain, config, report))
    return found[0], found[1]


def hold_out(domain: Domain, users: int, seed: int) -> tuple[Rows, Rows]:
    """Rows of the users to train on, and of a seeded draw of `users` others, both ordered.

    Raises ConfigError unless at least as many are left.
    """
    total = len(domain.user_ids)
    if total < 2 * users:
        raise ConfigError(
            f"{total} users are too few to hold {users} out of training and attack as many",
            next_step="lower release.held_out_users, or remove release.max_tpr",
        )
    order = np.random.default_rng([seed, total, users]).permutation(total)
    return np.sort(order[users:]), np.sort(order[:users])


def check_release(
    fitted: FitResult,
    domain: Domain,
    rows: tuple[Rows, Rows],
    base_folder: Path,
    config: RunConfig,
    limit: ReleaseLimit,
    report: Report = NO_REPORT,
) -> Leakage:
    """Attack the fine-tuned model: as many of its members against the others that it never saw (`hold_out`).

    The figures are kept beside the model, in the owner's home. Raises LeakageError when the attack finds more
    of the members than the limit allows.
    """
    member_rows, other_rows = rows
    count, seed = len(other_rows), config.run.seed
    drawn = np.random.default_rng([seed, count]).choice(member_rows, count, replace=False)
    attacked = domain.with_users(np.concatenate([np.sort(drawn), other_rows]))
    base_U, own_U = _losses(attacked, base_folder, fitted.model_folder, config, report)
    gain_U = base_U - own_U
    found = assess(gain_U[:count], gain_U[count:], seed)
    record = {**asdict(found), "fpr": FPR, "max_tpr": limit.max_tpr, "vector_sha256": fitted.vector_sha256}
    write_atomic(fitted.vector_path.with_name(RECORD), (json.dumps(record, indent=1) + "\n").encode())
    if limit.max_tpr is not None and found.tpr > limit.max_tpr:
        raise LeakageError(
            f"the attack finds {found.tpr:.3f} of the members at {FPR:.0%} false positives, "
            f"{limit.max_tpr:g} are allowed",
            next_step="train fewer steps, with more users or at a lower rate; or raise release.max_tpr",
        )
    return found


def _auc(member_U: Doubles, other_U: Doubles) -> float:
    """How well scores tell members from others."""
    label_N = torch.arange(len(member_U) + len(other_U)) < len(member_U)
    return auc(torch.from_numpy(np.concatenate([member_U, other_U])), label_N)


def _tpr(member_U: Doubles, other_U: Doubles) -> float:
    """The share of members above all others but the highest `floor(FPR * others)`."""
    allowed = int(FPR * len(other_U))
    return float((member_U > np.sort(other_U)[-1 - allowed]).mean())
