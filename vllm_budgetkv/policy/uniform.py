"""The answer of policies that only rank tokens: equal budgets for all heads, pins above all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.policy.base import Retention
from vllm_budgetkv.policy.pins import Pins

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation
    from vllm_budgetkv.policy.options import PolicyOptions


def keep_uniform(
    observation: Observation, scores: torch.Tensor, options: PolicyOptions
) -> Retention:
    """Keep the pins, then the best tokens, equally many in every head.

    Args:
        observation: of one layer of one request.
        scores: float32 [H, n], higher stays; 0 beyond `lens`.
        options: `sink_tokens`, `window_tokens`, `frame_share`.

    Returns:
        Retention of static heads. Nothing is mutated.
    """
    budget_tokens = min(observation.budget_tokens, observation.max_head_tokens)
    return Retention(
        scores=scores,
        tiers=Pins.of(observation, options).tiers(observation.positions),
        budgets=observation.lens.clamp(max=budget_tokens),
        is_static=torch.ones_like(observation.lens, dtype=torch.bool),
    )
