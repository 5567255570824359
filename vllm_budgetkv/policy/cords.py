"""`cords`: a coreset that covers keys and values; no question, no attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_budgetkv.policy.base import Observation, Policy, Retention, Tier
from vllm_budgetkv.policy.coreset import rank, unit_scale
from vllm_budgetkv.policy.pins import Pins
from vllm_budgetkv.policy.uniform import keep_uniform

if TYPE_CHECKING:
    from vllm_budgetkv.policy.options import PolicyOptions


class CoRDSPolicy(Policy):
    """CoRDS (https://arxiv.org/abs/2605.14310): what represents the cache, and what is diverse.

    The paper's abstract names the parts: a coreset in a joint representation of key and value, an
    objective that balances coverage in both spaces, a diversity of orthogonal directions that is
    the greedy choice of a log-determinant, a protected recent window. Its formulas and constants
    were not at hand, so these are guesses:

    - a token is its key beside its value, each around the head's mean and scaled to the same mean
      norm, weighted by `coverage_value_share`;
    - coverage is the distance to the nearest token that stays (k centres, farthest first);
    - coverage and diversity are added, weighted by `diversity_share`;
    - the greedy choice is made in a fixed number of rounds instead of token by token; see
      `coreset.rank` for the formulas and what they cost.

    Unlike the paper, which compresses what was seen, text is chosen like vision; sinks and a cut
    frame stay too, and keys are rotated as they are stored.
    """

    name: ClassVar[str] = "cords"
    needs_scores: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    compresses: ClassVar[bool] = True

    def __init__(self, options: PolicyOptions, page_tokens: int) -> None:
        self._options = options

    def retain(self, observation: Observation) -> Retention:
        """See `Policy.retain`."""
        options, held = self._options, observation.positions >= 0
        pins = Pins.of(observation, options)
        # a token to start from also where nothing is pinned
        seeds = pins.tiers(observation.positions) >= Tier.RECENT
        seeds[:, 0] |= held[:, 0]
        scores = rank(
            points_of(observation, options.coverage_value_share),
            held,
            seeds,
            max_seeds=1 + pins.sink_stop + observation.seen_tokens - pins.recent_start,
            count=min(observation.budget_tokens, observation.max_head_tokens),
            diversity_share=options.diversity_share,
        )
        return keep_uniform(observation, scores, options)


def points_of(observation: Observation, value_share: float) -> torch.Tensor:
    """Keys beside values, float32 [H, n, 2 D] with a mean squared norm of 1."""
    assert observation.keys is not None and observation.values is not None
    held = observation.positions >= 0
    keys, values = (unit_scale(x, held) for x in (observation.keys, observation.values))
    return torch.cat((keys * (1 - value_share) ** 0.5, values * value_share**0.5), dim=-1)
