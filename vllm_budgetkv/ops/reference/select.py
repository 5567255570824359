"""Reference of `select`: the spec of the kernels, in plain torch."""

from __future__ import annotations

import torch


def select(
    scores: torch.Tensor, tiers: torch.Tensor, lens: torch.Tensor, budgets: torch.Tensor
) -> torch.Tensor:
    """See `vllm_budgetkv.ops.select.select`."""
    num_tokens = scores.shape[1]
    held = torch.arange(num_tokens, device=scores.device) < lens[:, None]
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    tiers = tiers.short().masked_fill(~held, -1)

    # stable sorts from the least to the most important key: recency, score, tier
    order = torch.arange(num_tokens - 1, -1, -1, device=scores.device).expand_as(scores)
    for key in (scores, tiers):
        step = key.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, step)
    rank = torch.empty_like(order)
    rank.scatter_(1, order, torch.arange(num_tokens, device=scores.device).expand_as(order))
    return held & (rank < budgets[:, None])
