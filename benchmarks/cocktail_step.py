"""What a step of learning a cocktail's weights costs, and how it grows with the number of adapters.

    OMP_NUM_THREADS=1 python -m benchmarks.cocktail_step ../shared/data/lm/stories260K

Processor seconds (of one thread, so that other load counts little): the bare forward and backward pass of
the model with one adapter, and the whole step (mix, copy into the layers, both passes, gradient of the
weights) with N adapters of rank 8 on all linear layers. Median of 5 steps of 8 prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.config import LoraSection
from common.language.adapters import Adapter, adapter_tensors
from common.language.mixing import Mixture
from common.language.model import load_causal
from common.language.options import Rule
from common.language.prompts import Template
from common.language.records import Ranking
from common.language.scoring import first_token_entropies
from common.models.base import model_digest

LORA = LoraSection(rank=8, alpha=16.0)
PROMPTS, TOKENS, REPEATS = 8, 3, 5
WORDS = ("red", "big", "sad", "old", "new", "blue")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, nargs="+", default=[2, 8, 25, 100])
    given = parser.parse_args()
    torch.set_num_threads(1)
    lm = load_causal(given.model, precision="fp32")
    template = Template.load()
    titles = [f"the little {word} story {n}" for n, word in enumerate(WORDS)]
    prompts = [
        template.ranking_prompt(Ranking(f"u{n}", (titles[n % 6],), tuple(titles), None))
        for n in range(PROMPTS)
    ]
    table = adapter_tensors(given.model, LORA)
    found: dict[str, object] = {
        "base": model_digest(given.model),
        "adapter_values": sum(torch.Size(shape).numel() for shape in table.values()),
        "prompt_tokens": len(lm.encode(prompts[0])),
    }

    def adapter(seed: int) -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        return {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in table.items()}

    def backward() -> list[torch.Tensor]:
        loss = first_token_entropies(lm, prompts, TOKENS).mean()
        return list(torch.autograd.grad(loss, list(lm.lora_parameters().values())))

    lm.attach(LORA, adapter(0))
    found["bare_s"] = _seconds(backward)
    rules: tuple[Rule, ...] = ("factors", "product")
    for rule in rules:
        for count in given.adapters:
            mixture = Mixture({f"d{n}": adapter(n) for n in range(count)}, rule)
            lm.attach(LORA.model_copy(update={"rank": mixture.rank}))
            weights_GD = torch.full((1, count), 1.0 / count)

            def step(mixture: Mixture = mixture, weights_GD: torch.Tensor = weights_GD) -> None:
                lm.set_adapter(mixture.at(weights_GD))
                mixture.gradient(dict(zip(lm.lora_parameters(), backward(), strict=True)))

            found[f"{rule}_{count}_s"] = _seconds(step)
    print(json.dumps(found, indent=1))


def _seconds(step: Callable[[], object]) -> float:
    step()
    spent = []
    for _ in range(REPEATS):
        started_s = time.process_time()
        step()
        spent.append(time.process_time() - started_s)
    return round(statistics.median(spent), 4)


if __name__ == "__main__":
    main()
