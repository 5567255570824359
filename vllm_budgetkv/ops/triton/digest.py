"""`digest` in Triton: one launch, one program per page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages
from vllm_budgetkv.ops.triton.heads import Heads

if TYPE_CHECKING:
    from vllm_budgetkv.ops.views import PagedHeads

MAX_BLOCK_TOKENS = 32


def digest(heads: PagedHeads) -> None:
    """See `vllm_budgetkv.ops.digest.digest`. H may run over the heads of several layers."""
    num_heads, width_pages = heads.table.shape
    if num_heads == 0 or width_pages == 0:
        return
    layout = heads.pool.layout
    digest_kernel[(width_pages, num_heads)](
        Pages.of(heads.pool),
        Heads.of(heads),
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_TOKENS=min(layout.page_tokens, MAX_BLOCK_TOKENS),
        num_warps=4,
    )


@triton.jit
def digest_kernel(
    pages: tl.tuple,
    heads: tl.tuple,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Grid [W, H]: reads the keys of a page twice, for its extremes and for the deviation."""
    entry, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tokens = tl.load(heads.lens + head * heads.lens_stride) - entry * PAGE_TOKENS
    if num_tokens <= 0:
        return
    num_tokens = tl.minimum(num_tokens, PAGE_TOKENS)
    page = tl.load(heads.table + head * heads.stride + entry).to(tl.int64)
    keys, channel = pages.key + page * pages.stride, tl.arange(0, BLOCK_SIZE)

    highest = tl.full([BLOCK_SIZE], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK_SIZE], float("inf"), tl.float32)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        tile, valid = _load_tile(keys, first, num_tokens, HEAD_SIZE, BLOCK_SIZE, BLOCK_TOKENS)
        highest = tl.maximum(highest, tl.max(tl.where(valid, tile, float("-inf")), 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(valid, tile, float("inf")), 0))
    centre = (highest + lowest) * 0.5

    deviation = tl.zeros([BLOCK_SIZE], tl.float32)
    for first in range(0, num_tokens, BLOCK_TOKENS):
        tile, valid = _load_tile(keys, first, num_tokens, HEAD_SIZE, BLOCK_SIZE, BLOCK_TOKENS)
        deviation += tl.sum(tl.where(valid, tl.abs(tile - centre[None, :]), 0.0), 0)
    radius = deviation / num_tokens

    box, mask = pages.digest + page * pages.digest_stride + channel, channel < HEAD_SIZE
    tl.store(box, centre.to(pages.digest.dtype.element_ty), mask=mask)
    tl.store(box + HEAD_SIZE, radius.to(pages.digest.dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(
    keys: tl.tensor,
    first: tl.tensor,
    num_tokens: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """float32 keys [BLOCK_TOKENS, BLOCK_SIZE] of some tokens of a page, and which are valid."""
    token, channel = first + tl.arange(0, BLOCK_TOKENS), tl.arange(0, BLOCK_SIZE)
    valid = (token < num_tokens)[:, None]
    where = keys + token[:, None] * HEAD_SIZE + channel[None, :]
    tile = tl.load(where, mask=valid & (channel < HEAD_SIZE)[None, :], other=0.0)
    return tile.to(tl.float32), valid
