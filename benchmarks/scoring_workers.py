"""How long 20 candidates take to score: one thread, several, threads with a model each, processes.

The model is a folder that you name; adapters are random, samples made up.

    python -m benchmarks.scoring_workers ../shared/data/lm/stories260K
    python -m benchmarks.scoring_workers MODEL --samples 100 --repeats 5 --out runs/scoring.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.measure import machine, medians, show, take_turns, write_record
from common.config import LoraSection
from common.language.adapters import Adapter, adapter_tensors
from common.language.model import load_causal
from common.language.samples import Sample
from common.language.validation import Validation
from server.evolution.workers import ScoringWorkers

POPULATION = 20
LORA = LoraSection(rank=8, alpha=16.0, modules=("q_proj", "k_proj", "v_proj", "o_proj"))
TEXT = "once upon a time there was a little cat who liked to play with the red ball in the garden"
WORDS = TEXT.split(" ")


def samples_of(count: int) -> list[Sample]:
    """Prompts of some 100 words and answers of five."""
    rows = [[WORDS[(7 * n + 3 * place) % len(WORDS)] for place in range(105)] for n in range(count)]
    return [Sample(" ".join(row[:100]) + "\n", " ".join(row[100:])) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    samples = samples_of(options.samples)
    generator = torch.Generator().manual_seed(0)
    table = adapter_tensors(options.model, LORA)
    adapters: list[Adapter] = [
        {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in table.items()}
        for _ in range(POPULATION)
    ]

    def scorer() -> Callable[[Adapter], float]:
        lm = load_causal(options.model, precision="fp32")
        lm.attach(LORA)
        validation = Validation(lm, samples)

        def score(adapter: Adapter) -> float:
            lm.set_adapter(adapter)
            return float(validation.losses().mean())

        return score

    scorers = [scorer() for _ in range(options.workers)]

    def alone(threads: int) -> list[float]:
        torch.set_num_threads(threads)
        return [scorers[0](adapter) for adapter in adapters]

    def threads() -> list[float]:
        torch.set_num_threads(1)
        shares = [adapters[n :: options.workers] for n in range(options.workers)]
        with ThreadPoolExecutor(options.workers) as pool:
            parts = pool.map(lambda n: [scorers[n](adapter) for adapter in shares[n]], range(options.workers))
        return [loss for part in parts for loss in part]

    with ScoringWorkers(options.model, LORA, samples, options.workers) as workers:
        contenders = {
            "one thread": lambda: alone(1),
            f"{options.workers} threads of torch": lambda: alone(options.workers),
            f"{options.workers} threads, a model each": threads,
            f"{options.workers} processes": lambda: workers.losses(adapters),
        }
        seconds = take_turns(contenders, options.repeats)
    median = medians(seconds)
    rows = [[name, value, median["one thread"] / value] for name, value in median.items()]
    show("A generation of 20 candidates", ("how", "seconds", "times as fast"), rows)
    write_record(options.out, {"machine": machine(), "samples": len(samples), "seconds": seconds})


if __name__ == "__main__":
    main()
