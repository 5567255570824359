"""`recall` in Triton: one launch weighs the tokens, one chooses among them, one fetches them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, require_dense
from vllm_budgetkv.ops.triton.arrival import counters
from vllm_budgetkv.ops.triton.index import CODES_PER_WORD, Index
from vllm_budgetkv.ops.triton.recall_assign import FIRST_NEW
from vllm_budgetkv.ops.triton.recall_choose import choose_kernel
from vllm_budgetkv.ops.triton.recall_weigh import Recalling, Weights, find_task, weigh_kernel
from vllm_budgetkv.ops.triton.scratch import scratch
from vllm_budgetkv.ops.triton.tier import Tier, find_keys

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PageLayout
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, RecallHeads, TierLayer

# of the index pages of a head, each of one program
MAX_RUNS = 64
# elements of a tile of codes
TILE_SIZE = 4096
MAX_BLOCK_ENTRIES = 128
# at least as many rows of a matrix product, and as many words of codes
MIN_BLOCK_GROUP, MIN_BLOCK_WORDS = 16, 2
# programs that fetch the tokens of a head, so that their reads of host memory overlap
MAX_FETCHERS = 16
BLOCK_PLACES = 32


def recall(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    recalls: RecallHeads,
    tier: TierLayer,
    scale: float,
    moved: torch.Tensor,
) -> None:
    """See `vllm_budgetkv.ops.recall.recall`.

    A GPU cannot refuse: what is out of range is neither read nor written, and where a head lacks
    less than it recalls, or a token has no block, places stay empty.
    """
    num_rows, (_, num_heads, width_pages) = rows.slots.shape[0], recalls.table.shape
    if num_rows == 0 or num_heads == 0 or width_pages == 0 or heads.width_pages == 0:
        return
    require_dense(slots=rows.slots, query_start=rows.query_start, moved=moved)
    layout, grid = heads.pool.layout, (num_heads, num_rows)
    most_tokens = tier.blocks.shape[1] * tier.page_tokens
    recalling = Recalling(
        *(rows.slots, rows.query_start, recalls.table.shape[0], heads.capacity_tokens),
        *(most_tokens, moved, moved.stride(0)),
    )
    run_pages = triton.cdiv(width_pages, MAX_RUNS)
    num_runs, index = triton.cdiv(width_pages, run_pages), Index.of(heads.pool, recalls)
    weights = _weights(query, grid, num_runs, most_tokens)
    pages, tables, host = Pages.of(heads.pool), Tables.of(heads), Tier.of(tier)
    common = (Tokens.of(query), index, recalling, weights, run_pages, num_runs)
    options = _options(layout, query.shape[1] // num_heads)
    weigh_kernel[(num_runs, *grid)](*common, scale / math.log(2), **options)
    choose_kernel[(num_runs, *grid)](
        *common,
        scale / math.log(2),
        *(pages, tables, host, counters(num_heads * num_rows, query.device)),
        TIER_TOKENS=tier.page_tokens,
        PAGE_TOKENS=layout.page_tokens,
        BLOCK_RUNS=triton.next_power_of_2(num_runs),
        **options,
    )
    fetch_kernel[(min(MAX_FETCHERS, triton.cdiv(heads.capacity_tokens, BLOCK_PLACES)), *grid)](
        *(index, recalling, pages, tables, host),
        PAGE_WORDS=layout.page_words,
        NUM_WORDS=layout.code_words,
        TIER_TOKENS=tier.page_tokens,
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_PLACES=BLOCK_PLACES,
        num_warps=4,
    )


def _weights(
    query: torch.Tensor, heads_and_rows: tuple[int, int], num_runs: int, num_tokens: int
) -> Weights:
    num_heads, num_rows = heads_and_rows
    runs = (num_rows, query.shape[1], num_runs)
    keys = scratch("recall keys", (num_rows, num_heads, num_tokens), query)
    return Weights(
        scratch("recall peaks", runs, query),
        scratch("recall totals", runs, query),
        keys.view(torch.int32),
        num_tokens,
    )


def _options(layout: PageLayout, group: int) -> dict[str, Any]:
    """What the kernels that read codes are compiled for."""
    block_words = max(MIN_BLOCK_WORDS, triton.next_power_of_2(layout.code_words))
    block_codes = block_words * CODES_PER_WORD.value
    return {
        "GROUP": group,
        "PAGE_WORDS": layout.page_words,
        "HEAD_SIZE": layout.head_size,
        "NUM_WORDS": layout.code_words,
        "BLOCK_SIZE": triton.next_power_of_2(layout.head_size),
        "BLOCK_GROUP": max(MIN_BLOCK_GROUP, triton.next_power_of_2(group)),
        "BLOCK_WORDS": block_words,
        "BLOCK_ENTRIES": min(MAX_BLOCK_ENTRIES, TILE_SIZE // block_codes),
        "num_warps": 8,
    }


@triton.jit
def fetch_kernel(
    index: tl.tuple,
    recalling: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    tier: tl.tuple,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    TIER_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
) -> None:
    """Grid [fetchers, H, R]: copies the tokens that `choose_kernel` gave places to."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot, _, num_places = find_task(recalling, index, head, row, PAGE_WORDS, NUM_WORDS)
    table = tables.table + slot * tables.slot_stride + head * tables.head_stride
    channel = tl.arange(0, BLOCK_SIZE)
    stride = tl.num_programs(0) * BLOCK_PLACES
    for first in range(tl.program_id(0) * BLOCK_PLACES, num_places, stride):
        place = first + tl.arange(0, BLOCK_PLACES)
        page = tl.load(table + place // PAGE_TOKENS, mask=place < num_places, other=-1)
        mask = (page >= 0) & (page < index.num_pages)
        page, offset = page.to(tl.int64), place % PAGE_TOKENS
        word = pages.position + page * pages.word_stride + offset
        token = -tl.load(word, mask=mask, other=-1) + FIRST_NEW
        source, found = find_keys(tier, slot, head, token, mask, TIER_TOKENS)
        mask = found[:, None] & (channel < HEAD_SIZE)[None, :]
        keys = tier.data + source[:, None] + channel[None, :]
        new_keys = tl.load(keys, mask=mask, other=0.0)
        new_values = tl.load(keys + tier.part_stride, mask=mask, other=0.0)
        target = (page * pages.stride + offset * HEAD_SIZE)[:, None] + channel[None, :]
        tl.store(pages.key + target, new_keys, mask=mask)
        tl.store(pages.value + target, new_values, mask=mask)
        # every thread has read the positions
        tl.debug_barrier()
        tl.store(word, token, mask=found)
