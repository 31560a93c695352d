"""One step of learning a cocktail's weights, against the bare passes of the model, for N = 2 to 100 adapters.

    OMP_NUM_THREADS=1 python -m benchmarks.cocktail_step ../shared/data/lm/stories260K
    OMP_NUM_THREADS=1 python -m benchmarks.cocktail_step MODEL --out runs/cocktail_step.json

Baseline: forward and backward pass of the model with one adapter. A step mixes N adapters of rank 8 on all
linear layers, copies the mixture into the layers, runs both passes and takes the weights' gradient; the rule
`product` needs rank 8 N in the layers. Processor seconds, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, medians, progress, show, take_turns, write_record
from common.config import LoraSection
from common.language.adapters import Adapter, adapter_tensors
from common.language.mixing import Mixture
from common.language.model import CausalLM, load_causal
from common.language.options import Rule
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.scoring import first_token_entropies

LORA = LoraSection(rank=8, alpha=16.0)
PROMPTS, TOKENS = 8, 3
RULES: tuple[Rule, ...] = ("factors", "product")
WORDS = ("red", "big", "sad", "old", "new", "blue")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a causal language model")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 8, 25, 100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bare, mixed = (load_causal(options.model, precision="fp32") for _ in range(2))
    template = Template.load()
    titles = [f"the little {word} story {n}" for n, word in enumerate(WORDS)]
    prompts = [
        template.ranking_prompt(Ranking(f"u{n}", (titles[n % len(titles)],), tuple(titles), None))
        for n in range(PROMPTS)
    ]
    table = adapter_tensors(options.model, LORA)

    def adapter(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in table.items()}

    def backward(model: CausalLM) -> list[torch.Tensor]:
        loss = first_token_entropies(model, prompts, TOKENS).mean()
        return list(torch.autograd.grad(loss, list(model.lora_parameters().values())))

    def step(mixture: Mixture, weights_GD: torch.Tensor) -> None:
        mixed.set_adapter(mixture.at(weights_GD))
        mixture.gradient(dict(zip(mixed.lora_parameters(), backward(mixed), strict=True)))

    bare.attach(LORA, adapter(0))
    cells: list[dict[str, Any]] = []
    for rule in RULES:
        for count in options.counts:
            progress(f"{rule}, {count} adapters")
            mixture = Mixture({f"d{n}": adapter(n) for n in range(count)}, rule)
            mixed.attach(LORA.model_copy(update={"rank": mixture.rank}))
            even_GD = torch.full((1, count), 1.0 / count)
            contenders = {"bare": partial(backward, bare), "step": partial(step, mixture, even_GD)}
            seconds = take_turns(contenders, options.repeats, clock=time.process_time)
            mixed.detach()
            cells.append({"rule": rule, "adapters": count, "seconds": seconds, "medians": medians(seconds)})
    values = sum(torch.Size(shape).numel() for shape in table.values())
    show(
        f"{len(bare.encode(prompts[0]))} tokens a prompt, {values:,} values an adapter",
        ("rule", "adapters", "bare s", "step s", "ratio"),
        [
            (cell["rule"], cell["adapters"], bare_s, step_s, step_s / bare_s)
            for cell in cells
            for bare_s, step_s in [(cell["medians"]["bare"], cell["medians"]["step"])]
        ],
    )
    write_record(options.out, {"machine": machine(model=options.model.name), "cells": cells})


if __name__ == "__main__":
    main()
