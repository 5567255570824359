"""`ada-snapkv`: the scores of SnapKV, and heads that share a layer's budget by them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.budgets import allocate
from vllm_budgetkv.policy.importance import pooled_attention
from vllm_budgetkv.policy.probe_source import RecentTokens
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class AdaSnapKVPolicy(Policy):
    """Ada-KV (https://arxiv.org/abs/2407.11550, algorithm 1) on top of `SnapKVPolicy`.

    A head gets as many tokens as it has among the best of all heads of the layer, after
    `ada_floor_ratio` of the budget was split evenly. Unlike the paper pinned tokens do not compete,
    scores are normalised over the others, and what a head cannot use goes to the rest.
    """

    name: ClassVar[str] = "ada-snapkv"
    needs_scores: ClassVar[bool] = True
    probe_source = RecentTokens
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = replace(options, floor_ratio=options.ada_floor_ratio)
        self._page_tokens = page_tokens

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        scores = pooled_attention(observation, self._options.pool_width_tokens)
        kept = keep_uniform(observation, scores, self._options)
        if observation.fits:
            return kept
        budgets = allocate(
            observation, scores, kept.tiers, kept.is_static, self._options, self._page_tokens
        )
        return replace(kept, budgets=budgets)
