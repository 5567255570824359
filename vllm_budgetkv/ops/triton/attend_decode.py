"""Decode attention: the keys of a row and head are cut into runs, and the runs joined.

The query heads of a group share one tile, so each key is read once. The cut depends on the table's
width alone, so a result does not depend on the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.online_softmax import (
    attend_keys,
    empty_state,
    mean,
    with_sink,
    with_sinks,
)
from vllm_budgetkv.ops.triton.scratch import scratch

if TYPE_CHECKING:
    import torch

    from vllm_budgetkv.arithmetic.layout import PageLayout

MIN_RUN_TOKENS = 256
# a table is cut in so many runs, unless they are longer than what joining more of them is worth
USUAL_RUNS, LONG_RUN_TOKENS = 32, 1024
# those of a wider one, so that a row alone gives each multiprocessor of a card two programs
MAX_RUNS = 64
# runs that are joined at once, for a tile of registers
MAX_BLOCK_RUNS = 32
# the smallest tile of queries that a matrix product takes
MIN_BLOCK_QUERIES = 16


class Runs(NamedTuple):
    """What each run of keys found, float32: sums [E, Hq, MAX, D], peaks and totals [E, Hq, MAX]."""

    sums: Any
    peaks: Any
    totals: Any

    @classmethod
    def empty(cls, count: int, num_query_heads: int, num_runs: int, like: torch.Tensor) -> Runs:
        """For `count` rows, or nearly nothing where one run is all and nothing is joined."""
        shape = (count, num_query_heads, num_runs) if num_runs > 1 else (1, 1, 1)
        return cls(
            scratch("sums of runs", (*shape, like.shape[-1]), like),
            scratch("peaks of runs", shape, like),
            scratch("totals of runs", shape, like),
        )


def run_tokens(width_pages: int, layout: PageLayout) -> int:
    """Keys of one run: at most `MAX_RUNS` of them cover the table."""
    capacity_tokens = width_pages * layout.page_tokens
    usual, least = (
        triton.next_power_of_2(triton.cdiv(capacity_tokens, num_runs))
        for num_runs in (USUAL_RUNS, MAX_RUNS)
    )
    return max(MIN_RUN_TOKENS, min(usual, LONG_RUN_TOKENS), least)


def block_runs(num_runs: int) -> int:
    """Runs that a join takes at once."""
    return min(MAX_BLOCK_RUNS, triton.next_power_of_2(num_runs))


def decode_options(layout: PageLayout) -> dict[str, int]:
    """Keys per step, warps and pipeline stages: 16 KiB of keys at a time."""
    key_bytes = triton.next_power_of_2(layout.head_size) * layout.dtype.itemsize
    block = max(16, min(64, 16384 // key_bytes))
    return {"BLOCK_KEYS": block, "num_warps": 4, "num_stages": 3 if block == 64 else 2}


@triton.jit
def decode_kernel(
    query: tl.tuple,
    out: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    slots: tl.tensor,
    query_start: tl.tensor,
    runs: tl.tuple,
    weighing: tl.tuple,
    RUN_TOKENS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    EVERY_ROW: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Grid [R, H, runs]: one run of keys for rows of one token, or with EVERY_ROW for any row."""
    row, head, run = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    if not EVERY_ROW and stop - start != 1:
        return
    slot = tl.load(slots + row).to(tl.int64)
    num_keys = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    entries = tables.table + slot * tables.slot_stride + head * tables.head_stride
    member, channel = tl.arange(0, BLOCK_QUERIES), tl.arange(0, BLOCK_SIZE)
    query_head = head * GROUP + member
    mask = (member < GROUP)[:, None] & (channel < HEAD_SIZE)[None, :]
    num_query_heads = tl.num_programs(1) * GROUP
    for index in range(0, stop - start):
        token = start.to(tl.int64) + index
        visible = num_keys - (stop - start - 1 - index)
        # what is in no run is a row that sees no key, and the join writes its zeros
        if (run * RUN_TOKENS < visible) | (NUM_RUNS == 1):
            vectors = token * query.stride + query_head[:, None] * query.head_stride
            queries = tl.load(query.data + vectors + channel[None, :], mask=mask, other=0.0)
            seen = tl.full([BLOCK_QUERIES], visible, tl.int32)
            stop_key = tl.minimum(visible, (run + 1) * RUN_TOKENS)
            # fmt: off
            sums, peak, total = attend_keys(
                empty_state(BLOCK_QUERIES, BLOCK_SIZE), queries, seen, run * RUN_TOKENS,
                stop_key, pages, entries, weighing, PAGE_TOKENS, HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS,
                DOT, True, CAPPED,
            )
            # fmt: on
            if NUM_RUNS == 1:
                is_head = member < GROUP
                total = with_sinks(total, peak, weighing, query_head, is_head, HAS_SINKS)
                vectors = token * out.stride + query_head[:, None] * out.head_stride
                answer = (mean(sums, total) * weighing.value_unit).to(out.data.dtype.element_ty)
                tl.store(out.data + vectors + channel[None, :], answer, mask=mask)
            else:
                entry = token if EVERY_ROW else row.to(tl.int64)
                found = (entry * num_query_heads + query_head) * NUM_RUNS + run
                tl.store(runs.peaks + found, peak, mask=member < GROUP)
                tl.store(runs.totals + found, total, mask=member < GROUP)
                at = found[:, None] * HEAD_SIZE + channel[None, :]
                tl.store(runs.sums + at, sums, mask=mask)


