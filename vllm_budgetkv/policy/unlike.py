"""Which tokens stay because their keys are unlike the others, whatever their score."""

from __future__ import annotations

import torch


def most_unlike(
    contrast: torch.Tensor, candidates: torch.Tensor, caps: torch.Tensor, max_tokens: int
) -> torch.Tensor:
    """The candidates with the highest contrast, at most `caps` (int [H]) per head; bool [H, n].

    The host knows only that no cap is above `max_tokens`.
    """
    count = min(max_tokens, contrast.shape[-1])
    best = contrast.masked_fill(~candidates, -torch.inf).topk(count, dim=-1).indices
    rank = torch.arange(count, device=best.device).expand_as(best)
    chosen = torch.zeros_like(candidates).scatter_(-1, best, rank < caps[..., None])
    return chosen & candidates
