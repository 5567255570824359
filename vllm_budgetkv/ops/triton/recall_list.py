"""The fifth launch of `recall`: which tokens come back, and which places are free for them."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.recall_narrow import (
    BLOCK_KEYS,
    BLOCK_PLACES,
    FIRST_TIE,
    FREE_END,
    HELD,
    KEY,
    KEY_MASK,
    MISSING_END,
    NUM_BOUNDS,
    NUM_RUN_FIELDS,
    START,
    load_keys,
)
from vllm_budgetkv.ops.triton.recall_task import EMPTY, find_place, find_runs, share_places


@triton.jit
def list_kernel(
    index: tl.tuple,
    recalling: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    choice: tl.tuple,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: the missing tokens of a run, and the free ones of its share of places.

    Both ascend, so the lists of all runs, one behind the other, pair tokens and places. The last
    program of a head to finish says where the runs end in them.
    """
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # fmt: off
    slot, num_tokens, count, used_runs, run_tokens = find_runs(
        recalling, index, head, row, PAGE_WORDS, NUM_WORDS
    )
    # fmt: on
    if run >= used_runs:
        return
    task = row.to(tl.int64) * tl.num_programs(1) + head
    keys, bounds = choice.keys + task * choice.keys_stride, choice.bounds + task * NUM_BOUNDS
    bound, first_tie = tl.load(bounds + KEY), tl.load(bounds + FIRST_TIE)
    runs = choice.runs + task * recalling.num_runs * NUM_RUN_FIELDS
    missing_end = runs + MISSING_END * recalling.num_runs
    free_end = runs + FREE_END * recalling.num_runs
    missing = choice.lists + task * 2 * choice.list_stride
    free = missing + choice.list_stride

    first, stop = run * run_tokens, tl.minimum((run + 1) * run_tokens, num_tokens)
    missing += tl.load(runs + START * recalling.num_runs + run)
    num_missing = _list_missing(keys, missing, first, stop, bound, first_tie)
    tl.store(missing_end + run, num_missing)

    first, stop = share_places(count, run, used_runs)
    # fmt: off
    num_free = _list_free(
        pages, tables.table + slot * tables.slot_stride + head * tables.head_stride, keys, free,
        num_tokens, first, stop, bound, first_tie, index.num_pages,
        PAGE_TOKENS,
    )
    # fmt: on
    tl.store(free_end + run, num_free)
    if arrives_last(choice.arrivals + task, used_runs):
        _sum_up(missing_end, used_runs, BLOCK_RUNS)
        _sum_up(free_end, used_runs, BLOCK_RUNS)


@triton.jit
def _sum_up(counts: tl.tensor, used_runs: tl.tensor, BLOCK_RUNS: tl.constexpr) -> None:
    """Adds to the count of each run those of all before it."""
    run = tl.arange(0, BLOCK_RUNS)
    # volatile: other programs wrote them during this launch
    found = tl.load(counts + run, mask=run < used_runs, other=0, volatile=True)
    # every thread has read them
    tl.debug_barrier()
    tl.store(counts + run, tl.cumsum(found, 0), mask=run < used_runs)


@triton.jit
def _is_best(key: tl.tensor, token: tl.tensor, bound: tl.tensor, first_tie: tl.tensor) -> tl.tensor:
    is_best = (key > bound) | ((key == bound) & (token >= first_tie))
    return is_best & (key > HELD)


@triton.jit
def _list_missing(
    keys: tl.tensor,
    missing: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    bound: tl.tensor,
    first_tie: tl.tensor,
) -> tl.tensor:
    """Writes those of the best tokens that do not stand, ascending; returns how many they are."""
    num_missing = first * 0
    for start in range(first, stop, BLOCK_KEYS):
        token = start + tl.arange(0, BLOCK_KEYS)
        word = tl.load(keys + token, mask=token < stop, other=HELD)
        # the sign says that a token stands
        is_missing = (word >= 0) & _is_best(word & KEY_MASK, token, bound, first_tie)
        rank = num_missing + tl.cumsum(is_missing.to(tl.int32), 0) - 1
        tl.store(missing + rank, token, mask=is_missing)
        num_missing += tl.sum(is_missing.to(tl.int32))
    return num_missing


@triton.jit
def _list_free(
    pages: tl.tuple,
    table: tl.tensor,
    keys: tl.tensor,
    free: tl.tensor,
    num_tokens: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    bound: tl.tensor,
    first_tie: tl.tensor,
    num_pages: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
) -> tl.tensor:
    """Writes places in which none of the best tokens stands, ascending; returns how many."""
    num_free = first * 0
    for start in range(first, stop, BLOCK_PLACES):
        place = start + tl.arange(0, BLOCK_PLACES)
        page, word, is_place = find_place(pages, table, place, place < stop, num_pages, PAGE_TOKENS)
        token = tl.load(word, mask=is_place, other=EMPTY)
        key = load_keys(keys, token, (token >= 0) & (token < num_tokens))
        is_free = is_place & ~_is_best(key, token, bound, first_tie)
        rank = num_free + tl.cumsum(is_free.to(tl.int32), 0) - 1
        tl.store(free + first + rank, place, mask=is_free)
        num_free += tl.sum(is_free.to(tl.int32))
    return num_free
