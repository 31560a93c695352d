"""What a language model says about candidates: likelihoods, losses, entropies, Yes or No, and text.

The prompt runs once; its keys and values are kept and expanded over the answers, so that 30 candidates
cost one prompt and 30 titles (`answer_scores`). Prompts of a batch are padded on the right, and the padding
between prompt and answer is masked; positions go on where the prompt ended. So every figure is that of the
plain computation on prompt and answer alone, up to rounding.

A candidate's score is the mean log-likelihood a token of the title and of what ends it in an answer, the end
of the text or of the line: a title that begins another is told from it, and long titles are not worse for
being long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from common.errors import DataError
from common.language.model import CausalLM
from common.language.parsing import Parsed, parse_answer
from common.language.prompts import Template
from common.language.records import Ranking, YesNo

Ids = list[int]
ROWS_BYTES = {"cpu": 128 << 20}  # of keys, values and logits that answers take at a time; measured
_ROWS_BYTES = 1 << 30  # on other devices


def candidate_scores(
    lm: CausalLM, template: Template, rankings: Sequence[Ranking], batch_size: int = 8
) -> list[Tensor]:
    """For each ranking the scores [candidates] of its titles, float32 on the CPU; higher is better.

    `batch_size` prompts run together. Raises DataError without rankings, or where a prompt is too long.
    """
    _some(rankings)
    found: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(rankings), batch_size):
            found += candidate_likelihoods(lm, template, rankings[start : start + batch_size])
    return found


def calibrated_scores(
    lm: CausalLM, template: Template, rankings: Sequence[Ranking], batch_size: int = 8
) -> list[Tensor]:
    """`candidate_scores` less what each title has behind the template without history and candidates.

    So a title gains by what the prompt says for it, not by being likely anywhere (the domain-conditional PMI
    of Holtzman et al., 2021). Raises DataError as `candidate_scores`.
    """
    nothing = template.nothing_prompt()
    own = [template.candidate_answers(ranking) for ranking in rankings]
    titles = sorted({answer for answers in own for answer in answers})
    found = candidate_scores(lm, template, rankings, batch_size)
    with torch.no_grad():
        ids = lm.encode_answers(nothing, titles, end=template.answer_titles == 1)
        (anywhere,) = answer_scores(lm, [lm.encode(nothing)], [ids])
    known = dict(zip(titles, anywhere.tolist(), strict=True))
    return [
        scores - torch.tensor([known[answer] for answer in answers])
        for scores, answers in zip(found, own, strict=True)
    ]


def candidate_likelihoods(lm: CausalLM, template: Template, rankings: Sequence[Ranking]) -> list[Tensor]:
    """`candidate_scores` of all rankings together, with gradient where grad is enabled."""
    prompts = [template.ranking_prompt(ranking) for ranking in rankings]
    answers = [
        lm.encode_answers(prompt, template.candidate_answers(ranking), end=template.answer_titles == 1)
        for prompt, ranking in zip(prompts, rankings, strict=True)
    ]
    return answer_scores(lm, [lm.encode(prompt) for prompt in prompts], answers)


def answer_scores(lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """Mean log-likelihood a token of each answer to each prompt; prompts run once, all together.

    `answers[n]` are the ids of the answers to prompt `n`. Returns a tensor [answers] for each prompt.
    """
    _check_lengths(lm, prompts, [max(map(len, own)) for own in answers])
    run = _Prompts(lm, prompts)
    rows = [(n, answer) for n, own in enumerate(answers) for answer in own]
    means = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda row: len(rows[row][1]))
    at_once = max(1, ROWS_BYTES.get(lm.device.type, _ROWS_BYTES) // run.row_bytes(len(rows[order[-1]][1])))
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        means[chosen] = run.log_likelihoods(
            [rows[row][0] for row in chosen], [rows[row][1] for row in chosen]
        ).cpu()
    return list(torch.split(means, [len(own) for own in answers]))


def answer_losses(lm: CausalLM, prompts: Sequence[tuple[str, str]], batch_size: int = 8) -> Tensor:
    """Mean negative log-likelihood a token [N] of each answer, its end included, given its prompt.

    With gradient where grad is enabled. Raises DataError without prompts, or where one is too long.
    """
    _some(prompts)
    losses = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        heads = [lm.encode(prompt) for prompt, _ in chosen]
        answers = [lm.encode_answers(prompt, [answer])[0] for prompt, answer in chosen]
        losses.append(-whole_log_likelihoods(lm, heads, answers))
    return torch.cat(losses)


def whole_log_likelihoods(lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[Ids]) -> Tensor:
    """Mean log-likelihood a token [B] of each answer, from one pass over prompt and answer together."""
    _check_lengths(lm, prompts, list(map(len, answers)))
    ids_BT, mask_BT = _padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], lm)
    first_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=lm.device)
    kept = torch.arange(int(first_B.min()), ids_BT.shape[1] - 1, device=lm.device)
    logits_BTV = lm.model(
        input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, logits_to_keep=kept
    ).logits
    answer_BT, known_BT = _padded(list(answers), lm)
    where_BT = first_B[:, None] - kept[0] + torch.arange(answer_BT.shape[1], device=lm.device)
    where_BT = where_BT.clamp(max=len(kept) - 1)  # behind a shorter answer; masked
    own_BTV = logits_BTV.gather(1, where_BT[:, :, None].expand(-1, -1, logits_BTV.shape[2]))
    return _mean_log_likelihood(own_BTV, answer_BT, known_BT)


def first_token_entropies(lm: CausalLM, prompts: Sequence[str], tokens: int, batch_size: int = 8) -> Tensor:
    """Mean entropy [N], in nats, of the next-token distribution over the first `tokens` answer tokens.

    The answer goes on greedily and ends early at an end token, whose own entropy still counts. With
    gradient where grad is enabled (RecCocktail, entropy-guided merging). Raises DataError.
    """
    _some(prompts)
    if tokens < 1:
        raise DataError(f"{tokens} answer tokens have no entropy", next_step="look at one token or more")
    found = []
    for start in range(0, len(prompts), batch_size):
        heads = [lm.encode(prompt) for prompt in prompts[start : start + batch_size]]
        total_B = counted_B = torch.zeros(len(heads), device=lm.device)
        for _, live_B, logits_BV in _greedy(lm, heads, tokens):
            logs_BV = logits_BV.float().log_softmax(dim=1)
            entropy_B = -(logs_BV.exp() * logs_BV).sum(dim=1)
            total_B, counted_B = total_B + torch.where(live_B, entropy_B, 0.0), counted_B + live_B.float()
        found.append(total_B / counted_B)
    return torch.cat(found)


def yes_no_scores(lm: CausalLM, template: Template, records: Sequence[YesNo], batch_size: int = 8) -> Tensor:
    """P(yes) [N] between the template's two answers: softmax of their first tokens' logits (RecBench-MD).

    float32 on the CPU. Raises DataError where both answers begin with the same token.
    """
    _some(records)
    found = []
    with torch.no_grad():
        for start in range(0, len(records), batch_size):
            prompts = [template.yes_no_prompt(record) for record in records[start : start + batch_size]]
            pairs = [lm.encode_answers(prompt, [template.yes, template.no], end=False) for prompt in prompts]
            first_B2 = torch.tensor([[yes[0], no[0]] for yes, no in pairs], device=lm.device)
            if bool((first_B2[:, 0] == first_B2[:, 1]).any()):
                raise DataError(
                    f"{template.yes!r} and {template.no!r} begin with the same token",
                    next_step="use a template whose answers differ in their first token",
                )
            heads = [lm.encode(prompt) for prompt in prompts]
            _check_lengths(lm, heads, [1] * len(heads))
            logits_BV = _Prompts(lm, heads).logits_BV
            found.append(logits_BV.gather(1, first_B2).float().softmax(dim=1)[:, 0].cpu())
    return torch.cat(found)


@dataclass(frozen=True)
class Generated:
    """One generated answer and what it says: see `Parsed`."""

    text: str
    parsed: Parsed


def generate_rankings(
    lm: CausalLM,
    template: Template,
    rankings: Sequence[Ranking],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
) -> list[Generated]:
    """A greedy answer to each ranking, parsed. Raises DataError without rankings or for a prompt too long."""
    _some(rankings)
    found = []
    with torch.no_grad():
        for start in range(0, len(rankings), batch_size):
            chosen = rankings[start : start + batch_size]
            texts = generate(lm, [template.ranking_prompt(ranking) for ranking in chosen], max_new_tokens)
            found += [
                Generated(text, parse_answer(text, ranking.candidates))
                for text, ranking in zip(texts, chosen, strict=True)
            ]
    return found


def generate(lm: CausalLM, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy continuation of each prompt up to an end token, without it; all prompts together."""
    _some(prompts)
    heads = [lm.encode(prompt) for prompt in prompts]
    answers: list[Ids] = [[] for _ in prompts]
    with torch.no_grad():
        for chosen_B, live_B, _ in _greedy(lm, heads, max_new_tokens):
            for answer, token, live in zip(answers, chosen_B.tolist(), live_B.tolist(), strict=True):
                if live and token not in lm.eos_ids:
                    answer.append(token)
    return [lm.decode(answer) for answer in answers]


