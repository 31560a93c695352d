"""LoRA fine-tuning of a causal language model on a domain's instructions. What leaves is the adapter alone.

The base is frozen, in bfloat16 where the hardware computes in it; A and B are float32. The loss is on the
answer's tokens only. Checkpoints, resume after a kill, early stopping and the wall-clock budget are those of
`clients.training.trainer`; the journal is that of `clients.training.fit`, which calls this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from clients.data.domain import Domain
from clients.data.instructions import rankings_of
from clients.training.adapters import keep_few_activations
from clients.training.fit import FitResult, plan_of, train_tower, write_result
from clients.training.ranking import evaluate_domain
from clients.training.trainer import EncoderTrainer
from common.config import InstructionSection, LoraSection, RunConfig
from common.crossing import crossing_tensors
from common.errors import ModelError
from common.language.adapters import initial_adapter, load_adapter
from common.language.evaluation import fit
from common.language.model import CausalLM, load_causal
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.scoring import whole_log_likelihoods
from common.models.device import default_device
from common.parcels import Privacy
from common.progress import Report

SEEDS_APART = 1_000_003  # between two epochs, whose candidates are drawn anew
Instructions = dict[str, Any]  # "prompts" and "answers": a list of token ids for each example


def sections(config: RunConfig) -> tuple[LoraSection, InstructionSection]:
    """`[lora]` and `[instruction]` of a run that trains a language model."""
    return config.lora or LoraSection(), config.instruction or InstructionSection()


def load_language(
    base: Path, config: RunConfig, adapter: Path | None = None, *, device: str | None = None
) -> CausalLM:
    """The base with the run's LoRA layers, and the tensors of the folder `adapter` in them (None: no change).

    `device` None takes CUDA where there is one. Raises ModelError, VectorError.
    """
    lora, _ = sections(config)
    lm = load_causal(
        base,
        precision=config.training.precision,
        device=default_device(device),
    )
    lm.attach(lora)
    wear(lm, base, config, adapter)
    return lm


def wear(lm: CausalLM, base: Path, config: RunConfig, adapter: Path | None) -> None:
    """Put the tensors of the folder `adapter` into the attached layers; None: the base's own output.

    Raises VectorError where they do not fit.
    """
    if adapter is not None:
        lm.set_adapter(load_adapter(adapter)[1])
    else:
        lm.set_adapter(initial_adapter(crossing_tensors(base, config), config.run.seed))


class InstructionBatches(Dataset[Instructions]):
    """Batch `step` for every training step: prompts and answers as token ids.

    An epoch is a seeded permutation of the domain's training rankings with candidates drawn for that epoch,
    cut into whole batches; so batch n is the same whether training was interrupted or not.
    """

    def __init__(self, lm: CausalLM, domain: Domain, config: RunConfig) -> None:
        self._lm, self._domain, self._config = lm, domain, config
        self._section = sections(config)[1]
        self._template = Template.load(self._section.template)
        self._epoch, self._rankings = -1, list[Ranking]()
        self._load(0)
        self.batch_size = min(config.training.batch_size, len(self._rankings))

    def __len__(self) -> int:
        return self._config.training.max_steps

    def __getitem__(self, step: int) -> Instructions:
        epoch, position = divmod(step, len(self._rankings) // self.batch_size)
        self._load(epoch)
        order_N = np.random.default_rng([self._config.run.seed, epoch]).permutation(len(self._rankings))
        chosen_B = order_N[position * self.batch_size : (position + 1) * self.batch_size]
        rankings = [self._rankings[int(n)] for n in chosen_B]
        prompts, answers = [], []
        for ranking in fit(self._lm, self._template, rankings, self._section.max_prompt_tokens):
            prompt = self._template.ranking_prompt(ranking)
            prompts.append(self._lm.encode(prompt))
            answers += self._lm.encode_answers(prompt, [self._template.ranking_answer(ranking)])
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))  # less padding in each part
        return {"prompts": [prompts[n] for n in order], "answers": [answers[n] for n in order]}

    def _load(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._rankings = rankings_of(
                self._domain,
                "train",
                self._config.run.seed + SEEDS_APART * epoch,
                self._section.candidates,
                history_items=self._section.history_items,
                title_words=self._section.title_words,
                positions=self._config.training.positions_per_user,
            )
            self._epoch = epoch


class AnswerTower(nn.Module):
    """A language model with attached LoRA layers and its loss, in the shape that the trainer takes."""

    def __init__(self, lm: CausalLM) -> None:
        super().__init__()
        self.backbone: nn.Module = lm.model
        self._lm = lm
        self._trained = lm.lora_parameters()
        trains = {id(parameter) for parameter in self._trained.values()}
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(id(parameter) in trains)

    def forward(
        self, prompts: list[list[int]], answers: list[list[int]], of: int | None = None
    ) -> dict[str, Tensor]:
        """`{"loss": scalar}`: the negative log-likelihood a token of each answer, summed over the examples.

        Divided by `of`, the examples of the whole step (None: these are all).
        """
        return {"loss": -whole_log_likelihoods(self._lm, prompts, answers).sum() / (of or len(prompts))}

    def trained_tensors(self) -> dict[str, Tensor]:
        """A and B by the names under which they cross (not copied)."""
        return {name: parameter.detach() for name, parameter in self._trained.items()}

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Put `trained_tensors` of an earlier moment back in place."""
        self._lm.set_adapter(tensors)


