"""`random`: tokens by lot. What a policy must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions

WORD = 0xFFFFFFFF
MULTIPLIER = 0x45D9F3B
MAX_HEADS = 1 << 12


class RandomPolicy(Policy):
    """Sinks, the recent window and a random choice of the rest, with equal budgets.

    A token's lot is a hash of its position, its head, its layer and the seed, so it is the same at
    every call: what survives many chunks is one uniform sample of all tokens, not the youngest.
    """

    name: ClassVar[str] = "random"
    needs_scores: ClassVar[bool] = False
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        positions = observation.positions
        heads = torch.arange(observation.shape[0], device=positions.device)
        streams = mix(mix(heads + (observation.layer + 1) * MAX_HEADS) ^ self._options.seed & WORD)
        lots = mix(positions.long() & WORD ^ streams[:, None])
        # 24 bits fit a float32 exactly
        scores = (lots >> 8).float() / (1 << 24)
        scores.masked_fill_(positions < 0, 0.0)
        return keep_uniform(observation, scores, self._options)


def mix(words: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit words by two rounds of multiply and shift.

    Args:
        words: int64 [...], 0 to 2**32 - 1, so that no product is above 63 bits.

    Returns:
        int64 [...], 0 to 2**32 - 1, one to one. Nothing is mutated.
    """
    for _ in range(2):
        words = ((words >> 16) ^ words) * MULTIPLIER & WORD
    return (words >> 16) ^ words
