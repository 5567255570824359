"""First half of `merge`: the kept token that is most like each dropped one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_budgetkv.ops.triton.arguments import Pages, require_dense
from vllm_budgetkv.ops.triton.heads import Heads
from vllm_budgetkv.ops.triton.precision import dot_type

if TYPE_CHECKING:
    from vllm_budgetkv.arithmetic.layout import PageLayout
    from vllm_budgetkv.ops.views import PagedHeads

NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)


class Split(NamedTuple):
    """The tokens of each head, kept ones first, then dropped ones, each ascending.

    order: int64 [H, n]. num_kept: int32 [H]. is_vision: uint8 [H, n].
    """

    order: Any
    num_kept: Any
    is_vision: Any
    is_vision_stride: Any

    @classmethod
    def of(cls, kept: torch.Tensor, held: torch.Tensor, is_vision: torch.Tensor) -> Split:
        require_dense(is_vision=is_vision)
        place = (~kept).byte() + (~held).byte()
        order = place.sort(dim=1, stable=True).indices
        num_kept = kept.sum(dim=1, dtype=torch.int32)
        return cls(order, num_kept, is_vision.view(torch.uint8), is_vision.stride(0))


class Pivots(NamedTuple):
    """Of every dropped token its highest cosine, its pivot and its position, [H, n] each.

    The cosine, float32, is minus infinity where there is no pivot; the others are int32.
    """

    similarity: Any
    token: Any
    position: Any

    @classmethod
    def empty(cls, shape: torch.Size, device: torch.device) -> Pivots:
        """What kept tokens, which the kernel leaves out, have."""
        similarity = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        token = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(similarity, token, torch.zeros_like(token))


def find_pivots(heads: PagedHeads, split: Split, shape: torch.Size, by_modality: bool) -> Pivots:
    """Compare every dropped token of a head with every kept one, of its modality or of any."""
    pool, layout = heads.pool, heads.pool.layout
    pivots, block = Pivots.empty(shape, pool.raw.device), _block_tokens(layout)
    pivot_kernel[(triton.cdiv(shape[1], block), shape[0])](
        Pages.of(pool),
        Heads.of(heads),
        split,
        pivots,
        shape[1],
        PAGE_TOKENS=layout.page_tokens,
        HEAD_SIZE=layout.head_size,
        BLOCK_SIZE=triton.next_power_of_2(layout.head_size),
        BLOCK_TOKENS=block,
        BY_MODALITY=by_modality,
        DOT=dot_type(layout.dtype),
        num_warps=4,
    )
    return pivots


def _block_tokens(layout: PageLayout) -> int:
    """Tokens on either side of a tile: products of full float32 take more registers."""
    return 64 if layout.dtype != torch.float32 and layout.head_size <= 128 else 32


@triton.jit
def pivot_kernel(
    pages: tl.tuple,
    heads: tl.tuple,
    split: tl.tuple,
    pivots: tl.tuple,
    num_tokens: tl.tensor,
    PAGE_TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BY_MODALITY: tl.constexpr,
    DOT: tl.constexpr,
) -> None:
    """Grid [token blocks, H]: a block of dropped tokens against all kept ones, block by block."""
    head = tl.program_id(1).to(tl.int64)
    held = tl.load(heads.lens + head * heads.lens_stride)
    num_kept = tl.load(split.num_kept + head)
    first_dropped = num_kept + tl.program_id(0) * BLOCK_TOKENS
    if first_dropped >= held:
        return
    table, order = heads.table + head * heads.stride, split.order + head * num_tokens
    kinds = split.is_vision + head * split.is_vision_stride
    lane = tl.arange(0, BLOCK_TOKENS)

    is_dropped = first_dropped + lane < held
    dropped = tl.load(order + first_dropped + lane, mask=is_dropped, other=0)
    page = tl.load(table + dropped // PAGE_TOKENS, mask=is_dropped, other=0).to(tl.int64)
    place = page * pages.stride + dropped % PAGE_TOKENS * HEAD_SIZE
    keys, inverse_norms = _load_keys(pages, place, is_dropped, HEAD_SIZE, BLOCK_SIZE)
    kind = tl.load(kinds + dropped, mask=is_dropped, other=0)

    best = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    pivot = tl.full([BLOCK_TOKENS], 0, tl.int32)
    for first in range(0, num_kept, BLOCK_TOKENS):
        is_kept = first + lane < num_kept
        token = tl.load(order + first + lane, mask=is_kept, other=0)
        kept_page = tl.load(table + token // PAGE_TOKENS, mask=is_kept, other=0).to(tl.int64)
        kept_place = kept_page * pages.stride + token % PAGE_TOKENS * HEAD_SIZE
        kept_keys, kept_norms = _load_keys(pages, kept_place, is_kept, HEAD_SIZE, BLOCK_SIZE)
        products = tl.dot(keys.to(DOT), tl.trans(kept_keys.to(DOT)), input_precision="ieee")
        cosines = products * inverse_norms[:, None] * kept_norms[None, :]
        fits = is_kept[None, :]
        if BY_MODALITY:
            kept_kind = tl.load(kinds + token, mask=is_kept, other=0)
            fits = fits & (kept_kind[None, :] == kind[:, None])
        cosines = tl.where(fits, cosines, float("-inf"))
        highest = tl.max(cosines, 1)
        ties = tl.where(cosines == highest[:, None], token.to(tl.int32)[None, :], NO_TOKEN)
        # of equal ones the first: tokens ascend, in a block and from block to block
        pivot = tl.where(highest > best, tl.min(ties, 1), pivot)
        best = tl.maximum(best, highest)

    target = head * num_tokens + dropped
    tl.store(pivots.similarity + target, best, mask=is_dropped)
    tl.store(pivots.token + target, pivot, mask=is_dropped)
    word = page * pages.word_stride + dropped % PAGE_TOKENS
    position = tl.load(pages.position + word, mask=is_dropped, other=0)
    tl.store(pivots.position + target, position, mask=is_dropped)


@triton.jit
def _load_keys(
    pages: tl.tuple,
    place: tl.tensor,
    mask: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Keys [M, D] and one over their norms, 0 for a key of norm 0."""
    channel = tl.arange(0, BLOCK_SIZE)
    where = pages.key + place[:, None] + channel[None, :]
    keys = tl.load(where, mask=mask[:, None] & (channel < HEAD_SIZE)[None, :], other=0.0)
    squares = tl.sum(keys.to(tl.float32) * keys.to(tl.float32), 1)
    norms = tl.sqrt_rn(squares)
    return keys, tl.where(norms > 0.0, 1.0 / tl.where(norms > 0.0, norms, 1.0), 0.0)
