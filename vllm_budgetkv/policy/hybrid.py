"""`hybrid`: text-prior pruning on static heads, retrieval on dynamic heads, budgets by class."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_budgetkv.policy.base import Observation, Policy, Retention, Tier
from vllm_budgetkv.policy.budgets import allocate, share_of
from vllm_budgetkv.policy.classify import classify
from vllm_budgetkv.policy.importance import importance
from vllm_budgetkv.policy.pins import Pins
from vllm_budgetkv.policy.text_prior import prior_text
from vllm_budgetkv.policy.units import keep_whole_units
from vllm_budgetkv.policy.unlike import most_unlike

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.policy.options import PolicyOptions


class HybridPolicy(Policy):
    """HybridKV (https://arxiv.org/abs/2604.05887), applied chunk by chunk under a hard quota.

    All tokens, retained and new, are scored with the same probe at each call; nothing is summed
    over chunks, because old tokens would win by age.

    - Static heads keep sinks, the recent window and the frame that the chunk cuts; then, beside
      vision, text up to `text_share` of the budget that is left; then whatever scores best.
    - Dynamic heads keep the same pins, then whatever scores best, in units of
      `dynamic_unit_tokens`. At decode they read only the pages that fit the query.
    - In both, `unlike_share` of what is left goes to tokens with keys unlike the others: a question
      does not foresee what the later tokens of its answer will look up.
    - With `merge` the values of what goes are merged into kept tokens of like keys, in all heads.

    Raises:
        ValueError: `dynamic_unit_tokens` does not divide the page.
    """

    name: ClassVar[str] = "hybrid"
    needs_scores: ClassVar[bool] = True
    compresses: ClassVar[bool] = True
    retrieves: ClassVar[bool] = True
    takes_layers: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        if page_tokens % options.dynamic_unit_tokens:
            raise ValueError(
                f"--kv-tuning dynamic_unit_tokens is {options.dynamic_unit_tokens}; set it to a "
                f"divisor of the page of {page_tokens} tokens"
            )
        self.needs_contrast = options.unlike_share > 0
        self.takes_largest = options.takes_largest
        self._options = options
        self._page_tokens = page_tokens

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        options = self._options
        scores = importance(observation, self._reach_tokens(observation))
        is_static = classify(observation, options)
        tiers = Pins.of(observation, options).tiers(observation.positions)
        if observation.fits:
            budgets = observation.lens
            return Retention(scores=scores, tiers=tiers, budgets=budgets, is_static=is_static)
        budgets = allocate(observation, scores, tiers, is_static, options, self._page_tokens)
        tiers = self._raise_text(observation, scores, tiers, budgets, is_static)
        tiers = self._raise_unlike(observation, tiers, budgets, is_static)
        retention = Retention(
            scores=scores,
            tiers=tiers,
            budgets=budgets,
            is_static=is_static,
            merge=None if options.merge == "none" else options.merge,
        )
        if options.dynamic_unit_tokens == 1:
            return retention
        return keep_whole_units(
            retention, observation.positions, options.dynamic_unit_tokens, observation.seen_tokens
        )

    def _reach_tokens(self, observation: Observation) -> int:
        """How far attention is lent: less where a few tokens and neighbours would fill a budget."""
        return min(self._options.reach_tokens, observation.budget_tokens // 16)

    def _raise_text(
        self,
        observation: Observation,
        scores: torch.Tensor,
        tiers: torch.Tensor,
        budgets: torch.Tensor,
        is_static: torch.Tensor,
    ) -> torch.Tensor:
        """Raise the text that static heads prefer to vision to its tier. Mutates `tiers`."""
        if observation.text_tokens == 0:
            return tiers
        candidates = (tiers == Tier.SCORED) & ~observation.is_vision
        # of what the pins leave: half the budget for text and half for a frame would leave nothing;
        # where all is text, being text is no reason to stay before what scores better
        competes = is_static & observation.is_vision.any(dim=-1)
        caps = _share_of_open(budgets, tiers, self._options.text_share) * competes
        text = prior_text(observation, scores, candidates, caps)
        return tiers.masked_fill_(text, Tier.TEXT)

    def _raise_unlike(
        self,
        observation: Observation,
        tiers: torch.Tensor,
        budgets: torch.Tensor,
        is_static: torch.Tensor,
    ) -> torch.Tensor:
        """Raise tokens whose keys are unlike the others to their tier. Mutates `tiers`."""
        if observation.mass is None or self._options.unlike_share == 0:
            return tiers
        assert observation.contrast is not None
        share = self._options.unlike_share
        caps = _share_of_open(budgets, tiers, share)
        # on a dynamic head each of them takes its whole unit along
        caps = caps.where(is_static, caps // self._options.dynamic_unit_tokens)
        most = share_of(observation.max_head_tokens, share)
        unlike = most_unlike(observation.contrast, tiers == Tier.SCORED, caps, most)
        return tiers.masked_fill_(unlike, Tier.UNLIKE)


def _share_of_open(budgets: torch.Tensor, tiers: torch.Tensor, share: float) -> torch.Tensor:
    """That share of the tokens that raised ones leave in each head's budget, int [H]."""
    open_tokens = (budgets - (tiers > Tier.SCORED).sum(dim=-1)).clamp(min=0)
    return share_of(open_tokens, share)
