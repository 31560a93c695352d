"""The configuration of language models in simulations: a simulation's, and a `[pretraining]` section."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from common.config import Frozen
from common.language.options import CocktailOptions, Rule
from server.evolution.options import EvolutionOptions
from simulations.config import SimulationConfig, load_as


class PretrainingSection(Frozen):
    """A small causal model and how it learns from catalogs."""

    architecture: Literal["llama", "qwen2"] = "llama"
    vocabulary: int = Field(4096, ge=300, description="entries of the BPE tokenizer, at most")
    hidden_size: int = Field(128, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    key_value_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(256, ge=8)
    positions: int = Field(1024, ge=64)
    template: str = Field("shelf", description="the template of instruction ranking that it learns")
    title_words: int = Field(6, ge=1, description="titles are cut to so many words")
    history: int = Field(5, ge=1, description="titles of a pseudo-user's history, at most")
    candidates: int = Field(30, ge=2, description="candidates of a prompt in the end; it begins with 3")
    noise: float = Field(0.3, ge=0, lt=1, description="share of the history that is any item of the domain")
    informed: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of prompts whose answer fits the history; the others name any of their candidates",
    )
    steps: int = Field(600, ge=1)
    growth: float = Field(
        0.6, ge=0, le=1, description="share of the steps after which there are `candidates`"
    )
    prompt_tokens: int = Field(800, ge=64, description="tokens of prompts in a step, about")
    shelf_tokens: int = Field(1000, ge=64, description="tokens of shelves in a step, about")
    copy_tokens: int = Field(1500, ge=64, description="tokens of copies in a step, about")
    copied: int = Field(8, ge=2, description="titles of a copy, at most")
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    held_back: float = Field(
        0.05, gt=0, lt=1, description="share of every catalog's items that it never sees"
    )
    held_back_prompts: int = Field(48, ge=1)
    evaluate_every_steps: int = Field(50, ge=1)
    patience: int = Field(5, ge=1, description="evaluations without a lower held-back loss before it stops")
    checkpoint_every_steps: int = Field(25, ge=1)

    @model_validator(mode="after")
    def _check_heads(self) -> PretrainingSection:
        if self.hidden_size % self.heads or self.heads % self.key_value_heads:
            raise ValueError("hidden_size must be a multiple of heads, and heads of key_value_heads")
        return self


class TablesSection(Frozen):
    """What the tables of `isthmus language study` compare. Titles are cut as in pretraining."""

    test_users: int = Field(500, ge=1, description="of a domain and protocol, at most")
    train_candidates: int | None = Field(
        None, ge=2, description="candidates of a prompt that an adapter learns; None: instruction.candidates"
    )
    cold_items: float = Field(
        0.0, ge=0, lt=1, description="share of a domain's items that no sequence but the test has"
    )
    spirit: str = Field(
        "factors", description="how the base spirit is merged from the other domains' adapters"
    )
    cocktail: CocktailOptions = Field(
        CocktailOptions(), description="entropy-guided weights; the rule and the seed are the table's"
    )
    rules: tuple[Rule, ...] = Field(("factors", "product"), min_length=1)
    second_round_samples: int = Field(500, ge=2, description="training prompts of the second round")
    parts: int = Field(
        22, ge=2, description="disjoint parts of each domain's users; an adapter comes of each"
    )
    related: int = Field(8, ge=1, description="adapters of all domains but the last")
    distractors: int = Field(5, ge=0, description="adapters of the last domain, added to those")
    pools: tuple[int, ...] = Field((15, 25, 50, 100), description="further sizes, of all domains")
    samples: int = Field(100, ge=2, description="labelled prompts of the first domain that searches see")
    evolution: EvolutionOptions = EvolutionOptions()
    methods: tuple[str, ...] = Field(
        ("base", "best-adapter", "weight-averaging", "task-arithmetic", "ties", "lorahub", "evo-merging"),
        description="rows of the evolution table",
    )


class LanguageConfig(SimulationConfig):
    """A `SimulationConfig` with the sections `[pretraining]` and `[tables]`."""

    pretraining: PretrainingSection = PretrainingSection()
    tables: TablesSection = TablesSection()


def load_language(path: Path) -> LanguageConfig:
    """Read the configuration. Raises ConfigError."""
    return load_as(path, LanguageConfig)
