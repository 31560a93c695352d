"""What each part of a cocktail is worth: the rows of RecCocktail's ablation table, made in one place.

| row | the adapter |
|---|---|
| `G` | the base spirit alone |
| `S` | the ingredient alone |
| `WA` | both by equal weights, by the rule of each cocktail (`WA product` for the exact rule) |
| each cocktail | both by entropy-guided weights, under the name that it was given |
| `second round` | the base spirit, fine-tuned on the domain (only with `tune`) |

    prompts = unlabelled(rankings)
    rows = ablation(lm, model_digest(base), lora, G, S, template, prompts, evaluate, work, tune=tune)
    table = {row.name: row.metrics for row in rows}

The `trajectory_path` of a warm and of a cold cocktail make a plot: `server.language.plots.weights_page`.

`evaluate(lm)` measures the model with the row's adapter in it, on labelled records that this module never
sees. `tune(start)` trains an adapter on the domain from `start` on. Call it once for each domain, protocol
(warm, cold) and seed, each with a `work` folder, which keeps the learning of weights through a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import LoraSection
from common.language.adapters import Adapter
from common.language.cocktail import Record, mix_by_entropy
from common.language.mixing import mix, section_of_rank
from common.language.model import CausalLM
from common.language.options import CocktailOptions
from common.language.prompts import Template
from common.progress import NO_REPORT, Report, prefixed

SPIRIT, INGREDIENT = "base spirit", "ingredient"  # no domain can be called so
Evaluate = Callable[[CausalLM], Mapping[str, float]]
Tune = Callable[[Adapter], Adapter]


@dataclass(frozen=True)
class Row:
    """One row: metrics, the `weights` of both (empty for `second round`), and how learning them went."""

    name: str
    metrics: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    trajectory_path: Path | None = None


def ablation(
    lm: CausalLM,
    base: str,
    lora: LoraSection,
    spirit: Adapter,
    ingredient: Adapter,
    template: Template,
    records: Sequence[Record],
    evaluate: Evaluate,
    work: Path,
    *,
    cocktails: Mapping[str, CocktailOptions] | None = None,
    tune: Tune | None = None,
    most_tokens: int = 1024,
    report: Report = NO_REPORT,
) -> list[Row]:
    """The table's rows, in the order of the module's docstring.

    `base` is the base model's digest; `records` are the unlabelled prompts that weights are learned on;
    `cocktails` (name -> options) default to the paper's rule alone, under `cocktail`. Weights of a layer-wise
    cocktail are means over layers; `facts` has them all. Raises as `mix_by_entropy` does.
    """
    cocktails = cocktails or {"cocktail": CocktailOptions()}
    parts = {SPIRIT: spirit, INGREDIENT: ingredient}

    def measured(adapter: Adapter, section: LoraSection) -> dict[str, float]:
        lm.attach(section, adapter)
        try:
            return dict(evaluate(lm))
        finally:
            lm.detach()

    rows = [
        Row("G", measured(spirit, lora), {SPIRIT: 1.0, INGREDIENT: 0.0}),
        Row("S", measured(ingredient, lora), {SPIRIT: 0.0, INGREDIENT: 1.0}),
    ]
    for rule in dict.fromkeys(options.rule for options in cocktails.values()):
        equal = mix(parts, [0.5, 0.5], rule)
        section = lora if rule == "factors" else section_of_rank(lora, 2 * lora.rank)
        name = "WA" if rule == "factors" else f"WA {rule}"
        rows.append(Row(name, measured(equal, section), dict.fromkeys(parts, 0.5)))
    for name, options in cocktails.items():
        made = mix_by_entropy(
            lm, base, lora, parts, template, records, options, work / name.replace(" ", "-"),
            most_tokens=most_tokens, report=prefixed(report, name),
        )  # fmt: skip
        groups = list(made.weights.values())
        weights = {label: sum(group[label] for group in groups) / len(groups) for label in parts}
        facts = {**made.facts, "weights": made.weights}
        rows.append(Row(name, measured(made.adapter, made.lora), weights, facts, made.trajectory_path))
    if tune is not None:
        rows.append(Row("second round", measured(tune(dict(spirit)), lora)))
    return rows
