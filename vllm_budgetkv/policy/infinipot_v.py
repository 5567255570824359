"""`infinipot-v`: what recent frames do not repeat, and what has a large value; no query."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import normalize

from vllm_budgetkv.policy.base import Observation, Policy, Retention, Tier
from vllm_budgetkv.policy.importance import average_runs, run_index
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class InfiniPotVPolicy(Policy):
    """InfiniPot-V (https://arxiv.org/abs/2506.15745): TaR and VaN, half of the tokens each.

    Every head keeps its pins, the most recent frames up to `recent_frames_share` of the budget, all
    text, and of the other vision tokens `redundancy_share` by TaR and the rest by VaN:

    - TaR: -mean cosine of the token's key with the keys of the same patch in the recent frames. A
      patch without a counterpart there is new: 0.
    - VaN: L2 norm of the value, average-pooled over neighbours.

    Both rank the tokens, and the two lists are merged from the top, so a token that is high in both
    makes room for one more of each.

    Unlike the reference code: the pool has one width for all layers; text counts against the budget
    and is cut by VaN once it exceeds it; keys are rotated as they are stored.
    """

    name: ClassVar[str] = "infinipot-v"
    needs_scores: ClassVar[bool] = False
    needs_value_norms: ClassVar[bool] = True
    needs_keys: ClassVar[bool] = True
    needs_frames: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        options, held = self._options, observation.positions >= 0
        assert observation.value_norms is not None
        recent = recent_frames(observation, options.recent_frames_share)
        reach_tokens = options.pool_width_tokens // 2
        norms = average_runs(observation.value_norms, run_index(observation), reach_tokens)
        by_norm = ranks(norms.masked_fill(~held, -torch.inf))
        # text has no patch: only its values speak for it
        is_new = novelty(observation, recent).masked_fill(~observation.is_vision, -torch.inf)
        share = options.redundancy_share
        turns = torch.minimum(_turns(ranks(is_new), share), _turns(by_norm, 1 - share))
        turns = torch.where(observation.is_vision, turns, by_norm.float())
        scores = (1 / (1 + turns)).masked_fill(~held, 0.0)
        kept = keep_uniform(observation, scores, options)
        text = (kept.tiers == Tier.SCORED) & ~observation.is_vision
        tiers = kept.tiers.masked_fill(text, Tier.TEXT)
        recent = recent & (tiers == Tier.SCORED)
        return replace(kept, tiers=tiers.masked_fill(recent, Tier.FRAME))


def recent_frames(observation: Observation, share: float) -> torch.Tensor:
    """The most recent whole frames that fit `share` of the budget, and at least the last one.

    Returns:
        bool [H, n]; all heads hold the newest vision tokens, so they agree on the frames.
    """
    assert observation.frame_ids is not None
    is_vision, frame_ids = observation.is_vision, observation.frame_ids
    from_end = is_vision.flip(1).cumsum(dim=1).flip(1)
    outside = is_vision & (from_end > int(share * observation.budget_tokens))
    # the newest frame with a token outside does not fit
    newest_cut = frame_ids.masked_fill(~outside, -1).amax(dim=1, keepdim=True)
    newest = frame_ids.amax(dim=1, keepdim=True)
    return is_vision & (frame_ids > torch.minimum(newest_cut, newest - 1))


def novelty(observation: Observation, recent: torch.Tensor) -> torch.Tensor:
    """TaR: -mean cosine with the recent keys of the same patch, 0 where there is none.

    The mean of cosines is the product with the mean direction, so nothing is compared in pairs.

    Args:
        observation: `keys`, `patch_ids` and `num_patches` are read.
        recent: bool [H, n], tokens of the recent frames.

    Returns:
        float32 [H, n], -1 to 1.
    """
    assert observation.keys is not None and observation.patch_ids is not None
    directions = normalize(observation.keys.float(), dim=-1)
    num_heads, _, head_size = directions.shape
    patches = observation.patch_ids.long()
    sums = directions.new_zeros(num_heads, observation.num_patches, head_size)
    index = patches[..., None].expand_as(directions)
    sums.scatter_add_(1, index, directions * recent[..., None])
    counts = directions.new_zeros(num_heads, observation.num_patches)
    counts.scatter_add_(1, patches, recent.float())
    means = sums / counts.clamp(min=1)[..., None]
    return -(directions * means.gather(1, index)).sum(dim=-1)


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Rank of each token from the best, 0, on; equal scores by recency. int64 [H, n]."""
    last = scores.shape[1] - 1
    order = last - scores.flip(1).argsort(dim=1, descending=True, stable=True)
    index = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, index)


def _turns(rank: torch.Tensor, share: float) -> torch.Tensor:
    """When the token of a list gets its seat, if the list gets `share` of all seats."""
    return rank / share if share > 0 else torch.full_like(rank, torch.inf, dtype=torch.float32)
