"""The second launch of `score`: attention to every token, top-k mass of every query head."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.online_softmax import with_sink
from vllm_budgetkv.ops.triton.ranking import (
    LOWEST_KEY,
    key_number,
    largest_key,
    raise_key,
    sort_key,
)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    work: tl.tuple,
    lens: tl.tensor,
    positions: tl.tensor,
    mass: tl.tensor,
    topk_mass: tl.tensor,
    sinks: tl.tensor,
    shares: tl.tensor,
    arrivals: tl.tensor,
    num_rows: tl.tensor,
    max_tokens: tl.tensor,
    num_runs: tl.tensor,
    top_k: tl.tensor,
    num_sinks: tl.tensor,
    NUM_QUERY_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    TAKES_LARGEST: tl.constexpr,
    IS_RESIDENT: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> None:
    """Grid [Hq * M + H * column blocks]: the top-k mass of one row, or the mass of some columns.

    The last row of a query head to finish takes the mean over its rows, in their order.
    """
    program, num_row_programs = tl.program_id(0), NUM_QUERY_HEADS * num_rows
    if program < num_row_programs:
        query_head = program // num_rows
        head = query_head // GROUP
        num_keys = tl.minimum(tl.load(lens + head), max_tokens)
        logits = work.logits + program.to(tl.int64) * max_tokens
        tokens = positions + head.to(tl.int64) * max_tokens
        # fmt: off
        share = _topk_share(
            logits, tokens, num_keys, num_sinks, top_k, BLOCK_KEYS, IS_RESIDENT
        )
        # fmt: on
        tl.store(shares + program, share)
        if arrives_last(arrivals + query_head, num_rows):
            row = tl.arange(0, BLOCK_ROWS)
            all_shares = shares + query_head * num_rows + row
            # volatile: other programs wrote them during this launch
            found = tl.load(all_shares, mask=row < num_rows, other=0.0, volatile=True)
            tl.store(topk_mass + query_head, tl.sum(found) / num_rows)
    else:
        column_blocks = tl.cdiv(max_tokens, BLOCK_COLUMNS)
        head = (program - num_row_programs) // column_blocks
        first = (program - num_row_programs) % column_blocks * BLOCK_COLUMNS
        column = first + tl.arange(0, BLOCK_COLUMNS)
        num_keys = tl.minimum(tl.load(lens + head), max_tokens)
        # fmt: off
        found = tl.zeros([BLOCK_COLUMNS], tl.float32)
        if TAKES_LARGEST:
            for query_head in range(head * GROUP, (head + 1) * GROUP):
                found += _mass(
                    work, sinks, num_rows, query_head * num_rows, num_rows, column, num_keys,
                    max_tokens, num_runs, BLOCK_RUNS, BLOCK_COLUMNS, True, HAS_SINKS,
                )
            found /= GROUP
        else:
            found = _mass(
                work, sinks, num_rows, head * GROUP * num_rows, GROUP * num_rows, column, num_keys,
                max_tokens, num_runs, BLOCK_RUNS, BLOCK_COLUMNS, False, HAS_SINKS,
            ) / (GROUP * num_rows)
        # fmt: on
        target = mass + head.to(tl.int64) * max_tokens + column
        tl.store(target, found, mask=column < max_tokens)


@triton.jit
def _mass(
    work: tl.tuple,
    sinks: tl.tensor,
    head_rows: tl.tensor,
    first_row: tl.tensor,
    num_rows: tl.tensor,
    column: tl.tensor,
    num_keys: tl.tensor,
    max_tokens: tl.tensor,
    num_runs: tl.tensor,
    BLOCK_RUNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TAKES_LARGEST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
) -> tl.tensor:
    """Sum, or largest, over rows of these columns' softmax weights; 0 from `num_keys` on."""
    BLOCK: tl.constexpr = 32
    run = tl.arange(0, BLOCK_RUNS)
    found = tl.zeros([BLOCK_COLUMNS], tl.float32)
    for start in range(0, num_rows, BLOCK):
        index = start + tl.arange(0, BLOCK)
        row, is_row = (first_row + index).to(tl.int64), index < num_rows
        at, mask = (
            row[:, None] * num_runs + run[None, :],
            is_row[:, None] & (run < num_runs)[None, :],
        )
        peaks = tl.load(work.peaks + at, mask=mask, other=float("-inf"))
        totals = tl.load(work.totals + at, mask=mask, other=0.0)
        peak = tl.max(peaks, 1)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(totals * tl.exp2(peaks - peak[:, None]), 1)
        if HAS_SINKS:
            sink = tl.load(sinks + row // head_rows, mask=is_row, other=0.0)
            total = with_sink(total, peak, sink)
        total = tl.where(total == 0.0, 1.0, total)
        mask = is_row[:, None] & (column < num_keys)[None, :]
        logits = work.logits + row[:, None] * max_tokens + column[None, :]
        weights = tl.exp2(tl.load(logits, mask=mask, other=float("-inf")) - peak[:, None])
        weights /= total[:, None]
        if TAKES_LARGEST:
            found = tl.maximum(found, tl.max(weights, 0))
        else:
            found += tl.sum(weights, 0)
    return found


@triton.jit
def _topk_share(
    logits: tl.tensor,
    positions: tl.tensor,
    num_keys: tl.tensor,
    num_sinks: tl.tensor,
    top_k: tl.tensor,
    BLOCK_KEYS: tl.constexpr,
    IS_RESIDENT: tl.constexpr,
) -> tl.tensor:
    """Share that the `top_k` largest weights have of all weights of one row, sinks taken out."""
    peak = tl.full([], float("-inf"), tl.float32)
    num_rest = tl.full([], 0, tl.int32)
    for first in range(0, num_keys, BLOCK_KEYS):
        rest = _rest(logits, positions, first, num_keys, num_sinks, BLOCK_KEYS)
        num_rest += tl.sum((rest > float("-inf")).to(tl.int32))
        peak = tl.maximum(peak, tl.max(rest))
    peak = tl.where(num_rest == 0, 0.0, peak)
    count = tl.minimum(top_k, num_rest)
    if IS_RESIDENT:
        rest = _rest(logits, positions, 0, num_keys, num_sinks, BLOCK_KEYS)
        bound = largest_key(sort_key(rest), count)
    else:
        bound = tl.full([], LOWEST_KEY, tl.int32)
        for step in range(32):
            tried = raise_key(bound, 31 - step)
            above = tl.full([], 0, tl.int32)
            for first in range(0, num_keys, BLOCK_KEYS):
                rest = _rest(logits, positions, first, num_keys, num_sinks, BLOCK_KEYS)
                above += tl.sum((sort_key(rest) >= tried).to(tl.int32))
            bound = tl.where(above >= count, tried, bound)
    total = tl.full([], 0.0, tl.float32)
    top = tl.full([], 0.0, tl.float32)
    above = tl.full([], 0, tl.int32)
    for first in range(0, num_keys, BLOCK_KEYS):
        rest = _rest(logits, positions, first, num_keys, num_sinks, BLOCK_KEYS)
        weights, is_above = tl.exp2(rest - peak), sort_key(rest) > bound
        total += tl.sum(weights)
        top += tl.sum(tl.where(is_above, weights, 0.0))
        above += tl.sum(is_above.to(tl.int32))
    # what ties at the bound is counted, not chosen
    top += (count - above) * tl.exp2(key_number(bound) - peak)
    return tl.where(num_rest == 0, 1.0, top / tl.where(num_rest == 0, 1.0, total))


@triton.jit
def _rest(
    logits: tl.tensor,
    positions: tl.tensor,
    first: tl.tensor,
    num_keys: tl.tensor,
    num_sinks: tl.tensor,
    BLOCK_KEYS: tl.constexpr,
) -> tl.tensor:
    """Logits from `first` on; minus infinity for sinks and behind the last key."""
    index = first + tl.arange(0, BLOCK_KEYS)
    position = tl.load(positions + index, mask=index < num_keys, other=-1)
    held = tl.load(logits + index, mask=index < num_keys, other=float("-inf"))
    return tl.where(position >= num_sinks, held, float("-inf"))
