"""The clipped sum of one private step (`clients.training.clipping`) against per-user gradients by Opacus.

The baseline holds the gradient of each user, 8 users at a time, as `GradSampleHooks` makes them, and embeds
the negatives once for each user: what Isthmus did before. The floor is a bare forward and backward pass of
the same loss, without clipping and so without privacy. All see the same random texts, of the lengths that
real titles of 8 tokens and histories of 32 have. First both sums are compared.

    python -m benchmarks.private_step
    python -m benchmarks.private_step --size full --out runs/private_step.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from benchmarks.learned_task import make_model
from benchmarks.measure import machine, medians, ratio, show, take_turns, write_record
from clients.training.clipping import GhostClipping, Gradients
from clients.training.dataset import Batch
from clients.training.loss import TwoTower
from common.models.base import resolve_base, trainable_tensors
from common.models.encoder import Encoder

CLIP, TEMPERATURE = 1.0, 0.05
HISTORY_TOKENS, ITEM_TOKENS = 32, 12
BASELINE_USERS_AT_ONCE = 8


class UserHooks(GradSampleHooks):  # type: ignore[misc]
    """Opacus' per-sample gradients where a sample is one of `users`, and has several rows, side by side."""

    users = 0

    def rearrange_grad_samples(
        self, *, module: nn.Module, backprops: Tensor, loss_reduction: str, batch_first: bool
    ) -> tuple[list[Tensor], Tensor]:
        """Rows (users * rows, ...) as (users, rows, ...): the samplers sum over all but the first axis."""
        activations, backprops = super().rearrange_grad_samples(
            module=module, backprops=backprops, loss_reduction=loss_reduction, batch_first=batch_first
        )
        setattr(module, "max_batch_len", self.users)  # noqa: B010 - Opacus keeps it there
        return [self._grouped(tensor) for tensor in activations], self._grouped(backprops)

    def _grouped(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.users, -1, *tensor.shape[1:])


def per_user(tower: TwoTower, hooks: UserHooks, batch: Batch) -> Gradients:
    """The clipped sum from the gradient of each user, all negatives embedded for each."""
    summed = {parameter: torch.zeros_like(parameter) for parameter in _trained(tower)}
    for start in range(0, len(batch["blocked_UI"]), BASELINE_USERS_AT_ONCE):
        rows = {name: batch[name][start : start + BASELINE_USERS_AT_ONCE] for name in batch if "_U" in name}
        users = hooks.users = len(rows["blocked_UI"])
        z_UE = tower.embed(rows["history_ids_UT"], rows["history_mask_UT"])
        item_UIE = tower.embed(
            *(
                torch.cat(
                    [rows[f"target_{what}_UT"][:, None], batch[f"negative_{what}_IT"].expand(users, -1, -1)],
                    1,
                ).flatten(0, 1)
                for what in ("ids", "mask")
            )
        ).unflatten(0, (users, -1))
        tower.own_losses(z_UE, item_UIE[:, 0], item_UIE[:, 1:], rows["blocked_UI"]).sum().backward()
        with torch.no_grad():
            samples = {parameter: parameter.grad_sample for parameter in summed}
            norm_U = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
            factor_U = (CLIP / (norm_U + 1e-6)).clamp(max=1.0)
            for parameter, sample in samples.items():
                summed[parameter] += torch.tensordot(factor_U, sample, dims=1)
                parameter.grad = parameter.grad_sample = None
    return summed


def bare(tower: TwoTower, batch: Batch) -> None:
    """Forward and backward of the same losses, summed at once."""
    z_UE, target_UE, negative_IE = (
        tower.embed(batch[f"{name}_ids_{axes}"], batch[f"{name}_mask_{axes}"])
        for name, axes in (("history", "UT"), ("target", "UT"), ("negative", "IT"))
    )
    negative_UIE = negative_IE.expand(len(z_UE), -1, -1)
    loss = tower.own_losses(z_UE, target_UE, negative_UIE, batch["blocked_UI"]).sum()
    torch.autograd.grad(loss, _trained(tower))


def _trained(tower: TwoTower) -> list[nn.Parameter]:
    return [parameter for parameter in tower.parameters() if parameter.requires_grad]


def make_batch(users: int, negatives: int, vocabulary: int) -> Batch:
    """Random texts of full length: nothing is gained from padding."""
    generator = torch.Generator().manual_seed(0)
    batch = {"blocked_UI": torch.zeros(users, 1 + negatives, dtype=torch.bool)}
    for name, axes, rows, tokens in (
        ("history", "UT", users, HISTORY_TOKENS),
        ("target", "UT", users, ITEM_TOKENS),
        ("negative", "IT", negatives, ITEM_TOKENS),
    ):
        batch[f"{name}_ids_{axes}"] = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
        batch[f"{name}_mask_{axes}"] = torch.ones(rows, tokens, dtype=torch.int64)
    return batch


def measure(tower: TwoTower, users: int, negatives: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of a step, after both sums were found equal."""
    vocabulary = tower.backbone.config.vocab_size  # type: ignore[union-attr]
    batch = make_batch(users, negatives, int(vocabulary))
    ghost, sums = GhostClipping(tower), {}

    def opacus() -> None:
        tower.backbone.enable_input_require_grads()  # type: ignore[operator]
        hooks = UserHooks(tower.backbone, loss_reduction="sum")
        sums["opacus"] = per_user(tower, hooks, batch)
        hooks.remove_hooks()
        tower.backbone.disable_input_require_grads()  # type: ignore[operator]

    def ours() -> None:
        sums["ours"] = ghost.summed(batch, CLIP)[0]

    opacus(), ours()
    both = [torch.cat([sums[name][p].flatten() for p in _trained(tower)]) for name in ("opacus", "ours")]
    off_by = float((both[0] - both[1]).norm() / both[0].norm())
    assert off_by < 1e-3, f"the sums differ by {off_by}"
    contenders = {"opacus": opacus, "ours": ours, "bare": lambda: bare(tower, batch)}
    seconds = take_turns(contenders, repeats, warm_ups=0, clock=time.process_time)
    ghost.close()
    middle = medians(seconds)
    return {
        "users": users,
        "negatives": negatives,
        "off_by": off_by,
        "seconds": seconds,
        **middle,
        "ours / opacus": ratio(middle["ours"], middle["opacus"]),
        "ours / bare": ratio(middle["ours"], middle["bare"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=("toy", "full"), default="toy", help="two layers of 32, or MiniLM")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    full = options.size == "full"
    with TemporaryDirectory() as temporary:
        folder = resolve_base("embedded") if full else Path(temporary) / "model"
        if not full:
            make_model("tiny", folder, "cpu", "fp32")
        encoder = Encoder.load(folder, dropout=0.0, for_training=True)
        tower = TwoTower(encoder, set(trainable_tensors(folder)), TEMPERATURE).train()
        sizes = [(16, 8), (16, 16)] if full else [(9, 4)]
        rows = [measure(tower, users, negatives, options.repeats) for users, negatives in sizes]
    heads = ("users", "negatives", "off_by", "opacus", "ours", "bare", "ours / opacus", "ours / bare")
    show("One private step, seconds of the processor", heads, [[row[head] for head in heads] for row in rows])
    write_record(options.out, {"machine": machine(threads=options.threads), "rows": rows})


if __name__ == "__main__":
    main()
