"""Learned merging: coefficients of the task vectors, trained on pseudo-users from the catalogs alone.

`theta = theta_0 + sum_d lambda_d tau_d` (domain-wise), or with a coefficient for each transformer layer
(layer-wise) or each tensor (tensor-wise); only lambda is trained, by Adam without weight decay. Each step
draws pseudo-users over all domains, embeds them with the merged model, scores them against all items of
their domain, and minimises the loss (`losses`). The item embeddings of the merged model are constants of a
step: encoded from the initial merge and left ("stale"), or encoded again every `refresh_every_steps`
("refreshed"). Dropout is off throughout.

With `holdout` above 0 the held-back pseudo-users' loss is taken at the start, every `evaluate_every_steps`
and at the end. The result has the coefficients of the lowest; learning stops after `patience` evaluations
without a lower one; if none was lower than the first, the result is the initialisation ("fallback").

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
from torch import Tensor

from common.catalog import Catalog
from common.coefficients import Granularity, as_table, group_tensors
from common.config import LearningSection, TextSection
from common.digests import json_digest
from common.errors import ModelError
from common.learning_state import LearningState, Trajectory
from common.models.base import Pooling
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.learning.losses import LOSSES, Loss
from server.learning.merged import MergedModel
from server.learning.objective import Objective
from server.learning.prepare import Inputs, PseudoDomain, load_inputs, pseudo_domains
from server.learning.pseudo_users import Draws
from server.learning.search import grid, search
from server.learning.teachers import DomainTexts, EmbeddingCache, encode
from server.merging import PROCESS_INITIAL, unknown_name
from server.tensors import check_vectors, split_tensors

PLAIN = "none"
PLAIN_INITIAL = 0.2
SAVE_EVERY_STEPS = 10
STATE_VERSION = 2


@dataclass(frozen=True)
class LearnedMerge:
    """A learned merge: the merged task vector, its coefficients, and where its trajectory is.

    `facts` go into the journal: steps made, the common initial coefficient, the held-back losses, which step
    was the best, and whether the result fell back to the initialisation.
    """

    vector: TaskVector
    coefficients: dict[str, dict[str, float]]  # {group: {domain: lambda}}
    trajectory_path: Path
    seconds: float  # of learning, over all restarts
    facts: dict[str, Any]


def learn(
    base: Path,
    taus: Mapping[str, TaskVector],
    catalogs: Mapping[str, Catalog],
    *,
    objective: str,
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

    `objective` names a loss of `losses.LOSSES`. `work` keeps `state.json` and `trajectory.jsonl`; `cache`
    (default `work/cache`) the embeddings that other methods of the run can share. Runs on CUDA when there is
    one. Raises VectorError, DataError, ConfigError for bad input, ModelError when a loss is not finite.
    """
    started_s = time.monotonic()
    if objective not in LOSSES:
        raise unknown_name("loss", objective, LOSSES)
    check_vectors(taus)
    inputs = load_inputs(base, taus, catalogs, learning, text, seed=seed, pooling=pooling)
    work.mkdir(parents=True, exist_ok=True)
    run = _Run(
        inputs,
        LOSSES[objective],
        granularity,
        process,
        dict(process_options or {}),
        work,
        cache or work / "cache",
    )
    return run.learn(report, started_s)


