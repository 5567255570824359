"""How `recall` finds the key that the best tokens of a head are bounded by, digit by digit.

The programs of all runs of a head add a histogram of the digit to one in memory, over the keys that
begin as the bound does; the last of them to finish reads the bound's digit off it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.recall_task import EMPTY, find_place, find_runs, share_places

BLOCK_KEYS: tl.constexpr = tl.constexpr(1024)
BLOCK_PLACES: tl.constexpr = tl.constexpr(256)
# a key is 31 bits: two digits of 11 and one of 9
NUM_BINS: tl.constexpr = tl.constexpr(1 << 11)
FIRST_SHIFT: tl.constexpr = tl.constexpr(20)
SECOND_SHIFT: tl.constexpr = tl.constexpr(9)
LAST_BINS: tl.constexpr = tl.constexpr(1 << 9)
# keys of tokens that the head holds, of those whose mass is not a number, and of no mass
HELD: tl.constexpr = tl.constexpr(0)
NO_NUMBER: tl.constexpr = tl.constexpr(1)
NO_MASS: tl.constexpr = tl.constexpr(2)
KEY_MASK: tl.constexpr = tl.constexpr(2**31 - 1)
# the sign of a key's word: the token stands in a recall page
STANDS: tl.constexpr = tl.constexpr(-(2**31))
# of a head's `bounds`
KEY: tl.constexpr = tl.constexpr(0)
REST: tl.constexpr = tl.constexpr(1)
FIRST_TIE: tl.constexpr = tl.constexpr(2)
NUM_BOUNDS: tl.constexpr = tl.constexpr(4)
# of a head's `runs`
ABOVE: tl.constexpr = tl.constexpr(0)
START: tl.constexpr = tl.constexpr(1)
MISSING_END: tl.constexpr = tl.constexpr(2)
FREE_END: tl.constexpr = tl.constexpr(3)
NUM_RUN_FIELDS: tl.constexpr = tl.constexpr(4)


class Choice(NamedTuple):
    """What the launches of `recall` hand on, int32, for each row and head.

    keys: [R, H, n], see `mass_key`.
    arrivals, counts: [R, H] and [R, H, NUM_BINS], 0 between two launches.
    bounds: [R, H, NUM_BOUNDS]. KEY is how the bound begins, at last all of it; REST of the keys
        that begin so are among the best. A token at the bound is if it is not before FIRST_TIE.
    runs: [R, H, NUM_RUN_FIELDS, runs]: keys ABOVE what begins as the bound does, START of a
        run's missing tokens in their list, how many of these there are up to its END, and how many
        free places.
    tails: [R, H, runs, LAST_BINS], keys of a run that are at or above the bound, by its last digit.
    lists: [R, H, 2, C]: missing tokens, behind each run's START, and free places, behind the first
        place that a run's program looks after.
    """

    keys: Any
    keys_stride: Any
    arrivals: Any
    counts: Any
    bounds: Any
    runs: Any
    tails: Any
    lists: Any
    list_stride: Any


@triton.jit
def mass_key(mass: tl.tensor) -> tl.tensor:
    """int32 in the order of masses, which are not negative; above `HELD`, NaN lowest."""
    key = tl.where(mass > 0.0, mass.to(tl.int32, bitcast=True), 0) + NO_MASS
    return tl.where(mass == mass, key, NO_NUMBER)


@triton.jit
def load_keys(keys: tl.tensor, token: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Keys of some tokens, without the mark of those that stand."""
    return tl.load(keys + token, mask=mask, other=HELD) & KEY_MASK


@triton.jit
def count_digits(
    keys: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    begin: tl.tensor,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Histogram of the digit at SHIFT over tokens whose key begins so, and how many are above."""
    counts, num_above = tl.zeros([BINS], tl.int32), first * 0
    for start in range(first, stop, BLOCK_KEYS):
        token = start + tl.arange(0, BLOCK_KEYS)
        digits = load_keys(keys, token, token < stop) >> SHIFT
        fits = (digits // BINS == begin) & (token < stop)
        counts += tl.histogram(digits & (BINS - 1), BINS, mask=fits)
        is_above = (digits // BINS > begin) & (token < stop)
        num_above += tl.sum(is_above.to(tl.int32))
    return counts, num_above


@triton.jit
def add_counts(choice: tl.tuple, task: tl.tensor, counts: tl.tensor, BINS: tl.constexpr) -> None:
    """Adds a run's histogram to its head's."""
    where = choice.counts + task * NUM_BINS + tl.arange(0, BINS)
    tl.atomic_add(where, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def take_digit(
    choice: tl.tuple, task: tl.tensor, rest: tl.tensor, BINS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The bound's digit, how many of the keys that have it are among the best, and of how many.

    The histogram is 0 again then, for the next launch.
    """
    bins = tl.arange(0, BINS)
    where = choice.counts + task * NUM_BINS + bins
    # volatile: other programs wrote them during this launch
    counts = tl.load(where, volatile=True)
    # every thread has read them
    tl.debug_barrier()
    tl.store(where, tl.zeros([BINS], tl.int32))
    at_least = tl.sum(counts) - tl.cumsum(counts, 0) + counts
    digit = tl.sum((at_least >= rest).to(tl.int32)) - 1
    rest -= tl.sum(tl.where(bins > digit, counts, 0))
    return digit, rest, tl.sum(tl.where(bins == digit, counts, 0))


@triton.jit
def narrow_kernel(
    index: tl.tuple,
    recalling: tl.tuple,
    pages: tl.tuple,
    tables: tl.tuple,
    choice: tl.tuple,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: the second digit of the bound; marks the tokens that stand."""
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
    begin = tl.load(bounds + KEY)
    first, stop = run * run_tokens, tl.minimum((run + 1) * run_tokens, num_tokens)
    counts, _ = count_digits(keys, first, stop, begin, SECOND_SHIFT, NUM_BINS)
    add_counts(choice, task, counts, NUM_BINS)
    table = tables.table + slot * tables.slot_stride + head * tables.head_stride
    place, stop_place = share_places(count, run, used_runs)
    for start in range(place, stop_place, BLOCK_PLACES):
        at = start + tl.arange(0, BLOCK_PLACES)
        page, word, is_place = find_place(
            pages, table, at, at < stop_place, index.num_pages, PAGE_TOKENS
        )
        token = tl.load(word, mask=is_place, other=EMPTY)
        is_token = (token >= 0) & (token < num_tokens)
        # programs that count digits meanwhile do not look at this bit
        key = tl.load(keys + token, mask=is_token, other=HELD)
        tl.store(keys + token, key | STANDS, mask=is_token)
    if arrives_last(choice.arrivals + task, used_runs):
        digit, rest, _ = take_digit(choice, task, tl.load(bounds + REST), NUM_BINS)
        tl.store(bounds + KEY, begin * NUM_BINS + digit)
        tl.store(bounds + REST, rest)
