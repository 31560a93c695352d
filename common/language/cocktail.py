"""The LoRA cocktail: weights of adapters, learned on prompts without labels by their entropy alone.

RecCocktail (sec. 3.3): mix a domain-general adapter (base spirit) and a domain's own (ingredient), or any
number, by weights that are a softmax of logits; minimise the mean entropy of the first answer tokens over 50
to 100 unlabelled prompts (eq. 8), the answer going on greedily. Only the logits are trained, by Adam.

Rules:

- no label goes in: a record with a target is refused, whatever is done with it (`unlabelled` takes it off);
- no label chooses: a share of the prompts is held back, and learning rate, stopping and result are those of
  the lowest entropy there; equal weights, the beginning, win where nothing was lower;
- one backward a step, through the model with the mix in it; the gradient of the weights are inner products
  (`common.language.mixing`). No copy of the model is made for any number of adapters;
- killed at any point and called again with the same `work`, it goes on to the same result.

Low entropy is confidence, not accuracy: an adapter that is sure of itself everywhere wins. The facts hold the
held-back entropy of each adapter alone, so that it shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.coefficients import as_table
from common.config import LoraSection
from common.digests import json_digest, vector_digest
from common.errors import DataError, ModelError
from common.files import write_atomic
from common.language.adapters import Adapter
from common.language.mixing import Mixture, cut, section_of_rank
from common.language.model import CausalLM
from common.language.options import RATES, CocktailOptions, WeightOptions
from common.language.prompts import Template
from common.language.records import Ranking, YesNo
from common.language.scoring import first_token_entropies
from common.learning_state import LearningState, Trajectory
from common.progress import NO_REPORT, Report

STATE_VERSION = 1
SAVE_EVERY_STEPS = 5
Record = Ranking | YesNo
Loss = Callable[[Sequence[int]], Tensor]  # numbers of prompts -> loss of each [N], with gradient


@dataclass(frozen=True)
class Cocktail:
    """A mixed adapter, its section (rank and alpha may differ from the parts'), its weights, and its history.

    `weights` is `{group: {label: weight}}`; `trajectory_path` has one JSON line a step of the rate that won.
    """

    adapter: Adapter
    lora: LoraSection
    weights: dict[str, dict[str, float]]
    facts: dict[str, Any]
    trajectory_path: Path


def unlabelled(records: Sequence[Record]) -> list[Record]:
    """The same records without their labels."""
    return [
        replace(record, target=None) if isinstance(record, Ranking) else replace(record, answer=None)
        for record in records
    ]


def prompts_of(lm: CausalLM, template: Template, records: Sequence[Record], most_tokens: int) -> list[str]:
    """The records as prompts of at most `most_tokens`; older history is left out where it is too much.

    Raises DataError for a record with a label, for none at all, and for candidates that do not fit.
    """
    if not records:
        raise DataError("no prompts to learn the weights from", next_step="give 50 to 100 unlabelled ones")
    prompts = []
    for number, record in enumerate(records):
        label = record.target if isinstance(record, Ranking) else record.answer
        if label is not None:
            raise DataError(
                f"record {number} has a label; a cocktail is mixed without any",
                next_step="take them off: common.language.cocktail.unlabelled(records)",
            )
        if isinstance(record, Ranking):
            prompts.append(template.ranking_prompt(template.fit(record, lm.encode, most_tokens)))
        else:
            prompts.append(template.yes_no_prompt(record))
    return prompts


def mix_by_entropy(
    lm: CausalLM,
    base: str,
    lora: LoraSection,
    adapters: Mapping[str, Adapter],
    template: Template,
    records: Sequence[Record],
    options: CocktailOptions,
    work: Path,
    *,
    rank: int | None = None,
    most_tokens: int = 1024,
    report: Report = NO_REPORT,
) -> Cocktail:
    """Mix `adapters` (label -> adapter, all trained with `lora` on the base of digest `base`) for `records`.

    At most `options.prompts` of the records count, drawn by the seed, each cut to `most_tokens`. With `rank`
    the result is cut to it (`product` adds the ranks up while the weights are learned). The model is left
    without adapter. Raises DataError (a label, no prompts), VectorError (adapters that do not go together),
    ConfigError, ModelError where an entropy is not finite.
    """
    generator = np.random.default_rng([options.seed, 0])
    chosen = sorted(generator.permutation(len(records))[: options.prompts].tolist())
    most = min(most_tokens, lm.max_tokens - options.tokens)
    prompts = prompts_of(lm, template, [records[n] for n in chosen], most)

    def loss(numbers: Sequence[int]) -> Tensor:
        return first_token_entropies(lm, [prompts[n] for n in numbers], options.tokens, options.batch_size)

    key = json_digest({"objective": "entropy", "prompts": prompts, "base": base})
    return mix_by(lm, lora, adapters, loss, len(prompts), options, work, key=key, rank=rank, report=report)


def mix_by(
    lm: CausalLM,
    lora: LoraSection,
    adapters: Mapping[str, Adapter],
    loss: Loss,
    prompts: int,
    options: WeightOptions,
    work: Path,
    *,
    key: str,
    rank: int | None = None,
    report: Report = NO_REPORT,
) -> Cocktail:
    """Mix `adapters` by the weights of the lowest `loss` over prompts 0 .. `prompts` - 1.

    `loss(numbers)` gives the loss of each, computed with the model as it then is; `key` is a digest of all
    that it reads beside the adapters. Otherwise as `mix_by_entropy`.
    """
    if prompts < 2:
        raise DataError(
            f"{prompts} prompt to learn the weights from, and some are held back",
            next_step="give 50 to 100 unlabelled ones",
        )
    mixture = Mixture(adapters, options.rule, options.granularity, lm.device)
    section = section_of_rank(lora, mixture.rank)
    digests = {label: vector_digest(adapter) for label, adapter in adapters.items()}
    settings = options.model_dump(exclude={"learning_rate"})
    key = json_digest({"version": STATE_VERSION, "key": key, "adapters": digests, "options": settings,
                       "lora": lora.model_dump(mode="json")})  # fmt: skip
    lm.attach(section)
    try:
        run = _Run(lm, mixture, loss, prompts, options, work, key, report)
        rates = (options.learning_rate,) if options.learning_rate else RATES
        states = {rate: run.learn(rate) for rate in rates}
        rate = min(states, key=lambda tried: (states[tried].best_loss or 0.0, tried))
        weights_GD = run.weights(states[rate].result)
        alone = run.alone()
    finally:
        lm.detach()
    adapter = {name: tensor.cpu() for name, tensor in mixture.at(weights_GD).items()}
    facts = {"rule": options.rule, **_facts(states, rate, alone, run)}
    if rank is not None and rank != mixture.rank:
        adapter, residuals = cut(adapter, rank)
        section = section_of_rank(lora, rank)
        facts["largest_residual"] = max(residuals.values())
    table = as_table(weights_GD, mixture.groups, mixture.labels)
    trajectory_path = work / "trajectory.jsonl"
    write_atomic(trajectory_path, run.trajectory(rate).path.read_bytes())
    return Cocktail(adapter, section, table, facts, trajectory_path)


class _Run:
    """Everything that the learning rates share: prompts in their order, the mixture, and the loss."""

    def __init__(
        self,
        lm: CausalLM,
        mixture: Mixture,
        loss: Loss,
        prompts: int,
        options: WeightOptions,
        work: Path,
        key: str,
        report: Report,
    ) -> None:
        self._lm, self._mixture, self._loss, self._options = lm, mixture, loss, options
        self._work, self._key, self._report = work, key, report
        generator = np.random.default_rng([options.seed, 1])
        order = generator.permutation(prompts)
        held = min(max(1, round(options.holdout * prompts)), prompts - 1)
        self.held, self.learned = sorted(order[:held].tolist()), order[held:]
        count = options.steps * options.batch_size
        epochs = -(-count // len(self.learned))
        rounds = [generator.permutation(self.learned) for _ in range(epochs)]
        self._drawn: list[int] = np.concatenate([*rounds, order[:0]])[:count].tolist()
        self._initial: float | None = None

    def weights(self, values_GD: Tensor) -> Tensor:
        """The weights [groups, D] that the learned values stand for."""
        return values_GD.softmax(1) if self._options.constraint == "simplex" else values_GD

    def trajectory(self, rate: float) -> Trajectory:
        """The log of one learning rate."""
        return Trajectory(self._work / f"rate-{rate:g}" / "trajectory.jsonl")

    def learn(self, rate: float) -> LearningState:
        """The state after the last step at this learning rate, from where an earlier call left it."""
        options, labels = self._options, self._mixture.labels
        path, trajectory = self._work / f"rate-{rate:g}" / "state.json", self.trajectory(rate)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = LearningState.load(path, self._key)
        trajectory.rewind(-1 if state is None else state.step)
        pending: list[dict[str, Any]] = []
        started_s = time.monotonic()
        if state is None:
            initial = 0.0 if options.constraint == "simplex" else 1.0 / len(labels)
            state = LearningState.start(initial, len(self._mixture.groups), len(labels))
            if self._initial is None:
                self._initial = self._held_back(self.weights(state.coefficients_GD))
            state.evaluated(self._initial, options.patience)
            pending.append(self._record(None, self._initial, state))
        before_s = state.seconds
        for step in range(state.step + 1, options.steps + 1):
            if state.stopped:
                break
            loss, held_back = self._step(state, rate), None
            last = step == options.steps
            if last or step % options.evaluate_every_steps == 0:
                held_back = self._held_back(self.weights(state.coefficients_GD))
                state.evaluated(held_back, options.patience)
            pending.append(self._record(loss, held_back, state))
            self._report(phase=f"mix {rate:g}", step=step, total=options.steps, loss=loss)
            if last or state.stopped or step % SAVE_EVERY_STEPS == 0:
                state.seconds = before_s + time.monotonic() - started_s
                trajectory.append(pending)
                pending.clear()
                state.save(path, self._key)
        if pending:
            trajectory.append(pending)
            state.save(path, self._key)
        return state

    def alone(self) -> dict[str, float]:
        """The held-back loss of each adapter alone."""
        shape, found = (len(self._mixture.groups), len(self._mixture.labels)), {}
        for index, label in enumerate(self._mixture.labels):
            weights_GD = torch.zeros(shape)
            weights_GD[:, index] = 1.0
            found[label] = self._held_back(weights_GD)
        return found

    def _step(self, state: LearningState, rate: float) -> float:
        """One step of Adam; the loss before it."""
        first = state.step * self._options.batch_size
        numbers = self._drawn[first : first + self._options.batch_size]
        values_GD = state.coefficients_GD.detach().clone().requires_grad_()
        weights_GD = self.weights(values_GD)
        self._lm.set_adapter(self._mixture.at(weights_GD))
        parameters = self._lm.lora_parameters()
        loss = self._loss(numbers).mean()
        value = _finite(float(loss.detach()), f"at step {state.step + 1}")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        of_weights_GD = self._mixture.gradient(dict(zip(parameters, grads, strict=True)))
        (gradient_GD,) = torch.autograd.grad(weights_GD, values_GD, of_weights_GD.to(weights_GD.dtype))
        _finite(float(gradient_GD.abs().sum()), f"in the gradient of step {state.step + 1}")
        state.adam(gradient_GD, rate)
        return value

    @torch.no_grad()
    def _held_back(self, weights_GD: Tensor) -> float:
        self._lm.set_adapter(self._mixture.at(weights_GD))
        return _finite(float(self._loss(self.held).double().mean()), "of the held-back prompts")

    def _record(self, loss: float | None, held_back: float | None, state: LearningState) -> dict[str, Any]:
        weights_GD = self.weights(state.coefficients_GD)
        table = as_table(weights_GD, self._mixture.groups, self._mixture.labels)
        evaluated = {} if held_back is None else {"held_back": held_back}
        return {"step": state.step, "loss": loss, **evaluated, "coefficients": table}


def _facts(
    states: Mapping[float, LearningState], rate: float, alone: Mapping[str, float], run: _Run
) -> dict[str, Any]:
    """What a journal says beside the weights."""
    chosen = states[rate]
    return {
        "learning_rate": rate,
        "tried": {f"{tried:g}": state.best_loss for tried, state in states.items()},
        "steps": chosen.step,
        "best_step": chosen.best_step,
        "fallback": chosen.best_step == 0,
        "prompts": {"learned_from": len(run.learned), "held_back": len(run.held)},
        "held_back_loss": {"equal": chosen.initial_loss, "learned": chosen.best_loss, "alone": dict(alone)},
        "seconds": round(sum(state.seconds for state in states.values()), 3),
    }


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ModelError(
            f"cocktail: the loss is {value} {where}",
            next_step="check the adapters' training, or lower learning_rate",
        )
    return value
