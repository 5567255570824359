"""One tile of queries over a run of paged keys, with online softmax.

After https://arxiv.org/abs/1805.02867 and FlashAttention-2 (https://arxiv.org/abs/2307.08691).
Scores are in units of log 2, because a GPU has exp2 and no exp.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend_keys(
    state: tl.tuple,
    queries: tl.tensor,
    visible: tl.tensor,
    first_key: tl.tensor,
    stop_key: tl.tensor,
    pages: tl.tuple,
    entries: tl.tensor,
    scale: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """Add the keys from `first_key` to `stop_key` to the state (sums, peak, total) of a tile.

    `queries` is [M, D] and query m sees the first `visible[m]` keys; without MASKED all see all,
    and the run is whole blocks. `entries` points at the head's page table.
    """
    sums, peak, total = state
    channel = tl.arange(0, BLOCK_SIZE)
    for block in range(first_key, stop_key, BLOCK_KEYS):
        index = block + tl.arange(0, BLOCK_KEYS)
        held = index < stop_key
        if MASKED:
            page = tl.load(entries + index // PAGE_TOKENS, mask=held, other=0)
        else:
            page = tl.load(entries + index // PAGE_TOKENS)
        token = page.to(tl.int64) * pages.stride + index % PAGE_TOKENS * HEAD_SIZE
        where = token[:, None] + channel[None, :]
        # what lies behind the last token may be NaN, which no weight of zero would silence
        if MASKED:
            mask = held[:, None] & (channel < HEAD_SIZE)[None, :]
            keys = tl.load(pages.key + where, mask=mask, other=0.0)
            values = tl.load(pages.value + where, mask=mask, other=0.0)
        elif HEAD_SIZE != BLOCK_SIZE:
            mask = (channel < HEAD_SIZE)[None, :]
            keys = tl.load(pages.key + where, mask=mask, other=0.0)
            values = tl.load(pages.value + where, mask=mask, other=0.0)
        else:
            keys = tl.load(pages.key + where)
            values = tl.load(pages.value + where)

        scores = tl.dot(queries, tl.trans(keys.to(DOT)), input_precision="ieee") * scale
        if MASKED:
            scores = tl.where(index[None, :] < visible[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # a query that has seen nothing yet keeps the peak of minus infinity
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        weights = weights.to(values.dtype).to(DOT)
        sums = tl.dot(weights, values.to(DOT), sums * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return sums, peak, total


@triton.jit
def empty_state(BLOCK_QUERIES: tl.constexpr, BLOCK_SIZE: tl.constexpr) -> tl.tuple:
    """Sums, peak and total of a tile that has seen no key."""
    sums = tl.zeros([BLOCK_QUERIES, BLOCK_SIZE], tl.float32)
    peak = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    return sums, peak, tl.zeros([BLOCK_QUERIES], tl.float32)


@triton.jit
def mean(sums: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The attention output; zeros for a query that saw no key."""
    return sums / tl.where(total == 0.0, 1.0, total)[:, None]
