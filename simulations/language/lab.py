"""Adapters and prompts of a study on a small language model, each made once and kept on disk.

    out/seed-0/data/   prepared domains      out/seed-0/fits/   fine-tuned adapters

One seed draws the users, fine-tunes and merges. Interrupted, what is finished is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from clients.data.domain import Domain
from clients.data.instructions import Protocol, Split, rankings_of
from clients.training.fit import fine_tune
from common.config import InstructionSection, LoraSection, Objective, RunConfig
from common.crossing import crossing_tensors
from common.errors import ConfigError
from common.language.adapters import Adapter
from common.language.evaluation import evaluate_rankings, fit
from common.language.model import CausalLM, load_causal
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.samples import Sample
from common.models.base import model_digest
from common.progress import NO_REPORT, Report
from common.vectors import read_vector
from simulations.language.config import LanguageConfig
from simulations.language.text import cut
from simulations.simulate import prepare_source

TARGET = -1  # the part of a domain's users that no adapter is trained on


class LanguageLab:
    """One seed of a study; `base` is the folder of the model. Raises ConfigError without `[lora]`."""

    def __init__(self, config: LanguageConfig, base: Path, out: Path, report: Report = NO_REPORT) -> None:
        if config.lora is None or config.instruction is None:
            raise ConfigError("a study of adapters needs the sections [lora] and [instruction]")
        self.lora: LoraSection = config.lora
        self.instruction: InstructionSection = config.instruction
        self.template = Template.load(self.instruction.template)
        self.base, self.folder = base, out / f"seed-{config.run.seed}"
        self.config, self._report = config, report
        self._domains: dict[str, Domain] = {}
        self.second_rounds: dict[str, Adapter] = {}

    @cached_property
    def lm(self) -> CausalLM:
        """The base without an adapter, on the CPU in float32."""
        return load_causal(self.base, precision="fp32")

    @cached_property
    def digest(self) -> str:
        """Of the base."""
        return model_digest(self.base)

    @cached_property
    def run(self) -> RunConfig:
        """What an owner's training reads."""
        run = self.config.run_config()
        return run.model_copy(update={"base": run.base.model_copy(update={"model": str(self.base)})})

    @property
    def names(self) -> list[str]:
        """The domains, in the configuration's order."""
        return [source.name for source in self.config.domain]

    def domain(self, name: str) -> Domain:
        """The prepared domain with its titles cut as the model learned them."""
        if name not in self._domains:
            domain = Domain.load(prepare_source(self.config, name, self.folder))
            words = self.config.pretraining.title_words
            titles = [cut(title, words) for title in domain.attributes["title"]]
            domain = replace(domain, attributes={**domain.attributes, "title": titles})
            self._domains[name] = with_cold_items(domain, self.config.tables.cold_items, self.config.run.seed)
        return self._domains[name]

    def part(self, name: str, number: int) -> Domain:
        """A seeded part of the domain's users; `TARGET` is the last one, of which no adapter is made."""
        domain, parts = self.domain(name), self.config.tables.parts
        order = np.random.default_rng([self.config.run.seed, len(domain.user_ids)]).permutation(
            len(domain.user_ids)
        )
        return domain.with_users(np.sort(np.array_split(order, parts)[number]))

    def adapter(self, domain: Domain) -> Adapter:
        """The adapter fine-tuned on the domain, on prompts of `tables.train_candidates`."""
        candidates = self.config.tables.train_candidates or self.instruction.candidates
        section = self.instruction.model_copy(update={"candidates": candidates})
        run = self.run.model_copy(update={"instruction": section})
        fitted = fine_tune(domain, self.base, run, self.folder / "fits", self._report)
        table = crossing_tensors(self.base, run)
        return dict(read_vector(fitted.vector_path, table, run.training.vector_codec))

    def tested(self, name: str, protocol: Protocol) -> list[Ranking]:
        """Test prompts of a whole domain; with `tables.cold_items`, warm ones have no target that is cold."""
        domain = self.domain(name)
        if protocol == "warm" and self.config.tables.cold_items:
            warm_U = np.isin(domain.test, np.concatenate([*domain.train, domain.valid]))
            domain = domain.with_users(np.flatnonzero(warm_U))
        return self.rankings(domain, "test", self.config.tables.test_users, protocol)

    def rankings(
        self,
        domain: Domain,
        split: Split,
        users: int,
        protocol: Protocol = "warm",
    ) -> list[Ranking]:
        """Labelled prompts of at most `users` users."""
        section = self.instruction
        return rankings_of(
            domain, split, self.config.run.seed, section.candidates, protocol,
            history_items=section.history_items, max_users=users,
        )  # fmt: skip

    def samples(
        self, domain: Domain, split: Literal["train", "valid"], users: int, objective: Objective = "answer"
    ) -> list[Sample]:
        """The same as prompt and answer, or as a choice."""
        rankings = self.rankings(domain, split, users)
        fitted = fit(self.lm, self.template, rankings, self.instruction.max_prompt_tokens)
        return [self.template.sample(one, objective) for one in fitted]

    def measure(self, rankings: list[Ranking]) -> Callable[[CausalLM], Mapping[str, float]]:
        """NDCG@1 and NDCG@3 of a model on these prompts."""

        def measured(lm: CausalLM) -> dict[str, float]:
            found = evaluate_rankings(
                lm, self.template, rankings, batch_size=self.config.evaluation.batch_size,
                max_prompt_tokens=self.instruction.max_prompt_tokens, report=self._report,
            )  # fmt: skip
            return {name: found.metrics[name] for name in ("ndcg@1", "ndcg@3")}

        return measured


def with_cold_items(domain: Domain, share: float, seed: int) -> Domain:
    """The domain with a seeded `share` of its items in no training or validation sequence.

    A leave-one-out split of dense data leaves nearly no item cold. Who then has fewer than three items before
    the test item is left out. A cold item that a user had may be a candidate of that user, as any other.
    """
    if not share:
        return domain
    cold_I = np.random.default_rng([seed, len(domain.item_ids)]).random(len(domain.item_ids)) < share
    before = [np.append(train, valid) for train, valid in zip(domain.train, domain.valid, strict=True)]
    left = [items[~cold_I[items]] for items in before]
    rows = [row for row, items in enumerate(left) if len(items) > 2]
    return replace(
        domain,
        user_ids=[domain.user_ids[row] for row in rows],
        train=[left[row][:-1] for row in rows],
        valid=np.array([left[row][-1] for row in rows], dtype=domain.valid.dtype),
        test=domain.test[rows],
    )
