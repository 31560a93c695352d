"""Evo-Merging beside other methods, on the same adapters and the same labelled samples: a table.

The rows, all adapters of one shape unless said otherwise:

- `base` (no adapter) and `best-adapter` (the one of the lowest loss on the samples);
- `weight-averaging`, `task-arithmetic`, `ties`, `dare`, `della`, `breadcrumbs`, `emr` with their defaults, on
  the entries of A and B as tools for adapters do it; `knots-ties` merges what the adapters do instead. They
  see no sample. `emr` with a `domain` is that domain's model of the paper, without one the unified vector;
- `lorahub`: A and B summed with the same weights, gradient-free, 40 evaluations, L1 as its authors' code has
  it (0.05 times the mean). The search is our CMA-ES, theirs is nevergrad's;
- `scales-only`: the second stage of Evo-Merging alone, with as many evaluations as both stages have;
- `evo-merging`; `lora` and `ia3` tuned by gradients (`tuning`); `ia3` has no adapter.

`loss` is that on the samples, which the searches minimise: it says how well a method fits them, not how good
it is. For that give `measure`, which sees the model with each result in it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.config import LoraSection
from common.digests import json_digest
from common.errors import ConfigError, suggest
from common.files import write_atomic
from common.language.adapters import Adapter, adapter_tensors, initial_adapter, load_adapter, save_adapter
from common.language.model import CausalLM, load_causal
from common.language.pool import Candidate, Pool
from common.language.samples import Sample
from common.models.base import model_digest
from common.progress import NO_REPORT, Report, prefixed
from server.evolution.evolve import RECORD_FILE, evolve, scale_search
from server.evolution.fitness import ScoringFitness
from server.evolution.options import EvolutionOptions
from server.evolution.search import Record, Stage
from server.evolution.tuning import Tuning, tune_lora, tuned_ia3
from server.evolution.workers import ScoringWorkers
from server.language.registry import METHODS as RULES
from server.language.registry import AdapterInputs
from server.tensors import merge_tensors

Measure = Callable[[CausalLM], Mapping[str, float]]
ENTRYWISE = ("weight-averaging", "task-arithmetic", "ties", "dare", "della", "breadcrumbs", "emr")
SEARCHES = ("lorahub", "scales-only", "evo-merging")
METHODS = ("base", "best-adapter", *ENTRYWISE, "knots-ties", *SEARCHES, "lora", "ia3")
LORAHUB = {"iterations": 3, "population": 13, "sigma": 0.5}  # and the start: 40 evaluations


@dataclass(frozen=True)
class Row:
    """One method: loss on the samples, evaluations of candidates, seconds, and what `measure` said."""

    method: str
    loss: float
    evaluations: int
    seconds: float
    measures: dict[str, float]
    facts: dict[str, Any] = field(default_factory=dict)


def compare(
    base: Path,
    lora: LoraSection,
    adapters: Mapping[str, Adapter],
    samples: Sequence[Sample],
    work: Path,
    *,
    methods: Sequence[str] = METHODS,
    options: EvolutionOptions | None = None,
    measure: Measure | None = None,
    measure_key: str = "",
    domain: str | None = None,
    tuning: Tuning | None = None,
    seed: int = 0,
    batch_size: int = 8,
    device: str = "cpu",
    workers: int = 1,
    report: Report = NO_REPORT,
) -> list[Row]:
    """A row for each of `methods`, in their order; `work/METHOD/` keeps the row and its adapter (for PEFT).

    `workers` above 1 scores candidates in so many processes (CPU). Interrupted and called again it goes on.
    `measure_key` names what `measure` measures: change it with it.
    Raises ConfigError (unknown method, no adapters), DataError (no samples), VectorError, ModelError.
    """
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}", next_step=suggest(method, METHODS))
    pool = Pool(adapters)
    if domain is not None and domain not in pool.labels:
        raise ConfigError(f"no adapter of {domain!r}", next_step=suggest(domain, pool.labels))
    options, tuning = options or EvolutionOptions(), tuning or Tuning(seed=seed, batch_size=batch_size)
    digest = model_digest(base)
    lm = load_causal(base, precision="fp32", device=device)
    processes = ScoringWorkers(base, lora, samples, workers, batch_size) if workers > 1 else None
    fitness = ScoringFitness(lm, lora, pool, digest, samples, batch_size, processes)
    key = {
        "adapters": pool.digests,
        "fitness": fitness.key,
        "options": options.model_dump(mode="json"),
        "measure": measure_key,
        "domain": domain,
        "tuning": asdict(tuning),
        "seed": seed,
    }
    makers = _Makers(base, lora, pool, samples, fitness, options, domain, tuning, seed, work)
    rows = []
    with processes or contextlib.nullcontext():
        for number, method in enumerate(methods):
            report(phase="compare", step=number, total=len(methods))
            inputs = json_digest({**key, "method": method, "measured": measure is not None})
            rows.append(_kept_row(method, makers, measure, inputs, prefixed(report, method)))
    report(phase="compare", step=len(methods), total=len(methods))
    return rows


@dataclass(frozen=True)
class _Makers:
    """How each method's adapter is made, from what they share."""

    base: Path
    lora: LoraSection
    pool: Pool
    samples: Sequence[Sample]
    fitness: ScoringFitness
    options: EvolutionOptions
    domain: str | None
    tuning: Tuning
    seed: int
    work: Path

    def make(self, method: str, report: Report) -> tuple[Adapter, dict[str, Any]]:
        """The adapter of a method, and its facts; those of a search say how many `evaluations` it made."""
        n = len(self.pool)
        if method == "base":
            return self.pool.mix([Candidate.of([0.0] * n, [0.0] * n)])[0], {}
        if method == "best-adapter":
            return self._best()
        if method == "knots-ties":
            return self._knots(report)
        if method == "lorahub":
            return self._scales(method, report, LORAHUB, (0.0,) * n, 0.05 / n)
        if method == "scales-only":
            settings = {
                "iterations": (self.options.evaluations(n) - 1) // self.options.population,
                "population": self.options.population,
                "sigma": self.options.sigma,
            }
            divisor = n if self.options.penalty == "mean" else 1
            return self._scales(method, report, settings, (1 / n,) * n, self.options.scale_penalty / divisor)
        if method == "evo-merging":
            found = evolve(
                self.pool, self.fitness, self.options, self.work / method, seed=self.seed, report=report
            )
            return found.adapter, found.facts(self.pool.labels)
        if method == "lora":
            start = initial_adapter(adapter_tensors(self.base, self.lora), self.seed)
            return tune_lora(self.fitness.lm, self.lora, start, self.samples, self.tuning, report)
        return self._entrywise(method)

    def _entrywise(self, method: str) -> tuple[Adapter, dict[str, Any]]:
        vectors = {label: self.pool.adapter(label) for label in self.pool.labels}
        if method == "emr" and self.domain is not None:
            return merge_tensors(method, vectors, {"domain": self.domain}), {"domain": self.domain}
        return merge_tensors(method, vectors), {}

    def _best(self) -> tuple[Adapter, dict[str, Any]]:
        losses = {label: self.fitness.of(self.pool.adapter(label)) for label in self.pool.labels}
        best = min(losses, key=lambda label: (losses[label] != losses[label], losses[label], label))
        return self.pool.adapter(best), {"adapter": best, "losses": losses, "evaluations": len(losses)}

    def _knots(self, report: Report) -> tuple[Adapter, dict[str, Any]]:
        from common.config import RunConfig

        adapters = {label: self.pool.adapter(label) for label in self.pool.labels}
        rule = RULES["knots"]
        inputs = AdapterInputs(self.base, self.lora, adapters, {}, RunConfig(), self.work, report)
        found = rule(inputs, rule.check({"method": "ties"}))
        return found.adapter, found.facts

    def _scales(
        self,
        method: str,
        report: Report,
        settings: Mapping[str, Any],
        start: tuple[float, ...],
        penalty: float,
    ) -> tuple[Adapter, dict[str, Any]]:
        """A search over scales alone, every entry of A kept."""
        bound = self.options.bound
        stage = Stage("scales", start, -bound, bound, penalty, seed=self.seed, **settings)
        ones = (1.0,) * len(self.pool)
        inputs = {"stage": asdict(stage), "fitness": self.fitness.key, "adapters": self.pool.digests}
        record = Record(self.work / method / RECORD_FILE, inputs)
        found = scale_search(stage, ones, self.fitness, record, report)
        scales = dict(zip(self.pool.labels, found.point, strict=True))
        facts = {"scales": scales, "evaluations": found.evaluations, "not_finite": found.not_finite}
        return self.pool.mix([Candidate.of(ones, found.point)])[0], facts


