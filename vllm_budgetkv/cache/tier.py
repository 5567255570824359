"""The second tier: host memory that keeps every token of the prompts that no quota holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.tables import NO_PAGE
from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.ops import TierLayer

if TYPE_CHECKING:
    from typing import Self

    from vllm_budgetkv.arithmetic.layout import PageLayout


@dataclass
class HostTier:
    """Blocks of N tokens of all layers and heads, allocated once. It changes through its verbs.

    Args:
        tokens: cache dtype [B, L, H, 2, N, D], keys and values; in pinned memory for a GPU.
        blocks: int32 [S, M] on the device, the blocks of each slot in the order of its tokens.
        poison: fill blocks that are free with NaN.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    poison: bool
    _free: list[int] = field(init=False)
    _held: dict[int, list[int]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._free = list(reversed(range(len(self.tokens))))
        if self.poison:
            self.tokens.fill_(torch.nan)

    @classmethod
    def empty(
        cls,
        layout: PageLayout,
        lens: torch.Tensor,
        *,
        host_bytes: int,
        longest_tokens: int,
        poison: bool,
    ) -> Self:
        """A tier that keeps nothing.

        Args:
            layout: of the pool's pages.
            lens: [S, L, H] on the device, for the sizes.
            host_bytes: of all blocks.
            longest_tokens: most tokens of a request.
            poison: see the class.
        """
        num_slots, num_layers, num_heads = lens.shape
        shape = (num_layers, num_heads, 2, layout.page_tokens, layout.head_size)
        num_blocks = host_bytes // (prod(shape) * layout.dtype.itemsize)
        on_gpu = lens.device.type == "cuda"
        tokens = torch.empty(num_blocks, *shape, dtype=layout.dtype, pin_memory=on_gpu)
        width_blocks = ceil_div(longest_tokens, layout.page_tokens)
        return cls(tokens, lens.new_full((num_slots, width_blocks), NO_PAGE), poison)

    @property
    def page_tokens(self) -> int:
        """Tokens of a block (N)."""
        return self.tokens.shape[-2]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.tokens[0].numel() * self.tokens.element_size()

    @property
    def num_free(self) -> int:
        """Blocks that no slot holds."""
        return len(self._free)

    @cached_property
    def _layers(self) -> list[TierLayer]:
        """Made once: a decode step asks for them in every layer."""
        return [TierLayer(tokens, self.blocks) for tokens in self.tokens.unbind(1)]

    def layer(self, layer: int) -> TierLayer:
        """One layer of all slots."""
        return self._layers[layer]

    def admit(self, slot: int, num_tokens: int) -> bool:
        """Take blocks for the tokens of a request; False, and none taken, if there are too few."""
        count = ceil_div(num_tokens, self.page_tokens)
        if count > min(len(self._free), self.blocks.shape[1]):
            return False
        taken = [self._free.pop() for _ in range(count)]
        self._held[slot] = taken
        self.blocks[slot, :count] = upload(taken, torch.int32, self.blocks.device)
        return True

    def release(self, slot: int) -> None:
        """Give up the blocks of a slot, if it has any."""
        given = self._held.pop(slot, [])
        self._free += reversed(given)
        self.blocks[slot] = NO_PAGE
        if self.poison and given:
            self.tokens[given] = torch.nan
