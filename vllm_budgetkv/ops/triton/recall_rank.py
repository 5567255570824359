"""The second launch of `recall`: the mass of every token as a key, and their first digits."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.index import WORD_BITS, find_page, find_shape
from vllm_budgetkv.ops.triton.recall_narrow import (
    FIRST_SHIFT,
    HELD,
    KEY,
    NUM_BINS,
    NUM_BOUNDS,
    REST,
    add_counts,
    count_digits,
    mass_key,
    take_digit,
)
from vllm_budgetkv.ops.triton.recall_task import find_runs
from vllm_budgetkv.ops.triton.recall_weigh import find_logits, load_codes, prepare_page


@triton.jit
def rank_kernel(
    query: tl.tuple,
    index: tl.tuple,
    recalling: tl.tuple,
    weights: tl.tuple,
    choice: tl.tuple,
    scale: tl.tensor,
    BLOCK_RUNS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: the keys of the tokens of a run, and the first digit of the bound."""
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    # fmt: off
    slot, num_tokens, count, used_runs, run_tokens = find_runs(
        recalling, index, head, row, PAGE_WORDS, NUM_WORDS
    )
    # fmt: on
    if run >= used_runs:
        return
    task = row.to(tl.int64) * tl.num_programs(1) + head
    # fmt: off
    peak, share = _join_runs(
        weights, task * GROUP, used_runs, recalling.num_runs, GROUP, BLOCK_GROUP, BLOCK_RUNS
    )
    # fmt: on
    keys = choice.keys + task * choice.keys_stride
    entry_tokens, entries, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    stop_page = tl.minimum((run + 1) * recalling.run_pages, tl.cdiv(num_tokens, page_tokens))
    for number in range(run * recalling.run_pages, stop_page):
        page, is_page = find_page(index, slot, head, number, number < stop_page)
        rest_tokens = tl.minimum(num_tokens - number * page_tokens, page_tokens)
        stop = tl.cdiv(rest_tokens, entry_tokens)
        # fmt: off
        factors, base = prepare_page(
            query, index, head, row, page, is_page, scale,
            GROUP, HEAD_SIZE, NUM_WORDS, BLOCK_SIZE, BLOCK_GROUP, BLOCK_WORDS,
        )
        # fmt: on
        marks = index.words + page * index.word_stride + entries * NUM_WORDS
        for first in range(0, stop, BLOCK_ENTRIES):
            entry = first + tl.arange(0, BLOCK_ENTRIES)
            mask = entry < tl.where(is_page, stop, 0)
            codes = load_codes(index, page, entry, mask, NUM_WORDS, BLOCK_WORDS)
            logits = find_logits(factors, base, codes)
            mass = tl.sum(tl.exp2(logits - peak[:, None]) * share[:, None], 0)
            of_page = keys + number * page_tokens
            _store_keys(of_page, mass_key(mass), marks, entry, entry_tokens, rest_tokens, mask)
    # every thread has written its keys
    tl.debug_barrier()
    first, stop = run * run_tokens, tl.minimum((run + 1) * run_tokens, num_tokens)
    counts, _ = count_digits(keys, first, stop, 0, FIRST_SHIFT, NUM_BINS)
    add_counts(choice, task, counts, NUM_BINS)
    if arrives_last(choice.arrivals + task, used_runs):
        digit, rest, _ = take_digit(choice, task, count, NUM_BINS)
        bounds = choice.bounds + task * NUM_BOUNDS
        tl.store(bounds + KEY, digit)
        tl.store(bounds + REST, rest)


@triton.jit
def _store_keys(
    keys: tl.tensor,
    key: tl.tensor,
    marks: tl.tensor,
    entry: tl.tensor,
    entry_tokens: tl.tensor,
    num_tokens: tl.tensor,
    mask: tl.tensor,
) -> None:
    """Writes the key of each entry for those of its tokens that the head does not hold."""
    for neighbour in range(0, entry_tokens):
        token = entry * entry_tokens + neighbour
        is_token = token < num_tokens
        words = tl.load(marks + token // WORD_BITS, mask=mask & is_token, other=-1)
        is_held = ((words >> (token % WORD_BITS)) & 1) != 0
        tl.store(keys + token, tl.where(is_held, HELD, key), mask=is_token)


@triton.jit
def _join_runs(
    weights: tl.tuple,
    first_query_head: tl.tensor,
    used_runs: tl.tensor,
    num_runs: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_RUNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Peak of the logits of each query head and what a weight counts: 1 / sum, 0 for no head."""
    member, run = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_RUNS)
    at = (first_query_head + member)[:, None] * num_runs + run[None, :]
    mask = (member < GROUP)[:, None] & (run < used_runs)[None, :]
    peaks = tl.load(weights.peaks + at, mask=mask, other=float("-inf"))
    totals = tl.load(weights.totals + at, mask=mask, other=0.0)
    peak = tl.max(peaks, 1)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(totals * tl.exp2(peaks - peak[:, None]), 1)
    return peak, tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
