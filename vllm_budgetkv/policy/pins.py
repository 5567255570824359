"""Tokens that stay whatever their score: sinks, the recent window, a frame that a chunk cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.policy.base import Tier

if TYPE_CHECKING:
    from vllm_budgetkv.policy.base import Observation
    from vllm_budgetkv.policy.options import PolicyOptions


@dataclass(frozen=True)
class Pins:
    """Positions that are pinned, as host integers: equal for all heads of a layer.

    Attributes:
        sink_stop: positions below it are sinks.
        recent_start: positions from it on are the recent window.
        frame_start: positions from it on, up to the window, are the frame that the chunk cuts.
    """

    sink_stop: int
    recent_start: int
    frame_start: int

    @classmethod
    def of(cls, observation: Observation, options: PolicyOptions) -> Pins:
        """Pins of one request, each capped so that scored tokens keep room in a small budget."""
        budget_tokens, seen_tokens = observation.budget_tokens, observation.seen_tokens
        recent_start = seen_tokens - min(options.window_tokens, budget_tokens // 4)
        frame_room_tokens = int(options.frame_share * budget_tokens)
        frame_start = max(observation.protected_position, seen_tokens - frame_room_tokens)
        return cls(min(options.sink_tokens, budget_tokens // 4), recent_start, frame_start)

    def tiers(self, positions: torch.Tensor) -> torch.Tensor:
        """Tier of every token before text and vision are told apart.

        Args:
            positions: int32 [H, n], -1 where no token is held.

        Returns:
            uint8 [H, n] of `Tier`, never `Tier.TEXT`.
        """
        tiers = (positions >= 0).to(torch.uint8)  # Tier.NOT_HELD and Tier.SCORED
        held_sinks = tiers * (positions < self.sink_stop)
        tiers.masked_fill_(positions >= self.frame_start, Tier.FRAME)
        tiers.masked_fill_(positions >= self.recent_start, Tier.RECENT)
        # a chunk shorter than its pins reaches below position 0, where -1 marks tokens not held
        if min(self.frame_start, self.recent_start) < 0:
            tiers.masked_fill_(positions < 0, Tier.NOT_HELD)
        return tiers.masked_fill_(held_sinks.bool(), Tier.SINK)
