"""Random caches of any size, built on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_budgetkv.arithmetic.layout import PageLayout, PagePool
from vllm_budgetkv.ops import FreeStack, PagedHeads

# NaN as one byte, which torch cannot fill with as a number
QUANTISED_NAN = 0x7F


@dataclass(frozen=True)
class Cache:
    """One layer's tables over a pool; shapes and dtypes as in docs/kv_layout.md."""

    pool: PagePool
    table: torch.Tensor
    lens: torch.Tensor
    free_pages: torch.Tensor
    num_free: torch.Tensor

    @property
    def heads(self) -> PagedHeads:
        """Of all slots."""
        return PagedHeads(self.pool, self.table, self.lens)

    @property
    def stack(self) -> FreeStack:
        """Of all slots."""
        return FreeStack(self.free_pages, self.num_free)

    def heads_of(self, slot: int) -> PagedHeads:
        return PagedHeads(self.pool, self.table[slot], self.lens[slot])

    def stack_of(self, slot: int) -> FreeStack:
        return FreeStack(self.free_pages[slot], self.num_free[slot : slot + 1])

    def room_to_choose(self) -> PagedHeads:
        """What `retrieve` fills where every slot is a row."""
        return PagedHeads(self.pool, torch.empty_like(self.table), torch.empty_like(self.lens))

    @property
    def head_tokens(self) -> int:
        """Tokens, summed over slots and heads."""
        return int(self.lens.sum())

    @property
    def head_pages(self) -> int:
        """Pages, summed over slots and heads."""
        page_tokens = self.pool.layout.page_tokens
        return int(((self.lens + page_tokens - 1) // page_tokens).sum())

    def clone(self) -> Cache:
        """A copy that shares no memory."""
        copy = self.snapshot()
        return replace(copy, pool=PagePool(self.pool.raw.clone(), self.pool.layout))

    def snapshot(self) -> Cache:
        """A copy of the tables over the same pool."""
        tables = (self.table, self.lens, self.free_pages, self.num_free)
        return Cache(self.pool, *(each.clone() for each in tables))

    def restore(self, saved: Cache) -> None:
        """Take back what ops did to the tables; the pool is left alone."""
        for name in ("table", "lens", "free_pages", "num_free"):
            getattr(self, name).copy_(getattr(saved, name))


def build_cache(
    lens: torch.Tensor,
    layout: PageLayout,
    device: torch.device,
    *,
    growth_tokens: int = 0,
    poison: bool = False,
) -> Cache:
    """Heads of random tokens in shuffled pages.

    Args:
        lens: int32 [S, H], tokens of each head.
        layout: of the pool.
        device: of everything.
        growth_tokens: by which every head may grow, with pages of the slot's free stack.
        poison: fill the slots that hold no token with NaN; not every peer survives it.
    """
    lens = lens.to(device)
    num_slots, num_heads = lens.shape
    page_tokens = layout.page_tokens
    held_pages = (lens + page_tokens - 1) // page_tokens
    spare = num_heads * -(-growth_tokens // page_tokens) + num_heads
    width = int(held_pages.max()) + -(-growth_tokens // page_tokens) + 1
    num_held = int(held_pages.sum())
    num_pages = num_held + num_slots * spare

    pages = torch.randperm(num_pages, device=device).int()
    index = torch.arange(width, device=device)
    is_held = index < held_pages[..., None]
    table = torch.full((num_slots, num_heads, width), -1, dtype=torch.int32, device=device)
    table[is_held] = pages[:num_held]
    # as high as a request's pages, so that a compaction can push all of them
    stack = torch.full((num_slots, spare + num_heads * width), -1, device=device).int()
    stack[:, :spare] = pages[num_held:].view(num_slots, spare)
    num_free = torch.full((num_slots,), spare, dtype=torch.int32, device=device)
    pool = PagePool(
        torch.empty(num_pages, layout.page_bytes, dtype=torch.uint8, device=device), layout
    )
    _fill(pool, table, lens, poison)
    return Cache(pool, table, lens, stack, num_free)


def _fill(pool: PagePool, table: torch.Tensor, lens: torch.Tensor, poison: bool) -> None:
    """Random keys and values, digests of no meaning, positions without gaps."""
    page_tokens, device = pool.layout.page_tokens, table.device
    for field in (pool.keys, pool.values):
        if pool.layout.is_quantised:
            field.copy_(torch.randn(field.shape, device=device))
        else:
            field.normal_()
    pool.digests.normal_().abs_()
    is_held = table >= 0
    slots = torch.arange(page_tokens, device=device)
    first = torch.arange(table.shape[2], device=device) * page_tokens
    token = first[:, None] + slots
    held = table[is_held].long()
    pool.positions.fill_(torch.iinfo(torch.int32).max)
    pool.positions[held] = token.int().expand(*table.shape, page_tokens)[is_held]
    if poison:
        empty = torch.ones(pool.num_pages, page_tokens, dtype=torch.bool, device=device)
        empty[held] = (token >= lens[..., None, None])[is_held]
        for field in (pool.keys, pool.values):
            if pool.layout.is_quantised:
                field.view(torch.uint8).masked_fill_(empty[..., None], QUANTISED_NAN)
            else:
                field.masked_fill_(empty[..., None], torch.nan)


def equal_lens(rows: int, heads: int, tokens: int) -> torch.Tensor:
    """int32 [rows, heads]."""
    return torch.full((rows, heads), tokens, dtype=torch.int32)


def ragged_lens(rows: int, heads: int, mean_tokens: int) -> torch.Tensor:
    """int32 [rows, heads] from a quarter to seven quarters of the mean; the total is exact."""
    shares = torch.linspace(0.25, 1.75, max(2, heads))[:heads].repeat(rows, 1)
    order = torch.rand(rows, heads).argsort(dim=1)
    lens = (shares.gather(1, order) * mean_tokens).int()
    lens[:, 0] += mean_tokens * heads - lens.sum(dim=1, dtype=torch.int32)
    return lens.clamp(min=1)