class _Prompts:
    """Prompts that ran: `cache` and mask, and `logits_BV` of the token after each."""

    def __init__(self, lm: CausalLM, prompts: Sequence[Ids]) -> None:
        self.lm = lm
        ids_BT, self.mask_BT = _padded(list(prompts), lm)
        self.length_B = self.mask_BT.sum(dim=1)
        self.cache = DynamicCache(config=lm.model.config)
        last, at_B = torch.unique(self.length_B - 1, return_inverse=True)
        logits_BTV = lm.model(
            input_ids=ids_BT,
            attention_mask=self.mask_BT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        ).logits
        self.logits_BV = logits_BTV[torch.arange(len(prompts), device=lm.device), at_B]

    def row_bytes(self, tokens: int) -> int:
        """Memory of one answer of so many tokens: its keys and values, and its logits twice in float32."""
        kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return int(kept // len(self.logits_BV)) + 8 * tokens * int(self.logits_BV.shape[1])

    def log_likelihoods(self, prompt_N: Sequence[int], answers: Sequence[Ids]) -> Tensor:
        """Mean log-likelihood a token [N] of `answers[n]` after prompt `prompt_N[n]`."""
        row_N = torch.tensor(list(prompt_N), device=self.lm.device)
        answer_NT, known_NT = _padded(list(answers), self.lm)
        logits_NTV = self.logits_BV[row_N][:, None]
        if answer_NT.shape[1] > 1:
            going_on_NTV = self.extend(row_N, answer_NT[:, :-1], known_NT[:, :-1])
            logits_NTV = torch.cat([logits_NTV, going_on_NTV], dim=1)
        return _mean_log_likelihood(logits_NTV, answer_NT, known_NT)

    def extend(self, row_N: Tensor, ids_NT: Tensor, known_NT: Tensor) -> Tensor:
        """Logits [N, T, V] of tokens that go on from the prompts `row_N`; `cache` stays as it is."""
        cache = DynamicCache(
            [(layer.keys[row_N], layer.values[row_N]) for layer in self.cache.layers],
            config=self.lm.model.config,
        )
        positions_NT = self.length_B[row_N][:, None] + torch.arange(ids_NT.shape[1], device=ids_NT.device)
        logits_NTV: Tensor = self.lm.model(
            input_ids=ids_NT,
            attention_mask=torch.cat([self.mask_BT[row_N], known_NT], dim=1),
            position_ids=positions_NT,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits_NTV


def _greedy(lm: CausalLM, prompts: Sequence[Ids], tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each step the chosen token [B], who had not ended before [B], and the logits [B, V]."""
    _check_lengths(lm, prompts, [tokens] * len(prompts))
    run = _Prompts(lm, prompts)
    logits_BV, mask_BT = run.logits_BV, run.mask_BT
    live_B = torch.ones(len(prompts), dtype=torch.bool, device=lm.device)
    ends = torch.tensor(lm.eos_ids, device=lm.device)
    for step in range(tokens):
        chosen_B = logits_BV.detach().argmax(dim=1)
        yield chosen_B, live_B, logits_BV
        live_B = live_B & ~torch.isin(chosen_B, ends)
        if step + 1 == tokens or not bool(live_B.any()):
            return
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], dim=1)
        logits_BTV = lm.model(
            input_ids=chosen_B[:, None],
            attention_mask=mask_BT,
            position_ids=(run.length_B + step)[:, None],
            past_key_values=run.cache,
            use_cache=True,
        ).logits
        logits_BV = logits_BTV[:, -1]


def _mean_log_likelihood(logits_BTV: Tensor, answer_BT: Tensor, known_BT: Tensor) -> Tensor:
    logs_BT = -torch.nn.functional.cross_entropy(
        logits_BTV.float().transpose(1, 2), answer_BT, reduction="none"
    )
    return (logs_BT * known_BT).sum(dim=1) / known_BT.sum(dim=1)


def _padded(lists: list[Ids], lm: CausalLM) -> tuple[Tensor, Tensor]:
    """`(ids, mask)` [B, T] on the model's device, padded on the right (with any id: it is masked)."""
    longest = max(map(len, lists))
    ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in lists], device=lm.device)
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in lists], device=lm.device)
    return ids_BT, mask_BT


def _some(records: Sequence[Any]) -> None:
    if not records:
        raise DataError("there are no prompts", next_step="check the users, the split and the protocol")


def _check_lengths(lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[int]) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        if not prompt or not answer:
            raise DataError("a prompt or its answer has no tokens", next_step="check the template")
        if len(prompt) + answer > lm.max_tokens:
            raise DataError(
                f"a prompt and its answer take {len(prompt)} + {answer} tokens, the model has "
                f"{lm.max_tokens} positions",
                next_step="allow fewer prompt tokens, use fewer candidates or another model",
            )
