"""`pyramidkv`: the scores of SnapKV, and budgets that shrink from layer to layer."""

from __future__ import annotations

from typing import ClassVar

from vllm_budgetkv.policy.snapkv import SnapKVPolicy

STEEPNESS = 20
"""Mean over least budget of a layer, without its window (beta of the paper)."""


class PyramidKVPolicy(SnapKVPolicy):
    """PyramidKV (https://arxiv.org/abs/2406.02069): linear layer budgets over SnapKV's scores.

    The first layers see attention that is spread, the last ones attention that sits on few tokens.
    Each layer gets its window, and of the rest the last gets 1/20 of the mean and the first as much
    more than the mean. A layer gets its larger share at the second compression, once the others
    have shrunk.
    """

    name: ClassVar[str] = "pyramidkv"

    def layer_budgets(self, num_layers: int, num_heads: int, budget_tokens: int) -> tuple[int, ...]:
        """See `Policy.layer_budgets`."""
        if num_layers == 1:
            return (budget_tokens,)
        window_tokens = min(self._options.window_tokens, budget_tokens // 4)
        open_tokens = budget_tokens - window_tokens
        least = max(1, open_tokens // STEEPNESS)
        spread = 2 * (open_tokens - least)
        # rounded down, so their sum is at most that of equal budgets
        return tuple(
            window_tokens + least + spread * above // (num_layers - 1)
            for above in reversed(range(num_layers))
        )
