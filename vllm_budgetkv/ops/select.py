"""`select`: which tokens of every head stay."""

from __future__ import annotations

import torch

from vllm_budgetkv.ops import backend, extension
from vllm_budgetkv.ops.reference.select import select as select_reference
from vllm_budgetkv.ops.require import require

# a kernel's sort key has 24 bits for the index of a token
MAX_SELECT_TOKENS = 1 << 24


def select(
    scores: torch.Tensor, tiers: torch.Tensor, lens: torch.Tensor, budgets: torch.Tensor
) -> torch.Tensor:
    """Keep exactly min(budget, len) tokens of every head: by tier, then score, then recency.

    The order is lexicographic. A tier is never added to a score: LOOK-M's additive bias in half
    precision makes the scores of its image tokens tie (https://arxiv.org/abs/2406.18139).
    Every head is on its own, so H may run over the heads of several layers.

    Args:
        scores: float32 [H, n], higher stays; NaN counts as minus infinity.
        tiers: uint8 [H, n], any token of a higher tier stays before one of a lower tier.
        lens: int32 [H], tokens that each head holds, at most n; what lies beyond is not looked at.
        budgets: int32 [H], tokens to keep; 0 or less keeps none.

    Returns:
        keep: bool [H, n], False beyond `lens`. Nothing is mutated.

    Raises:
        ValueError: a shape or dtype does not fit, or n is above `MAX_SELECT_TOKENS`.
    """
    require("scores", scores, torch.float32, (None, None))
    require("tiers", tiers, torch.uint8, scores.shape)
    require("lens", lens, torch.int32, (scores.shape[0],))
    require("budgets", budgets, torch.int32, (scores.shape[0],))
    if scores.shape[1] > MAX_SELECT_TOKENS:
        raise ValueError(
            f"scores have {scores.shape[1]} tokens per head; at most {MAX_SELECT_TOKENS} fit"
        )
    match backend.of(scores):
        case "reference":
            return select_reference(scores, tiers, lens, budgets)
        case "triton":
            from vllm_budgetkv.ops.triton.select import select as select_triton

            return select_triton(scores, tiers, lens, budgets)
        case "cpp":
            extension.load()
            return torch.ops.budgetkv.select(scores, tiers, lens, budgets)
