"""Page tables and free stacks of all request slots, on the device. Legend: docs/kv_layout.md."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from vllm_budgetkv import ops
from vllm_budgetkv.arithmetic.quota import ceil_div
from vllm_budgetkv.cache.upload import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_budgetkv.arithmetic.layout import BlockLayout, PagePool

NO_PAGE = -1


@dataclass(frozen=True)
class HeadTables:
    """Which head-pages every (slot, layer, head) holds, in the order of its tokens.

    Args:
        pool: the head-pages.
        blocks: which of them a block is.
        page_table: int32 [S, L, H, W].
        lens: int32 [S, L, H], tokens.
        free_pages: int32 [S, F], a stack per slot.
        num_free: int32 [S].
        is_retrieving: bool [S, L, H], heads that read only some of their pages in decode.
        is_static: bool [S, L, H], class of each head.
        concentration: float32 [S, L, H], share of the probe's attention on its top k tokens.
    """

    pool: PagePool
    blocks: BlockLayout
    page_table: torch.Tensor
    lens: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor
    is_retrieving: torch.Tensor
    is_static: torch.Tensor
    concentration: torch.Tensor

    @classmethod
    def empty(
        cls,
        pool: PagePool,
        *,
        num_slots: int,
        blocks: BlockLayout,
        width_pages: int,
        quota_blocks: int,
    ) -> HeadTables:
        """Tables of free slots.

        Args:
            pool: the head-pages.
            num_slots: S.
            blocks: which head-pages a block is, so how many layers and heads there are.
            width_pages: entries of a head's page table.
            quota_blocks: most blocks whose pages a request shares; 0 where none does.
        """
        shape = (num_slots, blocks.num_layers, blocks.num_heads)
        stack_pages, device = quota_blocks * blocks.used_pages, pool.raw.device

        def ids(*sizes: int, fill: int) -> torch.Tensor:
            return torch.full(sizes, fill, dtype=torch.int32, device=device)

        def flags(fill: bool) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.bool, device=device)

        return cls(
            pool=pool,
            blocks=blocks,
            page_table=ids(*shape, width_pages, fill=NO_PAGE),
            lens=ids(*shape, fill=0),
            free_pages=ids(num_slots, stack_pages, fill=NO_PAGE),
            num_free=ids(num_slots, fill=0),
            is_retrieving=flags(False),
            is_static=flags(True),
            concentration=torch.zeros(shape, device=device),
        )

    @property
    def num_layers(self) -> int:
        return self.lens.shape[1]

    @property
    def num_heads(self) -> int:
        return self.lens.shape[2]

    @cached_property
    def _layers(self) -> list[ops.PagedHeads]:
        """Made once: a decode step asks for them in every layer."""
        pairs = zip(self.page_table.unbind(1), self.lens.unbind(1), strict=True)
        return [ops.PagedHeads(self.pool, *pair) for pair in pairs]

    @cached_property
    def all_layers(self) -> ops.PagedHeads:
        """[S, L * H, W]: the heads of all layers of all slots, layer by layer."""
        return ops.PagedHeads(self.pool, self.page_table.flatten(1, 2), self.lens.flatten(1, 2))

    @cached_property
    def stack(self) -> ops.FreeStack:
        """The free stacks of all slots."""
        return ops.FreeStack(self.free_pages, self.num_free)

    def layer(self, layer: int) -> ops.PagedHeads:
        """[S, H, W]: the heads of one layer of all slots."""
        return self._layers[layer]

    def of(self, slot: int, layers: int | Sequence[int]) -> ops.PagedHeads:
        """[H, W]: the heads of one layer of one request, or of neighbouring layers, one by one.

        Args:
            slot: the request's slot.
            layers: one, or several that follow one another; then H runs over all of their heads.
        """
        table, lens = self.page_table[slot], self.lens[slot]
        if isinstance(layers, int):
            return ops.PagedHeads(self.pool, table[layers], lens[layers])
        rows = slice(layers[0], layers[-1] + 1)
        assert rows.stop - rows.start == len(layers)
        return ops.PagedHeads(self.pool, table[rows].flatten(0, 1), lens[rows].flatten())

    def stack_of(self, slot: int) -> ops.FreeStack:
        """The free stack of one request."""
        return ops.FreeStack(self.free_pages[slot], self.num_free[slot : slot + 1])

    @property
    def slot_bytes(self) -> int:
        """Bytes of all tables of one slot."""
        tensors = [self.page_table, self.lens, self.free_pages, self.num_free]
        tensors += [self.is_retrieving, self.is_static, self.concentration]
        return sum(t[0].numel() * t.element_size() for t in tensors)

    def pages_of(self, blocks: Sequence[int]) -> torch.Tensor:
        """int32 [L, H, len(blocks) * m]: the head-pages where each block's heads start."""
        return self.blocks.pages_of(upload(blocks, torch.int32, self.page_table.device))

    def extend_identity(self, slot: int, first_block: int, blocks: Sequence[int]) -> None:
        """Put blocks `first_block`, ... of a request in the identity state in its table."""
        if blocks:
            pages, start = self.pages_of(blocks), first_block * self.blocks.head_pages
            self.page_table[slot, :, :, start : start + pages.shape[-1]] = pages

    def set_identity_length(self, slot: int, num_tokens: int) -> None:
        """Say that every head already holds `num_tokens` tokens, as after a prefix-cache hit."""
        self.lens[slot] = num_tokens

    def share(self, slot: int, blocks: Sequence[int], held_tokens: int) -> None:
        """Turn a slot from identity to shared: its unused head-pages become its free stack.

        Args:
            slot: the request's slot.
            blocks: all block ids that the request holds.
            held_tokens: tokens that every head holds.
        """
        held_pages = ceil_div(held_tokens, self.pool.layout.page_tokens)
        free = self.pages_of(blocks)[..., held_pages:].flatten()
        self.page_table[slot, :, :, held_pages:] = NO_PAGE
        self.free_pages[slot, : free.numel()] = free
        self.num_free[slot] = free.numel()

    def take(self, slot: int, count: int) -> torch.Tensor:
        """int32 [count]: head-pages from the top of a slot's free stack, which has them."""
        pages = self._top(slot, count)
        self.num_free[slot] -= count
        return pages

    def lend(self, slot: int, count: int, *, checked: bool) -> torch.Tensor:
        """The same, but they stay free: what is written there is read before any is taken.

        Args:
            slot: the request's slot.
            count: of the pages.
            checked: ask the device whether there are as many.
        """
        assert not checked or int(self.num_free[slot]) >= count, "no room beside what is held"
        return self._top(slot, count)

    def _top(self, slot: int, count: int) -> torch.Tensor:
        top = self.num_free[slot] - 1 - torch.arange(count, device=self.num_free.device)
        return self.free_pages[slot][top.long()]

    def push_front(self, slot: int, pages: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Put whole pages in front of what heads hold.

        Args:
            slot: the request's slot.
            pages: int32 [L, H, C], of each head.
            num_tokens: int32 [L, H], tokens of them that count, whole pages.
        """
        table, column = self.page_table[slot], self._columns()
        from_column = column - (num_tokens // self.pool.layout.page_tokens)[..., None]
        behind = table.gather(-1, from_column.clamp(min=0))
        front = pages[..., column.clamp(max=pages.shape[-1] - 1)]
        table.copy_(torch.where(from_column < 0, front, behind))
        self.lens[slot] += num_tokens

    def pop_front(self, slot: int, num_tokens: torch.Tensor) -> None:
        """Take that many tokens, int32 [L, H], whole pages, from the front of what heads hold."""
        table, column = self.page_table[slot], self._columns()
        from_column = column + (num_tokens // self.pool.layout.page_tokens)[..., None]
        width_pages = table.shape[-1]
        left = table.gather(-1, from_column.clamp(max=width_pages - 1))
        table.copy_(left.masked_fill(from_column >= width_pages, NO_PAGE))
        self.lens[slot] -= num_tokens

    def _columns(self) -> torch.Tensor:
        return torch.arange(self.page_table.shape[-1], device=self.page_table.device)

    def reserve(self, rows: ops.BatchRows) -> None:
        """Take the pages of the next token of every head of all layers of some rows."""
        ops.reserve(self.all_layers, self.stack, rows)

    def restart(self, slot: int, blocks: Sequence[int]) -> None:
        """Let the heads of a slot hold nothing, in the identity state."""
        self.page_table[slot] = NO_PAGE
        self.lens[slot] = 0
        self.num_free[slot] = 0
        self.extend_identity(slot, 0, blocks)

    def release(self, slot: int) -> None:
        """Forget everything of a slot."""
        self.page_table[slot] = NO_PAGE
        self.lens[slot] = 0
        self.num_free[slot] = 0
        self.is_retrieving[slot] = False
        self.is_static[slot] = True
        self.concentration[slot] = 0.0
