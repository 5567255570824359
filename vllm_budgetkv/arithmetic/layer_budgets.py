"""Budgets that differ between layers, without a moment in which their sum is above the quota."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class LayerBudgets:
    """What each layer of one request may hold behind its last compression, tokens per head.

    The quota's bound counts on at most L * B tokens per head in all layers together, with B each
    before the first compression. Layers are compressed one after another, so a layer may take more
    than B only as far as others have given it up: it waits for the next compression to grow.

    Args:
        desired_tokens: what each layer should hold in the end; at least 1 of them is given.
        budget_tokens: mean over the layers (B).
        max_head_tokens: no layer may hold more.
        caps: what each layer may hold now; their sum is never above L * B. Mutated by `claim`.

    Raises:
        ValueError: the layers together want more than L * B, or a layer wants nothing.
    """

    desired_tokens: Sequence[int]
    budget_tokens: int
    max_head_tokens: int
    caps: list[int] = field(init=False)

    def __post_init__(self) -> None:
        total_tokens, least = sum(self.desired_tokens), min(self.desired_tokens)
        if total_tokens > self._total_tokens or least < 1:
            raise ValueError(
                f"layer budgets of {total_tokens} tokens in all, {least} the least, must be 1 or "
                f"more each and at most {len(self.desired_tokens)} * {self.budget_tokens} in all"
            )
        self.caps = [self.budget_tokens] * len(self.desired_tokens)

    @property
    def _total_tokens(self) -> int:
        return len(self.desired_tokens) * self.budget_tokens

    def claim(self, layer: int) -> int:
        """Tokens per head that `layer` may hold behind the compression that begins now."""
        free_tokens = self._total_tokens - sum(self.caps) + self.caps[layer]
        self.caps[layer] = min(self.desired_tokens[layer], self.max_head_tokens, free_tokens)
        return self.caps[layer]
