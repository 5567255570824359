"""Which tokens stay because their keys are unlike the others, whatever their score."""

from __future__ import annotations

import torch


def most_unlike(
    contrast: torch.Tensor, candidates: torch.Tensor, caps: torch.Tensor
) -> torch.Tensor:
    """The candidates with the highest contrast, at most `caps` (int [H]) per head; bool [H, n]."""
    order = contrast.masked_fill(~candidates, -torch.inf).argsort(-1, descending=True)
    rank = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    chosen = torch.zeros_like(candidates).scatter_(-1, order, rank < caps[..., None])
    return chosen & candidates
