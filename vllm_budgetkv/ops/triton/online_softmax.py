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
    weighing: tl.tuple,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
) -> tl.tuple:
    """Add the keys from `first_key` to `stop_key` to the state (sums, peak, total) of a tile.

    `queries` is [M, D], of the type that weights are rounded to. Query m sees the first
    `visible[m]` keys; without MASKED all see all, and the run is whole blocks. `entries` points at
    the head's page table.
    """
    sums, peak, total = state
    channel, asked = tl.arange(0, BLOCK_SIZE), queries.to(DOT)
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

        products = tl.dot(asked, tl.trans(keys.to(DOT)), input_precision="ieee")
        scores = bent(products * weighing.scale, weighing.cap, CAPPED)
        if MASKED:
            scores = tl.where(index[None, :] < visible[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # a query that has seen nothing yet keeps the peak of minus infinity
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        # not to the type of the values, which may have 8 bits
        weights = weights.to(queries.dtype).to(DOT)
        sums = tl.dot(weights, values.to(DOT), sums * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return sums, peak, total


@triton.jit
def bent(scores: tl.tensor, cap: tl.tensor, CAPPED: tl.constexpr) -> tl.tensor:
    """Scores bent to stay below the cap, by a tangent that keeps small ones exact."""
    if CAPPED:
        x = scores / cap
        size = tl.abs(x)
        decay = tl.exp2(size * -2.8853900817779268)
        far = (1.0 - decay) / (1.0 + decay)
        square = x * x
        near = 62.0 / 2835.0 - square * (1382.0 / 155925.0)
        near = near * square - 17.0 / 315.0
        near = near * square + 2.0 / 15.0
        near = near * square - 1.0 / 3.0
        near = size + size * square * near
        bent_size = tl.where(size < 0.3, near, far)
        scores = tl.where(x < 0.0, -bent_size, bent_size) * cap
    return scores


@triton.jit
def with_sink(total: tl.tensor, peak: tl.tensor, sink: tl.tensor) -> tl.tensor:
    """The total weight with that of a sink; still zero for a query that saw no key."""
    # beyond the bound, what the keys have vanishes beside it in any case
    more = tl.exp2(tl.minimum(sink * 1.4426950408889634 - peak, 120.0))
    return tl.where(total == 0.0, 0.0, total + more)


@triton.jit
def with_sinks(
    total: tl.tensor,
    peak: tl.tensor,
    weighing: tl.tuple,
    query_head: tl.tensor,
    mask: tl.tensor,
    HAS_SINKS: tl.constexpr,
) -> tl.tensor:
    """The same of queries of several heads, where there are sinks."""
    if HAS_SINKS:
        total = with_sink(total, peak, tl.load(weighing.sinks + query_head, mask=mask, other=0.0))
    return total


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
