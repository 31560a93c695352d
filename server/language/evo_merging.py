"""`evo-merging` as a merge method of a run: what the server itself can score candidates on.

By default the candidates must rank pseudo-users' prompts, made of the domains' catalogs, as each domain's
own adapter does ("agreement"); "entropy" asks only how sure they are. Neither sees a label. With `samples`, a
file of labelled prompts that the operator has, candidates are scored on these ("scoring"). With "domains" the
owners of the run score them on their own validation users, and only their losses come back; what is mixed
are then the adapters that their owners let be passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from common.errors import ConfigError
from common.files import sha256_file
from common.language.samples import read_samples
from common.models.base import model_digest
from server.evolution.options import EvolutionOptions
from server.language.pseudo_prompts import pseudo_rankings
from server.language.registry import DOMAINS, AdapterInputs, AdapterResult, Options, adapter_method

if TYPE_CHECKING:
    from common.language.pool import Pool
    from server.evolution.fitness import Fitness

MIN_SHARED = 2


class MethodOptions(EvolutionOptions, Options):
    """Options of `evo-merging` in a run."""

    fitness: Literal["agreement", "entropy", "scoring", "domains"] = "agreement"
    samples: str = Field("", description="scoring: labelled prompts as JSON lines, a file of the server's")
    samples_sha256: str = Field("", description="of that file; a run fixes it when it is created")
    prompts: int = Field(50, ge=1, description="pseudo-users' prompts, over all domains")
    history_items: int = Field(5, ge=1, description="a pseudo-user's history has one to so many items")
    tokens: int = Field(3, ge=1, le=64, description="entropy: so many first tokens of the answer")
    temperature: float = Field(0.05, gt=0, description="agreement: of both rankings")
    batch_size: int = Field(8, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fix_samples(cls, data: Any) -> Any:
        """The file by absolute path and digest: a run's samples are those that it was created with."""
        if not isinstance(data, dict) or not (named := data.get("samples")) or not isinstance(named, str):
            return data
        path = Path(named).resolve()
        read_samples(path)  # so that a bad file is named before anybody trains
        digest = sha256_file(path)
        if data.get("samples_sha256", "") not in ("", digest):
            raise ValueError(f"{path}: changed since the run was created; start another run with it")
        return {**data, "samples": str(path), "samples_sha256": digest}

    @model_validator(mode="after")
    def _check_samples(self) -> MethodOptions:
        if (self.fitness == "scoring") != bool(self.samples):
            raise ValueError("fitness = 'scoring' and a file of `samples` go together")
        return self


@adapter_method(
    "evo-merging",
    options=MethodOptions,
    paper="Chen et al., 2025: Evo-Merging",
    equation="A = sum_i b_i S_{a_i}(A_i), B = sum_i b_i B_i; a in [0, 1]^N, then b, by CMA-ES",
)
def evo_merging(inputs: AdapterInputs, options: Mapping[str, Any]) -> AdapterResult:
    """CMA-ES over sparsity ratios, then over signed scales; see `server.evolution`.

    Raises ConfigError where domains are to be asked and there are none, or too few share their adapters.
    """
    from common.language.pool import Pool
    from server.evolution.evolve import evolve

    chosen, names = MethodOptions(**options), {label: label for label in inputs.adapters}
    if chosen.fitness == DOMAINS:
        names = _shared(inputs)
    pool = Pool({name: inputs.adapters[domain] for name, domain in names.items()})
    search = EvolutionOptions(**chosen.model_dump(include=set(EvolutionOptions.model_fields)))
    seed = inputs.config.run.seed
    fitness = _fitness(inputs, chosen, pool, seed)
    found = evolve(pool, fitness, search, inputs.work, seed=seed, report=inputs.report)
    facts = found.facts(pool.labels)
    nothing = dict.fromkeys(inputs.adapters, 0.0)  # of adapters that are not shared
    coefficients = {
        kind: nothing | {names[name]: value for name, value in facts.pop(kind).items()}
        for kind in ("ratios", "scales")
    }
    return AdapterResult(found.adapter, {**facts, "fitness": chosen.fitness}, coefficients)


def _shared(inputs: AdapterInputs) -> dict[str, str]:
    """Pseudonym to domain of every adapter that may be mixed where domains answer."""
    if inputs.domains is None:
        raise ConfigError(
            "evo-merging: nobody is there to answer about candidates",
            next_step="fitness = 'domains' works in a run; elsewhere use another fitness",
        )
    if len(inputs.domains.shared) < MIN_SHARED:
        raise ConfigError(
            f"evo-merging: {len(inputs.domains.shared)} of {len(inputs.adapters)} owners let their adapters "
            f"be passed on, {MIN_SHARED} are needed",
            next_step="ask the owners for share_adapter = true in policy.toml, or use another fitness",
        )
    return {pseudonym: domain for domain, pseudonym in inputs.domains.shared.items()}


def _fitness(inputs: AdapterInputs, options: MethodOptions, pool: Pool, seed: int) -> Fitness:
    from server.evolution.fitness import AgreementFitness, DomainFitness, EntropyFitness, ScoringFitness
    from server.language.ranker import Ranker

    if options.fitness == DOMAINS and inputs.domains is not None:
        return DomainFitness(inputs.domains.ask, {"base": model_digest(inputs.base), "pool": pool.digests})
    ranker = Ranker.load(inputs, () if options.fitness == "scoring" else pool.labels)
    shared = (ranker.lm, inputs.lora, pool, model_digest(inputs.base))
    if options.fitness == "scoring":
        return ScoringFitness(*shared, read_samples(Path(options.samples)), options.batch_size)
    drawn = pseudo_rankings(
        ranker.catalogs,
        options.prompts,
        candidates=ranker.instruction.candidates,
        history_items=options.history_items,
        seed=seed,
    )
    tokens = options.tokens if options.fitness == "entropy" else 0
    rankings = {label: ranker.fit(own, tokens) for label, own in drawn.items()}
    template = ranker.template
    if options.fitness == "agreement":
        return AgreementFitness(*shared, template, rankings, options.temperature, options.batch_size)
    prompts = [template.ranking_prompt(ranking) for own in rankings.values() for ranking in own]
    return EntropyFitness(*shared, prompts, options.tokens, options.batch_size)
