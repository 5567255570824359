"""How unlike the others a token's key is, and which tokens stay for that alone."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def key_difference(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """KeyDiff (https://arxiv.org/abs/2504.15364): 1 - cos(key, mean of the normalised keys).

    The mean is over all keys that the head holds, rotated as they are stored.

    Args:
        keys: [H, n, D], 0 where no token is held.
        positions: int32 [H, n], -1 where no token is held.

    Returns:
        float32 [H, n] from 0 to 2, 0 where no token is held.
    """
    directions = normalize(keys.float(), dim=-1)
    # keys that are not held are 0, so the sum points where the mean does
    anchors = normalize(directions.sum(dim=1), dim=-1)
    difference = 1 - (directions @ anchors[..., None]).squeeze(-1)
    return difference.masked_fill_(positions < 0, 0.0)


def most_unlike(
    difference: torch.Tensor, candidates: torch.Tensor, caps: torch.Tensor
) -> torch.Tensor:
    """The candidates whose keys differ most, at most `caps` (int [H]) per head; bool [H, n]."""
    order = difference.masked_fill(~candidates, -torch.inf).argsort(1, descending=True)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    chosen = torch.zeros_like(candidates).scatter_(1, order, rank < caps[:, None])
    return chosen & candidates
