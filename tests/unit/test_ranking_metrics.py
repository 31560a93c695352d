"""Ranks and metrics against a naive count and against ir-measures."""

from __future__ import annotations

import math

import pytest
import torch

from common.metrics import ndcg_at_k, ranks, recall_at_k


def naive_rank(scores: list[float], target: int, masked: set[int]) -> int:
    others = [s for i, s in enumerate(scores) if i != target and i not in masked]
    return 1 + sum(not s < scores[target] for s in others)


def test_ranks_against_a_naive_count_with_ties_and_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BI = torch.randint(0, 6, (50, 20), generator=generator).float()  # many ties
    target_B = torch.randint(0, 20, (50,), generator=generator)
    mask_BI = torch.rand(50, 20, generator=generator) < 0.3
    for mask in (None, mask_BI):
        wanted = [
            naive_rank(
                scores_BI[b].tolist(),
                int(target_B[b]),
                set() if mask is None else set(mask[b].nonzero().flatten().tolist()),
            )
            for b in range(50)
        ]
        assert ranks(scores_BI, target_B, mask).tolist() == wanted


def test_a_constant_scorer_is_ranked_last() -> None:
    assert ranks(torch.zeros(2, 7), torch.tensor([0, 6])).tolist() == [7, 7]


def test_what_is_not_a_number_counts_against_us() -> None:
    scores_BI = torch.tensor([[1.0, torch.nan, 0.5], [torch.nan, 1.0, 2.0]])
    assert ranks(scores_BI, torch.tensor([0, 0])).tolist() == [2, 3]


def test_metrics_by_hand() -> None:
    rank_B = torch.tensor([1, 2, 10, 11])
    assert recall_at_k(rank_B, 10) == 0.75
    assert ndcg_at_k(rank_B, 10) == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11)) / 4)
    assert recall_at_k(torch.tensor([]), 10) == ndcg_at_k(torch.tensor([]), 10) == 0.0


def test_metrics_against_ir_measures() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    scores_BI = torch.rand(30, 25, generator=torch.Generator().manual_seed(1))
    target_B = torch.randint(0, 25, (30,), generator=torch.Generator().manual_seed(2))
    rank_B = ranks(scores_BI, target_B)
    qrels = [ir_measures.Qrel(f"q{b}", f"i{int(target_B[b])}", 1) for b in range(30)]
    run = [
        ir_measures.ScoredDoc(f"q{b}", f"i{i}", float(scores_BI[b, i])) for b in range(30) for i in range(25)
    ]
    recall, ndcg = ir_measures.parse_measure("R@10"), ir_measures.parse_measure("nDCG@10")
    found = ir_measures.calc_aggregate([recall, ndcg], qrels, run)
    assert recall_at_k(rank_B, 10) == pytest.approx(found[recall])
    assert ndcg_at_k(rank_B, 10) == pytest.approx(found[ndcg])
