"""`keydiff`: keys that differ from the others; no attention is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import Observation, Policy, Retention
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class KeyDiffPolicy(Policy):
    """KeyDiff (https://arxiv.org/abs/2504.15364): score -cos(k, mean of the normalised keys).

    The score is shifted by 1, so that it is 0 or more. Unlike the paper sinks, window and a cut
    frame stay.
    """

    name: ClassVar[str] = "keydiff"
    needs_scores: ClassVar[bool] = False
    needs_contrast: bool = True
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        assert observation.contrast is not None
        return keep_uniform(observation, observation.contrast, self._options)
