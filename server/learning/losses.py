"""Losses on pseudo-users: what the learned merge methods minimise, one value a pseudo-user.

Notation of METHODS: student logits `s_BI`, teacher logits `t_BI` (cosines with every item of the
domain, not divided by a temperature), `seen_BI` true where the item is in the history and the seen item
is to be left out of both. A row must keep at least one item that is not seen.

    >>> import torch
    >>> s_BI = torch.tensor([[1.0, 1.0]])
    >>> round(float(entropy(s_BI)), 4)
    0.6931
"""

from __future__ import annotations

from torch import Tensor, nn


def entropy(s_BI: Tensor, seen_BI: Tensor | None = None) -> Tensor:
    """AdaMerging (Yang et al., ICLR 2024, eq. 4): the entropy in nats of `softmax(s)`. Returns [B]."""
    log_p_BI = _log_softmax(s_BI, seen_BI)
    return -(log_p_BI.exp() * _without(log_p_BI, seen_BI)).sum(-1)


def mergerec(
    s_BI: Tensor,
    t_BI: Tensor,
    seen_BI: Tensor | None = None,
    *,
    temperature: float = 0.05,
    alpha: float = 1000.0,
) -> Tensor:
    """MergeRec: `L_rec + alpha L_KD` [B].

    `L_rec = CE(s, argmax t)`; `L_KD = T^2 KL(softmax(t/T) || softmax(s/T))`, both over all items of the
    domain that are not seen.
    """
    label_B = _hide(t_BI, seen_BI).argmax(-1)
    rec_B = -_log_softmax(s_BI, seen_BI).gather(-1, label_B[:, None]).squeeze(-1)
    log_t_BI = _log_softmax(t_BI / temperature, seen_BI)
    log_s_BI = _log_softmax(s_BI / temperature, seen_BI)
    difference_BI = _without(log_t_BI, seen_BI) - _without(log_s_BI, seen_BI)
    kl_B = (log_t_BI.exp() * difference_BI).sum(-1)
    return rec_B + alpha * temperature**2 * kl_B


def _hide(logits_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    return logits_BI if seen_BI is None else logits_BI.masked_fill(seen_BI, float("-inf"))


def _log_softmax(logits_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    return nn.functional.log_softmax(_hide(logits_BI.float(), seen_BI), dim=-1)


def _without(log_p_BI: Tensor, seen_BI: Tensor | None) -> Tensor:
    """Seen items contribute nothing (0 times -inf would be NaN)."""
    return log_p_BI if seen_BI is None else log_p_BI.masked_fill(seen_BI, 0.0)
