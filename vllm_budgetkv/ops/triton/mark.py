"""`mark` in Triton: one launch, one program per run of index pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Tables
from vllm_budgetkv.ops.triton.index import WORD_BITS, Index, count_tokens, find_page

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads, RecallHeads

# index pages of one program, which reads the positions of all tokens of its head
RUN_PAGES = 32
BLOCK_TOKENS = 1024


def mark(slot: int, heads: PagedHeads, recalls: RecallHeads) -> None:
    """See `vllm_budgetkv.ops.mark.mark`. A GPU cannot refuse: pages out of range are left out."""
    _, num_heads, width_pages = recalls.table.shape
    if num_heads == 0 or width_pages == 0:
        return
    layout = heads.pool.layout
    mark_kernel[(triton.cdiv(width_pages, RUN_PAGES), num_heads)](
        Tables.of(heads),
        Index.of(heads.pool, recalls),
        slot,
        heads.capacity_tokens,
        PAGE_TOKENS=layout.page_tokens,
        INDEX_TOKENS=layout.index_tokens,
        RUN_PAGES=RUN_PAGES,
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["slot"])
def mark_kernel(
    tables: tl.tuple,
    index: tl.tuple,
    slot: tl.tensor,
    capacity_tokens: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    INDEX_TOKENS: tl.constexpr,
    RUN_PAGES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs of index pages, H]: clears the run's marks, then sets those of held tokens."""
    run, head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cast(slot, tl.int64)
    num_tokens = count_tokens(index, slot, head, INDEX_TOKENS)
    first, stop = run * RUN_PAGES, (run + 1) * RUN_PAGES
    num_tokens = tl.minimum(num_tokens, stop * INDEX_TOKENS)
    if num_tokens <= first * INDEX_TOKENS:
        return
    entry, word = first + tl.arange(0, RUN_PAGES), tl.arange(0, PAGE_TOKENS)
    cleared, is_page = find_page(index, slot, head, entry, entry * INDEX_TOKENS < num_tokens)
    words = index.marks + cleared[:, None] * index.word_stride + word[None, :]
    nothing = tl.zeros([RUN_PAGES, PAGE_TOKENS], tl.int32)
    tl.store(words, nothing, mask=is_page[:, None])
    # every thread has cleared its words
    tl.debug_barrier()

    held = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    held = tl.minimum(held, capacity_tokens)
    skipped = tl.load(index.num_recalled + slot * index.recalled_slot_stride + head)
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride
    for begin in range(0, held, BLOCK_TOKENS):
        place = begin + tl.arange(0, BLOCK_TOKENS)
        mask = (place >= skipped) & (place < held)
        page = tl.load(entries + place // PAGE_TOKENS, mask=mask, other=-1).to(tl.int64)
        mask = (page >= 0) & (page < index.num_pages)
        where = index.marks + page * index.word_stride + place % PAGE_TOKENS
        token = tl.load(where, mask=mask, other=-1)
        mask = (token >= first * INDEX_TOKENS) & (token < num_tokens)
        page, mask = find_page(index, slot, head, token // INDEX_TOKENS, mask)
        bit = token % INDEX_TOKENS
        where = index.marks + page * index.word_stride + bit // WORD_BITS
        flag = tl.full([BLOCK_TOKENS], 1, tl.int32) << bit % WORD_BITS
        tl.atomic_or(where, flag, mask=mask, sem="relaxed")
