"""The second launch of `recall`: the mass of every token, and which of them stand where."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arrival import arrives_last
from vllm_budgetkv.ops.triton.index import WORD_BITS, find_page
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
    INDEX_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: the mass of the tokens of a run of index pages.

    The last program of a head to finish gives places to what the head recalls.
    """
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot, num_tokens, count = find_task(recalling, index, head, row, INDEX_TOKENS)
    num_pages = tl.cdiv(num_tokens, INDEX_TOKENS)
    if (count <= 0) | (run * run_pages >= num_pages):
        return
    task, used_runs = row.to(tl.int64) * tl.num_programs(1) + head, tl.cdiv(num_pages, run_pages)
    # fmt: off
    peak, share = _join_runs(
        weights, task * GROUP, used_runs, num_runs, GROUP, BLOCK_GROUP, BLOCK_RUNS
    )
    # fmt: on
    keys = weights.keys + task * weights.num_tokens
    for entry in range(run * run_pages, tl.minimum((run + 1) * run_pages, num_pages)):
        page, is_page = find_page(index, slot, head, entry, entry < num_pages)
        stop = tl.minimum(num_tokens - entry * INDEX_TOKENS, INDEX_TOKENS)
        # fmt: off
        factors, base = prepare_page(
            query, index, head, row, page, is_page, scale,
            GROUP, HEAD_SIZE, NUM_WORDS, BLOCK_SIZE, BLOCK_GROUP, BLOCK_WORDS,
        )
        # fmt: on
        for first in range(0, stop, BLOCK_TOKENS):
            token = first + tl.arange(0, BLOCK_TOKENS)
            mask = token < tl.where(is_page, stop, 0)
            codes = load_codes(index, page, token, mask, NUM_WORDS, BLOCK_WORDS)
            logits = find_logits(factors, base, codes)
            mass = tl.sum(tl.exp2(logits - peak[:, None]) * share[:, None], 0)
            words = index.marks + page * index.word_stride + token // WORD_BITS
            held = (tl.load(words, mask=mask, other=-1) >> (token % WORD_BITS)) & 1
            key = tl.where(held != 0, LOWEST_KEY, tl.maximum(sort_key(mass), LOWEST_KEY + 1))
            tl.store(keys + entry * INDEX_TOKENS + token, key, mask=token < stop)
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
