"""What the methods that ask a language model share: the base, the run's template, and prompts that fit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from common.catalog import Catalog
from common.config import InstructionSection
from common.language.evaluation import fit
from common.language.model import CausalLM, load_causal
from common.language.prompts import Template
from common.language.records import Ranking, cut_title
from common.models.device import default_device
from server.language.registry import AdapterInputs
from server.learning.prepare import check_catalogs


@dataclass(frozen=True)
class Ranker:
    """The run's base model, bare, with its instruction; `catalogs` are those of the domains to ask about,
    with titles as prompts show them."""

    lm: CausalLM
    template: Template
    instruction: InstructionSection
    catalogs: dict[str, Catalog]

    @classmethod
    def load(cls, inputs: AdapterInputs, domains: Iterable[str]) -> Ranker:
        """On CUDA where there is one. Raises DataError for a domain without catalog."""
        names = list(domains)
        check_catalogs(dict.fromkeys(names), inputs.catalogs)
        instruction = inputs.config.instruction or InstructionSection()
        lm = load_causal(inputs.base, precision=inputs.config.learning.precision, device=default_device())
        catalogs = {name: _cut(inputs.catalogs[name], instruction.title_words) for name in names}
        return cls(lm, Template.load(instruction.template), instruction, catalogs)

    def fit(self, rankings: Sequence[Ranking], answer_tokens: int = 0) -> list[Ranking]:
        """As `common.language.evaluation.fit`, within the run's `max_prompt_tokens`."""
        return fit(self.lm, self.template, rankings, self.instruction.max_prompt_tokens, answer_tokens)


def _cut(catalog: Catalog, words: int) -> Catalog:
    titles = {name: column for name, column in catalog.attributes.items() if name == "title"}
    cut = {name: [cut_title(title, words) for title in column] for name, column in titles.items()}
    return replace(catalog, attributes={**catalog.attributes, **cut})
