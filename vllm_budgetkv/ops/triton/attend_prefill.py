"""Prefill attention: tiles of query tokens, each with all query heads of a group, over all keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.attend_decode import join_runs
from vllm_budgetkv.ops.triton.online_softmax import (
    attend_keys,
    empty_state,
    mean,
    with_sinks,
)
from vllm_budgetkv.ops.triton.rows import find_row, first_block

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PageLayout


def prefill_options(layout: PageLayout) -> dict[str, int]:
    """Queries per tile, keys per step, warps and pipeline stages, by bytes of a padded key."""
    key_bytes = triton.next_power_of_2(layout.head_size) * layout.dtype.itemsize
    if layout.dtype.itemsize == 4:
        # products in full float32 run outside of the tensor cores and keep operands in registers
        queries, keys, warps, stages = (32, 32, 8, 2) if key_bytes <= 256 else (16, 32, 4, 1)
    elif key_bytes <= 256:
        queries, keys, warps, stages = 128, 64, 8, 3
    else:
        queries, keys, warps, stages = 64, 32, 4, 2
    return {
        "BLOCK_QUERIES": queries,
        "BLOCK_KEYS": keys,
        "num_warps": warps,
        "num_stages": stages,
    }


@triton.jit
def prefill_kernel(
    query: tl.tuple,
    out: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    slots: tl.tensor,
    query_start: tl.tensor,
    num_rows: tl.tensor,
    runs: tl.tuple,
    weighing: tl.tuple,
    ahead: tl.tensor,
    HAS_AHEAD: tl.constexpr,
    RUN_TOKENS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Grid [blocks, H]: one tile of a row of several tokens, or the join of a row of one token.

    Rows of one token were attended by `decode_kernel` in the launch before.
    """
    BLOCK_TOKENS: tl.constexpr = BLOCK_QUERIES // GROUP
    # the last tiles of a row see most keys, so they start first
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
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
    # fmt: off
    if num_tokens == 1:
        if NUM_RUNS > 1:
            for member in range(GROUP):
                join_runs(
                    out, runs, weighing, row, start, head * GROUP + member,
                    tl.num_programs(1) * GROUP, num_keys, RUN_TOKENS, NUM_RUNS, BLOCK_RUNS,
                    HEAD_SIZE, BLOCK_SIZE, HAS_SINKS,
                )
        return
    # fmt: on
    index, channel = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_SIZE)
    token = first + index // GROUP
    is_query = (index < BLOCK_TOKENS * GROUP) & (token < num_tokens)
    mask = is_query[:, None] & (channel < HEAD_SIZE)[None, :]
    row_token, query_head = (start + token).to(tl.int64), head * GROUP + index % GROUP
    vectors = row_token * query.stride + query_head * query.head_stride
    queries = tl.load(query.data + vectors[:, None] + channel[None, :], mask=mask, other=0.0)
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride
    # fmt: off
    visible, all_see, most = sight(
        ahead, start, first, token, is_query, num_tokens, num_keys, BLOCK_TOKENS, BLOCK_KEYS,
        HAS_AHEAD,
    )
    state = attend_keys(
        empty_state(BLOCK_QUERIES, BLOCK_SIZE), queries, visible, 0, all_see, pages,
        entries, weighing, PAGE_TOKENS, HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS, DOT, False, CAPPED,
    )
    sums, peak, total = attend_keys(
        state, queries, visible, all_see, most, pages, entries, weighing,
        PAGE_TOKENS, HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS, DOT, True, CAPPED,
    )
    # fmt: on
    total = with_sinks(total, peak, weighing, query_head, is_query, HAS_SINKS)
    vectors = row_token * out.stride + query_head * out.head_stride
    answer = (mean(sums, total) * weighing.value_unit).to(out.data.dtype.element_ty)
    tl.store(out.data + vectors[:, None] + channel[None, :], answer, mask=mask)


@triton.jit
def sight(
    ahead: tl.tensor,
    start: tl.tensor,
    first: tl.tensor,
    token: tl.tensor,
    is_query: tl.tensor,
    num_tokens: tl.tensor,
    num_keys: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_AHEAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys that each query of a tile sees, that all of them see at least, and that its last sees.

    The tile begins at token `first` of a row that begins at `start`.
    """
    last = tl.minimum(first + BLOCK_TOKENS, num_tokens)
    visible = num_keys - num_tokens + token + 1
    most = num_keys - num_tokens + last
    if HAS_AHEAD:
        visible += tl.load(ahead + start + token, mask=is_query, other=0)
        most += tl.load(ahead + start + last - 1)
    all_see = tl.maximum(num_keys - num_tokens + first + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    return visible, all_see, most
