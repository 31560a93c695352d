"""What may say how good a candidate is: one interface, three sources.

- `ScoringFitness`: the server's own model scores labelled prompts that the operator has.
- `DomainFitness`: the domains score the candidate's numbers on prompts that never leave them; each returns
  one rounded number a candidate (`clients.fitness` is their side).
- `AgreementFitness`, `EntropyFitness`: prompts without labels, made from public catalogs. The first asks how
  far the candidate's ranking of a domain's prompts is from that of the domain's own adapter; the second how
  sure the candidate is of its first tokens, which is no proof that it is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from common.config import LoraSection
from common.digests import json_digest
from common.errors import DataError, VectorError
from common.language.adapters import Adapter
from common.language.model import CausalLM
from common.language.pool import Candidate, Pool
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.samples import Sample
from common.language.scoring import candidate_scores, first_token_entropies
from common.language.validation import Validation
from server.evolution.workers import ScoringWorkers

AskDomains = Callable[[Sequence[Candidate]], Mapping[str, Sequence[float]]]


class Fitness(Protocol):
    """Scores candidates. Losses only: neither parameters nor gradients pass through here."""

    @property
    def key(self) -> Mapping[str, Any]:
        """What the losses follow from, as JSON: an interrupted search goes on only with the same key."""

    def losses(self, candidates: Sequence[Candidate]) -> Sequence[float]:
        """One loss for each candidate, lower is better; not finite where there is none."""


class ModelFitness:
    """Candidates mixed from a pool and put into one model; what to measure there is the subclass's `loss`.

    A whole generation is mixed at once, because its candidates share work.
    """

    def __init__(self, lm: CausalLM, lora: LoraSection, pool: Pool, base: str) -> None:
        """`base` is the digest of the base model. Attaches LoRA layers. Raises ModelError, VectorError."""
        self.lm, self.pool = lm, pool
        self._shared = {"base": base, "lora": lora.model_dump(mode="json")}
        lm.attach(lora)

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """The losses of the mixed adapters."""
        return [self.of(adapter) for adapter in self.pool.mix(candidates)]

    def of(self, adapter: Adapter) -> float:
        """The loss with any adapter of the pool's shape."""
        self.lm.set_adapter(adapter)
        with torch.no_grad():
            return self.loss()

    def loss(self) -> float:
        """The loss of the model as it is."""
        raise NotImplementedError


class ScoringFitness(ModelFitness):
    """Mean loss of labelled prompts: of the answers' tokens, or of the choice (`Validation`)."""

    def __init__(
        self,
        lm: CausalLM,
        lora: LoraSection,
        pool: Pool,
        base: str,
        samples: Sequence[Sample],
        batch_size: int = 8,
        workers: ScoringWorkers | None = None,
    ) -> None:
        """`workers` for these samples score a generation side by side. Raises DataError without samples."""
        super().__init__(lm, lora, pool, base)
        self._workers = workers
        self._validation = Validation(lm, samples, batch_size)
        self.key = {**self._shared, "source": "scoring", "samples": json_digest({"samples": list(samples)})}

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        if self._workers is None:
            return super().losses(candidates)
        return self._workers.losses(self.pool.mix(candidates))

    def loss(self) -> float:
        return float(self._validation.losses().mean())


class EntropyFitness(ModelFitness):
    """Mean entropy of the first answer tokens of prompts without labels."""

    def __init__(
        self,
        lm: CausalLM,
        lora: LoraSection,
        pool: Pool,
        base: str,
        prompts: Sequence[str],
        tokens: int = 3,
        batch_size: int = 8,
    ) -> None:
        """Raises DataError without prompts."""
        super().__init__(lm, lora, pool, base)
        _check_some(prompts)
        self._prompts, self._tokens, self._batch_size = list(prompts), tokens, batch_size
        self.key = {
            **self._shared,
            "source": "entropy",
            "tokens": tokens,
            "prompts": json_digest({"p": prompts}),
        }

    def loss(self) -> float:
        return float(first_token_entropies(self.lm, self._prompts, self._tokens, self._batch_size).mean())


class AgreementFitness(ModelFitness):
    """How far a candidate ranks each domain's prompts from how the domain's own adapter does.

    Mean over all prompts of `T^2 KL(softmax(t / T) || softmax(s / T))`: MergeRec's distillation loss, with
    the candidates' mean log-likelihoods a token as scores s, and the domain's adapter as teacher t.
    """

    def __init__(
        self,
        lm: CausalLM,
        lora: LoraSection,
        pool: Pool,
        base: str,
        template: Template,
        rankings: Mapping[str, Sequence[Ranking]],
        temperature: float = 0.05,
        batch_size: int = 8,
    ) -> None:
        """`rankings` by the label of the adapter that teaches them. Raises DataError, VectorError."""
        super().__init__(lm, lora, pool, base)
        unknown = sorted(set(rankings) - set(pool.labels))
        if unknown:
            raise VectorError(f"prompts of {unknown[0]}, but no adapter", next_step="leave its prompts out")
        self._rankings = [ranking for label in sorted(rankings) for ranking in rankings[label]]
        _check_some(self._rankings)
        self._template, self._temperature, self._batch_size = template, temperature, batch_size
        self._teachers: list[Tensor] = []
        for label in sorted(rankings):
            lm.set_adapter(pool.adapter(label))
            self._teachers += self._scores(rankings[label])
        self.key = {
            **self._shared,
            "source": "agreement",
            "temperature": temperature,
            "template": template.model_dump(mode="json"),
            "rankings": {
                label: json_digest({"rankings": [asdict(ranking) for ranking in rankings[label]]})
                for label in sorted(rankings)
            },
        }

    def loss(self) -> float:
        students = self._scores(self._rankings)
        return math.fsum(map(self._distance, self._teachers, students)) / len(students)

    def _scores(self, rankings: Sequence[Ranking]) -> list[Tensor]:
        return candidate_scores(self.lm, self._template, rankings, self._batch_size) if rankings else []

    def _distance(self, teacher: Tensor, student: Tensor) -> float:
        student, teacher = ((s / self._temperature).log_softmax(0) for s in (student, teacher))
        divergence = torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return float(divergence) * self._temperature**2


class DomainFitness:
    """The mean of what the domains answer; of one domain, what it answers.

    `ask(candidates)` gives each domain's numbers, of the same domains on every call. One that answers nothing
    finite for a candidate makes its loss NaN: leaving it out would compare candidates on different domains.
    """

    def __init__(self, ask: AskDomains, facts: Mapping[str, Any]) -> None:
        """`facts`: what the domains measure, for the key (run, base)."""
        self._ask = ask
        self.key = {"source": "domains", **facts}

    def losses(self, candidates: Sequence[Candidate]) -> list[float]:
        """The domains' mean for each candidate. Raises DataError where none answers, or not all of it."""
        answers = self._ask(candidates)
        if not answers:
            raise DataError("no domain answers about candidates", next_step="ask one at least")
        for domain, own in answers.items():
            if len(own) != len(candidates):
                raise DataError(f"domain {domain} answered {len(own)} of {len(candidates)} candidates")
        return [math.fsum(column) / len(column) for column in zip(*answers.values(), strict=True)]


def _check_some(prompts: Sequence[object]) -> None:
    if not prompts:
        raise DataError("no prompts to score candidates on", next_step="give at least one")