class _Run:
    """One learning run: everything prepared, then one loop."""

    def __init__(
        self,
        inputs: Inputs,
        loss: Loss,
        granularity: Granularity,
        process: str,
        process_options: dict[str, Any],
        work: Path,
        cache: Path,
    ) -> None:
        self._inputs, self._loss, self._cache, learning = inputs, loss, cache, inputs.learning
        plain = {name: inputs.taus[name] for name in inputs.domains}
        self._processed = process != PLAIN
        split = split_tensors(process, plain, process_options) if self._processed else plain
        vectors = list(split.values())
        groups = group_tensors(vectors[0], granularity)
        self._merged = MergedModel(inputs.base, vectors, groups, inputs.device, learning.vectors)
        self._keys = {name: inputs.key(name, name) for name in inputs.domains}
        self._process_key = {"process": process, "options": process_options, "vectors": learning.vectors}
        self._digest = json_digest(
            {
                "version": STATE_VERSION,
                "domains": self._keys,
                "objective": loss.name,
                "granularity": granularity,
                "learning": learning.model_dump(mode="json"),
                "text": inputs.text.model_dump(mode="json"),
                "seed": inputs.seed,
                **self._process_key,
            }
        )
        self._state_path = work / "state.json"
        self._trajectory = Trajectory(work / "trajectory.jsonl")

    def learn(self, report: Report, started_s: float) -> LearnedMerge:
        """Prepare, loop from the saved state or the start, and return the merge."""
        learning = self._inputs.learning
        state = LearningState.load(self._state_path, self._digest)
        if state is None or not (state.stopped or state.step >= learning.steps):
            target = learning.target if self._loss.teacher else "none"
            domains, draws = pseudo_domains(self._inputs, target, self._cache, report)
            objective = Objective(self._loss, self._inputs, self._merged, domains)
            pending: list[dict[str, Any]] = []
            self._trajectory.rewind(-1 if state is None else state.step)
            if state is None:
                state = self._start(objective, report)
                pending.append(self._record(None, state.initial_loss, state))
            self._loop(state, pending, objective, domains, draws, report, started_s)
        return LearnedMerge(
            vector=self._merged.vector(state.result),
            coefficients=as_table(state.result, self._merged.groups, self._inputs.domains),
            trajectory_path=self._trajectory.path,
            seconds=state.seconds,
            facts=_facts(state),
        )

    def _start(self, objective: Objective, report: Report) -> LearningState:
        """The state before the first step: the initial coefficients, and their held-back loss."""
        learning = self._inputs.learning
        initial = PROCESS_INITIAL if self._processed else PLAIN_INITIAL
        initial = learning.initial if learning.initial is not None else initial
        shape = (len(self._merged.groups), len(self._inputs.domains))
        tried: dict[str, float] = {}
        if learning.initial_search and objective.holds_back:
            values = grid(shape[1], initial, processed=self._processed)
            initial, tried = search(objective, values, shape, report)
        state = LearningState.start(initial, *shape)
        state.search = tried
        if objective.holds_back:
            loss = tried[f"{initial:g}"] if tried else objective.held_back(state.coefficients_GD)
            state.evaluated(loss, learning.patience)
        return state

    def _loop(
        self,
        state: LearningState,
        pending: list[dict[str, Any]],
        objective: Objective,
        domains: list[PseudoDomain],
        draws: Draws,
        report: Report,
        started_s: float,
    ) -> None:
        """Steps from `state.step + 1` to the last; `pending` holds trajectory records not yet written."""
        learning, before_s = self._inputs.learning, state.seconds
        items: list[Tensor] | None = None
        for step in range(state.step + 1, learning.steps + 1):
            if learning.item_embeddings == "refreshed" and self._is_refresh(step) and state.step > 0:
                state.refreshed_GD = state.coefficients_GD.clone()
                items = None
            items = self._student_items(state, domains, report) if items is None else items
            numbers = range((step - 1) * learning.batch_size, step * learning.batch_size)
            self._merged.set_coefficients(state.coefficients_GD)
            loss = objective.of_step(step, items, [(int(draws.domain_N[n]), n) for n in numbers])
            loss_value = float(loss.detach())
            if not np.isfinite(loss_value):
                raise ModelError(
                    f"merging: the loss is {loss_value} at step {step}",
                    next_step="lower learning.learning_rate or learning.initial",
                )
            state.adam(self._merged.gradient(loss), learning.learning_rate)
            last, held_back = step == learning.steps, None
            if objective.holds_back and (last or step % learning.evaluate_every_steps == 0):
                held_back = objective.held_back(state.coefficients_GD)
                state.evaluated(held_back, learning.patience)
            pending.append(self._record(loss_value, held_back, state))
            report(phase="learn", step=step, total=learning.steps, loss=loss_value)
            if step % SAVE_EVERY_STEPS == 0 or last or state.stopped:
                state.seconds = before_s + time.monotonic() - started_s
                self._trajectory.append(pending)
                pending.clear()
                state.save(self._state_path, self._digest)
            if state.stopped:
                break

    def _is_refresh(self, step: int) -> bool:
        return (step - 1) % self._inputs.learning.refresh_every_steps == 0

    def _student_items(
        self, state: LearningState, domains: list[PseudoDomain], report: Report
    ) -> list[Tensor]:
        """The merged model's item embeddings of every domain, at the coefficients of the last refresh."""
        self._merged.set_coefficients(state.refreshed_GD)
        initial = bool((state.refreshed_GD == state.initial).all())
        store, items = EmbeddingCache(self._cache), []
        for index, domain in enumerate(domains):
            report(phase="items", step=index, total=len(domains))

            def compute(texts: DomainTexts = domain.texts) -> dict[str, Tensor]:
                return {"items": encode(self._inputs.encoder, texts.items, self._merged.params)}

            if initial:  # the same for every learned method of the run
                key: dict[str, Any] = {"what": "initial", "initial": state.initial, **self._process_key}
                key |= {"domain": domain.texts.name, "all": self._keys}
                items.append(store.get(key, compute, self._inputs.device)["items"])
            else:
                items.append(compute()["items"])
        return items

    def _record(self, loss: float | None, held_back: float | None, state: LearningState) -> dict[str, Any]:
        table = as_table(state.coefficients_GD, self._merged.groups, self._inputs.domains)
        evaluated = {} if held_back is None else {"held_back": held_back}
        return {"step": state.step, "loss": loss, **evaluated, "coefficients": table}


def _facts(state: LearningState) -> dict[str, Any]:
    """What the journal says beside the coefficients."""
    facts: dict[str, Any] = {"steps": state.step, "initial": state.initial, "fallback": False}
    if state.search:
        facts["search"] = state.search
    if state.best_loss is not None:
        facts |= {
            "best_step": state.best_step,
            "fallback": state.best_step == 0,
            "held_back_loss": {"initial": state.initial_loss, "best": state.best_loss},
        }
    return facts
