"""Reference of `compact`: the spec of the kernels, in plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_budgetkv.ops.reference.tokens import locate_pages, locate_tokens

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import FreeStack, PagedHeads


def compact(keep: torch.Tensor, heads: PagedHeads, stack: FreeStack, poison: bool) -> None:
    """See `vllm_budgetkv.ops.compact.compact`."""
    pool, num_tokens = heads.pool, keep.shape[1]
    pages, offsets, held = locate_tokens(heads, num_tokens)
    survives = keep & held
    kept_lens = survives.sum(dim=1, dtype=torch.int32)

    source = (~survives).byte().argsort(dim=1, stable=True)
    target = torch.arange(num_tokens, device=keep.device) < kept_lens[:, None]
    from_slots = pages.gather(1, source)[target], offsets.gather(1, source)[target]
    to_slots = pages[target], offsets[target]
    for field in (pool.keys, pool.values, pool.positions):
        field[to_slots] = field[from_slots]

    freed = _free_pages(kept_lens, heads, stack)
    if poison:
        pool.poison(freed)
        _poison_tails(heads)


def _free_pages(kept_lens: torch.Tensor, heads: PagedHeads, stack: FreeStack) -> torch.Tensor:
    """Push the pages behind the survivors: heads ascending, pages ascending. Returns them."""
    (_, table, lens), (free_pages, num_free) = heads, stack
    surplus = locate_pages(lens, heads.page_tokens, heads.width_pages)
    surplus &= ~locate_pages(kept_lens, heads.page_tokens, heads.width_pages)
    freed = table[surplus]
    free_pages[num_free + torch.arange(len(freed), device=table.device)] = freed
    num_free += len(freed)
    table.masked_fill_(surplus, -1)
    lens.copy_(kept_lens)
    return freed


def _poison_tails(heads: PagedHeads) -> None:
    """Fill the slots behind the last token of every head's last page."""
    (pool, table, lens), page_tokens = heads, heads.page_tokens
    last = (lens.long() - 1).clamp(min=0) // page_tokens
    pages = table.gather(1, last[:, None]).long().expand(-1, page_tokens)
    offsets = torch.arange(page_tokens, device=table.device).expand_as(pages)
    tail = (lens > 0)[:, None] & (last[:, None] * page_tokens + offsets >= lens[:, None])
    slots = pages[tail], offsets[tail]
    pool.keys[slots] = torch.nan
    pool.values[slots] = torch.nan
    pool.positions[slots] = torch.iinfo(torch.int32).max
