"""`cocktail` and learned coefficients as merge methods of a run: weights from prompts of pseudo-users.

`cocktail` mixes all domains' adapters by entropy-guided weights (`common.language.cocktail`) into one
universal adapter. `cocktail_for` mixes two for one domain, as the paper does: the base spirit, made without
that domain (`server.language.spirit`), and the domain's own adapter. Prompts are made of catalogs alone.

The losses of `server.learning.losses` are methods too, under their own names (`adamerging`, `mergerec`,
`ranking-distillation`): what they call items are here the candidates of a prompt, a score is the mean
log-likelihood a token of a candidate's title, and a domain's teacher is its own adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor

from common.digests import json_digest
from common.errors import ConfigError, suggest
from common.language.ablation import INGREDIENT, SPIRIT
from common.language.adapters import Adapter
from common.language.options import CocktailOptions, WeightOptions
from common.language.records import Ranking
from common.models.base import model_digest
from server.language.pseudo_prompts import Histories, pseudo_rankings
from server.language.registry import METHODS, AdapterInputs, AdapterResult, Options, adapter_method
from server.language.spirit import spirit
from server.learning.losses import LOSSES, Loss, Scores

if TYPE_CHECKING:
    from server.language.ranker import Ranker

ROLL_OUT_TEMPERATURE = 0.5


class PseudoUsers(Options):
    """What the prompts of pseudo-users are made of."""

    histories: Histories = Field("random", description="what pseudo-users' histories are made of")
    history_items: int = Field(5, ge=1, description="a history has one to so many items")


class PseudoOptions(CocktailOptions, PseudoUsers):
    """Options of a cocktail on pseudo-users' prompts."""


class MethodOptions(PseudoOptions):
    """Options of `cocktail`."""

    spirit: str = Field(
        "", description="a merge method: the base spirit that it makes of all adapters is mixed in, too"
    )

    @field_validator("spirit")
    @classmethod
    def _check_spirit(cls, method: str) -> str:
        if method and (method not in METHODS or method == "cocktail"):
            raise ValueError(f"no base spirit by {method!r}; {suggest(method, METHODS)}")
        return method


class LearnedOptions(WeightOptions, PseudoUsers):
    """Options of learned coefficients on adapters."""

    constraint: Literal["simplex", "free"] = "free"