@triton.jit
def join_runs(
    out: tl.tuple,
    runs: tl.tuple,
    weighing: tl.tuple,
    entry: tl.tensor,
    token: tl.tensor,
    query_head: tl.tensor,
    num_query_heads: tl.tensor,
    visible: tl.tensor,
    RUN_TOKENS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Write one query head's output for one token that sees `visible` keys."""
    run, channel = tl.arange(0, BLOCK_RUNS), tl.arange(0, BLOCK_SIZE)
    found = (entry.to(tl.int64) * num_query_heads + query_head) * NUM_RUNS + run
    peak = tl.full([], float("-inf"), tl.float32)
    for first in range(0, NUM_RUNS, BLOCK_RUNS):
        is_found = (first + run) * RUN_TOKENS < visible
        peaks = tl.load(runs.peaks + first + found, mask=is_found, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(peaks))
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total, sums = tl.full([], 0.0, tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, NUM_RUNS, BLOCK_RUNS):
        is_found = (first + run) * RUN_TOKENS < visible
        peaks = tl.load(runs.peaks + first + found, mask=is_found, other=float("-inf"))
        weights = tl.exp2(peaks - peak)
        total += tl.sum(weights * tl.load(runs.totals + first + found, mask=is_found, other=0.0))
        mask = is_found[:, None] & (channel < HEAD_SIZE)[None, :]
        at = (first + found)[:, None] * HEAD_SIZE + channel[None, :]
        sums += tl.sum(weights[:, None] * tl.load(runs.sums + at, mask=mask, other=0.0), 0)
    if HAS_SINKS:
        total = with_sink(total, peak, tl.load(weighing.sinks + query_head))
    answer = sums / tl.where(total == 0.0, 1.0, total) * weighing.value_unit
    vector = out.data + token.to(tl.int64) * out.stride + query_head * out.head_stride
    answer = answer.to(out.data.dtype.element_ty)
    tl.store(vector + channel, answer, mask=channel < HEAD_SIZE)


@triton.jit
def join_kernel(
    out: tl.tuple,
    tables: tl.tuple,
    slots: tl.tensor,
    query_start: tl.tensor,
    runs: tl.tuple,
    weighing: tl.tuple,
    GROUP: tl.constexpr,
    RUN_TOKENS: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Grid [R, Hq]: joins the runs of every token, after `decode_kernel` with EVERY_ROW."""
    row, query_head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(query_start + row), tl.load(query_start + row + 1)
    slot = tl.load(slots + row).to(tl.int64)
    head = query_head // GROUP
    num_keys = tl.load(tables.lens + slot * tables.lens_slot_stride + head)
    for index in range(0, stop - start):
        token = start.to(tl.int64) + index
        visible = num_keys - (stop - start - 1 - index)
        # fmt: off
        join_runs(
            out, runs, weighing, token, token, query_head, tl.num_programs(1), visible,
            RUN_TOKENS, NUM_RUNS, BLOCK_RUNS, HEAD_SIZE, BLOCK_SIZE, HAS_SINKS,
        )
        # fmt: on
