"""`attend_part` in Triton: tiles of query tokens over all keys that a head holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, Tables, Tokens, Weighing, require_dense
from vllm_budgetkv.ops.triton.attend_prefill import prefill_options
from vllm_budgetkv.ops.triton.online_softmax import attend_keys, empty_state, mean
from vllm_budgetkv.ops.triton.precision import dot_type
from vllm_budgetkv.ops.triton.rows import count_blocks, find_row, first_block
from vllm_budgetkv.ops.views import Softmax

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.ops.views import BatchRows, PagedHeads

LOG_2 = tl.constexpr(math.log(2))


def attend_part(
    query: torch.Tensor,
    heads: PagedHeads,
    rows: BatchRows,
    first_token: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """See `vllm_budgetkv.ops.attend_part.attend_part`."""
    num_tokens, num_query_heads, _ = query.shape
    num_rows, num_heads, layout = rows.slots.shape[0], heads.num_heads, heads.pool.layout
    if num_rows == 0 or num_tokens == 0:
        return
    numbers = (rows.slots, rows.query_start, rows.first_position)
    require_dense(slots=numbers[0], query_start=numbers[1], first_position=numbers[2], lse=lse)
    group, options = num_query_heads // num_heads, prefill_options(layout)
    blocks = count_blocks(num_tokens, num_rows, options["BLOCK_QUERIES"] // group)
    part_kernel[(blocks, num_heads)](
        Tokens.of(query),
        Tokens.of(out),
        lse,
        lse.stride(0),
        Pages.of(heads.pool),
        Tables.of(heads),
        *numbers,
        num_rows,
        first_token,
        Weighing.of(Softmax(scale), lse),
        GROUP=group,
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        DOT=dot_type(layout.dtype),
        **options,
    )


@triton.jit
def part_kernel(
    query: tl.tuple,
    out: tl.tuple,
    lse: tl.tensor,
    lse_stride: tl.tensor,
    pages: tl.tuple,
    tables: tl.tuple,
    slots: tl.tensor,
    query_start: tl.tensor,
    first_position: tl.tensor,
    num_rows: tl.tensor,
    first_token: tl.tensor,
    weighing: tl.tuple,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Grid [blocks, H]: one tile of a row."""
    BLOCK_TOKENS: tl.constexpr = BLOCK_QUERIES // GROUP
    block, head = tl.program_id(0), tl.program_id(1)
    row = find_row(query_start, num_rows, block, BLOCK_TOKENS)
    if row < 0:
        return
    start = tl.load(query_start + row)
    num_tokens = tl.load(query_start + row + 1) - start
    first = (block - first_block(query_start, row, BLOCK_TOKENS)) * BLOCK_TOKENS
    if first >= num_tokens:
        return
    slot = tl.load(slots + row).to(tl.int64)
    num_keys = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    index, channel = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_SIZE)
    token = first + index // GROUP
    is_query = (index < BLOCK_TOKENS * GROUP) & (token < num_tokens)
    mask = is_query[:, None] & (channel < HEAD_SIZE)[None, :]
    row_token, query_head = (start + token).to(tl.int64), head * GROUP + index % GROUP
    vectors = row_token * query.stride + query_head * query.head_stride
    queries = tl.load(query.data + vectors[:, None] + channel[None, :], mask=mask, other=0.0)

    # keys in front of the tile's first query are seen by all, those behind its last by none
    before = tl.load(first_position + row) - first_token
    visible = tl.minimum(before + token + 1, num_keys)
    all_see = tl.minimum(tl.maximum(before + first + 1, 0), num_keys) // BLOCK_KEYS * BLOCK_KEYS
    last = tl.minimum(before + tl.minimum(first + BLOCK_TOKENS, num_tokens), num_keys)
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride
    # fmt: off
    state = attend_keys(
        empty_state(BLOCK_QUERIES, BLOCK_SIZE), queries, visible, 0, all_see, pages,
        entries, weighing, PAGE_TOKENS, HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS, DOT, False, False,
    )
    sums, peak, total = attend_keys(
        state, queries, visible, all_see, last, pages, entries, weighing, PAGE_TOKENS,
        HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS, DOT, True, False,
    )
    # fmt: on
    vectors = row_token * out.stride + query_head * out.head_stride
    tl.store(out.data + vectors[:, None] + channel[None, :], mean(sums, total), mask=mask)
    # a query that sees nothing has the peak of minus infinity
    weight = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LOG_2
    tl.store(lse + row_token * lse_stride + query_head, weight, mask=is_query)
