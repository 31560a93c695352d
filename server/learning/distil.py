"""Distillation of a merge's weights: a few steps towards what the domains' models say of pseudo-users.

Coefficients can only move a merge within the span of the vectors; here every tensor that was merged moves.
A step takes rolled-out pseudo-users of every domain, and for each domain a pool of items: the target's best
of every pseudo-user, and some drawn at random. The loss of a pseudo-user is listwise (ranking distillation,
Tang and Wang, KDD 2018, in the form of ListNet, Cao et al., ICML 2007), over its domain's pool without its
history:

    KL( softmax(t / T) || softmax(s / T) ),    t = (own + start) / 2,

`own` the scores of the domain's own model, `start` those of the merge that distillation begins with, both
standardised over the catalog and brought back to the spread of `own`. The start is part of the target because
a merge knows what no single model does: towards `own` alone it would be forgotten. Items are embedded by the
student with gradients, so nothing is stale. Adam without weight decay, a rate that rises and falls linearly.

Histories, pools and steps follow from the seed; the state is saved every `SAVE_EVERY_STEPS`, and a killed
distillation goes on from there to the same result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ModelError
from common.files import write_atomic
from common.progress import NO_REPORT, Report
from common.vectors import TaskVector
from server.learning.losses import ranking_distillation
from server.learning.prepare import Inputs, histories_of, seen_items, teach, teacher_model, tokenized
from server.learning.pseudo_users import History, Seeds, check_sizes, embed_histories, hold_back
from server.learning.teachers import (
    DomainTexts,
    EmbeddingCache,
    Teacher,
    encode,
    target_scores,
    with_vector,
)

SAVE_EVERY_STEPS = 25
WARMUP_STEPS = 10
LOWEST_RATE = 0.05  # of the highest, at the end
USERS = 12  # pseudo-users of each domain in a step
BEST, RANDOM = 6, 10  # items of a pool: the target's best of each pseudo-user, and drawn ones of the domain
_HIDDEN = -1e4  # a cosine that no softmax sees


@dataclass(frozen=True)
class Lesson:
    """One domain as distillation sees it: its pseudo-users, and who says what of them."""

    texts: DomainTexts
    histories: list[History]
    teachers: list[Teacher]  # the domain's own model, and the merge at the start


def lessons(
    inputs: Inputs, start: TaskVector, steps: int, store: EmbeddingCache, report: Report = NO_REPORT
) -> list[Lesson]:
    """Every domain's pseudo-users for so many steps, and both teachers' embeddings of them.

    `store` keeps those of the own models. Time: two passes over each catalog, and some `history_length + 2`
    over the pseudo-users. Items that are held back neither begin a history nor are rolled out into one.
    Raises DataError for a catalog of one item.
    """
    learning, found = inputs.learning, []
    texts = tokenized(inputs)
    sizes = {text.name: len(text) for text in texts}
    check_sizes(sizes, learning)
    held = hold_back(sizes, learning, inputs.seed)
    begun = with_vector(inputs.base, start)
    for index, text in enumerate(texts):
        report(phase="pseudo-users", step=index, total=len(texts))
        generator = np.random.default_rng([inputs.seed, 7, index])
        free = np.setdiff1d(np.arange(len(text)), held[text.name])
        starts = generator.choice(free, size=steps * USERS)
        longest = max(1, min(learning.history_length, len(free), len(text) - 1))
        lengths = generator.integers(1, longest + 1, len(starts))
        seeds = Seeds(starts.tolist(), lengths.tolist(), held[text.name].tolist(), inputs.seed)
        found.append(_lesson(inputs, text, seeds, begun, store))
    report(phase="pseudo-users", step=len(texts), total=len(texts))
    return found


def _lesson(
    inputs: Inputs, text: DomainTexts, seeds: Seeds, begun: Mapping[str, Tensor], store: EmbeddingCache
) -> Lesson:
    own = teacher_model(inputs, text, text.name, inputs.model(text.name), store)
    histories = histories_of(inputs, text, seeds, own, store)
    items_IE = encode(inputs.encoder, text.items, begun)
    users_UE = embed_histories(inputs.encoder, begun, text, items_IE, histories)
    teachers = [teach(inputs, own, text.name, histories, store), Teacher(items_IE, users_UE)]
    return Lesson(text, histories, teachers)


class Distillation:
    """The student's tensors, and the loop that moves them. `work` keeps the state.

    Memory beside the encoder: four times the size of a vector in fp32 (student, gradient, Adam's two
    moments), and both teachers' embeddings.
    """

    def __init__(self, inputs: Inputs, start: TaskVector, steps: int, rate: float) -> None:
        self._inputs, self._steps, self._rate = inputs, steps, rate
        begun = with_vector(inputs.base, start)
        self._params = {name: begun[name].clone().requires_grad_() for name in start}
        self._adam = torch.optim.Adam(self._params.values(), lr=rate, betas=(0.9, 0.99), foreach=True)

    def run(
        self, lessons: Sequence[Lesson], state: Path, digest: str, report: Report = NO_REPORT
    ) -> TaskVector:
        """The student's vector after the last step; goes on from `state` if that is of these inputs.

        Raises ModelError where the loss is not finite.
        """
        first = self._load(state, digest) + 1
        for step in range(first, self._steps + 1):
            for group in self._adam.param_groups:
                group["lr"] = self._rate * _share(step, self._steps)
            loss = self._loss(lessons, step)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise ModelError(
                    f"distillation: the loss is {value} at step {step}",
                    next_step="lower the option learning_rate, or set steps = 0",
                )
            self._adam.zero_grad()
            torch.autograd.backward(loss)
            self._adam.step()
            report(phase="distil", step=step, total=self._steps, loss=value)
            if step % SAVE_EVERY_STEPS == 0 or step == self._steps:
                self._save(state, digest, step)
        base = self._inputs.base
        return {name: (param.detach() - base[name]).cpu() for name, param in self._params.items()}

    def _loss(self, lessons: Sequence[Lesson], step: int) -> Tensor:
        """Mean over domains and their pseudo-users of this step; users and items in two batches each."""
        rows = list(range((step - 1) * USERS, step * USERS))
        targets, users, items = [], [], []
        for index, lesson in enumerate(lessons):
            t_BI, pool_K = _target(lesson, rows, np.random.default_rng([self._inputs.seed, 8, step, index]))
            targets.append((t_BI, len(pool_K)))
            users += [lesson.texts.history(lesson.histories[row]) for row in rows]
            items += [lesson.texts.items[item] for item in pool_K]
        users_UE, items_IE = self._embed(users), self._embed(items)
        total, start = users_UE.new_zeros(()), 0
        for index, (t_BK, size) in enumerate(targets):
            mine_BE = users_UE[index * USERS : (index + 1) * USERS]
            s_BK = mine_BE @ items_IE[start : start + size].T
            s_BK = s_BK.masked_fill(t_BK == _HIDDEN, _HIDDEN)
            every_BK = torch.arange(size, device=s_BK.device).expand_as(s_BK)
            temperature = self._inputs.learning.temperature
            total = total + ranking_distillation(s_BK, t_BK, every_BK, temperature=temperature).mean()
            start += size
        return total / len(lessons)

    def _embed(self, ids: list[list[int]]) -> Tensor:
        """[n, E] with gradients, the shorter and the longer half apart: little is spent on padding."""
        encoder = self._inputs.encoder
        order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
        halves = [half for half in (order[: len(order) // 2], order[len(order) // 2 :]) if half]
        parts = [
            encoder.forward(*encoder.batch([ids[place] for place in half]), self._params) for half in halves
        ]
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back.to(parts[0].device)]

    def _load(self, path: Path, digest: str) -> int:
        """The saved step, its tensors and moments taken up; 0 where nothing of these inputs was saved."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
            if facts.get("inputs") != digest:
                return 0
            tensors = safetensors.torch.load_file(path)
        except (FileNotFoundError, SafetensorError):
            return 0
        step = int(facts["step"])
        with torch.no_grad():
            for name, param in self._params.items():
                param.copy_(tensors[f"value {name}"])
                self._adam.state[param] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"mean {name}"].to(param.device),
                    "exp_avg_sq": tensors[f"square {name}"].to(param.device),
                }
        return step

    def _save(self, path: Path, digest: str, step: int) -> None:
        tensors: dict[str, Tensor] = {}
        for name, param in self._params.items():
            state = self._adam.state[param]
            tensors[f"value {name}"] = param.detach().cpu().contiguous()
            tensors[f"mean {name}"] = state["exp_avg"].cpu().contiguous()
            tensors[f"square {name}"] = state["exp_avg_sq"].cpu().contiguous()
        write_atomic(path, safetensors.torch.save(tensors, {"inputs": digest, "step": str(step)}))


def _share(step: int, steps: int) -> float:
    """The rate of a step in shares of the highest: up over the first steps, then down."""
    return min(1.0, step / WARMUP_STEPS) * max(LOWEST_RATE, (steps - step + 1) / steps)


def _target(lesson: Lesson, rows: list[int], generator: np.random.Generator) -> tuple[Tensor, list[int]]:
    """The target's scores [B, K] of the pool's items, seen ones `_HIDDEN`, and which items these are."""
    size = len(lesson.texts)
    seen_BI = seen_items([lesson.histories[row] for row in rows], size).to(lesson.teachers[0].items_IE.device)
    t_BI = target_scores(lesson.teachers, rows, None, seen_BI).masked_fill(seen_BI, _HIDDEN)
    best = t_BI.topk(min(BEST, size), dim=1).indices.flatten().tolist()
    pool = list(dict.fromkeys([*best, *generator.integers(0, size, RANDOM).tolist()]))
    return t_BI[:, pool], pool
