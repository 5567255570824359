"""Keep tokens in whole units (2, 4, ... neighbouring positions, up to a page)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.policy.base import Tier

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Retention


def keep_whole_units(
    retention: Retention, positions: torch.Tensor, unit_tokens: int, seen_tokens: int
) -> Retention:
    """Make every dynamic head keep or drop whole units; static heads are left as they are.

    A unit is all held tokens with the same `position // unit_tokens`. It gets the best tier and
    the best score of its tokens, so its tokens are neighbours in the order in which tokens stay,
    and the head's budget is cut where the last whole unit ends.

    Args:
        retention: a token-wise answer. Not mutated.
        positions: int32 [H, n], -1 beyond the held tokens.
        unit_tokens: tokens of a unit.
        seen_tokens: tokens of the request so far.

    Returns:
        Retention with scores, tiers and budgets of dynamic heads in units. A budget below the
        first unit is left as it is: a head must not be emptied.
    """
    # the unit of what is not held: one of its own behind all others
    num_units = seen_tokens // unit_tokens + 2
    units = torch.div(positions, unit_tokens, rounding_mode="floor").long() % num_units
    is_static = retention.is_static[..., None]
    scores = torch.where(is_static, retention.scores, _max_of(retention.scores, units, num_units))
    tiers = _max_of(retention.tiers.float(), units, num_units).to(torch.uint8)
    tiers = torch.where(is_static, retention.tiers, tiers)

    order = _keep_order(scores, tiers)
    sorted_units = units.gather(-1, order)
    starts = torch.ones_like(sorted_units)
    starts[..., 1:] = sorted_units[..., 1:] != sorted_units[..., :-1]
    index = torch.arange(units.shape[-1], device=units.device)
    last_start = (index * starts).cummax(dim=-1).values
    budgets = retention.budgets.long()
    cut = last_start.gather(-1, budgets.clamp(max=units.shape[-1] - 1)[..., None])[..., 0]
    held_tokens = (tiers > Tier.NOT_HELD).sum(dim=-1)
    as_is = retention.is_static | (budgets >= held_tokens) | (cut == 0)
    budgets = torch.where(as_is, budgets, cut).int()
    return replace(retention, scores=scores, tiers=tiers, budgets=budgets)


def _max_of(values: torch.Tensor, units: torch.Tensor, num_units: int) -> torch.Tensor:
    """Largest value of the token's unit, [H, n]; values are 0 or more."""
    largest = values.new_zeros(*values.shape[:-1], num_units)
    return largest.scatter_reduce_(-1, units, values, "amax").gather(-1, units)


def _keep_order(scores: torch.Tensor, tiers: torch.Tensor) -> torch.Tensor:
    """Tokens from the first to stay to the last: by tier, score, recency; int64 [H, n]."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = scores.shape[-1] - 1 - order
    by_tier = tiers.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, by_tier)
