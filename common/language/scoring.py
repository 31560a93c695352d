"""What a language model says about candidates: likelihoods, losses, entropies, Yes or No, and text.

The prompt runs once, with all its answers behind it, each of which sees the prompt and itself alone, so that
30 candidates cost one prompt and 30 titles (`answer_scores`). Prompts of a batch are padded on the right;
positions of an answer go on where the prompt ended. So every figure is that of the plain computation on
prompt and answer alone, up to rounding.

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
PACKED_TOKENS = 2048  # of answers behind one prompt; with more of them the prompt runs again


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
    """Mean log-likelihood a token of each answer to each prompt; all prompts run together.

    `answers[n]` are the ids of the answers to prompt `n`. Returns a tensor [answers] for each prompt.
    """
    _check_lengths(lm, prompts, [max(map(len, own)) for own in answers])
    groups = [(prompt, part) for prompt, own in zip(prompts, answers, strict=True) for part in _parts(own)]
    found: list[Tensor] = []
    for start in range(0, len(groups), len(prompts)):
        found += _packed_scores(lm, *zip(*groups[start : start + len(prompts)], strict=True))
    parts = iter(found)
    return [torch.cat([next(parts) for _ in _parts(own)]) for own in answers]


def choice_losses(lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> Tensor:
    """-log of the probability of each prompt's first answer among its answers [B], by whole likelihoods.

    With gradient where grad is enabled. Raises DataError where a prompt is too long.
    """
    losses = []
    for mean_A, own in zip(answer_scores(lm, prompts, answers), answers, strict=True):
        tokens_A = torch.tensor([len(answer) for answer in own], device=mean_A.device)
        losses.append(-(mean_A * tokens_A).log_softmax(0)[0])
    return torch.stack(losses)


def _parts(answers: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
    """The answers in order, in parts of at most `PACKED_TOKENS` tokens, or of one answer."""
    begin = tokens = 0
    for n, answer in enumerate(answers):
        if n > begin and tokens + len(answer) > PACKED_TOKENS:
            yield answers[begin:n]
            begin, tokens = n, 0
        tokens += len(answer)
    yield answers[begin:]


def _packed_scores(lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]) -> list[Tensor]:
    """`answer_scores` in one pass."""
    ids_BT, mask_B1TT, position_BT = _packed(lm, prompts, answers)
    first = min(map(len, prompts)) - 1
    logits_BTV = lm.model(
        input_ids=ids_BT,
        attention_mask=mask_B1TT,
        position_ids=position_BT,
        use_cache=False,
        logits_to_keep=torch.arange(first, ids_BT.shape[1], device=lm.device),
    ).logits
    found = []
    for logits_TV, prompt, own in zip(logits_BTV, prompts, answers, strict=True):
        at = len(prompt) - 1 - first  # what follows the prompt, the same for every answer
        begin_N = torch.tensor([answer[0] for answer in own], device=lm.device)
        total_N = logits_TV[at].float().log_softmax(dim=0)[begin_N]
        rest_M = torch.tensor([token for answer in own for token in answer[1:]], device=lm.device).long()
        logs_M = -torch.nn.functional.cross_entropy(
            logits_TV[at + 1 : at + 1 + len(rest_M)].float(), rest_M, reduction="none"
        )
        length_N = torch.tensor([len(answer) for answer in own], device=lm.device)
        row_M = torch.repeat_interleave(torch.arange(len(own), device=lm.device), length_N - 1)
        found.append((total_N.index_add(0, row_M, logs_M) / length_N).cpu())
    return found


def _packed(
    lm: CausalLM, prompts: Sequence[Ids], answers: Sequence[Sequence[Ids]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions [B, T], and what attention adds [B, 1, T, T]: each prompt with its answers behind it.

    An answer sees the prompt and itself, and its positions go on where the prompt ended; its last token, of
    which nothing follows, is left out.
    """
    rows, parts, places = [], [], []
    for prompt, own in zip(prompts, answers, strict=True):
        rows.append(prompt + [token for answer in own for token in answer[:-1]])
        parts.append([0] * len(prompt) + [n for n, answer in enumerate(own, 1) for _ in answer[:-1]])
        places.append([*range(len(prompt)), *(len(prompt) + n for one in own for n in range(len(one) - 1))])
    ids_BT, position_BT = _padded(rows, lm)[0], _padded(places, lm)[0]
    longest = ids_BT.shape[1]
    part_BT = torch.tensor([part + [-1] * (longest - len(part)) for part in parts], device=lm.device)
    seen_BTT = (part_BT[:, None, :] == 0) | (part_BT[:, None, :] == part_BT[:, :, None])
    seen_BTT &= torch.ones(longest, longest, dtype=torch.bool, device=lm.device).tril()
    dtype = lm.model.dtype
    mask_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=lm.device)
    mask_BTT.masked_fill_(~seen_BTT, torch.finfo(dtype).min)
    return ids_BT, mask_BTT[:, None], position_BT


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
    return (_logs(logits_BTV, answer_BT) * known_BT).sum(dim=1) / known_BT.sum(dim=1)


def _logs(logits_BTV: Tensor, answer_BT: Tensor) -> Tensor:
    """Log-likelihood [B, T] of each token."""
    losses_N = torch.nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), answer_BT.flatten(), reduction="none"
    )
    return -losses_N.view(answer_BT.shape)


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