@adapter_method(
    "cocktail",
    options=MethodOptions,
    paper="RecCocktail (entropy-guided weights), on prompts of pseudo-users",
    equation="A = sum_i w_i A_i, B = sum_i w_i B_i, w = softmax(logits)",
)
def cocktail(inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
    """Entropy-guided weights of all adapters, and of a base spirit made of them where `spirit` names one."""
    chosen = MethodOptions(**options)
    if not chosen.spirit:
        return _mix(inputs, inputs.adapters, list(inputs.adapters), chosen, {})
    made = spirit(inputs, chosen.spirit)
    return _mix(inputs, {SPIRIT: made.adapter, **inputs.adapters}, list(inputs.adapters), chosen, made.facts)


def cocktail_for(
    inputs: AdapterInputs, domain: str, options: PseudoOptions | None = None, *, spirit_by: str = "product"
) -> AdapterResult:
    """The paper's cocktail for one domain: its own adapter and the base spirit `spirit(inputs, spirit_by,
    without=domain)`, weighed on pseudo-users of its catalog.

    Raises ConfigError for a domain without adapter or catalog; else as `spirit` and `mix_by_entropy`.
    """
    if domain not in inputs.adapters:
        raise ConfigError(
            f"cocktail: no adapter of domain {domain!r}", next_step=suggest(domain, inputs.adapters)
        )
    made = spirit(inputs, spirit_by, without=domain)
    parts = {SPIRIT: made.adapter, INGREDIENT: inputs.adapters[domain]}
    return _mix(inputs, parts, [domain], options or PseudoOptions(), made.facts)


def _mix(
    inputs: AdapterInputs,
    adapters: Mapping[str, Adapter],
    domains: Sequence[str],
    options: PseudoOptions,
    spirit_facts: Mapping[str, Any],
) -> AdapterResult:
    """`adapters` (label -> adapter) by entropy-guided weights on pseudo-users of `domains`."""
    from common.language.cocktail import mix_by_entropy
    from server.language.ranker import Ranker

    ranker = Ranker.load(inputs, domains)
    mixed = mix_by_entropy(
        ranker.lm,
        model_digest(inputs.base),
        inputs.lora,
        adapters,
        ranker.template,
        [ranking for own in _pseudo(inputs, options, ranker).values() for ranking in own],
        options,
        inputs.work,
        rank=inputs.lora.rank,
        most_tokens=ranker.instruction.max_prompt_tokens,
        report=inputs.report,
    )
    facts = {**mixed.facts, **({"spirit": dict(spirit_facts)} if spirit_facts else {})}
    return AdapterResult(mixed.adapter, facts, mixed.weights)


def _learned(loss: Loss) -> Callable[[AdapterInputs, Mapping[str, Any]], AdapterResult]:
    def merge(inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
        return learn(inputs, LearnedOptions(**options), loss)

    return merge


for _loss in LOSSES.values():
    adapter_method(
        _loss.name,
        options=LearnedOptions,
        paper=_loss.paper,
        equation="A = sum_i w_i A_i, B = sum_i w_i B_i, w learned",
    )(_learned(_loss))


def learn(inputs: AdapterInputs, options: LearnedOptions, loss: Loss) -> AdapterResult:
    """The merging engine's learned coefficients, extended to adapters: `loss` over candidates' scores."""
    from common.language.cocktail import mix_by
    from common.language.scoring import candidate_likelihoods
    from server.language.ranker import Ranker

    ranker = Ranker.load(inputs, inputs.adapters)
    lm, template = ranker.lm, ranker.template
    rankings, domains = [], []
    for domain, own in _pseudo(inputs, options, ranker).items():
        rankings += ranker.fit(own)
        domains += [domain] * len(own)

    def scores(numbers: Sequence[int]) -> Tensor:
        """[N, candidates] of the model as it is, with gradient where it is enabled."""
        rows = []
        for start in range(0, len(numbers), options.batch_size):
            chosen = [rankings[n] for n in numbers[start : start + options.batch_size]]
            rows += candidate_likelihoods(lm, template, chosen)
        return torch.stack(rows)

    t_NI = torch.empty(len(rankings), 0)
    if loss.teacher:
        t_NI = torch.empty(len(rankings), ranker.instruction.candidates)
        for domain in dict.fromkeys(domains):
            inputs.report(phase="teachers", step=domains.index(domain), total=len(domains))
            numbers = [n for n, name in enumerate(domains) if name == domain]
            lm.attach(inputs.lora, inputs.adapters[domain])
            with torch.no_grad():
                t_NI[numbers] = scores(numbers)
            lm.detach()
    learning = inputs.config.learning

    def of(numbers: Sequence[int]) -> Tensor:
        generator = np.random.default_rng([options.seed, *numbers])
        s_BI = scores(numbers)
        return loss.compute(Scores(s_BI, t_NI[list(numbers)], None, generator), learning)

    key = json_digest(
        {
            "objective": loss.name,
            "prompts": [template.ranking_prompt(ranking) for ranking in rankings],
            "learning": learning.model_dump(mode="json"),
            "base": model_digest(inputs.base),
        }
    )
    mixed = mix_by(
        lm,
        inputs.lora,
        inputs.adapters,
        of,
        len(rankings),
        options,
        inputs.work,
        key=key,
        rank=inputs.lora.rank,
        report=inputs.report,
    )
    return AdapterResult(mixed.adapter, mixed.facts, mixed.weights)


def _pseudo(
    inputs: AdapterInputs, options: PseudoOptions | LearnedOptions, ranker: Ranker
) -> dict[str, list[Ranking]]:
    """Pseudo-users' rankings; those that are rolled out are so by the adapter of their own domain."""
    from common.language.scoring import candidate_scores

    lm, generator = ranker.lm, torch.Generator().manual_seed(options.seed)

    def choose(domain: str, rankings: Sequence[Ranking]) -> list[int]:
        lm.attach(inputs.lora, inputs.adapters[domain])
        try:
            scores = candidate_scores(lm, ranker.template, ranker.fit(rankings), options.batch_size)
        finally:
            lm.detach()
        return [
            int(torch.multinomial((own.double() / ROLL_OUT_TEMPERATURE).softmax(0), 1, generator=generator))
            for own in scores
        ]

    return pseudo_rankings(
        ranker.catalogs,
        options.prompts,
        candidates=ranker.instruction.candidates,
        histories=options.histories,
        history_items=options.history_items,
        seed=options.seed,
        choose=choose,
    )
