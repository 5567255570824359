"""`mark` in Triton: one launch, one program per run of index pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.arithmetic.index_page import ENTRY_TOKENS
from vllm_budgetkv.ops.triton.arguments import Pages, Tables
from vllm_budgetkv.ops.triton.index import WORD_BITS, Index, count_tokens, find_page, find_shape

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
    # marks of the coarsest entries
    most_words = triton.cdiv(layout.index_tokens(ENTRY_TOKENS[-1]), WORD_BITS.value)
    mark_kernel[(triton.cdiv(width_pages, RUN_PAGES), num_heads)](
        Tables.of(heads),
        Pages.of(heads.pool),
        Index.of(heads.pool, recalls),
        slot,
        heads.capacity_tokens,
        PAGE_TOKENS=layout.page_tokens,
        PAGE_WORDS=layout.page_words,
        NUM_WORDS=layout.code_words,
        RUN_PAGES=RUN_PAGES,
        BLOCK_WORDS=triton.next_power_of_2(most_words),
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["slot"])
def mark_kernel(
    tables: tl.tuple,
    pages: tl.tuple,
    index: tl.tuple,
    slot: tl.tensor,
    capacity_tokens: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    RUN_PAGES: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs of index pages, H]: clears the run's marks, then sets those of held tokens."""
    run, head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.cast(slot, tl.int64)
    _, entries, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    num_tokens = count_tokens(index, slot, head, page_tokens)
    first, stop = run * RUN_PAGES, (run + 1) * RUN_PAGES
    num_tokens = tl.minimum(num_tokens, stop * page_tokens)
    if num_tokens <= first * page_tokens:
        return
    marks = index.words + entries * NUM_WORDS
    word, num_words = tl.arange(0, BLOCK_WORDS), tl.cdiv(page_tokens, WORD_BITS)
    num_pages = tl.minimum(stop, tl.cdiv(num_tokens, page_tokens))
    for number in range(first, num_pages):
        page, is_page = find_page(index, slot, head, number, number < num_pages)
        nothing = tl.zeros([BLOCK_WORDS], tl.int32)
        is_word = word < tl.where(is_page, num_words, 0)
        tl.store(marks + page * index.word_stride + word, nothing, mask=is_word)
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
        where = pages.position + page * pages.word_stride + place % PAGE_TOKENS
        token = tl.load(where, mask=mask, other=-1)
        mask = (token >= first * page_tokens) & (token < num_tokens)
        page, mask = find_page(index, slot, head, token // page_tokens, mask)
        bit = token % page_tokens
        where = marks + page * index.word_stride + bit // WORD_BITS
        flag = tl.full([BLOCK_TOKENS], 1, tl.int32) << bit % WORD_BITS
        tl.atomic_or(where, flag, mask=mask, sem="relaxed")
