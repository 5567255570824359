"""How `recall` finds the best tokens of a head and gives places to those that are not there."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.ranking import LOWEST_KEY
from vllm_budgetkv.ops.triton.tier import find_keys

BLOCK_KEYS: tl.constexpr = tl.constexpr(2048)
BLOCK_PLACES: tl.constexpr = tl.constexpr(256)
# a key is found digit by digit
DIGIT_BITS: tl.constexpr = tl.constexpr(8)
NUM_BINS: tl.constexpr = tl.constexpr(1 << 8)
NUM_DIGITS: tl.constexpr = tl.constexpr(4)
# of a place without a token
EMPTY: tl.constexpr = tl.constexpr(-1)
# less the number of a token, the position of a place that the token is yet to be fetched to
FIRST_NEW: tl.constexpr = tl.constexpr(-2)


@triton.jit
def assign_places(
    pages: tl.tuple,
    tables: tl.tuple,
    tier: tl.tuple,
    keys: tl.tensor,
    slot: tl.tensor,
    head: tl.tensor,
    num_tokens: tl.tensor,
    count: tl.tensor,
    num_pages: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
) -> tl.tensor:
    """Writes to the positions of a head's recall pages what is to stand there; how many are new.

    One program does it for a head. `keys`, int32 [num_tokens], are destroyed.
    """
    bound, first_tie = _find_bound(keys, num_tokens, count)
    table = tables.table + slot * tables.slot_stride + head * tables.head_stride
    for first in range(0, count, BLOCK_PLACES):
        word, mask = _find_place(pages, table, first, count, num_pages, PAGE_TOKENS)
        token = tl.load(word, mask=mask, other=EMPTY)
        mine = keys + token
        key = _load_keys(mine, mask & (token >= 0) & (token < num_tokens))
        is_hit = _is_wanted(key, token, bound, first_tie)
        # every thread has read its token
        tl.debug_barrier()
        tl.store(mine, tl.full([BLOCK_PLACES], LOWEST_KEY, tl.int32), mask=is_hit)
        tl.store(word, tl.full([BLOCK_PLACES], EMPTY, tl.int32), mask=mask & ~is_hit)
    tl.debug_barrier()
    num_missing = _list_missing(keys, num_tokens, bound, first_tie)
    tl.debug_barrier()

    num_free, num_new = count * 0, count * 0
    for first in range(0, count, BLOCK_PLACES):
        word, mask = _find_place(pages, table, first, count, num_pages, PAGE_TOKENS)
        is_free = mask & (tl.load(word, mask=mask, other=0) == EMPTY)
        rank = num_free + tl.cumsum(is_free.to(tl.int32), 0) - 1
        takes = is_free & (rank < num_missing)
        token = _load_keys(keys + rank, takes)
        _, has_block = find_keys(tier, slot, head, token, takes, TIER_TOKENS)
        tl.debug_barrier()
        tl.store(word, -token + FIRST_NEW, mask=has_block)
        num_free += tl.sum(is_free.to(tl.int32))
        num_new += tl.sum(has_block.to(tl.int32))
    return num_new


@triton.jit
def _find_place(
    pages: tl.tuple,
    table: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    num_pages: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Where the positions of a block of places are, and which of them lie in pages of the pool."""
    place = first + tl.arange(0, BLOCK_PLACES)
    page = tl.load(table + place // PAGE_TOKENS, mask=place < count, other=-1)
    word = pages.position + page.to(tl.int64) * pages.word_stride + place % PAGE_TOKENS
    return word, (page >= 0) & (page < num_pages)


@triton.jit
def _load_keys(where: tl.tensor, mask: tl.tensor) -> tl.tensor:
    # volatile: other programs wrote them during this launch
    return tl.load(where, mask=mask, other=LOWEST_KEY, volatile=True)


@triton.jit
def _is_wanted(
    key: tl.tensor, token: tl.tensor, bound: tl.tensor, first_tie: tl.tensor
) -> tl.tensor:
    is_best = (key > bound) | ((key == bound) & (token >= first_tie))
    return is_best & (key > LOWEST_KEY)


@triton.jit
def _list_missing(
    keys: tl.tensor, num_tokens: tl.tensor, bound: tl.tensor, first_tie: tl.tensor
) -> tl.tensor:
    """Writes the wanted tokens, ascending, over the first keys; returns how many they are.

    A token's rank among them is at most its number, so no key of a later block is lost.
    """
    num_missing = num_tokens * 0
    for first in range(0, num_tokens, BLOCK_KEYS):
        token = first + tl.arange(0, BLOCK_KEYS)
        key = _load_keys(keys + token, token < num_tokens)
        is_missing = _is_wanted(key, token, bound, first_tie)
        rank = num_missing + tl.cumsum(is_missing.to(tl.int32), 0) - 1
        # every thread has read the keys of this block
        tl.debug_barrier()
        tl.store(keys + rank, token, mask=is_missing)
        num_missing += tl.sum(is_missing.to(tl.int32))
    return num_missing


@triton.jit
def _find_bound(
    keys: tl.tensor, num_tokens: tl.tensor, count: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The `count`-th largest key, and the first token of those at it that is among the best.

    From the highest digit down: a histogram of the digit over the keys that begin as the bound
    does tells the bound's next digit.
    """
    bins = tl.arange(0, NUM_BINS)
    bound = tl.full([], 0, tl.int64)
    num_equal, rest = num_tokens, count
    for step in range(NUM_DIGITS):
        shift = (NUM_DIGITS - 1 - step) * DIGIT_BITS
        counts = tl.zeros([NUM_BINS], tl.int32)
        for first in range(0, num_tokens, BLOCK_KEYS):
            token = first + tl.arange(0, BLOCK_KEYS)
            key = _load_keys(keys + token, token < num_tokens)
            begins = (key.to(tl.int64) - LOWEST_KEY) >> shift
            digit = (begins & (NUM_BINS - 1)).to(tl.int32)
            fits = ((begins >> DIGIT_BITS) == bound) & (token < num_tokens)
            counts += tl.histogram(digit, NUM_BINS, mask=fits)
        at_least = num_equal - tl.cumsum(counts, 0) + counts
        found = tl.sum((at_least >= rest).to(tl.int32)) - 1
        rest -= tl.sum(tl.where(bins > found, counts, 0))
        num_equal = tl.sum(tl.where(bins == found, counts, 0))
        bound = (bound << DIGIT_BITS) | found
    bound_key = (bound + LOWEST_KEY).to(tl.int32)
    first_tie = num_tokens * 0
    if num_equal > rest:
        first_tie = _skip_ties(keys, num_tokens, bound_key, num_equal - rest)
    return bound_key, first_tie


@triton.jit
def _skip_ties(
    keys: tl.tensor, num_tokens: tl.tensor, bound: tl.tensor, num_skipped: tl.tensor
) -> tl.tensor:
    """The first token at the bound behind `num_skipped` others at it: of equals the last stay."""
    found, num_ties = num_tokens, num_tokens * 0
    for first in range(0, num_tokens, BLOCK_KEYS):
        token = first + tl.arange(0, BLOCK_KEYS)
        ties = (_load_keys(keys + token, token < num_tokens) == bound) & (token < num_tokens)
        ties_up_to = num_ties + tl.cumsum(ties.to(tl.int32), 0)
        stays = ties & (ties_up_to > num_skipped)
        found = tl.minimum(found, tl.min(tl.where(stays, token, num_tokens)))
        num_ties += tl.sum(ties.to(tl.int32))
    return found
