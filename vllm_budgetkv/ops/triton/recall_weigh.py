"""The first launch of `recall`: logits from the index, and their peaks and sums over runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.index import (
    CODE_BITS,
    CODES_PER_WORD,
    MAX_CODE,
    find_page,
    find_shape,
    load_coded,
)
from vllm_budgetkv.ops.triton.recall_task import find_task


class Weights(NamedTuple):
    """What the first launch finds, of the logits of each run of index pages.

    peaks, totals: float32 [R, Hq, runs]. Logits are in units of log 2; a total is relative to its
        peak.
    """

    peaks: Any
    totals: Any


@triton.jit
def weigh_kernel(
    query: tl.tuple,
    index: tl.tuple,
    recalling: tl.tuple,
    weights: tl.tuple,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
) -> None:
    """Grid [runs, H, R]: peak and sum of the logits of a run of index pages, for each query head.

    The logits are made again by `rank_kernel`: kept, they would take a word for each token of
    each query head of each row.
    """
    run, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    slot, num_tokens, count = find_task(recalling, index, head, row, PAGE_WORDS, NUM_WORDS)
    entry_tokens, entries, page_tokens = find_shape(index, slot, head, PAGE_WORDS, NUM_WORDS)
    num_pages, run_pages = tl.cdiv(num_tokens, page_tokens), recalling.run_pages
    if (count <= 0) | (run * run_pages >= num_pages):
        return
    peak = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    for number in range(run * run_pages, tl.minimum((run + 1) * run_pages, num_pages)):
        page, is_page = find_page(index, slot, head, number, number < num_pages)
        rest_tokens = num_tokens - number * page_tokens
        stop = tl.minimum(tl.cdiv(rest_tokens, entry_tokens), entries)
        stop = tl.where(is_page, stop, 0)
        # fmt: off
        factors, base = prepare_page(
            query, index, head, row, page, is_page, scale,
            GROUP, HEAD_SIZE, NUM_WORDS, BLOCK_SIZE, BLOCK_GROUP, BLOCK_WORDS,
        )
        # fmt: on
        for first in range(0, stop, BLOCK_ENTRIES):
            entry = first + tl.arange(0, BLOCK_ENTRIES)
            codes = load_codes(index, page, entry, entry < stop, NUM_WORDS, BLOCK_WORDS)
            logits = find_logits(factors, base, codes)
            logits = tl.where((entry < stop)[None, :], logits, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(logits, 1))
            tokens = tl.minimum(rest_tokens - entry * entry_tokens, entry_tokens).to(tl.float32)
            weight = tl.sum(tl.exp2(logits - new_peak[:, None]) * tokens[None, :], 1)
            total = total * tl.exp2(peak - new_peak) + weight
            peak = new_peak
    member = tl.arange(0, BLOCK_GROUP)
    query_head = (row.to(tl.int64) * tl.num_programs(1) + head) * GROUP + member
    at = query_head * recalling.num_runs + run
    tl.store(weights.peaks + at, peak, mask=member < GROUP)
    tl.store(weights.totals + at, total, mask=member < GROUP)


@triton.jit
def prepare_page(
    query: tl.tuple,
    index: tl.tuple,
    head: tl.tensor,
    row: tl.tensor,
    page: tl.tensor,
    is_page: tl.tensor,
    scale: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The a and the b of scale q.k = b + sum of a code, for a page and the queries of a KV head.

    As a code says m + s (code - 7.5), a = scale q s of the channels that have codes, and b is
    scale q.m - 7.5 sum of a.
    """
    channel, number = tl.arange(0, BLOCK_SIZE), tl.arange(0, BLOCK_WORDS * CODES_PER_WORD)
    digest = index.digest + page * index.stride
    is_channel = channel < tl.where(is_page, HEAD_SIZE, 0)
    is_coded = number < tl.where(is_page, NUM_WORDS * CODES_PER_WORD, 0)
    mean = tl.load(digest + channel, mask=is_channel, other=0.0).to(tl.float32)
    step, coded = load_coded(digest, number, is_coded, HEAD_SIZE, NUM_WORDS)
    asked = _load_queries(query, head, row, channel, is_channel, GROUP, BLOCK_GROUP)
    factors = _load_queries(query, head, row, coded, is_coded, GROUP, BLOCK_GROUP)
    factors *= step[None, :] * scale
    base = scale * tl.sum(asked * mean[None, :], 1) - tl.sum(factors, 1) * (0.5 * MAX_CODE)
    return factors, base


@triton.jit
def _load_queries(
    query: tl.tuple,
    head: tl.tensor,
    row: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
) -> tl.tensor:
    """float32 [BLOCK_GROUP, channels]: of the queries of one KV head, then zeros."""
    member = tl.arange(0, BLOCK_GROUP)
    vectors = row.to(tl.int64) * query.stride + (head * GROUP + member) * query.head_stride
    where = query.data + vectors[:, None] + channel[None, :]
    mask = (member < GROUP)[:, None] & mask[None, :]
    return tl.load(where, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_codes(
    index: tl.tuple,
    page: tl.tensor,
    entry: tl.tensor,
    mask: tl.tensor,
    NUM_WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
) -> tl.tensor:
    """float32 [entries, codes]: the codes of some entries of a page, 0 to 15."""
    word, lane = tl.arange(0, BLOCK_WORDS), tl.arange(0, CODES_PER_WORD)
    where = index.words + page * index.word_stride + entry[:, None] * NUM_WORDS + word[None, :]
    words = tl.load(where, mask=mask[:, None] & (word < NUM_WORDS)[None, :], other=0)
    codes = (words[:, :, None] >> (lane * CODE_BITS)[None, None, :]) & MAX_CODE
    return tl.reshape(codes.to(tl.float32), (entry.shape[0], BLOCK_WORDS * CODES_PER_WORD))


@triton.jit
def find_logits(factors: tl.tensor, base: tl.tensor, codes: tl.tensor) -> tl.tensor:
    """float32 [queries, entries]: b + sum of a code, see `prepare_page`.

    Codes are exact in tf32, and the parts of a factor have 22 of its 24 bits.
    """
    return tl.dot(factors, tl.trans(codes), input_precision="tf32x3") + base[:, None]
