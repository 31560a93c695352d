"""Recommendations by an adapted language model: it ranks titles after a history, and may say why.

A prompt holds as many candidates as the model was trained on. A whole catalog is ranked as a tournament:
groups of that size, the best of each go on, until one group is left; so a catalog of I items costs about
`3 I / (2 candidates)` prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from clients.data.domain import Domain
from clients.serving import settings_of
from clients.training.adapters import required_base
from clients.training.language import load_language
from common.config import InstructionSection, RunConfig
from common.errors import ConfigError, DataError
from common.language.evaluation import fit
from common.language.model import CausalLM
from common.language.prompts import Template
from common.language.records import Ranking, cut_title, title_key
from common.language.scoring import candidate_scores, generate

EXPLANATION_TOKENS = 64
_WHY = {"no-title": "it has no title", "same-title": "another candidate has the same title"}


def rank_titles(
    model_folder: Path,
    domain: Domain,
    history: Sequence[int],
    k: int,
    *,
    candidates: Sequence[int] | None = None,
    include_seen: bool = False,
) -> list[tuple[int, float]]:
    """The best `k` items (index, score) of `candidates`, or of the catalog, after `history`, oldest first.

    Scores are mean log-likelihoods a token of the title, comparable within the last group alone. Of the
    catalog `unrankable` items are left out. Raises DataError where fewer than two are left, one of
    `candidates` is unrankable among them, or nothing of the history has a title; ConfigError where `k` is
    more than a group can give.
    """
    config = settings_of(model_folder)
    section = config.instruction or InstructionSection()
    pool = list(range(len(domain.item_ids)) if candidates is None else dict.fromkeys(candidates))
    titles = shown_titles(domain, section.title_words)
    wrong = unrankable(titles, pool)
    if candidates is not None and wrong:
        item, why = min(wrong.items())
        raise DataError(
            f"candidate {domain.item_ids[item]!r}: {_WHY[why]}", next_step="leave it out of the candidates"
        )
    seen = set() if candidates is not None or include_seen else set(history)
    pool = [item for item in pool if item not in wrong and item not in seen]
    if len(pool) < 2:
        raise DataError(
            f"{len(pool)} items with titles to rank, expected two or more", next_step="name more candidates"
        )
    size = max(section.candidates, 3)
    if k > size // 2 and len(pool) > size:
        raise ConfigError(
            f"-k {k}: at most {size // 2} of so many items",
            next_step=f"the model was trained on {section.candidates} candidates at a time",
        )
    lm = _load(model_folder, config)
    kept = max(k, size // 3)
    while len(pool) > size:
        count = -(-len(pool) // size)
        groups = [pool[start::count] for start in range(count)]
        ranked = _scores(lm, config, titles, history, groups)
        pool = [item for group in ranked for item, _ in group[:kept]]
    (last,) = _scores(lm, config, titles, history, [pool])
    return last[:k]


def explain(model_folder: Path, domain: Domain, history: Sequence[int], item: int) -> str:
    """What the model itself says when asked why `item` follows `history`; greedy, a few lines at most.

    A model that was trained to rank alone may say nothing to the point: it is its text, not a reason.
    """
    config = settings_of(model_folder)
    section = config.instruction or InstructionSection()
    lm, titles = _load(model_folder, config), shown_titles(domain, section.title_words)
    most = min(section.max_prompt_tokens, lm.max_tokens - EXPLANATION_TOKENS)
    past = _past(titles, history)[-section.history_items :]
    for start in range(len(past) + 1):  # as much of the newest history as fits
        liked = "\n".join(f"- {other}" for other in past[start:])
        prompt = (
            f"### Instruction:\nA user liked these items. Say in one sentence why the user may like "
            f"{titles[item]!r}, too.\n\n### History:\n{liked}\n\n### Answer:\n"
        )
        if len(lm.encode(prompt)) <= most:
            break
    (text,) = generate(lm, [prompt], EXPLANATION_TOKENS)
    return text.strip()


def shown_titles(domain: Domain, words: int) -> list[str]:
    """Every item's title as prompts show it, cut to so many words (0: whole); "" where there is none."""
    return [
        cut_title(title, words) for title in domain.attributes.get("title") or [""] * len(domain.item_ids)
    ]


def unrankable(titles: Sequence[str], items: Iterable[int]) -> dict[int, str]:
    """Which of `items` a ranking by titles cannot hold: "no-title", or "same-title" as one before."""
    known, found = set[str](), dict[int, str]()
    for item in items:
        key = title_key(titles[item])
        if not key or key in known:
            found[item] = "same-title" if key else "no-title"
        known.add(key)
    return found


def _scores(
    lm: CausalLM,
    config: RunConfig,
    titles: Sequence[str],
    history: Sequence[int],
    groups: Sequence[Sequence[int]],
) -> list[list[tuple[int, float]]]:
    """Each group with its scores, best first."""
    section = config.instruction or InstructionSection()
    template, past = Template.load(section.template), tuple(_past(titles, history)[-section.history_items :])
    rankings = [Ranking("", past, tuple(titles[item] for item in group), None) for group in groups]
    batch_size = config.evaluation.batch_size
    found = []
    for start in range(0, len(rankings), batch_size):
        chosen = fit(lm, template, rankings[start : start + batch_size], section.max_prompt_tokens)
        found += candidate_scores(lm, template, chosen, batch_size)
    ranked = []
    for group, scores_I in zip(groups, found, strict=True):
        order = torch.argsort(scores_I, descending=True, stable=True).tolist()
        ranked.append([(group[place], float(scores_I[place])) for place in order])
    return ranked


def _past(titles: Sequence[str], history: Sequence[int]) -> list[str]:
    """Those that there are, as in training. Raises DataError where there is none."""
    past = [titles[item] for item in history if titles[item]]
    if not past:
        raise DataError("no item of the history has a title", next_step="name others with --history")
    return past


def _load(model_folder: Path, config: RunConfig) -> CausalLM:
    return load_language(required_base(model_folder), config, model_folder)
