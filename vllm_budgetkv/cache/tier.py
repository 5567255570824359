"""The second tier: host memory that keeps every token of the prompts that no quota holds.

The scheduler says which blocks keep what (`arithmetic/host_blocks.py`); here are their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.tables import NO_PAGE
from vllm_budgetkv.cache.upload import upload
from vllm_budgetkv.ops import TierLayer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from vllm_budgetkv.arithmetic.host_blocks import HostPlace
    from vllm_budgetkv.arithmetic.layout import PageLayout


@dataclass
class HostTier:
    """Blocks of N tokens of all layers and heads, allocated once. It changes through its verbs.

    Args:
        tokens: [B, L, H, 2, N, D], keys and values as pages store them; in pinned memory for a GPU.
        blocks: int32 [S, M] on the device, the blocks of each slot in the order of its tokens.
        places: int32 [B, N] on the device, the largest rotary position of each token.
        poison: fill blocks with NaN before a request writes them.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor
    poison: bool

    def __post_init__(self) -> None:
        if self.poison:
            self.tokens.fill_(torch.nan)

    @classmethod
    def empty(
        cls,
        layout: PageLayout,
        lens: torch.Tensor,
        *,
        num_blocks: int,
        longest_tokens: int,
        poison: bool,
    ) -> Self:
        """A tier that keeps nothing.

        Args:
            layout: of the pool's pages.
            lens: [S, L, H] on the device, for the sizes.
            num_blocks: B.
            longest_tokens: most tokens of a request.
            poison: see the class.
        """
        num_slots, num_layers, num_heads = lens.shape
        shape = (num_layers, num_heads, 2, layout.page_tokens, layout.head_size)
        on_gpu = lens.device.type == "cuda"
        tokens = torch.empty(num_blocks, *shape, dtype=layout.kv_dtype, pin_memory=on_gpu)
        width_blocks = ceil_div(longest_tokens, layout.page_tokens)
        blocks = lens.new_full((num_slots, width_blocks), NO_PAGE)
        return cls(tokens, blocks, lens.new_zeros(num_blocks, layout.page_tokens), poison)

    @property
    def size(self) -> int:
        """All blocks (B)."""
        return len(self.tokens)

    @property
    def page_tokens(self) -> int:
        """Tokens of a block (N)."""
        return self.tokens.shape[-2]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.tokens[0].numel() * self.tokens.element_size()

    @cached_property
    def _layers(self) -> list[TierLayer]:
        """Made once: a decode step asks for them in every layer."""
        return [TierLayer(tokens, self.blocks) for tokens in self.tokens.unbind(1)]

    def layer(self, layer: int) -> TierLayer:
        """One layer of all slots."""
        return self._layers[layer]

    def prepare(self, places: Iterable[HostPlace]) -> None:
        """Make the blocks of requests ready for them, in the order of their admission.

        A block may be given to one request after another took a copy of its beginning.
        """
        for place in places:
            fresh = list(place.blocks[place.num_shared :])
            if self.poison and fresh:
                self.tokens[fresh] = torch.nan
            if place.tail_block is not None:
                self._copy(place.tail_block, fresh[0], place.num_tokens % self.page_tokens)

    def _copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of a block, through the device, which keeps the order of writes."""
        # the whole block: only what is contiguous is copied in that order, and not by the host
        staged = self.tokens[source].to(self.blocks.device, copy=True, non_blocking=True)
        self.tokens[target].copy_(staged, non_blocking=True)
        if self.poison:
            self.tokens[target, ..., num_tokens:, :] = torch.nan
        self.places[target, :num_tokens] = self.places[source, :num_tokens]

    def enter(self, slot: int, place: HostPlace) -> None:
        """Say which blocks keep the prompt of a slot."""
        taken = upload(place.blocks, torch.int32, self.blocks.device)
        self.blocks[slot, : len(place.blocks)] = taken

    def note_positions(self, slot: int, first: int, positions: torch.Tensor) -> None:
        """Note the rotary positions, int64 [n], of a slot's tokens from `first` on."""
        block, offset = self._find(slot, first, len(positions))
        self.places[block, offset] = positions.to(torch.int32)

    def largest_position(self, slot: int, first: int, stop: int) -> torch.Tensor:
        """int64 scalar: the largest rotary position of a slot's tokens [first, stop)."""
        return self.places[self._find(slot, first, stop - first)].max().long()

    def _find(self, slot: int, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        token = torch.arange(first, first + count, device=self.blocks.device)
        return self.blocks[slot, token // self.page_tokens].long(), token % self.page_tokens

    def release(self, slot: int) -> None:
        """Forget which blocks keep the prompt of a slot."""
        self.blocks[slot] = NO_PAGE
