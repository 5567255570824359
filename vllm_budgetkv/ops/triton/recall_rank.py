"""The second launch of `recall`: the mass of every token, and which of them stand where."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.index import WORD_BITS, find_page, find_shape
from vllm_budgetkv.ops.triton.ranking import LOWEST_KEY, sort_key
from vllm_budgetkv.ops.triton.recall_assign import assign_places
from vllm_budgetkv.ops.triton.recall_weigh import (
    find_logits,
    find_task,
    load_codes,
    prepare_page,
)


@triton.jit
def choose_kernel(
    query: tl.tuple,
    index: tl.tuple,
    recalling: tl.tuple,
    weights: tl.tuple,
    run_pages: tl.tensor,
    num_runs: tl.tensor,
    scale: tl.tensor,
    pages: tl.tuple,
    tables: tl.tuple,
    tier: tl.tuple,
    arrivals: tl.tensor,
    TIER_TOKENS: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
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
    """Grid [runs, H, R]: the mass of the tokens of a run of index pages.

    The last program of a head to finish gives places to what the head recalls.
    """
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot, num_tokens, count = find_task(recalling, index, head, row, PAGE_WORDS, NUM_WORDS)
    entry_tokens, entries, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    num_pages = tl.cdiv(num_tokens, page_tokens)
    if (count <= 0) | (run * run_pages >= num_pages):
        return
    task, used_runs = row.to(tl.int64) * tl.num_programs(1) + head, tl.cdiv(num_pages, run_pages)
    # fmt: off
    peak, share = _join_runs(
        weights, task * GROUP, used_runs, num_runs, GROUP, BLOCK_GROUP, BLOCK_RUNS
    )
    # fmt: on
    keys = weights.keys + task * weights.keys_stride
    for number in range(run * run_pages, tl.minimum((run + 1) * run_pages, num_pages)):
        page, is_page = find_page(index, slot, head, number, number < num_pages)
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
            key = tl.maximum(sort_key(mass), LOWEST_KEY + 1)
            for neighbour in range(0, entry_tokens):
                token = entry * entry_tokens + neighbour
                is_token = token < rest_tokens
                words = tl.load(marks + token // WORD_BITS, mask=mask & is_token, other=-1)
                is_held = ((words >> (token % WORD_BITS)) & 1) != 0
                mine = tl.where(is_held, LOWEST_KEY, key)
                tl.store(keys + number * page_tokens + token, mine, mask=is_token)
    if arrives_last(arrivals + task, used_runs):
        # fmt: off
        num_moved = assign_places(
            pages, tables, tier, keys, slot, head, num_tokens, count, index.num_pages,
            TIER_TOKENS, PAGE_TOKENS,
        )
        # fmt: on
        moved = recalling.moved + slot * recalling.moved_stride + head
        tl.store(moved, tl.load(moved) + num_moved)


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
