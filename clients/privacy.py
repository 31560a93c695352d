"""What a fine-tuning spent of its users' privacy: the trainer's word for it, and the owner's limits.

The trainer writes `privacy.json` beside a vector that it made with differential privacy. The header of the
parcel repeats these facts, and the gate refuses a header that says anything else: a vector without that file
has none to claim. Spending adds up over the vectors that left (basic composition: both epsilon and delta are
sums); the same vector sent for another run spends nothing more.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from common.config import Frozen, RunConfig
from common.errors import GateError, PolicyError
from common.files import sha256_file, write_atomic
from common.ledger import Journal
from common.parcels import Kind, Privacy

CLAIM = "privacy.json"


class PrivacyLimits(Frozen):
    """What this owner demands. Without any epsilon here vectors may leave unprotected."""

    max_epsilon: float | None = Field(None, gt=0, description="of one vector; without privacy none leaves")
    max_total_epsilon: float | None = Field(None, gt=0, description="of all vectors together, over all runs")
    max_delta: float = Field(1e-5, gt=0, lt=1, description="of one vector, where an epsilon is demanded")

    @property
    def demanded(self) -> bool:
        """Whether a vector needs differential privacy to leave."""
        return self.max_epsilon is not None or self.max_total_epsilon is not None

    def check_run(self, config: RunConfig) -> None:
        """Raise PolicyError when a run trains without the privacy that is demanded."""
        if self.demanded and config.privacy.mechanism == "none":
            raise PolicyError(
                "this owner's policy demands differential privacy, and the run has none",
                next_step="ask the operator for a run with [privacy] mechanism = 'dp-sgd'",
            )

    def check(self, planned: Privacy, epsilon_spent: float) -> None:
        """Raise PolicyError when `planned` is more than is allowed after `epsilon_spent`."""
        if not self.demanded:
            return
        if planned.mechanism == "none":
            raise PolicyError("this owner's policy demands differential privacy, and this vector has none")
        epsilon, delta = planned.epsilon_e6 / 1e6, planned.delta_e12 / 1e12
        total = epsilon_spent + epsilon
        for name, value, limit in (
            ("max_epsilon", epsilon, self.max_epsilon),
            ("max_total_epsilon", total, self.max_total_epsilon),
            ("max_delta", delta, self.max_delta),
        ):
            if limit is not None and value > limit * (1 + 1e-9):
                raise PolicyError(
                    f"privacy: {value:g} would be spent, {name} = {limit:g} is this owner's limit",
                    next_step="ask the operator for a run with more noise or fewer steps",
                )


class AnswerLimits(Frozen):
    """What an owner allows of answers about candidates."""

    max_answers: int = Field(1300, ge=1, description="different candidates that are answered, in all")
    min_users: int = Field(50, ge=1, description="users behind an answer")
    clip: float = Field(10.0, gt=0, le=1000, description="most that one user's loss counts, nats a token")
    noise_multiplier: float = Field(0.0, ge=0, le=1000, description="0: no noise, and no promise")
    delta: float = Field(1e-5, gt=0, lt=1, description="of the noise, all answers together")


def privacy_of(limits: AnswerLimits) -> Privacy:
    """What the whole budget of answers spends, as a header says it: epsilon rounded up.

    Neighbours are two validation sets of which one user was replaced. Raises ConfigError where the noise
    bounds nothing.
    """
    if not limits.noise_multiplier:
        return Privacy()
    from clients.training.accounting import epsilon

    spent = epsilon(1.0, limits.noise_multiplier, limits.max_answers, limits.delta)
    return Privacy(
        mechanism="gaussian",
        clip_e6=round(limits.clip * 1e6),
        noise_e6=round(limits.noise_multiplier * 1e6),
        epsilon_e6=math.ceil(spent * 1e6),
        delta_e12=math.ceil(limits.delta * 1e12 - 1e-6),
    )


NO_LIMITS = PrivacyLimits()


@dataclass(frozen=True)
class Spent:
    """What the task vectors that left have spent together; `unprotected` of them promise nothing at all."""

    vectors: int = 0
    unprotected: int = 0
    epsilon: float = 0.0
    delta: float = 0.0

    def __str__(self) -> str:
        if not self.vectors:
            return "no task vector has left"
        protected = self.vectors - self.unprotected
        text = f"epsilon {self.epsilon:g}, delta {self.delta:g} by {protected} of {self.vectors} task vectors"
        bare = f"; {self.unprotected} left without differential privacy" if self.unprotected else ""
        return text + bare


def spent(journal: Journal, *, without: str = "") -> Spent:
    """What the journal of the gate says has left, each vector once; `without` is a payload digest to skip."""
    seen: dict[str, Privacy] = {}
    for key, facts in journal.items("release/"):
        _, _, _, kind, payload_digest = key.split("/")
        if kind == Kind.TASK_VECTOR and payload_digest != without:
            seen[payload_digest] = Privacy(**facts.get("privacy", {}))
    protected = [facts for facts in seen.values() if facts.mechanism != "none"]
    return Spent(
        vectors=len(seen),
        unprotected=len(seen) - len(protected),
        epsilon=sum(facts.epsilon_e6 for facts in protected) / 1e6,
        delta=sum(facts.delta_e12 for facts in protected) / 1e12,
    )


def write_claim(vector: Path, facts: Privacy) -> None:
    """The trainer's word on how `vector` was made, beside it. Raises StorageError."""
    record = {"vector_sha256": sha256_file(vector), "privacy": facts.model_dump()}
    write_atomic(vector.with_name(CLAIM), (json.dumps(record, indent=1) + "\n").encode())


def read_claim(vector: Path) -> Privacy:
    """What the trainer wrote about `vector`; no privacy where it wrote nothing.

    Raises GateError when what it wrote is about another vector, or cannot be read.
    """
    path = vector.with_name(CLAIM)
    try:
        record = json.loads(path.read_bytes())
        facts, digest = Privacy(**record["privacy"]), record["vector_sha256"]
    except FileNotFoundError:
        return Privacy()
    except (ValueError, KeyError, TypeError) as err:
        raise GateError(f"{path}: unreadable, so nothing is known of the vector's privacy") from err
    if digest != sha256_file(vector):
        raise GateError(f"{path}: is about another vector", next_step="fine-tune again")
    return facts


def check_claim(claimed: Privacy, vector: Path, limits: PrivacyLimits, journal: Journal) -> None:
    """Raise GateError unless `claimed` is what the trainer wrote and within the owner's limits."""
    if claimed != read_claim(vector):
        raise GateError("the header's privacy facts are not those that the trainer wrote")
    limits.check(claimed, spent(journal, without=sha256_file(vector)).epsilon)
