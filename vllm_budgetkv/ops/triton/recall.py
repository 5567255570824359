"""`recall` in Triton: six launches, whose grids follow from shapes alone.

The first two weigh the tokens. Those from the second to the fourth find the bound of the best of a
head by a radix search over programs, a digit each. The fifth lists what is missing and which places
are free, the sixth fetches.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton

from vllm_budgetkv.ops.triton import recall_task
from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, require_dense
from vllm_budgetkv.ops.triton.arrival import counters
from vllm_budgetkv.ops.triton.index import CODES_PER_WORD, Index
from vllm_budgetkv.ops.triton.recall_fetch import fetch_kernel
from vllm_budgetkv.ops.triton.recall_list import list_kernel
from vllm_budgetkv.ops.triton.recall_narrow import (
    LAST_BINS,
    NUM_BINS,
    NUM_BOUNDS,
    NUM_RUN_FIELDS,
    Choice,
    narrow_kernel,
)
from vllm_budgetkv.ops.triton.recall_rank import rank_kernel
from vllm_budgetkv.ops.triton.recall_settle import settle_kernel
from vllm_budgetkv.ops.triton.recall_task import Recalling
from vllm_budgetkv.ops.triton.recall_weigh import Weights, weigh_kernel
from vllm_budgetkv.ops.triton.scratch import scratch
from vllm_budgetkv.ops.triton.tier import Tier

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PageLayout
    from vllm_budgetkv.ops.views import BatchRows, PagedHeads, RecallHeads, TierLayer

# of the index pages of a head, each of one program
MAX_RUNS = recall_task.MAX_RUNS.value
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
    run_pages = triton.cdiv(width_pages, MAX_RUNS)
    num_runs = triton.cdiv(width_pages, run_pages)
    recalling = Recalling(
        *(rows.slots, rows.query_start, recalls.table.shape[0], heads.capacity_tokens),
        *(most_tokens, moved, moved.stride(0), run_pages, num_runs),
    )
    index, weights = Index.of(heads.pool, recalls), _weights(query, num_runs)
    choice = _choice(query, grid, num_runs, most_tokens, heads.capacity_tokens)
    places = (Pages.of(heads.pool), Tables.of(heads))
    shape = {"PAGE_WORDS": layout.page_words, "NUM_WORDS": layout.code_words}
    placed = shape | {"PAGE_TOKENS": layout.page_tokens}
    block_runs, scale = triton.next_power_of_2(num_runs), scale / math.log(2)
    by_run, codes = (num_runs, *grid), shape | _code_options(layout, query.shape[1] // num_heads)
    common = (Tokens.of(query), index, recalling, weights)
    weigh_kernel[by_run](*common, scale, **codes)
    rank_kernel[by_run](*common, choice, scale, BLOCK_RUNS=block_runs, **codes)
    narrow_kernel[by_run](index, recalling, *places, choice, **placed, num_warps=8)
    settle_kernel[by_run](index, recalling, choice, BLOCK_RUNS=block_runs, **shape, num_warps=8)
    list_kernel[by_run](
        index, recalling, *places, choice, BLOCK_RUNS=block_runs, **placed, num_warps=8
    )
    fetch_kernel[(min(MAX_FETCHERS, triton.cdiv(heads.capacity_tokens, BLOCK_PLACES)), *grid)](
        *(index, recalling, *places, Tier.of(tier), choice),
        **placed,
        TIER_TOKENS=tier.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_PLACES=BLOCK_PLACES,
        num_warps=4,
    )


def _weights(query: torch.Tensor, num_runs: int) -> Weights:
    shape = (*query.shape[:2], num_runs)
    return Weights(scratch("recall peaks", shape, query), scratch("recall totals", shape, query))


def _choice(
    query: torch.Tensor,
    heads_and_rows: tuple[int, int],
    num_runs: int,
    num_tokens: int,
    capacity_tokens: int,
) -> Choice:
    num_tasks = math.prod(heads_and_rows)

    def words(name: str, *shape: int) -> torch.Tensor:
        return scratch(name, (num_tasks, *shape), query).view(torch.int32)

    return Choice(
        words("recall keys", num_tokens),
        num_tokens,
        counters(num_tasks, query.device),
        counters(num_tasks * NUM_BINS.value, query.device),
        words("recall bounds", NUM_BOUNDS.value),
        words("recall runs", NUM_RUN_FIELDS.value, num_runs),
        words("recall tails", num_runs, LAST_BINS.value),
        words("recall lists", 2, capacity_tokens),
        capacity_tokens,
    )


def _code_options(layout: PageLayout, group: int) -> dict[str, Any]:
    """What the kernels that read codes are compiled for."""
    block_words = max(MIN_BLOCK_WORDS, triton.next_power_of_2(layout.code_words))
    block_codes = block_words * CODES_PER_WORD.value
    return {
        "GROUP": group,
        "HEAD_SIZE": layout.head_size,
        "BLOCK_SIZE": triton.next_power_of_2(layout.head_size),
        "BLOCK_GROUP": max(MIN_BLOCK_GROUP, triton.next_power_of_2(group)),
        "BLOCK_WORDS": block_words,
        "BLOCK_ENTRIES": min(MAX_BLOCK_ENTRIES, TILE_SIZE // block_codes),
        "num_warps": 8,
    }
