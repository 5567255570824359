"""What the launches of `recall` share: what a head recalls, its runs of tokens, and its places."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.index import count_tokens, find_shape

# runs of a head, at most, and how many bits tell them apart
MAX_RUNS: tl.constexpr = tl.constexpr(128)
RUN_BITS: tl.constexpr = tl.constexpr(7)
# the position of a place without a token
EMPTY: tl.constexpr = tl.constexpr(-1)


class Recalling(NamedTuple):
    """The rows of a step, [R] and [R + 1], and the counts [S, H] of what they move.

    A head holds at most `capacity_tokens` of the at most `most_tokens` in host memory. Its index is
    cut into at most `num_runs` runs of `run_pages` pages.
    """

    slots: Any
    query_start: Any
    num_slots: Any
    capacity_tokens: Any
    most_tokens: Any
    moved: Any
    moved_stride: Any
    run_pages: Any
    num_runs: Any


@triton.jit
def find_task(
    recalling: tl.tuple,
    index: tl.tuple,
    head: tl.tensor,
    row: tl.tensor,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Slot of a row, tokens of a head's index, and how many it recalls: 0 for nothing to do."""
    start = tl.load(recalling.query_start + row)
    slot = tl.load(recalling.slots + row).to(tl.int64)
    is_active = tl.load(recalling.query_start + row + 1) > start
    is_active = is_active & (slot >= 0) & (slot < recalling.num_slots)
    slot = tl.where(is_active, slot, 0)
    _, _, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    num_tokens = tl.minimum(count_tokens(index, slot, head, page_tokens), recalling.most_tokens)
    count = tl.load(index.num_recalled + slot * index.recalled_slot_stride + head)
    count = tl.minimum(tl.minimum(count, recalling.capacity_tokens), num_tokens)
    return slot, num_tokens, tl.where(is_active, count, 0)


@triton.jit
def find_runs(
    recalling: tl.tuple,
    index: tl.tuple,
    head: tl.tensor,
    row: tl.tensor,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What `find_task` says, how many runs a head's tokens are, and the tokens of a run.

    A head with nothing to do has no run.
    """
    slot, num_tokens, count = find_task(recalling, index, head, row, PAGE_WORDS, NUM_WORDS)
    _, _, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    run_tokens = recalling.run_pages * page_tokens
    used_runs = tl.where(count > 0, tl.cdiv(num_tokens, run_tokens), 0)
    return slot, num_tokens, count, used_runs, run_tokens


@triton.jit
def share_places(
    count: tl.tensor, run: tl.tensor, used_runs: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The places [first, stop) of a head that the program of one of its runs looks after."""
    share = tl.cdiv(count, used_runs)
    return tl.minimum(run * share, count), tl.minimum((run + 1) * share, count)


@triton.jit
def find_place(
    pages: tl.tuple,
    table: tl.tensor,
    place: tl.tensor,
    mask: tl.tensor,
    num_pages: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """int64 pages of some places, where their positions are, and which lie in the pool."""
    page = tl.load(table + place // PAGE_TOKENS, mask=mask, other=-1)
    mask = (page >= 0) & (page < num_pages)
    page = page.to(tl.int64)
    return page, pages.position + page * pages.word_stride + place % PAGE_TOKENS, mask
