"""`select` in Triton: one launch, one program per head, a radix search and no sort."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.ranking import sort_key

BLOCK_TOKENS = 2048
NUM_WARPS = 8
# a key is tier (8 bits) | score (32 bits), found digit by digit
DIGIT_BITS: tl.constexpr = tl.constexpr(8)
NUM_BINS: tl.constexpr = tl.constexpr(1 << 8)
NUM_DIGITS: tl.constexpr = tl.constexpr(5)
# around every key
LOWEST: tl.constexpr = tl.constexpr(-1)
HIGHEST: tl.constexpr = tl.constexpr(1 << 40)


class Ranked(NamedTuple):
    """What ranks the tokens, float32 and uint8 [H, n], and the strides of both."""

    scores: Any
    score_stride: Any
    score_token_stride: Any
    tiers: Any
    tier_stride: Any
    tier_token_stride: Any


def select(
    scores: torch.Tensor, tiers: torch.Tensor, lens: torch.Tensor, budgets: torch.Tensor
) -> torch.Tensor:
    """See `vllm_budgetkv.ops.select.select`. H may run over the heads of several layers."""
    num_heads, num_tokens = scores.shape
    keep = torch.empty(num_heads, num_tokens, dtype=torch.bool, device=scores.device)
    if keep.numel() == 0:
        return keep
    score_strides, tier_strides = scores.stride(), tiers.stride()
    select_kernel[(num_heads,)](
        Ranked(scores, score_strides[0], score_strides[1], tiers, tier_strides[0], tier_strides[1]),
        lens,
        lens.stride(0),
        budgets,
        budgets.stride(0),
        keep.view(torch.uint8),
        num_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_warps=NUM_WARPS,
    )
    return keep


@triton.jit
def select_kernel(
    ranked: tl.tuple,
    lens: tl.tensor,
    lens_stride: tl.tensor,
    budgets: tl.tensor,
    budgets_stride: tl.tensor,
    keep: tl.tensor,
    num_tokens: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [H]: keeps the tokens above the key of the last that fits, and the latest at it."""
    head = tl.program_id(0).to(tl.int64)
    held = tl.load(lens + head * lens_stride)
    count = tl.minimum(tl.maximum(tl.load(budgets + head * budgets_stride), 0), held)

    # all or none need no search
    bound = tl.where(count == held, tl.full([], LOWEST, tl.int64), tl.full([], HIGHEST, tl.int64))
    num_ties, num_kept_ties = count * 0, count * 0
    if (count > 0) & (count < held):
        bound, num_ties, num_kept_ties = _find_bound(ranked, head, held, count, BLOCK_TOKENS)

    ties_before = count * 0
    for first in range(0, num_tokens, BLOCK_TOKENS):
        index = first + tl.arange(0, BLOCK_TOKENS)
        keys = _load_keys(ranked, head, index, held)
        is_tie = (keys == bound) & (index < held)
        ties = is_tie.to(tl.int32)
        # of the tokens at the bound, the last ones stay
        ties_up_to = ties_before + tl.cumsum(ties, 0)
        stays = (keys > bound) | (is_tie & (ties_up_to > num_ties - num_kept_ties))
        target = keep + head * num_tokens + index
        tl.store(target, (stays & (index < held)).to(tl.uint8), mask=index < num_tokens)
        ties_before += tl.sum(ties)


@triton.jit
def _find_bound(
    ranked: tl.tuple,
    head: tl.tensor,
    held: tl.tensor,
    count: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The `count`-th largest key, how many tokens have it and how many of those stay.

    From the highest digit down: a histogram of the digit over the keys that begin as the bound
    does tells the bound's next digit.
    """
    bins = tl.arange(0, NUM_BINS)
    bound = tl.full([], 0, tl.int64)
    num_equal, rest = held, count
    for step in range(NUM_DIGITS):
        shift = (NUM_DIGITS - 1 - step) * DIGIT_BITS
        counts = tl.zeros([NUM_BINS], tl.int32)
        for first in range(0, held, BLOCK_TOKENS):
            index = first + tl.arange(0, BLOCK_TOKENS)
            begins = _load_keys(ranked, head, index, held) >> shift
            digit = (begins & (NUM_BINS - 1)).to(tl.int32)
            fits = ((begins >> DIGIT_BITS) == bound) & (index < held)
            counts += tl.histogram(digit, NUM_BINS, mask=fits)
        at_least = num_equal - tl.cumsum(counts, 0) + counts
        found = tl.sum((at_least >= rest).to(tl.int32)) - 1
        rest -= tl.sum(tl.where(bins > found, counts, 0))
        num_equal = tl.sum(tl.where(bins == found, counts, 0))
        bound = (bound << DIGIT_BITS) | found
    return bound, num_equal, rest


@triton.jit
def _load_keys(ranked: tl.tuple, head: tl.tensor, index: tl.tensor, held: tl.tensor) -> tl.tensor:
    """int64 keys in the order of tier, then score; not negative."""
    at = index.to(tl.int64)
    scores = ranked.scores + head * ranked.score_stride + at * ranked.score_token_stride
    tiers = ranked.tiers + head * ranked.tier_stride + at * ranked.tier_token_stride
    score = sort_key(tl.load(scores, mask=index < held, other=0.0)).to(tl.int64) + 2**31
    tier = tl.load(tiers, mask=index < held, other=0).to(tl.int64)
    return (tier << 32) | score
