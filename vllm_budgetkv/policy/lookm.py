"""`lookm`: text before vision, then attention; `lookm-*` merge what is dropped into what stays."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import (
    MergeMode,
    Observation,
    Policy,
    Retention,
    Tier,
)
from vllm_budgetkv.policy.probe_source import RecentTokens
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class LookMPolicy(Policy):
    """LOOK-M (https://arxiv.org/abs/2406.18139), applied chunk by chunk, without merging.

    Every head keeps its recent window, then text, then vision, the best of each by attention, which
    is neither pooled nor multiplied by value norms. All heads get the same budget.

    Unlike the paper:

    - The budget is a cap. The paper keeps all text whatever it costs; here text that does not fit
      goes by its score.
    - The score is the mean attention of the last `probe_tokens` queries of each chunk (SnapKV). The
      paper sums over the queries of the whole prompt (H2O). Here these never see all tokens at
      once: the sums would have to be carried from chunk to chunk, and old tokens would win.
    - Text is a tier. The paper's bias of -65,516 in half precision makes vision scores tie.
    - Sinks and a cut frame stay too, and the query heads of a KV head are averaged.
    - It compresses whatever exceeds the quota, with or without an image, also while decoding.

    Without a probe recency takes the place of attention.
    """

    name: ClassVar[str] = "lookm"
    needs_scores: ClassVar[bool] = True
    probe_source = RecentTokens
    compresses: ClassVar[bool] = True
    merge: ClassVar[MergeMode | None] = None
    """How dropped tokens are merged into kept ones."""

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        mass = observation.mass
        scores = mass if mass is not None else (observation.positions + 1).float()
        retention = keep_uniform(observation, scores, self._options)
        is_text = (retention.tiers == Tier.SCORED) & ~observation.is_vision
        tiers = retention.tiers.masked_fill(is_text, Tier.TEXT)
        return replace(retention, tiers=tiers, merge=self.merge)


class LookMAveragePolicy(LookMPolicy):
    """LOOK-M with averaged merging: a kept token becomes the mean of itself and its guests."""

    name: ClassVar[str] = "lookm-average"
    merge: ClassVar[MergeMode | None] = "average"


class LookMPivotPolicy(LookMPolicy):
    """LOOK-M with pivotal merging, its main variant: guests are averaged with the pivot first.

    Keys are merged as they are rotated. With M-RoPE a mean of keys from different places matches no
    query, so expect this, like the other `lookm-*`, to lose on Qwen's models.
    """

    name: ClassVar[str] = "lookm-pivot"
    merge: ClassVar[MergeMode | None] = "pivot"


class LookMWeightedPolicy(LookMPolicy):
    """LOOK-M with weighted merging: guests count by their cosine, unlike ones not at all.

    A position is left out if its cosine, a mean over the heads that drop it, is below the mean of
    all. The paper takes that mean over equal ranks of the heads' lists of dropped tokens, which
    are different positions as soon as heads keep different tokens.
    """

    name: ClassVar[str] = "lookm-weighted"
    merge: ClassVar[MergeMode | None] = "weighted"
