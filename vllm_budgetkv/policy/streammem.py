"""`streammem`: attention of the chat template, which asks for nothing in particular."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.importance import pooled_attention
from vllm_budgetkv.policy.probe_source import ChatTemplate
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class StreamMemPolicy(Policy):
    """StreamMem (https://arxiv.org/abs/2508.15717): a query-agnostic stand-in for the question.

    The queries of `<|im_end|>\\n<|im_start|>assistant\\n` score everything after each chunk, and
    every head keeps its best tokens. No later text replaces them, not even the question.

    Unlike the paper: the template runs once before the prompt and its queries are turned to the end
    of each chunk, instead of running behind each clip, so they have not seen the clip; scores are
    pooled like those of `SnapKVPolicy`; text is compressed too; and neither frames are merged, nor
    does a frame get a prototype, nor are positions scaled. Without a probe the most recent tokens
    stay.
    """

    name: ClassVar[str] = "streammem"
    needs_scores: ClassVar[bool] = True
    probe_source = ChatTemplate
    compresses: ClassVar[bool] = True

    @classmethod
    def check(cls, options: PolicyOptions, lookahead: bool = True) -> None:
        """See `Policy.check`."""
        super().check(options, lookahead)
        if not lookahead:
            raise ValueError(
                "--kv-policy streammem asks with what runs ahead: remove --no-kv-lookahead"
            )

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        scores = pooled_attention(observation, self._options.pool_width_tokens)
        return keep_uniform(observation, scores, self._options)
