"""How the weights of a cocktail are learned, as a configuration says it; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config import Frozen

Rule = Literal["factors", "product"]
RATES = (0.03, 0.1, 0.3)


class WeightOptions(Frozen):
    """How weights of adapters are learned, whatever is minimised."""

    rule: Rule = Field("factors", description="`factors` mixes A and B (the paper), `product` what they do")
    granularity: Literal["domain", "layer"] = Field("domain", description="a weight an adapter, or a layer")
    constraint: Literal["simplex", "free"] = Field(
        "simplex", description="`free`: any numbers, from 1/N each, instead of a softmax"
    )
    prompts: int = Field(50, ge=2, description="unlabelled prompts, the held-back ones included")
    holdout: float = Field(0.2, gt=0, le=0.5, description="share of the prompts that is not learned from")
    steps: int = Field(40, ge=0)
    batch_size: int = Field(8, ge=1, description="prompts a step")
    learning_rate: float = Field(
        0.0, ge=0, description="0: of 0.03, 0.1 and 0.3 that of the lowest held-back entropy"
    )
    evaluate_every_steps: int = Field(5, ge=1)
    patience: int = Field(3, ge=1, description="evaluations without a lower held-back entropy")
    seed: int = Field(0, ge=0)


class CocktailOptions(WeightOptions):
    """How the weights of a cocktail are learned: by entropy."""

    tokens: int = Field(3, ge=1, le=64, description="first tokens of the answer whose entropy counts")
