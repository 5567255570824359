"""How the heads of one layer share its budget.

All arithmetic is in integers, so the sum is at most the budget by construction, on every device.
Ratios enter as multiples of 1/1024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from vllm_budgetkv.policy.base import Tier

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation
    from vllm_budgetkv.policy.options import PolicyOptions

RATIO_UNIT = 1024

Count = TypeVar("Count", int, torch.Tensor)


def allocate(
    observation: Observation,
    scores: torch.Tensor,
    tiers: torch.Tensor,
    is_static: torch.Tensor,
    options: PolicyOptions,
    page_tokens: int,
) -> torch.Tensor:
    """Split H * `budget_tokens` top-down: by class, then inside each class (HybridKV).

    Dynamic heads get equal shares in whole pages. Static heads share what is left by score. What a
    head cannot use, because it holds less or may not hold more, goes to the static heads first and
    then to all. If all that is held fits, nothing is dropped.

    Args:
        observation: `lens`, `budget_tokens` and `max_head_tokens` are read.
        scores: float32 [H, n], 0 or more.
        tiers: uint8 [H, n] of `Tier`; tokens above `Tier.SCORED` are pinned.
        is_static: bool [H].
        options: `dynamic_weight`, `static_weight`, `floor_ratio`.
        page_tokens: tokens of a page.

    Returns:
        int32 [H].
    """
    total_tokens = observation.budget_tokens * observation.shape[0]
    caps = observation.lens.long().clamp(max=observation.max_head_tokens)
    dynamic_weight = round(options.dynamic_weight * RATIO_UNIT)
    static_weight = round(options.static_weight * RATIO_UNIT)
    weights = torch.where(is_static, static_weight, dynamic_weight)
    share = total_tokens * dynamic_weight // weights.sum(dim=-1, keepdim=True)
    share = share.clamp(max=observation.max_head_tokens)
    share = torch.where(share < page_tokens, share, share // page_tokens * page_tokens)
    dynamic = torch.minimum(share, caps)

    pool_tokens = total_tokens - dynamic.masked_fill(is_static, 0).sum(dim=-1, keepdim=True)
    static = pool_tokens // is_static.sum(dim=-1, keepdim=True).clamp(min=1)
    floor = round(options.floor_ratio * RATIO_UNIT)
    if floor < RATIO_UNIT:
        counts = _pooled_counts(scores, tiers, is_static, dynamic, total_tokens)
        static = (counts * (RATIO_UNIT - floor) + static * floor) // RATIO_UNIT

    budgets = torch.where(is_static, torch.minimum(static, caps), dynamic)
    budgets = budgets + slack(budgets, caps * is_static, total_tokens)
    grown = budgets + slack(budgets, caps, total_tokens)
    # a page that is partly filled costs a whole one, so dynamic heads grow by whole pages
    takes_all = is_static | (grown >= caps)
    whole = torch.maximum(grown // page_tokens * page_tokens, budgets)
    return torch.where(takes_all, grown, whole).int()


def _pooled_counts(
    scores: torch.Tensor,
    tiers: torch.Tensor,
    is_static: torch.Tensor,
    dynamic: torch.Tensor,
    total_tokens: int,
) -> torch.Tensor:
    """Ada-KV (https://arxiv.org/abs/2407.11550, algorithm 1): count each head's tokens among the
    best `total_tokens` of all heads, where a head's scores are normalised to sum to 1.

    The size of the static pool is known on the device only, but `topk` needs it on the host. So
    dynamic heads take part too, with exactly their `dynamic` tokens and above everything else;
    then k is the whole budget. int64 [H]; meaningless for dynamic heads.
    """
    num_tokens = scores.shape[-1]
    pinned = tiers > Tier.SCORED
    # pinned tokens stay anyway; a sink that takes most of the attention says nothing about need
    unpinned = scores.masked_fill(pinned, 0.0)
    keys = unpinned / unpinned.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    keys.masked_fill_(pinned, 2.0)
    keys.masked_fill_(tiers == Tier.NOT_HELD, -1.0)
    index = torch.arange(num_tokens, device=scores.device)
    taken = (index < dynamic[..., None]).float() * 4.0 - 1.0
    keys = torch.where(is_static[..., None], keys, taken).flatten(-2)
    best = keys.topk(min(total_tokens, keys.shape[-1]), sorted=False).indices
    heads = torch.div(best, max(num_tokens, 1), rounding_mode="floor")
    return torch.zeros_like(dynamic).scatter_add_(-1, heads, torch.ones_like(heads))


def share_of(tokens: Count, share: float) -> Count:
    """That share of the tokens, rounded down."""
    return tokens * round(share * RATIO_UNIT) // RATIO_UNIT


def slack(budgets: torch.Tensor, caps: torch.Tensor, total_tokens: int) -> torch.Tensor:
    """Tokens that each head gets of the unspent ones, in proportion to its room up to its cap."""
    room = (caps - budgets).clamp(min=0)
    room_tokens = room.sum(dim=-1, keepdim=True)
    unspent = torch.minimum(total_tokens - budgets.sum(dim=-1, keepdim=True), room_tokens)
    return room * unspent // room_tokens.clamp(min=1)
