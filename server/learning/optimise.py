"""Learned merging: coefficients of the task vectors, trained on pseudo-users from the catalogs alone.

`theta = theta_0 + sum_d lambda_d tau_d` (domain-wise) or the same with a coefficient for each
transformer layer (layer-wise); only lambda is trained, by Adam without weight decay. Each step draws
pseudo-users over all domains, embeds them with the merged model, scores them against all items of their
domain, and minimises `objective` ("adamerging" or "mergerec", see `losses`). The item embeddings of the
merged model are constants of a step: encoded from the initial merge and left ("stale"), or encoded
again every `refresh_every_steps` ("refreshed"). Dropout is off throughout.

The run is a function of its inputs and seed: killed at any point and called again with the same `work`
folder it goes on from its last saved state to the same result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.catalog import Catalog
from common.config import LearningSection, TextSection
from common.errors import ModelError
from common.models.base import Pooling, model_digest
from common.models.encoder import Encoder
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.digests import json_digest
from server.learning import losses
from server.learning.coefficients import Granularity, as_table, group_tensors
from server.learning.merged import MergedModel
from server.learning.prepare import Inputs, PseudoDomain, check_catalogs, pseudo_domains
from server.learning.state import LearningState, Trajectory
from server.learning.teachers import DomainTexts, EmbeddingCache, encode
from server.merging import PROCESS_INITIAL
from server.tensors import check_vectors, split_tensors

Objective = Literal["adamerging", "mergerec"]

PLAIN = "none"
PLAIN_INITIAL = 0.2
SAVE_EVERY_STEPS = 10
STATE_VERSION = 1


@dataclass(frozen=True)
class LearnedMerge:
    """A learned merge: the merged task vector, its coefficients, and where its trajectory is."""

    vector: TaskVector
    coefficients: dict[str, dict[str, float]]  # {group: {domain: lambda}}
    trajectory_path: Path
    seconds: float  # of learning, over all restarts


def learn(
    base: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    *,
    objective: Objective,
    granularity: Granularity,
    learning: LearningSection,
    text: TextSection,
    work: Path,
    seed: int = 0,
    report: Report = NO_REPORT,
    pooling: Pooling | Literal["auto"] = "auto",
    process: str = PLAIN,
    process_options: Mapping[str, Any] | None = None,
    cache: Path | None = None,
) -> LearnedMerge:
    """Learn the coefficients of `taus` (domain -> vector) on the base model in folder `base`.

    `work` keeps `state.json` and `trajectory.jsonl`; `cache` (default `work/cache`) the embeddings that
    other methods of the run can share. Runs on CUDA when there is one. Raises VectorError, DataError,
    ConfigError for bad input, ModelError when the loss stops being finite.
    """
    started_s = time.monotonic()
    check_vectors(taus)
    check_catalogs(taus, catalogs)
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = Encoder.load(base, pooling=pooling, device=device, precision=learning.precision)
    encoder.model.eval().requires_grad_(False)
    common_key = {
        "base": model_digest(base),
        "pooling": pooling,
        "precision": learning.precision,
        "device": device,
        "attributes": list(text.attributes),
        "max_attribute_tokens": text.max_attribute_tokens,
        "max_seq_len": text.max_seq_len,
    }
    tensors = {name: param.detach() for name, param in encoder.model.named_parameters()}
    inputs = Inputs(encoder, tensors, dict(taus), dict(catalogs), text, learning, seed, common_key)
    run = _Run(
        inputs, objective, granularity, process, dict(process_options or {}), work, cache or work / "cache"
    )
    return run.learn(report, started_s)


class _Run:
    """One learning run: everything prepared, then one loop."""

    def __init__(
        self,
        inputs: Inputs,
        objective: Objective,
        granularity: Granularity,
        process: str,
        process_options: dict[str, Any],
        work: Path,
        cache: Path,
    ) -> None:
        self._inputs, self._objective, self._cache = inputs, objective, cache
        plain = {name: inputs.taus[name] for name in inputs.domains}
        split = plain if process == PLAIN else split_tensors(process, plain, process_options)
        vectors = list(split.values())
        initial = PLAIN_INITIAL if process == PLAIN else PROCESS_INITIAL
        self._initial = inputs.learning.initial if inputs.learning.initial is not None else initial
        groups = group_tensors(vectors[0], granularity)
        self._merged = MergedModel(inputs.base, vectors, groups, inputs.device)
        self._keys = {name: inputs.domain_key(name) for name in inputs.domains}
        self._process_key = {"process": process, "options": process_options, "initial": self._initial}
        self._digest = json_digest(
            {
                "version": STATE_VERSION,
                "domains": self._keys,
                "objective": objective,
                "granularity": granularity,
                "learning": inputs.learning.model_dump(mode="json"),
                "text": inputs.text.model_dump(mode="json"),
                "seed": inputs.seed,
                **self._process_key,
            }
        )
        self._state_path = work / "state.json"
        self._trajectory = Trajectory(work / "trajectory.jsonl")

    def learn(self, report: Report, started_s: float) -> LearnedMerge:
        """Prepare, loop from the saved state or the start, and return the merge."""
        state = LearningState.load(self._state_path, self._digest)
        pending: list[dict[str, Any]] = []
        if state is None:
            state = LearningState.start(self._initial, len(self._merged.groups), len(self._inputs.domains))
            pending.append(self._record(0, None, state))
        self._trajectory.rewind(-1 if pending else state.step)
        if state.step < self._inputs.learning.steps:
            self._loop(state, pending, report, started_s)
        return LearnedMerge(
            vector=self._merged.vector(state.coefficients_GD),
            coefficients=as_table(state.coefficients_GD, self._merged.groups, self._inputs.domains),
            trajectory_path=self._trajectory.path,
            seconds=state.seconds,
        )

    def _loop(
        self, state: LearningState, pending: list[dict[str, Any]], report: Report, started_s: float
    ) -> None:
        """Steps from `state.step + 1` to the last; `pending` holds trajectory records not yet written."""
        learning, before_s = self._inputs.learning, state.seconds
        teachers = self._objective == "mergerec"
        domains, draws = pseudo_domains(
            self._inputs, self._keys, teachers=teachers, cache=self._cache, report=report
        )
        items: list[Tensor] | None = None
        for step in range(state.step + 1, learning.steps + 1):
            if learning.item_embeddings == "refreshed" and self._is_refresh(step) and state.step > 0:
                state.refreshed_GD = state.coefficients_GD.clone()
                items = None
            items = self._student_items(state, domains, report) if items is None else items
            numbers = range((step - 1) * learning.batch_size, step * learning.batch_size)
            self._merged.set_coefficients(state.coefficients_GD)
            loss = self._loss(domains, items, [(int(draws.domain_N[n]), n) for n in numbers])
            loss_value = float(loss.detach())
            if not np.isfinite(loss_value):
                raise ModelError(
                    f"merging: the loss is {loss_value} at step {step}",
                    next_step="lower learning.learning_rate or learning.initial",
                )
            _adam_step(state, self._merged.gradient(loss), learning.learning_rate)
            pending.append(self._record(step, loss_value, state))
            report(phase="learn", step=step, total=learning.steps, loss=loss_value)
            if step % SAVE_EVERY_STEPS == 0 or step == learning.steps:
                state.seconds = before_s + time.monotonic() - started_s
                self._trajectory.append(pending)
                pending.clear()
                state.save(self._state_path, self._digest)

    def _is_refresh(self, step: int) -> bool:
        return (step - 1) % self._inputs.learning.refresh_every_steps == 0

    def _student_items(
        self, state: LearningState, domains: list[PseudoDomain], report: Report
    ) -> list[Tensor]:
        """The merged model's item embeddings of every domain, at the coefficients of the last refresh."""
        self._merged.set_coefficients(state.refreshed_GD)
        initial = bool((state.refreshed_GD == self._initial).all())
        store, items = EmbeddingCache(self._cache), []
        for index, domain in enumerate(domains):
            report(phase="items", step=index, total=len(domains))

            def compute(texts: DomainTexts = domain.texts) -> dict[str, Tensor]:
                return {"items": encode(self._inputs.encoder, texts.items, self._merged.params)}

            if initial:  # the same for every learned method of the run
                key = {"what": "initial", "domain": domain.texts.name, **self._process_key, "all": self._keys}
                items.append(store.get(key, compute, self._inputs.device)["items"])
            else:
                items.append(compute()["items"])
        return items

    def _loss(self, domains: list[PseudoDomain], items: list[Tensor], batch: list[tuple[int, int]]) -> Tensor:
        """Mean loss over the batch: (domain, draw) pairs, embedded together, scored domain by domain."""
        batch = sorted(batch)
        ids = [domains[d].texts.history(domains[d].histories[domains[d].rows[number]]) for d, number in batch]
        input_ids_BT, mask_BT = self._inputs.encoder.batch(ids)
        users_BE = self._inputs.encoder.forward(input_ids_BT, mask_BT, params=self._merged.params)
        total = users_BE.new_zeros(())
        start = 0
        for index, domain in enumerate(domains):
            rows = [domain.rows[number] for d, number in batch if d == index]
            if rows:
                s_BI = users_BE[start : start + len(rows)] @ items[index].T
                total = total + self._domain_loss(domain, rows, s_BI).sum()
                start += len(rows)
        return total / len(batch)

    def _domain_loss(self, domain: PseudoDomain, rows: list[int], s_BI: Tensor) -> Tensor:
        learning = self._inputs.learning
        seen_BI = None
        if learning.mask_seen:
            seen_BI = torch.zeros(s_BI.shape, dtype=torch.bool)
            for row_I, row in zip(seen_BI, rows, strict=True):
                row_I[list(domain.histories[row])] = True
            seen_BI = seen_BI.to(s_BI.device)
        if self._objective == "adamerging":
            return losses.entropy(s_BI, seen_BI)
        if domain.teacher_users_UE is None or domain.teacher_items_IE is None:
            raise ModelError(
                "merging: this objective needs a teacher", next_step="prepare with teachers=True"
            )
        t_BI = domain.teacher_users_UE[rows] @ domain.teacher_items_IE.T
        return losses.mergerec(
            s_BI, t_BI, seen_BI, temperature=learning.temperature, alpha=learning.distillation_weight
        )

    def _record(self, step: int, loss: float | None, state: LearningState) -> dict[str, Any]:
        table = as_table(state.coefficients_GD, self._merged.groups, self._inputs.domains)
        return {"step": step, "loss": loss, "coefficients": table}


def _adam_step(state: LearningState, gradient_GD: Tensor, learning_rate: float) -> None:
    """One step of torch's Adam (default betas, no weight decay) on the coefficients in `state`."""
    value_GD = state.coefficients_GD.requires_grad_()
    adam = torch.optim.Adam([value_GD], lr=learning_rate, foreach=False)
    adam.state[value_GD] = {
        "step": torch.tensor(float(state.step)),
        "exp_avg": state.mean_GD,
        "exp_avg_sq": state.square_GD,
    }
    value_GD.grad = gradient_GD
    adam.step()
    state.coefficients_GD = value_GD.detach()
    state.step += 1
