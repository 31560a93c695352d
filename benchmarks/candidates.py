"""What mixing one candidate of Evo-Merging costs, against building it naively, for 8, 25 and 100 adapters.

Contenders, in turns, for a generation of 20 candidates of each stage (stage 1: each its own ratios; stage 2:
one set of ratios, each its own scales):

- `pool`: `common.language.pool.Pool.mix`, whose magnitudes were sorted once;
- `naive`: for each candidate and adapter find each A's largest entries again (`topk`); one candidate;
- `dense` (small sizes only): as naive, and `B A` of each adapter multiplied out and summed; one candidate.

One thread, processor time.

    python -m benchmarks.candidates
    python -m benchmarks.candidates --size qwen2-0.5b --repeats 5 --out runs/candidates.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine, medians, progress, ratio, show, take_turns, write_record
from common.language.pool import Candidate, Pool

POPULATION, RANK = 20, 8
SIZES: dict[str, tuple[int, list[tuple[int, int]]]] = {  # blocks, and [outputs, inputs] of their layers
    "toy": (2, [(64, 64), (32, 64), (32, 64), (64, 64), (160, 64), (160, 64), (64, 160)]),
    "small": (4, [(256, 256), (128, 256), (128, 256), (256, 256), (704, 256), (704, 256), (256, 704)]),
    "qwen2-0.5b": (
        24, [(896, 896), (128, 896), (128, 896), (896, 896), (4864, 896), (4864, 896), (896, 4864)],
    ),
}  # fmt: skip


def adapters_of(size: str, count: int) -> dict[str, dict[str, Tensor]]:
    """Random adapters of rank 8 for all linear layers of a model of that size."""
    blocks, layers = SIZES[size]
    generator = torch.Generator().manual_seed(count)
    made: dict[str, dict[str, Tensor]] = {}
    for n in range(count):
        tensors = {}
        for block in range(blocks):
            for layer, (rows, columns) in enumerate(layers):
                name = f"layers.{block}.{layer}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator)
                tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator)
        made[f"d{n:03}"] = tensors
    return made


def naive(adapters: Mapping[str, Mapping[str, Tensor]], candidate: Candidate) -> dict[str, Tensor]:
    """One candidate as the rule reads."""
    merged: dict[str, Tensor] = {}
    for adapter, ratio_, scale in zip(adapters.values(), candidate.ratios, candidate.scales, strict=True):
        for name, tensor in adapter.items():
            kept = tensor
            if ".lora_A." in name:
                flat = tensor.flatten()
                largest = flat.abs().topk(round(ratio_ * flat.numel())).indices
                kept = torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).reshape(tensor.shape)
            merged[name] = merged[name] + scale * kept if name in merged else scale * kept
    return merged


def dense(adapters: Mapping[str, Mapping[str, Tensor]], candidate: Candidate) -> dict[str, Tensor]:
    """Every adapter's update as a whole matrix, summed: what must not happen for each candidate."""
    merged: dict[str, Tensor] = {}
    for label, adapter in adapters.items():
        place = list(adapters).index(label)
        one = Candidate((candidate.ratios[place],), (candidate.scales[place],))
        sparse = naive({label: adapter}, one)
        for name in (name for name in sparse if ".lora_A." in name):
            update = sparse[name.replace("lora_A", "lora_B")] @ sparse[name]
            merged[name] = merged[name] + update if name in merged else update
    return merged


def candidates_of(count: int) -> dict[str, list[Candidate]]:
    """A generation of each stage, spread as the search spreads it."""
    generator = torch.Generator().manual_seed(count)

    def ratios() -> list[float]:
        values: list[float] = (0.5 + 0.05 * torch.randn(count, generator=generator)).clamp(0, 1).tolist()
        return values

    def scales() -> list[float]:
        values: list[float] = (1 / count + 0.05 * torch.randn(count, generator=generator)).tolist()
        return values

    fixed = ratios()
    return {
        "ratios": [Candidate.of(ratios(), [1 / count] * count) for _ in range(POPULATION)],
        "scales": [Candidate.of(fixed, scales()) for _ in range(POPULATION)],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 25, 100])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for count in options.counts:
        adapters = adapters_of(options.size, count)
        started_s = time.process_time()
        pool = Pool(adapters)
        making_s = time.process_time() - started_s
        for stage, candidates in candidates_of(count).items():
            progress(f"{count} adapters, stage {stage}")
            contenders = {
                "pool": lambda p=pool, c=candidates: p.mix(c),
                "naive": lambda a=adapters, c=candidates: naive(a, c[0]),
            }
            if options.size != "qwen2-0.5b":
                contenders["dense"] = lambda a=adapters, c=candidates: dense(a, c[0])
            seconds = take_turns(contenders, options.repeats, clock=time.process_time)
            median = medians(seconds)
            one = median["pool"] / POPULATION
            rows.append(
                {
                    "adapters": count,
                    "stage": stage,
                    "pool_ms": 1000 * one,
                    "naive_ms": 1000 * median["naive"],
                    "dense_ms": 1000 * median["dense"] if "dense" in median else None,
                    "naive_ratio": ratio(median["naive"], one),
                    "making_s": making_s,
                    "seconds": seconds,
                }
            )
    heads = ("adapters", "stage", "pool_ms", "naive_ms", "dense_ms", "naive_ratio", "making_s")
    show(f"One candidate, {options.size}", heads, [[row[head] for head in heads] for row in rows])
    write_record(options.out, {"machine": machine(), "size": options.size, "rows": rows})


if __name__ == "__main__":
    main()