def _kept_row(method: str, makers: _Makers, measure: Measure | None, inputs: str, report: Report) -> Row:
    """The row that the work folder has of these inputs, or a new one, which it has then."""
    folder = makers.work / method
    row = _read(folder / "row.json", inputs)
    if row is None:
        row = _row(method, makers, measure, folder, report)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"inputs": inputs, **asdict(row)}
        write_atomic(folder / "row.json", json.dumps(record, indent=1).encode("ascii"))
    return row


def _row(method: str, makers: _Makers, measure: Measure | None, folder: Path, report: Report) -> Row:
    """Make, score, measure and keep one method's result."""
    started_s, fitness = time.monotonic(), makers.fitness
    if method == "ia3":
        with tuned_ia3(fitness.lm, makers.samples, makers.tuning, report) as facts:
            seconds = time.monotonic() - started_s
            loss, measures = fitness.loss(), _measured(measure, fitness.lm)
        fitness.lm.attach(makers.lora)
        return Row(method, loss, 0, seconds, measures, facts)
    adapter, facts = makers.make(method, report)
    seconds = time.monotonic() - started_s
    save_adapter(makers.base, makers.lora, adapter, folder / "adapter", _readme(method, makers.pool))
    loss = fitness.of(adapter)
    measures = _measured(measure, fitness.lm)
    return Row(method, loss, int(facts.get("evaluations", 0)), seconds, measures, facts)


def _measured(measure: Measure | None, lm: CausalLM) -> dict[str, float]:
    with torch.no_grad():
        return dict(measure(lm)) if measure else {}


def _readme(method: str, pool: Pool) -> str:
    names = ", ".join(pool.labels[:10]) + (", ..." if len(pool) > 10 else "")
    return f"# {method}\n\nMade by Isthmus from {len(pool)} LoRA adapters: {names}\n"


def _read(path: Path, inputs: str) -> Row | None:
    """The row that is kept there, if it is of these inputs and its adapter is whole."""
    try:
        record = json.loads(path.read_text(encoding="ascii"))
        if record.pop("inputs") != inputs:
            return None
        if record["method"] != "ia3":
            load_adapter(path.parent / "adapter")
        return Row(**record)
    except (OSError, ValueError, KeyError, TypeError):
        return None
