"""`merge` in Triton: a launch finds the pivots, torch groups the moves, a launch mixes.

Sources are dropped tokens and pivots kept ones, so no program reads what another writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages
from vllm_budgetkv.ops.triton.heads import Heads
from vllm_budgetkv.ops.triton.pivots import Pivots, Split, find_pivots
from vllm_budgetkv.ops.triton.precision import round_to

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads

BLOCK_SOURCES = 16


class Moves(NamedTuple):
    """The sources of every pivot: `source[h, first : first + count]`, ascending.

    source: int64 [H, n]. first, count: int32 [H, n + 1], by pivot; the last column means nothing.
    """

    source: Any
    first: Any
    count: Any

    @classmethod
    def by_pivot(cls, pivots: Pivots, moves: torch.Tensor) -> Moves:
        """Group the tokens of which `moves`, bool [H, n], is True."""
        num_heads, num_tokens = moves.shape
        pivot = pivots.token.long().masked_fill(~moves, num_tokens)
        source = pivot.sort(dim=1, stable=True).indices
        count = torch.zeros(num_heads, num_tokens + 1, dtype=torch.int32, device=moves.device)
        count.scatter_add_(1, pivot, torch.ones_like(pivots.token))
        return cls(source, count.cumsum(1, dtype=torch.int32) - count, count)


def merge(
    keep: torch.Tensor,
    heads: PagedHeads,
    is_vision: torch.Tensor,
    mode: str,
    seen_tokens: int,
    threshold: float,
) -> None:
    """See `vllm_budgetkv.ops.merge.merge`."""
    num_heads, num_tokens = keep.shape
    if num_heads == 0 or num_tokens == 0:
        return
    pool, layout = heads.pool, heads.pool.layout
    held = torch.arange(num_tokens, device=keep.device) < heads.lens[:, None]
    split = Split.of(keep & held, held, is_vision)
    pivots = find_pivots(heads, split, keep.shape, by_modality=mode == "value")
    moves = pivots.similarity > -torch.inf
    if mode == "weighted":
        moves &= _is_alike(pivots, moves, seen_tokens)
    if mode == "value":
        moves &= pivots.similarity >= threshold
    mix_kernel[(num_tokens, num_heads)](
        Pages.of(pool),
        Heads.of(heads),
        Moves.by_pivot(pivots, moves),
        pivots.similarity,
        num_tokens,
        MODE=mode,
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_SOURCES=BLOCK_SOURCES,
        num_warps=2,
    )


def _is_alike(pivots: Pivots, moves: torch.Tensor, seen_tokens: int) -> torch.Tensor:
    """bool [H, n]: the mean of a token's position, over heads, is at least that of all moves."""
    positions = pivots.position.long().clamp(0, max(seen_tokens - 1, 0))
    cosines = pivots.similarity.double().masked_fill(~moves, 0.0)
    sums = cosines.new_zeros(max(seen_tokens, 1))
    counts = torch.zeros_like(sums).index_add_(0, positions.flatten(), moves.flatten().double())
    sums.index_add_(0, positions.flatten(), cosines.flatten())
    return (sums / counts)[positions] >= cosines.sum() / moves.sum()


@triton.jit
def mix_kernel(
    pages: tl.tuple,
    heads: tl.tuple,
    moves: tl.tuple,
    similarity: tl.tensor,
    num_tokens: tl.tensor,
    MODE: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SOURCES: tl.constexpr,
) -> None:
    """Grid [n, H]: one pivot takes in its sources, block by block."""
    pivot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = head * (num_tokens + 1) + pivot
    count = tl.load(moves.count + group)
    if count == 0:
        return
    sources = moves.source + head * num_tokens + tl.load(moves.first + group)
    table = heads.table + head * heads.stride
    channel = tl.arange(0, BLOCK_SIZE)
    own_page = tl.load(table + pivot // PAGE_TOKENS).to(tl.int64)
    own = own_page * pages.stride + pivot % PAGE_TOKENS * HEAD_SIZE + channel
    is_channel = channel < HEAD_SIZE
    own_value = tl.load(pages.value + own, mask=is_channel, other=0.0).to(tl.float32)
    own_key = tl.load(pages.key + own, mask=is_channel, other=0.0).to(tl.float32)
    own_norm = tl.sqrt_rn(tl.sum(own_value * own_value))

    key_sums, value_sums = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    weight_sum = tl.full([], 0.0, tl.float32)
    for first in range(0, count, BLOCK_SOURCES):
        lane = first + tl.arange(0, BLOCK_SOURCES)
        source = tl.load(sources + lane, mask=lane < count, other=0)
        page = tl.load(table + source // PAGE_TOKENS, mask=lane < count, other=0).to(tl.int64)
        place = page * pages.stride + source % PAGE_TOKENS * HEAD_SIZE
        where, mask = (
            place[:, None] + channel[None, :],
            (lane < count)[:, None] & is_channel[None, :],
        )
        value = tl.load(pages.value + where, mask=mask, other=0.0).to(tl.float32)
        cosine = tl.load(similarity + head * num_tokens + source, mask=lane < count, other=0.0)
        weight = tl.where(lane < count, _weigh(cosine, value, own_norm, MODE), 0.0)
        value_sums += tl.sum(weight[:, None] * value, 0)
        if MODE != "value":
            key = tl.load(pages.key + where, mask=mask, other=0.0).to(tl.float32)
            key_sums += tl.sum(weight[:, None] * key, 0)
        weight_sum += tl.sum(weight)

    # by "pivot" a source is first averaged with its pivot, which so gets the other half
    own_weight = 1.0 + weight_sum if MODE == "pivot" else 1.0
    total = 1.0 + (weight_sum if MODE == "value" else count.to(tl.float32))
    # a narrow row is read by several threads, of which one writes it
    tl.debug_barrier()
    mixed = (own_weight * own_value + value_sums) / total
    tl.store(pages.value + own, round_to(mixed, pages.value.dtype.element_ty), mask=is_channel)
    if MODE != "value":
        mixed = (own_weight * own_key + key_sums) / total
        tl.store(pages.key + own, round_to(mixed, pages.key.dtype.element_ty), mask=is_channel)


@triton.jit
def _weigh(
    cosine: tl.tensor, value: tl.tensor, own_norm: tl.tensor, MODE: tl.constexpr
) -> tl.tensor:
    """The weight of each source in the mean of its pivot."""
    if MODE == "weighted":
        weight = cosine
    elif MODE == "value":
        norm = tl.sqrt_rn(tl.sum(value * value, 1))
        both = norm + own_norm
        share = norm / tl.where(both > 0.0, both, 1.0)
        weight = tl.maximum(cosine, 0.0) * share
    else:
        weight = tl.full(cosine.shape, 0.5 if MODE == "pivot" else 1.0, tl.float32)
    return weight
