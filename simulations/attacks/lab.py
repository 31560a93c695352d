"""The vectors that are attacked, and what a model says about users; each made once and kept on disk.

    out/data/   prepared domains        out/fits/    fine-tuned vectors, by configuration and data
    out/merges/ merged vectors          out/arrays/  losses and ranks of single users

Interrupted anywhere, what is finished is read and what was begun goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.data.domain import Domain
from clients.training.dataset import data_digest
from clients.training.evaluate import evaluate
from clients.training.fit import fine_tune, load_encoder
from clients.training.leakage import Doubles, Rows, hold_out, sequence_losses
from common.catalog import Catalog
from common.config import MergeMethod, RunConfig
from common.digests import json_digest, vector_digest
from common.models.base import load_tensors, model_digest, resolve_base, trainable_tensors
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector, apply, read_vector
from server.merge import run_merge
from simulations.arrays import kept
from simulations.attacks.config import AttackConfig
from simulations.simulate import prepare_source


@dataclass(frozen=True)
class Halves:
    """A domain, and the rows of its users that are fine-tuned on (`members`) and that never are."""

    whole: Domain
    members: Rows
    others: Rows

    @property
    def trained_on(self) -> Domain:
        """The members alone, with the whole catalog."""
        return self.whole.with_users(self.members)


class Lab:
    """Makes what the attacks need; `report` hears of the work on each model."""

    def __init__(self, config: AttackConfig, out: Path, report: Report = NO_REPORT) -> None:
        self.config, self.out, self.report = config, out, report
        self.run: RunConfig = config.run_config()
        self.base = resolve_base(self.run.base.model)
        self.tensors = trainable_tensors(self.base)
        self._halves: dict[str, Halves] = {}

    @cached_property
    def base_digest(self) -> str:
        """Names the base model."""
        return model_digest(self.base)

    @property
    def tokenizer(self) -> Any:
        """The base model's."""
        return self._model[0].tokenizer

    def halves(self, name: str) -> Halves:
        """The prepared domain, its users cut in two by `run.seed`."""
        if name not in self._halves:
            domain = Domain.load(prepare_source(self.config, name, self.out))
            rows = hold_out(domain, len(domain.user_ids) // 2, self.run.run.seed)
            self._halves[name] = Halves(domain, *rows)
        return self._halves[name]

    def fine_tuned(
        self, domain: Domain, steps: int | None = None, config: RunConfig | None = None
    ) -> TaskVector:
        """The vector that an owner of this data would send, read as the server reads it.

        `steps` and `config` None are those of the run.
        """
        config = self.run if config is None else config
        if steps is not None:
            training = config.training.model_copy(update={"max_steps": steps, "eval_every_steps": steps})
            config = config.model_copy(update={"training": training})
        fitted = fine_tune(domain, self.base, config, self.out / "fits", self.report)
        return read_vector(fitted.vector_path, self.tensors, config.training.vector_codec)

    def released(self) -> dict[str, TaskVector]:
        """The vector of each domain, fine-tuned on its members."""
        return {name: self.fine_tuned(self.halves(name).trained_on) for name in self.config.names}

    def merged(self, method: MergeMethod, taus: Mapping[str, TaskVector]) -> TaskVector:
        """The merge of `taus` (domain to vector)."""
        catalogs: dict[str, Catalog] = {name: self.halves(name).whole.catalog() for name in taus}
        key = json_digest({name: vector_digest(tau) for name, tau in taus.items()})[:12]
        work = self.out / "merges" / key
        return run_merge(method, self.base, taus, catalogs, self.run, work, self.report).vector

    def losses(self, tau: TaskVector | None, domain: Domain) -> Doubles:
        """`sequence_losses` of all users of a domain under base + `tau`, None being the base: [U]."""
        positions = self.config.attacks.positions
        key = {"what": "losses", "positions": positions, "temperature": self.run.training.temperature}
        return kept(
            self._array(key, tau, domain),
            lambda: sequence_losses(self._encoder(tau), domain, self.run, positions, self.report),
        )

    def ranks(self, tau: TaskVector | None, domain: Domain) -> Rows:
        """The rank (1 = best) of each user's test item under base + `tau`: [U]."""
        return kept(
            self._array({"what": "ranks"}, tau, domain),
            lambda: evaluate(self._encoder(tau), domain, self.run, "test", self.report).rank_U,
        )

    @cached_property
    def _model(self) -> tuple[Encoder, dict[str, torch.Tensor]]:
        return load_encoder(self.base, self.run, training=False), load_tensors(self.base, self.tensors)

    def _encoder(self, tau: TaskVector | None) -> Encoder:
        """The one encoder in memory, with base + `tau` in it."""
        encoder, base = self._model
        parameters = dict(encoder.model.named_parameters())
        with torch.no_grad():
            for name, tensor in apply(base, tau or {}).items():
                parameters[name].copy_(tensor)
        return encoder

    def _array(self, key: Mapping[str, object], tau: TaskVector | None, domain: Domain) -> Path:
        statement = {
            **key,
            "base": self.base_digest,
            "vector": "" if tau is None else vector_digest(tau),
            "data": data_digest(domain, self.run.text),
            "run": self.run.model_dump(mode="json", include={"base", "text", "evaluation"}),
            "precision": self.run.training.precision,
        }
        return self.out / "arrays" / f"{json_digest(statement)[:24]}.npy"


def noise_like(tau: TaskVector, seed: int) -> TaskVector:
    """Gaussian noise with the norm of each tensor of `tau`: a vector that has seen no data."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tau.items()}
    return {name: noise[name] * (tau[name].norm() / noise[name].norm()) for name in tau}


def norm_of(tau: TaskVector) -> float:
    """L2 norm over all tensors."""
    return float(np.sqrt(sum(float(tensor.double().square().sum()) for tensor in tau.values())))
