"""The options of Evo-Merging; read without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from common.config import Frozen

MANY = 50  # adapters above which the second stage gets twice the iterations


class EvolutionOptions(Frozen):
    """Options of `evo-merging`; the defaults are the paper's, where it gives any."""

    ratio_iterations: int = Field(20, ge=0, description="generations of stage 1; 0 keeps every entry of A")
    scale_iterations: int | None = Field(None, ge=1, description="None: 20, and 40 above 50 adapters")
    population: int = Field(20, ge=4)
    sigma: float = Field(0.05, gt=0)
    ratio_penalty: float = Field(0.05, ge=0)
    scale_penalty: float = Field(0.05, ge=0)
    penalty: Literal["sum", "mean"] = Field("sum", description="mean: divided by the number of adapters")
    bound: float = Field(1.5, gt=0, le=10)
    initial_ratio: float = Field(0.5, ge=0, le=1)
    initial_scale: float | None = Field(None, description="None: 1/N, where stage 1 ended")

    def iterations(self, adapters: int) -> tuple[int, int]:
        """Generations of the two stages."""
        scales = self.scale_iterations or (40 if adapters > MANY else 20)
        return self.ratio_iterations, scales

    def evaluations(self, adapters: int) -> int:
        """How many candidates will be scored in all: what a budget must allow."""
        ratios, scales = self.iterations(adapters)
        return (1 + ratios * self.population if ratios else 0) + 1 + scales * self.population
