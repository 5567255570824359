"""`snapkv`: attention of the most recent queries, pooled; equal budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.importance import pooled_attention
from vllm_budgetkv.policy.probe_source import RecentTokens
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class SnapKVPolicy(Policy):
    """SnapKV (https://arxiv.org/abs/2404.14469), applied chunk by chunk.

    The last `probe_tokens` queries of each chunk, text or vision, score everything that is held;
    the scores are max-pooled, and every head keeps its window and its best tokens. The query heads
    of a KV head are averaged.

    Unlike the paper, which compresses once behind the whole prompt: the question is not known while
    the video is cut, sinks and a cut frame stay too, and a query of the window also sees the few
    keys behind it. Without a probe the most recent tokens stay.
    """

    name: ClassVar[str] = "snapkv"
    needs_scores: ClassVar[bool] = True
    probe_source = RecentTokens
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        scores = pooled_attention(observation, self._options.pool_width_tokens)
        return keep_uniform(observation, scores, self._options)
