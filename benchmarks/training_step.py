"""One fine-tuning step as `clients.training` computes it against the same step over a padded batch.

The loss, its gradients of all trainable tensors, and no optimiser; MiniLM, 64 examples a batch. Both see the
same batches, of the domain folders given or of a synthetic domain, and their gradients are compared first.

    python -m benchmarks.training_step
    python -m benchmarks.training_step data/tea data/garden --steps 6 --out runs/training_step.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.measure import machine, medians, progress, ratio, show, take_turns, write_record
from clients.data.domain import Domain
from clients.training.adapters import load_adapted
from clients.training.dataset import Batch, TrainingBatches
from clients.training.fit import load_encoder
from clients.training.loss import TwoTower
from common.config import RunConfig, TextSection, TrainingSection
from common.models.base import resolve_base, trainable_tensors
from common.models.encoder import Precision
from simulations.synthetic import make_domain

TOLERANCE = 1e-4  # of gradients in float32


def towers(config: RunConfig) -> dict[str, TwoTower]:
    """The embedded base as it is trained, and with padding."""
    base = resolve_base("embedded")
    training = config.training
    ours = load_encoder(base, config)
    padded = load_adapted(
        base,
        pooling=config.base.pooling,
        device=ours.device.type,
        precision=training.precision,
        dropout=training.dropout,
        for_training=True,
    )
    trainable = set(trainable_tensors(base))
    return {
        name: TwoTower(encoder, trainable, training.temperature).train()
        for name, encoder in (("ours", ours), ("padded", padded))
    }


def gradient(tower: TwoTower, batch: Batch) -> torch.Tensor:
    """Of the batch's loss, all tensors in one row [P]."""
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(tower(**batch)["loss"], trained, allow_unused=True)
    return torch.cat([each.flatten() for each in found if each is not None])


def measure(domain: Domain, config: RunConfig, contenders: dict[str, TwoTower], steps: int) -> dict[str, Any]:
    """Processor seconds of a step, medians over batches from all over the epoch."""
    batches = TrainingBatches(contenders["ours"].encoder, domain, config, config.training.max_steps)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    tokens = cells = 0
    off_by = 0.0
    for step in range(steps):
        batch = batches[step * len(batches) // steps]
        for side in ("history_mask_BT", "item_mask_UT"):
            tokens, cells = tokens + int(batch[side].sum()), cells + batch[side].numel()
        if step == 0:
            ours_P, padded_P = (gradient(tower, batch) for tower in contenders.values())
            off_by = float((ours_P - padded_P).norm() / padded_P.norm())
            is_exact = not contenders["ours"].encoder.bf16
            assert off_by < TOLERANCE or not is_exact, f"{domain.name}: the gradients differ by {off_by}"
        calls = {name: partial(gradient, tower, batch) for name, tower in contenders.items()}
        for name, seconds in take_turns(calls, 1, warm_ups=0, clock=time.process_time).items():
            taken[name] += seconds
        progress(f"{domain.name}: batch {step + 1} of {steps}")
    middle = medians(taken)
    return {
        "domain": domain.name,
        "off_by": off_by,
        "tokens / places": ratio(tokens, cells),
        "seconds": taken,
        **middle,
        "padded / ours": ratio(middle["padded"], middle["ours"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("domains", nargs="*", type=Path, help="prepared folders; none: a synthetic one")
    parser.add_argument("--attributes", nargs="*", default=["title"], help="of the items")
    parser.add_argument("--max-attribute-tokens", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="batches of each domain")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = RunConfig(
        text=TextSection(
            attributes=tuple(options.attributes),
            max_attribute_tokens=options.max_attribute_tokens,
            max_seq_len=options.max_seq_len,
        ),
        training=TrainingSection(batch_size=options.batch_size, dropout=0.0, precision=options.precision),
    )
    domains = [Domain.load(folder) for folder in options.domains] or [make_domain("garden")]
    contenders = towers(config)
    rows = [measure(domain, config, contenders, options.steps) for domain in domains]
    heads = ("domain", "tokens / places", "off_by", "ours", "padded", "padded / ours")
    show("One fine-tuning step, seconds of the processor", heads, [[row[h] for h in heads] for row in rows])
    write_record(options.out, {"machine": machine(threads=options.threads), "rows": rows})


if __name__ == "__main__":
    main()