class AnswerTrainer(EncoderTrainer):
    """`EncoderTrainer` that takes a step's examples `prompts_at_once` at a time."""

    prompts_at_once = 8

    def training_step(self, model: nn.Module, inputs: Instructions, num_items_in_batch: Any = None) -> Tensor:
        """Add up the gradients of the step's parts; returns the mean loss of the step."""
        size, total = len(inputs["prompts"]), torch.zeros((), device=self.args.device)
        for start in range(0, size, self.prompts_at_once):
            part: Instructions = {
                key: rows[start : start + self.prompts_at_once] for key, rows in inputs.items()
            }
            part["of"] = size
            total += super().training_step(model, part, num_items_in_batch)
        self.last_loss = float(total)
        return total


def fine_tune_adapter(
    domain: Domain,
    base: Path,
    config: RunConfig,
    folder: Path,
    report: Report,
    *,
    device: str | None = None,
) -> FitResult:
    """Train an adapter of `base` in `folder` and journal it; called by `clients.training.fit.fine_tune`.

    Every owner of a run begins with the same A. Raises ModelError where the model's layers are not those that
    the run names, or the loss is not finite; DataError, VectorError, StorageError.
    """
    lora, section = sections(config)
    table = crossing_tensors(base, config)
    lm = load_language(base, config, device=device)
    shapes = {name: tuple(parameter.shape) for name, parameter in lm.lora_parameters().items()}
    if shapes != table:
        name = min(set(shapes.items()) ^ set(table.items()))[0]
        raise ModelError(
            f"{base}: the loaded model and its file disagree about {name!r}",
            next_step="load it with AutoModelForCausalLM and save it again with save_pretrained",
        )
    if lora.gradient_checkpointing:
        keep_few_activations(lm.model)

    def validate() -> dict[str, float]:
        users = config.training.validation_users
        return evaluate_domain(lm, domain, config, "valid", report, max_users=users, phase="validate").metrics

    training = config.training
    plan = plan_of(config, max_steps=training.max_steps, eval_every_steps=training.eval_every_steps)
    trainer = AnswerTrainer(
        AnswerTower(lm), InstructionBatches(lm, domain, config), validate, plan, folder, report
    )
    trainer.prompts_at_once = section.prompts_at_once
    trained = train_tower(trainer)
    report(phase="write", step=trained.steps, total=training.max_steps)
    return write_result(folder, base, config, trained, Privacy())
