"""`window`: sinks and the most recent tokens. The simplest policy, and the one to copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.pins import Pins

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class WindowPolicy(Policy):
    """StreamingLLM (https://arxiv.org/abs/2309.17453): all heads alike, no look at the content."""

    name: ClassVar[str] = "window"
    needs_scores: ClassVar[bool] = False
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`. The score is the position, so the most recent tokens stay."""
        budget_tokens = min(observation.budget_tokens, observation.max_head_tokens)
        return Retention(
            scores=(observation.positions + 1).float(),
            tiers=Pins.of(observation, self._options).tiers(observation.positions),
            budgets=observation.lens.clamp(max=budget_tokens),
            is_static=torch.ones_like(observation.lens, dtype=torch.bool),
        )
