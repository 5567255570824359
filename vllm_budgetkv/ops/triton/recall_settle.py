"""The fourth launch of `recall`: the bound's last digit, and which tokens at it are taken."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.recall_narrow import (
    ABOVE,
    BLOCK_KEYS,
    FIRST_TIE,
    HELD,
    KEY,
    LAST_BINS,
    NUM_BOUNDS,
    NUM_RUN_FIELDS,
    REST,
    START,
    add_counts,
    count_digits,
    load_keys,
    take_digit,
)
from vllm_budgetkv.ops.triton.recall_task import find_runs


@triton.jit
def settle_kernel(
    index: tl.tuple,
    recalling: tl.tuple,
    choice: tl.tuple,
    PAGE_WORDS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: the last digit of the bound, counted for each run as well.

    The last program of a head to finish finds the first of the tokens at the bound that is among
    the best, and where in their list the best tokens of each run begin.
    """
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # fmt: off
    _, num_tokens, _, used_runs, run_tokens = find_runs(
        recalling, index, head, row, PAGE_WORDS, NUM_WORDS
    )
    # fmt: on
    if run >= used_runs:
        return
    task = row.to(tl.int64) * tl.num_programs(1) + head
    keys, bounds = choice.keys + task * choice.keys_stride, choice.bounds + task * NUM_BOUNDS
    runs = choice.runs + task * recalling.num_runs * NUM_RUN_FIELDS
    tails = choice.tails + task * recalling.num_runs * LAST_BINS
    begin = tl.load(bounds + KEY)
    first, stop = run * run_tokens, tl.minimum((run + 1) * run_tokens, num_tokens)
    counts, num_above = count_digits(keys, first, stop, begin, 0, LAST_BINS)
    add_counts(choice, task, counts, LAST_BINS)
    tail = num_above + tl.sum(counts) - tl.cumsum(counts, 0) + counts
    tl.store(tails + run * LAST_BINS + tl.arange(0, LAST_BINS), tail)
    tl.store(runs + ABOVE * recalling.num_runs + run, num_above)
    if arrives_last(choice.arrivals + task, used_runs):
        digit, rest, num_ties = take_digit(choice, task, tl.load(bounds + REST), LAST_BINS)
        bound, num_late = begin * LAST_BINS + digit, num_ties - rest
        # fmt: off
        tie_run, num_skipped = _start_runs(
            runs, tails, used_runs, recalling.num_runs, digit, bound, num_late, BLOCK_RUNS
        )
        # fmt: on
        first_tie = num_late * 0
        if num_late > 0:
            first, stop = tie_run * run_tokens, (tie_run + 1) * run_tokens
            first_tie = _skip_ties(keys, first, tl.minimum(stop, num_tokens), bound, num_skipped)
        tl.store(bounds + KEY, bound)
        tl.store(bounds + FIRST_TIE, first_tie)


@triton.jit
def _start_runs(
    runs: tl.tensor,
    tails: tl.tensor,
    used_runs: tl.tensor,
    num_runs: tl.tensor,
    digit: tl.tensor,
    bound: tl.tensor,
    num_skipped: tl.tensor,
    BLOCK_RUNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Writes where the list of each run starts: behind the best tokens of those before it.

    Returns:
        The run with the first tie behind `num_skipped` others, and how many of these are in it.
    """
    run = tl.arange(0, BLOCK_RUNS)
    is_run = run < used_runs
    tail, above = tails + run * LAST_BINS + digit, runs + ABOVE * num_runs + run
    # volatile: other programs wrote them during this launch
    at_least = tl.load(tail, mask=is_run, other=0, volatile=True)
    num_best = tl.load(above, mask=is_run, other=0, volatile=True)
    is_inner = run < tl.where(digit < LAST_BINS - 1, used_runs, 0)
    next_tail = tl.load(tail + 1, mask=is_inner, other=0, volatile=True)
    num_best = tl.where(is_inner, next_tail, num_best)
    num_ties = at_least - num_best
    ties_up_to = tl.cumsum(num_ties, 0)
    num_early = tl.minimum(tl.maximum(num_skipped - ties_up_to + num_ties, 0), num_ties)
    # held tokens, which a head that lacks too little is bounded by, are not taken
    num_best += tl.where(bound > HELD, num_ties - num_early, 0)
    tl.store(runs + START * num_runs + run, tl.cumsum(num_best, 0) - num_best, mask=is_run)
    is_skipped = ties_up_to <= num_skipped
    num_before = tl.sum(tl.where(is_skipped, num_ties, 0))
    return tl.sum(is_skipped.to(tl.int32)), num_skipped - num_before


@triton.jit
def _skip_ties(
    keys: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    bound: tl.tensor,
    num_skipped: tl.tensor,
) -> tl.tensor:
    """The first token at the bound behind `num_skipped` others at it: of equals the last stay."""
    found, num_ties = stop, stop * 0
    for start in range(first, stop, BLOCK_KEYS):
        token = start + tl.arange(0, BLOCK_KEYS)
        ties = (load_keys(keys, token, token < stop) == bound) & (token < stop)
        ties_up_to = num_ties + tl.cumsum(ties.to(tl.int32), 0)
        stays = ties & (ties_up_to > num_skipped)
        found = tl.minimum(found, tl.min(tl.where(stays, token, stop)))
        num_ties += tl.sum(ties.to(tl.int32))
    return found
