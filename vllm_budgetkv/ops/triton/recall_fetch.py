"""The last launch of `recall`: copies the missing tokens from host memory to the free places."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.recall_narrow import (
    FREE_END,
    MISSING_END,
    NUM_RUN_FIELDS,
    START,
)
from vllm_budgetkv.ops.triton.recall_task import (
    EMPTY,
    MAX_RUNS,
    RUN_BITS,
    find_place,
    find_runs,
    share_places,
)
from vllm_budgetkv.ops.triton.tier import find_keys


@triton.jit
def fetch_kernel(
    index: tl.tuple,
    recalling: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    tier: tl.tuple,
    choice: tl.tuple,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    TIER_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
) -> None:
    """Grid [fetchers, H, R]: the n-th missing token of a head goes to its n-th free place.

    A place without a token, or whose token has no block, is empty then.
    """
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2)
    # fmt: off
    slot, _, count, used_runs, _ = find_runs(
        recalling, index, head, row, PAGE_WORDS, NUM_WORDS
    )
    # fmt: on
    if used_runs == 0:
        return
    task = row.to(tl.int64) * tl.num_programs(1) + head
    missing = choice.lists + task * 2 * choice.list_stride
    free = missing + choice.list_stride
    runs = choice.runs + task * recalling.num_runs * NUM_RUN_FIELDS
    starts = runs + START * recalling.num_runs
    missing_ends = runs + MISSING_END * recalling.num_runs
    free_ends = runs + FREE_END * recalling.num_runs
    all_missing = tl.load(missing_ends + used_runs - 1)
    all_free, num_new = tl.load(free_ends + used_runs - 1), count * 0
    table = tables.table + slot * tables.slot_stride + head * tables.head_stride
    step = tl.num_programs(0) * BLOCK_PLACES
    for first in range(tl.program_id(0) * BLOCK_PLACES, all_free, step):
        rank = first + tl.arange(0, BLOCK_PLACES)
        is_free, is_missing = rank < all_free, rank < tl.minimum(all_missing, all_free)
        run, begin = _find_run(free_ends, rank, is_free, used_runs)
        start, stop = share_places(count, run, used_runs)
        place = tl.load(free + start + rank - begin, mask=is_free, other=0)
        run, begin = _find_run(missing_ends, rank, is_missing, used_runs)
        start = tl.load(starts + run, mask=is_missing, other=0)
        token = tl.load(missing + start + rank - begin, mask=is_missing, other=EMPTY)
        # fmt: off
        num_new += _copy(
            pages, tier, index.num_pages, table, slot, head, place, token, is_free,
            TIER_TOKENS, PAGE_TOKENS, HEAD_SIZE, BLOCK_SIZE,
        )
        # fmt: on
    moved = recalling.moved + slot * recalling.moved_stride + head
    tl.atomic_add(moved, num_new, mask=num_new > 0, sem="relaxed")


@triton.jit
def _copy(
    pages: tl.tuple,
    tier: tl.tuple,
    num_pages: tl.tensor,
    table: tl.tensor,
    slot: tl.tensor,
    head: tl.tensor,
    place: tl.tensor,
    token: tl.tensor,
    mask: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Fills some places with a token each, or marks them empty; returns how many have a token."""
    channel = tl.arange(0, BLOCK_SIZE)
    page, word, is_place = find_place(pages, table, place, mask, num_pages, PAGE_TOKENS)
    source, found = find_keys(tier, slot, head, token, is_place, TIER_TOKENS)
    mask = found[:, None] & (channel < HEAD_SIZE)[None, :]
    keys = tier.data + source[:, None] + channel[None, :]
    new_keys = tl.load(keys, mask=mask, other=0.0)
    new_values = tl.load(keys + tier.part_stride, mask=mask, other=0.0)
    target = page * pages.stride + place % PAGE_TOKENS * HEAD_SIZE
    target = target[:, None] + channel[None, :]
    tl.store(pages.key + target, new_keys, mask=mask)
    tl.store(pages.value + target, new_values, mask=mask)
    tl.store(word, tl.where(found, token, EMPTY), mask=is_place)
    return tl.sum(found.to(tl.int32))


@triton.jit
def _find_run(
    ends: tl.tensor, rank: tl.tensor, mask: tl.tensor, used_runs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The run that some ranks are of, the first that ends behind each, and where it begins.

    By bisection: a comparison of all ranks with all runs would take most registers.
    """
    run, begin, step = rank * 0, rank * 0, used_runs * 0 + MAX_RUNS
    for _ in range(RUN_BITS):
        step //= 2
        next_run = run + step
        is_before = mask & (next_run < used_runs)
        end = tl.load(ends + next_run - 1, mask=is_before, other=0)
        is_before = is_before & (end <= rank)
        run, begin = tl.where(is_before, next_run, run), tl.where(is_before, end, begin)
    return run, begin
